"""Grades chapter 05: transformer. Oracles: torch's kernels, modules, optimizers and schedulers,
its FLOP counter, complex rotations, brute force, and the published models."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autograder import exercise, expect, points


def _normal(rng, *shape, mean=0.0, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=rng) * std + mean).to(dtype)


def _integer(rng, low, high):
    return int(torch.randint(low, high, (1,), generator=rng))


D, HEADS, KV_HEADS, WIDTH, HIDDEN = 12, 4, 2, 6, 20


def _block_weights(rng):
    shapes = {
        "q_proj": (HEADS * WIDTH, D),
        "k_proj": (KV_HEADS * WIDTH, D),
        "v_proj": (KV_HEADS * WIDTH, D),
        "o_proj": (D, HEADS * WIDTH),
        "gate_proj": (HIDDEN, D),
        "up_proj": (HIDDEN, D),
        "down_proj": (D, HIDDEN),
    }
    weights = {name: _normal(rng, *shape, std=shape[1] ** -0.5) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[name] = _normal(rng, D, mean=1.0, std=0.3)
    return weights


def _angles(length, base=100.0):
    frequencies = base ** -(torch.arange(0, WIDTH, 2).float() / WIDTH)
    return torch.arange(length).float()[:, None] * frequencies


def _tables(length):
    angles = torch.cat([_angles(length)] * 2, -1)
    return angles.cos(), angles.sin()


def _turn(x, first):
    """The rotation as a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = _angles(first + x.shape[2])[first:]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat([turned.real, turned.imag], -1)


def _block_oracle(x, weights, eps):
    """The block over a whole text at once, by torch's kernels."""

    def heads(h, name):
        return F.linear(h, weights[name]).unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    h = F.rms_norm(x, (D,), weights["input_layernorm"], eps)
    q, k, v = _turn(heads(h, "q_proj"), 0), _turn(heads(h, "k_proj"), 0), heads(h, "v_proj")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(out.transpose(1, 2).flatten(2), weights["o_proj"])
    h = F.rms_norm(x, (D,), weights["post_attention_layernorm"], eps)
    hidden = F.silu(F.linear(h, weights["gate_proj"])) * F.linear(h, weights["up_proj"])
    return x + F.linear(hidden, weights["down_proj"]), k, v


@exercise(
    "decoder_block",
    kind="build",
    minutes=30,
    difficulty=3,
    see="4. The decoder",
    hints=(
        "Write down the order first: what is normalised, what is turned, what goes into the cache, "
        "and what each half adds to. x itself is changed by two additions and by nothing else.",
        "Right with an empty cache and wrong with a past: the first new token stands at position "
        "P, so its row of cos is cos[P], and its mask row has P + 1 ones. A shape error in "
        "merge_heads: it takes (B, H, T, d).",
        "h = norm(x); q, k, v = split_heads(linear(h, each))\n"
        "turn q and k by rows P ... P + T - 1 of cos and sin\n"
        "k, v = past and new, joined along the tokens\n"
        "x = x + o_proj(merge_heads(attention(q, k, v, mask)))     mask[t, s]: s <= P + t\n"
        "h = norm(x); x = x + down_proj(silu(gate_proj(h)) * up_proj(h))",
    ),
)
class TestDecoderBlock:
    def _draw(self, rng, length, batch=2):
        # Tokens of unequal size: a norm that is missing or misplaced shows.
        x = _normal(rng, batch, length, D, mean=0.3, std=2.0)
        return x, _block_weights(rng), *_tables(length)

    def _call(self, student, x, weights, cos, sin, past, eps=1e-6):
        return student.decoder_block(x, dict(weights), cos, sin, *past, HEADS, eps)

    def _empty(self, batch=2):
        return torch.zeros(batch, KV_HEADS, 0, WIDTH), torch.zeros(batch, KV_HEADS, 0, WIDTH)

    @points(3)
    def test_prompt(self, student, rng):
        """gives the stream after a prompt, and the keys and values that the next call needs"""
        x, weights, cos, sin = self._draw(rng, 6)
        got = self._call(student, x, weights, cos, sin, self._empty())
        expect.close(got, _block_oracle(x, weights, 1e-6), "(y, k, v)")

    @points(3)
    def test_goes_on_from_a_past(self, student, rng):
        """three new tokens after a past give what the whole text at once gives"""
        x, weights, cos, sin = self._draw(rng, 8)
        y, k, v = _block_oracle(x, weights, 1e-6)
        past = k[:, :, :5].contiguous(), v[:, :, :5].contiguous()
        got = self._call(student, x[:, 5:].contiguous(), weights, cos, sin, past)
        expect.close(got, (y[:, 5:], k, v), "(y, k, v)")

    @points(1)
    def test_one_small_token(self, student, rng):
        """takes one token at a time, and hands eps to both norms"""
        x, weights, cos, sin = self._draw(rng, 4, batch=1)
        x = x * 0.1
        y, k, v = _block_oracle(x, weights, 0.05)
        past = k[:, :, :3].contiguous(), v[:, :, :3].contiguous()
        got = self._call(student, x[:, 3:].contiguous(), weights, cos, sin, past, 0.05)
        expect.close(got, (y[:, 3:], k, v), "(y, k, v)")


def _loss_oracle(logits, tokens, lengths):
    """One prediction after the other, in float64."""
    logs = logits.double().log_softmax(-1)
    total = [
        -logs[b, t, tokens[b, t + 1]]
        for b in range(len(tokens))
        for t in range(int(lengths[b]) - 1)
    ]
    return (torch.stack(total).mean() if total else logs.sum() * 0).float()


@exercise(
    "next_token_loss",
    kind="build",
    minutes=15,
    difficulty=2,
    see="6. The loss",
    hints=(
        "Write down for a text of three tokens with one of padding: which positions predict, and "
        "which token does each predict? There are two predictions.",
        "A loss near 0 for a trained model: position t was asked for token t, which it has seen. "
        "NaN: a batch without predictions divides 0 by 0.",
        "losses = cross entropy of logits[:, :-1] with tokens[:, 1:], none reduced   (B, T - 1)\n"
        "label j of row b counts where j < lengths[b], for j = 1 ... T - 1\n"
        "return the sum of those that count / their number, at least 1",
    ),
)
class TestNextTokenLoss:
    def _draw(self, rng, batch=3, seq_len=7, vocab=11):
        logits = _normal(rng, batch, seq_len, vocab, std=2.0)
        return logits, torch.randint(vocab, (batch, seq_len), generator=rng)

    @points(2)
    def test_full_texts(self, student, rng):
        """is the mean surprise of the next tokens where nothing is padded"""
        logits, tokens = self._draw(rng)
        lengths = torch.full((3,), 7)
        expected = _loss_oracle(logits, tokens, lengths)
        expect.close(student.next_token_loss(logits, tokens, lengths), expected, "the loss")

    @points(3)
    def test_padded_texts(self, student, rng):
        """leaves padding out, above and below the fraction"""
        logits, tokens = self._draw(rng, batch=4)
        lengths = torch.tensor([7, 2, 1, _integer(rng, 3, 7)])
        expected = _loss_oracle(logits, tokens, lengths)
        expect.close(student.next_token_loss(logits, tokens, lengths), expected, "the loss")

    def test_gradient(self, student, rng):
        """sends the right gradient to the logits: none to padding, none to the last position"""
        logits, tokens = self._draw(rng)
        lengths = torch.tensor([5, 7, 3])
        (expected,) = torch.autograd.grad(
            _loss_oracle(logits.requires_grad_(), tokens, lengths), logits
        )
        (got,) = torch.autograd.grad(student.next_token_loss(logits, tokens, lengths), logits)
        expect.close(got, expected, "the gradient")

    def test_nothing_to_predict(self, student, rng):
        """is 0 for a batch of texts of one token"""
        logits, tokens = self._draw(rng, batch=2)
        loss = student.next_token_loss(logits, tokens, torch.ones(2, dtype=torch.long))
        expect.close(loss, torch.zeros(()), "the loss")


CONFIGS = {
    "Llama 2 7B": (
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
         "num_hidden_layers": 32, "num_attention_heads": 32},
        6_738_415_616,
    ),
    "Llama 2 70B": (
        {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
         "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        68_976_648_192,
    ),
    "Llama 3 8B": (
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248,
    ),
    "Llama 3.1 405B": (
        {"vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
         "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8},
        405_853_388_800,
    ),
    "Llama 3.2 1B": (
        {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    "SmolLM2 135M": (
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "tie_word_embeddings": True},
        134_515_008,
    ),
}  # fmt: skip


class _Llama(nn.Module):
    """Llama's matrices, and the products that they take part in."""

    def __init__(self, config):
        super().__init__()
        dim, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, width = config.get("num_key_value_heads", heads), config.get("head_dim")
        self.heads, self.width = heads, width if width else dim // heads

        def linear(rows, columns):
            return nn.Linear(columns, rows, bias=False)

        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": linear(heads * self.width, dim),
                    "kv": linear(2 * kv_heads * self.width, dim),
                    "o": linear(dim, heads * self.width),
                    "gate_up": linear(2 * config["intermediate_size"], dim),
                    "down": linear(dim, config["intermediate_size"]),
                    "norms": nn.ModuleList([nn.RMSNorm(dim), nn.RMSNorm(dim)]),
                }
            )
            for _ in range(config["num_hidden_layers"])
        )
        self.norm, self.head = nn.RMSNorm(dim), linear(config["vocab_size"], dim)
        self.embedding = nn.Embedding(config["vocab_size"], dim)
        if config.get("tie_word_embeddings"):
            self.embedding.weight = self.head.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            q = block["q"](x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            block["kv"](x).sum()
            out = (q @ q.mT @ q).transpose(1, 2).flatten(2)
            x = x + block["o"](out)
            gate, up = block["gate_up"](x).chunk(2, -1)
            x = x + block["down"](gate * up)
        return self.head(x)


def _forward_flops(config, seq_len):
    """What torch counts for one sequence, without memory: of one and of two blocks, then of all."""
    one, two = (
        _counted(tuple({**config, "num_hidden_layers": n}.items()), seq_len) for n in (1, 2)
    )
    return one + (config["num_hidden_layers"] - 1) * (two - one)


@functools.lru_cache(maxsize=256)
def _counted(items, seq_len):
    device = "meta" if dict(items)["hidden_size"] > 100 else "cpu"
    with torch.device(device), FlopCounterMode(display=False) as counter, torch.no_grad():
        _Llama(dict(items))(torch.zeros(1, seq_len, dtype=torch.long))
    return counter.get_total_flops()


@functools.lru_cache(maxsize=256)
def _num_parameters(items):
    return sum(p.numel() for p in _Llama(dict(items)).parameters())


def _random_config(rng):
    """One of six Llamas of odd sizes; heads need not fill the width."""
    rng = torch.Generator().manual_seed(_integer(rng, 0, 6))
    kv_heads, group = _integer(rng, 1, 4), _integer(rng, 2, 4)
    config = {
        "vocab_size": _integer(rng, 50, 90),
        "hidden_size": 8 * _integer(rng, 3, 7),
        "intermediate_size": _integer(rng, 30, 60),
        "num_hidden_layers": _integer(rng, 2, 5),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * _integer(rng, 9, 14),
    }
    if _integer(rng, 0, 2):
        config["tie_word_embeddings"] = False
    return config


@exercise(
    "llama_parameters",
    kind="estimate",
    minutes=15,
    difficulty=1,
    see="5. Counting parameters",
    hints=(
        "List the tensors of one block with their shapes: there are nine. Then what stands outside "
        "of the blocks.",
        "Too small by V x D: the head is a matrix of its own unless tied. Off by a few thousand: "
        "the norms, two a block and one at the end. Wrong for Llama 2 7B alone: without "
        "num_key_value_heads every head has its own keys.",
        "attention = 2 D Hd + 2 D Kd     feed-forward = 3 D F     norms = 2 D\n"
        "total = V D (twice unless tied) + L (attention + feed-forward + norms) + D",
    ),
)
class TestLlamaParameters:
    @points(2)
    def test_published(self, student, rng):
        """gives the published counts of Llama 2 70B, Llama 3 8B and Llama 3.1 405B"""
        for name in ("Llama 2 70B", "Llama 3 8B", "Llama 3.1 405B"):
            config, expected = CONFIGS[name]
            expect.equal(student.llama_parameters(dict(config)), expected, name)

    @points(1)
    def test_own_keys(self, student, rng):
        """knows that Llama 2 7B shares no keys"""
        config, expected = CONFIGS["Llama 2 7B"]
        expect.equal(student.llama_parameters(dict(config)), expected, "Llama 2 7B")

    @points(1)
    def test_tied(self, student, rng):
        """counts a tied embedding once"""
        for name in ("Llama 3.2 1B", "SmolLM2 135M"):
            config, expected = CONFIGS[name]
            expect.equal(student.llama_parameters(dict(config)), expected, name)

    @points(1)
    def test_any_shape(self, student, rng):
        """counts a model of any shape as torch does"""
        config = _random_config(rng)
        expected = _num_parameters(tuple(config.items()))
        expect.equal(student.llama_parameters(dict(config)), expected, str(config))


@exercise(
    "full_context_cache_bytes",
    kind="estimate",
    minutes=10,
    difficulty=1,
    see="2. From 2017 to Llama",
    hints=(
        "Two facts a model: which of them share keys among heads, and how long the context is. "
        "Section 2 has a table of what changed when.",
        "Right for Llama 3, wrong for Llama 2: only its 70B (and the unreleased 34B) has grouped "
        "heads. Llama 3.1 off by 2.4 %: 128k tokens are 2^17.",
        "bytes = 2 (keys, values) x layers x K x head width x context x 2 (bfloat16)\n"
        "K = 8 for Llama 2 70B and for all of Llama 3 and 3.1, else the query heads\n"
        "context = 2,048, 4,096, 8,192, 131,072",
    ),
)
class TestFullContextCacheBytes:
    KIB = 1024

    @points(1)
    def test_llama_1(self, student, rng):
        """Llama 1: 512 KiB a token for 7B, 2.5 MiB for 65B"""
        for size, a_token in (("7B", 512), ("65B", 2560)):
            expected = a_token * self.KIB * 2048
            got = student.full_context_cache_bytes("1", size)
            expect.equal(got, expected, f"Llama 1 {size}")

    @points(2)
    def test_llama_2(self, student, rng):
        """Llama 2: 512, 800 and 320 KiB a token"""
        for size, a_token in (("7B", 512), ("13B", 800), ("70B", 320)):
            expected = a_token * self.KIB * 4096
            got = student.full_context_cache_bytes("2", size)
            expect.equal(got, expected, f"Llama 2 {size}")

    @points(1)
    def test_llama_3(self, student, rng):
        """Llama 3: 128 and 320 KiB a token"""
        for size, a_token in (("8B", 128), ("70B", 320)):
            expected = a_token * self.KIB * 8192
            got = student.full_context_cache_bytes("3", size)
            expect.equal(got, expected, f"Llama 3 {size}")

    @points(2)
    def test_llama_3_1(self, student, rng):
        """Llama 3.1: 128, 320 and 504 KiB a token, and sixteen times the context"""
        for size, a_token in (("8B", 128), ("70B", 320), ("405B", 504)):
            expected = a_token * self.KIB * 131072
            got = student.full_context_cache_bytes("3.1", size)
            expect.equal(got, expected, f"Llama 3.1 {size}")


@exercise(
    "utilization",
    kind="estimate",
    minutes=20,
    difficulty=2,
    see="10. FLOPs and utilisation",
    hints=(
        "What is one token multiplied by on its way through? A matrix of n weights: 2n FLOPs. Then "
        "what do two products over pairs of tokens add, for each of the seq_len tokens?",
        "A third of the answer: backward is missing. A few per cent off: the embedding was counted "
        "(it is looked up), or the head was not. Right for short texts only: attention over pairs.",
        "weights = L (2 D Hd + 2 D Kd + 3 D F) + V D\n"
        "forward for a token = 2 weights + L 4 H d seq_len\n"
        "return tokens_per_second x 3 forward / (num_devices x peak_flops)",
    ),
)
class TestUtilization:
    def _expected(self, config, seq_len, rate, devices, peak):
        return rate * 3 * _forward_flops(config, seq_len) / seq_len / (devices * peak)

    @points(2)
    def test_published_sizes(self, student, rng):
        """gives the share for Llama 2 7B and Llama 3 8B from the products that torch counts"""
        for name, seq_len in (("Llama 2 7B", 4096), ("Llama 3 8B", 8192)):
            config = CONFIGS[name][0]
            case = (2.0e6, 1024, 312e12)
            expected = self._expected(config, seq_len, *case)
            got = student.utilization(dict(config), seq_len, *case)
            expect.number(got, expected, rel=1e-6, what=f"the share for {name}")

    @points(2)
    def test_long_texts(self, student, rng):
        """counts attention, which at 128k tokens costs more than the weights"""
        config = CONFIGS["Llama 3 8B"][0]
        case = (1.0e5, 256, 989.5e12)
        expected = self._expected(config, 131072, *case)
        got = student.utilization(dict(config), 131072, *case)
        expect.number(got, expected, rel=1e-6, what="the share")

    @points(1)
    def test_any_shape(self, student, rng):
        """is right for a model of any shape"""
        config, seq_len = _random_config(rng), 50
        expected = self._expected(config, seq_len, 1000.0, 3, 1e9)
        got = student.utilization(dict(config), seq_len, 1000.0, 3, 1e9)
        expect.number(got, expected, rel=1e-6, what="the share")


@exercise(
    "adamw_step",
    kind="build",
    minutes=15,
    difficulty=2,
    see="7. AdamW, schedule, clipping",
    hints=(
        "Four lines, in the order of the docstring. Which of them should see the decay?",
        "Right without decay, wrong with it: the decay was added to the gradient, where Adam "
        "divides it by the gradient's size. A first step that is too short by ten: the means "
        "start at zero and must be corrected.",
        "m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2\n"
        "m^ = m / (1 - b1^step);  v^ = v / (1 - b2^step)\n"
        "p = p - lr wd p - lr m^ / (sqrt(v^) + eps)",
    ),
)
class TestAdamWStep:
    def _torch(self, param, grads, lr, betas, eps, decay):
        """torch's trajectory, and its means after each step."""
        leaf = nn.Parameter(param.clone())
        optimizer = torch.optim.AdamW([leaf], lr, betas, eps, decay, foreach=False)
        for grad in grads:
            leaf.grad = grad.clone()
            optimizer.step()
            state = optimizer.state[leaf]
            yield leaf.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    def _follow(self, student, rng, num_steps, lr, betas, eps, decay, std=1.0, shape=(5, 3)):
        param = _normal(rng, *shape, std=2.0)
        grads = [_normal(rng, *shape, mean=0.2, std=std) for _ in range(num_steps)]
        m, v = torch.zeros(shape), torch.zeros(shape)
        theirs = self._torch(param, grads, lr, betas, eps, decay)
        for step, (grad, expected) in enumerate(zip(grads, theirs, strict=True), 1):
            got = student.adamw_step(param, grad, m, v, step, lr, betas, eps, decay)
            expect.close(got, expected, f"(param, m, v) after step {step}")
            param, m, v = expected

    @points(1)
    def test_first_step(self, student, rng):
        """takes the first step as torch.optim.AdamW does, without decay"""
        self._follow(student, rng, 1, 0.05, (0.9, 0.95), 1e-8, 0.0)

    @points(2)
    def test_trajectory(self, student, rng):
        """follows torch.optim.AdamW with decay through four steps"""
        self._follow(student, rng, 4, 0.05, (0.8, 0.9), 1e-8, 0.3)

    @points(1)
    def test_eps(self, student, rng):
        """adds eps to the root, where gradients are as small as it is"""
        self._follow(student, rng, 2, 0.05, (0.9, 0.99), 0.01, 0.1, std=0.01)

    @points(1)
    def test_no_gradient(self, student, rng):
        """decays a parameter without gradient by lr * weight_decay of itself"""
        param, zeros = _normal(rng, 6), torch.zeros(6)
        got = student.adamw_step(param, zeros, zeros, zeros, 1, 0.1, (0.9, 0.95), 1e-8, 0.5)
        expect.close(got[0], param * (1 - 0.1 * 0.5), "param")


def _sgd_oracle(params, grads, lr, decay, max_norm):
    """torch's own clipping, and SGD on two groups."""
    leaves = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    for name, leaf in leaves.items():
        leaf.grad = grads[name].clone()
    norm = float(nn.utils.clip_grad_norm_(leaves.values(), max_norm))
    # Decoupled: the gradient is clipped before the decay comes in, and clipping does not see it.
    matrices = [p for p in leaves.values() if p.ndim >= 2]
    rest = [p for p in leaves.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    torch.optim.SGD(groups, lr).step()
    return {name: leaf.detach() for name, leaf in leaves.items()}, norm


@exercise(
    "optimizer_step",
    kind="repair",
    minutes=15,
    difficulty=2,
    see="7. AdamW, schedule, clipping",
    hints=(
        "Call it with one matrix and one norm's weight, gradients of length 3 and 4, and "
        "max_norm 1. What should the two updates be?",
        "A returned norm that is too small: it is that of all tensors together, sqrt(9 + 16). "
        "Wrong for vectors alone: does the decay reach them?",
        "norm = sqrt(sum over all tensors of the sum of squares)\n"
        "scale = min(1, max_norm / norm)\n"
        "each: p - lr (wd if it has 2 dimensions or more, else 0) p - lr scale g",
    ),
)
class TestOptimizerStep:
    def _draw(self, rng, std):
        shapes = {"embed": (6, 4), "norm": (4,), "kernel": (2, 3, 2)}
        params = {n: _normal(rng, *s, mean=1.0) for n, s in shapes.items()}
        return params, {n: _normal(rng, *s, std=std * (i + 1)) for i, (n, s) in
                        enumerate(shapes.items())}  # fmt: skip

    def _check(self, student, rng, std, lr, decay, max_norm):
        params, grads = self._draw(rng, std)
        new, norm = student.optimizer_step(dict(params), dict(grads), lr, decay, max_norm)
        expected, expected_norm = _sgd_oracle(params, grads, lr, decay, max_norm)
        expect.number(norm, expected_norm, rel=1e-5, what="norm")
        expect.close(new, expected, "the new parameters")

    @points(2)
    def test_clips(self, student, rng):
        """clips the gradient as a whole, in its own direction"""
        self._check(student, rng, 1.0, 0.1, 0.0, 1.0)

    @points(2)
    def test_decays_matrices(self, student, rng):
        """decays what has two dimensions or more, and leaves a short gradient as it is"""
        self._check(student, rng, 0.01, 0.1, 0.5, 100.0)

    @points(1)
    def test_both(self, student, rng):
        """clips and decays in one step: clipping leaves the decay whole"""
        self._check(student, rng, 1.0, 0.1, 0.5, 0.5)

    def test_zero_gradient(self, student, rng):
        """takes a gradient of zeros"""
        params, grads = self._draw(rng, 1.0)
        zeros = {name: torch.zeros_like(g) for name, g in grads.items()}
        new, norm = student.optimizer_step(dict(params), zeros, 0.1, 0.0, 1.0)
        expect.number(norm, 0.0, what="norm")
        expect.close(new, params, "the new parameters")


def _sampling_oracle(logits, temperature, top_k, top_p):
    """Token by token, in plain Python."""
    ranked = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    weights = [math.exp((float(logits[i]) - float(logits[ranked[0]])) / temperature)
               for i in ranked]  # fmt: skip
    if top_k is not None:
        ranked, weights = ranked[:top_k], weights[:top_k]
    kept, total, reached = [], sum(weights), 0.0
    for i, weight in zip(ranked, weights, strict=True):
        if kept and top_p is not None and reached >= top_p - 1e-9:
            break
        kept.append((i, weight))
        reached += weight / total
    out, total = torch.zeros(len(logits)), sum(weight for _, weight in kept)
    for i, weight in kept:
        out[i] = weight / total
    return out


@exercise(
    "next_token_probabilities",
    kind="build",
    minutes=20,
    difficulty=2,
    see="9. Sampling",
    hints=(
        "Sort once, cut in the sorted order, and put the probabilities back where their tokens "
        "are. Whether a token stays depends on what stands BEFORE it in the order.",
        "The most likely token alone where two were expected: the token that crosses top_p stays. "
        "The right numbers at the wrong tokens: scatter them back by the order of the sort.",
        "ranked, order = (logits / temperature) sorted, largest first\n"
        "ranked[top_k:] = -inf;  p = softmax(ranked)\n"
        "before = cumsum(p) - p;  drop where before >= top_p (never the first)\n"
        "scatter p / sum(p) back by order",
    ),
)
class TestNextTokenProbabilities:
    def _logits(self, rng, vocab=12):
        # Distinct, in random order, and spread so that cuts fall between tokens.
        steps = 0.25 + 0.5 * torch.rand(vocab, generator=rng)
        return steps.cumsum(0)[torch.randperm(vocab, generator=rng)]

    def _check(self, student, logits, temperature=1.0, top_k=None, top_p=None):
        expected = _sampling_oracle(logits, temperature, top_k, top_p)
        got = student.next_token_probabilities(logits.clone(), temperature, top_k, top_p)
        what = f"temperature={temperature}, top_k={top_k}, top_p={top_p}: the probabilities"
        expect.close(got, expected, what)

    def test_temperature(self, student, rng):
        """divides the logits by the temperature"""
        for temperature in (0.5, 1.0, 2.0):
            self._check(student, self._logits(rng), temperature)

    def test_greedy(self, student, rng):
        """puts everything on the largest logit at temperature 0"""
        logits = self._logits(rng)
        got = student.next_token_probabilities(logits, 0.0)
        expect.close(got, F.one_hot(logits.argmax(), 12).float(), "the probabilities")

    @points(1)
    def test_top_k(self, student, rng):
        """keeps the k largest; more than there are keeps all"""
        for top_k in (1, 3, 50):
            self._check(student, self._logits(rng), 1.0, top_k)

    @points(3)
    def test_top_p(self, student, rng):
        """keeps the smallest set that reaches top_p, its last token included"""
        for top_p in (0.3, 0.6, 0.9):
            self._check(student, self._logits(rng), 1.0, None, top_p)

    @points(1)
    def test_at_least_one(self, student, rng):
        """keeps one token even for top_p = 0"""
        self._check(student, self._logits(rng), 1.0, None, 0.0)

    @points(2)
    def test_order(self, student, rng):
        """applies temperature, then top_k, then top_p to what is left"""
        for temperature, top_k, top_p in ((2.0, None, 0.7), (1.5, 4, 0.75), (3.0, 3, 0.8)):
            self._check(student, self._logits(rng), temperature, top_k, top_p)


def _merge_oracle(words, counts, new_id):
    """By brute force over strings: one character is one token."""
    texts = ["".join(map(chr, word)) for word in words]
    pairs = {a + b for text in texts for a, b in itertools.pairwise(text)}
    if not pairs:
        return None, words

    def occurrences(pair):
        return sum(
            count * sum(text.startswith(pair, i) for i in range(len(text)))
            for text, count in zip(texts, counts, strict=True)
        )

    best = min(pairs, key=lambda pair: (-occurrences(pair), pair))
    # str.replace goes from the left and does not overlap.
    merged = [[ord(c) for c in text.replace(best, chr(new_id))] for text in texts]
    return tuple(map(ord, best)), merged


@exercise(
    "merge_step",
    kind="challenge",
    minutes=25,
    difficulty=3,
    see="3. Tokens: byte-level BPE",
    hints=(
        "Two passes over the words: one that counts pairs, one that rewrites. A while loop with an "
        "index that moves by one or by two does the second.",
        "The wrong pair: a word that occurs five times gives each of its pairs five times; and of "
        "equals the smallest tuple wins. A word too short: (7, 7, 7) has room for one merge of "
        "(7, 7).",
        "counts[pair] += count of the word, for each two neighbours\n"
        "best = smallest pair among those with the largest count; none: return None, words\n"
        "for each word: i = 0; if word[i:i+2] is best: new_id, i += 2; else word[i], i += 1",
    ),
)
class TestMergeStep:
    def _check(self, student, words, counts, new_id):
        pair, merged = student.merge_step(words, counts, new_id)
        expected_pair, expected = _merge_oracle(words, counts, new_id)
        expect.equal(pair, expected_pair, "the pair")
        expect.equal(merged, expected, f"the words after merging {expected_pair}")

    @points(3)
    def test_random_words(self, student, rng):
        """finds and merges the commonest pair of random words"""
        for _ in range(3):
            lengths = [_integer(rng, 1, 7) for _ in range(10)]
            words = [torch.randint(97, 101, (n,), generator=rng).tolist() for n in lengths]
            counts = torch.randint(1, 9, (10,), generator=rng).tolist()
            self._check(student, words, counts, 300)

    @points(1)
    def test_weights(self, student, rng):
        """counts a word as often as it occurs"""
        self._check(student, [[1, 2], [3, 4], [5, 3, 4], [3, 4, 6]], [50, 1, 1, 1], 10)

    @points(1)
    def test_within_words(self, student, rng):
        """makes no pair of the end of a word and the beginning of the next"""
        self._check(student, [[1, 2], [3, 1], [2, 3], [1, 2], [3]], [1, 1, 1, 1, 9], 10)

    @points(1)
    def test_repeats(self, student, rng):
        """merges from the left and takes no token twice"""
        run = [7] * _integer(rng, 4, 9)
        self._check(student, [run, [7, 7, 7], [7, 8, 7, 7, 8]], [5, 3, 1], 9)

    @points(1)
    def test_ties(self, student, rng):
        """takes the smallest of equally common pairs, wherever it stands"""
        self._check(student, [[5, 6], [2, 9], [2, 3], [8, 1], [9, 1]], [4, 4, 4, 4, 2], 10)

    @points(1)
    def test_several_steps(self, student, rng):
        """goes on from its own result"""
        words, counts = [[1, 2, 3], [1, 2], [4, 1, 2, 3], [2, 3]], [4, 5, 1, 2]
        for new_id in (10, 11):
            self._check(student, words, counts, new_id)
            words = _merge_oracle(words, counts, new_id)[1]

    def test_nothing_left(self, student, rng):
        """returns None where no word has two tokens"""
        self._check(student, [[1], [2]], [3, 5], 10)
