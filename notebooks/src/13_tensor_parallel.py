# %% [markdown] slideshow={"slide_type": "slide"}
# # 13 Tensor and sequence parallelism
#
# Sharding by rows of the batch ends where one row does not fit, or where there are more GPUs than
# rows. Then a matrix product itself must be divided. How, so that GPUs talk as little as possible?
#
# In this chapter you cut matrices, heads and the vocabulary, find out why a transformer's layer
# needs exactly two sums in each direction, divide what lies between them by positions, and prove a
# divided Llama equal to the whole one, and to PyTorch's DTensor.
#
# You need: chapters 04, 05 and 11; chapter 12 for what data parallelism leaves undivided.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 7, 35 for 8 to 11. Sections 12 to 14 are for reading.
# Take up chapter 12's last line, "no stage shards activations". Draw one block of a transformer on
# the board, with room between the boxes: sections 3, 4 and 7 write their sums into the gaps. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1 GB of memory are enough; ranks are simulated. The slow
# > cells: the products on 64 ranks (section 10; take 16) and the two processes of section 12.

# %% slideshow={"slide_type": "skip"}
import copy
import dataclasses

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from autograder.notebook import check
from figures import style
from figures.tables import table
from figures.timeline import timeline
from reference.lora import LoRAConfig, add_adapter, lora_layers, trainable_parameters
from reference.parallel.ranks import CLASSROOM, DGX_H100, run
from reference.parallel.tensor import (
    ColumnParallelLinear,
    Einsum,
    GPTLayer,
    ParallelAdapter,
    ParallelGPTLayer,
    RandomStreams,
    RowParallelLinear,
    block_of,
    clip_grad_norm,
    dropout,
    gathered_linear,
    layer_activation_bytes,
    matmul_1d,
    matmul_2_5d,
    matmul_2d,
    moves,
    overlapped_linear,
    parallelize,
    propagate,
    vocab_parallel_cross_entropy,
)
from reference.pretrained import passage
from reference.transformer import Llama, LlamaConfig

torch.set_num_threads(1)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. One row is too much
#
# **Question.** A small Llama, one row of text, on 1 to 8 ranks. Data parallelism, sharded or not,
# has no second rank to give anything to. What does a rank hold if every matrix is divided instead?
#
# <!-- notes: Four minutes. Ask for two curves, parameters and activations. Most draw 1/N for both.
# Let them name something that stays whole although all matrices are cut: the stream between them,
# on which every rank adds and norms. -->

# %% slideshow={"slide_type": "skip"}
CONFIG = LlamaConfig(
    vocab_size=256,
    dim=64,
    hidden_dim=192,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    max_seq_len=64,
)
letters = torch.tensor(list(passage().encode()))
tokens = letters[: 2 * 65].view(2, 65)
inputs, targets = tokens[:, :-1], tokens[:, 1:]


def new_model():
    torch.manual_seed(0)
    return Llama(CONFIG)


def divided_step(comm, sequence_parallel):
    """Loss, what the rank holds between forward and backward, and what a step sends."""
    part = parallelize(new_model(), comm, sequence_parallel=sequence_parallel)
    comm.memory.label(list(part.parameters()), "parameters")
    comm.traffic.reset()
    loss = vocab_parallel_cross_entropy(part(inputs), targets, comm).mean()
    use = comm.memory.use.current
    held = use["parameters"], use["activations"] + use["communication_buffers"]
    loss.backward()
    return loss.item(), held, comm.traffic.total().wire_bytes


# %% slideshow={"slide_type": "subslide"}
found = {(n, sp): run(n, divided_step, sp).results[0] for n in (1, 2, 4, 8) for sp in (False, True)}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for i, (ax, what) in enumerate(zip(axes, ("parameters", "activations"), strict=True)):
    for sp, name in ((False, "tensor parallel"), (True, "and sequence parallel")):
        held = [found[n, sp][1][i] / 1e3 for n in (1, 2, 4, 8)]
        ax.plot((1, 2, 4, 8), held, "o-", label=name if i else None)
        if i == 0:
            break
    ideal = [found[1, False][1][i] / 1e3 / n for n in (1, 2, 4, 8)]
    ax.plot((1, 2, 4, 8), ideal, color="0.5", lw=1, ls="--", label="1/N")
    ax.set(xlabel="ranks", ylabel=f"{what} on each (kB)", ylim=(0, None), xticks=(1, 2, 4, 8))
    style.label_lines(ax)
plt.show()
losses = {round(loss, 4) for loss, *_ in found.values()}
print("losses of all eight runs:", *losses)
for n in (1, 8):
    kept = [f"{found[n, sp][1][1] / 1e3:,.0f} kB" for sp in (False, True)]
    print(f"ranks {n}: activations {kept[0]}, with sequence parallelism {kept[1]}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Parameters are divided by N (but for key and value heads, of which there are two). Activations are
# not, quite: something is kept on all ranks alike. Which, and what to do about it, is section 7.
#
# <!-- notes: The point is the gap between blue and dashed on the right: 1,453 kB at 8 ranks, where
# an eighth of 5,238 would be 655. And one printed line: all eight runs have the same loss, 5.5509.
# Nothing is approximated in this chapter. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Two ways to cut a matrix
#
# $y = xW^\top$ with W of shape (F, D):
#
# - **by outputs** (column-parallel): rank r has F/N rows of W and makes F/N numbers of y. It needs
#   all of x.
# - **by inputs** (row-parallel): rank r has D/N columns of W and makes a *summand* of all of y. It
#   needs its part of x.
#
# **Question.** After which of the two may you apply GELU without asking anybody?
#
# <!-- notes: Six minutes. Draw W twice, once with a horizontal cut, once with a vertical one, and
# under each what a rank's y looks like: a few whole numbers, or all numbers by halves. Then vote.
# "Rows" and "columns" mean opposite things to people who write Wx and xW: insist on outputs and
# inputs. -->

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
x, w = torch.randn(3, 4), torch.randn(6, 4)
by_outputs = torch.cat([F.gelu(x @ part.T) for part in w.chunk(2)], 1)
by_inputs = sum(F.gelu(a @ b.T) for a, b in zip(x.chunk(2, 1), w.chunk(2, 1), strict=True))
for name, y in (("outputs", by_outputs), ("inputs", by_inputs)):
    print(f"cut by {name}: largest error {(y - F.gelu(x @ w.T)).abs().max().item():.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# GELU of a summand is not a summand of GELU. A myth: "split the MLP's first matrix by rows", that
# is by its inputs. It would need a sum before the curve.
#
# <!-- notes: The error is 1.10, not small: curves and sums do not change places. Ask which function
# would allow it: a linear one. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. A pair of layers
#
# The first by outputs, the second by inputs: what one makes, the other takes, and one sum at the
# end is all. Backward, the gradient of x is a sum as well, since all of x went into every part:
#
# | | forward | backward |
# |---|---|---|
# | $f$, at the entrance | nothing | all-reduce |
# | $g$, at the exit | all-reduce | nothing |
#
# Two operators, each the other's backward (Megatron-LM, section 3).
#
# <!-- notes: Seven minutes. Before the table, ask for the sum in backward; nearly all forget it,
# since forward has only one. x went into both parts, so its gradient comes back in two summands.
# Write f and g into the gaps on the board. Two sums a pair, two pairs a layer: that is section 8
# already. -->


# %% slideshow={"slide_type": "skip"}
def pair(comm):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 6), nn.Linear(6, 4)
    column, row = ColumnParallelLinear(first, comm), RowParallelLinear(second, comm)
    leaf = x.clone().requires_grad_()
    y = row(F.gelu(column(leaf)))
    forward = comm.traffic.total().num_calls
    y.sum().backward()
    whole = x.clone().requires_grad_()
    truth = second(F.gelu(first(whole)))
    truth.sum().backward()
    errors = [(y - truth).abs().max().item(), (leaf.grad - whole.grad).abs().max().item()]
    return forward, comm.traffic.total().num_calls - forward, max(errors) < 1e-6


# %% slideshow={"slide_type": "fragment"}
print("all-reduces forward, backward, equal to the whole:", run(2, pair).results[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `parallel_mlp`, forward and backward by hand, and `row_parallel_linear`, a famous
# mistake.
#
# <!-- notes: Both in the laboratory, 20 and 6 minutes. Do not tell the mistake; section 14 does.
# -->

# %% slideshow={"slide_type": "skip"}
check("parallel_mlp")

# %% slideshow={"slide_type": "skip"}
check("row_parallel_linear")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Attention by heads
#
# Heads do not see each other until the output projection. So $W_Q, W_K, W_V$ are cut by outputs, a
# head's rows together, and $W_O$ by inputs: again one sum.
#
# **Question.** 8 query heads, 2 key/value heads, 4 ranks. Who has which key/value head, and whose
# gradient is it?
#
# <!-- notes: Six minutes. Write ranks 0 to 3 with their query heads: 0 and 1, 2 and 3, 4 and 5, 6
# and 7. Let the room add the key heads. A usual wrong answer cuts a key head in two. The second
# half of the question is the harder one: a copy's gradient is not whole until the two ranks add
# theirs. -->


# %% slideshow={"slide_type": "skip"}
def kv_gradient(comm):
    part = parallelize(new_model(), comm)
    vocab_parallel_cross_entropy(part(inputs), targets, comm).mean().backward()
    return part.layers[0].self_attn.k_proj.weight.grad


# %% slideshow={"slide_type": "fragment"}
whole = new_model()
F.cross_entropy(whole(inputs).flatten(0, 1), targets.flatten()).backward()
truth = whole.layers[0].self_attn.k_proj.weight.grad.chunk(2)
for rank, grad in enumerate(run(4, kv_gradient).results):
    error = [((grad - head).norm() / head.norm()).item() for head in truth]
    print(f"rank {rank}: error beside head 0: {error[0]:.4f}, beside head 1: {error[1]:.4f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Ranks 0 and 1 hold copies of head 0. Each sees a part of its queries only, so the gradients of the
# copies are summed over the two; otherwise the copies would drift apart.
#
# **Exercise.** `heads_of_rank`
#
# <!-- notes: Zeros stand beside head 0 for ranks 0 and 1: the sum is in already. Ask what the
# numbers would be without it. `heads_of_rank` is for the laboratory, 12 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("heads_of_rank")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. The vocabulary
#
# Embedding and head are the largest matrices of a small model. Cut by tokens: a rank looks up its
# own, others give zeros, and a sum makes it whole.
#
# **Question.** The logits are (B, T, V), in float32 often the largest tensor of all. To get a loss
# from N parts, must they be gathered?
#
# <!-- notes: Five minutes. Ask which numbers a rank needs from the others to write down its own
# share of the loss. Somebody says "the softmax", so all of it: then ask what of a softmax a loss
# reads. The first of the three numbers is often forgotten; exp of a large logit overflows (chapter
# 07). -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# $$\text{loss} = \log\sum_v e^{z_v - m} + m - z_\text{target}$$
#
# Three numbers a position: the maximum, the sum, the target's logit.


# %% slideshow={"slide_type": "skip"}
def loss_traffic(comm, vocabulary, gathers):
    part = torch.zeros(64, vocabulary // comm.size)
    if gathers:
        comm.all_gather(part.T.contiguous())
    else:
        vocab_parallel_cross_entropy(part, torch.zeros(64, dtype=torch.long), comm)
    return comm.traffic.total().wire_bytes / 1e3


rows = [("vocabulary", "logits gathered", "three numbers")]
for vocabulary in (1_024, 32_000, 128_256):
    sent = [run(8, loss_traffic, vocabulary, g).results[0] for g in (True, False)]
    rows.append((f"{vocabulary:,}", *(f"{kb:,.1f} kB" for kb in sent)))

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `vocab_parallel_loss`, also for logits that exp cannot take.
#
# <!-- notes: 28.7 MB against 1.3 kB, for 64 positions. The right column does not know the
# vocabulary. Exercise at home, 20 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("vocab_parallel_loss")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Dropout
#
# **Question.** Four ranks draw dropout masks. Should they draw the same?
#
# <!-- notes: Five minutes. Take a vote; both sides are right, at different places. Ask each side
# for the place at which the other one's answer does harm. Rule for the board: what is held alike
# needs the same random numbers, what is divided needs different ones. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# On the stream, which all hold alike: the same, or copies stop being copies. On attention weights,
# of which each has its own heads: different ones, or all heads drop the same places.


# %% slideshow={"slide_type": "fragment"}
def streams_apart(comm, generator):
    layer = GPTLayer(16, 4)
    streams = RandomStreams(comm, seed=1)
    if generator == "own everywhere":
        streams.shared = streams.own
    elif generator == "shared everywhere":
        streams.own = streams.shared
    part = ParallelGPTLayer(layer, comm, streams, rate=0.2)
    torch.manual_seed(0)
    y = part(torch.randn(1, 8, 16))
    first = comm.broadcast(y.detach().clone(), src=0)
    mask = dropout(torch.ones(1000), 0.2, streams.own) > 0
    agree = comm.all_reduce(mask.int()).remainder(comm.size).eq(0).float().mean().item()
    return (y - first).abs().max().item(), agree


def with_the_same_layer(comm, generator):
    torch.manual_seed(0)
    return streams_apart(comm, generator)


rows = [("generators", "ranks' outputs differ by", "places where all masks of heads agree")]
for generator in ("shared and own", "own everywhere", "shared everywhere"):
    apart, agree = run(4, with_the_same_layer, generator).results[3]
    rows.append((generator, f"{apart:.2f}", f"{100 * agree:.0f} %"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two generators a rank, as Megatron has them. By chance, four masks agree in $0.8^4 + 0.2^4$, 41 %
# of the places.
#
# **Exercise.** `dropout_seed`
#
# <!-- notes: Read the rows as symptoms. "Own everywhere": outputs 1.18 apart, copies have stopped
# being copies. "Shared everywhere": outputs agree, nothing looks wrong, and all heads drop the same
# places, 100 %. Let them compute the 41 % before you show it. -->

# %% slideshow={"slide_type": "skip"}
check("dropout_seed")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Sequence parallelism
#
# **Question.** Between two regions stand norms, dropout and residuals, on all ranks alike: the same
# work N times, and N copies of what they keep. They treat each position by itself. So?
#
# <!-- notes: Seven minutes. The question gives the answer nearly away; what costs time is the
# traffic. Most expect more of it. Draw one all-reduce and cut it in the middle: reduce-scatter, the
# norm between, all-gather. Chapter 11's ring did just that. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Divide them by positions. The all-reduce at the exit becomes a reduce-scatter (each rank gets the
# sum of its positions), and an all-gather stands at the next entrance. Together they are the two
# halves of the all-reduce: the same bytes.


# %% slideshow={"slide_type": "skip"}
STREAM = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def layer_memory(comm, sequence_parallel):
    layer = GPTLayer(64, 4).bfloat16()
    part = ParallelGPTLayer(layer, comm, RandomStreams(comm, 0), rate=0.1,
                            sequence_parallel=sequence_parallel)  # fmt: skip
    rows = STREAM.chunk(comm.size, 1)[comm.rank] if sequence_parallel else STREAM
    leaf = (rows * 1).requires_grad_()
    comm.memory.label(list(part.parameters()), "parameters")
    y = part(leaf)
    use = comm.memory.use.current
    return use["activations"] + use["communication_buffers"] - y.nbytes


# %% slideshow={"slide_type": "subslide"}
stream = 256 * 2 * 64
rows = [("ranks", "sequence parallel", "bytes / (s b h)", "formula", "kept gathered")]
for n, sp in ((1, False), (2, False), (4, False), (2, True), (4, True)):
    held = run(n, layer_memory, sp).results[0] / stream
    formula = layer_activation_bytes(256, 2, 64, 4, num_ranks=n, sequence_parallel=sp) / stream
    rows.append((n, "yes" if sp else "no", held, formula, 4 * (1 - 1 / n) if sp else 0.0))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A GPT layer's activations, counted by the ledger, beside the formulas of Korthikanti et al. 2022:
# $10 + 24/t + 5as/(ht)$ bytes, and with sequence parallelism $34/t + 5as/(ht)$. Ours also keeps the
# gathered inputs, which the paper gathers again in backward (and a causal mask, the rest).
#
# <!-- notes: Have them read the formula by parts: 10 is what no rank divides, and it goes to 0 with
# sequence parallelism, 34 = 10 + 24. At 4 ranks 38.12 becomes 33.53. Then the last column: 3 of
# these bytes are our own, from gathered inputs. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# A myth: "sequence parallelism divides attention". It divides what stands between regions. Dividing
# attention itself by positions is chapter 14.
#
# **Exercise.** `sequence_parallel_sublayer`
#
# <!-- notes: Say it twice: the name misleads every year. `sequence_parallel_sublayer` is for the
# laboratory, 15 minutes. End of the first part. -->

# %% slideshow={"slide_type": "skip"}
check("sequence_parallel_sublayer")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. What it costs
#
# **Question.** How many all-reduces does a layer need in a training step? And how many does the
# Llama of section 1 make?
#
# <!-- notes: Five minutes. Collect numbers before showing anything: two, four and eight all come
# up. Go back to the board's block and count its f and g: two pairs, each with one sum forward and
# one backward. The cell subtracts one layer from two, so what is outside of layers drops out. -->


# %% slideshow={"slide_type": "skip"}
def layer_traffic(comm, sequence_parallel, num_layers):
    config = dataclasses.replace(CONFIG, num_layers=num_layers, num_kv_heads=8)
    part = parallelize(Llama(config), comm, sequence_parallel=sequence_parallel)
    comm.traffic.reset()
    vocab_parallel_cross_entropy(part(inputs), targets, comm).mean().backward()
    return {row.operation: (row.num_calls, row.wire_bytes) for row in comm.traffic.rows()}


stream = inputs.numel() * CONFIG.dim * 4
sends = []
for sp in (False, True):
    one, two = (run(4, layer_traffic, sp, layers).results[0] for layers in (1, 2))
    sends.append("tensor and sequence parallel:" if sp else "tensor parallel:")
    for operation, (calls, sent) in two.items():
        calls, sent = calls - one[operation][0], sent - one[operation][1]
        if calls:
            sends.append(f"  {calls} x {operation}: {sent / stream:.3f} times the stream")

# %% slideshow={"slide_type": "fragment"}
print(*sends, sep="\n")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Four all-reduces, two forward and two backward, of 2 (t-1)/t = 1.5 streams each; or four gathers
# and four scatters with the same bytes. (The small all-reduces are the gradients of two norms'
# weights, of which each rank saw its own positions.) In the paper's letters: $8bsh(t-1)/t$ numbers.
#
# **Exercise.** `tensor_parallel_bytes`
#
# <!-- notes: 6 streams are 4 times 1.5; 3 + 3 is the same. `tensor_parallel_bytes` is for the
# laboratory, 8 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("tensor_parallel_bytes")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** A Llama-3.1-70B layer, 4,096 tokens, on H100s. When does talking take as long as
# computing: with 8 ranks on one node, or 16 on two?
#
# <!-- notes: Six minutes. Let them guess the share of talking at 8 and at 16 ranks. Guesses for 8
# are too low: it is 41 %. Ask what happens to each part when N doubles: products halve, the sum
# stays what it is. -->


# %% slideshow={"slide_type": "subslide"}
def layer_on_hardware(comm):
    tokens_, dim, hidden = 4096, 8192, 28672
    comm.compute(2 * tokens_ * (2 * dim * dim + 2 * dim * 1024 + 3 * dim * hidden) / comm.size)
    computing = comm.now_seconds
    for _ in range(2):
        comm.all_reduce(torch.zeros(tokens_, dim, dtype=torch.bfloat16))
    return computing, comm.now_seconds - computing


sizes = (1, 2, 4, 8, 16, 32)
times = {
    n: run(n, layer_on_hardware, hardware=DGX_H100, shapes_only=True).results[0] for n in sizes
}
fig, ax = plt.subplots(figsize=(8, 4))
for i, (computing, talking) in enumerate(times.values()):
    ax.bar(i, computing * 1e3, color=style.COLOURS["blue"])
    ax.bar(i, talking * 1e3, bottom=computing * 1e3, color=style.COLOURS["vermilion"])
    ax.text(i, (computing + talking) * 1e3 + 0.1, f"{100 * talking / (computing + talking):.0f} %",
            ha="center")  # fmt: skip
ax.axvline(3.5, color="0.5", lw=1, ls="--")
ax.text(3.55, 6.2, "the node ends here", color="0.35")
ax.text(0.5, 5.5, "computing", color=style.COLOURS["blue"], fontweight="bold")
ax.text(
    0.5, 4.9, "two all-reduces (share above)", color=style.COLOURS["vermilion"], fontweight="bold"
)
ax.set(xticks=range(len(sizes)), xticklabels=sizes, xlabel="tensor-parallel ranks",
       ylabel="forward of a layer (ms)", ylim=(0, 8))  # fmt: skip
plt.show()
print("ms:", ", ".join(f"{(a + b) * 1e3:.2f} on {n}" for n, (a, b) in times.items()))

# %% [markdown] slideshow={"slide_type": "fragment"}
# The sums do not shrink with N, the products do. Within a node the links are fast; beyond it each
# rank's adapter is. This is why tensor parallelism stops at the node's border.
#
# <!-- notes: From 16 to 32 ranks the bar grows again, 1.30 to 1.37 ms: twice the GPUs for nothing.
# But already on one node 8 ranks are 4.7 times as fast as one, not 8. Chapter 15 asks this again
# with a planner. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Computing while gathering
#
# **Question.** With sequence parallelism an all-gather stands before $W_Q, W_K, W_V$. But the
# product of a position needs that position only. Why wait for all?
#
# <!-- notes: Five minutes. Draw the two rows, compute and network, as in chapter 12's prefetch, and
# ask what can be multiplied at time 0: a rank's own positions. Then who sends what to whom?
# Somebody says "to all"; a ring needs a neighbour only. -->


# %% slideshow={"slide_type": "subslide"}
def projection(comm, act):
    with comm.region("product"):
        act(torch.ones(1, 2048 // comm.size, 64), torch.ones(256, 64), comm)


fig, axes = plt.subplots(2, 1, figsize=(9, 3.5), sharex=True)
for ax, act in zip(axes, (gathered_linear, overlapped_linear), strict=True):
    trace = run(4, projection, act, hardware=CLASSROOM).trace
    timeline(ax, trace, ranks=[0], seconds=1.15e-4, labels={"product": "product"})
    ax.set_title(f"{act.__name__}: {trace.seconds * 1e6:.0f} µs", fontsize=12)
axes[0].set_xlabel("")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Parts travel round a ring; each is multiplied while the next one is on its way. All but the last
# product hide the messages, or the other way round. The same at the other end:
#
# **Exercise.** `matmul_reduce_scatter`: graded by the clock.
#
# <!-- notes: 109 microseconds become 67. The compute row of the lower picture has no gap, so all
# three messages are hidden; ask what would show if the network were four times slower.
# `matmul_reduce_scatter` is for home, 30 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("matmul_reduce_scatter")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. More dimensions
#
# **Question.** 64 ranks multiply two n x n matrices. In strips, each needs all of B. In an 8 x 8
# grid of blocks, or a 4 x 4 x 4 cube: what travels, and what does a rank hold?
#
# <!-- notes: Eight minutes with the next page. Draw C as a square. One block of it needs a strip of
# A and a strip of B. In strips that is all of B; in the grid, an eighth of each. Nearly all vote
# for the cube, as it has the most dimensions. -->


# %% slideshow={"slide_type": "skip"}
def product(comm, kind, n=128):
    whole = torch.ones(n, n)
    if kind == "1D strips":
        mine = whole.chunk(comm.size)[comm.rank].clone()
        c = matmul_1d(comm, mine, mine)
    elif kind == "2D grid (SUMMA)":
        mesh = comm.mesh(row=8, column=8)
        c = matmul_2d(mesh, block_of(mesh, whole), block_of(mesh, whole))
    else:
        depth = 4
        mesh = comm.mesh(depth=depth, row=4, column=4)
        c = matmul_2_5d(mesh, block_of(mesh, whole), block_of(mesh, whole))
    assert c.eq(n).all()
    return comm.traffic.total().wire_bytes / whole.nbytes, comm.memory.use.peak_bytes / whole.nbytes


# %% slideshow={"slide_type": "fragment"}
rows = [("", "sent by a rank / n^2", "held at most / n^2")]
for kind in ("1D strips", "2D grid (SUMMA)", "3D cube"):
    done = run(64, product, kind).results
    sent, held = (sum(values) / 64 for values in zip(*done, strict=True))
    rows.append((kind, f"{sent:.3f}", f"{held:.3f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The grid sends a fifth of what strips do. The cube does not win yet: it copies blocks along its
# third side first. (What is held includes the matrix from which this cell cuts its blocks: 1.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# When does the cube win? The same shares for more ranks:
#
# <!-- notes: Ask for a guess at the number of ranks, then show it: at 512 the cube is ahead by
# little, 0.0820 to 0.0845. Leave the formulas in the code for home. What stays: nobody does this to
# one product; the dimensions go to other axes. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("ranks", "1D", "2D", "3D")]
for n in (64, 512, 4096, 262_144):
    q, c = n ** (1 / 2), round(n ** (1 / 3))
    rows.append((f"{n:,}", *(f"{share:.4f}" for share in
                 ((n - 1) / n, 2 * (q - 1) / q**2, 6 * (c - 1) / c**3))))  # fmt: skip
table(*rows)
print("(sent by a rank / n^2, by the formulas that the ledger has just confirmed)")

# %% [markdown] slideshow={"slide_type": "fragment"}
# With thousands of ranks it does. Megatron's pair is a 1D product whose gather is a sum; in
# practice the second and third dimension go to data, pipeline or context parallelism.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. From annotations to programs
#
# **Question.** Say of one matrix that its columns lie along the axis `tp`, and nothing else. Can a
# compiler find the rest of Megatron's layout?
#
# <!-- notes: Six minutes. Write both einsums on the board, btd,df->btf and btf,fd->btd, and put a
# mark on the f of w1. Let somebody carry the mark along: h has an f, w2 has one, y has none. So f
# is summed, and there stands the all-reduce. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Dimensions with the same letter in an einsum lie alike. Annotations spread along letters; where a
# summed letter is divided, an all-reduce follows (GSPMD).

# %% slideshow={"slide_type": "subslide"}
mlp = (Einsum("h", "btd,df->btf", ("x", "w1")), Einsum("y", "btf,fd->btd", ("h", "w2")))
for title, annotations in (
    ("w1 by columns", {"w1": (None, "tp")}),
    ("and x by rows of the batch", {"w1": (None, "tp"), "x": ("dp", None, None)}),
    ("w1 by its inputs", {"w1": ("tp", None), "h": (None, None, None)}),
    ("a weight sharded over dp", {"x": ("dp", None, None), "w1": ("dp", None)}),
):
    shardings = propagate(mlp, annotations)
    print(f"{title}: y {shardings['y']}, w2 {shardings['w2']}")
    for move in moves(mlp, shardings):
        print(f"    {move.operation} of {move.tensor} over {move.axis}, at {move.step}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# One annotation is enough: w2 by inputs, one all-reduce at the end. Add data parallelism and
# nothing in the layer changes. The fourth program gathers a weight before its use: FSDP, from the
# same rule.
#
# <!-- notes: Cover the outputs and have them find the move of each program, one after the other.
# The third is section 2's myth: the sum stands at h, before the curve. The fourth is chapter 12
# without a line of FSDP. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# Two real processes: PyTorch's `parallelize_module` with Colwise and Rowwise styles on one MLP, and
# ours. Then the whole Llama on four simulated ranks beside one.
#
# <!-- notes: For reading. In class one sentence: bit for bit beside DTensor, since a sum of two
# numbers has one order; some 1e-07 on four ranks, since there the order differs. Ask why the second
# is not zero. -->


# %% slideshow={"slide_type": "fragment"}
def beside_dtensor(comm):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    theirs = copy.deepcopy(new_model().layers[0].mlp)
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(),
            "down_proj": RowwiseParallel()}  # fmt: skip
    parallelize_module(theirs, init_device_mesh("cpu", (comm.size,)), plan)
    part = parallelize(new_model(), comm)
    torch.manual_seed(1)
    given = torch.randn(2, 8, CONFIG.dim)
    region, ours = part.region, part.layers[0].mlp
    y, truth = region.leave(ours(region.enter(given))), theirs(given)
    y.square().sum().backward()
    truth.square().sum().backward()
    mine = ours.gate_proj.weight.grad
    return torch.equal(y, truth), torch.equal(mine, theirs.gate_proj.weight.grad.to_local())


equal = run(2, beside_dtensor, backend="processes", is_measured=False).results[0]
print("output, gradient of the gate equal DTensor's bit for bit:", equal)


def whole_gradients(comm, sequence_parallel):
    part = parallelize(new_model(), comm, sequence_parallel=sequence_parallel)
    vocab_parallel_cross_entropy(part(inputs), targets, comm).mean().backward()
    return part.whole(lambda p: p.grad)


for sp in (False, True):
    ours = run(4, whole_gradients, sp).results[0]
    errors = [
        ((ours[n] - p.grad).norm() / p.grad.norm()).item() for n, p in whole.named_parameters()
    ]
    print(f"relative errors of gradients on 4 ranks{', by positions' * sp}, below 1e-6:",
          max(errors) < 1e-6)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests run Megatron-LM's own column, row and vocabulary layers and its cross-entropy on two
# processes, with and without sequence parallelism: embeddings and their gradients are equal to the
# bit, the rest within the roundings of its dtype.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Published figures, recomputed
#
# Each row: what a paper prints, and what the formulas of sections 7 and 8 give.
#
# <!-- notes: For reading. If two minutes are left, take the row "both": 16.1, 18.5, 20.2, 20.2 %
# beside "under 20 %". Ask what one does with a paper that is almost right: say so, with the number,
# and go on using it. -->

# %% slideshow={"slide_type": "fragment"}
GPT3, MTNLG = (2048, 1, 12288, 96), (2048, 1, 20480, 128)
ratios = {}
for name, (s, b, h, a) in (("22B", (2048, 4, 6144, 64)), ("GPT-3", GPT3), ("530B", MTNLG),
                           ("1T", (2048, 1, 25600, 160))):  # fmt: skip
    base = layer_activation_bytes(s, b, h, a, num_ranks=8)
    options = {
        "SP": {"sequence_parallel": True},
        "selective": {"recompute": "selective"},
        "both": {"sequence_parallel": True, "recompute": "selective"},
    }
    ratios[name] = [
        layer_activation_bytes(s, b, h, a, num_ranks=8, **o) / base for o in options.values()
    ]


def attention_share(s, b, h, a):
    return 5 * a * s / h


table(
    ("", "published", "here"),
    ("5 a s / h: GPT-3, MT-NLG", "80, 64",
     f"{attention_share(*GPT3):.0f}, {attention_share(*MTNLG):.0f}"),
    ("selective recomputation saves", "70 %, 65 %",
     ", ".join(f"{100 * attention_share(*c) / (34 + attention_share(*c)):.1f} %"
               for c in (GPT3, MTNLG))),
    ("sequence parallelism: memory left", "nearly half",
     ", ".join(f"{100 * r[0]:.1f} %" for r in ratios.values())),
    ("selective recomputation", "nearly half",
     ", ".join(f"{100 * r[1]:.1f} %" for r in ratios.values())),
    ("both", "under 20 %", ", ".join(f"{100 * r[2]:.1f} %" for r in ratios.values())),
    ("extra terms of the 22B model", "less than 0.01 %",
     f"{100 * (1 / 48 + 4 / 48 * (1 + 51200 / 6144)) / (34 + 106.7):.2f} %"),
    ("Megatron-LM 2019: 512 GPUs, efficiency", "76 %", f"{100 * 15.1e15 / 512 / 39e12:.1f} %"),
    ("numbers a layer sends, t = 8", "8 b s h (t-1)/t", f"{8 * 7 / 8:.0f} b s h"),
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two of them do not hold as printed: both techniques together leave 20.2 % of the two largest
# models' activations, a little more than "under 20 %"; and the 22B model's extra terms are 0.57 %:
# "0.01" is the fraction, and the per cent sign too much.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. What breaks in practice
#
# - **A bias before the sum** counts N times. **A mean in place of the sum** makes layers N times
#   too small, and a norm behind it hides that.
# - **Copies drift** where a copied weight sees other inputs on each rank: norms on positions,
#   shared key/value heads. Their gradients must be summed.
# - **Clipping** must count a divided parameter's parts from all ranks, and a copied one once:
#   `clip_grad_norm`.
# - **Vocabularies that do not divide** are padded:
#
# <!-- notes: Three minutes, as a game: for each line, does the loss show it? With the bias and the
# mean it falls all the same; copies drift slowly; only the last one raises an error. The first line
# is the answer to `row_parallel_linear`, so keep it for after the laboratory. -->


# %% slideshow={"slide_type": "fragment"}
try:
    run(3, lambda comm: parallelize(new_model(), comm))
except ValueError as error:
    print(str(error).split("\n")[0])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A frozen model with LoRA on $W_Q$ and $W_O$, on four ranks.
# Each adapter has one factor that is divided with its matrix, and one that all ranks hold.
#
# **Question.** Once divided: what learns? Whose gradients are summed? By which norm do we clip?
#
# <!-- notes: Three minutes. Draw W_Q cut by outputs, and B A beside it: B is cut with it, A stays.
# Each rank's B sees all of A x, so A's gradient comes in four summands; it is f once more. Ask the
# same of W_O: there B is the whole one. -->


# %% slideshow={"slide_type": "skip"}
def fine_tune(comm, fault):
    """Three steps: whether a frozen matrix learns, how far apart copies of A are, first norm."""
    config = LoRAConfig(rank=4, alpha=8, targets=("q_proj", "o_proj"))
    model = add_adapter(new_model(), config)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.adapter("default").b, std=0.02)
    part = parallelize(model, comm, sequence_parallel=True)
    frozen = part.layers[0].mlp.up_proj.weight
    if fault == "a new nn.Parameter":
        frozen = nn.Parameter(frozen.detach())
    if fault == "nobody sums":
        for m in part.modules():
            if isinstance(m, ParallelAdapter):
                m.factors = lambda m=m: (m.a, m.b)
    learning, norms = trainable_parameters(part), []
    optimizer = torch.optim.AdamW(learning, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        vocab_parallel_cross_entropy(part(inputs), targets, comm).mean().backward()
        own = torch.stack([p.grad.square().sum() for p in learning]).sum()
        norm = clip_grad_norm(part, 1e9, comm)
        norms.append(comm.all_reduce(own).sqrt() if fault == "all count everywhere" else norm)
        optimizer.step()
    a = part.layers[0].self_attn.q_proj.adapter("default").a.detach()
    apart = (a - comm.broadcast(a.clone(), src=0)).abs().max()
    return frozen.requires_grad, comm.all_reduce(apart, "max").item(), norms[0].item()


# %% slideshow={"slide_type": "fragment"}
rows = [("", "frozen matrix learns", "copies of A apart", "norm of the gradient")]
for n, fault in ((1, "one rank"), (4, "here, 4 ranks"), (4, "a new nn.Parameter"),
                 (4, "nobody sums"), (4, "all count everywhere")):  # fmt: skip
    learns, apart, norm = run(n, fine_tune, fault, is_measured=False).results[0]
    rows.append((fault, str(learns), f"{apart:.3f}", f"{norm:.4f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# One kind of fault: a part forgot what the whole knew. A new `nn.Parameter` learns by default
# (pytorch 171523; torchtitan 4267, with LoRA). Nobody summed the whole factor's gradient, and rank
# 0's copy was saved (modelscope/mcore-bridge 173). What all ranks hold counted once for each
# (ROCm/TransformerEngine 715: a norm 1.5 times too large). Here each module says how its parameters
# are cut, and summing, clipping and gathering read it there.
#
# <!-- notes: None of these rows raises an error. Ask for each of them who would have noticed, and
# how: by comparing with one rank, in gradients and norms and not in the loss alone. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Summary
#
# - Cut the first matrix by outputs, the second by inputs: one sum for a pair, forward and backward.
#   Heads are parts of an output; the vocabulary is, too.
# - Four all-reduces a layer and step. They do not shrink with N: stay within the node.
# - Sequence parallelism takes the all-reduce apart: the same bytes, and all activations divided.
# - What is held alike needs the same random numbers; what is divided, different ones.
# - Annotations are enough: the rest of the layout follows by letters.
#
# **Further reading.** Shoeybi et al. 2019, *Megatron-LM* (arXiv 1909.08053); Korthikanti et al.
# 2022, *Reducing Activation Recomputation* (arXiv 2205.05198); Xu et al. 2021, *GSPMD* (arXiv
# 2105.04663); Narayanan et al. 2021 (arXiv 2104.04473).
#
# <!-- notes: Students should be able to draw a layer with its f and g, say which two matrices are
# cut by outputs and why not the other way round, and give four all-reduces from memory. What is
# left: attention still has all positions on each rank. Chapter 14 cuts the text itself. -->
