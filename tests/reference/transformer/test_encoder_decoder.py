import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference.transformer.encoder_decoder import DecoderLayer, EncoderDecoder, EncoderLayer
from tests.tolerances import TOLERANCE

DIM, HIDDEN, HEADS, VOCAB = 16, 40, 4, 23
CLOSE = TOLERANCE[torch.float64]
SUBLAYERS = {
    "self_attn": "self_attention",
    "multihead_attn": "cross_attention",
}


def load_from_torch(ours, theirs):
    """Copy the weights of an nn.TransformerEncoderLayer or DecoderLayer, fused q, k, v and all."""
    norms = ["self_attention", "cross_attention", "feed_forward"]
    norms = norms if isinstance(ours, DecoderLayer) else [norms[0], norms[2]]
    state = {}
    for name, value in theirs.state_dict().items():
        part, _, rest = name.partition(".")
        if part in SUBLAYERS:
            inside = f"{SUBLAYERS[part]}.sublayer"
            if rest.startswith("in_proj_"):
                for letter, piece in zip("qkv", value.chunk(3), strict=True):
                    state[f"{inside}.{letter}_proj.{rest.removeprefix('in_proj_')}"] = piece
            else:
                state[f"{inside}.o_proj.{rest.removeprefix('out_proj.')}"] = value
        elif part.startswith("norm"):
            state[f"{norms[int(part[-1]) - 1]}.norm.{rest}"] = value
        else:
            state[f"feed_forward.sublayer.{0 if part == 'linear1' else 2}.{rest}"] = value
    ours.load_state_dict(state)


def make_pair(num_layers=3):
    """Ours with random weights from torch's nn.Transformer, and its two stacks."""
    torch.manual_seed(0)
    whole = nn.Transformer(
        DIM, HEADS, num_layers, num_layers, HIDDEN, dropout=0.0, batch_first=True,
        dtype=torch.float64,
    )  # fmt: skip
    for parameter in whole.parameters():  # biases and norms too, which begin at 0 and 1
        nn.init.normal_(parameter, std=0.3)
    # The paper has no norm after the stacks; torch adds one.
    whole.encoder.norm = whole.decoder.norm = None
    ours = EncoderDecoder(
        VOCAB, dim=DIM, hidden_dim=HIDDEN, num_heads=HEADS, num_layers=num_layers
    ).double()
    for side in ("encoder", "decoder"):
        for mine, layer in zip(getattr(ours, side), getattr(whole, side).layers, strict=True):
            load_from_torch(mine, layer)
    return ours, whole


def make_texts(batch=3, source_len=9, target_len=6):
    rng = torch.Generator().manual_seed(1)
    source = torch.randint(VOCAB, (batch, source_len), generator=rng)
    target = torch.randint(VOCAB, (batch, target_len), generator=rng)
    source_is_real = torch.arange(source_len) < torch.tensor([source_len, 4, 1])[:, None]
    target_is_real = torch.arange(target_len) < torch.tensor([3, target_len, 2])[:, None]
    return source, target, source_is_real, target_is_real


def sinusoids(length):
    rows = torch.arange(length, dtype=torch.float64)[:, None]
    angles = rows / 10000 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


@pytest.mark.parametrize("is_padded", [False, True])
def test_matches_torchs_transformer(is_padded):
    ours, theirs = make_pair()
    source, target, source_is_real, target_is_real = make_texts()
    embedding = ours.embedding.weight
    x, y = (embedding[t] * DIM**0.5 + sinusoids(t.shape[1]) for t in (source, target))
    padding = {}
    if is_padded:
        padding = {
            "src_key_padding_mask": ~source_is_real,
            "tgt_key_padding_mask": ~target_is_real,
            "memory_key_padding_mask": ~source_is_real,
        }
    future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    expected = theirs(x, y, tgt_mask=future, **padding)
    masks = (source_is_real, target_is_real) if is_padded else ()
    actual = ours(source, target, *masks)
    loose = {"rtol": 1e-6, "atol": 1e-6}  # our sinusoids are float32
    torch.testing.assert_close(actual, F.linear(expected, embedding), **loose)
    names = [p for n, p in ours.named_parameters() if "v_proj.weight" in n]
    assert all(g.ne(0).any() for g in torch.autograd.grad(actual.sum(), names))


def test_layers_match_torchs_with_gradients():
    torch.manual_seed(0)
    kwargs = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **kwargs)
    ours = EncoderLayer(DIM, HIDDEN, HEADS).double()
    load_from_torch(ours, theirs)
    a, e = ours(x), theirs(x)
    torch.testing.assert_close(a, e, **CLOSE)
    grads = (torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (a, e))
    torch.testing.assert_close(*grads, **{k: 100 * v for k, v in CLOSE.items()})
    theirs = nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, **kwargs)
    ours = DecoderLayer(DIM, HIDDEN, HEADS).double()
    load_from_torch(ours, theirs)
    a, e = ours(x, memory), theirs(x, memory)
    torch.testing.assert_close(a, e, **CLOSE)
    for inputs in (x, memory):
        grads = (torch.autograd.grad(y.pow(3).sum(), inputs, retain_graph=True)[0] for y in (a, e))
        torch.testing.assert_close(*grads, **{k: 100 * v for k, v in CLOSE.items()})


def test_invariant_the_target_sees_no_later_token_and_the_whole_source():
    ours, _ = make_pair()
    source, target, *_ = make_texts()
    before = ours(source, target)
    changed = target.clone()
    changed[:, 3] = (changed[:, 3] + 1) % VOCAB
    after = ours(source, changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])
    changed = source.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert before.ne(ours(changed, target)).any(-1).all()


def test_invariant_padding_is_not_seen():
    ours, _ = make_pair()
    source, target, source_is_real, target_is_real = make_texts()
    before = ours(source, target, source_is_real, target_is_real)
    source = torch.where(source_is_real, source, (source + 1) % VOCAB)
    target = torch.where(target_is_real, target, (target + 1) % VOCAB)
    after = ours(source, target, source_is_real, target_is_real)
    torch.testing.assert_close(before[target_is_real], after[target_is_real], **CLOSE)


def test_encoding_once_serves_every_target():
    ours, _ = make_pair()
    source, target, *_ = make_texts()
    memory = ours.encode(source)
    for length in (1, 4):
        y = F.linear(ours.decode(target[:, :length], memory), ours.embedding.weight)
        torch.testing.assert_close(y, ours(source, target[:, :length]), **CLOSE)


def test_rejects_texts_and_masks():
    ours, _ = make_pair(1)
    source, target, source_is_real, target_is_real = make_texts()
    with pytest.raises(ValueError, match="source: expected .* with at least one token"):
        ours(source[:, :0], target)
    with pytest.raises(ValueError, match="target: expected a batch of 3 as the source, got 2"):
        ours(source, target[:2])
    with pytest.raises(ValueError, match=r"target_is_real: expected shape \(3, 6\), got \(3, 9\)"):
        ours(source, target, source_is_real, source_is_real)
