# %% [markdown] slideshow={"slide_type": "slide"}
# # 04 Attention
#
# A token is a word without its sentence. Attention is the one place in a transformer where a
# position reads other positions: it asks, the others answer, and it takes a weighted average of
# the answers. You will build it, mask it, differentiate it by hand, share its heads, count what it
# costs, and see what the heads of a trained model do with it.
#
# You need matrix products and the softmax. Chapter 03 (positions) helps but is not required.
#
# <!-- notes: Lecture of 75 minutes: 40 for sections 1 to 6, 35 for 7 to 12; sections 13 to 15 are
# for home and for the discussion. Ask first who has written a softmax over scores before. Say that
# all experiments run on one trained model of 135 million parameters, and that every guess will be
# checked. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** The notebook runs in under half a minute on one CPU core; most of it is
# > section 1, fifteen passes of a 135M-parameter model over 128 tokens. Shorten `windows` to shrink
# > it. No GPU is used, and nothing is downloaded while it runs.

# %% slideshow={"slide_type": "skip"}
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from autograder.notebook import check
from autograder.spies import largest_new_tensor
from figures import style
from figures.stepper import Stepper
from reference import attention as A
from reference.pretrained import capture, capture_attention, load_smollm2, passage
from reference.transformer import fused_causal_attention

torch.set_num_threads(1)
torch.manual_seed(0)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. What a model loses without it
#
# Everything in a transformer except attention works on one position at a time. So take a trained
# model and shorten its sight: position $t$ may read only the last $w$ positions, itself included.
# At $w = 1$ attention is there and can only look at its own token.
#
# **Before you run the cell:** how much context does the model need until its loss is within 10 %
# of that with full sight? And what would you expect from also leaving the very *first* token
# visible?
#
# <!-- notes: Five minutes. Draw the axes, loss against window, and let three students draw their
# curve. Expect one that falls steeply and is flat from 16 on, and for the second question: the
# first token changes nothing. Keep that line on the board until section 11. -->

# %% slideshow={"slide_type": "skip"}
NUM_TOKENS = 128
model, tokenizer = load_smollm2()
config = model.config
tokens = tokenizer(passage(), return_tensors="pt").input_ids[:, :NUM_TOKENS]
print(f"{tokens.shape[1]} tokens; {config.num_hidden_layers} layers, each with "
      f"{config.num_attention_heads} query heads and {config.num_key_value_heads} key/value heads "
      f"of width {config.head_dim}")  # fmt: skip


# %% slideshow={"slide_type": "skip"}
@torch.no_grad()
def next_token_loss(mask, position_ids=None):
    """Mean loss in nats over the last two thirds of the passage; `mask` says who sees whom."""
    additive = A.additive_mask(mask, torch.float32)[None, None]
    predicted = NUM_TOKENS * 2 // 3
    logits = model(
        tokens, attention_mask=additive, position_ids=position_ids, logits_to_keep=predicted + 1
    ).logits
    return F.cross_entropy(logits[0, :-1], tokens[0, -predicted:]).item()


windows = [1, 2, 4, 8, 16, 32, 64]
is_first = torch.arange(NUM_TOKENS) == 0
causal = A.causal_mask(NUM_TOKENS)
sight = {"last w tokens": [], "last w tokens and the first": []}
for w in windows:
    mask = A.sliding_window_mask(NUM_TOKENS, window=w)
    sight["last w tokens"].append(next_token_loss(mask))
    sight["last w tokens and the first"].append(next_token_loss(mask | (causal & is_first)))
full_sight = next_token_loss(causal)
windows.append(NUM_TOKENS)
for losses in sight.values():
    losses.append(full_sight)

# %% slideshow={"slide_type": "fragment"}
figure, axis = plt.subplots(figsize=(8, 4.2))
for (label, losses), marker in zip(sight.items(), "os", strict=True):
    axis.plot(windows, losses, marker=marker, label=label)
axis.text(4.6, 8.1, "last w tokens", color="C0")
axis.text(1.05, 4.0, "last w tokens\nand the first", color="C1")
axis.set_xscale("log", base=2)
axis.set_xticks(windows, [str(w) for w in windows])
axis.set_xlabel("window w (tokens)")
axis.set_ylabel("loss of the next token (nats)")
axis.set_ylim(2, 10)
plt.show()
print(f"{'window':28s}", *(f"{w:5d}" for w in windows))
for label, losses in sight.items():
    print(f"{label:28s}", *(f"{x:5.1f}" for x in losses))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Without other positions the model knows almost nothing: 9.3 nats, where guessing evenly among
# 49,152 tokens costs 10.8. Half of the passage, 64 tokens, is not yet enough for 10 %. And the
# *first* token, which says nothing about the word to come, is worth a lot: with it 32 tokens are
# enough, and 16 beat 64 without it. Nobody designed that. Section 11 finds the heads that do it;
# by then you will have built all that is needed to see why.
#
# <!-- notes: The second curve is the finding of StreamingLLM (arXiv 2309.17453), attention sinks.
# Do not explain it yet; collect guesses. "The first word is the subject" is the usual one, and
# section 11 refutes it. Point at 16 with the first token, 4.3 nats, against 64 without, 4.5. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Scores, softmax, weighted sum
#
# A dictionary compares a query with its keys and returns the value of the one that is equal.
# Attention is a dictionary that never says no: it compares the query with *all* keys, turns the
# comparisons into shares of one, and returns the average of the values by these shares.
#
# Here is one lookup of the trained model, a single query in one head: at the second *John* of a
# sentence, which earlier words does it read? Step through it.
#
# <!-- notes: Nine minutes for the section. In a live notebook the film strip is a slider; let it
# play while you talk. Ask before step 3 how many bars must vanish, and after step 4 where the mass
# went: 0.83 to the first John, 0.14 to Mary. The output is nearly one row of v; that is a lookup.
# -->

# %% slideshow={"slide_type": "skip"}
SENTENCE = (
    "Mary gave the red book to John because he had lost his own, "
    "and John thanked Mary for the book."
)
sentence = tokenizer(SENTENCE, return_tensors="pt").input_ids
words = [tokenizer.decode(i) for i in sentence[0]]


LAYERS = [f"model.layers.{i}.self_attn" for i in range(config.num_hidden_layers)]


def layer_inputs(ids):
    """What enters each attention layer of the model: a list of (1, T, D)."""
    return [seen.input for seen in capture(model, ids, LAYERS).values()]


def our_layer(index):
    """The reference's layer with the weights of SmolLM2's layer `index`."""
    layer = A.Attention(
        config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer=index,
    )
    layer.load_state_dict(model.model.layers[index].self_attn.state_dict())
    return layer.requires_grad_(False)


def rotation(start, stop):
    """RoPE at positions start ... stop - 1, as a function of a tensor (B, heads, T, d)."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(start, stop)[None])
    return lambda x: modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)[0]


def heads_of(index, inputs):
    """q (1, H, T, d) and k, v (1, K, T, d) of a layer, q and k at their positions."""
    layer, x = our_layer(index), inputs[index]
    q, k, v = layer.project(x, x)
    rotate = rotation(0, x.shape[1])
    q, k, v = (A.split_heads(y, y.shape[-1] // config.head_dim) for y in (q, k, v))
    return rotate(q), rotate(k), v


inputs = layer_inputs(sentence)
q, k, v, *_ = capture_attention(model, sentence, 8)
head, earlier = 0, words.index(" John")
query = words.index(" John", earlier + 1)
print(
    "query:", repr(words[query]), " q", tuple(q.shape), " k", tuple(k.shape), " v", tuple(v.shape)
)

# %% slideshow={"slide_type": "subslide"}
row_q, row_k, row_v = q[0, head, query], k[0, head // 3], v[0, head // 3]
products = row_k @ row_q
scores = products / math.sqrt(config.head_dim)
masked = scores.masked_fill(torch.arange(len(words)) > query, -torch.inf)
weights = masked.softmax(-1)
output = weights @ row_v
steps = [
    ("1. products q·k with every key", "product", products),
    ("2. scores: divided by sqrt(64)", "score", scores),
    ("3. masked: the future is -inf", "score", masked),
    ("4. softmax: shares of one", "probability", weights),
    ("5. values times their shares, and the sum", "", None),
]


def draw_lookup(figure, step):
    title, label, values = step
    axis = figure.subplots()
    axis.set_title(title)
    if values is None:
        stack = torch.cat([row_v * weights[:, None], output[None]])[:, :24]
        limit = float(output[:24].abs().max())
        image = axis.imshow(stack, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        marked = [0, earlier, query]
        axis.set_yticks([*marked, len(words)], [*(words[i] for i in marked), "sum"])
        axis.axhline(len(words) - 0.5, color="black", lw=1)
        axis.set_xlabel("column of the head (first 24 of 64)")
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="share times value")
        return
    hidden = values.isinf()
    axis.bar(range(len(words)), values.masked_fill(hidden, 0).tolist())
    for s in hidden.nonzero().flatten().tolist():
        axis.text(s, 0, " -inf", rotation=90, ha="center", va="bottom", fontsize=11, color="C1")
    axis.set_xticks(range(len(words)), words, rotation=65, ha="right", fontsize=12)
    axis.set_xlabel("key")
    axis.set_ylabel(label)


Stepper(steps, draw_lookup, strip=[0, 2, 3, 4], size=(6.4, 3.4))

# %% slideshow={"slide_type": "skip"}
top = weights.topk(3)
print("most of it goes to:", [(words[i], round(float(w), 2)) for w, i in zip(*top, strict=True)])
print("shares sum to", round(float(weights.sum()), 4))

# %% [markdown] slideshow={"slide_type": "slide"}
# All queries at once are rows of one matrix. With $T$ queries, $S$ keys and width $d$:
#
# $$Z = \frac{q k^\top}{\sqrt d} + \text{mask} \qquad P = \mathrm{softmax}(Z) \qquad O = P\,v$$
#
# $q$ is $(T, d)$, $k$ is $(S, d)$, $v$ is $(S, d_v)$; $P$ is $(T, S)$ and each row of it sums to
# one. (Attention is all you need, arXiv 1706.03762, eq. 1.) The reference is this, with batch and
# heads in front:
#
# <!-- notes: Write the shapes under each letter and have the room say the shape of P before you do.
# Only P is T times S; underline it, it is what chapter 07 refuses to store. The mask is added, so a
# hidden pair gets minus infinity and not zero: section 4. -->

# %% slideshow={"slide_type": "fragment"}
ours = A.scaled_dot_product_attention(q, k, v, A.causal_mask(len(words)))
print("the row above:", torch.allclose(ours[0, head, query], output, atol=1e-5))
print("output", tuple(ours.shape))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Two consequences are worth a moment, since everything later rests on them. The output is an
# *average* of values: it can never leave the range that the values span. And nothing in the
# formula knows where a key stands: sort the keys differently, with their values, and nothing
# changes.
#
# <!-- notes: Ask for a proof of each in one sentence: shares are positive and sum to one; a sum has
# no order. Then ask what follows for a sentence whose words are shuffled. Leave it open, section 10
# runs it. A student who objects that words do have an order is right, and has found the need for
# chapter 03. -->

# %% slideshow={"slide_type": "fragment"}
order = torch.randperm(len(words))
shuffled = A.scaled_dot_product_attention(q, k[:, :, order], v[:, :, order])
plain = A.scaled_dot_product_attention(q, k, v)
shared_v = A.repeat_kv(v, 3)
print("keys in another order, same output:", torch.allclose(plain, shuffled, atol=1e-5))
print("inside the values' range:", bool((plain <= shared_v.amax(2, keepdim=True) + 1e-5).all()))

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `scaled_dot_product_attention`
# *build, 8 minutes, difficulty 1.* Write it in `exercises/attention.py` for tensors with any
# leading dimensions. The optional `is_kept` is for section 5: do the first three checks now and
# come back.

# %% slideshow={"slide_type": "skip"}
check("scaled_dot_product_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Why divide by the root of the head width
#
# The paper gives the reason in a footnote to section 3.2.1: if the components of $q$ and $k$ are
# independent with mean 0 and variance 1, their product has mean 0 and variance $d$. Is that so,
# and would it matter?
#
# <!-- notes: Eight minutes. Do the one-line proof on the board: a sum of d independent products,
# each of mean 0 and variance 1. Then ask what a softmax does with numbers of size 32, which is the
# root of 1024. Let them guess the entropy in bits before the figure; even over 128 keys is 7. -->

# %% slideshow={"slide_type": "skip"}
generator = torch.Generator().manual_seed(0)
widths = [4, 16, 64, 256, 1024]
num_keys = 128
scales = {"1": lambda d: 1.0, "1 / sqrt(d)": lambda d: d**-0.5, "1 / d": lambda d: 1 / d}
entropy = {name: [] for name in scales}
slope = {name: [] for name in scales}
variance = []


def entropy_bits(probabilities):
    return -(probabilities * probabilities.clamp_min(1e-30).log2()).sum(-1)


for d in widths:
    random_q, random_k = (torch.randn(128, n, d, generator=generator) for n in (1, num_keys))
    dots = (random_q @ random_k.mT)[:, 0]
    pair_q, pair_k = torch.randn(2, 20_000, d, generator=generator)
    variance.append(((pair_q * pair_k).sum(-1).var() / d).item())
    for name, scale in scales.items():
        p = (dots * scale(d)).softmax(-1)
        entropy[name].append(entropy_bits(p).mean().item())
        slope[name].append((p * (1 - p)).sum(-1).mean().item())
print("d              ", *(f"{d:7d}" for d in widths))
print("Var(q.k) / d   ", *(f"{x:7.3f}" for x in variance), "   paper: 1")
assert all(abs(x - 1) < 0.02 for x in variance)

# %% slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 2, figsize=(11, 4))
for name, marker in zip(scales, "osv", strict=True):
    axes[0].plot(widths, entropy[name], marker=marker)
    axes[1].plot(widths, slope[name], marker=marker)
axes[0].axhline(math.log2(num_keys), color="grey", lw=1, ls="--")
axes[0].text(5, math.log2(num_keys) + 0.12, "even over all 128 keys", color="grey")
for name, height, slope_height in (
    ("1 / d", 6.48, 0.9),
    ("1 / sqrt(d)", 5.7, 0.82),
    ("1", 0.8, 0.2),
):
    color = f"C{list(scales).index(name)}"
    axes[0].text(1024, height, f"scale {name}", color=color, ha="right")
    axes[1].text(1024, slope_height, f"scale {name}", color=color, ha="right")
axes[0].set_ylabel("entropy of the softmax (bits)")
axes[1].set_ylabel("slope: sum of P(1 - P)")
axes[0].set_ylim(0, 7.8)
axes[1].set_ylim(0, 1.08)
for axis in axes:
    axis.set_xscale("log", base=4)
    axis.set_xticks(widths, [str(d) for d in widths])
    axis.set_xlabel("width d")
plt.show()
for name in scales:
    print(f"scale {name:12s} entropy", *(f"{x:6.2f}" for x in entropy[name]),
          "  slope", *(f"{x:5.2f}" for x in slope[name]))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# Without the scale a wide head is decided before it has learned anything: at $d = 1024$ it listens
# to hardly more than one key, and the slope of the softmax, through which every gradient of $q$
# and $k$ must pass, is nearly gone. With $1/d$ the opposite: all keys alike, whatever they say.
# Only $1/\sqrt d$ keeps the same contrast at every $d$.
#
# **The width that counts is the head's.** Multi-head code has two widths at hand, and
# $\sqrt{\text{hidden}}$ is a mistake that never crashes: with 9 heads all scores are 3 times too
# small. What does a *trained* model say? Take its own $q$ and $k$ and change only the scale.
#
# <!-- notes: The green curve is the trap: 1/d has the best slope and says nothing. So a large
# gradient alone is not the aim. Ask which of the two mistakes would be noticed in training first.
# Before the next figure let them say what a trained head should look like at factor 8. -->

# %% slideshow={"slide_type": "skip"}
passage_inputs = layer_inputs(tokens)
factors = [1 / 8, 1 / 3, 1, 3, 8]
real = {factor: [] for factor in factors}
score_spread = []
for index in range(config.num_hidden_layers):
    real_q, real_k, _ = heads_of(index, passage_inputs)
    for factor in factors:
        p = A.attention_weights(real_q, real_k, causal, scale=factor / math.sqrt(config.head_dim))
        real[factor].append(entropy_bits(p)[0, :, NUM_TOKENS // 2 :].mean(-1))
    lower = (real_q @ A.repeat_kv(real_k, 3).mT / math.sqrt(config.head_dim))[0][:, causal]
    score_spread.append(lower.std(-1))
real = {factor: torch.cat(values) for factor, values in real.items()}
score_spread = torch.cat(score_spread)

# %% slideshow={"slide_type": "fragment"}
figure, axis = plt.subplots(figsize=(11, 3.7))
axis.boxplot([x.tolist() for x in real.values()], whis=(5, 95), showfliers=False,
             medianprops={"color": "C1", "lw": 2.5})  # fmt: skip
names = ["1/8\n(that is 1/d)", "1/3\n(sqrt(hidden))", "1\n(sqrt(d))", "3", "8\n(no scale)"]
axis.set_xticks(range(1, 6), names)
axis.set_xlabel("factor on the trained scale 1/sqrt(64)")
axis.set_ylabel("entropy (bits)")
axis.set_title("270 heads of SmolLM2: median, quartiles, 5 % and 95 %")
plt.show()
print("median entropy, bits:", *(f"{values.median():.1f}" for values in real.values()))
print(f"spread of the trained scores: median {score_spread.median():.1f}, from "
      f"{score_spread.min():.1f} to {score_spread.max():.1f} (1 for random q and k); "
      f"above 1 in {int((score_spread > 1).sum())} of {len(score_spread)}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The footnote describes a model at its *first* step. A trained head has left variance 1 behind,
# nearly always upwards, because training chose how sharp it should be. The scale is a fair start,
# not a law of trained weights; what it fixes is that heads of every width start alike.
#
# <!-- notes: Spread of the trained scores: median 2.5, up to 7.2, where the footnote says 1. So the
# answer to "is the assumption true" is yes at the start and no later, and both are fine. If time is
# short, this is the page to drop. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Masks
#
# A mask says who may read whom, and in this course it is boolean: `True` where a query **sees** a
# key. Each condition is simple, and they combine with `&`.
#
# <!-- notes: Nine minutes for masks. Ask who has used which library and what True meant there;
# there will be a quarrel. Cover the last panel and have somebody draw window and documents
# combined; the count goes from 42 and 50 to 30. Why is the padding mask not triangular? It hides
# keys, not pairs. -->

# %% slideshow={"slide_type": "fragment"}
documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]])
length = 12
named = {
    "causal": A.causal_mask(length),
    "padding: 9 real tokens": A.padding_mask(torch.tensor([9]), length)[0, 0].expand(length, -1),
    "sliding window of 4": A.sliding_window_mask(length, window=4),
    "documents of 4, 3, 5": A.document_mask(documents)[0, 0],
    "window & documents": A.sliding_window_mask(length, window=4)
    & A.document_mask(documents)[0, 0],
}


def draw_mask(axis, mask, title):
    axis.imshow(mask, cmap="Blues", vmin=-0.3, vmax=1.6, aspect="equal")
    axis.set_title(title)
    axis.set_xticks(range(0, mask.shape[1], 4))
    axis.set_yticks(range(0, mask.shape[0], 4 if mask.shape[0] > 6 else 1))
    axis.set_xticks([s - 0.5 for s in range(mask.shape[1])], minor=True)
    axis.set_yticks([t - 0.5 for t in range(mask.shape[0])], minor=True)
    axis.grid(False)
    axis.grid(True, which="minor", color="white", lw=1)
    axis.tick_params(which="minor", length=0)
    axis.set_xlabel("key")


figure, axes = plt.subplots(1, 5, figsize=(14, 3.3), layout="constrained")
for axis, (title, mask) in zip(axes, named.items(), strict=True):
    draw_mask(axis, mask, title)
axes[0].set_ylabel("query")
plt.show()
pairs = [int(mask.sum()) for mask in named.values()]
print(f"pairs seen of {length**2}, from left to right:", pairs)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Boolean or additive?** Libraries take both: `True`/`False`, or numbers that are added to the
# scores, 0 and $-\infty$. They are equal. The direction of booleans is *not* agreed on: in
# `F.scaled_dot_product_attention` and here `True` means seen, in `nn.MultiheadAttention` `True`
# means hidden. Integer masks of ones and zeros, as tokenizers return them, are refused here,
# because adding them hides nothing.
#
# <!-- notes: The error message is the point: a mask of integers would be added, 0 and 1, and hide
# nothing, without an error. Ask what the loss would do: it gets impossibly low, for the future is
# visible. Both forms are equal bit for bit. -->

# %% slideshow={"slide_type": "fragment"}
q4, k4, v4 = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
mask = named["window & documents"]
boolean = A.scaled_dot_product_attention(q4, k4, v4, mask)
additive = A.scaled_dot_product_attention(q4, k4, v4, A.additive_mask(mask, torch.float32))
print("both kinds equal:", torch.equal(boolean, additive))
try:
    A.scaled_dot_product_attention(q4, k4, v4, mask.long())
except TypeError as error:
    print("TypeError:", error)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Before the softmax, not after.** If hidden probabilities are zeroed *after* the softmax, the
# rows no longer sum to one, and worse: by how much they fall short depends on the hidden keys. A
# causal model leaks its future. Let query 3 find just what it looks for, at a key that it must not
# see:
#
# <!-- notes: Let the room vote whether the order matters, since the hidden entries are zero both
# ways. Then the numbers: the row sums to 0.17, and a key that must not be seen changes it by 0.16.
# Renormalising the row would repair the sum; ask whether it repairs the leak as well. It does: that
# is masking before. -->

# %% slideshow={"slide_type": "fragment"}
changed = k4.clone()
changed[:, :, 8] = 3 * q4[:, :, 3]
for name, masked_weights in (
    ("before", lambda keys: A.attention_weights(q4, keys, A.causal_mask(length))),
    ("after ", lambda keys: A.attention_weights(q4, keys) * A.causal_mask(length)),
):
    now, then = masked_weights(k4)[0, 0, 3, :4], masked_weights(changed)[0, 0, 3, :4]
    print(f"mask {name} the softmax: query 3 sums to {now.sum():.4f}; key 8 changes it by "
          f"{(then - now).abs().sum():.4f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# **A row that sees nothing.** Padding on the left and a causal mask leave the first queries
# without any key. The formula asks for the average of nothing, and implementations answer
# differently:
#
# <!-- notes: Have them write a guess beside each of the five lines before you go on: NaN, zeros, a
# mean. Then ask when such rows occur in practice: padding on the left, and every batch of prompts
# has it. -->

# %% slideshow={"slide_type": "fragment"}
empty_first = torch.ones(3, 3, dtype=torch.bool).tril(-1)
x3 = torch.randn(1, 1, 3, 4, generator=generator)
finite = torch.zeros(3, 3).masked_fill(~empty_first, torch.finfo(torch.float32).min)
naive = (x3 @ x3.mT / 2).masked_fill(~empty_first, -torch.inf).softmax(-1) @ x3
module = torch.nn.MultiheadAttention(4, 1, batch_first=True)
answers = {
    "the formula as written": naive,
    "nn.MultiheadAttention": module(x3[0], x3[0], x3[0], attn_mask=~empty_first)[0],
    "lowest finite number (as transformers)": (x3 @ x3.mT / 2 + finite).softmax(-1) @ x3,
    "F.scaled_dot_product_attention 2.13": F.scaled_dot_product_attention(x3, x3, x3, empty_first),
    "the reference": A.scaled_dot_product_attention(x3, x3, x3, empty_first),
}

# %% slideshow={"slide_type": "fragment"}
mean = x3[0, 0].mean(0)
for name, answer in answers.items():
    first = answer.detach().reshape(-1, 3, 4)[0, 0]
    kind = "NaN" if first.isnan().any() else "zeros" if not first.any() else "something else"
    if torch.allclose(first, mean):
        kind = "the mean of all values, hidden ones too"
    print(f"{name:40s} {kind}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# NaN spreads: one such row, and after the next layer every query is NaN, also those that must not
# see it, for $0 \cdot \text{NaN}$ is NaN. The mean of hidden values is silent and wrong. Zeros say
# "nothing was read". They must hold in backward too: replacing NaN afterwards leaves NaN in the
# gradient. The reference lets an empty row see everything for a moment and zeroes it after the
# softmax.
#
# <!-- notes: The first two give NaN, the third the mean of what must not be seen. Take the NaN
# further: 0 times NaN is NaN, so a weight of zero does not protect the next layer. The repair by
# nan_to_num after the softmax is what somebody will propose; the gradient still holds NaN. Exercise
# masked_softmax is this slide. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercises: `decoder_mask` and `masked_softmax`
# *build, 6 minutes, difficulty 1* and *build, 8 minutes, difficulty 2.* First the mask of a
# decoder from lengths and a cache, in a dtype of the caller's choice; then a softmax that respects
# a boolean mask, empty rows and float16 included.

# %% slideshow={"slide_type": "skip"}
check("decoder_mask")

# %% slideshow={"slide_type": "skip"}
check("masked_softmax")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Dropout on probabilities
#
# Training may drop some of what a query reads: each entry of $P$ becomes zero with probability
# $r$, and the survivors are divided by $1 - r$, so that the *expected* output stays the same
# (Srivastava et al. 2014, JMLR 15; BERT's configuration calls it `attention_probs_dropout_prob`).
# A row then sums to one on average only.
#
# Dropout is blind: it draws a random mask and looks at no value. "Dropout zeroes negative values"
# is a description of ReLU.
#
# <!-- notes: Three minutes. The claim that dropout zeroes negative values circulates in study
# notes; ask for a test that would refute it before you show this one. 0.299 of both signs, against
# 0 and 1 for ReLU, settles it. -->

# %% slideshow={"slide_type": "fragment"}
real_p = A.attention_weights(q, k, A.causal_mask(len(words)))
rate = 0.3
values = torch.randn(200_000, generator=generator)
dropped = A.dropout(values, rate, torch.Generator().manual_seed(1))
for name, sign in (("positive", values > 0), ("negative", values < 0)):
    print(f"{name} values zeroed: {(dropped[sign] == 0).float().mean():.3f}   by ReLU: "
          f"{(values.relu()[sign] == 0).float().mean():.3f}")  # fmt: skip
print(f"mean of |x| before {values.abs().mean():.3f} and after {dropped.abs().mean():.3f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Does it matter *where* the mask falls? Zeroing **scores** is another thing: a score of zero still
# gets $e^0$ of the sum. On the trained head of section 2, averaged over many masks:
#
# <!-- notes: Ask for the mean before the output: a share of 0.826 stays on probabilities, and falls
# to 0.616 on scores. Reason on the board: a score of zero is not no score, it is weight one before
# the division. The same sentence comes back in chapter 06 for empty cache rows. -->

# %% slideshow={"slide_type": "fragment"}
draws = 4000
seed = torch.Generator().manual_seed(2)
row = real_p[0, head, query].expand(draws, -1)
row_scores = scores.expand(draws, -1)
on_probabilities = A.dropout(row, rate, seed)
on_scores = A.dropout(row_scores, rate, seed).softmax(-1)
print(f"share of the first ' John': {row[0, earlier]:.3f}")
print(f"dropout on probabilities: mean {on_probabilities[:, earlier].mean():.3f}, "
      f"zero in {(on_probabilities[:, earlier] == 0).float().mean():.3f} of draws")  # fmt: skip
print(f"dropout on scores:        mean {on_scores[:, earlier].mean():.3f}, "
      f"zero in {(on_scores[:, earlier] == 0).float().mean():.3f} of draws")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# On probabilities the mean is kept and a dropped key is really gone. On scores neither holds: no
# key is ever gone, and the mean is wrong. Now the last check of `scaled_dot_product_attention` can
# pass. (Models of today mostly train without it: Llama has no dropout at all.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Many heads, one layer
#
# A softmax has one peak to give. A layer that must look at two places needs two of them: project
# $x$ to $H$ small queries, keys and values, attend in each head, join the results, and mix them
# with $W_O$:
#
# $$q, k, v = x W_Q,\; x W_K,\; x W_V \qquad y = \mathrm{merge}(\mathrm{attend}(q, k, v))\, W_O$$
#
# Splitting and merging move no number if done right. Columns are cut into heads, then heads go
# before positions: `view(B, T, H, d).transpose(1, 2)`. A view straight to `(B, H, T, d)` has the
# same shape and is wrong: it cuts *positions*. Number the entries of $x$ by token to see it.
#
# <!-- notes: Six minutes. Have somebody write both expressions on the board and predict head 0 of
# each for 4 tokens, 2 heads of width 3. The wrong view gives positions 0 0 1 1: head 0 would see
# only half of the text, head 1 the rest. Both have the same shape, so no error comes. -->

# %% slideshow={"slide_type": "fragment"}
T, H, d = 4, 2, 3
by_token = torch.arange(T)[None, :, None].expand(1, T, H * d)
right = A.split_heads(by_token.contiguous(), H)[0]
wrong = by_token.contiguous().view(1, H, T, d)[0]
figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axis, table, title in (
    (axes[0], by_token[0], "x: token of each entry"),
    (axes[1], right[0], "head 0 by view + transpose"),
    (axes[2], wrong[0], "head 0 by view alone"),
):
    axis.imshow(table, cmap="viridis", vmin=0, vmax=T - 1, aspect="auto")
    for t in range(T):
        for c in range(table.shape[1]):
            color = "black" if table[t, c] > 1 else "white"
            axis.text(c, t, int(table[t, c]), ha="center", va="center", color=color)
    axis.set_title(title)
    axis.set_xticks(range(table.shape[1]))
    axis.set_yticks(range(T))
    axis.grid(False)
    axis.set_xlabel("column")
axes[0].set_ylabel("row (position)")
plt.show()
print("tokens at positions 0 ... 3 of head 0:", right[0][:, 0].tolist(), " by view alone:",
      wrong[0][:, 0].tolist())  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# **What $W_O$ is for.** Joined heads times $W_O$ is a *sum* over heads, each through its own block
# of rows of $W_O$. Without $W_O$, head 0 could only ever write to the first 64 columns of the
# stream, head 1 to the next 64. How far does a trained layer depart from that?
#
# <!-- notes: Ask what is lost if one leaves it out, since the stream has the right width without
# it. Usual answer: parameters. Better: heads could not write where they want. Measured, 0.12 of
# head 0's output lands in its own 64 columns, where an even spread gives 0.11: the trained layer
# uses all of them. -->

# %% slideshow={"slide_type": "fragment"}
layer = our_layer(8)
x = inputs[8]
attended = A.scaled_dot_product_attention(q, k, v, A.causal_mask(len(words)))
blocks = layer.o_proj.weight.unflatten(1, (config.num_attention_heads, config.head_dim))
by_head = torch.einsum("bhtd,ohd->bhto", attended, blocks)
whole = layer.o_proj(A.merge_heads(attended))
own = by_head[0, 0, :, : config.head_dim].square().sum() / by_head[0, 0].square().sum()
print("sum over heads equals merge and W_O:", torch.allclose(by_head.sum(1), whole, atol=1e-5))
print(f"share of head 0's output that lands in the first 64 of 576 columns: {own:.2f} "
      f"(evenly spread: {64 / 576:.2f})")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Fused projections.** $W_Q$, $W_K$ and $W_V$ read the same $x$: stacked, they are one product.
# `FusedAttention` keeps them so, in the order of `nn.MultiheadAttention.in_proj_weight`; section
# 13 loads one into the other. The layer takes what varies as arguments, and knows nothing about
# it:
#
# ```python
# layer(x, mask, rotate=rope, cache=cache, attend=kernel)
# ```
#
# `rotate` maps $q$ and $k$ to their positions (chapter 03), `cache.update(k, v, layer)` returns
# all keys and values so far (chapter 06; `transformers.DynamicCache` fits), `attend(q, k, v,
# mask)` may be any kernel (chapter 07).
#
# <!-- notes: One minute, as a map of the course: rotate is chapter 03, cache chapter 06, attend
# chapter 07. The layer stays as it is in all of them. MultiHeadAttention is for the laboratory,
# twelve minutes. Forty minutes should have passed by here. -->

# %% slideshow={"slide_type": "fragment"}
rotate = rotation(0, len(words))
mask = A.causal_mask(len(words))
y = layer(x, mask, rotate=rotate)
with_kernel = layer(
    x, mask, rotate=rotate,
    attend=lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
)  # fmt: skip
print("reference and torch's kernel in the same layer:", torch.allclose(y, with_kernel, atol=1e-5))

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `MultiHeadAttention`
# *build, 12 minutes, difficulty 2.* The class, with four projections, `num_heads` heads and an
# optional causal mask. The grader loads its own weights and compares with torch.

# %% slideshow={"slide_type": "skip"}
check("MultiHeadAttention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Fewer key and value heads
#
# When a model writes token by token, all earlier keys and values are read again for every token.
# Reading them, not multiplying, is what takes the time (section 12). So let several query heads
# share one key/value head: all of them (**MQA**, 1911.02150), or groups of $G = H/K$ (**GQA**,
# 2305.13245). $K = H$ is the plain multi-head form.
#
# <!-- notes: Six minutes for the section. Question for the room: with 9 query heads and 3 key/value
# heads, which key head does query head 4 read? Both rules agree there, on 1; ask for head 1 next, 0
# or 1. Write both patterns down before the next cell. -->

# %% slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
for axis, (name, kv_heads) in zip(
    axes, {"MHA": 9, "GQA (SmolLM2)": 3, "MQA": 1}.items(), strict=True
):
    group = 9 // kv_heads
    for h in range(9):
        position = (h // group) * group + (group - 1) / 2
        axis.plot([h, position], [1, 0], color=f"C{h // group % 2}", lw=1.5)
        axis.plot(h, 1, "o", color=f"C{h // group % 2}", ms=11)
        axis.plot(position, 0, "s", color=f"C{h // group % 2}", ms=11)
    axis.set_title(f"{name}: {kv_heads} key/value head{'s' * (kv_heads > 1)}", fontsize=12)
    axis.set_yticks([0, 1], ["key/value", "query"])
    axis.set_xticks(range(9))
    axis.set_xlabel("query head")
    axis.set_ylim(-0.35, 1.35)
    axis.grid(False)
plt.show()
print("query head -> key/value head (GQA):", {h: h // 3 for h in range(9)})

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Neighbours share.** Query heads 0, 1, 2 read key/value head 0: the pattern is 0 0 0 1 1 1 2 2
# 2, `repeat_interleave`. `repeat` gives 0 1 2 0 1 2 0 1 2, the same shape, and runs. Load a
# trained checkpoint into code with that slip and see what the model still knows:
#
# <!-- notes: Have them guess the loss with the slip. Many say a little worse. It is 12.9, above the
# 10.8 of an even guess: the model is sure and wrong. It loads without an error, so the page of
# known text after each conversion is the only alarm. -->


# %% slideshow={"slide_type": "fragment"}
def repeat_in_turn(hidden_states, n_rep):
    return hidden_states.repeat(1, n_rep, 1, 1)


original, modeling_llama.repeat_kv = modeling_llama.repeat_kv, repeat_in_turn
with_repeat = next_token_loss(causal)
modeling_llama.repeat_kv = original
print(f"loss with repeat_interleave {full_sight:.1f}, with repeat {with_repeat:.1f}; "
      f"evenly guessing {math.log(config.vocab_size):.1f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# **Without a copy.** `repeat_interleave` writes every key $G$ times, the very bytes that sharing
# was meant to save. Turn it round: bring the *queries* of a group together and multiply them with
# the one key head they share. In einsum, with `k` for the key/value head and `g` for the place in
# the group:
#
# $$Z_{bkgts} = \textstyle\sum_d q_{bkgtd}\, k_{bksd}$$
#
# <!-- notes: On the board: 9 query rows against 3 key matrices, as 3 products of a 3-row block
# each. Ask which bytes the repeated form writes and how many: keys and values, 9.4 MB each, where
# 3.1 MB each are there. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# One token against a cache of 4,096, with an eye on what is allocated:
#
# <!-- notes: Read the two columns with the room: the largest new buffer of the grouped form is the
# scores, 147,456 bytes = 9 heads times 4,096 keys times 4 bytes. The exercise watches allocations,
# so a copy that is equal in values fails. -->

# %% slideshow={"slide_type": "fragment"}
q1 = torch.randn(1, 9, 1, 64, generator=generator)
cache_k, cache_v = (torch.randn(1, 3, 4096, 64, generator=generator) for _ in range(2))
results = []
for form in (A.scaled_dot_product_attention, A.grouped_query_attention):
    with largest_new_tensor() as spy:
        results.append(form(q1, cache_k, cache_v))
    print(f"{form.__name__:29s} largest new buffer {spy.bytes:>9,} bytes, all together "
          f"{spy.total_bytes:>9,}")  # fmt: skip
print(f"the keys themselves           {cache_k.nbytes:>29,} bytes")
print("equal:", torch.allclose(*results, atol=1e-6))

# %% [markdown] slideshow={"slide_type": "fragment"}
# The copy costs time as well; `benchmarks/attention.py` measures about a third of the time for
# this step on a CPU. (For a whole prompt there is little to gain: there the scores dominate.)

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `grouped_query_attention`
# *build, 10 minutes, difficulty 2.* The grader watches every allocation.

# %% slideshow={"slide_type": "skip"}
check("grouped_query_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Queries from elsewhere: cross-attention and caches
#
# Nothing requires queries and keys to come from the same place, or to be equal in number.
#
# *Cross-attention*: queries from a text being written, keys and values from another sequence, such
# as the sentence to translate. No causal mask, since the other sequence is all there.
#
# <!-- notes: Five minutes for the section. Ask for the shapes of the output and of P before the
# run: three queries, seven keys. Why no causal mask? The source is complete before the first word
# is written. Padding still needs hiding, and the second line shows that it is. -->

# %% slideshow={"slide_type": "fragment"}
cross = A.Attention(32, num_heads=4)
text, source = (
    torch.randn(2, 3, 32, generator=generator),
    torch.randn(2, 7, 32, generator=generator),
)
is_real = A.padding_mask(torch.tensor([7, 5]), 7)
out = cross(text, is_real, context=source)
alone = cross(text[1:], context=source[1:, :5])
print("three queries, seven keys:", tuple(out.shape))
print("padding of the source makes no difference:", torch.allclose(out[1:], alone, atol=1e-6))

# %% [markdown] slideshow={"slide_type": "slide"}
# *A cache*: the keys are those of all tokens so far, the queries those of the new ones. Then $S >
# T$, and "causal" needs a decision: where do the queries stand? With a cache the last query sees
# everything (**bottom-right**). `F.scaled_dot_product_attention(is_causal=True)` puts query $t$ at
# position $t$ (**top-left**).
#
# <!-- notes: The most expensive bug of this chapter: training is right, generation is nonsense. Ask
# where three new queries stand among eight keys, and let somebody shade both masks. Under top-left
# the first new token sees the oldest one alone, as the second printed line says. -->

# %% slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
draw_mask(axes[0], A.causal_mask(3, 8), "bottom-right: causal_mask(3, 8)")
draw_mask(axes[1], A.causal_mask(3, 8, offset=0), "top-left: causal_mask(3, 8, offset=0)")
axes[0].set_ylabel("new query")
plt.show()
q8, k8 = torch.randn(1, 1, 3, 4, generator=generator), torch.randn(1, 1, 8, 4, generator=generator)
torchs = F.scaled_dot_product_attention(q8, k8, k8, is_causal=True)
print("torch's is_causal is top-left:", torch.allclose(
    torchs, A.scaled_dot_product_attention(q8, k8, k8, A.causal_mask(3, 8, offset=0)), atol=1e-6
))  # fmt: skip
print(
    "its first query returns just the oldest value:", torch.allclose(torchs[0, 0, 0], k8[0, 0, 0])
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# With the right alignment a sequence may go through the layer in pieces. Here the trained layer
# reads the sentence in three, through transformers' own cache:
#
# <!-- notes: Ask before the run what must be passed for the second piece besides its ten or fewer
# tokens: its positions and a mask of new queries by all keys. The cache holds 3 heads, not 9.
# attend_with_cache in the laboratory has two faults of this slide; chapter 06 takes the cache up.
# -->

# %% slideshow={"slide_type": "fragment"}
cache, pieces = DynamicCache(), []
for start, stop in ((0, 10), (10, 17), (17, len(words))):
    piece = layer(
        x[:, start:stop],
        A.causal_mask(stop - start, stop),
        rotate=rotation(start, stop),
        cache=cache,
        attend=A.grouped_query_attention,
    )
    pieces.append(piece)
print("pieces equal the whole:", torch.allclose(torch.cat(pieces, 1), y, atol=1e-5))
print("cached keys:", tuple(cache.layers[8].keys.shape), "- key/value heads, not query heads")

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `attend_with_cache`
# *repair, 8 minutes, difficulty 2.* A decoding step with two faults that real code has had. It
# passes a test without a cache and without shared heads, which is how such code ships.

# %% slideshow={"slide_type": "skip"}
check("attend_with_cache")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. The backward pass
#
# Autograd does this for you; deriving it once shows what must be kept, and it is what
# FlashAttention rearranges in chapter 07. Go back through the three steps, with $s = 1/\sqrt d$:
#
# $$dv = P^\top dO \qquad dP = dO\, v^\top$$
# $$dZ = P \circ \big(dP - \mathrm{rowsum}(P \circ dP)\big)$$
# $$dq = s\; dZ\, k \qquad dk = s\; dZ^\top q$$
#
# Only the middle formula is not a matrix product. A softmax row answers a push on one score by
# lowering all others: $\partial P_i / \partial Z_j = P_i(\delta_{ij} - P_j)$. Summed against $dP$,
# each row loses its own mean, weighted by its own probabilities. Hence adding a constant to a row
# of $dP$ changes nothing, as adding one to the scores did not.
#
# <!-- notes: Seven minutes. Only the middle line needs the board: write the row's derivative for
# two entries and let them see the mean appear. Close with the question which of these matrices must
# be kept: P is, dZ is not. Chapter 07 keeps none of them. -->

# %% slideshow={"slide_type": "fragment"}
q9, k9, v9 = (t.double().requires_grad_() for t in (q, k, v))
grad_out = torch.randn(q.shape, generator=generator, dtype=torch.float64)
mask = A.causal_mask(len(words))
kernel = F.scaled_dot_product_attention(q9, k9, v9, attn_mask=mask, enable_gqa=True)
by_autograd = torch.autograd.grad(kernel, (q9, k9, v9), grad_out)
by_hand = A.attention_backward(grad_out, q9.detach(), k9.detach(), v9.detach(), mask)
for name, a, e in zip("qkv", by_hand, by_autograd, strict=True):
    print(f"grad_{name} {tuple(a.shape)} as autograd's: {torch.allclose(a, e, 0, 1e-12)}")
small = [t[:, :, :3, :4].detach().requires_grad_() for t in (q9, k9, v9)]
print("gradcheck:", torch.autograd.gradcheck(A.AttentionFunction.apply, (*small, mask[:3, :3])))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Two remarks for later. A key/value head that serves three query heads *adds up* three gradients,
# which is why `grad_k` has 3 heads and not 9. And $\mathrm{rowsum}(P \circ dP)$ equals
# $\mathrm{rowsum}(dO \circ O)$, a number per query that needs neither $P$ nor $dP$:
#
# <!-- notes: The identity is three lines on the board: insert O = P v and dP = dO v^T and exchange
# the sums. Say why it matters: rowsum(dO o O) is one number a query and needs no row of P. Chapter
# 07 calls it D. attention_backward is for home. -->

# %% slideshow={"slide_type": "fragment"}
p9 = A.attention_weights(q9, k9, mask).detach()
left = (p9 * (grad_out @ A.repeat_kv(v9, 3).mT)).sum(-1)
right = (grad_out * kernel).sum(-1)
print("rowsum(P * dP) == rowsum(dO * O):", torch.allclose(left, right))

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `attention_backward`
# *derive, 15 minutes, difficulty 3.* With a learned bias on the scores, as T5's relative positions
# are; it is shared by all sequences of a batch. No autograd.

# %% slideshow={"slide_type": "skip"}
check("attention_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Order is lost
#
# Section 2 sorted the keys and nothing changed. So for one layer a sentence is a *bag* of words,
# unless positions are put in. Take the trained first layer and swap words before the last one:
#
# <!-- notes: Four minutes for the section. Refer to the line with the shuffled keys in section 2.
# Without positions the change is 0.000, exactly; with RoPE 0.063. Ask why the last token is left in
# its place: it is the query, and its own content would change the answer. -->

# %% slideshow={"slide_type": "fragment"}
first, x0 = our_layer(0), inputs[0]
permutation = torch.cat(
    [torch.randperm(len(words) - 1, generator=generator), torch.tensor([len(words) - 1])]
)
mask = A.causal_mask(len(words))
for name, turn in (("without positions", None), ("with RoPE", rotation(0, len(words)))):
    straight = first(x0, mask, rotate=turn)[0, -1]
    mixed = first(x0[:, permutation], mask, rotate=turn)[0, -1]
    print(f"{name:18s} change of the last token's output: "
          f"{(straight - mixed).norm() / straight.norm():.3f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# A bag, exactly. Does it follow that a deep *causal* model without positions cannot know order?
# Give every token of the passage the same position (RoPE then rotates all alike and drops out of
# every score) and shuffle the words before the last one again. **Guess first.**
#
# <!-- notes: Nearly everybody votes for no order. Ask a voter to explain it with the mask drawn on
# the board. The answer sits there: the second row averages over two tokens, the tenth over ten. Do
# not give it before the numbers. -->

# %% slideshow={"slide_type": "skip"}
same_position = torch.zeros(1, len(words), dtype=torch.long)
everyone = torch.ones(len(words), len(words), dtype=torch.bool)


@torch.no_grad()
def last_logits(ids, mask):
    additive = A.additive_mask(mask, torch.float32)[None, None]
    return model(ids, attention_mask=additive, position_ids=same_position).logits[0, -1]


# %% slideshow={"slide_type": "fragment"}
for name, mask in (("all see all", everyone), ("causal", A.causal_mask(len(words)))):
    a, b = last_logits(sentence, mask), last_logits(sentence[:, permutation], mask)
    print(
        f"30 layers, no positions, {name:11s}: change of the logits {(a - b).norm() / a.norm():.3f}"
    )
no_positions = next_token_loss(causal, torch.zeros(1, NUM_TOKENS, dtype=torch.long))
print(f"loss on the passage: {full_sight:.1f} with positions, {no_positions:.1f} without, "
      f"{sight['last w tokens'][0]:.1f} without other tokens")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The causal mask is itself a clock: position $t$ averages over $t + 1$ tokens, and the second
# layer can tell. That is why decoders trained *without* position encodings work at all (Haviv et
# al., arXiv 2203.16634; Kazemnejad et al., 2305.19466). An encoder has no such clock.
#
# <!-- notes: Read the three losses: 3.6 with positions, 5.6 without, 9.3 without other tokens. This
# model was trained with positions and is robbed of them; the papers cited train without. Ask why
# BERT, an encoder, could not do it. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. What trained heads look at
#
# 270 heads, none of which was told what to do. Four of them on the sentence of section 2, each row
# a query, each row a distribution over the keys it sees:
#
# <!-- notes: Seven minutes for the section. Before the maps ask which patterns a head might learn,
# and write the list on the board; the previous token is always named, the sink never. Point at the
# second John in the right map: 0.83 on the first one. -->

# %% slideshow={"slide_type": "fragment"}
chosen = {
    (16, 0): "the previous token",
    (8, 0): "the same name, earlier",
    (18, 8): "the first token (a sink)",
    (11, 6): "itself",
}
maps = {}


def draw_heads(pair):
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    for axis, (index, head) in zip(axes, pair, strict=True):
        head_q, head_k, _ = heads_of(index, inputs)
        maps[index, head] = A.attention_weights(head_q, head_k, A.causal_mask(len(words)))[0, head]
        image = axis.imshow(maps[index, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"layer {index}, head {head}: {chosen[index, head]}")
        axis.set_xticks(range(len(words)), words, rotation=70, ha="right", fontsize=10)
        axis.set_yticks(range(len(words)), words, fontsize=10)
        axis.grid(False)
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    figure.colorbar(image, ax=axes, label="probability", shrink=0.7)
    plt.show()


draw_heads([(16, 0), (8, 0)])

# %% slideshow={"slide_type": "fragment"}
draw_heads([(18, 8), (11, 6)])
previous = maps[16, 0].diagonal(-1)[1:].mean()
print(f"weight on the previous token {previous:.2f}, on the first {maps[18, 8][1:, 0].mean():.2f}, "
      f"on itself {maps[11, 6].diagonal()[1:].mean():.2f}, "
      f"of the second 'John' on the first {maps[8, 0][query, earlier]:.2f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# The same head need not do the same thing twice. Layer 18, head 6 is an *induction head*: it finds
# an earlier copy of the current token and reads what came *after* it. Give it random tokens, twice
# in a row, and then the sentence of section 2, where no two words repeat in sequence:
#
# <!-- notes: Ask what the head should do on a sentence without repetition: it has to put its share
# of one somewhere. 0.91 on the token after the earlier copy, 0.96 on the first token at rest. A map
# of one sentence would have given it the wrong name. -->

# %% slideshow={"slide_type": "fragment"}
repeated = torch.randint(1000, 20000, (1, 30), generator=torch.Generator().manual_seed(0))
twice = torch.cat([repeated, repeated], 1)
rq, rk, _ = heads_of(18, layer_inputs(twice))
induction = A.attention_weights(rq, rk, A.causal_mask(60))[0, 6]
sq, sk, _ = heads_of(18, inputs)
at_rest = A.attention_weights(sq, sk, A.causal_mask(len(words)))[0, 6]
print(
    f"repeated tokens: {induction.diagonal(-29)[1:].mean():.2f} on the token after the earlier copy"
)
print(f"the sentence:    {at_rest[1:, 0].mean():.2f} on the first token")

# %% [markdown] slideshow={"slide_type": "fragment"}
# That is what the first token is for. A softmax must hand out a sum of one even where a head finds
# nothing; the first token, visible to everybody, has become the place to put it. A place of rest
# should have nothing to say. Has it? Compare the size of its value with that of the other tokens:

# %% slideshow={"slide_type": "fragment"}
shares, norms = [], []
for index in range(config.num_hidden_layers):
    hq, hk, hv = heads_of(index, passage_inputs)
    shares.append(A.attention_weights(hq, hk, causal)[0, :, NUM_TOKENS // 2 :, 0].mean().item())
    sizes = hv[0].norm(dim=-1)
    norms.append((sizes[:, 0] / sizes[:, 1:].mean(1)).mean().item())
figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
axes[0].bar(range(config.num_hidden_layers), shares)
axes[0].set_ylabel("share of attention\non the first token")
axes[1].plot(norms, "o-", color="C1")
axes[1].axhline(1, color="grey", lw=1, ls="--")
axes[1].text(30, 1.1, "as large as the others", color="grey", ha="right")
axes[1].set_yscale("log")
axes[1].set_yticks([0.1, 0.3, 1], ["0.1", "0.3", "1"])
axes[1].set_ylabel("size of its value,\nrelative to the others")
axes[1].set_xlabel("layer")
plt.show()
for name, some in (("layers 12 to 29", range(12, 30)), ("layers 10 and 11", (10, 11))):
    share, size = (sum(x[i] for i in some) / len(some) for x in (shares, norms))
    print(f"{name:17s} share of the first token {share:.2f}, relative size of its value {size:.1f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# It has: where the first token takes half of all attention, its value is a fifth of the others'.
# Two layers break the pattern and confirm it, 10 and 11: there its value is larger than the
# others', and hardly anybody reads it.
#
# Now the second curve of section 1 is no riddle. A window that slides past the first token takes
# away the heads' resting place, and their shares are forced onto words that mean something.
# Keeping that one token (StreamingLLM, arXiv 2309.17453) repairs most of it.
#
# <!-- notes: Return to the line kept from section 1 and let a student explain the second curve.
# Then ask: would a softmax with an extra +1 in the denominator need a sink? Layers 10 and 11 are
# the control: value 1.4 times the others', share 0.00. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. What it costs
#
# **Bytes.** Each token leaves behind a key and a value in every layer: $2\,L\,K\,d$ elements. How
# many query heads there are does not matter.
#
# <!-- notes: Six minutes for the section. Let them compute Llama-3-8B by hand: 2 x 32 x 8 x 128
# numbers, 2 bytes each, are 128 KiB a token. Then ask which model of the figure's list has the
# largest cache: not the largest model, 405B with 504 KiB, but GPT-3 with 4,608. -->

# %% slideshow={"slide_type": "fragment"}
# layers, query heads, key/value heads, head width; from the models' configurations
MODELS = {
    "GPT-3": (96, 96, 96, 128),
    "OPT-13B": (40, 40, 40, 128),
    "Llama-2-7B": (32, 32, 32, 128),
    "Llama-2-70B": (80, 64, 8, 128),
    "Llama-3-8B": (32, 32, 8, 128),
    "Llama-3-405B": (126, 128, 8, 128),
    "Falcon-7B": (32, 71, 1, 64),
    "SmolLM2-135M": (30, 9, 3, 64),
}
as_built, as_mha = {}, {}
for name, (layers, heads, kv_heads, width) in MODELS.items():
    as_built[name] = A.kv_cache_bytes(num_layers=layers, num_kv_heads=kv_heads, head_dim=width)
    as_mha[name] = A.kv_cache_bytes(num_layers=layers, num_kv_heads=heads, head_dim=width)
figure, axis = plt.subplots(figsize=(9, 4.2))
for i, name in enumerate(MODELS):
    here, unshared = as_built[name] / 1024, as_mha[name] / 1024
    axis.plot([here, unshared], [i, i], color="lightgrey", lw=5)
    axis.plot(unshared, i, "o", color="grey", ms=9)
    axis.plot(here, i, "o", color="C0", ms=11)
    ratio = as_mha[name] // as_built[name]
    kind = "MHA" if ratio == 1 else f"K = {MODELS[name][2]}: {ratio} times less"
    axis.text(unshared * 1.25, i, kind, va="center")
axis.set_yticks(range(len(MODELS)), MODELS)
axis.invert_yaxis()
axis.set_xscale("log")
axis.set_xlim(5, 200_000)
axis.set_xlabel("KiB of cache for a token in 16 bits (grey: if no heads were shared)")
plt.show()
print("KiB a token:", ", ".join(f"{name} {x / 1024:g}" for name, x in as_built.items()))

# %% [markdown] slideshow={"slide_type": "slide"}
# **FLOPs.** The projections cost $2$ FLOPs a weight and token; the two products with the pairs of
# tokens $4\,H\,d$ a pair. (All pairs are counted; a causal kernel that skips what is hidden does
# half of them, and the crossing moves to twice the length.) Sharing key/value heads saves bytes and
# projections. It does *not* save score FLOPs: every query head still meets every key.
#
# <!-- notes: Ask what sharing heads does to the score FLOPs before you show the table: the two rows
# of scores are equal. At 5,120 tokens scores overtake projections. Claims that attention's square
# dominates everything are wrong for short texts. -->

# %% slideshow={"slide_type": "skip"}
lengths = (1024, 8192, 131072)
shape = {"num_heads": 32, "head_dim": 128}
counts = {}
for kv_heads in (8, 32):
    name = f"{kv_heads:2d} key/value heads"
    counts[f"{name}, projections"] = [
        A.projection_flops(dim=4096, num_kv_heads=kv_heads, num_tokens=n, **shape) for n in lengths
    ]
    counts[f"{name}, scores"] = [
        A.attention_flops(num_queries=n, num_keys=n, **shape) for n in lengths
    ]
crossing = 2 * (2 * 32 + 2 * 8) * 128 * 4096 // (4 * 32 * 128)

# %% slideshow={"slide_type": "fragment"}
print(f"{'Llama-3-8B, one layer, GFLOPs':34s}", *(f"{n:9,}" for n in lengths), "tokens")
for part, flops in counts.items():
    print(f"{part:34s}", *(f"{c / 1e9:9,.0f}" for c in flops))
print(f"scores overtake projections at {crossing:,} tokens")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Bytes a FLOP.** To make one token, a layer reads its whole cache once: $2 K d$ elements a key
# for $4 H d$ FLOPs. In 16 bits that is $H/K$ FLOPs a byte, whatever the length or the batch.
# Section 14 puts it beside what accelerators want.
#
# <!-- notes: Derive it on the board: 4 H d FLOPs a key over 2 K d elements of 2 bytes is H / K.
# Length and batch cancel. So no batch helps attention's own reading; only fewer key/value heads or
# fewer bits do. End of the lecture; chapter 06 continues here. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Exercise: `attention_cost`
# *estimate, 8 minutes, difficulty 1.* From a `config.json` to bytes and FLOPs, checked on
# published models.

# %% slideshow={"slide_type": "skip"}
check("attention_cost")

# %% [markdown] slideshow={"slide_type": "skip"}
# ### Challenge: `packed_attention`
# *challenge, 20 minutes, difficulty 3.* Sliding window *and* documents, chunk by chunk, without
# ever holding more scores than one chunk can see. It is half the way to chapter 07.

# %% slideshow={"slide_type": "skip"}
check("packed_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Proof against production
#
# Everything above is worth as much as its agreement with code that runs in production. Executed
# here; `tests/reference/attention/` does it for every dtype, shape and mask.
#
# <!-- notes: One minute, or for home. The point is the last two rows: bit for bit against the layer
# of a model in use, with and without a cache. Within 1e-12 elsewhere, since a fused kernel sums in
# another order. -->


# %% slideshow={"slide_type": "fragment"}
def agreement(a, b):
    if torch.equal(a, b):
        return "bit for bit"
    return f"within {'1e-12' if (a - b).abs().max() < 1e-12 else '1e-6'}"


proof = []
q13 = torch.randn(2, 6, 5, 16, generator=generator, dtype=torch.float64)
k13, v13 = (torch.randn(2, 3, 9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
causal13 = A.causal_mask(5, 9)
for form in (A.scaled_dot_product_attention, A.grouped_query_attention):
    theirs = F.scaled_dot_product_attention(q13, k13, v13, attn_mask=causal13, enable_gqa=True)
    proof.append(
        (form.__name__, "F.scaled_dot_product_attention", form(q13, k13, v13, causal13), theirs)
    )

mha = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
fused = A.FusedAttention(32, num_heads=4, bias=True).double()
fused.qkv_proj.load_state_dict({"weight": mha.in_proj_weight, "bias": mha.in_proj_bias})
fused.o_proj.load_state_dict(mha.out_proj.state_dict())
x13 = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
hidden13 = ~A.causal_mask(7)
theirs = mha(x13, x13, x13, attn_mask=hidden13, need_weights=False)[0]
proof.append(("FusedAttention", "nn.MultiheadAttention", fused(x13, ~hidden13), theirs))

block = model.model.layers[8].self_attn
cos, sin = model.model.rotary_emb(x, torch.arange(len(words))[None])
for name, passed in (
    ("no cache", {}),
    ("DynamicCache", {"past_key_values": DynamicCache(config=config)}),
):
    theirs = block(
        x, (cos, sin), A.additive_mask(A.causal_mask(len(words)), x.dtype)[None, None], **passed
    )[0]
    cache = DynamicCache(config=config) if passed else None
    ours13 = layer(x, A.causal_mask(len(words)), rotate=rotation(0, len(words)), cache=cache)
    proof.append((f"Attention, {name}", "SmolLM2's layer 8, transformers eager", ours13, theirs))
for ours_name, theirs_name, a, b in proof:
    print(f"{ours_name:29s} {theirs_name:38s} {agreement(a.detach(), b.detach())}")
    assert torch.allclose(a, b, atol=1e-6)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Published figures, recomputed
#
# **KV cache of OPT-13B** (vLLM, arXiv 2309.06180, sec. 3): "800 KB" a token, "1.6 GB" for 2,048.
#
# <!-- notes: For home or for the laboratory's last quarter. Ask which of the two published numbers
# is wrong: neither, they mix KiB and decimal GB. 819,200 bytes are 800 KiB; 2,048 of them 1.68 GB.
# State the unit, always. -->

# %% slideshow={"slide_type": "fragment"}
opt = A.kv_cache_bytes(num_layers=40, num_kv_heads=40, head_dim=128)
print(f"a token: {opt:,} bytes = {opt / 1024:.0f} KiB, {opt / 1000:.1f} KB;  2,048 tokens: "
      f"{2048 * opt / 1e9:.3f} GB = {2048 * opt / 2**30:.4f} GiB")  # fmt: skip
assert opt == 800 * 1024

# %% [markdown] slideshow={"slide_type": "fragment"}
# The paper's 800 KB are KiB. Its 1.6 GB is 800 x 2048 read as decimals; in GB it is 1.68, in GiB
# 1.56.

# %% [markdown] slideshow={"slide_type": "slide"}
# **GQA, Table 1** (arXiv 2305.13245): seconds a sample and mean quality of T5-XXL (64 heads).

# %% slideshow={"slide_type": "fragment"}
table = {"MHA-Large": (None, 0.37, 46.0), "MHA-XXL": (64, 1.51, 47.2),
         "GQA-8-XXL": (8, 0.28, 47.1), "MQA-XXL": (1, 0.24, 46.6)}  # fmt: skip
print("                seconds  quality  times faster than MHA-XXL  times fewer KV bytes")
for name, (kv_heads, seconds, quality) in table.items():
    fewer = f"{64 / kv_heads:20.0f}" if kv_heads else f"{'(another model)':>20s}"
    print(f"{name:14s} {seconds:8.2f} {quality:8.1f} {1.51 / seconds:26.1f} {fewer}")
each = (1.51 - 0.28) / (64 - 8)
print(f"if time were a + b K: b = {each:.3f} s a head, and MQA would take {0.28 - 7 * each:.2f} s; "
      "measured 0.24")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# 8 times fewer bytes were 5.4 times faster; another 8 times fewer only 1.2 times more. With 8
# heads the cache is apparently no longer what the step waits for, so that the rest of the quality
# is cheap to keep. A straight line through the first two points predicts too much speed: the model
# of "time = bytes" is wrong where bytes are few.
#
# <!-- notes: Have the room fit the line through 64 and 8 heads on the board, and predict 1 head:
# 0.13 s. Measured 0.24. Ask what else takes time then. A good place to say that a model of cost is
# a claim one can test. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# **MQA, sec. 2.4 and 3.1** (arXiv 1911.02150): memory accesses over operations when $n$ tokens are
# written one by one in a batch of $b$ are $\Theta(n/d + 1/b)$ for multi-head and $\Theta(1/d +
# n/(dh) + 1/b)$ for multi-query attention ($d$ is the model width there, $h$ heads). We count
# elements read and multiplications done in the reference's layer:

# %% slideshow={"slide_type": "fragment"}
print(
    "   b     n     d   h    MHA count / paper's terms      MQA count / paper's terms     MHA : MQA"
)
for b, n, dim, h in (
    (1, 1024, 1024, 8),
    (128, 128, 1024, 8),
    (128, 1024, 1024, 8),
    (1024, 4096, 4096, 32),
):
    line, counted = [], []
    for kv_heads in (h, 1):
        width = dim // h
        reads = sum(
            A.decode_reads(dim=dim, num_heads=h, num_kv_heads=kv_heads, head_dim=width,
                           batch_size=b, num_keys=s)
            for s in range(1, n + 1)
        )  # fmt: skip
        flops = b * sum(
            A.attention_flops(num_heads=h, head_dim=width, num_queries=1, num_keys=s)
            for s in range(1, n + 1)
        ) + A.projection_flops(
            dim=dim, num_heads=h, num_kv_heads=kv_heads, head_dim=width, num_tokens=b * n
        )
        ratio = reads / (flops / 2)
        terms = n / dim + 1 / b if kv_heads == h else 1 / dim + n / (dim * h) + 1 / b
        counted.append(ratio)
        line.append(f"{ratio:.5f} / {terms:.5f} = {ratio / terms:.2f}")
    fewer = counted[0] / counted[1]
    print(f"{b:4d} {n:5d} {dim:5d} {h:3d}   {line[0]:>26s}   {line[1]:>26s}   {fewer:8.1f}")
print(f"published decoder step: 46 -> 3.8 us a token, {46 / 3.8:.1f} times (Table 3)")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Counts stay within a constant of the paper's terms, as $\Theta$ promises: 0.2 to 0.65 of them.
# With a batch of 1 sharing hardly helps, since the *weights* are read for one token alone ($1/b$).
# Sharing pays where many long sequences run at once.
#
# <!-- notes: Read the columns from the right: sharing gains 1.4 times for a batch of one, 18.4
# times for 1,024 sequences of 4,096 tokens. Ask why the first row gains so little: the term 1/b,
# weights read for one token. Skip it if the class has not met Theta. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# **Ridge points.** An accelerator needs a certain number of FLOPs for each byte it reads, or its
# arithmetic waits (peaks from the vendors' data sheets, dense 16-bit).
#
# <!-- notes: Ask for the number before: how many FLOPs must a byte be worth on an A100? 153 or 201,
# by the memory built in. Decoding gives 1 to 71. So arithmetic waits for memory, whatever the
# kernel; chapter 07 reduces bytes, not FLOPs. -->

# %% slideshow={"slide_type": "fragment"}
for name, tera_flops, tera_bytes in (
    ("A100 80GB", 312, 2.039),
    ("A100 40GB", 312, 1.555),
    ("H100 SXM", 989.5, 3.35),
):
    print(f"{name:10s} {tera_flops / tera_bytes:4.0f} FLOPs a byte")
for name in ("Llama-2-7B", "Llama-3-8B", "Llama-2-70B", "Falcon-7B"):
    _, heads, kv_heads, _ = MODELS[name]
    intensity = A.decode_intensity(num_heads=heads, num_kv_heads=kv_heads)
    print(f"decode attention of {name:12s} {intensity:3.0f} FLOPs a byte")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Even 71 heads on one key/value head keep an A100's arithmetic less than half busy. Decoding
# attention is a matter of bytes; chapters 06 and 07 start from here.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. What breaks in practice
#
# **-1e20 in float16.** The largest number of float16 is 65,504. A literal like -1e20, common in
# code written for float32, raises in one place and silently becomes -inf in another. And the
# *lowest finite number* is no way out: add a negative score to it and it overflows.
#
# <!-- notes: For home, but do this one if half precision came up. Ask for the softmax of a row in
# which all entries are minus infinity. The lowest finite number looks safe, and minus 40 more makes
# it infinite: three NaN in the output. -->

# %% slideshow={"slide_type": "fragment"}
half = torch.zeros(3, dtype=torch.float16)
try:
    half.masked_fill(torch.tensor([True, False, False]), -1e20)
except RuntimeError as error:
    print("masked_fill:", str(error).splitlines()[0])
print("tensor literal:", torch.tensor(-1e20).to(torch.float16).item())
lowest = torch.tensor(torch.finfo(torch.float16).min, dtype=torch.float16)
print("lowest + (-40) in float16:", (lowest - 40).item())
all_hidden = (half - 40) + lowest
print("a row of them:", all_hidden.softmax(-1).tolist())
scores16 = torch.tensor([[-40.0, 1.0, 2.0]], dtype=torch.float16)
rescued = A.masked_softmax(scores16, lowest.expand(1, 3))[0]
print("reference:", [round(p, 3) for p in rescued.tolist()])

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Products overflow before they are scaled.** `q @ k.mT * scale` in float16 forms $q \cdot k$
# first. Large activations pass 65,504 there, although the scaled score would fit. Scale $q$ first,
# or accumulate in float32 as kernels do:
#
# <!-- notes: Let them compute: 64 products of 40 times 40 are 102,400, beyond 65,504, though the
# scaled score 12,800 fits. The kernel is right since it accumulates in float32. Same algebra, other
# order, other result. -->

# %% slideshow={"slide_type": "fragment"}
big = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)
print(
    "product, then scale:",
    (big @ big.mT * 0.125).item(),
    " scale first:",
    ((big * 0.125) @ big.mT).item(),
)
print("kernel:", F.scaled_dot_product_attention(big, big, big)[0, 0, 0, 0].item())

# %% [markdown] slideshow={"slide_type": "slide"}
# **Padding on the wrong side.** A batch of prompts of unequal length must be padded. Generation
# reads the *last* column of the logits, and with padding on the right that is a pad token's.
#
# <!-- notes: Ask who notices: the longest prompt of the batch is right both ways, so a test with
# one prompt, or with equal lengths, passes. On the right, "The capital of France is" answers with a
# line break. Chapter 06, section 5, measures it. -->


# %% slideshow={"slide_type": "fragment"}
@torch.no_grad()
def next_words(prompts, side):
    """The word after each prompt, read from the last column of one padded batch."""
    rows = [tokenizer(p).input_ids for p in prompts]
    lengths = torch.tensor([len(r) for r in rows])
    width, pad = int(lengths.max()), tokenizer.pad_token_id
    padded = [
        r + [pad] * (width - len(r)) if side == "right" else [pad] * (width - len(r)) + r
        for r in rows
    ]
    mask = A.causal_mask(width) & A.padding_mask(lengths, width, side=side)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    start = (
        (width - lengths)[:, None]
        if side == "left"
        else torch.zeros(len(rows), 1, dtype=torch.long)
    )
    positions = (torch.arange(width) - start).clamp_min(0)
    logits = model(torch.tensor(padded), attention_mask=additive, position_ids=positions).logits
    return [tokenizer.decode(i) for i in logits[:, -1].argmax(-1)]


prompts = ["The capital of France is", "Two plus two equals four, and four plus four equals"]
alone = [next_words([p], "left")[0] for p in prompts]
print("each alone:        ", alone)
print("padded on the left: ", next_words(prompts, "left"))
print("padded on the right:", next_words(prompts, "right"))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A mask gives hidden values the weight 0, and $0\times$NaN is
# NaN: padding or a cache slot that holds garbage reaches queries that must not see it (vllm #641,
# pytorch #101967). And where a kernel takes any square mask for the causal one, a window of 4 is
# dropped without a word (transformers #28980).
#
# <!-- notes: Ask what a masked value contributes: "nothing", until it is NaN. Here memory that
# nobody has written is the fourth value. The reference computes the product, and again without the
# values of weight 0 where it is not finite. The window is the other half: both kernels run, and
# only a comparison tells. Two minutes. -->

# %% slideshow={"slide_type": "fragment"}
q, k, v = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
hidden = A.padding_mask(torch.tensor([7]), 8)
v[:, :, 7] = torch.nan
old = F.scaled_dot_product_attention(q, k, v, hidden)
new = A.scaled_dot_product_attention(q, k, v, hidden)
print(f"torch: {int(old.isnan().sum())} of {old.numel()} outputs are NaN", end="; ")
print(
    "ours equals attention without the slot:",
    torch.allclose(new, A.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7]), atol=1e-6),
)
window, v[:, :, 7] = A.sliding_window_mask(8, window=4), 0.0
exact = A.scaled_dot_product_attention(q, k, v, window)
for name, out in (
    ("any square mask is causal", F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ("the mask is read", fused_causal_attention(q, k, v, window)),
):
    print(f"window of 4, {name}: error {(out - exact).abs().max().item():.2f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# **A checklist**
#
# | symptom | cause | section |
# |---|---|---|
# | loss fine, generated text nonsense | causal mask aligned at the top left with a cache | 8 |
# | loss impossibly low | future leaks: mask missing, inverted, or after the softmax | 4 |
# | NaN in some batches | a row that sees nothing; a finite mask value in float16 | 4, 15 |
# | checkpoint loads, output is noise | `repeat` of heads; heads merged by a view | 6, 7 |
# | short prompts of a batch answer nonsense | padding on the right in generation | 15 |
# | attention maps are flat | divided by sqrt(hidden) | 3 |
# | memory grows back with GQA | key/value heads repeated in memory | 7 |
#
# <!-- notes: Do not read it out. Give a symptom, wait for the cause, uncover the row with the room.
# It serves as the key to the laboratory's discussion, and for the question which row of a mask may
# have nothing allowed. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16. Summary
#
# - Attention is an average of values by shares that a softmax of scaled products hands out.
# - $1/\sqrt d$, $d$ the head's width, makes all widths start with variance 1.
# - A mask goes before the softmax, as -inf; rows without keys are zeros; with a cache it is
#   aligned at the bottom right.
# - Heads are a matter of shapes: view and transpose; $W_O$ adds them up.
# - Key/value heads set the bytes ($2LKd$ elements a token), query heads the score FLOPs; sharing
#   needs no copy.
# - The gradient of the softmax takes from each row its own mean.
# - Order enters from outside, or, in a deep causal model, through the mask.
#
# **Further reading.** Vaswani et al. 2017 (1706.03762), sections 3.2 and the footnote of 3.2.1.
# Shazeer 2019 (1911.02150): short, and all about bytes. Ainslie et al. 2023 (2305.13245): from a
# multi-head checkpoint to groups. Olsson et al. 2022 (2209.11895): induction heads. Xiao et al.
# 2023 (2309.17453): sinks. Next: chapter 05 puts the layer into a model, 06 keeps its keys, 07
# never writes its scores down.
#
# <!-- notes: Students should be able to write attention with a mask, heads and groups from memory,
# derive dZ, and say what sets bytes and what FLOPs. In the laboratory: the first six exercises;
# attention_backward, attention_cost and packed_attention at home. Chapter 05 puts the layer into a
# model. -->
