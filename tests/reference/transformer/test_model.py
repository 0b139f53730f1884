import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reference import pretrained
from reference.attention import causal_mask, grouped_query_attention, padding_mask
from reference.positions import RopeScaling
from reference.transformer import (
    PRESETS,
    Llama,
    LlamaConfig,
    SequenceCache,
    fused_causal_attention,
    load_pretrained,
    next_token_loss,
    to_huggingface,
)
from tests.tolerances import TOLERANCE

TINY = LlamaConfig(
    vocab_size=67,
    dim=32,
    hidden_dim=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
    initializer_std=0.2,
)
ROPES = {
    "default": None,
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 4.0),
    "dynamic": RopeScaling("dynamic", 4.0, 16),
    "yarn": RopeScaling("yarn", 4.0, 16),
    "llama3": RopeScaling("llama3", 8.0, 16),
}
needs_model = pytest.mark.skipif(
    not (pretrained.SMOLLM2 / "model.safetensors").is_file(), reason="needs `make model`"
)


def make_pair(dtype=torch.float32, **changes):
    """A Llama of ours with random weights, and transformers' eager one with the same."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changes)
    ours = Llama(config).to(dtype).eval()
    entries = {**to_huggingface(config), "attn_implementation": "eager"}
    theirs = LlamaForCausalLM(TheirConfig(**entries)).to(dtype).eval()
    state = {n if n == "lm_head.weight" else f"model.{n}": t for n, t in ours.state_dict().items()}
    if config.is_tied:
        state["lm_head.weight"] = ours.embed_tokens.weight
    theirs.load_state_dict(state)
    # .to(dtype) has rounded the frequencies, which from_pretrained keeps in float32.
    theirs.model.rotary_emb = LlamaRotaryEmbedding(theirs.config)
    return ours, theirs


def make_tokens(batch=2, seq_len=21, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, seq_len), generator=rng)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_matches_transformers_bit_for_bit(rope, is_tied):
    ours, theirs = make_pair(rope_scaling=ROPES[rope], is_tied=is_tied)
    tokens = make_tokens(seq_len=30)  # beyond the 16 of training, so that "dynamic" stretches
    actual, expected = ours(tokens), theirs(tokens).logits
    assert torch.equal(actual, expected)
    next_token_loss(actual, tokens).backward()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_transformers_bit_for_bit_in_half_precision(dtype):
    ours, theirs = make_pair(dtype)
    tokens = make_tokens()
    actual = ours(tokens)
    assert actual.dtype == dtype and torch.equal(actual, theirs(tokens).logits)


@pytest.mark.parametrize("rope", ["default", "yarn", "llama3"])
def test_matches_transformers_with_its_cache(rope):
    ours, theirs = make_pair(rope_scaling=ROPES[rope])
    tokens, caches = make_tokens(), (DynamicCache(), DynamicCache())
    assert isinstance(caches[0], SequenceCache)
    with torch.no_grad():
        for piece in tokens.split([9, 1, 4, 1, 1, 5], 1):
            actual = ours(piece, cache=caches[0])
            assert torch.equal(actual, theirs(piece, past_key_values=caches[1]).logits)
    assert torch.equal(caches[0].layers[2].keys, caches[1].layers[2].keys)


@needs_model
def test_matches_transformers_on_smollm2_bit_for_bit():
    torch.set_num_threads(1)
    theirs, tokenizer = pretrained.load_smollm2()
    ours = load_pretrained(pretrained.SMOLLM2)
    assert ours.config == PRESETS["smollm2-135m"]
    tokens = tokenizer(pretrained.passage(), return_tensors="pt").input_ids[:, :96]
    cache = DynamicCache()
    with torch.no_grad():
        whole = theirs(tokens).logits
        assert torch.equal(ours(tokens), whole)
        pieces = [ours(piece, cache=cache) for piece in tokens[:, :40].split([38, 1, 1], 1)]
    close = {key: 100 * value for key, value in TOLERANCE[torch.float32].items()}  # 30 layers
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, :40], **close)
    assert next_token_loss(whole, tokens) < 4  # it knows English: chance is ln 49152 = 10.8


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_invariant_pieces_through_a_cache_equal_the_whole(pieces, seed):
    ours = Llama(TINY).double()
    tokens, cache = make_tokens(seq_len=sum(pieces), seed=seed), DynamicCache()
    with torch.no_grad():
        outputs = [ours(piece, cache=cache) for piece in tokens.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(outputs, 1), ours(tokens), **TOLERANCE[torch.float64])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 19), st.integers(0, 99))
def test_invariant_no_token_sees_a_later_one(changed, seed):
    ours, tokens = Llama(TINY), make_tokens(seq_len=20, seed=seed)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = ours(tokens), ours(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("side", ["right", "left"])
def test_invariant_padding_changes_nothing(side):
    ours = Llama(TINY).double()
    tokens, lengths = make_tokens(batch=3, seq_len=9), torch.tensor([9, 4, 1])
    mask = causal_mask(9) & padding_mask(lengths, 9, side=side)
    positions = None
    if side == "left":
        positions = (torch.arange(9) - (9 - lengths)[:, None]).clamp(min=0)
    with torch.no_grad():
        padded = ours(tokens, positions, mask=mask)
        for b, length in enumerate(lengths.tolist()):
            real = slice(0, length) if side == "right" else slice(9 - length, 9)
            alone = ours(tokens[b : b + 1, real])
            torch.testing.assert_close(padded[b : b + 1, real], alone, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    "attend",
    [
        grouped_query_attention,
        fused_causal_attention,
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
    ],
    ids=["grouped", "fused", "torch"],
)
def test_every_kernel_gives_the_same(attend):
    ours, tokens = Llama(TINY).double(), make_tokens()
    close = TOLERANCE[torch.float64]
    whole = ours(tokens)
    torch.testing.assert_close(ours(tokens, attend=attend), whole, **close)
    cache = DynamicCache()
    pieces = [ours(t, cache=cache, attend=attend) for t in tokens.split([1, 9, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **close)
    mask = causal_mask(21) & padding_mask(torch.tensor([21, 5]), 21)
    expected = ours(tokens, mask=mask)
    torch.testing.assert_close(ours(tokens, mask=mask, attend=attend), expected, **close)


def test_last_logits_alone():
    ours, tokens = Llama(TINY), make_tokens()
    torch.testing.assert_close(
        ours(tokens, num_logits=3), ours(tokens)[:, -3:], **TOLERANCE[torch.float32]
    )


def test_empty_batch_and_one_token():
    ours = Llama(TINY)
    assert ours(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, TINY.vocab_size)
    assert ours(torch.tensor([[3]])).shape == (1, 1, TINY.vocab_size)
    assert ours(torch.tensor([[3]], dtype=torch.int32)).shape == (1, 1, TINY.vocab_size)


def test_fresh_weights_are_normal_and_norms_one():
    ours = Llama(dataclasses.replace(TINY, dim=256, hidden_dim=512, initializer_std=0.02))
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 1e-3, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_a_tied_head_is_the_embedding():
    ours = Llama(dataclasses.replace(TINY, is_tied=True))
    assert ours.lm_head is None and "lm_head.weight" not in ours.state_dict()
    ours(make_tokens()).sum().backward()
    assert ours.embed_tokens.weight.grad.ne(0).all(1).all()  # every row, through the head


def test_runs_without_numbers():
    with torch.device("meta"):
        logits = Llama(TINY)(torch.zeros(2, 7, dtype=torch.long))
    assert logits.shape == (2, 7, TINY.vocab_size)
    with FakeTensorMode():
        logits = Llama(TINY)(torch.zeros(2, 7, dtype=torch.long))
    assert logits.shape == (2, 7, TINY.vocab_size)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(1, 0, dtype=torch.long), r"expected \(B, T\) with at least one token"),
        (torch.zeros(4, dtype=torch.long), r"tokens: expected \(B, T\)"),
        (torch.tensor([[1, 67]]), r"tokens: expected ids in 0 ... 66, got 1 ... 67"),
        (torch.tensor([[-100, 3]]), "got -100 ... 3; is the tokenizer this model's"),
        (torch.zeros(1, 65, dtype=torch.long), "a context of 64 tokens, got 0 ... 64"),
    ],
    ids=["empty", "flat", "too large", "negative", "too long"],
)
def test_rejects_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        Llama(TINY)(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_rejects_tokens_that_are_no_whole_numbers(dtype):
    with pytest.raises(TypeError, match="tokens: expected whole numbers"):
        Llama(TINY)(torch.zeros(1, 3, dtype=dtype))


def test_rejects_a_cache_that_outgrows_the_context():
    ours, cache = Llama(TINY), DynamicCache()
    ours(make_tokens(seq_len=60), cache=cache)
    with pytest.raises(ValueError, match="a context of 64 tokens, got 60 ... 64"):
        ours(make_tokens(seq_len=5), cache=cache)


def test_rejects_positions_that_do_not_fit():
    tokens = make_tokens(seq_len=4)
    with pytest.raises(ValueError, match=r"positions: expected \(4,\) or \(2, 4\), got \(5,\)"):
        Llama(TINY)(tokens, torch.arange(5))
    with pytest.raises(ValueError, match="got -1 ... 2"):
        Llama(TINY)(tokens, torch.arange(-1, 3))


def test_rejects_a_cache_of_unknown_length():
    class Endless:
        def update(self, k, v, layer):
            return k, v

    with pytest.raises(ValueError, match="cache: expected get_seq_length"):
        Llama(TINY)(make_tokens(), cache=Endless())


def test_rejects_no_logits():
    with pytest.raises(ValueError, match="num_logits: expected at least 1, got 0"):
        Llama(TINY)(make_tokens(), num_logits=0)
