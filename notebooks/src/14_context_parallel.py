# %% [markdown] slideshow={"slide_type": "slide"}
# # 14 Context parallelism
#
# One text of a million tokens is one row: data parallelism has nothing to divide. Tensor
# parallelism divides heads and hidden units, and runs out of them. So divide the text: every rank
# has some positions. All of a transformer works on positions one by one, but for attention, in
# which each looks at all before it.
#
# In this chapter you change layouts between ranks (Ulysses), send keys round a ring with a running
# softmax, balance the causal mask, and carry a divided text through a whole Llama.
#
# You need: chapters 04, 07 and 11; chapter 13 for section 9.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 5, 35 for 6 to 9. Sections 10 to 12 are for reading.
# Start from a row of 12 boxes on the board, the text, cut in four parts, and ask which boxes of the
# last chapters' layer a rank can compute from its part alone. All but one. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1 GB of memory are enough; ranks are simulated. The slow
# > cells: the rings on the clock (sections 5 and 8) and the two processes of section 10.

# %% slideshow={"slide_type": "skip"}
import copy
import dataclasses

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from autograder.notebook import check
from figures import style
from figures.tables import table
from figures.timeline import timeline
from reference.flash_attention import merge
from reference.parallel.context import (
    ContextParallel,
    Kernel,
    attention_bytes,
    causal_pairs,
    gathered_attention,
    least_part,
    positions,
    ring_attention,
    ulysses_attention,
)
from reference.parallel.ranks import CLASSROOM, DGX_A100, DGX_H100, run
from reference.pretrained import passage
from reference.transformer import PRESETS, Llama, LlamaConfig

torch.set_num_threads(1)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. A text too long
#
# **Question.** Llama 3.1 8B, one text, one GPU of 80 GB. FlashAttention needs no T x T matrix, and
# every layer is recomputed, so that of each only its input is kept. How long may the text be?
#
# <!-- notes: Five minutes. Let them multiply: 32 layers, width 4,096, 2 bytes, so a quarter of a
# megabyte a token for inputs alone. Guesses with FlashAttention in mind are "as long as you like":
# time is another matter, but the question is memory. -->

# %% slideshow={"slide_type": "fragment"}
MODEL = PRESETS["llama-3.1-8b"]
lengths = [2**i for i in range(13, 21)]
KEPT = 2 * MODEL.num_layers * MODEL.dim  # the input of each layer, in 16 bits
ONE_LAYER = 2 * (8 * MODEL.dim + 4 * MODEL.hidden_dim)  # of the layer that is computed again
LOGITS = 2 * MODEL.vocab_size


def gigabytes(num_tokens):
    return num_tokens * (KEPT + ONE_LAYER + LOGITS) / 1e9


fig, ax = plt.subplots(figsize=(8, 4))
for n, colour in ((1, "vermilion"), (8, "orange"), (64, "blue")):
    ax.plot(lengths, [gigabytes(t / n) for t in lengths], "o-", color=style.COLOURS[colour],
            label=f"{n} rank{'s' * (n > 1)}")  # fmt: skip
ax.hlines(80, lengths[0], lengths[-2], color="black", ls=":")
ax.text(lengths[0], 92, "80 GB")
ax.set(xscale="log", yscale="log", xlabel="tokens of the text", ylabel="activations on each (GB)")
ax.set_xticks(lengths, [f"{t // 1024}k" for t in lengths])
ax.minorticks_off()
style.label_lines(ax)
plt.show()
for t in (131_072, 1_048_576):
    print(
        f"{t:,} tokens: {gigabytes(t):,.0f} GB on one rank, {gigabytes(t / 64):.1f} on each of 64"
    )

# %% [markdown] slideshow={"slide_type": "fragment"}
# Parameters, gradients and Adam are not even counted. Activations grow with the text, whatever the
# attention kernel; only more GPUs that each take a part of the positions bring them down.
#
# <!-- notes: The red line crosses 80 GB shortly before 128k, with not one parameter counted. Ask
# why the three lines are parallel: no term is quadratic. So the kernel has done its part, and only
# dividing helps. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Attention in parts
#
# A rank has some queries and, at any moment, some keys. What may it remember of keys that leave?
#
# $$o = \frac{\sum_j e^{s_j} v_j}{\sum_j e^{s_j}}, \qquad
# \ell = \log \sum_j e^{s_j}$$
#
# Two parts, each with its own $o_i$ and $\ell_i$, join as
#
# $$\ell = \log(e^{\ell_1} + e^{\ell_2}), \qquad o = e^{\ell_1 - \ell} o_1 + e^{\ell_2 - \ell} o_2$$
#
# **Question.** Why not the mean of the parts? And what if one part has keys that match well?
#
# <!-- notes: Eight minutes. Derive the joining on the board: multiply o by its denominator, add,
# divide again. Most propose the mean first. Give them a part whose scores are all lower by 10: how
# much should it count? The weights are shares of the denominators. -->

# %% slideshow={"slide_type": "skip"}
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 8, 4, dtype=torch.float64)
k[:, :, 4:] *= 3  # the second half matches better, or worse


def attend(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


# %% slideshow={"slide_type": "fragment"}
whole, lse = attend(q, k, v)
parts = [attend(q, a, b) for a, b in zip(k.chunk(2, 2), v.chunk(2, 2), strict=True)]
outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
joined, joined_lse = merge(outs, lses)
table(
    ("", "largest error"),
    ("mean of the parts", f"{(outs.mean(0) - whole).abs().max():.4f}"),
    ("weighed by log-sum-exp", f"{(joined - whole).abs().max():.0e}"),
    ("its log-sum-exp", f"{(joined_lse - lse).abs().max():.0e}"),
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The pair (o, l) is all that keys leave behind: chapter 07's running softmax, with ranks in place
# of tiles. The result is exact.
#
# <!-- notes: 0.6777 against 4e-16: the mean is no approximation, it is something else. Ask how many
# numbers a query must remember of a million keys that have left: its output and one more. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. A transpose between ranks
#
# Outside of attention a rank needs all heads of some positions. Inside, heads do not know of each
# other: a rank could have *all positions of some heads*. DeepSpeed-Ulysses changes from the one to
# the other and back, by all-to-all.
#
# <!-- notes: Four minutes for the picture. Ask which tiles rank 1 sends, and to whom: of its eight
# it keeps two, and gives two to each of the others. Say "columns become rows"; whoever has seen a
# matrix transposed between machines knows it already. -->

# %% slideshow={"slide_type": "fragment"}
N, T, H = 4, 8, 4
fig, axes = plt.subplots(1, 2, figsize=(9, 2.9))
names = ("blue", "orange", "green", "purple")
for ax, title, owner in (
    (axes[0], "outside: T/N positions, all heads", lambda t, h: t * N // T),
    (axes[1], "inside: all positions, H/N heads", lambda t, h: h * N // H),
):
    for t in range(T):
        for h in range(H):
            rank = owner(t, h)
            ax.add_patch(plt.Rectangle((t, h), 0.94, 0.94, color=style.COLOURS[names[rank]]))
            ax.text(t + 0.47, h + 0.47, rank, ha="center", va="center", color="white")
    ax.set(xlim=(0, T), ylim=(H, 0), xlabel="position", ylabel="head", title=title)
    ax.set_xticks([t + 0.5 for t in range(T)], range(T))
    ax.set_yticks([h + 0.5 for h in range(H)], range(H))
    ax.grid(visible=False)
plt.show()
moved = sum(t * N // T != h * N // H for t in range(T) for h in range(H))
print(f"{moved} of {T * H} tiles change their rank: (N - 1)/N")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** q, k, v go in and the output comes back: four all-to-alls. How many bytes does a
# rank send for a layer, if twice as many ranks share the text?
#
# <!-- notes: Four minutes. Usual guesses: twice as much, or the same. Count on the board: a rank
# has T/N positions, so each of the four tensors is half as large. Compare the rows: 131.1, 98.3,
# 57.3 kB. They do not halve yet, as less stays at home: that is the last column. -->

# %% slideshow={"slide_type": "fragment"}
BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 1, 8, 8, 256, 16
generator = torch.Generator().manual_seed(1)
qkv = [
    torch.randn(BATCH, n, LENGTH, WIDTH, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS)
]
METHODS = {"Ulysses": ulysses_attention, "ring": ring_attention, "gathered": gathered_attention}


def attended(comm, method, layout="contiguous"):
    """One attention of the whole text in parts: the output, brought together, and bytes sent."""
    place = positions(layout, LENGTH, comm.rank, comm.size)
    mine = [x[:, :, place].contiguous() for x in qkv]
    out = METHODS[method](*mine, comm, Kernel(layout=layout))
    sent = comm.traffic.total().wire_bytes
    return out, sent


rows = [("ranks", "sent by each (kB)", "4 N h / P", "of which leaves")]
for n in (2, 4, 8):
    sent = run(n, attended, "Ulysses", is_measured=False).results[0][1]
    published = 4 * LENGTH * HEADS * WIDTH * 4 / n
    rows.append((n, f"{sent / 1e3:.1f}", f"{published / 1e3:.1f}", f"{sent / published:.4f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A rank sends less when there are more of them, so a text that grows with the number of ranks costs
# each a constant. Megatron's gathers do not fall (section 8). The price: no more ranks than heads.

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *ulysses_attention* (25 minutes, 2 of 3): two changes of layout, and fewer key/value
# heads than ranks.
#
# <!-- notes: In the laboratory, the longest of the day. Let them draw the four axes of the tensor
# before they write: nearly all errors are in the order of two of them. -->

# %% slideshow={"slide_type": "skip"}
check("ulysses_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Keys go round
#
# Ring Attention divides no heads. Queries stay, keys and values travel: in each of N steps a rank
# attends to the keys that it has, while they leave for the next rank and others arrive.
#
# **Question.** Ranks 0 to 3. Which rank's keys does rank 1 have in each step? How often must a key
# travel?
#
# <!-- notes: Six minutes with the next page. Have four students stand in a ring and pass sheets of
# paper to the right; ask student 1 after each pass whose sheet it is. They stop after three passes
# by themselves: that is N - 1. A usual slip is the sign: keys come from below, r - 1. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("step", *(f"rank {r} attends to" for r in range(4)))]
for step in range(4):
    rows.append((step, *(f"keys of {(r - step) % 4}" for r in range(4))))
table(*rows)


# %% slideshow={"slide_type": "skip"}
def ring_on_the_clock(comm, part, layout="contiguous", is_causal=False, block_size=2**14):
    given = (torch.empty(1, 8, part, 64) for _ in range(3))
    ring_attention(*given, comm, Kernel(is_causal, layout, block_size=block_size))


# %% slideshow={"slide_type": "subslide"}
WIDE = dataclasses.replace(CLASSROOM, flops_per_second=2e12)
fig, axes = plt.subplots(2, 1, figsize=(10, 4.4))
for ax, part in zip(axes, (2048, 256), strict=True):
    trace = run(4, ring_on_the_clock, part, hardware=WIDE, shapes_only=True).trace
    timeline(ax, trace, ranks=[0, 1], labels=False)
    ax.set_title(f"{part:,} positions on each rank: computing "
                 f"{trace.busy_seconds(0) / trace.seconds:.0%} of the time")  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# N - 1 hops. With many positions on a rank the messages hide; with few, ranks wait for keys.
# Section 8 says how many are many.
#
# <!-- notes: Two ranks of four are drawn; the others look the same. Above, the messages are short
# beside the products and end long before them; below, white gaps. Ask what changed: eight times
# fewer positions make a message 8 times shorter, a block's attention 64 times. So the number of
# ranks will not be in the condition of section 8. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Backward** goes round again. With the final log-sum-exp a rank computes the probabilities of any
# block by itself, so nothing has to be joined. But the gradient of a key is a sum over *all*
# queries: it travels along with its key, each rank adds its summand, and after N hops it is home.
#
# <!-- notes: Four minutes. Ask who can compute the gradient of a key: nobody alone. Back to the
# students in the ring: now everybody adds a line on the sheet, and it must come home. Let them
# derive the 7: keys and values 3 hops, their gradients 4. -->

# %% slideshow={"slide_type": "fragment"}
leaves = [x.double().requires_grad_() for x in qkv]
truth = F.scaled_dot_product_attention(*leaves)
grad = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
truth.backward(grad)


def gradients(comm):
    place = positions("contiguous", LENGTH, comm.rank, comm.size)
    mine = [x.double()[:, :, place].clone().requires_grad_() for x in qkv]
    out = ring_attention(*mine, comm, Kernel(is_causal=False, layout="contiguous"))
    forward = comm.traffic.total().wire_bytes
    out.backward(grad[:, :, place])
    backward = comm.traffic.total().wire_bytes - forward
    return out.detach(), *(x.grad for x in mine), forward, backward


found = run(4, gradients, is_measured=False).results
rows = [("", "largest error on 4 ranks")]
for i, (name, whole) in enumerate(
    (("output", truth), *zip("qkv", (x.grad for x in leaves), strict=True))
):
    ours = torch.cat([result[i] for result in found], 2)
    rows.append((name if i == 0 else f"d{name}", f"{(ours - whole).abs().max():.0e}"))
table(*rows)
size = sum(x.double()[:, :, : LENGTH // 4].nbytes for x in qkv[1:])
print(
    f"\nsent: {found[0][4] / size:.0f} times the rank's keys and values forward, "
    f"{found[0][5] / size:.0f} times backward"
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *ring_attention* (30 minutes, 3 of 3): out of messages, with a running log-sum-exp.

# %% slideshow={"slide_type": "skip"}
check("ring_attention")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *ring_attention_backward* (40 minutes, 3 of 3, challenge): keys and their gradients
# on the way together.
#
# <!-- notes: Both rings are for home, 30 and 40 minutes, the second for those who want it. Say that
# the first merges of an empty running sum deserve a look. -->

# %% slideshow={"slide_type": "skip"}
check("ring_attention_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. A fair share
#
# Under a causal mask a late query sees more keys than an early one.
#
# **Question.** Four ranks, each with a quarter of the text. By how much does the last one work more
# than the mean? And what do the others do?
#
# <!-- notes: Five minutes. Draw the triangle and cut it into four bands; count small triangles: 1,
# 3, 5, 7 of 16. So 7/4 of the mean. Then ask how to deal the positions like cards: by turns, or one
# early with one late. Both come up, and they are the two layouts. -->

# %% slideshow={"slide_type": "fragment"}
LAYOUTS = ("contiguous", "zigzag", "striped")
fig, axes = plt.subplots(1, 3, figsize=(11, 3.1), sharey=True)
for ax, layout in zip(axes, LAYOUTS, strict=True):
    for rank in range(4):
        for p in positions(layout, 16, rank, 4).tolist():
            ax.barh(p, p + 1, height=0.9, color=style.COLOURS[names[rank]])
    ax.set(xlabel="keys that it sees", title=layout, ylim=(15.6, -0.6), xlim=(0, 18.5))
    ax.grid(visible=False)
axes[0].set_ylabel("position of the query")
for rank in range(4):  # contiguous: a band each
    axes[0].text(4 * rank + 2.4, 4 * rank + 0.3, f"rank {rank}", va="center",
                 fontweight="bold", color=style.COLOURS[names[rank]])  # fmt: skip
plt.show()
rows = [("layout", "pairs of ranks 0 to 3, T = 4,096", "most / mean", "slowest steps / fair")]
for layout in LAYOUTS:
    pairs = torch.tensor(causal_pairs(layout, 4096, 4), dtype=torch.float64)
    work = pairs.sum(1)
    steps = sum(max(pairs[r, (r - s) % 4] for r in range(4)) for s in range(4))
    rows.append((layout, ", ".join(f"{w / 1e6:.2f}M" for w in work.tolist()),
                 f"{work.max() / work.mean():.3f}", f"{steps / work.mean():.3f}"))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Contiguous: the last rank does almost twice the mean, and in each step of the ring somebody has a
# full block, so the causal mask saves nothing at all. Zigzag gives each rank an early and a late
# part; striped every N-th position. Both halve the time.
#
# <!-- notes: The colours tell it: blue, rank 0, has the four shortest bars on the left, and two
# short and two long ones in the middle. Point at the last column, not the one before: what counts
# is the slowest rank of each step, 1.750 times the fair share. -->

# %% slideshow={"slide_type": "skip"}
rows = [("time, of that without a mask", "one block", "4 x 4 blocks")]
unmasked = run(4, ring_on_the_clock, 2048, hardware=WIDE, shapes_only=True).trace.seconds
for layout in LAYOUTS:
    shares = []
    for block_size in (2048, 512):
        given = (2048, layout, True, block_size)
        trace = run(4, ring_on_the_clock, *given, hardware=WIDE, shapes_only=True).trace
        shares.append(f"{trace.seconds / unmasked:.0%}")
    rows.append((layout, *shares))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** A kernel computes a block whole, or skips it. If a rank's part is one block, which
# layout saves time? And with 4 x 4 blocks?
#
# <!-- notes: Four minutes. By counted pairs striped and zigzag are alike, so the room expects a
# tie. Let them draw striped's block of step 1: a triangle again, and a triangle cannot be skipped.
# Zigzag 56 %, striped 100 %. With smaller blocks 53 and 63. `causal_work` is for the laboratory;
# end of the first part. -->

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A kernel skips whole blocks, so the block decides what a layout saves. Striped parts meet in a
# triangle in every step: without smaller blocks nothing is skipped. Zigzag's parts meet whole or
# not at all, but in the first step.

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *causal_work* (10 minutes, 1 of 3): pairs that a rank computes.

# %% slideshow={"slide_type": "skip"}
check("causal_work")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Through the whole model
#
# Norms, projections, MLP and loss work on positions one by one: no rank asks another. Three things
# must know where a token stands in the text:
#
# - **RoPE** turns by the place in the text, not in the rank's tensor;
# - **targets** are the next token of the text, which another rank may hold;
# - **the mean loss** is over the tokens of all ranks, of which they may count different numbers.
#
# Parameters are copied, so their gradients are summed over the ranks of a text.
#
# **Question.** Which of these mistakes raises an error?
#
# <!-- notes: Seven minutes. Collect votes for each of the three. All shapes are right in all cases,
# which answers it. Then ask how one would find such a mistake: only by comparing gradients with one
# rank, so write that test first. -->

# %% slideshow={"slide_type": "skip"}
CONFIG = LlamaConfig(
    vocab_size=256, dim=64, hidden_dim=192, num_layers=2, num_heads=8, num_kv_heads=4,
    max_seq_len=128,
)  # fmt: skip
letters = torch.tensor(list(passage().encode()))[:129].view(1, -1)
inputs, targets = letters[:, :-1], letters[:, 1:]
torch.manual_seed(0)
model = Llama(CONFIG).double()


def divided(comm, mistake="", **options):
    """Loss and gradients of a text in parts, with or without a mistake."""
    part = copy.deepcopy(model)
    context = ContextParallel(comm, **options)
    mine, wanted = context.part(inputs), context.part(targets)
    if mistake == "targets of the rank's own tensor":
        wanted = torch.cat([mine[:, 1:], targets[:, -1:]], 1)
    if mistake == "positions of the rank's own tensor":
        context.positions = lambda seq_len: torch.arange(seq_len // comm.size)
        context.part = lambda x, dim=1: x.index_select(dim, context._positions(128, comm.rank))
    context.loss(context.logits(part, mine), wanted).backward()
    loss = comm.all_reduce(context.loss(context.logits(part, mine), wanted).detach())
    if mistake != "gradients not summed":
        context.sum_gradients(part.parameters())
    return loss.item(), {n: p.grad for n, p in part.named_parameters()}


# %% slideshow={"slide_type": "skip"}
alone = copy.deepcopy(model)
loss = F.cross_entropy(alone(inputs).flatten(0, 1), targets.flatten())
loss.backward()

# %% slideshow={"slide_type": "fragment"}
rows = [("4 ranks", "loss", "relative error of gradients")]
rows.append(("one rank", f"{loss.item():.4f}", ""))
for mistake in ("", "targets of the rank's own tensor", "positions of the rank's own tensor",
                "gradients not summed"):  # fmt: skip
    value, grads = run(4, divided, mistake, is_measured=False).results[1]
    error = max(((grads[n] - p.grad).norm() / p.grad.norm()).item()
                for n, p in alone.named_parameters())  # fmt: skip
    rows.append((mistake or "right", f"{value:.4f}", "0" if error < 1e-9 else f"{error:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# None does. A model trained so learns something, a little worse.
#
# <!-- notes: Hide the last column first: losses from 5.5097 to 5.5101, one with a mistake even
# below the right one. Then show it: gradients wrong by 0.22, 0.69, 0.81. A loss at the first step
# proves nothing. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *zigzag_batch* (12 minutes, 2 of 3): repair what a rank trains on.

# %% slideshow={"slide_type": "skip"}
check("zigzag_batch")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *context_mean* (12 minutes, 2 of 3): repair the mean over ranks.
#
# <!-- notes: Both repairs are for the laboratory, 12 minutes each. Let pairs name the symptom
# before they look for the line. -->

# %% slideshow={"slide_type": "skip"}
check("context_mean")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Ulysses x Ring
#
# Ulysses has cheap traffic and runs out of heads. The ring has no limit and dearer traffic. On a
# grid of ranks both work together: neighbours in a row exchange positions for heads, over the fast
# links of a node; keys of those heads go round along columns, between nodes.
#
# **Question.** 8 heads, 16 ranks. Which grids are possible, and which sends least?
#
# <!-- notes: Seven minutes. Draw the 4 x 4 grid: rows within a node, columns between nodes. Ask
# which of the two traffics belongs on which link. Reading the table: from 16 x 1 to 2 x 8 the sum
# falls from 245.8 to 45.1 kB, and what crosses nodes falls most. -->


# %% slideshow={"slide_type": "skip"}
def on_a_grid(comm, num_ulysses):
    context = ContextParallel(comm, num_ulysses=num_ulysses)
    mine = [context.part(x, 2) for x in qkv]
    out = context.whole(context.attend(*mine), 2)
    sent = {g: comm.traffic.total(group=g).wire_bytes / 1e3 for g in ("cp_ulysses", "cp_ring")}
    return out, sent


truth = F.scaled_dot_product_attention(*qkv, is_causal=True)
rows = [("ring x Ulysses", "in rows (kB)", "round rings (kB)", "largest error")]
for num_ulysses in (1, 2, 4, 8):
    out, sent = run(16, on_a_grid, num_ulysses, is_measured=False).results[0]
    rows.append((f"{16 // num_ulysses} x {num_ulysses}", f"{sent['cp_ulysses']:.1f}",
                 f"{sent['cp_ring']:.1f}", f"{(out - truth).abs().max():.0e}"))  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% slideshow={"slide_type": "fragment"}
try:
    run(16, on_a_grid, 16, is_measured=False)
except ValueError as error:
    print("1 x 16:", str(error).split(";")[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *usp_place* (12 minutes, 2 of 3): what a rank of the grid has, before and inside.
#
# <!-- notes: For home, 12 minutes. On the board: rank 6 of a 4 x 4 grid, which positions before,
# which heads inside? -->

# %% slideshow={"slide_type": "skip"}
check("usp_place")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Limits
#
# What a rank sends for one layer's attention, forward, with D the width of queries and E that of
# keys:
#
# $$\begin{aligned}
# \text{Ulysses} \quad & \tfrac{T}{N} (2D + 2E) \tfrac{N-1}{N} \\
# \text{ring, gathered} \quad & \tfrac{T}{N} \, 2E \, (N - 1) \\
# \text{Megatron's SP} \quad & 2 T D \, \tfrac{N-1}{N}
# \end{aligned}$$
#
# **Question.** Llama 3.1 405B has 128 heads, 8 for keys. Which method sends least on 8, 16, 64
# ranks?
#
# <!-- notes: Six minutes. Let them put in D = 16 E and N = 8: 34 E times 7/64 for Ulysses, 2 E
# times 7/8 for the ring, 32 E times 7/8 for the third. Which shrinks with N is seen without a
# calculator: one has 1/N in front. -->

# %% slideshow={"slide_type": "fragment"}
LARGE = PRESETS["llama-3.1-405b"]
SHAPE = dict(batch=1, seq_len=131_072, num_heads=LARGE.num_heads, num_kv_heads=LARGE.num_kv_heads,
             head_dim=LARGE.dim // LARGE.num_heads)  # fmt: skip
counts = (2, 4, 8, 16, 32, 64, 128)
fig, ax = plt.subplots(figsize=(8.5, 4.2))
lines = {
    name: [attention_bytes(method, num_ranks=n, **SHAPE) / 2**30 for n in counts]
    for name, method in (("Ulysses", "ulysses"), ("ring, or gathered keys", "ring"))
}
lines["tensor + sequence parallel"] = [
    2 * 2 * SHAPE["seq_len"] * LARGE.dim * (n - 1) / n / 2**30 for n in counts
]
for (name, values), colour in zip(lines.items(), ("blue", "orange", "vermilion"), strict=True):
    ax.plot(counts, values, "o-", color=style.COLOURS[colour], label=name)
ax.set(xscale="log", yscale="log", xlabel="ranks", ylabel="sent by each, one layer (GiB)")
ax.set_xticks(counts, counts)
ax.set_yticks([0.125, 0.5, 2, 8], ["1/8", "1/2", "2", "8"])
ax.minorticks_off()
style.label_lines(ax)
plt.show()
for n in (8, 64):
    print(f"{n:>2} ranks: " + ", ".join(f"{name} {values[counts.index(n)]:.3f} GiB"
                                        for name, values in lines.items()))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Few key heads make rings cheap: 405B's are a sixteenth as wide as its queries. Beyond 8 ranks
# Ulysses has to send each key head several times, and still its traffic falls.
#
# <!-- notes: Blue and orange cross near 16 ranks. Before that the ring is cheaper, since it sends
# keys only; the room usually expects Ulysses everywhere. Ask how the orange line would lie with 128
# key heads: sixteen times higher. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **When does the ring hide?** A step computes $4 c^2 D$ FLOPs on $c$ positions and sends $4 c E$
# bytes. Computing takes longer where
#
# $$c \ge \frac{F}{\text{bandwidth}} \cdot \frac{E}{D}$$
#
# Neither the length of the text nor the number of ranks is in it, only positions on a rank.
#
# **Question.** An A100 with NVLink and one with InfiniBand: how many positions, with as many key
# heads as heads? With sixteen times fewer?
#
# <!-- notes: Eight minutes. Derive it: time of the products, time of the message, one inequality; c
# cancels once. Ask for what is missing: T and N. Let them compute 312e12 over 300e9, that is 1,040.
# InfiniBand asks for twelve times as many, 12,480, and key heads divide both by 16. -->

# %% slideshow={"slide_type": "fragment"}
PEAK = DGX_A100.flops_per_second
rows = [("A100", "positions on a rank", "with 1/16 of the key heads")]
for name, link in (("NVLink", DGX_A100.intra), ("InfiniBand", DGX_A100.inter)):
    plain, grouped = (least_part(PEAK, link.bytes_per_second, group_size=g) for g in (1, 16))
    rows.append((name, f"{plain:,.0f}", f"{grouped:,.0f}"))
table(*rows)

# %% slideshow={"slide_type": "subslide"}
parts = [2**i for i in range(6, 15)]
node = dataclasses.replace(DGX_H100, intra=dataclasses.replace(DGX_H100.intra, latency_seconds=0))
fig, ax = plt.subplots(figsize=(9.5, 3.0))
for heads, kv_heads, colour in ((128, 128, "vermilion"), (128, 8, "blue")):

    def one(comm, part, heads=heads, kv_heads=kv_heads):
        given = (torch.empty(1, n, part, 128, dtype=torch.bfloat16)
                 for n in (heads, kv_heads, kv_heads))  # fmt: skip
        ring_attention(*given, comm, Kernel(False, "contiguous", block_size=2**14))

    seen = []
    for part in parts:
        trace = run(4, one, part, hardware=node, shapes_only=True).trace
        seen.append(trace.busy_seconds(0) / trace.seconds)
    ax.plot(parts, seen, "o-", color=style.COLOURS[colour], label=f"{kv_heads} key heads")
    limit = least_part(node.flops_per_second, node.intra.bytes_per_second,
                       group_size=heads // kv_heads)  # fmt: skip
    ax.axvline(limit, color=style.COLOURS[colour], ls=":")
    print(f"{heads} heads, {kv_heads} of keys: the formula asks for {limit:,.0f} positions")
ax.set(xscale="log", ylim=(0, 1.05), xlabel="positions on a rank (H100, NVLink without latency)",
       ylabel="share of the time\ncomputing")  # fmt: skip
ax.set_xticks(parts, parts)
ax.minorticks_off()
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The clock bends where the formula says (dotted). Latency, left out here, asks for more positions
# where messages are small; kernels that reach a part of the peak ask for fewer.
#
# <!-- notes: The formula's 2,199 and 137 are the dotted lines; the clock knows nothing of the
# formula. Ask what 0.54 at the left end means: at 64 positions a product fills about half of its
# step, the message all of it. Then Llama 3's 8,192 positions a rank: far to the right. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *context_bytes* (10 minutes, 2 of 3): bytes of four methods.
#
# <!-- notes: For home, 10 minutes: the three formulas of this section, and gathered keys. -->

# %% slideshow={"slide_type": "skip"}
check("context_bytes")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Not sequence parallelism
#
# Two things have nearly the same name. Megatron's *sequence parallelism* (chapter 13) divides by
# positions what tensor parallelism leaves whole: norms, dropout, residuals. Inside attention and
# MLP each rank has all positions and a part of the width. *Context parallelism* divides positions
# everywhere, and parameters nowhere.
#
# **Question.** Which of the two can be used without tensor parallelism? Which makes room for
# parameters?
#
# <!-- notes: Five minutes. Context parallelism stands alone; Megatron's is a part of tensor
# parallelism. Only tensor parallelism makes room for parameters: 1183 against 1577 kB, and 1577 is
# all of them. For activations it is the other way round, 423 against 1110. -->


# %% slideshow={"slide_type": "fragment"}
def held(comm, way):
    """Parameters, and activations between forward and backward."""
    from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy

    part = copy.deepcopy(model).float()
    if way == "context":
        context = ContextParallel(comm)
        mine, wanted = context.part(inputs), context.part(targets)
    else:
        part = parallelize(part, comm, sequence_parallel=way == "tensor and sequence")
    comm.memory.label(list(part.parameters()), "parameters")
    if way == "context":
        kept = context.loss(context.logits(part, mine), wanted)
    else:
        kept = vocab_parallel_cross_entropy(part(inputs), targets, comm).mean()
    use = comm.memory.use.current
    del kept
    return use["parameters"] / 1e3, (use["activations"] + use["communication_buffers"]) / 1e3


rows = [("4 ranks", "parameters (kB)", "activations (kB)")]
for way in ("tensor", "tensor and sequence", "context"):
    parameters, activations = run(4, held, way).results[0]
    rows.append((way, f"{parameters:.0f}", f"{activations:.0f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *held_by_rank* (8 minutes, 1 of 3): what each of three methods leaves on a rank.
#
# <!-- notes: In the laboratory, 8 minutes; a good one to begin with. -->

# %% slideshow={"slide_type": "skip"}
check("held_by_rank")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Proof against production
#
# Every method, causal, against PyTorch's attention on one rank in float64; then the ring on two
# real processes with gloo, against PyTorch's own ring attention on the same parts.
#
# <!-- notes: For reading. In class only: two dashes for Ulysses. Ask why: inside attention it has
# all positions, so no layout can make its work uneven, and none is needed. -->

# %% slideshow={"slide_type": "skip"}
truth = F.scaled_dot_product_attention(*(x.double() for x in qkv), is_causal=True)
rows = [("causal, 4 ranks", *LAYOUTS)]
for method in METHODS:
    errors = []
    for layout in LAYOUTS:
        if method == "Ulysses" and layout != "contiguous":
            errors.append("-")
            continue
        found = run(4, attended, method, layout, is_measured=False).results
        order = torch.cat([positions(layout, LENGTH, r, 4) for r in range(4)]).argsort()
        ours = torch.cat([out for out, _ in found], 2)[:, :, order]
        errors.append(f"{(ours - truth).abs().max():.0e}")
    rows.append((method, *errors))

# %% slideshow={"slide_type": "fragment"}
table(*rows)


# %% slideshow={"slide_type": "skip"}
def beside_torch(comm):
    import torch.distributed as dist
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.enable_load_balance = True
    place = positions("zigzag", LENGTH, comm.rank, comm.size)
    mine = [x[:, :, place].contiguous() for x in qkv]
    theirs, _ = _attention._templated_ring_attention(
        dist.group.WORLD, 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, *mine,
        is_causal=True,
    )  # fmt: skip
    ours = ring_attention(*mine, comm, Kernel(layout="zigzag"))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# %% slideshow={"slide_type": "fragment"}
error = max(run(2, beside_torch, backend="processes", is_measured=False).results)
print("two processes, PyTorch's balanced ring: equal within float32's rounding:", error < 1e-5)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests run DeepSpeed's own `DistributedAttention` as well, on two processes, with as many
# key/value heads as query heads and with half of them: outputs and gradients equal those of our
# Ulysses to 12 digits. It holds the text in order, so ours is told `Kernel(layout="contiguous")`.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Published figures, recomputed
#
# Ring Attention's table 2: positions on a device that hide the ring, F / bandwidth in thousands,
# and six blocks that a device then holds. Table 3: the longest texts.
#
# <!-- notes: For reading. Column c is section 8's inequality with E = D and nothing else; have
# somebody check one row by head. -->

# %% slideshow={"slide_type": "skip"}
# FLOP/s and bytes/s of arXiv 2310.01889, table 2, and its columns c and s in thousands of tokens
TABLE_2 = {
    "A100, NVLink": (312e12, 300e9, 1.0, 6.2),
    "A100, InfiniBand": (312e12, 12.5e9, 24.5, 149.5),
    "TPU v3": (123e12, 112e9, 1.1, 6.6),
    "TPU v4": (275e12, 268e9, 1.0, 6.2),
    "TPU v5e": (196e12, 186e9, 1.1, 6.3),
}
rows = [("table 2", "c, paper", "c, here", "6 c, paper", "6 c, here")]
for name, (flops, bandwidth, c, s) in TABLE_2.items():
    ours = least_part(flops, bandwidth) / 1e3
    rows.append((name, c, f"{ours:.2f}", s, f"{6 * ours:.2f}"))

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# InfiniBand's row is 2 % off in the paper: 312 / 12.5 is 24.96.

# %% slideshow={"slide_type": "subslide"}
# devices, tensor parallel ranks, thousands of tokens without and with the ring
TABLE_3 = {
    "8 x A100, 7B": (8, 1, 32, 256),
    "32 x A100, 7B": (32, 1, 128, 4096),
    "1024 x TPU v4, 7B": (1024, 2, 16, 8192),
}
rows = [("table 3", "without (k)", "with (k)", "times, paper", "devices / tensor ranks")]
for name, (devices, tensor, without, ring) in TABLE_3.items():
    rows.append((name, without, ring, f"{ring / without:.0f}", devices // tensor))
table(*rows)

# Llama 3, arXiv 2407.21783, table 4: GPUs, TP, CP, PP, DP, tokens, batch a DP group, TFLOP/s
LLAMA_3 = ((8192, 8, 1, 16, 64, 8192, 32), (16_384, 8, 1, 16, 128, 8192, 16),
           (16_384, 8, 16, 16, 8, 131_072, 16))  # fmt: skip
print()
rows = [("Llama 3, table 4", "GPUs", "TP x CP x PP x DP", "tokens a step", "positions on a rank")]
for gpus, tp, cp, pp, dp, length, batch in LLAMA_3:
    rows.append((f"{length:,} tokens", f"{gpus:,}", f"{tp * cp * pp * dp:,}",
                 f"{length * batch * dp / 2**20:.0f} M", f"{length // cp:,}"))  # fmt: skip
table(*rows)
need = least_part(DGX_H100.flops_per_second, DGX_H100.inter.bytes_per_second, group_size=16,
                  is_causal=True)  # fmt: skip
print(f"\na balanced ring over InfiniBand would hide from {need:,.0f} positions on")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Table 3's 512 is the devices without a two-way tensor parallelism, an assumption of ours: the
# ratio says so. Llama 3's ranks keep 8,192 positions whether the text is 8k or 128k long, and its
# steps 16 million tokens. It gathers keys and sends none round: with 8 key heads that is little,
# and masks of packed documents become simple (its sec. 3.3.2).
#
# <!-- notes: The discussion for the laboratory: Llama 3 gathers keys; why not a ring? A ring over
# InfiniBand would hide from 2,474 positions on, and they have 8,192. So bandwidth is not the
# reason; packed documents are theirs. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. What breaks in practice
#
# - **Positions and targets** of the rank's own tensor: no error, a worse model (section 6).
# - **Contiguous parts** under a causal mask: twice the time, unseen in any loss.
# - **A mean of means** where documents end early: ranks with few tokens count too much.
# - **Packed documents**: a mask by document makes work uneven again, whatever the layout.
# - **Keys before RoPE**: turn them before they leave, or every rank turns them again.
# - **Texts that do not divide**:
#
# <!-- notes: Three minutes. Ask for each line whether anything is printed when it happens: only for
# the last. Then let them rank the others by how long one would train before noticing. -->

# %% slideshow={"slide_type": "fragment"}
try:
    run(4, lambda comm: ContextParallel(comm).part(inputs[:, :100]), is_measured=False)
except ValueError as error:
    print(str(error).split("\n")[0])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** An option that one path takes and ignores: attention with the
# wrong mask or with a part of the keys, and no error (sglang #33353 makes three such paths refuse;
# long-context-attention #53 asks whether zigzag is honoured). Our Ulysses once took `zigzag` parts
# for parts in order. A causal mask needs the order of the text: honour the option, or refuse.
#
# <!-- notes: Ask why without a mask nothing would be wrong: attention does not care for the order
# of keys. Then how one would find it: by comparing each path with one rank, in each layout, which
# is a test of four lines. One minute. -->


# %% slideshow={"slide_type": "fragment"}
def zigzag_parts(comm, layout):
    place = positions("zigzag", LENGTH, comm.rank, comm.size)
    mine = [x[:, :, place].contiguous() for x in qkv]
    ours = ulysses_attention(*mine, comm, Kernel(layout=layout))
    return (ours - F.scaled_dot_product_attention(*qkv, is_causal=True)[:, :, place]).abs().max()


for name, layout in (("taken as in order", "contiguous"), ("taken as zigzag", "zigzag")):
    error = max(run(4, zigzag_parts, layout, is_measured=False).results)
    print(f"zigzag parts, {name}: largest error {error:.3f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Summary
#
# - Only attention looks across positions. Everything else is divided for nothing.
# - Ulysses: all positions of some heads, by all-to-all; traffic falls with ranks, heads end.
# - Ring: queries stay, keys go round; parts join by log-sum-exp, gradients travel home.
# - It hides from F / bandwidth x E / D positions on a rank, however long the text.
# - Causal work is fair in zigzag or stripes, and unfair by half in contiguous parts.
# - Parameters stay whole: context parallelism goes with ZeRO or tensor parallelism.
#
# **Further reading.** Liu et al. 2023, *Ring Attention* (arXiv 2310.01889); Jacobs et al. 2023,
# *DeepSpeed Ulysses* (arXiv 2309.14509); Brandon et al. 2023, *Striped Attention* (arXiv
# 2311.09431); Fang and Zhao 2024, *USP* (arXiv 2405.07719); *The Llama 3 Herd of Models* (arXiv
# 2407.21783), sec. 3.3.2.
#
# <!-- notes: Students should be able to join two parts of a softmax on paper, to say in which
# direction a ring's gradients travel, and to derive c from F and bandwidth. What is still whole on
# each rank: every layer. Chapter 15 gives each rank some of them. -->
