"""Chapter 08: wrong answers that people give, and right ones in another form."""

import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception

THIN = "2. Two thin matrices"
BEGIN = "3. Where it begins"
LEARNS = "4. What learns first"
MERGE = "5. Merging"
MANY = "6. Many adapters, one base"
COST = "7. What it costs"
PREFIX = "9. Prefixes and prompts"
GALORE = "10. GaLore"


# lora_forward


def _lora(x, weight, a, b, scaling):
    return x @ weight.T + x @ a.T @ b.T * scaling


def _root(rank, is_rank_stabilised):
    return math.sqrt(rank) if is_rank_stabilised else rank


@misconception(
    "lora_forward",
    "Your factor is alpha, without the rank. It is alpha / r, so that alpha keeps its meaning when "
    "the rank changes.",
    see=THIN,
)
def takes_alpha_alone(x, weight, a, b, alpha, is_rank_stabilised=False):
    return _lora(x, weight, a, b, alpha)


@misconception(
    "lora_forward",
    "Your factor is applied twice: once to A's product and once to B's.",
    see=THIN,
)
def scales_twice(x, weight, a, b, alpha, is_rank_stabilised=False):
    scaling = alpha / _root(a.shape[0], is_rank_stabilised)
    return x @ weight.T + (x @ a.T * scaling) @ b.T * scaling


@misconception(
    "lora_forward",
    "You form B A, as large as the weight, at each call. Multiply x by A, then by B: r numbers go "
    "between them.",
    see=THIN,
)
def forms_the_product(x, weight, a, b, alpha, is_rank_stabilised=False):
    return x @ (weight + b @ a * (alpha / _root(a.shape[0], is_rank_stabilised))).T


@misconception(
    "lora_forward",
    "You divide by the root of the rank always. That is the rank-stabilised variant; plain LoRA "
    "divides by r.",
    see=THIN,
)
def always_takes_the_root(x, weight, a, b, alpha, is_rank_stabilised=False):
    return _lora(x, weight, a, b, alpha / math.sqrt(a.shape[0]))


@misconception(
    "lora_forward",
    "You pass over is_rank_stabilised: it asks for alpha / sqrt(r).",
    see=THIN,
)
def never_takes_the_root(x, weight, a, b, alpha, is_rank_stabilised=False):
    return _lora(x, weight, a, b, alpha / a.shape[0])


@misconception(
    "lora_forward",
    "The frozen layer is missing: the adapter is added to it, it does not replace it.",
    see=THIN,
)
def leaves_the_base_out(x, weight, a, b, alpha, is_rank_stabilised=False):
    return x @ a.T @ b.T * (alpha / _root(a.shape[0], is_rank_stabilised))


@alternative("lora_forward")
def uses_linear(x, weight, a, b, alpha, is_rank_stabilised=False):
    power = 0.5 if is_rank_stabilised else 1.0
    return F.linear(x, weight) + alpha * a.shape[0] ** -power * F.linear(F.linear(x, a), b)


@alternative("lora_forward")
def scales_the_narrow_part(x, weight, a, b, alpha, is_rank_stabilised=False):
    low = torch.einsum("...d,rd->...r", x, a) * (alpha / _root(a.shape[0], is_rank_stabilised))
    return x @ weight.T + low @ b.T


# initial_adapter


@misconception(
    "initial_adapter",
    "A and B are both random: B A is not zero, and the model is damaged before it has learned "
    "anything.",
    see=BEGIN,
)
def makes_both_random(noise, fan_out):
    rank, fan_in = noise.shape
    filled = noise.flatten().repeat(fan_out)[: fan_out * rank].view(fan_out, rank)
    return noise / math.sqrt(fan_in), filled / math.sqrt(rank)


@misconception(
    "initial_adapter",
    "A and B are both zero: then both gradients are zero as well, each being a product with the "
    "other, and nothing ever learns.",
    see=BEGIN,
)
def makes_both_zero(noise, fan_out):
    return torch.zeros_like(noise), noise.new_zeros(fan_out, noise.shape[0])


@misconception(
    "initial_adapter",
    "You divide by sqrt(r). The sum in x A^T runs over D inputs: the spread is 1 / sqrt(D).",
    see=BEGIN,
)
def divides_by_the_root_of_the_rank(noise, fan_out):
    return noise / math.sqrt(noise.shape[0]), noise.new_zeros(fan_out, noise.shape[0])


@misconception(
    "initial_adapter",
    "A is not scaled: uniform in [-1, 1], its outputs grow with the root of D.",
    see=BEGIN,
)
def does_not_scale(noise, fan_out):
    return noise.clone(), noise.new_zeros(fan_out, noise.shape[0])


@misconception(
    "initial_adapter",
    "Your B has the shape of its transpose: it maps r numbers to F, so it is (F, r).",
    see=THIN,
)
def transposes_b(noise, fan_out):
    return noise / math.sqrt(noise.shape[1]), noise.new_zeros(noise.shape[0], fan_out)


@alternative("initial_adapter")
def multiplies_by_a_power(noise, fan_out):
    return noise * noise.shape[1] ** -0.5, torch.zeros(fan_out, len(noise), dtype=noise.dtype)


@alternative("initial_adapter")
def makes_zeros_from_the_noise(noise, fan_out):
    b = (noise[:, :1] * 0).T.expand(fan_out, -1).clone()
    return noise / noise.shape[1] ** 0.5, b.abs()


# merge_adapters


@misconception(
    "merge_adapters",
    "The scaling is applied twice. B A comes unscaled from training: multiply once.",
    see=MERGE,
)
def scales_the_merge_twice(weight, adapters):
    return weight + sum(s * s * b @ a for a, b, s in adapters) if adapters else weight.clone()


@misconception(
    "merge_adapters",
    "The scaling is missing: the merged layer is not the one that was trained.",
    see=MERGE,
)
def forgets_the_scaling(weight, adapters):
    return weight + sum(b @ a for a, b, _ in adapters) if adapters else weight.clone()


@misconception(
    "merge_adapters",
    "You merge the average of the adapters. They are added up, as the layer adds them.",
    see=MERGE,
)
def averages_adapters(weight, adapters):
    if not adapters:
        return weight.clone()
    return weight + sum(s * b @ a for a, b, s in adapters) / len(adapters)


@misconception(
    "merge_adapters",
    "You add A's and B's first and multiply then: (B1 + B2)(A1 + A2) has cross terms that no "
    "adapter has learned.",
    see=MERGE,
)
def adds_factors_before_the_product(weight, adapters):
    if len({len(a) for a, _, _ in adapters}) != 1:
        return weight + sum(s * b @ a for a, b, s in adapters) if adapters else weight.clone()
    return weight + sum(s * b for _, b, s in adapters) @ sum(a for a, _, _ in adapters)


@misconception(
    "merge_adapters",
    "You merge the last adapter alone.",
    see=MERGE,
)
def merges_the_last(weight, adapters):
    merged = weight.clone()
    for a, b, s in adapters:
        merged = weight + s * b @ a
    return merged


@alternative("merge_adapters")
def joins_ranks(weight, adapters):
    if not adapters:
        return weight.clone()
    a = torch.cat([a for a, _, _ in adapters])
    return torch.addmm(weight, torch.cat([s * b for _, b, s in adapters], 1), a)


@alternative("merge_adapters")
def adds_outer_products(weight, adapters):
    merged = weight.clone()
    for a, b, s in adapters:
        for row, column in zip(a, b.T, strict=True):
            merged = merged + s * torch.outer(column, row)
    return merged


# batched_lora


def _batched(x, a, b, scalings, rows):
    low = torch.einsum("btd,brd->btr", x, a[rows])
    return torch.einsum("btr,bfr->btf", low, b[rows]) * scalings[rows][:, None, None]


def _silent(y, rows):
    return y.masked_fill((rows < 0)[:, None, None], 0.0)


@misconception(
    "batched_lora",
    "Rows without an adapter get the last one: a[-1] is Python's last element, not none.",
    see=MANY,
)
def takes_minus_one_for_the_last(x, a, b, scalings, rows):
    return _batched(x, a, b, scalings, rows)


@misconception(
    "batched_lora",
    "Each adapter has a scaling of its own; yours are missing.",
    see=MANY,
)
def forgets_scalings(x, a, b, scalings, rows):
    return _silent(_batched(x, a, b, torch.ones_like(scalings), rows), rows)


@misconception(
    "batched_lora",
    "Row i uses adapter i. It uses rows[i]: users come in any order.",
    see=MANY,
)
def numbers_adapters_by_row(x, a, b, scalings, rows):
    return _silent(_batched(x, a, b, scalings, torch.arange(len(x)) % len(a)), rows)


@misconception(
    "batched_lora",
    "Every row goes through all adapters. Each has one.",
    see=MANY,
)
def adds_all_adapters(x, a, b, scalings, rows):
    y = torch.einsum("btd,nrd,nfr,n->btf", x, a, b, scalings)
    return _silent(y, rows)


@misconception(
    "batched_lora",
    "The scaling is taken by row and not by adapter: scalings[rows], as for a and b.",
    see=MANY,
)
def takes_scalings_by_row(x, a, b, scalings, rows):
    by_row = scalings[torch.arange(len(x)) % len(scalings)][:, None, None]
    return _silent(_batched(x, a, b, torch.ones_like(scalings), rows) * by_row, rows)


@alternative("batched_lora")
def multiplies_by_bmm(x, a, b, scalings, rows):
    keep = (rows >= 0).to(x.dtype)
    chosen = rows.clamp(min=0)
    low = torch.bmm(x, a[chosen].mT)
    return torch.bmm(low, b[chosen].mT) * (scalings[chosen] * keep)[:, None, None]


@alternative("batched_lora")
def adds_an_empty_adapter(x, a, b, scalings, rows):
    a, b = (torch.cat([m, torch.zeros_like(m[:1])]) for m in (a, b))
    return _batched(x, a, b, torch.cat([scalings, scalings[:1]]), rows)


# adapter_gradients


def _gradients(grad_y, x, a, b, s):
    low = s * grad_y @ b
    return low.T @ x, s * grad_y.T @ (x @ a.T), low @ a


@misconception(
    "adapter_gradients",
    "The scaling is missing in all three: it stands before the whole product, so every gradient "
    "carries it.",
    see=LEARNS,
)
def leaves_the_scaling_out(grad_y, x, a, b, scaling):
    return _gradients(grad_y, x, a, b, 1.0)


@misconception(
    "adapter_gradients",
    "The scaling is missing in B's gradient.",
    see=LEARNS,
)
def scales_only_a(grad_y, x, a, b, scaling):
    grad_a, _, grad_x = _gradients(grad_y, x, a, b, scaling)
    return grad_a, grad_y.T @ (x @ a.T), grad_x


@misconception(
    "adapter_gradients",
    "Your scaling enters squared: the forward pass has it once.",
    see=LEARNS,
)
def squares_the_scaling(grad_y, x, a, b, scaling):
    return _gradients(grad_y, x, a, b, scaling**2)


@misconception(
    "adapter_gradients",
    "A has a gradient in your formula even where B is zero. Its gradient "
    "is a product with B, and zero at the start.",
    see=LEARNS,
)
def sends_a_the_gradient_of_the_sum(grad_y, x, a, b, scaling):
    _, grad_b, grad_x = _gradients(grad_y, x, a, b, scaling)
    through = scaling * grad_y.mean(1, keepdim=True).expand(-1, a.shape[0])
    return through.T @ x, grad_b, grad_x


@misconception(
    "adapter_gradients",
    "Your gradients are averaged over the rows. grad_y carries the loss's mean already: sum.",
    see=LEARNS,
)
def averages_over_rows(grad_y, x, a, b, scaling):
    grad_a, grad_b, grad_x = _gradients(grad_y, x, a, b, scaling)
    return grad_a / len(x), grad_b / len(x), grad_x


@alternative("adapter_gradients")
def goes_through_the_product(grad_y, x, a, b, scaling):
    whole = scaling * grad_y.T @ x
    return b.T @ whole, whole @ a.T, scaling * grad_y @ (b @ a)


@alternative("adapter_gradients")
def writes_sums_of_indices(grad_y, x, a, b, scaling):
    return (
        scaling * torch.einsum("nf,fr,nd->rd", grad_y, b, x),
        scaling * torch.einsum("nf,nd,rd->fr", grad_y, x, a),
        scaling * torch.einsum("nf,fr,rd->nd", grad_y, b, a),
    )


# training_bytes


def _bytes(shapes, rank):
    if rank is None:
        count = sum(f * d for f, d in shapes)
        return 0, 4 * count, 8 * count
    count = sum(rank * (f + d) for f, d in shapes)
    return 4 * count, 4 * count, 8 * count


@misconception(
    "training_bytes",
    "Your frozen weights still have gradients and Adam's states. They need none: that is where "
    "LoRA's memory is saved.",
    see=COST,
)
def gives_frozen_weights_gradients(shapes, rank):
    whole, own = _bytes(shapes, None), _bytes(shapes, rank)
    return own if rank is None else tuple(a + b for a, b in zip(whole, own, strict=True))


@misconception(
    "training_bytes",
    "You count A alone: r D. B has r F more.",
    see=COST,
)
def counts_a_alone(shapes, rank):
    if rank is None:
        return _bytes(shapes, None)
    count = sum(rank * d for _, d in shapes)
    return 4 * count, 4 * count, 8 * count


@misconception(
    "training_bytes",
    "You count one number of Adam's a parameter. It keeps two, momentum and variance.",
    see=COST,
)
def keeps_one_moment(shapes, rank):
    parameters, gradients, states = _bytes(shapes, rank)
    return parameters, gradients, states // 2


@misconception(
    "training_bytes",
    "You multiply rank, height and width. An adapter has r (F + D) numbers: a sum of two thin "
    "matrices.",
    see=COST,
)
def multiplies_height_and_width(shapes, rank):
    if rank is None:
        return _bytes(shapes, None)
    count = sum(rank * f * d for f, d in shapes)
    return 4 * count, 4 * count, 8 * count


@misconception(
    "training_bytes",
    "You count a second copy of the weights for full fine-tuning. They are there already: what is "
    "added are gradients and states.",
    see=COST,
)
def copies_the_weights(shapes, rank):
    parameters, gradients, states = _bytes(shapes, rank)
    return (gradients if rank is None else parameters), gradients, states


@alternative("training_bytes")
def adds_matrix_by_matrix(shapes, rank):
    total = [0, 0, 0]
    for f, d in shapes:
        count = f * d if rank is None else rank * f + rank * d
        total[0] += 0 if rank is None else 4 * count
        total[1] += 4 * count
        total[2] += 4 * 2 * count
    return tuple(total)


@alternative("training_bytes")
def counts_by_tensors(shapes, rank):
    count = 0
    for f, d in shapes:
        for shape in [(f, d)] if rank is None else [(rank, d), (f, rank)]:
            count += torch.empty(shape, device="meta").nbytes
    return (0 if rank is None else count), count, 2 * count


# layer_flops


def _flops(d, f, r, n, is_merged, is_training):
    base, low = 2 * n * d * f, 0 if is_merged else 2 * n * r * (d + f)
    return base, low


@misconception(
    "layer_flops",
    "You count the thin products in place of the base's. The frozen layer is still computed: LoRA "
    "makes no forward pass cheaper.",
    see=COST,
)
def believes_that_lora_cuts_compute(
    fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False
):
    base, low = _flops(fan_in, fan_out, rank, num_tokens, is_merged, is_training)
    return base if is_merged else (3 if is_training else 1) * low


@misconception(
    "layer_flops",
    "Your merged layer still pays for the adapter. Merging leaves one matrix: exactly the base's "
    "cost.",
    see=COST,
)
def charges_for_merged_adapters(
    fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False
):
    base, low = _flops(fan_in, fan_out, rank, num_tokens, False, is_training)
    return 2 * base + 3 * low if is_training else base + low


@misconception(
    "layer_flops",
    "You let the frozen weight have its gradient: a third of the base's training FLOPs, which "
    "freezing saves.",
    see=COST,
)
def computes_the_frozen_gradient(
    fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False
):
    base, low = _flops(fan_in, fan_out, rank, num_tokens, is_merged, is_training)
    return 3 * (base + low) if is_training else base + low


@misconception(
    "layer_flops",
    "You stop the gradient at the frozen weight. It must pass through, to the adapters below: the "
    "product with W is done in backward as well.",
    see=COST,
)
def stops_at_the_frozen_weight(
    fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False
):
    base, low = _flops(fan_in, fan_out, rank, num_tokens, is_merged, is_training)
    return base + 3 * low if is_training else base + low


@misconception(
    "layer_flops",
    "You count multiplications alone: a multiply and an add are two FLOPs.",
    see=COST,
)
def counts_multiplications(fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False):
    base, low = _flops(fan_in, fan_out, rank, num_tokens, is_merged, is_training)
    return (2 * base + 3 * low if is_training else base + low) / 2


@alternative("layer_flops")
def lists_products(fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False):
    matrices = [(fan_in, fan_out, 2)]
    if not is_merged:
        matrices += [(fan_in, rank, 3), (rank, fan_out, 3)]
    return sum(2 * num_tokens * d * f * (t if is_training else 1) for d, f, t in matrices)


@alternative("layer_flops")
def counts_by_token(fan_in, fan_out, rank, num_tokens, is_merged=False, is_training=False):
    thin = 0 if is_merged else rank * fan_in + rank * fan_out
    each = fan_in * fan_out + thin
    if is_training:
        each += fan_in * fan_out + 2 * thin
    return float(2 * num_tokens * each)


# prefix_attention


def _joined(q, k, v, prefix_k, prefix_v, sees, is_after=False):
    rows = (q.shape[0], -1, -1, -1)
    parts_k, parts_v = [prefix_k.expand(rows), k], [prefix_v.expand(rows), v]
    if is_after:
        parts_k, parts_v = parts_k[::-1], parts_v[::-1]
    keys, values = torch.cat(parts_k, 2), torch.cat(parts_v, 2)
    scores = (q @ keys.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -torch.inf)
    return scores.softmax(-1) @ values


def _sees(t, p, offset):
    return torch.ones(t, p + t, dtype=torch.bool).tril(offset)


@misconception(
    "prefix_attention",
    "Your mask has no offset: query i sees i + 1 keys, of the prefix. That is seen whole, and "
    "then the text up to i.",
    see=PREFIX,
)
def forgets_the_offset_of_the_mask(q, k, v, prefix_k, prefix_v):
    return _joined(q, k, v, prefix_k, prefix_v, _sees(q.shape[2], prefix_k.shape[1], 0))


@misconception(
    "prefix_attention",
    "Nothing is hidden: queries see later tokens of the text. The prefix lifts no causality.",
    see=PREFIX,
)
def forgets_causality(q, k, v, prefix_k, prefix_v):
    t, p = q.shape[2], prefix_k.shape[1]
    return _joined(q, k, v, prefix_k, prefix_v, torch.ones(t, p + t, dtype=torch.bool))


@misconception(
    "prefix_attention",
    "You attend to prefix and text under two softmaxes and add. Weights must sum to one over both.",
    see=PREFIX,
)
def adds_two_attentions(q, k, v, prefix_k, prefix_v):
    scores = q @ prefix_k.mT / math.sqrt(q.shape[-1])
    text = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return text + scores.softmax(-1) @ prefix_v


@misconception(
    "prefix_attention",
    "You put the prefix behind the text and hide it causally: most queries never see it.",
    see=PREFIX,
)
def puts_the_prefix_behind(q, k, v, prefix_k, prefix_v):
    t, p = q.shape[2], prefix_k.shape[1]
    return _joined(q, k, v, prefix_k, prefix_v, _sees(t, p, 0), is_after=True)


@misconception(
    "prefix_attention",
    "The scores are not divided by sqrt(d).",
    see=PREFIX,
)
def does_not_scale_scores(q, k, v, prefix_k, prefix_v):
    scaled = q * math.sqrt(q.shape[-1])
    return _joined(
        scaled, k, v, prefix_k, prefix_v, _sees(q.shape[2], prefix_k.shape[1], prefix_k.shape[1])
    )


@alternative("prefix_attention")
def merges_by_log_sum_exp(q, k, v, prefix_k, prefix_v):
    scale = math.sqrt(q.shape[-1])
    before = q @ prefix_k.mT / scale
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    text = (q @ k.mT / scale).masked_fill(future, -torch.inf)
    share = (before.logsumexp(-1) - text.logsumexp(-1)).sigmoid()[..., None]
    return share * (before.softmax(-1) @ prefix_v) + (1 - share) * (text.softmax(-1) @ v)


@alternative("prefix_attention")
def uses_torch(q, k, v, prefix_k, prefix_v):
    p = prefix_k.shape[1]
    keys = torch.cat([prefix_k[None].repeat(len(q), 1, 1, 1), k], 2)
    values = torch.cat([prefix_v[None].repeat(len(q), 1, 1, 1), v], 2)
    mask = torch.arange(keys.shape[2]) <= torch.arange(q.shape[2])[:, None] + p
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


# galore_step


def _adam(small, m, v, step):
    m, v = 0.9 * m + 0.1 * small, 0.999 * v + 0.001 * small**2
    change = m / (v.sqrt() + 1e-6) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return change, m, v


@misconception(
    "galore_step",
    "You project the weight as well: GaLore is no kind of adapter. All of the weight stays, only "
    "its step lies in the basis.",
    see=GALORE,
)
def projects_the_weight(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    change, m, v = _adam(gradient @ basis.T, momentum, variance, step)
    return (weight @ basis.T - lr * scale * change) @ basis, m, v


@misconception(
    "galore_step",
    "The scale is missing: GaLore multiplies its step by alpha, 0.25 in the paper.",
    see=GALORE,
)
def forgets_the_scale(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    change, m, v = _adam(gradient @ basis.T, momentum, variance, step)
    return weight - lr * change @ basis, m, v


@misconception(
    "galore_step",
    "Adam's bias correction is missing: the first steps come out far too short or too long.",
    see=GALORE,
)
def forgets_the_correction(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    _, m, v = _adam(gradient @ basis.T, momentum, variance, step)
    return weight - lr * scale * m / (v.sqrt() + 1e-6) @ basis, m, v


@misconception(
    "galore_step",
    "You scale the gradient, and Adam divides the scale out again. It belongs to the step.",
    see=GALORE,
)
def scales_the_gradient(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    change, m, v = _adam(scale * gradient @ basis.T, momentum, variance, step)
    return weight - lr * change @ basis, m, v


@misconception(
    "galore_step",
    "You take the projected gradient itself for the step: Adam's two moments are kept but "
    "not used.",
    see=GALORE,
)
def steps_along_the_gradient(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    small = gradient @ basis.T
    _, m, v = _adam(small, momentum, variance, step)
    return weight - lr * scale * small @ basis, m, v


@alternative("galore_step")
def corrects_each_moment(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    small = torch.einsum("fd,rd->fr", gradient, basis)
    m = momentum + 0.1 * (small - momentum)
    v = variance + 0.001 * (small * small - variance)
    root = (v / (1 - 0.999**step)).sqrt() + 1e-6 / math.sqrt(1 - 0.999**step)
    return weight - (lr * scale) * (m / (1 - 0.9**step) / root) @ basis, m, v


@alternative("galore_step")
def uses_lerp(weight, gradient, basis, momentum, variance, step, lr, scale=1.0):
    small = gradient @ basis.mT
    m, v = momentum.lerp(small, 0.1), variance.lerp(small.square(), 0.001)
    factor = lr * scale * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return torch.addmm(weight, m / (v.sqrt() + 1e-6), basis, alpha=-factor), m, v
