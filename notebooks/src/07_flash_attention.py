# %% [markdown] slideshow={"slide_type": "slide"}
# # 07 FlashAttention
#
# Attention over $N$ tokens makes an $N\times N$ matrix of scores, looks at it once, and throws it
# away. At 32,768 tokens that is 2 GB a head in float16. FlashAttention never makes it: the same
# numbers, tile by tile, in memory that grows with $N$.
#
# In this chapter you go from a softmax that overflows to a softmax that needs one pass, carry the
# output along, cut it into tiles, derive the backward pass that keeps no probabilities, and count
# what really moves between the memories. At the end the same loops run as a Triton kernel.
#
# You need: chapter 04 (scores, masks, grouped queries).
#
# <!-- notes: Lecture of 75 minutes: 40 for sections 1 to 6, 35 for 7 to 11; 12 to 14 are for home.
# Do the arithmetic of the first paragraph with the room: 32,768 squared times 2 bytes. Then ask who
# thinks that FlashAttention is an approximation, and note the number of hands. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory are enough; everything takes about half
# > a minute. The slowest cell runs SmolLM2-135M on a page of text (section 2; fetched once by
# > `make model`).

# %% slideshow={"slide_type": "skip"}
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import reference.flash_attention as fa
from autograder.notebook import check
from autograder.spies import largest_new_tensor
from figures import style
from figures.stepper import Stepper
from figures.tables import table
from reference.attention import causal_mask, scaled_dot_product_attention
from reference.flash_attention import accesses
from reference.flash_attention.forward import Tiling
from reference.pretrained import capture_attention, load_smollm2, passage

torch.set_num_threads(1)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. The square that nobody wants
#
# **Question.** Double the number of tokens. How much larger is the largest tensor that attention
# makes on its way, in the plain form and in tiles?
#
# <!-- notes: Four minutes for the section. Factor four for the plain form comes at once. For the
# tiles wait: some say four, some say one, since a tile has a fixed size. It is two: the output
# itself grows with N. -->


# %% slideshow={"slide_type": "subslide"}
def largest(attend, n):
    """Bytes of the largest tensor that `attend` allocates for n tokens."""
    x = torch.randn(3, 1, 1, n, 64)
    with largest_new_tensor() as spy:
        attend(*x)
    return spy.bytes


def plain(q, k, v):
    return scaled_dot_product_attention(q, k, v, causal_mask(q.shape[2], k.shape[2]))


def tiles(q, k, v):
    return fa.flash_attention(q, k, v, is_causal=True, block_q=64, block_k=64)


lengths = [128, 256, 512, 1024, 2048]
lines = []
figure, ax = plt.subplots(figsize=(11, 3.8))
for name, attend, colour in (("plain", plain, "vermilion"), ("tiles", tiles, "blue")):
    sizes = [largest(attend, n) for n in lengths]
    ax.loglog(lengths, [b / 1e6 for b in sizes], "o-", color=style.COLOURS[colour], label=name)
    lines.append(f"{name}: {sizes[-1] / 1e6:.1f} MB at 2048 tokens, "
                 f"times {sizes[-1] / sizes[-2]:.0f} against 1024")  # fmt: skip
ax.set(xlabel="tokens", ylabel="largest tensor made, MB")
ax.set_xticks(lengths, [str(n) for n in lengths])
ax.minorticks_off()
style.label_lines(ax)
plt.show()
print(*lines, sep="\n")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The plain form grows with $N^2$, the tiles with $N$. Both compute every score. How can one compute
# a softmax over a row without having the row?
#
# <!-- notes: Read both lines: 33.6 MB against 0.5 MB at 2,048 tokens. Stress the second sentence,
# both compute every score: nothing is left out. Leave the question on the board for sections 2 to
# 4; chapter 04 said that a softmax needs its row. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Overflow
#
# $$\text{softmax}(x)_i=\frac{e^{x_i}}{\sum_j e^{x_j}}$$
#
# **Question.** In float16, how large may a score be before this fails? And are real scores that
# large? Here are those of SmolLM2 on a page of *Alice*.
#
# <!-- notes: Five minutes for the section. Let them compute ln 65504 roughly: 11. Then vote whether
# real scores reach it. In this layer the largest is 15, so 13 % of the rows break, in an ordinary
# page of English. -->

# %% slideshow={"slide_type": "skip"}
smollm2, tokenizer = load_smollm2()
tokens = tokenizer(passage(), return_tensors="pt").input_ids[:, :128]
layer = capture_attention(smollm2, tokens, layer=5)
q, k, v = layer.q, layer.k, layer.v
scores = q @ k.repeat_interleave(3, 1).mT / math.sqrt(q.shape[-1])
scores = scores.masked_fill(~causal_mask(128), -math.inf)
print(f"layer 5: {q.shape[1]} query heads, {k.shape[1]} key/value heads, {q.shape[2]} tokens")

# %% slideshow={"slide_type": "fragment"}
limit = math.log(65504)
print(f"exp overflows float16 from {limit:.1f} on; largest score here {scores.max():.0f}")
half = scores[0].half()
for name, softmax in (("naive", fa.naive_softmax), ("safe", fa.safe_softmax)):
    broken = (~softmax(half).isfinite()).any(-1).float().mean()
    print(f"{name:6} rows with inf or NaN: {100 * broken:.0f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Subtracting the row's maximum changes nothing in exact arithmetic and everything in ours:
#
# $$\frac{e^{x_i-m}}{\sum_j e^{x_j-m}},\qquad m=\max_j x_j$$
#
# The price: one pass to find $m$, one to sum, one to divide. Three passes over memory.
#
# <!-- notes: Ask for the proof: multiply above and below by e to the minus m. Then ask how often
# the row is read: for m, for the sum, for the division. Three passes is the sentence that the next
# section attacks. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. The online softmax
#
# **Question.** Can maximum and sum be found in *one* pass? Suppose that a larger value arrives
# when half of the sum is done.
#
# <!-- notes: Nine minutes for the section. Give them a minute with three numbers on paper, 1, 3, 2,
# read one at a time, nothing kept but m and l. Wait until somebody finds the factor. The wrong way
# is to start the sum anew when a larger value comes. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# What is wrong with the sum so far is one factor: it was built with $e^{x-m}$ and should have been
# with $e^{x-m'}$. Multiply it by $e^{m-m'}\le 1$ (Milakov and Gimelshein 2018, arXiv 1805.02867).
#
# $$m'=\max(m,x)\qquad l'=l\,e^{m-m'}+e^{x-m'}$$
#
# <!-- notes: Write both updates on the board and leave them there, the output joins them in section
# 4. In the table compare the two right columns: they differ until the maximum 3.5 has come, and are
# equal from there on. The factor is at most one, so nothing overflows. -->

# %% slideshow={"slide_type": "fragment"}
row = scores[0, 5, 127, 45:57]
m, total = torch.tensor(-torch.inf), torch.tensor(0.0)
rows = [("x", "m", "l", "l with the final m")]
for i, x in enumerate(row):
    new_m = torch.maximum(m, x)
    total, m = total * (m - new_m).exp() + (x - new_m).exp(), new_m
    rows.append(
        (f"{x:.1f}", f"{m:.1f}", f"{total:.3f}", f"{(row[: i + 1] - row.max()).exp().sum():.3f}")
    )
table(*rows)
print("\nlog-sum-exp:", f"{m + total.log():.3f}", " torch:", f"{row.logsumexp(0):.3f}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# What it saves, counted: an array that counts each load and store.
#
# <!-- notes: Ask for the counts before the table: naive 3, safe 4, online 3. Then the last row:
# fused with top-k it is one access an element. Four thirds and five are bounds, reached only where
# memory is all that counts. -->


# %% slideshow={"slide_type": "skip"}
def count(softmax, then_top_k=False):
    x, y = accesses.CountedArray(row.tolist()), accesses.CountedArray([0.0] * len(row))
    softmax(x, y)
    if then_top_k:
        accesses.top_k(y, 3)
    return (x.accesses + y.accesses) // len(row)


fused = accesses.CountedArray(row.tolist())
accesses.online_top_k(fused, 3)

# %% slideshow={"slide_type": "fragment"}
table(
    ("accesses an element", "paper", "counted"),
    ("naive softmax", 3, count(accesses.naive)),
    ("safe softmax", 4, count(accesses.safe)),
    ("online softmax", 3, count(accesses.online)),
    ("safe, then top-k", 5, count(accesses.safe, True)),
    ("online, then top-k", 4, count(accesses.online, True)),
    ("online and top-k, fused", 1, fused.accesses // len(row)),
)
print("\nbounds on the speed-up: 4/3 =", round(4 / 3, 2), "(paper: up to 1.3), 5/1 = 5 (up to 5)")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `streaming_logsumexp`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("streaming_logsumexp")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Carrying the output along
#
# We do not want the softmax. We want the average of the values that it weights. It is a sum over
# keys too, built with the same $e^{x-m}$, so the same factor corrects it:
#
# $$O'=O\,e^{m-m'}+e^{x-m'}v,\qquad \text{at the end } O/l$$
#
# One pass, and no score is kept.
#
# <!-- notes: Eight minutes for the section. Ask what the softmax is wanted for: an average of
# values. So the third line under m and l on the board, with the same factor. Divide once, at the
# end: why not at each step? Fewer divisions, and the sum is still growing. -->

# %% slideshow={"slide_type": "fragment"}
out, lse = fa.online_weighted_sum(scores[0, 0], v[0, 0], block_size=16)
exact = scores[0, 0].double().softmax(-1) @ v[0, 0].double()
print("equal to softmax, then product, to 1e-6:", torch.allclose(out.double(), exact, atol=1e-6))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Two workers attend to half of the keys each. Each sends its output. May we average
# them?
#
# <!-- notes: Vote: average or not? Expect a yes, since both halves have equally many keys. Let one
# of them say what happens if all the weight lies in one half. -->

# %% slideshow={"slide_type": "fragment"}
half = scores.shape[-1] // 2
parts = [
    fa.online_weighted_sum(scores[0, 0][:, keys], v[0, 0][keys], block_size=16)
    for keys in (slice(0, half), slice(half, None))
]
averaged = (parts[0][0] + parts[1][0]) / 2
merged, _ = fa.merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
for name, result in (("averaged", averaged), ("merged by log-sum-exp", merged)):
    print(f"{name:22} error {100 * (result - exact).norm() / exact.norm():.2f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Each output was divided by its own sum, and the sum is gone. The **log-sum-exp** $m+\log l$ brings
# it back. Merging by it is exact, in any order: this is how split-K decoding (section 8) and Ring
# Attention (chapter 14) work.
#
# <!-- notes: 44.8 % wrong against 0.00. Derive the weights on the board: e to the lse of a part
# over the sum of both. Only one number a row travels with each output. Keep it visible, sections 7
# and 8 use it, and merge_partials in the laboratory. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `merge_partials`** (derive, 10 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("merge_partials")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Tiles
#
# One key at a time would leave the hardware idle. A block of queries against a block of keys is a
# matrix product, small enough for the fast memory. FlashAttention-2 (Dao 2023, arXiv 2307.08691)
# takes a block of queries and streams the keys past it.
#
# <!-- notes: Six minutes for the section. Draw the 8 by 8 square, and let the room say which tiles
# of 2 by 2 a causal model never visits: six of sixteen. In a live notebook the strip is a slider.
# White tiles wait, blue ones are done. -->


# %% slideshow={"slide_type": "fragment"}
visited = [(i, j) for i in range(4) for j in range(i + 1)]


def draw_tiles(figure, step):
    ax = figure.add_subplot()
    for i in range(4):
        for j in range(4):
            colour = "0.85" if j > i else "white"
            if (i, j) in visited[:step]:
                colour = style.COLOURS["sky"]
            elif (i, j) == visited[step]:
                colour = style.COLOURS["vermilion"]
            ax.add_patch(plt.Rectangle((2 * j, 2 * i), 2, 2, fc=colour, ec="0.5"))
        ax.plot([2 * i, 2 * i + 2], [2 * i, 2 * i + 2], color="0.4", lw=1)
    i, j = visited[step]
    ax.set(xlim=(0, 8), ylim=(8, 0), xlabel="key", ylabel="query", aspect="equal")
    ax.set_title(f"queries {2 * i}, {2 * i + 1}; keys {2 * j}, {2 * j + 1}")
    ax.grid(False)


Stepper(range(len(visited)), draw_tiles, strip=[0, 1, 4, 9], columns=4, size=(3.1, 3.6))

# %% [markdown] slideshow={"slide_type": "fragment"}
# Grey tiles are skipped: nobody sees anything there. Tiles on the diagonal are seen in part, and
# masked element by element; all others need no mask.
#
# <!-- notes: Ask before you read it: in which tiles is a mask needed? Expect "in all". It is the
# diagonal alone: the tiles below it are seen whole, those above not at all. Exercise tiles, fifteen
# minutes, asks for just these borders. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# Skipping is half of the time:
#
# <!-- notes: Ask for the count before the output: n (n + 1) / 2 tiles of n squared, 36 of 64 for n
# = 8. So 56 % and not 50; with 8,192 tokens it is 51. A mask added to all tiles would give the same
# numbers and save nothing. -->

# %% slideshow={"slide_type": "fragment"}
for n in (1024, 8192):
    tiling = Tiling(n, n, 128, 128, True)
    visited = sum(1 for rows in tiling.query_blocks() for _ in tiling.key_blocks(rows))
    print(f"N = {n}: {visited} of {(n // 128) ** 2} tiles, {100 * visited / (n // 128) ** 2:.0f} %")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `tiles`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("tiles")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. FlashAttention
#
# All of it, for one block of queries (`reference/flash_attention/forward.py`):
#
# ```
# for each block of keys that some query sees:
#     S = q k^T                      masked on the diagonal
#     m' = max(m, rowmax S)
#     P = exp(S - m')
#     l = l exp(m - m') + rowsum P
#     O = O exp(m - m') + P v
# O = O / l        lse = m + log l
# ```
#
# **Question.** Is it an approximation? Compare on real queries, keys and values, grouped heads and
# all, with blocks that divide nothing.
#
# <!-- notes: Eight minutes for the section. Match each line of the loop with the three updates on
# the board. Then ask again about the approximation and count the hands. Blocks of 13 by 29 divide
# nothing, and are the test that finds wrong borders. -->

# %% slideshow={"slide_type": "fragment"}
exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), causal_mask(128))
rows = [("largest error", "float32", "bfloat16, %")]
for name, attend in (
    ("plain", plain),
    ("tiles of 13 x 29", lambda *x: fa.flash_attention(*x, is_causal=True, block_q=13, block_k=29)),
    ("tiles of 64 x 64", lambda *x: fa.flash_attention(*x, is_causal=True, block_q=64, block_k=64)),
    ("torch", lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)),
):
    errors = [(attend(*(x.to(dtype) for x in (q, k, v))) - exact).abs().max().item()
              for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    size = exact.abs().max().item()
    rows.append((name, f"below {10 ** math.ceil(math.log10(errors[0] / size)):.0e}",
                 f"{100 * errors[1] / size:.1f}"))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Exact, up to rounding, whatever the blocks; and in bfloat16 nearer to the truth than the plain
# form, which rounds its probabilities before they meet the values.
#
# <!-- notes: Read the table by columns: all below 1e-6 in float32; in bfloat16 0.7 % for the plain
# form and 0.5 % for the tiles. Ask why the plain form is worse: it rounds the probabilities first.
# So the cheaper way is also the nearer one. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** The old output must be rescaled when the maximum grows. How wrong is it if one
# forgets? And if the factor is inverted? Watch one row as its keys arrive.
#
# <!-- notes: Let them write percentages for both mistakes. 26 and 57 %. The point is in the first
# line: the maximum grows in only 2 of 16 blocks. A test with few keys may never see it grow. Forty
# minutes by here. -->


# %% slideshow={"slide_type": "fragment"}
def stream(score_row, values, rescale, block=8):
    m, total, out = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(values.shape[1])
    maxima = []
    for s, x in zip(score_row.split(block), values.split(block), strict=True):
        new_m = torch.maximum(m, s.max())
        factor = rescale(m, new_m)
        p = (s - new_m).exp()
        total, out, m = total * factor + p.sum(), out * factor + p @ x, new_m
        maxima.append(m.item())
    return out / total, maxima


def inverted(m, new_m):
    return torch.tensor(0.0) if m == -torch.inf else (new_m - m).exp()


row, values = scores[0, 8, 127], v[0, 2]
truth, maxima = stream(row, values, lambda m, new: (m - new).exp())
print("the maximum grows in", len(set(maxima)), "of", len(maxima), "blocks")
for name, rescale in (
    ("rescaled", lambda m, new: (m - new).exp()),
    ("not rescaled", lambda m, new: torch.tensor(1.0)),
    ("inverted", inverted),
):
    wrong, _ = stream(row, values, rescale)
    right = row.softmax(0) @ values
    print(f"{name:13} error {100 * (wrong - right).norm() / right.norm():.0f} %")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `flash_attention`** (build, 30 minutes, difficulty 3 of 3). A check watches what you
# allocate.

# %% slideshow={"slide_type": "skip"}
check("flash_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. The backward pass
#
# The gradients need the probabilities, and we threw them away. **Question.** Store them after all?
#
# <!-- notes: Nine minutes for the section. Ask before the answer: what does backward need that
# forward has thrown away? P, and it is the square. Storing it would undo all. Wait for "compute it
# again", which someone finds. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# No: make them again. $P=e^{S-\text{lse}}$ takes one product a tile. With $D=\text{rowsum}(dO\odot
# O)$, which is $\text{rowsum}(dP\odot P)$ in disguise:
#
# $$dV=P^\top dO\qquad dP=dO\,V^\top\qquad dS=P\odot(dP-D)$$
# $$dQ=dS\,K\qquad dK=dS^\top Q$$
#
# <!-- notes: Go through the five formulas and ask which matrices have N rows only, and which are
# square: P, dP, dS, all tile by tile. D is the identity of chapter 04, section 9: one number a
# query. The scale is left out here. Then the cell: kept for backward are 2.08 against 0.79 MB at
# 128 tokens. -->

# %% slideshow={"slide_type": "fragment"}
tensors = [x.clone().requires_grad_() for x in (q, k, v)]
kept = {}
for name, attend in (
    ("plain", plain),
    ("tiles", lambda *x: fa.flash_attention(*x, is_causal=True, block_q=32, block_k=32)),
):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
        out = attend(*tensors)
    unique = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    with largest_new_tensor() as spy:
        kept[name] = torch.autograd.grad(out.square().sum(), tensors)
    print(f"{name}: keeps {sum(unique.values()) / 1e6:.2f} MB for backward, "
          f"largest tensor in backward {spy.bytes / 1e6:.2f} MB")  # fmt: skip
print(
    "gradients agree:",
    all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*kept.values(), strict=True)),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `flash_backward`** (derive, 25 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("flash_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. One query, many keys
#
# While a model generates, there is one query. No blocks of queries to share out among a GPU's
# processors: with batch 1 most of them idle. Flash-Decoding shares out the *keys*, and merges by
# log-sum-exp. Each part can read its keys from anywhere, so a paged cache (chapter 06) costs
# nothing extra.
#
# <!-- notes: Six minutes for the section. Draw a GPU as a row of boxes, and give one block of
# queries to one of them. Ask how to occupy the others. Merging by lse was the answer of section 4.
# The last line reads shuffled blocks: that is the paged cache of chapter 06. -->

# %% slideshow={"slide_type": "fragment"}
one = q[:, :, -1:]
whole = F.scaled_dot_product_attention(one, k, v, enable_gqa=True)
for num_splits in (1, 3, 8, 128):
    out, _ = fa.split_k_attention(one, k, v, num_splits=num_splits)
    print(f"{num_splits:3} parts: equal to 1e-5: {torch.allclose(out, whole, atol=1e-5)}")
block_size = 16
order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
pool_k, pool_v = torch.zeros(8, block_size, 3, 64), torch.zeros(8, block_size, 3, 64)
pool_k[order], pool_v[order] = (x[0].transpose(0, 1).unflatten(0, (8, block_size)) for x in (k, v))
out = fa.paged_attention(one, pool_k, pool_v, order[None], torch.tensor([128]))
print(f"8 blocks, {order.tolist()}: equal to 1e-5: {torch.allclose(out, whole, atol=1e-5)}")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `split_decode`** (repair, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("split_decode")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. What moves between the memories
#
# A GPU computes far faster than it reads: an A100 does 312 TFLOP/s in 16 bits and reads 1.6 TB/s
# (40 GB model), 200 FLOPs in the time of a byte. So count bytes. `TwoLevelMemory` is a machine with
# a small memory and a large one; an algorithm may compute only on what it has read into the small
# one, and every byte that crosses is counted.
#
# <!-- notes: Nine minutes for the section. Derive 200 FLOPs a byte from 312 and 1.6. Ask which of
# the three algorithms moves least, and why the order of loops matters: the second keeps its outputs
# in place and writes them once. Counted and computed bytes agree exactly. -->

# %% slideshow={"slide_type": "skip"}
n, width = 256, 16
matrices = torch.randn(3, n, width)
exact = F.scaled_dot_product_attention(*matrices[:, None, None])[0, 0]
rows = [("256 tokens, d = 16", "bytes", "by formula", "right")]
algorithms = (
    ("standard", lambda m: fa.standard_forward(m, *matrices), fa.standard_elements(n, width)),
    ("flash, 1st order", lambda m: fa.flash_forward(m, *matrices, block_q=16, block_k=64),
     fa.flash_elements(n, width, 64)),
    ("flash-2 order", lambda m: fa.flash2_forward(m, *matrices, block_q=64, block_k=16),
     fa.flash2_elements(n, width, 64)),
)  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
for name, run, elements in algorithms:
    memory = fa.TwoLevelMemory(element_bytes=2)
    out = run(memory)
    rows.append((name, f"{memory.traffic_bytes:,}", f"{2 * elements:,}",
                 torch.allclose(out, exact, atol=1e-5)))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** How does the traffic fall as the small memory grows? The paper's theorem 2 says
# $\Theta(N^2d^2/M)$.
#
# <!-- notes: Let them say the slope on the double logarithm: minus one. Then point at the left end:
# with a small memory FlashAttention moves more than the standard form. That is the honest part of
# the figure. 2 to the -0.99 by count. -->

# %% slideshow={"slide_type": "fragment"}
sizes = [2**p for p in range(13, 21)]
traffic = [2 * fa.flash_elements(8192, 64, fa.tile_sizes(m, 64)[1]) / 1e6 for m in sizes]
figure, ax = plt.subplots()
ax.loglog([m / 1024 for m in sizes], traffic, "o-", color=style.COLOURS["blue"])
standard = 2 * fa.standard_elements(8192, 64) / 1e6
ax.axhline(standard, color=style.COLOURS["vermilion"])
ax.text(sizes[-1] / 1024, standard * 1.15, "standard", color=style.COLOURS["vermilion"], ha="right")
ax.text(70, traffic[3] * 1.15, "FlashAttention", color=style.COLOURS["blue"])
ax.set(xlabel="small memory, KiB", ylabel="MB a head, N = 8192, d = 64")
ax.set_xticks([8, 32, 128, 512, 1024], ["8", "32", "128", "512", "1024"])
ax.minorticks_off()
plt.show()
slope = math.log2(traffic[4] / traffic[3])
print(f"from 64 to 128 KiB the traffic changes by 2^{slope:.2f}; theorem: 2^-1")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `hbm_bytes`** (estimate, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("hbm_bytes")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. FLOPs go up
#
# **Question.** Does FlashAttention save arithmetic?
#
# <!-- notes: Four minutes for the section. Vote before the table. Yes is the usual answer, since it
# is faster. Count products: six in the standard form, seven here, 1.167 times. -->

# %% slideshow={"slide_type": "fragment"}
product = 2 * 1024 * 1024 * 64
table(
    ("products of 1024 x 1024 x 64", "standard", "flash"),
    ("forward: S, O", 2, 2),
    ("backward: dV, dP, dQ, dK", 4, 4),
    ("backward: S again", 0, 1),
    ("GFLOPs together", 6 * product / 1e9, 7 * product / 1e9),
)
print(f"\nmore arithmetic: 7/6 = {7 / 6:.3f}; the paper's figures: 75.2/66.6 = {75.2 / 66.6:.3f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# No: it does more of what is cheap and less of what is dear. It is faster *because* it computes
# again.
#
# <!-- notes: Have a student repeat the sentence in his or her own words, with the number of section
# 9: 200 FLOPs in the time of a byte. It is the discussion's first question as well. attention_flops
# is five minutes, at home. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `attention_flops`** (estimate, 5 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("attention_flops")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. The same loops as a kernel
#
# `reference/flash_attention/triton_kernel.py` is the algorithm as a GPU runs it: one program for
# each block of queries of each head, with its tiles in registers and shared memory; two kernels
# backward, one that owns keys and one that owns queries, so that nobody adds into another's result.
# Without a GPU it runs in Triton's interpreter, in the tests (`TRITON_INTERPRET=1`).
#
# <!-- notes: Seven minutes for the section. Put the board's three updates beside the code and let
# the room find them: new_m, total, out. Then ask what is new: exp2 in place of exp, with LOG2_E in
# the scale, and the shift of 0 for rows without any key. End of the lecture. -->

# %% slideshow={"slide_type": "skip"}
import inspect  # noqa: E402
from pathlib import Path  # noqa: E402

source = Path(inspect.getfile(fa)).with_name("triton_kernel.py").read_text()
kernel = source[source.index("    for start in range(0, end, BLOCK_K):") :]

# %% slideshow={"slide_type": "fragment"}
print(kernel[: kernel.index("    safe =")].rstrip())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# PyTorch's own flash kernel for the CPU returns the log-sum-exp, too, and has a backward pass.
#
# <!-- notes: For home, or one minute. Output and log-sum-exp agree with torch's own flash kernel to
# 1e-5. Ask why the second comparison matters: a wrong lse leaves the output right and ruins
# backward and every merge. -->

# %% slideshow={"slide_type": "fragment"}
kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
x = [y.repeat_interleave(3, 1) if y.shape[1] == 3 else y for y in (q, k, v)]
theirs, their_lse = kernel(*x, 0.0, True)
ours, our_lse = fa.flash_attention_forward(*x, is_causal=True, block_q=32, block_k=48)
for name, a, b in (
    ("output", ours, theirs),
    ("log-sum-exp", our_lse, their_lse),
    ("log-sum-exp and torch.logsumexp", our_lse, scores.logsumexp(-1)),
):
    print(f"{name}: equal to 1e-5: {torch.allclose(a, b, rtol=0, atol=1e-5)}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Published figures, recomputed
#
# GPT-2 medium's attention on an A100: $N=1024$, $d=64$, 16 heads, batch 64, float16, forward and
# backward (FlashAttention, arXiv 2205.14135 **v2**, fig. 2).
#
# <!-- notes: For home or the discussion. Let students predict which line will not agree before they
# see the right column: GFLOPs, by a factor of twelve. 6 products x 1024 heads can be checked by
# hand in a minute. -->

# %% slideshow={"slide_type": "skip"}
heads = 64 * 16
flash = sum(fa.flash_elements(1024, 64, 384, backward=b) for b in (False, True))
plain = sum(fa.standard_elements(1024, 64, backward=b) for b in (False, True))
flops = 6 * product * heads / 1e9
rows = (
    ("", "published", "here"),
    ("flash: traffic, GB", 4.4, round(2 * heads * flash / 1e9, 1)),
    ("standard: traffic, GB", 40.3, round(2 * heads * plain / 1e9, 1)),
    ("standard: GFLOPs", 66.6, round(flops)),
    ("flash: GFLOPs", 75.2, round(flops * 7 / 6)),
    ("FlashAttention-2: 230 of 312 TFLOP/s, %", 73, round(100 * 230 / 312, 1)),
    ("FlashAttention-2, training: 225 of 312, %", 72, round(100 * 225 / 312, 1)),
    ("FlashAttention-3: 740 of 989.5 (H100), %", 75, round(100 * 740 / 989.5, 1)),
    ("FlashAttention-3: error, fp8 against blocks of fp8", 2.6, round(2.4e-2 / 9.1e-3, 2)),
)

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The traffic of FlashAttention comes out; that of the standard form is 25 GB for the algorithm
# as the paper states it, and its measured 40 GB includes an unfused mask and dropout. The GFLOPs
# printed there are about 12 times below what the products need, for both; their *ratio* agrees with
# ours within 4 %. (Version 1 of the paper prints 35.3 and 4.4 GB.)
#
# <!-- notes: Three kinds of result on one page: one that agrees, one that is explained by what was
# measured, and one where the printed number is twelve times too small for its products. Ask which
# of the paper's claims depends on the last: none, the ratio is what counts. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# The online softmax's own paper says that its running sum is safe up to $1.7\times10^{37}$ terms,
# since $1\le l_j\le j$. That holds for overflow. For accuracy, adding ones to a float32 stops at
# $2^{24}$:
#
# <!-- notes: Ask which bound is meant: overflow or accuracy. Both are about the same sum. 2 to the
# 24 plus one gives 2 to the 24. How would sums by blocks of keys change it? That is not measured
# here; ask for an experiment. -->

# %% slideshow={"slide_type": "fragment"}
largest = torch.tensor(2.0**24)
print("2^24 + 1 in float32:", int(largest + 1), " = 2^24:", bool(largest + 1 == largest))
m, total = fa.online_normalizer(torch.randn(5, 300), block_size=7)
print("1 <= l <= 300 in five rows:", bool(((total >= 1) & (total <= 300)).all()))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. What breaks in practice
#
# - **A row that sees nothing** (more queries than keys, or padding): $-\infty-(-\infty)$ is NaN.
#   Subtract 0 there; zeros come out.
# - **The alignment of the causal mask.** With a cache the queries are the last positions. torch's
#   `is_causal` counts from the top left:
#
# <!-- notes: For home. Ask for the value of minus infinity minus minus infinity before you show it.
# Alignment is the mistake of chapter 04, section 8, again: with 2 queries and 6 keys torch's
# is_causal differs from ours. The repair of NaN is a shift of 0. -->

# %% slideshow={"slide_type": "fragment"}
short, long = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 6, 8)
ours = fa.flash_attention(short, long, long, is_causal=True)
theirs = F.scaled_dot_product_attention(short, long, long, is_causal=True)
bottom_right = scaled_dot_product_attention(short, long, long, causal_mask(2, 6))
print(
    "2 queries, 6 keys: ours is aligned at the bottom right:",
    torch.allclose(ours, bottom_right, atol=1e-6),
)
print("the same as torch's is_causal:", torch.allclose(ours, theirs, atol=1e-6))
empty = fa.flash_attention(long, short, short, is_causal=True)
print("6 queries, 2 keys, rows without a key are zero:", bool((empty[:, :, :4] == 0).all()))

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Not the same bits.** Another order of sums rounds differently; a kernel that splits keys by
#   the batch size gives another last digit when the batch changes.
# - **Attention maps.** There is no matrix to look at. To draw one, use the plain form.
#
# <!-- notes: Two sentences for the discussion: same algebra is not same bits, and a model can
# answer differently when its neighbours in the batch change. Who needs maps of attention pays the
# square; chapter 04's plain form makes them. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A sequence rarely fills its last block. FlashAttention-2 set
# the values behind its end to zero; FlashAttention-3 loads the block whole, gives them $P=0$, and
# $0\times$NaN is NaN (flash-attention #1745, #2374; vLLM's kernel before: vllm #936).
#
# <!-- notes: A fast way of loading that drops a line which looked superfluous. Ask why P = 0 is not
# enough. In paged_attention the product of a tile is computed again where it is not finite, without
# the values of weight 0. Two minutes. -->

# %% slideshow={"slide_type": "fragment"}
key_blocks, value_blocks = torch.randn(2, 2, 4, 1, 8, generator=torch.Generator().manual_seed(0))
value_blocks[1, 2:] = torch.nan  # the sequence has 6 tokens in two blocks of 4
query = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
k, v = (x.flatten(0, 1).transpose(0, 1)[None] for x in (key_blocks, value_blocks))
scores = (query @ k.mT / math.sqrt(8)).masked_fill(torch.arange(8) >= 6, -torch.inf)
print("whole block, P = 0 behind the end:", (scores.softmax(-1) @ v)[0, 0, 0, :3].tolist())
ours = fa.paged_attention(query, key_blocks, value_blocks, torch.tensor([[0, 1]]),
                          torch.tensor([6]))  # fmt: skip
exact = scaled_dot_product_attention(query, k[:, :, :6], v[:, :, :6])
print("ours equals attention to the 6 tokens:", torch.allclose(ours, exact, atol=1e-6))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Summary
#
# - Subtract the maximum; correct by $e^{m-m'}$ when it grows; divide once, at the end.
# - Sum and output carry the same factor. The log-sum-exp makes partial results mergeable.
# - Exact, linear in memory, more FLOPs, less traffic: $\Theta(N^2d^2/M)$.
# - Backward makes $P$ again from the log-sum-exp.
# - Skip hidden tiles, mask the diagonal, split the keys when there is one query.
#
# **Further reading.** Dao et al. 2022 (arXiv 2205.14135), Dao 2023 (arXiv 2307.08691), Shah et al.
# 2024 (FlashAttention-3, arXiv 2407.08608); Milakov and Gimelshein 2018 (arXiv 1805.02867); Rabe
# and Staats 2021, *Self-attention does not need O(n^2) memory* (arXiv 2112.05682).
#
# <!-- notes: Students should be able to derive the running softmax with its output, write the tiled
# loop, and say why more FLOPs take less time. In the laboratory: streaming_logsumexp,
# merge_partials, tiles, flash_attention, 70 minutes. Chapter 08 turns to training: LoRA. -->
