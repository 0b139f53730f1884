# %% [markdown] slideshow={"slide_type": "slide"}
# # 15 Pipelines, 3D parallelism, planning
#
# Layers follow each other, so give each rank some of them. Nothing is divided, nothing is summed,
# only the stream between two layers travels. And all ranks but one stand idle. How few can wait,
# how little must be kept, and who should be whose neighbour?
#
# In this chapter you order forwards and backwards on a pipeline, derive its bubble and see it on
# the clock, forget activations and compute them again, lay out ranks in three dimensions, and let a
# planner choose the layout. Gradients are real, and equal to one rank's and to PyTorch's pipelines.
#
# You need: chapters 11 and 13; chapter 12 for section 9, chapter 14 for the planner's last axis.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 9, which go fast since the pictures carry them, and
# 35 for 10 to 12, the sum of five chapters. Sections 13 to 15 are for reading. Keep a picture of a
# factory line on the board, four workers in a row. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1 GB of memory are enough; ranks are simulated. The slow
# > cells: the schedules on the clock (section 8), and the two layouts of section 9 (take fewer
# > layers).

# %% slideshow={"slide_type": "skip"}
import contextlib
import io
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.parallel.pipeline import (
    Pipeline,
    bubble_fraction,
    gpipe,
    in_flight,
    interleaved,
    megatron_groups,
    one_f_one_b,
    peak_in_flight,
    recompute,
    simulate,
    split_llama,
    zero_bubble_h1,
)
from reference.parallel.ranks import CLASSROOM, DGX_H100, run
from reference.parallel.tensor import parallelize, vocab_parallel_cross_entropy
from reference.parallel.zero import FSDP
from reference.pretrained import passage
from reference.transformer import Llama, LlamaConfig

torch.set_num_threads(1)
style.use()
COLOUR = {"F": style.COLOURS["blue"], "B": style.COLOURS["green"], "W": style.COLOURS["orange"]}


def draw(ax, schedule, end=None, seconds=None):
    """A schedule in time: a row for each rank, a box for each action, its micro-batch inside."""
    done = simulate(schedule, seconds)
    last = max(stop for *_, stop in done)
    for rank, action, start, stop in done:
        late = action.stage >= schedule.num_ranks  # a rank's second stage
        ax.barh(rank, stop - start, left=start, height=0.9, color=COLOUR[action.kind],
                edgecolor="white", alpha=0.6 if late else 1)  # fmt: skip
        if stop - start > 0.013 * (end or last):
            ax.text((start + stop) / 2, rank, action.micro, ha="center", va="center", fontsize=9,
                    color="white")  # fmt: skip
    ax.set(yticks=range(schedule.num_ranks), ylim=(schedule.num_ranks - 0.4, -0.6),
           yticklabels=[f"rank {r}" for r in range(schedule.num_ranks)],
           xlim=(0, end or last))  # fmt: skip
    ax.grid(axis="y", visible=False)
    return last


# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. One works, the others wait
#
# **Question.** Four ranks have a quarter of the layers each. A batch goes through forward (1 unit
# of time on each rank) and backward (2 units). How busy are the ranks?
#
# <!-- notes: Four minutes. Have a student draw the four rows in time. Let them count white boxes:
# three of four. Then ask for a remedy before the second picture; "give each a whole copy" is
# chapter 11 and does not fit. -->

# %% slideshow={"slide_type": "fragment"}
fig, axes = plt.subplots(2, 1, figsize=(9.5, 4.6), sharex=True)
eighths = {"F": 1 / 8, "B": 2 / 8}
ends = draw(axes[0], gpipe(4, 1)), draw(axes[1], gpipe(4, 8), 12, eighths)
axes[0].set_title("the batch in one piece", fontsize=12)
axes[1].set_title("in eight micro-batches", fontsize=12)
axes[1].set_xlabel("time; blue: forward, green: backward")
plt.show()
for name, end in zip(("one piece", "eight micro-batches"), ends, strict=True):
    print(f"{name}: a rank computes {3 / end:.0%} of the time")

# %% [markdown] slideshow={"slide_type": "fragment"}
# A quarter of the time: four GPUs do the work of one. Cut the batch into micro-batches, and stages
# work on different ones at the same time. What remains white is the **bubble**.
#
# <!-- notes: From 25 % to 73 %. Ask what 16 pieces would give, and keep the guesses for section 3:
# 8 of 11 time slots are busy here, 16 of 19 then. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Stages and micro-batches
#
# A stage receives activations, computes, sends. On the way back it receives the gradient of what it
# sent, and sends the gradient of what it received. Autograd runs on each stage by itself; messages
# are the joints. Gradients of micro-batches add up, and the loss is a mean over all of them:
#
# $$\nabla_{W_s} L = \frac{1}{m}\sum_{i=1}^{m} \nabla_{W_s} L_i$$
#
# Here a small Llama in two stages, beside one rank.
#
# <!-- notes: Four minutes. The point is that autograd stops at a stage's border: somebody has to
# hand over the gradient. Ask what is wrong if every micro-batch's loss is a mean over its own rows
# and nobody divides by m: gradients m times too large. -->

# %% slideshow={"slide_type": "fragment"}
CONFIG = LlamaConfig(
    vocab_size=256,
    dim=64,
    hidden_dim=176,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=64,
)
letters = torch.tensor(list(passage().encode()))
tokens = letters[: 8 * 33].view(8, 33)
inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def new_model():
    torch.manual_seed(0)
    return Llama(CONFIG)


def losses_of(logits, wanted):
    """One for each token; their mean over all micro-batches is the pipeline's."""
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")


def loss_of(logits, wanted):
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def pipelined(comm, make, num_micro=4):
    schedule = make(comm.size, num_micro)
    stages = split_llama(new_model(), comm.rank, comm.size, num_chunks=schedule.num_chunks)
    loss = Pipeline(comm, stages, schedule, losses_of).step(inputs, targets)
    sent = comm.traffic.total().wire_bytes
    grads = {n.removeprefix("model."): p.grad for s in stages for n, p in s.named_parameters()}
    return loss, grads, sent


alone = new_model()
truth = loss_of(alone(inputs), targets)
truth.backward()
expected = {name: p.grad for name, p in alone.named_parameters()}


def largest_error(results):
    found = {name: grad for _, grads, _ in results for name, grad in grads.items()}
    assert found.keys() == expected.keys()
    return max(((found[n] - g).norm() / g.norm()).item() for n, g in expected.items())


results = run(2, pipelined, gpipe).results
print(f"loss {results[1][0]:.4f} on the last stage, {truth:.4f} on one rank")
print(f"largest relative error of a gradient: {largest_error(results):.0e}")
print(f"sent by each stage: {results[0][2] / 1e3:.0f} kB; parameters: "
      f"{sum(p.nbytes for p in alone.parameters()) / 1e3:.0f} kB")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# What travels is the stream of a micro-batch, once forward and once back, to one neighbour: little,
# beside what tensor parallelism sends in each layer. So pipelines may cross nodes.
#
# **Exercise.** `pipelined_gradient`
#
# <!-- notes: 66 kB of stream beside 871 kB of parameters; the error 2e-07 is rounding.
# `pipelined_gradient` is for home, 30 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("pipelined_gradient")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. The bubble
#
# **Question.** p stages, m micro-batches. How long does a rank wait in a step?
#
# <!-- notes: Five minutes. Let them read it off the pictures of section 1, rank 0 and rank 3
# separately: both lose p - 1. Usual slip: dividing by m + p - 1, the whole step. That is a share of
# the time, this one a share of the computing; papers use both. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# The first rank waits at the end of the forwards, until the first gradient comes back; the last one
# waits at the start. Each loses p - 1 micro-batch times, of the m in which it computes:
#
# $$\text{bubble} = \frac{p-1}{m}$$

# %% slideshow={"slide_type": "skip"}
rows = [("p", "m", "GPipe, simulated", "1F1B, simulated", "(p-1)/m")]
for p, m in ((2, 4), (4, 8), (8, 32), (8, 64)):
    measured = []
    for make in (gpipe, one_f_one_b):
        end = max(timed.end_seconds for timed in simulate(make(p, m)))
        measured.append((end - 3 * m) / (3 * m))
    rows.append((p, m, *(f"{x:.6f}" for x in measured), f"{bubble_fraction(p, m):.6f}"))

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A myth: "1F1B has a smaller bubble than GPipe". The columns are equal. What then is it for?
#
# **Exercise.** `bubble_fraction`
#
# <!-- notes: Ask for a show of hands on the myth before the table. Let the last question stand;
# section 4 answers it. `bubble_fraction` is for the laboratory, 10 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("bubble_fraction")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. 1F1B
#
# **Question.** GPipe keeps the activations of all m micro-batches until the first backward. When
# could a rank begin its first backward at the earliest?
#
# <!-- notes: Six minutes. Take the last rank first: it may go back at once, after its first
# forward. And rank 0? When its first micro-batch has gone down and come back. How many has it sent
# out by then: p, so there is no use in keeping more. -->

# %% slideshow={"slide_type": "subslide"}
fig, axes = plt.subplots(2, 1, figsize=(9.5, 5), sharex=True)
for ax, make in zip(axes, (gpipe, one_f_one_b), strict=True):
    schedule = make(4, 8)
    draw(ax, schedule)
    kept = [peak_in_flight(schedule, rank) for rank in range(4)]
    ax.set_title(f"{schedule.name}: at most {kept} micro-batches kept, by rank", fontsize=12)
axes[1].set_xlabel("time; blue: forward, green: backward")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# After p - 1 - rank forwards, one backward for each forward (1F1B). The same time, and at most
# p - rank micro-batches alive, however many there are. The memory ledger of a real Llama agrees:
#
# <!-- notes: Both pictures end at 33. Follow micro-batch 0 with a finger in each, then count on
# rank 0 what has gone forward and not yet back: 8 above, 4 below. This is the answer of section 3:
# memory, not time. -->


# %% slideshow={"slide_type": "subslide"}
def peak_activations(comm, make, num_micro):
    schedule = make(comm.size, num_micro)
    stages = split_llama(new_model(), comm.rank, comm.size, num_chunks=schedule.num_chunks)
    comm.memory.label([p for s in stages for p in s.parameters()], "parameters")
    comm.memory.reset_peak()
    repeated = inputs[:2].repeat(num_micro, 1), targets[:2].repeat(num_micro, 1)
    Pipeline(comm, stages, schedule, losses_of).step(*repeated)
    return comm.memory.use.peak["activations"] / 1e6


counts = (2, 4, 8, 12)
fig, ax = plt.subplots(figsize=(8, 3.8))
for make in (gpipe, one_f_one_b):
    peaks = [run(2, peak_activations, make, m).results[0] for m in counts]
    ax.plot(counts, peaks, "o-", label=make(2, 2).name)
    print(f"{make(2, 2).name}: " + ", ".join(f"{peak:.1f} MB" for peak in peaks))
ax.set(xlabel="micro-batches of two rows", ylabel="activations on rank 0 of 2\nat most (MB)",
       ylim=(0, None), xticks=counts)  # fmt: skip
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `one_f_one_b_order` and `live_micro_batches`
#
# <!-- notes: With 12 micro-batches 10.2 MB beside 1.8 MB; one line depends on m, the other does
# not. Both exercises are for the laboratory, 15 and 8 minutes; have them draw p = 3 by hand first.
# -->

# %% slideshow={"slide_type": "skip"}
check("one_f_one_b_order")

# %% slideshow={"slide_type": "skip"}
check("live_micro_batches")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. How many micro-batches
#
# **Question.** The bubble falls with m. So take as many as there are rows?
#
# <!-- notes: Four minutes. Ask what a micro-batch costs that does not shrink with it. Then a
# derivative on the board: the best m is the root of (p - 1) C / o, that is 48 and 15 for the
# overheads of the figure. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Each costs something beside its share: launches, messages, and matrices too small to fill a GPU. A
# step lasts $(m + p - 1)(C/m + o)$ for C of computing and o of overhead a micro-batch.

# %% slideshow={"slide_type": "subslide"}
counts = [2**i for i in range(9)]
fig, ax = plt.subplots(figsize=(9.5, 3.2))
for overhead in (0.0, 0.003, 0.03):
    steps = [(m + 7) * (1 / m + overhead) for m in counts]
    ax.plot(counts, steps, "o-", label=f"overhead {overhead:.1%}")
    print(f"overhead {overhead:.1%}: best m = {counts[steps.index(min(steps))]}")
ax.hlines(1, 1, counts[-2], color="0.5", lw=1, ls="--")
ax.text(1, 1.06, "no bubble", color="0.35")
ax.set(xscale="log", yscale="log", xlabel="micro-batches on 8 stages",
       ylabel="step / computing of a stage", yticks=(1, 2, 4, 8), xticks=counts)  # fmt: skip
ax.set_xticklabels(counts)
ax.set_yticklabels([1, 2, 4, 8])
ax.minorticks_off()
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# A myth: "more micro-batches cost nothing".
#
# **Exercise.** `best_num_micro`
#
# <!-- notes: The blue line is what the formula of section 3 promises; the other two turn up again,
# at 64 and at 16. `best_num_micro` is for the laboratory, 10 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("best_num_micro")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Recomputation
#
# **Question.** A block keeps many times its input for backward. It could keep the input
# alone, and run forward again. What does that cost, and what may go wrong?
#
# <!-- notes: Five minutes. A forward is a third of a step, so a third more is guessed quickly. Ask
# why the table says 1.31 and not 1.33: what is in no block is not run again. "What may go wrong" is
# harder; wait for dropout. -->


# %% slideshow={"slide_type": "skip"}
def kept_and_time(comm, kind):
    stages = split_llama(new_model(), 0, 1, recompute=kind)
    comm.memory.label([p for s in stages for p in s.parameters()], "parameters")
    loss = loss_of(stages[0](inputs), targets)
    kept = comm.memory.use.current["activations"]
    loss.backward()
    return kept / 1e6, comm.now_seconds


# %% slideshow={"slide_type": "fragment"}
rows = [("recomputation", "kept for backward", "time of a step")]
plain = run(1, kept_and_time, "none", hardware=CLASSROOM).results[0]
for kind in ("none", "selective", "full"):
    kept, seconds = run(1, kept_and_time, kind, hardware=CLASSROOM).results[0]
    rows.append((kind, f"{kept:.2f} MB", f"{seconds / plain[1]:.2f} x"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# *Full* keeps the input of each block and pays a forward: a third more. *Selective* forgets what
# attention holds inside, the largest part for long texts, and pays two small products.

# %% [markdown] slideshow={"slide_type": "subslide"}
# What may go wrong is dropout: the second forward must draw the first one's mask.
#
# <!-- notes: Ask whether the loss would show it: no, the loss comes from the first forward. Only
# the gradient is wrong, by 0.80. `recomputed_gradient` is for home, 12 minutes. -->

# %% slideshow={"slide_type": "fragment"}
layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5))
torch.manual_seed(1)
x = torch.randn(4, 8, requires_grad=True)


def gradient(act):
    torch.manual_seed(2)
    x.grad = None
    act(x).sum().backward()
    return x.grad


def careless(x):
    with torch.no_grad():
        y = layer(x)
    again = layer(x)  # draws anew
    return y + again - again.detach()


kept = gradient(layer)
for name, act in (("with the mask", lambda x: recompute(layer, x)), ("another mask", careless)):
    error = ((gradient(act) - kept).norm() / kept.norm()).item()
    print(f"{name}: relative error of the gradient {error:.2f}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** Whatever the function writes, it writes twice: the running
# statistics of a batch norm move two steps for each batch, while loss and gradient are right
# (pytorch #96136). Ours gives the second run copies to write to.
#
# <!-- notes: Ask who would notice: nobody before evaluation, where the running statistics are used.
# Then for other things that a function may write: a counter, a cache, an expert's load. One minute;
# a way out without copies is a momentum of 1 - sqrt(1 - momentum). -->


# %% slideshow={"slide_type": "fragment"}
def outside(function, x):
    return checkpoint(function, x, use_reentrant=False)


for name, act in (("torch.utils.checkpoint", outside), ("recompute", recompute)):
    norm = nn.BatchNorm1d(8)
    act(norm, x).sum().backward()
    print(f"{name}: one batch, counted {int(norm.num_batches_tracked)} times")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `recomputed_gradient`: a program that trains, somewhat worse.

# %% slideshow={"slide_type": "skip"}
check("recomputed_gradient")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Three dimensions
#
# **Question.** 16 GPUs, 8 on a node: tensor parallelism in pairs, four pipeline stages, two copies
# of the model. Which ranks average their gradients?
#
# <!-- notes: Five minutes. Let everybody write down the peers of rank 0 before anything appears.
# Most write 0 and 1, as copies seem to come first. Then ask which of the three groups talks most in
# a layer, and which links are the shortest. -->

# %% slideshow={"slide_type": "fragment"}
groups = megatron_groups(16, tp=2, pp=4)
for axis in ("tp", "dp", "pp"):
    print(f"{axis}: {groups[axis]}")

# %% slideshow={"slide_type": "subslide"}
fig, ax = plt.subplots(figsize=(10, 2.8))
for rank in range(16):
    stage, copy_, part = rank // 4, rank // 2 % 2, rank % 2
    column, row = stage * 2.4 + part, copy_
    colour = list(style.COLOURS.values())[stage]
    ax.add_patch(plt.Rectangle((column, row), 0.94, 0.8, fc=colour, alpha=0.85))
    ax.text(column + 0.47, row + 0.4, rank, color="white", ha="center", va="center", fontsize=15)
for stage in range(4):
    ax.text(stage * 2.4 + 0.97, 2.05, f"stage {stage}", ha="center", va="bottom")
ax.annotate("", (1.8, -0.18), (0.1, -0.18), arrowprops={"arrowstyle": "<->"})
ax.text(0.95, -0.25, "tensor", ha="center", va="top")
ax.annotate("", (-0.25, 1.7), (-0.25, 0.1), arrowprops={"arrowstyle": "<->"})
ax.text(-0.35, 0.9, "data", ha="right", va="center", rotation=90)
ax.annotate("", (9.2, -0.18), (2.4, -0.18), arrowprops={"arrowstyle": "->"})
ax.text(5.8, -0.25, "pipeline", ha="center", va="top")
ax.axvline(4.57, color="0.3", ls="--", lw=1)
ax.text(4.65, 2.4, "node border", color="0.3")
ax.set(xlim=(-0.9, 9.4), ylim=(-0.6, 2.6), xticks=[], yticks=[])
ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# What talks most lies closest: tensor groups are neighbours, data groups lie within a stage,
# pipelines reach across nodes. A myth: "adjacent ranks are data-parallel peers". Ranks 0 and 2 are.
#
# The example is that of Megatron-LM's own documentation. Context parallelism (`cp`) goes between
# tensor and data: `megatron_groups(..., cp=2)`.
#
# **Exercise.** `parallel_groups`
#
# <!-- notes: Have somebody read out one group of each kind and point at it. The border between
# nodes is crossed by the long arrow only. `parallel_groups` is for the laboratory, 15 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("parallel_groups")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** Why not tensor parallelism over all 16? One all-reduce of a layer's stream, and one
# message, within a node and across two:


# %% slideshow={"slide_type": "skip"}
def all_reduce_seconds(comm):
    comm.all_reduce(torch.zeros(4096, 8192, dtype=torch.bfloat16))
    return comm.now_seconds


def send_seconds(comm):
    if comm.rank in (0, comm.size - 1):
        stream = torch.zeros(4096, 8192, dtype=torch.bfloat16)
        comm.send(stream, comm.size - 1) if comm.rank == 0 else comm.recv(stream, 0)
    return comm.now_seconds


# %% slideshow={"slide_type": "fragment"}
rows = [("ranks", "all-reduce of the stream", "sending it to the last rank")]
for n in (8, 16):
    reduced, sent = (run(n, act, hardware=DGX_H100, shapes_only=True).results[0]
                     for act in (all_reduce_seconds, send_seconds))  # fmt: skip
    rows.append((n, f"{reduced * 1e3:.2f} ms", f"{sent * 1e3:.2f} ms"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Tensor parallelism pays the first column four times in each layer and step, a pipeline the second
# twice for each stage and micro-batch.
#
# <!-- notes: Three minutes. At first sight the second row says the opposite: sending takes 1.35 ms,
# the sum 0.43. Let them multiply by how often: for ten layers in a stage 40 sums, 17 ms, beside two
# messages, 2.7 ms. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Smaller stages, split backwards
#
# **Question.** Two ideas against the bubble: give each rank v smaller stages, or note that of a
# backward's two products only one is awaited by anybody. Which is which below?
#
# <!-- notes: Four minutes. Ask first which of dx and dW the previous stage waits for. Then let them
# find the two ideas in the figure by its colours: pale boxes are second stages, orange ones are dW.
# -->

# %% slideshow={"slide_type": "subslide"}
fig, axes = plt.subplots(3, 1, figsize=(9.5, 6.0), sharex=True)
schedules = (one_f_one_b(4, 8), interleaved(4, 8, 2), zero_bubble_h1(4, 8))
for ax, schedule in zip(axes, schedules, strict=True):
    end = draw(ax, schedule, 34)
    kept = max(in_flight(schedule, 0)) / schedule.num_chunks
    ax.set_title(f"{schedule.name}: {end:.1f} units, of which 24 computing; "
                 f"rank 0 keeps {kept:g} micro-batches", fontsize=12)  # fmt: skip
axes[-1].set_xlabel("time; blue: forward, green: backward, orange: weights; pale: second stage")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Interleaving divides the bubble by v, for v times the messages and some memory. Zero bubble
# (ZB-H1) computes $dx$ at once, which the previous stage awaits, and $dW$ when there is nothing
# else to do: a third of the bubble, at 1F1B's memory.
#
# <!-- notes: Bubbles of 9, 4.5 and 3 units after 24 of computing. Ask for the prices: 5.5
# micro-batches kept in place of 4 for the second, and twice the messages; for the third nothing in
# this picture. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# All give real gradients:
#
# <!-- notes: The order of actions changes no gradient beyond rounding. On the clock the formulas'
# tie is broken: GPipe 0.393, 1F1B 0.422. Look in section 4's picture for the places at which 1F1B
# waits for a neighbour's message. -->

# %% slideshow={"slide_type": "fragment"}
for make in (gpipe, one_f_one_b, lambda p, m: interleaved(p, m, 2), zero_bubble_h1):
    done = run(2, pipelined, make)
    print(f"{make(2, 4).name:12} largest relative error: {largest_error(done.results):.0e}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# And on the clock, with counted FLOPs instead of units: stages of linear layers, four ranks, eight
# micro-batches.


# %% slideshow={"slide_type": "skip"}
def on_the_clock(comm, schedule, width=8192):
    per_stage = 8 // schedule.num_chunks
    stages = [
        nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(per_stage)))
        for _ in range(schedule.num_chunks)
    ]
    x = torch.empty(schedule.num_micro * 1024, width, requires_grad=True)
    square = lambda y, t: (y - t).square()  # noqa: E731
    Pipeline(comm, stages, schedule, square, like=torch.empty_like).step(x, x.detach())


rows = [("schedule", "bubble on the clock", "formula")]
for schedule in (gpipe(4, 8), *schedules):
    trace = run(4, on_the_clock, schedule, shapes_only=True).trace
    busy = trace.busy_seconds(1)
    v = schedule.num_chunks
    formula = 3 / 8 / 3 if schedule.is_split else bubble_fraction(4, 8, v)
    rows.append((schedule.name, f"{(trace.seconds - busy) / busy:.3f}", f"{formula:.3f}"))

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The clock is a little above the formulas: messages take time on NVLink as well, and formulas have
# none.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Megatron beside DeepSpeed
#
# **Question.** Eight GPUs of one node and a two-layer Llama of 32,000 tokens, eight rows of 2,048
# tokens. Megatron's way: tensor 4 x pipeline 2, sequence parallel, selective recomputation.
# DeepSpeed's: ZeRO-3, a row on each rank. Which sends less, which holds less, which is faster?
#
# <!-- notes: Two minutes. Three votes, then the table: 1.04 against 2.82 GB, 0.52 against 2.63 GB,
# 7.7 against 8.0 ms. Ask for what is unfair, before the text says it. End of the first part: nobody
# can keep all these trades in mind, so let a program do it. -->

# %% slideshow={"slide_type": "fragment"}
LARGE = LlamaConfig(
    vocab_size=32_000, dim=2048, hidden_dim=5632, num_layers=2, num_heads=16, max_seq_len=2048
)


def megatron(comm):
    mesh = comm.mesh(pp=2, tp=4)
    model = parallelize(Llama(LARGE), mesh.tp, sequence_parallel=True)
    stages = split_llama(model, mesh.pp.rank, 2, recompute="selective")
    rows_ = torch.zeros(8, 2048, dtype=torch.long)
    comm.memory.reset_peak()
    loss = lambda y, t: vocab_parallel_cross_entropy(y, t, mesh.tp)  # noqa: E731
    Pipeline(mesh.pp, stages, one_f_one_b(2, 8), loss).step(rows_, rows_)


def deepspeed(comm):
    model = Llama(LARGE)
    fsdp = FSDP(model, comm, model.layers)
    rows_ = torch.zeros(1, 2048, dtype=torch.long)
    comm.memory.reset_peak()
    F.cross_entropy(fsdp(rows_).flatten(0, 1).float(), rows_.flatten()).backward()


rows = [("", "step", "sent by a rank", "activations at most")]
for name, program in (("TP 4 x PP 2", megatron), ("ZeRO-3", deepspeed)):
    trace = run(8, program, shapes_only=True).trace
    sent = max(trace.total(rank=r).wire_bytes for r in range(8)) / 1e9
    peak = max(use.peak["activations"] for use in trace.memory().values()) / 1e9
    rows.append((name, f"{trace.seconds * 1e3:.1f} ms", f"{sent:.2f} GB", f"{peak:.2f} GB"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Not like for like: ZeRO-3 here recomputes nothing, and its batch could be larger. But the pattern
# is general. ZeRO-3 sends parameters, however few the tokens; tensor parallelism sends activations,
# and divides them. Few tokens and large layers favour the one, many tokens the other.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Planning
#
# Five axes, four ZeRO stages, four schedules, recomputation or not: a 70B Llama on 64 GPUs can be
# laid out in thousands of ways.
#
# **Question.** A step of 256 sequences of 4,096 tokens. How many layouts fit into 80 GB, and how
# much faster is the best than the worst of those?
#
# <!-- notes: Eighteen minutes for the section. Let each write down two numbers, and a plan of their
# own for 70B on 64 GPUs; they will need it twice. Usual guesses: a dozen fit, and ten times. It is
# 758, and 3.8 times. In the picture, most of the cloud lies between 20 and 35 seconds. -->

# %% slideshow={"slide_type": "skip"}
from collections import Counter

from reference.parallel.planner import (
    Batch,
    Plan,
    h100_cluster,
    llama_shape,
    memory_bytes,
    published_runs,
    rank_plans,
    step_seconds,
    weigh,
)
from reference.transformer import PRESETS

# %% slideshow={"slide_type": "fragment"}
LLAMA_70B, NODES = llama_shape(PRESETS["llama-3.1-70b"]), h100_cluster(64)
BATCH = Batch(256, 4096)
ranking = rank_plans(LLAMA_70B, NODES, BATCH)
weighed = [v for v in ranking.rejected if v.memory is not None]
sizes = [v.memory.total / 1e9 for v in weighed]
fig, ax = plt.subplots(figsize=(9, 3.6))
ax.scatter([v.memory.total / 1e9 for v in ranking.fitting],
           [v.time.total for v in ranking.fitting], s=14, color=style.COLOURS["blue"],
           alpha=0.5)  # fmt: skip
best = ranking.best
ax.plot(best.memory.total / 1e9, best.time.total, "o", ms=11, mfc="none", mew=2.5,
        color=style.COLOURS["vermilion"])  # fmt: skip
ax.axvline(NODES.usable_bytes / 1e9, color="black", ls=":")
ax.set(xlabel="memory of the fullest GPU (GB)", ylabel="seconds of a step",
       xlim=(0, 82), ylim=(0, 70))  # fmt: skip
ax.set_title("plans that fit; the fastest in the circle, dotted: what a GPU has")
plt.show()
slowest = ranking.fitting[-1].time.total
print(f"{len(ranking.fitting)} fit, {len(ranking.rejected)} do not")
print(f"the slowest that fits takes {slowest / best.time.total:.1f} times as long as the best")
print(f"memory of those that do not: {min(sizes):.0f} to {max(sizes):,.0f} GB")
print(f"the best: {best.plan}\n  {best.time}\n  {best.memory}")

# %% [markdown] slideshow={"slide_type": "slide"}
# The planner adds up what chapters 11 to 15 derived. Per GPU, with $P$ parameters after tensor and
# pipeline parallelism have divided them, $n$ = DP x CP:
#
# $$\begin{aligned}
# \text{bytes} = \; & 2P + 2P + 12P \\
# & + k \cdot \text{layers} \cdot a(b, s, h, t, c) \\
# & + \text{logits}
# \end{aligned}$$
#
# each of the first three over n from its ZeRO stage on, with k micro-batches in flight, and
#
# $$\begin{aligned}
# \text{step} = \; & m \, T_{\text{slowest stage}} + \tfrac{1}{v} \sum_{\text{others}} T \\
# & + \text{late gradients} + \text{optimizer}
# \end{aligned}$$
#
# A stage's $T$: products at the rate that products reach, element-wise kernels by the bytes they
# move, tensor parallelism's all-reduces in between.
#
# <!-- notes: Three minutes. Name for each term the chapter it comes from: 2 + 2 + 12 is chapter 12,
# a(...) chapters 13 and 14, k is 1F1B's p - rank, 1/v interleaving. Ask what is missing:
# stragglers, failures, a software that does not overlap. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** Which of these plans fit? Of those that fit: where does the time go?
#
# <!-- notes: Write the nine names on the board and let them cross out what does not fit. DDP goes
# at once; 140 GB for ZeRO-3 surprises, as its states are divided by 64. It is the activations: the
# last line of chapter 12. GPipe 458 GB, 1F1B 36. -->

# %% slideshow={"slide_type": "skip"}
megatron_way = {"tensor": 8, "sequence_parallel": True, "zero_stage": 1}
CHOSEN = {
    "DDP": Plan(data=64),
    "ZeRO-2, offload": Plan(data=64, zero_stage=2, is_offloaded=True),
    "ZeRO-3": Plan(data=64, zero_stage=3),
    "ZeRO-3, full recomputation": Plan(data=64, zero_stage=3, recompute="full"),
    "TP 8": Plan(data=8, **megatron_way),
    "TP 16: two nodes": Plan(data=4, **megatron_way | {"tensor": 16}),
    "TP 8 x PP 4, GPipe": Plan(data=2, pipeline=4, schedule="GPipe", **megatron_way),
    "TP 8 x PP 4, 1F1B": Plan(data=2, pipeline=4, **megatron_way),
    "the best": best.plan,
}
verdicts = {name: weigh(plan, LLAMA_70B, NODES, BATCH) for name, plan in CHOSEN.items()}
rows = [("", "GB", "step (s)", "MFU", "why not")]
for name, v in verdicts.items():
    step = (f"{v.time.total:.1f}", f"{v.mfu:.0%}", "") if v.fits else ("", "", "memory")
    rows.append((name, f"{v.memory.total / 1e9:.0f}", *step))

# %% slideshow={"slide_type": "fragment"}
table(*rows)
print("\nGPipe's", verdicts["TP 8 x PP 4, GPipe"].reasons[0].removesuffix(" usable"))

# %% slideshow={"slide_type": "subslide"}
CAUSES = {"compute": "blue", "recompute": "sky", "tensor": "orange", "bubble": "purple",
          "messages": "green", "data": "vermilion", "optimizer": "black"}  # fmt: skip
fitting = {name: v.time for name, v in verdicts.items() if v.fits}
fig, ax = plt.subplots(figsize=(9.5, 3.0))
for row, step in enumerate(fitting.values()):
    left = 0.0
    for cause, colour in CAUSES.items():
        seconds = getattr(step, cause)
        ax.barh(row, seconds, left=left, color=style.COLOURS[colour],
                label=cause if row == 0 else None)  # fmt: skip
        left += seconds
ax.set(yticks=range(len(fitting)), xlabel="seconds of a step")
ax.set_yticklabels(fitting)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Tensor parallelism is not free, and across nodes it is dear. GPipe fails where 1F1B fits, with the
# same bubble. And the plan that wins mixes what none of the textbooks' rows mixes.
#
# <!-- notes: Blue is nearly the same for all five; read the colours beside it. Orange grows from TP
# 8 to TP 16 although each rank has less to compute: the node's border. Ask what the winner pays in
# exchange: black, the optimizer on the host. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *first_rank_bytes* (15 minutes, 2 of 3): the memory of a pipeline's first rank.

# %% slideshow={"slide_type": "skip"}
check("first_rank_bytes")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise** *fastest_plan* (40 minutes, 3 of 3, challenge): a small planner of your own, for
# tensor, pipeline and data parallelism.
#
# <!-- notes: Both for home, 15 and 40 minutes. The second is the course's last challenge; a good
# group project. -->

# %% slideshow={"slide_type": "skip"}
check("fastest_plan")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** Llama-3.1-405B on 16,384 GPUs, 16 million tokens a step, in sequences of 8,192 and
# then of 131,072. Llama 3's own answer: TP 8, PP 16 for both, and CP 16 for the long ones. Ours?
#
# <!-- notes: Four minutes. Only compare line by line with Llama 3's answer: TP 8 agrees, PP 8 is
# not 16, and for long texts ZeRO-3 in place of a pipeline. Ask which of these differences they
# would believe, and what to measure first. -->

# %% slideshow={"slide_type": "skip"}
LLAMA_405B, LARGE_CLUSTER = llama_shape(PRESETS["llama-3.1-405b"]), h100_cluster(16_384)
answers = [
    (batch_, rank_plans(LLAMA_405B, LARGE_CLUSTER, batch_, max_context=max_context))
    for batch_, max_context in ((Batch(2048, 8192), 1), (Batch(128, 131_072), 16))
]

# %% slideshow={"slide_type": "fragment"}
for batch_, found in answers:
    why = Counter(reason.split(":")[0] for v in found.rejected for reason in v.reasons)
    lacking = ", ".join(f"{cause} {count}" for cause, count in why.most_common(2))
    print(f"{batch_.seq_len:,} tokens: {found.best.plan}, MFU {found.best.mfu:.0%}")
    print(f"    {found.best.time}\n    {found.best.memory}")
    print(f"    {len(found.fitting)} plans fit; what the others lack: {lacking}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Eight tensor ranks, as theirs. Where we differ, the reasons can be read off. We recompute whole
# layers; Llama 3 freed tensors early and trained on 8,192 tokens without (its sec. 3.3.2). For long
# sequences we find ZeRO-3, whose traffic hides behind 131,072 tokens if prefetch is perfect. The
# next section says how far to trust that.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. The planner against published runs
#
# A planner that nobody compares with a real machine is a story. The plans of 114 published runs
# have their step times beside them: Megatron's tables up to 3,072 A100 and a trillion parameters,
# MosaicML's FSDP tables on A100 and H100, Llama 3.
#
# Two numbers for each GPU, the share of the peak that products and attention reach, were chosen on
# the 32 runs of MPT 1B and 7B. Nothing was fitted on the other 82.
#
# **Question.** For how many of those 82 is the step within 15 %?
#
# <!-- notes: Nine minutes. Let them bet a number; write the bets down. Insist on the word "held
# out": two numbers a GPU were chosen on 32 other runs. The table adds up to 68 of 82. Then ask
# which group they would have expected to fail. -->

# %% slideshow={"slide_type": "fragment"}
runs = published_runs()
planned = {r: step_seconds(r.model, r.plan, r.cluster, r.batch).total for r in runs}
error = {r: planned[r] / r.seconds - 1 for r in runs}
GROUPS = {
    "Megatron": lambda r: r.source[0] in "NK" and r.plan.zero_stage == 0,
    "ZeRO-3, 2021": lambda r: r.source[0] == "N" and r.plan.zero_stage == 3,
    "Llama 3": lambda r: r.source.startswith("Llama"),
    "MPT, A100": lambda r: r.source == "MPT, A100" and not r.is_calibration,
    "MPT, H100": lambda r: r.source == "MPT, H100" and not r.is_calibration,
}
fig, ax = plt.subplots(figsize=(9, 3.5))
ends = (0.5, 400)
ax.fill_between(ends, [0.85 * x for x in ends], [1.15 * x for x in ends], color="0.9", zorder=0)
rows = [("held out", "runs", "within 15 %", "median error", "worst")]
for (name, belongs), marker in zip(GROUPS.items(), "osD^v", strict=True):
    group = [r for r in runs if belongs(r)]
    ax.plot([r.seconds for r in group], [planned[r] for r in group], marker, ms=6, alpha=0.8,
            label=name, ls="none")  # fmt: skip
    errors = sorted((error[r] for r in group), key=abs)
    rows.append((name, len(group), sum(abs(e) < 0.15 for e in errors),
                 f"{errors[len(errors) // 2]:+.0%}", f"{errors[-1]:+.0%}"))  # fmt: skip
ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published seconds of a step",
       ylabel="planned seconds")  # fmt: skip
ax.legend(loc="upper left", title="grey: within 15 %")
plt.show()
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# All 26 layouts of Megatron are within 15 %, from 8 GPUs to 3,072: what a tensor group, a pipeline
# and recomputation cost follows from counts. Where the planner fails, it fails in ways worth
# knowing:
#
# - **ZeRO-3 in 2021** took up to five times as long as planned. We let prefetch hide the gathering
#   wherever bandwidth allows; that software did not. FSDP two years later (MPT) is as planned.
# - **Llama 3** is faster than planned, most of all at 131,072 tokens: its attention kernel on H100
#   is not that of the runs which chose our two numbers.
# - A micro-batch or a number of chunks that a paper does not print had to be assumed:
#   `run.notes` says which.
#
# <!-- notes: The failures are the lesson. Orange squares lie far below the grey band: planned too
# fast, since the planner assumes that prefetch hides. Ask for a number which somebody could measure
# in an afternoon to decide it. -->

# %% slideshow={"slide_type": "skip"}
rows = [("Megatron's runs", "GPUs", "published (s)", "planned", "error")]
shown = [r for r in runs if r.source in ("Narayanan, table 1", "Korthikanti, table 5")]
for one in shown:
    rows.append((one.name, one.plan.num_gpus, f"{one.seconds:.2f}", f"{planned[one]:.2f}",
                 f"{error[one]:+.1%}"))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# Run by run: Narayanan et al. 2021, table 1, and Korthikanti et al. 2022, table 5.

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Memory.** ZeRO's table 1 is the formula itself (54 cells, all within a unit of the last digit).
# A harder test: what torchtitan measured on 8 H100 for Llama 3.1 8B with FSDP, context parallelism
# and full recomputation.
#
# <!-- notes: Ask first what fills 84 GiB of an 8B model that is sharded and recomputed. Parameters?
# Activations? It is the logits, 55 GiB. Then why all four rows are planned alike: positions on a
# rank are, chapter 14's lesson. -->

# %% slideshow={"slide_type": "skip"}
LLAMA_8B = llama_shape(PRESETS["llama-3.1-8b"])
rows = [("positions", "FSDP", "CP", "measured (GiB)", "planned", "error")]
for data, context, measured in ((8, 1, 83.9), (4, 2, 84.2), (2, 4, 84.0), (1, 8, 84.5)):
    plan = Plan(data=data, context=context, zero_stage=3, recompute="full")
    batch_ = Batch(data, 32_768 * context)
    ours = memory_bytes(LLAMA_8B, plan, batch_).total / 2**30
    rows.append((f"{batch_.seq_len:,}", data, context, measured, f"{ours:.1f}",
                 f"{ours / measured - 1:+.1%}"))  # fmt: skip
logits = 14 * 32_768 * LLAMA_8B.vocab_size / 2**30

# %% slideshow={"slide_type": "fragment"}
table(*rows)
print(f"\nof which the loss: {logits:.0f} GiB, 14 bytes for each of 128,256 logits a token")

# %% [markdown] slideshow={"slide_type": "fragment"}
# For the planner these four are one: each rank has 32,768 positions. More than half of the GPU is
# logits. Recomputing layers cannot help there; a fused or chunked loss can. Their 70B on 256 GPUs
# (71.9 GiB) we miss by more than a third: what tensor parallelism keeps there is not in our count.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Which strategy when
#
# | situation | take | because |
# |---|---|---|
# | 16 bytes x parameters fit beside the activations | DDP, or ZeRO-1 at once | the same traffic |
# | states do not fit, many tokens a GPU | ZeRO-3 / FSDP | parameters hide behind compute |
# | few tokens a GPU | tensor parallelism, then ZeRO-1 | sends activations, not parameters |
# | one layer's activations too large | TP + sequence parallelism | all 34 bytes divided |
# | more than a node's TP is needed | pipeline, never TP over the network | one stream a stage |
# | bubble over 10 % | more micro-batches, interleaving | (p - 1) / (v m) |
# | long sequences | context parallelism | positions divided, keys go round |
# | still too large | recomputation, offload | a third more time; host's bandwidth |
#
# In this order: TP up to a node only as far as memory asks; CP as sequences ask; PP as few stages
# as possible; DP with the rest; ZeRO-1 always. Then measure.
#
# **Question.** Does the planner agree with the table?
#
# <!-- notes: Six minutes. Do not read the table aloud. Give the six situations of the next page one
# by one, and let the room find the row. Remind them of their own plan for 70B on 64 GPUs. -->

# %% slideshow={"slide_type": "skip"}
SITUATIONS = {
    "135M, 8 GPUs": ("smollm2-135m", 8, Batch(512, 2048), 1),
    "8B, 8 GPUs": ("llama-3.1-8b", 8, Batch(64, 8192), 1),
    "70B, 8 GPUs": ("llama-3.1-70b", 8, Batch(64, 4096), 1),
    "70B, 64 GPUs": ("llama-3.1-70b", 64, BATCH, 1),
    "405B, 1,024 GPUs": ("llama-3.1-405b", 1024, Batch(512, 8192), 1),
    "8B, 64 GPUs, 2^20 tokens": ("llama-3.1-8b", 64, Batch(4, 2**20), 64),
}
rows = [("", "fit", "fastest", "MFU")]
for name, (model_name, gpus, batch_, max_context) in SITUATIONS.items():
    found = rank_plans(llama_shape(PRESETS[model_name]), h100_cluster(gpus), batch_,
                       max_context=max_context)  # fmt: skip
    rows.append((name, len(found.fitting), str(found.best.plan), f"{found.best.mfu:.0%}"))

# %% slideshow={"slide_type": "subslide"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Mostly. The small model needs data parallelism alone (its ZeRO stages tie), the long text context
# parallelism, 70B on one node the host's memory. Where ZeRO-3 wins over many nodes, remember which
# runs the planner had too fast, and measure.
#
# <!-- notes: Ask where planner and table disagree: no pipeline anywhere, though the table asks for
# one beyond a node. Section 11 said how it errs with ZeRO-3. That is how to use a planner: as a
# second opinion with a known bias. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Proof against production
#
# Two real processes: PyTorch's `Schedule1F1B` and ours on the same stages.
#
# <!-- notes: For reading. In class one line: the difference is zero, not small. Same stages, same
# order of micro-batches, so the same sums. Ask what would differ with another schedule. -->


# %% slideshow={"slide_type": "skip"}
def beside_torch(comm):
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        (stage,) = split_llama(new_model(), comm.rank, comm.size)
        wrapped = PipelineStage(stage, comm.rank, comm.size, torch.device("cpu"))
        theirs = Schedule1F1B(wrapped, 4, loss_fn=loss_of)
        theirs.step(inputs) if comm.rank == 0 else theirs.step(target=targets)
    _, ours, _ = pipelined(comm, one_f_one_b)
    return max(
        ((ours[n.removeprefix("model.")] - p.grad).norm() / p.grad.norm()).item()
        for n, p in stage.named_parameters()
    )


# %% slideshow={"slide_type": "fragment"}
errors = run(2, beside_torch, backend="processes", is_measured=False).results
print(f"largest relative difference from PyTorch's 1F1B: {max(errors):.0e}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests go on: GPipe, interleaved and zero-bubble schedules of PyTorch, recomputation against
# `torch.utils.checkpoint` bit for bit, tied embeddings; and random meshes of pipeline x data x
# tensor parallelism with ZeRO stages against one rank.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Published figures, recomputed
#
# Each row: what a paper prints, and what schedules and formulas of this chapter give.
#
# <!-- notes: For reading. If somebody asks how one notices such things: 400 of 989.5 is 40.4 %, a
# division that takes ten seconds. Recommend it for every table they read. -->


# %% slideshow={"slide_type": "fragment"}
def simulated_bubble(make, p, m, seconds=None):
    units = sum(seconds.values()) if seconds else 3.0
    end = max(t.end_seconds for t in simulate(make(p, m), seconds))
    return (end - units * m) / units


# Llama 3, table 4: GPUs, tensor, context, pipeline, data, TFLOP/s a GPU
LAYOUTS = ((8192, 8, 1, 16, 64, 430, 43), (16384, 8, 1, 16, 128, 400, 41),
           (16384, 8, 16, 16, 8, 380, 38))  # fmt: skip
TABLE_5 = ((22e9, 2048, 6144, 64), (175e9, 2048, 12288, 96), (530e9, 2048, 20480, 128))
split = {"F": 1.0, "B": 1.0, "W": 1.0}
table(
    ("", "published", "here"),
    ("bubble (p, m) = (4, 8), (8, 32), (8, 64)", "(p-1)/m",
     ", ".join(f"{simulated_bubble(one_f_one_b, p, m) / m:.6g}"
               for p, m in ((4, 8), (8, 32), (8, 64)))),
    ("1F1B, T_F = T_B = T_W, p = 4 (in T)", "9",
     f"{3 * simulated_bubble(one_f_one_b, 4, 8, {'F': 1.0, 'B': 2.0, 'W': 0.0}):g}"),
    ("ZB-H1, the same", "3", f"{3 * simulated_bubble(zero_bubble_h1, 4, 8, split):g}"),
    ("micro-batches kept: GPipe, 1F1B, m = 32, p = 8", "m, p",
     f"{peak_in_flight(gpipe(8, 32), 0)}, {peak_in_flight(one_f_one_b(8, 32), 0)}"),
    ("GPUs of Llama 3's layouts, tp cp pp dp", "8192, 16384, 16384",
     ", ".join(str(t * c * p * d) for _, t, c, p, d, *_ in LAYOUTS)),
    ("their utilisation of 989.5 TFLOP/s", "43, 41, 38 %",
     ", ".join(f"{100 * flops / 989.5:.1f} %" for *_, flops, _ in LAYOUTS)),
    ("stream kept by output tensors, 530B, p = 35", "2.73 GB",
     f"{2 * 2048 * 20480 * 35 / 2**30:.3f} GiB"),
    ("full recomputation: FLOPs", "a third more", f"{4 / 3:.2f} x"),
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Llama 3's second layout is printed as 41 %: 400 of 989.5 TFLOP/s are 40.4 %. And the 530B model's
# gigabytes are binary ones.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. What breaks in practice
#
# - **The loss divided twice, or not at all**: by the micro-batch's rows, and by m.
# - **An update for each micro-batch**: those under way go back through other weights than they
#   came.
# - **A stage that is slower** than the others (embedding, head) sets the pace for all. Give it
#   fewer layers.
# - **Tied embeddings** live on the first and the last stage: their gradients are summed.
# - **Batches that do not divide**:
#
# <!-- notes: Three minutes in the laboratory. For each line: what would you see? Loss divided twice
# looks like a small learning rate; an update for each micro-batch trains; a slow stage is a slow
# run. Only the last one speaks. -->

# %% slideshow={"slide_type": "fragment"}
try:
    run(2, pipelined, gpipe, 3)
except ValueError as error:
    print(str(error).split("\n")[0])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A mean of micro-batches' means: where texts count different
# numbers of tokens, those of short ones weigh more (transformers #34191; torchtitan #2206, with
# pipelines and ranks). Count the tokens of the whole step first; each part gives its share.
#
# <!-- notes: Let them compute by hand: two micro-batches, one token with loss 4, three with loss 2.
# 3 or 2.5? Then where else in this course a mean of means is hidden: ranks of DDP, parts of a text
# in chapter 14, accumulation. Users saw a loss that rose with the number of micro-batches. -->

# %% slideshow={"slide_type": "fragment"}
unequal = targets.clone()
for row in range(8):
    unequal[row, : 4 * row] = -100  # 32 - 4 row tokens of a row count


def counted(comm):
    stages = split_llama(new_model(), comm.rank, comm.size)
    return Pipeline(comm, stages, gpipe(comm.size, 4), losses_of).step(inputs, unequal)


with torch.no_grad():
    logits = new_model()(inputs)
means = [loss_of(*part) for part in zip(logits.chunk(4), unequal.chunk(4), strict=True)]
print(f"all tokens together {loss_of(logits, unequal):.3f}")
print(f"mean of four means  {sum(means) / 4:.3f}")
print(f"our pipeline        {run(2, counted).results[1]:.3f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16. Summary
#
# - A pipeline sends little and waits: (p - 1)/m of its computing, under GPipe and 1F1B alike.
# - 1F1B keeps p - rank micro-batches instead of m. Interleaving divides the bubble by v, zero
#   bubble puts weights where ranks would wait.
# - More micro-batches mean less bubble and more overhead.
# - Recomputation: a third more time for a fraction of the memory, with the same random numbers.
# - Tensor groups within a node, then data, pipelines across nodes.
# - Counts of bytes, FLOPs and links give the steps of Megatron's runs within 15 %; what software
#   does not hide, and kernels do not reach, has to be measured.
#
# **Further reading.** Huang et al. 2018, *GPipe* (arXiv 1811.06965); Narayanan et al. 2021,
# *Efficient Large-Scale Language Model Training* (arXiv 2104.04473); Qi et al. 2024, *Zero Bubble
# Pipeline Parallelism* (arXiv 2401.10241); Korthikanti et al. 2022 (arXiv 2205.05198).
#
# <!-- notes: Students should be able to draw 1F1B for p = 4, derive (p - 1)/m, and defend a layout.
# There is no next chapter. The last hour is theirs: groups get a model, a cluster and a deadline,
# defend a plan, and let the planner judge. Where is it wrong, and how would one know? -->
