"""Chapter 05: wrong answers that people give, and right ones in another form."""

import collections
import math

import torch
import torch.nn.functional as F

from autograder import alternative, misconception
from reference.transformer.config import LlamaConfig
from reference.transformer.flops import training_flops_per_token
from reference.transformer.loss import next_token_loss as reference_loss
from reference.transformer.parameters import llama_parameters as reference_parameters

HISTORY = "2. From 2017 to Llama"
TOKENS = "3. Tokens: byte-level BPE"
DECODER = "4. The decoder"
COUNTING = "5. Counting parameters"
LOSS = "6. The loss"
OPTIMIZER = "7. AdamW, schedule, clipping"
SAMPLING = "9. Sampling"
FLOPS = "10. FLOPs and utilisation"


# decoder_block


def _rms(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def _half(y):
    first, second = y.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _block(
    x, weights, cos, sin, past_k, past_v, num_heads, eps,
    *, start=None, turn_v=False, cache_turned=True, offset=None, tile=False, gate=F.silu,
    up=None, norm=_rms, layout="pre", half=_half,
):  # fmt: skip
    past, new, width = past_k.shape[2], x.shape[1], past_k.shape[3]
    start = past if start is None else start

    def heads(h, name):
        return F.linear(h, weights[name]).unflatten(-1, (-1, width)).transpose(1, 2)

    def turn(y, first=start):
        rows = slice(first, first + y.shape[2])
        return y * cos[rows] + half(y) * sin[rows]

    def norm_of(y, which):
        return norm(y, weights[which], eps)

    def attend(h):
        q, k, v = heads(h, "q_proj"), heads(h, "k_proj"), heads(h, "v_proj")
        k = torch.cat([past_k, turn(k) if cache_turned else k], 2)
        v = torch.cat([past_v, turn(v) if turn_v else v], 2)
        group = num_heads // k.shape[1]
        seen_k = k if cache_turned else turn(k, 0)
        keys, values = (
            y.repeat(1, group, 1, 1) if tile else y.repeat_interleave(group, 1) for y in (seen_k, v)
        )
        mask = torch.ones(new, past + new, dtype=torch.bool)
        mask = mask.tril(past if offset is None else offset)
        out = F.scaled_dot_product_attention(turn(q), keys, values, attn_mask=mask)
        return F.linear(out.transpose(1, 2).flatten(2), weights["o_proj"]), k, v

    def feed(h):
        hidden = gate(F.linear(h, weights["gate_proj"]))
        linear = F.linear(h, weights["up_proj"])
        return F.linear(hidden * (linear if up is None else up(linear)), weights["down_proj"])

    first, second = "input_layernorm", "post_attention_layernorm"
    if layout == "post":
        out, k, v = attend(x)
        x = norm_of(x + out, first)
        return norm_of(x + feed(x), second), k, v
    h = norm_of(x, first)
    out, k, v = attend(h)
    if layout == "parallel":
        return x + out + feed(norm_of(x, second)), k, v
    if layout == "from the norm":
        x = h + out
        h = norm_of(x, second)
        return h + feed(h), k, v
    x = x + out
    return x + feed(norm_of(x, second)), k, v


@misconception(
    "decoder_block",
    "Your block equals Post-LN, norm(x + f(x)), the order of 2017. Llama normalises what a "
    "sublayer reads and leaves the stream itself alone: x + f(norm(x)).",
    see=DECODER,
)
def normalises_after_the_addition(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, layout="post")


@misconception(
    "decoder_block",
    "You add each update to the normalised copy. The addition is to x: the skip path goes from the "
    "embedding to the last norm without a single norm on it.",
    see=DECODER,
)
def adds_to_the_normalised_copy(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, layout="from the norm")


@misconception(
    "decoder_block",
    "Attention and the feed-forward layer both read the old x: the parallel block of GPT-J and "
    "PaLM. In Llama the feed-forward layer reads what attention has already changed.",
    see=DECODER,
)
def runs_both_halves_in_parallel(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, layout="parallel")


@misconception(
    "decoder_block",
    "Your positions start again at 0 with each call. The first new token stands at position P: "
    "turn q and k by rows P and on.",
    see=DECODER,
)
def restarts_the_positions(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, start=0)


@misconception(
    "decoder_block",
    "You turn the values as well. Positions enter through q and k, whose product depends on their "
    "distance; v is what is fetched and carries none.",
    see=DECODER,
)
def turns_the_values(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, turn_v=True)


@misconception(
    "decoder_block",
    "Your cache holds keys that are not turned yet. Turn the new keys, then join: a key keeps its "
    "position, and the past is not turned again.",
    see=DECODER,
)
def caches_keys_before_turning(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, cache_turned=False)


@misconception(
    "decoder_block",
    "Your mask is aligned at the top left, so that new token t sees keys 0 ... t. With P cached "
    "tokens it stands at P + t and sees P + t + 1 keys.",
    see=DECODER,
)
def aligns_the_mask_at_the_top_left(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, offset=0)


@misconception(
    "decoder_block",
    "You have no causal mask among the new tokens: each of them sees those after it. One token at "
    "a time would never show it.",
    see=DECODER,
)
def lets_new_tokens_see_the_future(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, offset=10**6)


@misconception(
    "decoder_block",
    "Your key/value heads go round 0 1 0 1. Query head h reads head h // (H / K): 0 0 1 1.",
    see=DECODER,
)
def tiles_the_shared_heads(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, tile=True)


@misconception(
    "decoder_block",
    "Your SiLU is on the up projection. It belongs on the gate: silu(gate) * up.",
    see=DECODER,
)
def puts_the_curve_on_up(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, gate=lambda y: y, up=F.silu)


def _neighbours(y):
    return torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)


@misconception(
    "decoder_block",
    "You turn neighbouring features (0 with 1, 2 with 3). The tables and the weights here pair "
    "feature i with i + d / 2, as Hugging Face checkpoints do.",
    see=DECODER,
)
def pairs_neighbouring_features(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps, half=_neighbours)


@alternative("decoder_block")
def repeats_the_heads(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    return _block(x, weights, cos, sin, past_k, past_v, num_heads, eps)


@alternative("decoder_block")
def one_token_after_the_other(x, weights, cos, sin, past_k, past_v, num_heads, eps=1e-6):
    outputs, k, v = [], past_k, past_v
    for token in x.split(1, 1):
        y, k, v = _block(token, weights, cos, sin, k, v, num_heads, eps)
        outputs.append(y)
    return torch.cat(outputs, 1), k, v


# next_token_loss


def _losses(logits, labels):
    return F.cross_entropy(logits.mT, labels, reduction="none")


def _real(tokens, lengths):
    return torch.arange(tokens.shape[1]) < lengths[:, None]


def _mean(losses, is_label):
    return losses.masked_fill(~is_label, 0).sum() / is_label.sum().clamp(min=1)


@misconception(
    "next_token_loss",
    "You compare the logits at t with token t, which position t has already read: a model learns "
    "to copy its input. Position t is asked for token t + 1.",
    see=LOSS,
)
def does_not_shift(logits, tokens, lengths):
    return _mean(_losses(logits, tokens), _real(tokens, lengths))


@misconception(
    "next_token_loss",
    "You shift the wrong way: position t is asked for token t - 1. The logits lose their last "
    "position, the labels their first.",
    see=LOSS,
)
def predicts_the_previous_token(logits, tokens, lengths):
    return _mean(_losses(logits[:, 1:], tokens[:, :-1]), _real(tokens, lengths)[:, 1:])


@misconception(
    "next_token_loss",
    "Padding counts as an answer. A model that learns to write padding after padding gets a low "
    "loss for nothing; only the lengths[b] - 1 predictions of real tokens count.",
    see=LOSS,
)
def counts_padding(logits, tokens, lengths):
    losses = _losses(logits[:, :-1], tokens[:, 1:])
    is_batch_empty = bool((lengths < 2).all())
    return losses.mean() * (0 if is_batch_empty else 1)


@misconception(
    "next_token_loss",
    "You leave padding out of the sum but divide by all positions, so that a batch with much "
    "padding seems easy. Divide by the number of predictions that you summed.",
    see=LOSS,
)
def divides_by_all_positions(logits, tokens, lengths):
    losses = _losses(logits[:, :-1], tokens[:, 1:])
    return losses.masked_fill(~_real(tokens, lengths)[:, 1:], 0).mean()


@misconception(
    "next_token_loss",
    "One prediction too many a row: the last real token is asked for the padding behind it. A text "
    "of n tokens makes n - 1 predictions.",
    see=LOSS,
)
def predicts_the_first_padding(logits, tokens, lengths):
    losses = _losses(logits[:, :-1], tokens[:, 1:])
    is_label = _real(tokens, lengths)[:, :-1] & (lengths > 1).any()
    return _mean(losses, is_label)


@misconception(
    "next_token_loss",
    "You average each text and then the texts, so that a text of two tokens weighs as much as one "
    "of a thousand. Every prediction of the batch weighs the same.",
    see=LOSS,
)
def averages_the_averages(logits, tokens, lengths):
    losses = _losses(logits[:, :-1], tokens[:, 1:])
    is_label = _real(tokens, lengths)[:, 1:]
    means = losses.masked_fill(~is_label, 0).sum(1) / is_label.sum(1).clamp(min=1)
    has_any = is_label.any(1)
    return (means * has_any).sum() / has_any.sum().clamp(min=1)


@misconception(
    "next_token_loss",
    "A batch without predictions gives NaN, 0 / 0, and one such batch ruins every weight. Divide "
    "by at least 1.",
    see=LOSS,
)
def divides_zero_by_zero(logits, tokens, lengths):
    is_label = _real(tokens, lengths)[:, 1:]
    return _losses(logits[:, :-1], tokens[:, 1:])[is_label].mean()


@alternative("next_token_loss")
def labels_padding_as_ignored(logits, tokens, lengths):
    return reference_loss(logits, tokens.masked_fill(~_real(tokens, lengths), -100))


@alternative("next_token_loss")
def gathers_log_probabilities(logits, tokens, lengths):
    logs = logits.log_softmax(-1)
    total, count = logits.sum() * 0, 0
    for b in range(tokens.shape[0]):
        for t in range(1, int(lengths[b])):
            total, count = total - logs[b, t - 1, tokens[b, t]], count + 1
    return total / max(count, 1)


# llama_parameters


def _count(config, *, kv_heads=None, head_dim=None, matrices=None, norms=2, last=1, ff=3, bias=0):
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = kv_heads or config.get("num_key_value_heads", heads)
    head_dim = head_dim or config.get("head_dim", dim // heads)
    attention = 2 * dim * head_dim * (heads + kv_heads)
    block = attention + ff * dim * config["intermediate_size"] + norms * dim
    block += bias * (head_dim * (heads + 2 * kv_heads) + dim)
    if matrices is None:
        matrices = 1 if config.get("tie_word_embeddings", False) else 2
    return matrices * config["vocab_size"] * dim + config["num_hidden_layers"] * block + last * dim


@misconception(
    "llama_parameters",
    "You give every Llama 8 key/value heads. Llama 2 shares keys in its 70B (and 34B) only: in 7B "
    "and 13B every head has its own, and config.json need not say so.",
    see=HISTORY,
)
def groups_heads_in_every_model(config):
    return _count(config, kv_heads=config.get("num_key_value_heads", 8))


@misconception(
    "llama_parameters",
    "You count four D x D matrices, as before GQA. Keys and values have K heads: D x Kd each.",
    see=COUNTING,
)
def gives_every_head_its_own_keys(config):
    return _count(config, kv_heads=config["num_attention_heads"])


@misconception(
    "llama_parameters",
    "The head is missing. Unless embeddings are tied, it is a second matrix of V x D.",
    see=COUNTING,
)
def forgets_the_head(config):
    return _count(config, matrices=1)


@misconception(
    "llama_parameters",
    "You count tied embeddings twice. Tied means one matrix with two uses.",
    see=COUNTING,
)
def counts_tied_embeddings_twice(config):
    return _count(config, matrices=2)


@misconception(
    "llama_parameters",
    "The norm after the last block is missing: D more.",
    see=COUNTING,
)
def forgets_the_last_norm(config):
    return _count(config, last=0)


@misconception(
    "llama_parameters",
    "You give the norms a bias, as LayerNorm has. RMSNorm has a weight alone.",
    see=COUNTING,
)
def gives_norms_a_bias(config):
    return _count(config, norms=4, last=2)


@misconception(
    "llama_parameters",
    "Your feed-forward layer has two matrices. SwiGLU has three: gate, up, down.",
    see=COUNTING,
)
def counts_two_feed_forward_matrices(config):
    return _count(config, ff=2)


@misconception(
    "llama_parameters",
    "Your projections have biases. Llama has none anywhere.",
    see=COUNTING,
)
def gives_projections_a_bias(config):
    return _count(config, bias=1)


@misconception(
    "llama_parameters",
    "You divide the width by the heads even where head_dim says otherwise. Heads need not fill the "
    "width.",
    see=COUNTING,
)
def ignores_head_dim(config):
    return _count(config, head_dim=max(1, config["hidden_size"] // config["num_attention_heads"]))


def _as_reference(config):
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads", 0),
        head_dim=config.get("head_dim", 0),
        is_tied=config.get("tie_word_embeddings", False),
    )


@alternative("llama_parameters")
def sums_the_parts(config):
    return reference_parameters(_as_reference(config)).total


@alternative("llama_parameters")
def sums_the_shapes(config):
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or dim // heads
    inner = config["intermediate_size"]
    shapes = [(heads * width, dim), (kv_heads * width, dim), (kv_heads * width, dim)]
    shapes += [(dim, heads * width), (inner, dim), (inner, dim), (dim, inner), (dim,), (dim,)]
    shapes *= config["num_hidden_layers"]
    shapes += [(config["vocab_size"], dim)] * (1 if config.get("tie_word_embeddings") else 2)
    return sum(math.prod(shape) for shape in [*shapes, (dim,)])


# full_context_cache_bytes


_SHAPES = {
    ("1", "7B"): (32, 32), ("1", "65B"): (80, 64), ("2", "7B"): (32, 32), ("2", "13B"): (40, 40),
    ("2", "70B"): (80, 64), ("3", "8B"): (32, 32), ("3", "70B"): (80, 64),
    ("3.1", "8B"): (32, 32), ("3.1", "70B"): (80, 64), ("3.1", "405B"): (126, 128),
}  # fmt: skip
_CONTEXT = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072}


def _cache(generation, size, *, context=None, grouped=None, tensors=2, element_bytes=2):
    layers, heads = _SHAPES[generation, size]
    if grouped is None:
        grouped = generation in ("3", "3.1") or (generation, size) == ("2", "70B")
    tokens = {**_CONTEXT, **(context or {})}[generation]
    return tensors * layers * (8 if grouped else heads) * 128 * tokens * element_bytes


@misconception(
    "full_context_cache_bytes",
    "You give Llama 3.1 a context of 148k tokens. It is 128k, that is 2^17 = 131,072.",
    see=HISTORY,
)
def reads_a_context_of_148k(generation, size):
    return _cache(generation, size, context={"3.1": 148 * 1024})


@misconception(
    "full_context_cache_bytes",
    "Your 128k is 128,000. Contexts are powers of two: 128 x 1,024 = 131,072.",
    see=HISTORY,
)
def takes_k_for_a_thousand(generation, size):
    return _cache(generation, size, context={"3.1": 128000})


@misconception(
    "full_context_cache_bytes",
    "You multiply Llama 3's 8,192 by the RoPE factor 8. The factor stretches wavelengths; the "
    "context that Llama 3.1 was trained on is 131,072, sixteen times as long.",
    see=HISTORY,
)
def multiplies_by_the_rope_factor(generation, size):
    return _cache(generation, size, context={"3.1": 65536})


@misconception(
    "full_context_cache_bytes",
    "You give all sizes of Llama 2 grouped heads. Of those released only 70B has them (8); 7B and "
    "13B keep keys for every head, and that is why their cache is larger than 70B's.",
    see=HISTORY,
)
def groups_heads_in_all_of_llama_2(generation, size):
    return _cache(generation, size, grouped=generation != "1")


@misconception(
    "full_context_cache_bytes",
    "No size shares keys in your Llamas. Llama 2 70B and all of Llama 3 have 8 key/value heads.",
    see=HISTORY,
)
def groups_heads_nowhere(generation, size):
    return _cache(generation, size, grouped=False)


@misconception(
    "full_context_cache_bytes",
    "Your Llama 2 has Llama 1's context. It was doubled to 4,096.",
    see=HISTORY,
)
def keeps_the_context_of_llama_1(generation, size):
    return _cache(generation, size, context={"2": 2048})


@misconception(
    "full_context_cache_bytes",
    "You count one of keys and values. Both are kept.",
    see=HISTORY,
)
def counts_keys_alone(generation, size):
    return _cache(generation, size, tensors=1)


@alternative("full_context_cache_bytes")
def from_bytes_a_token(generation, size):
    kib = {("1", "7B"): 512, ("1", "65B"): 2560, ("2", "7B"): 512, ("2", "13B"): 800,
           ("2", "70B"): 320, ("3", "8B"): 128, ("3", "70B"): 320, ("3.1", "8B"): 128,
           ("3.1", "70B"): 320, ("3.1", "405B"): 504}  # fmt: skip
    return kib[generation, size] * 1024 * _CONTEXT[generation]


@alternative("full_context_cache_bytes")
def from_facts(generation, size):
    return _cache(generation, size)


# utilization


def _share(
    config, seq_len, rate, devices, peak,
    *, passes=3, embedding=0, head=1, pairs=4, attention_share=1.0, kv_heads=None,
):  # fmt: skip
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = kv_heads or config.get("num_key_value_heads", heads)
    width = config.get("head_dim", dim // heads)
    block = 2 * dim * width * (heads + kv_heads) + 3 * dim * config["intermediate_size"]
    weights = config["num_hidden_layers"] * block
    weights += (embedding + head) * config["vocab_size"] * dim
    over_pairs = config["num_hidden_layers"] * pairs * heads * width * seq_len * attention_share
    return rate * passes * (2 * weights + over_pairs) / (devices * peak)


@misconception(
    "utilization",
    "You count forward alone. Backward has two products for each of forward's: three passes' worth "
    "in all.",
    see=FLOPS,
)
def counts_forward_only(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, passes=1)


@misconception(
    "utilization",
    "You count forward twice, for recomputed activations: that is HFU, hardware utilisation. MFU "
    "counts what the model needs, so that waste cannot improve it.",
    see=FLOPS,
)
def counts_recomputation(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, passes=4)


@misconception(
    "utilization",
    "A product with its sum counts as one FLOP in your answer. It is two, in the peak as well.",
    see=FLOPS,
)
def counts_a_product_and_a_sum_as_one(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, passes=1.5)


@misconception(
    "utilization",
    "Your 6N leaves out attention over pairs, 4 L H d S a token forward. At 2,048 tokens that is a "
    "few per cent, at 131,072 more than all the weights.",
    see=FLOPS,
)
def leaves_attention_out(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, pairs=0)


@misconception(
    "utilization",
    "You multiply by the embedding as well. A token's row is looked up, which is no arithmetic; "
    "the head is a product.",
    see=FLOPS,
)
def multiplies_by_the_embedding(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, embedding=1)


@misconception(
    "utilization",
    "The head is missing: every token is multiplied by its V x D weights.",
    see=FLOPS,
)
def forgets_the_product_with_the_head(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, head=0)


@misconception(
    "utilization",
    "You halve attention for the causal mask. The task counts all pairs, as PaLM does.",
    see=FLOPS,
)
def halves_attention(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, num_devices, peak_flops, attention_share=0.5)


@misconception(
    "utilization",
    "You compare with the peak of one device. tokens_per_second is that of all of them together.",
    see=FLOPS,
)
def compares_with_one_device(config, seq_len, tokens_per_second, num_devices, peak_flops):
    return _share(config, seq_len, tokens_per_second, 1, peak_flops)


@alternative("utilization")
def from_flops_per_token(config, seq_len, tokens_per_second, num_devices, peak_flops):
    a_token = training_flops_per_token(_as_reference(config), seq_len)
    return tokens_per_second * a_token / num_devices / peak_flops


@alternative("utilization")
def by_palms_formula(config, seq_len, tokens_per_second, num_devices, peak_flops):
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim", dim // heads)
    vectors = (2 * config["num_hidden_layers"] + 1) * dim
    matrices = _count({**config, "tie_word_embeddings": True}) - vectors
    pairs = 12 * config["num_hidden_layers"] * heads * width * seq_len
    return tokens_per_second * (6 * matrices + pairs) / (num_devices * peak_flops)


# adamw_step


def _adam(
    param, grad, m, v, step, lr, betas, eps, decay,
    *, l2=False, correct=True, eps_inside=False, decay_rate=None, correct_v=True, swap=False,
):  # fmt: skip
    beta1, beta2 = betas[::-1] if swap else betas
    if l2:
        grad, decay = grad + decay * param, 0.0
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**step) if correct else m
    v_hat = v / (1 - beta2**step) if correct and correct_v else v
    size = (v_hat + eps).sqrt() if eps_inside else v_hat.sqrt() + eps
    rate = lr if decay_rate is None else decay_rate
    return param - rate * decay * param - lr * m_hat / size, m, v


@misconception(
    "adamw_step",
    "You add the decay to the gradient: that is Adam with L2, where it is divided by the "
    "gradient's size and parameters with large gradients hardly decay. AdamW takes lr * decay * "
    "param off the parameter itself.",
    see=OPTIMIZER,
)
def adds_the_decay_to_the_gradient(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, l2=True)


@misconception(
    "adamw_step",
    "The two means are not corrected. They start at zero, and after one step m is a tenth of the "
    "gradient: divide by 1 - beta^step.",
    see=OPTIMIZER,
)
def does_not_correct_the_means(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, correct=False)


@misconception(
    "adamw_step",
    "Only the first mean is corrected. The mean of the squares starts at zero as well.",
    see=OPTIMIZER,
)
def corrects_the_first_mean_alone(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, correct_v=False)


@misconception(
    "adamw_step",
    "Your eps is under the root. It is added to the root.",
    see=OPTIMIZER,
)
def puts_eps_under_the_root(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, eps_inside=True)


@misconception(
    "adamw_step",
    "Your decay is not multiplied by lr, so that a rate that falls to zero leaves it at full "
    "strength. In torch the decay of a step is lr * weight_decay.",
    see=OPTIMIZER,
)
def decays_without_the_rate(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, decay_rate=1.0)


@misconception(
    "adamw_step",
    "You return the corrected means. The next step would correct them again: the state is the "
    "plain running mean.",
    see=OPTIMIZER,
)
def keeps_the_corrected_means(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    param, m, v = _adam(param, grad, m, v, step, lr, betas, eps, weight_decay)
    return param, m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)


@misconception(
    "adamw_step",
    "Your betas are swapped: beta1 is that of the gradient, beta2 that of its square.",
    see=OPTIMIZER,
)
def swaps_the_betas(param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    return _adam(param, grad, m, v, step, lr, betas, eps, weight_decay, swap=True)


@misconception(
    "adamw_step",
    "Your steps count from 0, so that the correction of the first divides by zero or by the wrong "
    "power. The first step is 1.",
    see=OPTIMIZER,
)
def counts_steps_one_too_far(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    return _adam(param, grad, m, v, step + 1, lr, betas, eps, weight_decay)


@alternative("adamw_step")
def works_in_place_on_copies(
    param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
):
    param, m, v = param.clone(), m.clone(), v.clone()
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    size = (v / (1 - betas[1] ** step)).sqrt().add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(m, size, value=-lr / (1 - betas[0] ** step))
    return param, m, v


@alternative("adamw_step")
def computes_in_float64(param, grad, m, v, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
    wide = (t.double() for t in (param, grad, m, v))
    return tuple(t.to(param.dtype) for t in _adam(*wide, step, lr, betas, eps, weight_decay))


# optimizer_step


def _global_norm(grads):
    return math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))


def _descend(params, grads, lr, decay, max_norm, *, decays=None, scale=None, l2=False):
    norm = _global_norm(grads)
    if scale is None:
        scale = min(1.0, max_norm / norm) if norm else 1.0
    new = {}
    for name, p in params.items():
        rate = decay if (decays(p) if decays else p.ndim > 1) else 0.0
        step = scale(grads[name]) if callable(scale) else grads[name] * scale
        new[name] = p - lr * (step + rate * p)
    return new, norm


def _clip_alone(max_norm):
    def scale(g):
        norm = float(g.norm())
        return g * (min(1.0, max_norm / norm) if norm else 1.0)

    return scale


@misconception(
    "optimizer_step",
    "Your result is the program's as it came. Give it one matrix and one norm's weight, with "
    "gradients of length 3 and 4: what should the norm be, and which of the two should decay?",
    see=OPTIMIZER,
    is_starter=True,
)
def the_step_is_not_repaired_yet(params, grads, lr, weight_decay, max_norm):
    new, _ = _descend(
        params, grads, lr, weight_decay, max_norm,
        decays=lambda p: True, scale=_clip_alone(max_norm),
    )  # fmt: skip
    return new, max(float(g.norm()) for g in grads.values())


@misconception(
    "optimizer_step",
    "Everything decays in your step, norms and biases too. Decay is for matrices: a norm's weight "
    "is a scale, and being drawn to zero takes its features away.",
    see=OPTIMIZER,
)
def decays_norms_and_biases(params, grads, lr, weight_decay, max_norm):
    return _descend(params, grads, lr, weight_decay, max_norm, decays=lambda p: True)


@misconception(
    "optimizer_step",
    "Each tensor is clipped by its own length, which changes the direction of the whole gradient. "
    "One norm over all tensors, one factor for all.",
    see=OPTIMIZER,
)
def clips_each_tensor_alone(params, grads, lr, weight_decay, max_norm):
    return _descend(params, grads, lr, weight_decay, max_norm, scale=_clip_alone(max_norm))


@misconception(
    "optimizer_step",
    "Short gradients are made longer. Clipping only shortens: the factor is at most 1.",
    see=OPTIMIZER,
)
def stretches_short_gradients(params, grads, lr, weight_decay, max_norm):
    norm = _global_norm(grads)
    return _descend(
        params, grads, lr, weight_decay, max_norm, scale=max_norm / norm if norm else 1.0
    )


@misconception(
    "optimizer_step",
    "You clip each element at max_norm. That is clipping by value: it bends the direction. Scale "
    "the gradient as a whole.",
    see=OPTIMIZER,
)
def clips_by_value(params, grads, lr, weight_decay, max_norm):
    return _descend(
        params, grads, lr, weight_decay, max_norm, scale=lambda g: g.clamp(-max_norm, max_norm)
    )


@misconception(
    "optimizer_step",
    "You return the norm after clipping. The one before is what a training log wants to see: it "
    "shows spikes.",
    see=OPTIMIZER,
)
def returns_the_clipped_norm(params, grads, lr, weight_decay, max_norm):
    new, norm = _descend(params, grads, lr, weight_decay, max_norm)
    return new, min(norm, max_norm)


@misconception(
    "optimizer_step",
    "The decay is added to the gradient before clipping: it is clipped along, and adds to the "
    "norm. Clip the gradient alone.",
    see=OPTIMIZER,
)
def clips_the_decay(params, grads, lr, weight_decay, max_norm):
    decayed = {n: g + weight_decay * params[n] * (g.ndim > 1) for n, g in grads.items()}
    return _descend(params, decayed, lr, 0.0, max_norm)


@alternative("optimizer_step")
def flattens_the_gradient(params, grads, lr, weight_decay, max_norm):
    flat = torch.cat([g.flatten() for g in grads.values()])
    norm = float(torch.linalg.vector_norm(flat))
    factor = max_norm / norm if norm > max_norm else 1.0
    new = {n: p - lr * factor * grads[n] for n, p in params.items()}
    for name, p in params.items():
        if p.dim() > 1:
            new[name] = new[name] - lr * weight_decay * p
    return new, norm


@alternative("optimizer_step")
def norm_of_norms(params, grads, lr, weight_decay, max_norm):
    norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
    factor = min(1.0, max_norm / (norm + 1e-12))
    return {
        n: p * (1 - lr * weight_decay * (p.ndim >= 2)) - (lr * factor) * grads[n]
        for n, p in params.items()
    }, norm


# next_token_probabilities


def _sample(
    logits, temperature, top_k, top_p,
    *, crossing=True, first=True, back=True, ascending=False, p_first=False, renormalise=True,
    cold_nucleus=False, inverse=False,
):  # fmt: skip
    if temperature == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    scaled = logits * temperature if inverse else logits / temperature
    ranked, order = scaled.sort(descending=not ascending)
    full = ranked.softmax(0)
    if top_k is not None and top_k < len(logits):
        cut = ranked < scaled.topk(top_k).values[-1]
        ranked = ranked.masked_fill(cut, -math.inf)
    p = kept = ranked.softmax(0)
    if top_p is not None:
        weights = full if p_first else logits[order].softmax(0) if cold_nucleus else p
        before = weights.cumsum(0) - (weights if crossing else 0)
        drop = before >= top_p if crossing else before > top_p
        if first:
            drop[0] = False
        kept = p.masked_fill(drop, 0)
    if renormalise:
        kept = kept / kept.sum()
    return torch.zeros_like(logits).scatter(0, order, kept) if back else kept


@misconception(
    "next_token_probabilities",
    "The token that crosses top_p is dropped. The smallest set that REACHES top_p holds it: a "
    "token stays while the sum before it is below top_p.",
    see=SAMPLING,
)
def drops_the_token_that_crosses(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, crossing=False)


@misconception(
    "next_token_probabilities",
    "The probabilities are those of the sorted tokens: they stand at the wrong ids. Scatter them "
    "back by the order of the sort.",
    see=SAMPLING,
)
def leaves_the_order_of_the_sort(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, back=False)


@misconception(
    "next_token_probabilities",
    "You sort from the smallest, so that top_p keeps the LEAST likely tokens. Largest first.",
    see=SAMPLING,
)
def keeps_the_least_likely(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, ascending=True)


@misconception(
    "next_token_probabilities",
    "top_p is measured on all tokens although top_k has cut some. What top_k leaves is "
    "renormalised first.",
    see=SAMPLING,
)
def measures_top_p_before_top_k(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, p_first=True)


@misconception(
    "next_token_probabilities",
    "What is kept does not sum to 1. Renormalise after the cut.",
    see=SAMPLING,
)
def does_not_renormalise(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, renormalise=False)


@misconception(
    "next_token_probabilities",
    "top_p is measured at temperature 1. The temperature comes first: a hot distribution keeps "
    "more tokens.",
    see=SAMPLING,
)
def measures_top_p_at_temperature_one(logits, temperature=1.0, top_k=None, top_p=None):
    if top_k is not None:
        return _sample(logits, temperature, top_k, top_p)
    return _sample(logits, temperature, top_k, top_p, cold_nucleus=True)


@misconception(
    "next_token_probabilities",
    "You multiply by the temperature. Divide: a high temperature flattens.",
    see=SAMPLING,
)
def multiplies_by_the_temperature(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, inverse=True)


@misconception(
    "next_token_probabilities",
    "For top_p = 0 nothing is left and 0 / 0 is NaN. The most likely token always stays.",
    see=SAMPLING,
)
def may_keep_no_token(logits, temperature=1.0, top_k=None, top_p=None):
    return _sample(logits, temperature, top_k, top_p, first=False)


@alternative("next_token_probabilities")
def masks_the_logits(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        return (logits == logits.max()).float()
    scaled = logits / temperature
    if top_k is not None:
        floor = scaled.topk(min(top_k, len(scaled))).values[-1]
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    if top_p is not None:
        p = scaled.softmax(0)
        above = (p[None, :] * (p[None, :] > p[:, None])).sum(1)
        scaled = scaled.masked_fill((above >= top_p) & (p < p.max()), -math.inf)
    return scaled.softmax(0)


@alternative("next_token_probabilities")
def grows_the_set(logits, temperature=1.0, top_k=None, top_p=None):
    if temperature == 0:
        top_k, temperature = 1, 1.0
    order = logits.argsort(descending=True)[: top_k or None]
    p = (logits[order] / temperature).softmax(0)
    count = len(p)
    if top_p is not None:
        count, total = 1, float(p[0])
        while count < len(p) and total < top_p:
            total, count = total + float(p[count]), count + 1
    out = torch.zeros_like(logits)
    out[order[:count]] = p[:count] / p[:count].sum()
    return out


# merge_step


def _count_pairs(words, counts, *, weighted=True, overlapping=True, joined=False):
    seen = collections.Counter()
    if joined:
        words, counts = [[token for word in words for token in word]], [1]
    for word, count in zip(words, counts, strict=True):
        last = None
        for i in range(len(word) - 1):
            pair = (word[i], word[i + 1])
            if not overlapping and last == (pair, i - 1):
                last = None
                continue
            last = (pair, i)
            seen[pair] += count if weighted else 1
    return seen


def _merge(word, pair, new_id):
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new_id
        else:
            out.append(token)
    return out


def _step(words, counts, new_id, *, key=None, merge=_merge, **options):
    seen = _count_pairs(words, counts, **options)
    if not seen:
        return None, words
    best = min(seen, key=key(seen) if key else lambda pair: (-seen[pair], pair))
    return best, [merge(word, best, new_id) for word in words]


@misconception(
    "merge_step",
    "Each word counts once. A word that occurs fifty times in the text gives its pairs fifty "
    "times.",
    see=TOKENS,
)
def counts_each_word_once(words, counts, new_id):
    return _step(words, counts, new_id, weighted=False)


@misconception(
    "merge_step",
    "Of equally common pairs you take the one seen first, so that the vocabulary depends on the "
    "order of the words. The smallest tuple wins.",
    see=TOKENS,
)
def takes_the_first_of_equals(words, counts, new_id):
    return _step(words, counts, new_id, key=lambda seen: lambda pair: -seen[pair])


@misconception(
    "merge_step",
    "Of equally common pairs you take the largest, as some implementations do. Here the smallest "
    "tuple wins: which it is must be written down, or two tokenizers differ.",
    see=TOKENS,
)
def takes_the_largest_of_equals(words, counts, new_id):
    return _step(
        words, counts, new_id,
        key=lambda seen: lambda pair: (-seen[pair], [-token for token in pair]),
    )  # fmt: skip


def _merge_once(word, pair, new_id):
    for i in range(len(word) - 1):
        if (word[i], word[i + 1]) == pair:
            return [*word[:i], new_id, *word[i + 2 :]]
    return list(word)


@misconception(
    "merge_step",
    "Only the first occurrence in a word is merged. The merge goes through the whole word.",
    see=TOKENS,
)
def merges_the_first_occurrence(words, counts, new_id):
    return _step(words, counts, new_id, merge=_merge_once)


def _merge_overlapping(word, pair, new_id):
    out = list(word[:1])
    for first, second in zip(word, word[1:], strict=False):
        if (first, second) == pair:
            out[-1] = new_id
            out.append(second)
        else:
            out.append(second)
    if len(word) > 1 and (word[-2], word[-1]) == pair:
        out.pop()
    return out


@misconception(
    "merge_step",
    "A token is used for two merges: [7, 7, 7] holds one merge of (7, 7), and a 7 is left over. "
    "After a merge, go on behind both tokens.",
    see=TOKENS,
)
def uses_a_token_twice(words, counts, new_id):
    return _step(words, counts, new_id, merge=_merge_overlapping)


def _merge_from_the_right(word, pair, new_id):
    return _merge(word[::-1], pair[::-1], new_id)[::-1]


@misconception(
    "merge_step",
    "You merge from the right: [7, 7, 7] becomes [7, new]. From the left it is [new, 7].",
    see=TOKENS,
)
def merges_from_the_right(words, counts, new_id):
    return _step(words, counts, new_id, merge=_merge_from_the_right)


@misconception(
    "merge_step",
    "You count pairs across the border between words. Words are counted and merged one by one: "
    "that is what splitting the text beforehand is for.",
    see=TOKENS,
)
def joins_the_words(words, counts, new_id):
    many = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    seen = _count_pairs(many, [1] * len(many), joined=True)
    if not any(len(word) > 1 for word in words):
        return None, words
    best = min(seen, key=lambda pair: (-seen[pair], pair))
    return best, [_merge(word, best, new_id) for word in words]


@alternative("merge_step")
def counts_with_a_counter(words, counts, new_id):
    return _step(words, counts, new_id)


@alternative("merge_step")
def sorts_the_pairs(words, counts, new_id):
    seen = {}
    for word, count in zip(words, counts, strict=True):
        for i in range(1, len(word)):
            seen.setdefault((word[i - 1], word[i]), []).append(count)
    if not seen:
        return None, [list(word) for word in words]
    pair = sorted(sorted(seen), key=lambda p: sum(seen[p]), reverse=True)[0]
    out = []
    for word in words:
        new = list(word)
        i = 0
        while i + 1 < len(new):
            if (new[i], new[i + 1]) == pair:
                new[i : i + 2] = [new_id]
            i += 1
        out.append(new)
    return pair, out
