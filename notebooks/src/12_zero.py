# %% [markdown] slideshow={"slide_type": "slide"}
# # 12 ZeRO and FSDP
#
# Data parallelism gives each rank other rows and the same model. Eight ranks then hold the same
# weights, the same gradients and the same optimizer states eight times. What for?
#
# In this chapter you take the copies away one after the other: first the optimizer's, then the
# gradients', then the parameters' themselves. You count what each step saves in memory and costs in
# traffic, on ranks that keep exact books, and prove the result equal to PyTorch's `fully_shard`,
# bit for bit.
#
# You need: chapter 11 (collectives, DDP); chapter 10 helps (why 16 bytes a parameter).
#
# <!-- notes: 75 minutes: 40 for sections 1 to 6, 35 for 7 to 12. Sections 13 to 15 are for reading;
# keep two minutes for the summary. Start with the question "What for?" and let it stand. Write 2 +
# 2 + 12 on the board and leave it there: every stage crosses out a part of it. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 2 GB of memory are enough; ranks are simulated. The slow
# > cells: a step of Llama-3.1-405B by shapes alone (section 14, about 20 seconds; take
# > `NUM_LAYERS = 8`), and the two real processes of section 13.

# %% slideshow={"slide_type": "skip"}
import dataclasses
import json
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.lora import LoRAConfig, add_adapter
from reference.parallel.ranks import CLASSROOM, run, run_one_rank
from reference.parallel.zero import (
    FSDP,
    FlatLayout,
    MixedPrecision,
    Zero,
    clip_shards,
    cross_host_bytes,
    elements_sent,
    load_sharded,
    model_states_bytes,
    save_sharded,
)
from reference.pretrained import passage
from reference.transformer import PRESETS, Llama, LlamaConfig
from reference.transformer.optimizer import decay_groups

torch.set_num_threads(1)
style.use()
COLOUR = {
    "parameters": style.COLOURS["blue"],
    "gradients": style.COLOURS["orange"],
    "optimizer_states": style.COLOURS["green"],
    "activations": style.COLOURS["sky"],
    "communication_buffers": style.COLOURS["vermilion"],
}
STATES = ("parameters", "gradients", "optimizer_states")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. The same thing N times
#
# **Question.** A small Llama in bfloat16 with AdamW in float32, trained data-parallel on a page of
# English. The batch is divided among 1, 2 or 8 ranks. What does each rank hold?
#
# <!-- notes: Five minutes. Let them sketch the curve of memory over N before the cell runs. Most
# draw 1/N, since the batch is divided. Ask what of the 16 bytes depends on the batch: nothing.
# Activations do, and this table does not count them; promise section 11. -->

# %% slideshow={"slide_type": "skip"}
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
tokens = letters[: 16 * 33].view(16, 33)  # 16 rows


def new_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Llama(CONFIG).to(dtype)


def loss_of(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())


def rows_of(comm):
    return tokens.chunk(comm.size)[comm.rank]


# %% slideshow={"slide_type": "skip"}
def two_steps(comm, stage, **options):
    """What the rank holds between backward and step, and what it sends in a step."""
    model = new_model(torch.bfloat16)
    zero = Zero(model, comm, stage, torch.optim.AdamW, **options)
    for _ in range(2):
        comm.traffic.reset()
        loss_of(model, rows_of(comm)).backward()
        if stage == 2:
            zero.reduce_gradients()  # those of the last bucket
        held = comm.memory.use.current
        zero.step()
    return held, comm.traffic.total().wire_bytes, comm.memory.use.peak


# %% slideshow={"slide_type": "fragment"}
num_parameters = sum(p.numel() for p in new_model().parameters())
held = {n: run(n, two_steps, 0).results[0][0] for n in (1, 2, 8)}
table(("ranks", *STATES, "bytes a parameter"),
      *((n, *(f"{h[s]:,}" for s in STATES), sum(h[s] for s in STATES) / num_parameters)
        for n, h in held.items()))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Sixteen bytes a parameter, however many ranks there are: 2 of weight, 2 of gradient, 12 of
# optimizer (float32 weight, momentum, variance). A model of 7.5 billion parameters needs 120 GB on
# *each* GPU of 80 GB, and a thousand GPUs change nothing.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. What each stage keeps
#
# **Idea.** N ranks have room for one copy, cut into N parts. ZeRO (Rajbhandari et al. 2020) removes
# copies in three stages, the largest and least often used first:
#
# | stage | sharded | bytes a rank |
# |---|---|---|
# | 0 | nothing (DDP) | $(2 + 2 + 12)P$ |
# | 1 | optimizer states | $(2 + 2)P + 12P/N$ |
# | 2 | and gradients | $2P + (2 + 12)P/N$ |
# | 3 | and parameters | $(2 + 2 + 12)P/N$ |
#
# Now from the ledgers, not from the formula: the same Llama, four ranks, stages 0 to 3.
#
# <!-- notes: Six minutes. Before the figure, have them put N = 4 into the four rows: 16, 7, 5.5, 4.
# Ask why the optimizer's states go first: they are 12 of the 16 bytes, and only the step reads
# them. N to infinity gives the floors 4, 2 and 0 of section 11. -->

# %% slideshow={"slide_type": "skip"}
found = {stage: run(4, two_steps, stage).results[0] for stage in (0, 1, 2)}


def fsdp_states(comm):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers, precision=MixedPrecision(torch.bfloat16))
    optimizer = torch.optim.AdamW(fsdp.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        comm.traffic.reset()
        loss_of(fsdp, rows_of(comm)).backward()
        held = comm.memory.use.current
        optimizer.step()
    return held, comm.traffic.total().wire_bytes


found[3] = run(4, fsdp_states).results[0]

# %% slideshow={"slide_type": "subslide"}
fig, ax = plt.subplots(figsize=(8, 4))
for i, result in enumerate(found.values()):
    left = 0.0
    for state in STATES:
        width = result[0][state] / num_parameters
        ax.barh(i, width, left=left, color=COLOUR[state], edgecolor="white")
        if width > 0.9:
            ax.text(left + width / 2, i, f"{width:.3g}", ha="center", va="center", color="white")
        left += width
    ax.text(left + 0.2, i, f"{left:.3g}", va="center", fontweight="bold")
for x, state in zip((0.0, 4.2, 10.0), STATES, strict=True):
    ax.text(x, -0.75, state.replace("_", " "), color=COLOUR[state], fontweight="bold")
ax.set(yticks=range(4), yticklabels=[f"stage {s}" for s in found], xlim=(0, 18), ylim=(3.6, -1.1),
       xlabel="bytes a parameter on each of 4 ranks, counted by the memory ledger")  # fmt: skip
ax.grid(axis="y", visible=False)
plt.show()
for stage in (0, 1, 2, 3):
    formula = model_states_bytes(num_parameters, 4, stage).total / num_parameters
    counted = sum(found[stage][0][s] for s in STATES) / num_parameters
    assert abs(counted - formula) < 0.01, (stage, counted, formula)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The stage-3 bar has other proportions: FSDP keeps float32 parts (4 bytes of parameter, 4 of
# gradient, 8 of Adam) and makes the 16-bit copy when it gathers. The same 16 bytes, divided by 4.
#
# **Exercise.** `zero_memory`
#
# <!-- notes: Somebody will ask why blue is as wide as orange at stage 3. Wait for the answer: 4 + 4
# + 8 in place of 2 + 2 + 12. The narrow strip of stage 2 has no number; ask for it (0.5). The
# exercise comes in the laboratory, 8 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("zero_memory")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Stage 1: update a part
#
# **Question.** Adam's update of element 17 needs the gradient of element 17, its momentum, its
# variance. What does a rank that updates only elements 0 to 9 have to know?
#
# <!-- notes: Eight minutes with the next page. Wait for "ten of each, and nothing else": Adam is
# elementwise, so a part needs no neighbour. In the figure the cut between ranks 0 and 1 goes
# through o, the next one through gate. Nobody minds: the optimizer sees a vector. Section 15 says
# which optimizers do mind. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Parameters are laid end to end in one vector, padded to a multiple of N. Where a matrix ends and
# where a rank's part ends have nothing to do with each other. ZeRO's stages do this to this day
# (DeepSpeed), and so did the first FSDP; section 5 shows what today's does.

# %% slideshow={"slide_type": "fragment"}
block = {name: p for name, p in new_model().layers[0].named_parameters()}
layout = FlatLayout(tuple(block), tuple(tuple(p.shape) for p in block.values()), world_size=4)
fig, ax = plt.subplots(figsize=(9, 2.4))
start = 0
for i, (name, numel) in enumerate(zip(layout.names, layout.numels, strict=True)):
    ax.barh(1, numel, left=start, color=list(style.COLOURS.values())[i % 6], edgecolor="white")
    if numel > 3000:
        label = name.split(".")[-2].replace("_proj", "")
        ax.text(start + numel / 2, 1, label, ha="center", va="center", color="white")
    start += numel
for rank in range(4):
    ax.barh(0, layout.shard_numel, left=rank * layout.shard_numel, color="0.82", edgecolor="black")
    ax.text((rank + 0.5) * layout.shard_numel, 0, f"rank {rank}", ha="center", va="center")
ax.set(yticks=(0, 1), yticklabels=("parts", "tensors"), xlabel="element of a block's vector")
ax.grid(visible=False)
plt.show()
print(f"{layout.numel:,} elements, {layout.padded_numel - layout.numel} of padding")

# %% [markdown] slideshow={"slide_type": "slide"}
# The step of stage 1: reduce-scatter the gradients (each rank gets the mean of its part, and
# nothing else), update the part, all-gather the new parameters. An all-reduce *is* a reduce-scatter
# and an all-gather, so the traffic is DDP's.
#
# <!-- notes: Ask for the traffic of stage 1 before the lines appear; a common guess is "more,
# parameters travel too". It is 0.75 + 0.75 in place of 1.50, with N = 4. Chapter 11 built the ring
# of exactly these two halves. -->

# %% slideshow={"slide_type": "fragment"}
for stage in (0, 1):
    rows = run(4, two_steps, stage, is_measured=False).trace.traffic()
    print(f"stage {stage}:", ", ".join(
        f"{row.operation} {row.wire_bytes / 2 / num_parameters:.2f} P"
        for row in rows if row.rank == 0))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `zero1_step`: values, the momentum and the traffic are graded. An all-reduce of
# which you throw three quarters away gives the right values.
#
# <!-- notes: In the laboratory, 20 minutes, the longest of the day. Who all-reduces passes the
# values and fails the traffic: let it happen. -->

# %% slideshow={"slide_type": "skip"}
check("zero1_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Stage 2: gradients leave early
#
# **Question.** At stage 1 a rank uses a part of the gradients, but holds them all. Why not throw
# the rest away?
#
# <!-- notes: Six minutes. The wrong answer is "because others need them": then ask in which form.
# Only in the sum. Draw backward as an arrow from the last layer to the first and mark a bucket on
# it that is complete while the arrow still runs. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# They must be reduced first, and backward makes them from the last layer to the first. So: when all
# gradients of a bucket are there, reduce-scatter the bucket and free it, while backward goes on.


# %% slideshow={"slide_type": "subslide"}
def gradients_over_time(comm, stage):
    model = new_model()
    zero = Zero(model, comm, stage, torch.optim.AdamW, bucket_bytes=2**17)
    loss_of(model, rows_of(comm)).backward()
    zero.reduce_gradients()
    return comm.memory.use.current["gradients"]


fig, ax = plt.subplots(figsize=(9, 3.1))
most = {}
for stage, colour in ((1, "vermilion"), (2, "blue")):
    done = run(4, lambda comm, stage=stage: gradients_over_time(comm, stage), hardware=CLASSROOM)
    samples = done.trace.memory_samples(0)  # of each instant the most
    times = [s.seconds * 1e6 for s in samples]
    sizes = [s.by_category["gradients"] / 1e3 for s in samples]
    left = done.results[0] / 1e3
    times, sizes = [*times, times[-1]], [*sizes, left]
    ax.plot(
        times, sizes, drawstyle="steps-post", color=style.COLOURS[colour], label=f"stage {stage}"
    )
    most[stage] = max(sizes)
ax.axhline(num_parameters / 1e3, color="0.5", lw=1, ls="--")
ax.text(0, num_parameters / 1e3 + 12, "a quarter of all gradients", color="0.35")
ax.set(xlabel="virtual time (µs)", ylabel="gradients held by rank 0 (kB)", ylim=(0, None))
style.label_lines(ax)
plt.show()
print(f"at most: stage 1 {most[1]:.0f} kB, stage 2 {most[2]:.0f} kB; "
      f"all gradients {4 * num_parameters / 1e3:.0f} kB; at the end {left:.0f} kB")  # fmt: skip
assert most[2] < 0.7 * most[1]

# %% [markdown] slideshow={"slide_type": "fragment"}
# What is left at the end is a quarter: the part. The humps are buckets on their way.
# A reduction runs beside backward, so its buffer must live until it ends; `GradientReducer` lets
# one be under way at a time.
#
# A myth: "stage 2 shards the parameters as well". Look at the bars of section 2: they are whole.
#
# <!-- notes: Point at the two tops: 1010 kB at stage 1, 524 at stage 2. Half, not a quarter: ask
# where the rest of the saving went: into the humps, buckets of 131 kB on their way. Stage 1 stands
# above 871 for the same reason. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Stage 3: borrow, compute, forget
#
# **Question.** A rank computes with whole matrices. How can it not have them?
#
# <!-- notes: Nine minutes with the next pages. The title is the whole of FSDP in three words. Let
# somebody say in which order the six steps of one block come. Then ask what the price is, take
# guesses, and leave it open until section 10. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# It has them for a moment. Each block's parameters are gathered when its forward begins and
# forgotten when it ends; gathered again for its backward, whose gradient is reduced, scattered and
# forgotten. At any time one block is whole.


# %% slideshow={"slide_type": "subslide"}
def one_step(comm, **options):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers, **options)
    loss_of(fsdp, rows_of(comm)).backward()
    comm.memory.reset_peak()
    before = comm.now_seconds
    loss_of(fsdp, rows_of(comm)).backward()
    return before, comm.memory.use.peak["communication_buffers"], comm.now_seconds - before


fig, ax = plt.subplots(figsize=(9, 3.2))
for keep, colour in ((True, "vermilion"), (False, "blue")):
    done = run(
        4,
        lambda comm, keep=keep: one_step(comm, reshard_after_forward=not keep),
        hardware=CLASSROOM,
    )
    before = done.results[0][0]
    samples = [s for s in done.trace.memory_samples(0) if s.seconds >= before]
    ax.plot(
        [(s.seconds - before) * 1e6 for s in samples],
        [s.by_category["communication_buffers"] / 1e3 for s in samples],
        drawstyle="steps-post",
        color=style.COLOURS[colour],
        label="kept after forward" if keep else "forgotten",
    )
ax.axhline(4 * num_parameters / 1e3, color="0.5", lw=1, ls="--")
ax.text(5, 4 * num_parameters / 1e3 - 10, "the whole model", va="top", color="0.35")
ax.text(185, 800, "kept after forward", color=style.COLOURS["vermilion"])
ax.text(20, 215, "forgotten", color=style.COLOURS["blue"])
ax.set(xlabel="virtual time of one step (µs)", ylabel="gathered parameters (kB)", ylim=(0, 950))
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Forgotten: the root's unit (embedding, last norm, head; needed at both ends of the step, so it
# stays) and one block, each gathered as the one before is forgotten. In backward two blocks, since
# the next is fetched ahead (section 6). The spikes: a block is copied out of the message in which
# it came, since its parameters do not lie in one piece there.
#
# Kept (`reshard_after_forward=False`): the memory of whole parameters, and the traffic of stage 2.
#
# <!-- notes: Let them find where backward begins: after the dip at 135 microseconds, where the
# root's unit is alone. The plateau before it is the root and one block. Four blocks save little;
# ask what a hundred would do: the dashed line goes up, the blue one stays. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# **How autograd plays along.** A node stands between the shards and the layer: forward it gathers,
# backward it reduces and scatters. And one trap: autograd *saves* the weight for the backward pass,
# and what is saved is not free. Our FSDP replaces saved views by notes ("rows 10 to 20 of parameter
# 3"), and the first note that backward reads brings the unit back. (PyTorch's frees the tensor's
# storage instead, and fills it again.)
#
# <!-- notes: Ask before the numbers appear: the layer gathered, computed, and dropped its
# reference. Is the memory free? Most say yes. Six weights of 16,384 bytes are 98,304: all of them
# are still there. Values are right, memory is not; only a ledger finds this. -->


# %% slideshow={"slide_type": "fragment"}
class Gathered(torch.autograd.Function):
    """FSDP in a nutshell, without the notes."""

    @staticmethod
    def forward(ctx, part, comm):
        ctx.comm = comm
        return comm.all_gather(part)

    @staticmethod
    def backward(ctx, grad):
        return ctx.comm.reduce_scatter(grad, "mean"), None


def held_after_forward(comm, forgets):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    x = torch.ones(2, 64, requires_grad=True)
    if forgets:
        loss = FSDP(model, comm, model)(x).sum()
    else:
        parts = [nn.Parameter(m.weight.detach().chunk(comm.size)[comm.rank].clone()) for m in model]
        for part in parts:
            x = F.linear(x, Gathered.apply(part, comm))
        loss = x.sum()
    held = comm.memory.use.current["communication_buffers"]
    loss.backward()
    return held


print("six weights of 16,384 bytes; gathered ones held between forward and backward:")
for forgets in (False, True):
    held = run(4, held_after_forward, forgets).results[0]
    print(f"  {'with' if forgets else 'without'} notes: {held:,} bytes")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `ShardedLinear`: one layer of FSDP. The grader looks at values, at traffic and at
# what you hold between forward and backward.
#
# <!-- notes: At home, 30 minutes. Say that the trap of this slide is the third thing that is
# graded. -->

# %% slideshow={"slide_type": "skip"}
check("ShardedLinear")

# %% [markdown] slideshow={"slide_type": "slide"}
# ### One vector, or each parameter by itself?
#
# **Question.** The first FSDP (2021) laid a unit's parameters end to end, as in section 3, and cut
# the vector. FSDP2 (2024), and ours, cuts each parameter along its first dimension. The same bytes;
# what does the optimizer see?
#
# <!-- notes: Five minutes. Show the two pictures and ask who loses what: in the upper one a rank's
# part has no name, no dimensions and a single requires_grad. Let them list what needs those: weight
# decay by kind, LoRA, checkpoints, norms. The price of the lower one: padding of odd sizes, and a
# copy, since a parameter no longer lies in one piece in the message. -->

# %% slideshow={"slide_type": "fragment"}
shapes = {"wq": (6, 4), "bias": (6,), "wo": (4, 6)}
hues = [style.COLOURS[c] for c in ("blue", "vermilion", "green")]
fig, axes = plt.subplots(2, 1, figsize=(9, 3.6))
numel = [torch.Size(shape).numel() for shape in shapes.values()]
for ax, title in zip(axes, ("flat: FSDP1", "row by row: FSDP2"), strict=True):
    for rank in range(3):
        at = 0
        for i, (name, shape) in enumerate(shapes.items()):
            rows = -(-shape[0] // 3)
            begin, end = sum(numel[:i]), sum(numel[: i + 1])
            if "flat" in title:
                part = -(-sum(numel) // 3)
                low, high = max(begin, rank * part), min(end, (rank + 1) * part)
                width, label = max(high - low, 0), f"{max(high - low, 0)} of {numel[i]}"
            else:
                own = max(min(rows, shape[0] - rank * rows), 0)
                width = own * numel[i] // shape[0]
                label = f"{name}: {own} rows"
            if width:
                ax.barh(2 - rank, width, left=at, color=hues[i], edgecolor="white", height=0.85)
            if width > 3:
                ax.text(at + width / 2, 2 - rank, label, ha="center", va="center", color="white",
                        fontsize=11)  # fmt: skip
            at += width
    ax.set(yticks=(2, 1, 0), yticklabels=("rank 0", "rank 1", "rank 2"), title=title, xlim=(0, 24))
    ax.grid(visible=False)
axes[1].set_xlabel("elements that a rank keeps; blue: wq (6 x 4), red: bias (6), green: wo (4 x 6)")
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A vector has one `requires_grad`. LoRA freezes most of a unit
# and trains a little: the flat FSDP either refused ("must flatten tensors with uniform
# requires_grad", pytorch #104690, peft #1702) or made everything trainable. And with one dimension
# everywhere, "matrices decay, vectors do not" decays nothing (fairscale #697, pytorch #101343).
#
# <!-- notes: The left column is a unit of ours as it was until recently. Ask what AdamW does to a
# frozen weight with a gradient of zero: weight decay moves it all the same. -->


# %% slideshow={"slide_type": "fragment"}
def adapted():
    torch.manual_seed(0)
    return add_adapter(new_model(), LoRAConfig(rank=2, alpha=4))


def flat_unit(comm):
    """A block as the first FSDP had it: one vector, one requires_grad."""
    held = dict(adapted().layers[0].named_parameters())
    layout = FlatLayout(tuple(held), tuple(tuple(p.shape) for p in held.values()), comm.size)
    flat = layout.flatten(p.detach() for p in held.values())
    shard = nn.Parameter(layout.shard(flat, comm.rank).clone())
    shard.grad = torch.zeros_like(shard)  # no gradient reaches what is frozen, or so one thinks
    groups = decay_groups([("shard", shard)], 0.1)
    torch.optim.AdamW([shard], lr=0.1, weight_decay=0.1).step()
    after = zip(held.values(), layout.views(comm.all_gather(shard.detach())), strict=True)
    moved = [not torch.equal(p, whole) for p, whole in after if not p.requires_grad]
    return f"{sum(moved)} of {len(moved)}", [len(group["params"]) for group in groups]


def row_unit(comm):
    """Ours: each parameter by itself."""
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fsdp = FSDP(model, comm, model.layers)
    groups = decay_groups(fsdp, 0.1)
    optimizer = torch.optim.AdamW(fsdp.parameters(), lr=0.1, weight_decay=0.1)
    loss_of(fsdp, rows_of(comm)).backward()
    optimizer.step()
    frozen = [n for n, p in fsdp.named_parameters() if not p.requires_grad]
    after = fsdp.full_state_dict()
    moved = sum(not torch.equal(after[n], before[n]) for n in frozen)
    return f"{moved} of {len(frozen)}", [len(group["params"]) for group in groups]


table(("", "frozen weights that move", "parameters that decay, and that do not"),
      ("one vector (a block)", *run(4, flat_unit).results[0]),
      ("row by row (the model)", *run(4, row_unit).results[0]))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Prefetch
#
# **Question.** A rank that gathers a unit when it needs it waits for the network; and the network
# waits while it computes. What would you start when?
#
# On a clock with round numbers (10 GB/s, 1 TFLOP/s): six layers, forward and backward.
#
# <!-- notes: Six minutes. Draw two rows on the board, compute and network, and let the room place
# the first three gathers. Somebody says "start all gathers at once": that is the whole model in
# memory again. Ask for the least that helps: one unit ahead. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **post**: the next unit's all-gather starts when this unit's gradient is computed. It travels
#   while the gradient's reduce-scatter waits behind it.
# - **pre**: it starts *before* this unit's gradient is computed. Two units are whole at once.
# - **forward**: the order of the last step says who comes next.

# %% slideshow={"slide_type": "skip"}
LAYERS, WIDTH, BATCH = 6, 256, 256


def prefetching(comm, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    fsdp = FSDP(model, comm, model, **options)
    x = torch.ones(BATCH, WIDTH, requires_grad=True)
    fsdp(x).sum().backward()
    comm.memory.reset_peak()
    before = comm.now_seconds
    with comm.region("step"):
        fsdp(x).sum().backward()
    peak = comm.memory.use.peak["communication_buffers"] / (WIDTH * WIDTH * 4)
    return before, comm.now_seconds - before, peak


MODES = {
    "no prefetch": {"backward_prefetch": None},
    "backward, post": {"backward_prefetch": "post"},
    "backward, pre": {"backward_prefetch": "pre"},
    "forward and pre": {"backward_prefetch": "pre", "forward_prefetch": True},
}
runs = {
    name: run(4, lambda comm, o=options: prefetching(comm, **o), hardware=CLASSROOM)
    for name, options in MODES.items()
}

# %% slideshow={"slide_type": "subslide"}
KINDS = {"step": "sky", "all_gather": "vermilion", "reduce_scatter": "orange"}
fig, axes = plt.subplots(4, 1, figsize=(9, 5.6), sharex=True)
for ax, (name, done) in zip(axes, runs.items(), strict=True):
    before, seconds, peak = done.results[0]
    for event in done.trace.timeline(rank=0):
        if event.start_seconds >= before - 1e-12:
            ax.barh(
                0 if event.stream == "communication" else 1,
                (event.end_seconds - event.start_seconds) * 1e6,
                left=(event.start_seconds - before) * 1e6,
                color=style.COLOURS[KINDS[event.name]],
                edgecolor="white",
                linewidth=0.6,
            )
    ax.set(yticks=(0, 1), yticklabels=("network", "compute"), ylim=(-0.5, 1.5))
    ax.set_title(f"{name}: {seconds * 1e6:.0f} µs, at most {peak:.2f} units gathered", fontsize=12)
    ax.grid(visible=False)
axes[-1].set_xlabel("virtual time of one step on rank 0 (µs)")
for x, (name, colour) in zip((0.62, 0.74, 0.86), KINDS.items(), strict=True):
    text = {"step": "products"}.get(name, name)
    fig.text(x, 1.0, text, color=style.COLOURS[colour], ha="left", va="bottom", fontweight="bold")
plt.show()
times = [done.results[0][1] for done in runs.values()]
assert times == sorted(times, reverse=True)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Time for memory, a unit at a time.
#
# **Exercise.** `prefetched_forward`: the clock and the memory ledger grade it.
#
# <!-- notes: From 1012 to 672 microseconds, from 1.25 to 2.25 units. Ask what still stands at the
# right end of the last row: the last reduce-scatter has nothing to hide behind.
# `prefetched_forward` is for home, 25 minutes. End of the first part; section 7 takes up what
# sharding does to everything else. -->

# %% slideshow={"slide_type": "skip"}
check("prefetched_forward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. The norm of what nobody holds
#
# **Question.** Gradients are to be clipped to norm 1. Each rank holds a quarter of them. Each clips
# its quarter to norm 1?
#
# <!-- notes: Five minutes. Ask for hands: is it the same update, a shorter one, or another
# direction? "Shorter" usually wins. It is another direction: four norms, from 1.08 to 1.57, and so
# four factors. Let them add the four squares: 2.626 squared. -->


# %% slideshow={"slide_type": "skip"}
def norms(comm):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers)
    loss_of(fsdp, rows_of(comm)).backward()
    parts = [shard.grad for shard in fsdp.parameters()]
    mine = torch.stack([part.norm() for part in parts]).norm().item()
    return mine, clip_shards([part.clone() for part in parts], 1.0, comm).item()


# %% slideshow={"slide_type": "fragment"}
alone = new_model()
loss_of(alone, tokens).backward()
truth = nn.utils.clip_grad_norm_(alone.parameters(), 1.0).item()
print(f"one rank, all rows: {truth:.3f}")
for rank, (mine, ours) in enumerate(run(4, norms).results):
    print(f"rank {rank}: its part {mine:.3f}, the whole by all-reduce of squares {ours:.3f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Four norms, four factors: the update would point elsewhere. Squares add up, norms do not. (Under
# PyTorch's FSDP2 `clip_grad_norm_` is safe: its parameters are DTensors, which know that they are
# parts. Section 13 measures it. On plain shards, as ours, ask the wrapper: `fsdp.clip_grad_norm`.)
#
# **Exercise.** `clip_sharded` (repair)

# %% slideshow={"slide_type": "skip"}
check("clip_sharded")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Hybrid sharding
#
# **Question.** Inside a node the network is ten times as fast as between nodes. FSDP over all GPUs
# gathers each layer through the slow network twice a step. If the model fits on one node?
#
# <!-- notes: Six minutes. Draw two boxes of four ranks. Ask what must cross in any case: something
# of the gradient, since both nodes saw other rows. How little? A rank's part, not the whole. Ask
# for the price, too: each node holds a full copy, in parts. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Shard within the node, replicate between nodes (HSDP): all-gathers stay inside, and only a rank's
# *part* of the gradient crosses, in a small all-reduce.


# %% slideshow={"slide_type": "subslide"}
def hybrid(comm, shards):
    mesh = comm.mesh(replicas=-1, shards=shards)
    model = new_model()
    fsdp = FSDP(model, mesh.shards, model.layers, replicas=mesh.replicas)
    comm.traffic.reset()
    loss_of(fsdp, rows_of(comm)).backward()


two_nodes = dataclasses.replace(CLASSROOM, ranks_per_node=4)
fig, axes = plt.subplots(1, 2, figsize=(9, 2.9))
crossing, taken = {}, {}
for ax, (name, shards) in zip(axes, {"full shard": 8, "hybrid": 4}.items(), strict=True):
    done = run(8, lambda comm, s=shards: hybrid(comm, s), hardware=two_nodes)
    matrix = torch.tensor(done.trace.traffic_matrix()) / (4 * num_parameters)
    crossing[name] = (matrix[:4, 4:].sum() + matrix[4:, :4].sum()).item()
    taken[name] = done.trace.seconds
    image = ax.imshow(matrix, vmin=0, vmax=2.7, cmap="cividis", aspect="auto")
    ax.axhline(3.5, color="white")
    ax.axvline(3.5, color="white")
    ax.set(title=name, xlabel="to rank", ylabel="from rank", xticks=range(8), yticks=range(8))
    ax.grid(visible=False)
fig.colorbar(image, ax=axes, label="elements sent / P", shrink=0.8)
plt.show()
print("between the nodes, all ranks:", ", ".join(f"{k} {v:.2f} P" for k, v in crossing.items()))
print(f"time of the step: hybrid / full = {taken['hybrid'] / taken['full shard']:.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# A ring over both nodes crosses the border on two links only, but everything passes there. Hybrid
# sharding keeps the bulk inside, and four pairs of ranks share what is left.
#
# **Exercise.** `hybrid_reduce`
#
# <!-- notes: Read one matrix aloud: row is the sender. Left, two bright boxes lie across the white
# lines, 3 to 4 and 7 to 0. Right, eight dark blue ones. 4.99 P against 2.00 P, and the step takes
# 0.47 of the time. The exercise is for home, 15 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("hybrid_reduce")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Another number of ranks
#
# **Question.** Four ranks saved their parts. One machine is gone: three ranks come back. Who reads
# what?
#
# <!-- notes: Four minutes. Draw a matrix of 12 rows, cut in four on the left and in three on the
# right. Let them say which files the new rank 1 opens: two. Then ask what else must be resharded
# with the weights: Adam's states, which people forget, and the step. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# The parameters are the same; the cuts are not. A rank that needs rows $[a, b)$ of one reads them
# from whichever files have them.


# %% slideshow={"slide_type": "fragment"}
def train(comm, folder, num_steps, resume=False):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers)
    optimizer = torch.optim.AdamW(fsdp.parameters(), lr=3e-3)
    first = load_sharded(folder, fsdp, optimizer) if resume else 0
    losses = []
    for _ in range(first, num_steps):
        optimizer.zero_grad()
        rows = tokens[:12].chunk(comm.size)[comm.rank]
        loss = loss_of(fsdp, rows)
        loss.backward()
        optimizer.step()
        losses.append(comm.all_reduce(loss.detach().clone(), "mean").item())
    if not resume:
        save_sharded(folder, fsdp, optimizer, step=num_steps)
    return losses


with tempfile.TemporaryDirectory() as work:
    whole = run(1, lambda comm: train(comm, Path(work) / "whole", 8), is_measured=False).results[0]
    before = run(4, lambda comm: train(comm, Path(work) / "half", 4), is_measured=False).results[0]
    files = sorted(p.name for p in (Path(work) / "half").iterdir())
    index = json.loads((Path(work) / "half" / "model.json").read_text())
    after = run(
        3, lambda comm: train(comm, Path(work) / "half", 8, True), is_measured=False
    ).results[0]
print("files:", *files, sep="\n  ")
print("parameters:", ", ".join(list(index["parameters"])[:3]), "...")
print("one rank, 8 steps:      ", *(f"{loss:.3f}" for loss in whole))
print("4 ranks, then 3 ranks:  ", *(f"{loss:.3f}" for loss in before + after))

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `reshard`: mind the padding of N ranks, which is not that of M.
#
# <!-- notes: Compare the two rows of losses from the fifth number on: 3 ranks go on as if nothing
# had happened. For home, 12 minutes. -->

# %% slideshow={"slide_type": "skip"}
check("reshard")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. What it costs in traffic
#
# **Question.** "FSDP communicates less than DDP, because each rank holds less." Count.
#
# <!-- notes: Five minutes. Vote: less, the same, more. Let them count on the board, in units of P
# and for large N: one reduce-scatter, and how many all-gathers? Two, for forward and for backward:
# 3 P beside 2 P. With N = 4 all numbers carry a factor 3/4. -->

# %% slideshow={"slide_type": "skip"}
done = run(4, fsdp_states, is_measured=False)  # its ledger starts anew with the second step
gathers, reduces = (
    done.trace.total(rank=0, operation=operation) for operation in ("all_gather", "reduce_scatter")
)
elements = gathers.wire_bytes / 2 + reduces.wire_bytes / 2

# %% slideshow={"slide_type": "fragment"}
table(("stage", "counted / P", "formula / P"),
      *((stage, found[stage][1] / (2 if stage < 3 else 1) / num_parameters,
         elements_sent(num_parameters, 4, stage) / num_parameters)
        for stage in (0, 1, 2)))  # fmt: skip
print(f"FSDP: gathers {gathers.wire_bytes / 2 / num_parameters:.2f} P, reduces "
      f"{reduces.wire_bytes / 2 / num_parameters:.2f} P; formula "
      f"{elements_sent(num_parameters, 4, 3) / num_parameters:.2f} P")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Stages 1 and 2 cost what DDP costs. FSDP costs half as much again: parameters travel twice, for
# forward and for backward. (The root's unit is gathered once, since it stays: a little less here.)
#
# It is not tensor parallelism either: parameters travel, activations stay, and every rank computes
# every layer, on rows of its own.

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** Gradient accumulation: four micro-batches, then one step. Which stages get their
# communication for less?
#
# <!-- notes: Four minutes. Many think all three, since "the step communicates once". Ask at stage 2
# who holds the sum of four micro-batches' gradients: nobody has room for it. Then let them predict
# 3.75: four reduce-scatters and one gather, each 0.75. `elements_per_step` is for the laboratory,
# 12 minutes. -->


# %% slideshow={"slide_type": "skip"}
def accumulated(comm, stage, num_micro):
    model = new_model()
    zero = Zero(model, comm, stage, torch.optim.AdamW)
    comm.traffic.reset()
    for rows in rows_of(comm).chunk(num_micro):
        (loss_of(model, rows) / num_micro).backward()
    zero.step()
    return comm.traffic.total().wire_bytes / 4 / num_parameters


# %% slideshow={"slide_type": "fragment"}
table(("micro-batches", 1, 2, 4), *(
    (f"stage {stage}: elements / P",
     *(run(4, accumulated, stage, m, is_measured=False).results[0] for m in (1, 2, 4)))
    for stage in (0, 1, 2)))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Stages 0 and 1 add gradients up at home. At stage 2 nobody holds the whole sum, so each
# micro-batch's gradients must leave: that is why stage 1 is often the better choice with pipelines.
#
# **Exercise.** `elements_per_step`

# %% slideshow={"slide_type": "skip"}
check("elements_per_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Which stage
#
# **Question.** 7.5 billion parameters, 64 GPUs of 80 GB. Which stage? And if a micro-batch's
# activations take 60 GB?
#
# <!-- notes: Seven minutes with offload. Let pairs compute stage 1 at N = 64 first: 30 + 90/64,
# about 31.4 GB. So with small activations stage 1 will do, and costs nothing. With 60 GB of
# activations 20 are left: stage 2 (16.6 GB) fits barely, stage 3 easily. -->

# %% slideshow={"slide_type": "subslide"}
fig, ax = plt.subplots(figsize=(9, 3.5))
ranks = [2**i for i in range(11)]
for stage, colour in zip(range(4), ("black", "vermilion", "orange", "blue"), strict=True):
    sizes = [model_states_bytes(7.5e9, n, stage).total / 1e9 for n in ranks]
    ax.plot(ranks, sizes, marker="o", ms=4, color=style.COLOURS[colour], label=f"stage {stage}")
ax.axhline(80, color="0.5", lw=1, ls="--")
ax.text(200, 74, "an 80 GB GPU", color="0.35", va="top")
ax.set(xscale="log", yscale="log", xlabel="ranks", ylabel="model states on a rank (GB)",
       title="7.5 billion parameters, 16 bytes each")  # fmt: skip
ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
ax.minorticks_off()
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Stages 1 and 2 have floors, at 4 and 2 bytes a parameter. Stage 3 has none. But *activations* are
# each rank's own rows: no stage shards them. Smaller micro-batches and recomputation do (chapter
# 15), and tensor parallelism (chapter 13).
#
# **Exercise.** `choose_stage`
#
# <!-- notes: Both axes are logarithmic: the black line and the floors are flat, stage 3 alone goes
# on. Ask which of the four curves a thousand GPUs help. `choose_stage` is for the laboratory, 10
# minutes: the least stage that fits, not the highest. -->

# %% slideshow={"slide_type": "skip"}
check("choose_stage")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Offload.** The host has ten times the memory, behind a slow link. ZeRO-Offload keeps masters and
# Adam's states there: gradients go down, updated parameters come up, nothing else moves.
#
# <!-- notes: Ask what crosses the host's link: 0.5 bytes of gradient down, 0.5 of parameter up, a
# parameter and rank. Not the 12 of the optimizer, which is why it works at all. The price on this
# clock: 1022 microseconds in place of 547. -->


# %% slideshow={"slide_type": "skip"}
def offloaded(comm, offload):
    held = two_steps(comm, 2, offload=offload)[0]
    return held, comm.traffic.total(group="host").wire_bytes, comm.now_seconds


# %% slideshow={"slide_type": "fragment"}
rows = [("stage 2", *STATES, "host", "host link", "time")]
for offload in (False, True):
    held, link, seconds = run(4, offloaded, offload, hardware=CLASSROOM).results[0]
    sizes = [f"{held[s] / num_parameters:.2f}" for s in (*STATES, "host")]
    rows.append(("offloaded" if offload else "on the device", *sizes,
                 f"{link / num_parameters:.2f}", f"{seconds * 1e6:.0f} µs"))  # fmt: skip
table(*rows)
print("(bytes a parameter on each of 4 ranks, between backward and step)")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Low precision, high precision
#
# **Question.** FSDP gathers in bfloat16 and keeps float32 parts. In which dtype should gradients be
# *reduced*?
#
# <!-- notes: Four minutes. Chapter 10's answer is "sums in float32", and most repeat it. Let them
# guess the error first: 0.5 % in either case comes from computing in 16 bits, the sum over 8 ranks
# adds 0.1. The bytes fall from 1,467,284 to 1,085,826. So the rule is about large N, not about this
# run. -->


# %% slideshow={"slide_type": "skip"}
def gradient_error(comm, param_dtype, reduce_dtype):
    model = new_model()
    precision = MixedPrecision(param_dtype, reduce_dtype)
    fsdp = FSDP(model, comm, model.layers, precision=precision)
    comm.traffic.reset()
    loss_of(fsdp, rows_of(comm)).backward()
    flat = torch.cat([shard.grad.flatten() for shard in fsdp.parameters()])
    return flat, comm.traffic.total().wire_bytes


# %% slideshow={"slide_type": "fragment"}
half, full = torch.bfloat16, torch.float32
exact = run(8, gradient_error, full, full, is_measured=False).results
rows = [("parameters", "reduction", "error of the gradient", "bytes sent")]
for param_dtype, reduce_dtype in ((full, full), (half, full), (half, half)):
    got = run(8, gradient_error, param_dtype, reduce_dtype, is_measured=False).results
    ours, theirs = (torch.cat([g for g, _ in r]) for r in (got, exact))
    rows.append((str(param_dtype)[6:], str(reduce_dtype)[6:],
                 f"{100 * ((ours - theirs).norm() / theirs.norm()).item():.1f} %",
                 f"{got[0][1]:,.0f}"))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Most of the error comes from computing in 16 bits; a sum over 8 ranks adds little. It grows with
# the number of ranks, so large runs reduce in float32 and pay the bytes.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Proof against production
#
# Two real processes, gloo between them: PyTorch's `fully_shard` and ours train the same Llama on
# the same rows.
#
# <!-- notes: For reading, or two minutes. "Bit for bit" is stronger than a tolerance: the same sums
# in the same order, 39 tensors of 39 after three steps of AdamW. Ask what one would have to match
# for that: units, dtypes, the order of reductions. -->


# %% slideshow={"slide_type": "fragment"}
def theirs_and_ours(comm):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    warnings.simplefilter("ignore")
    theirs, ours = new_model(), new_model()
    mesh = init_device_mesh("cpu", (comm.size,))
    for part in (*theirs.layers, theirs):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    fsdp = FSDP(ours, comm, ours.layers, precision=MixedPrecision(**policy))
    for model in (theirs, fsdp):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, rows_of(comm)).backward()
            optimizer.step()
    mine = fsdp.full_state_dict()
    return [torch.equal(mine[n], p.full_tensor()) for n, p in theirs.named_parameters()]


equal = run(2, theirs_and_ours, backend="processes", is_measured=False).results
print(
    f"tensors equal to fully_shard's after 3 steps, bit for bit: {sum(equal[0])} of {len(equal[0])}"
)
simulated, real = (
    run(2, fsdp_states, backend=backend).results[0][1] for backend in ("simulated", "processes")
)
print("bytes sent on simulated ranks and on real processes:", int(simulated), int(real))

# %% [markdown] slideshow={"slide_type": "fragment"}
# And clipping: the norm that PyTorch's `clip_grad_norm_` finds on FSDP2's parameters, ours, and
# that of one rank on all rows.


# %% slideshow={"slide_type": "fragment"}
def clipped(comm):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    theirs, ours = new_model(), new_model()
    mesh = init_device_mesh("cpu", (comm.size,))
    for part in (*theirs.layers, theirs):
        fully_shard(part, mesh=mesh)
    fsdp = FSDP(ours, comm, ours.layers)
    for model in (theirs, fsdp):
        loss_of(model, rows_of(comm)).backward()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0).full_tensor().item()
    return norm, fsdp.clip_grad_norm(1.0).item()


theirs, ours = run(2, clipped, backend="processes", is_measured=False).results[0]
print(f"fully_shard {theirs:.4f}, ours {ours:.4f}, one rank {truth:.4f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests go on: stages 1 and 2 against DistributedDataParallel and ZeroRedundancyOptimizer,
# hybrid meshes, clipping, accumulation, tied embeddings, checkpoints between 1, 2, 3 and 4 ranks.
# They train the same model with DeepSpeed's own engine on two processes, gradients accumulated over
# three micro-batches: at stages 1 and 2 every parameter is equal to the bit after three steps, at
# stage 3 within float32's roundings.

# %% [markdown] slideshow={"slide_type": "subslide"}
# A checkpoint that outlives the code that wrote it: `save_distributed` writes the format of
# `torch.distributed.checkpoint`. `fully_shard` on two processes reads, in the tests, what four
# ranks of ours have written, and the other way round, Adam's states included.
#
# <!-- notes: For reading. Ask what a reader must know to cut anew: the whole shape, and for each
# piece its offset. That is all the metadata there is. -->

# %% slideshow={"slide_type": "fragment"}
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from reference.parallel.zero.distributed_checkpoint import save_distributed  # noqa: E402


def written(comm, folder):
    model = new_model()
    save_distributed(folder, FSDP(model, comm, model.layers))


with tempfile.TemporaryDirectory() as folder:
    run(4, written, Path(folder) / "step", is_measured=False)
    entries = FileSystemReader(Path(folder) / "step").read_metadata().state_dict_metadata
    name = next(name for name in entries if name.endswith("layers.0.mlp.down_proj.weight"))
    print(f"{name}, {tuple(entries[name].size)}, in pieces from row",
          *(chunk.offsets[0] for chunk in entries[name].chunks))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Published figures, recomputed
#
# Each row: what a paper prints, and what the functions of this chapter give.
#
# <!-- notes: For reading. In class take one row: ZeRO's figure 1 is the board's 2 + 2 + 12 with 7.5
# billion and N = 64. If somebody likes detective work, the last row: 60 GB and 33 GB for the same
# activations; one of them counts elements. -->

# %% slideshow={"slide_type": "fragment"}
GB, TIB = 1e9, 2.0**40
fig_1 = [model_states_bytes(7.5e9, 64, s).total / GB for s in range(4)]
elements = 125 * 8192 * 32 * 1024  # inputs of 125 layers, 100 billion parameters
ring = 2 / 8 * (64 - 1) / 64
infinity = [240 * n * d * d / TIB for n, d in ((80, 10240), (128, 25600), (315, 163840))]
activations = 12 * 1600 * 32 * 1024 * 48 * 2 / GB
table(
    ("", "published", "here"),
    ("ZeRO, fig. 1 (GB)", "120 / 31.4 / 16.6 / 1.9", " / ".join(f"{x:.4g}" for x in fig_1)),
    ("ZeRO, table 1: 1T, N = 1024, stage 3", "15.6 GB",
     f"{model_states_bytes(1e12, 1024, 3).total / GB:.1f} GB"),
    ("ZeRO, sec. 7: stages 2 and 3", "2 P, 3 P",
     ", ".join(f"{elements_sent(1e9, 2**20, s) / 1e9:.3f} P" for s in (2, 3))),
    ("GPT-2 1.5B: states", "24 GB", f"{model_states_bytes(1.5e9, 1, 0).total / GB:.0f} GB"),
    ("GPT-2 1.5B: activations, 32 x 1K", "60 GB", f"{activations:.1f} GB"),
    ("ZeRO-Infinity, fig. 2a (TB)", "1.83 / 18.31 / 1845.70",
     " / ".join(f"{x:.2f}" for x in infinity)),
    ("ZeRO++: 3 M to", "0.75 M", f"{0.5 + 0.0 + 0.25} M"),
    ("HSDP between hosts, W = 512, G = 8", "2 M (W-1)/(G W)",
     f"{cross_host_bytes(1.0, 512, 8, 'hybrid'):.4f} M; a ring {ring:.4f} M"),
    ("ZeRO 100B: activations", "60 GB; 33 GB", f"{elements / 1e9:.2f} G elements, "
     f"{2 * elements / 2**30:.1f} GiB"),
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# ZeRO-Infinity's terabytes are binary ones. The FSDP paper's formula for hybrid sharding is an
# upper bound: a ring over $H = W/G$ hosts sends $2(M/G)(H-1)/H$ = 0.2461 M here. And the ZeRO
# paper says of the same 100-billion-parameter model once "around 60 GB" of activations (section
# 3.2) and once "about 33 GB" (section 6.1): 33.55 billion is the number of *elements*.

# %% [markdown] slideshow={"slide_type": "slide"}
# Llama-3.1-405B on one rank of 16,384: tensors have shapes and no values, and everything is counted
# as ever.
#
# <!-- notes: The bridge to the next three chapters. Let them guess which of the numbers forbids it:
# 508 MB of states look like victory. Then 403 GB of activations for one row, and 27.1 GB gathered,
# beside an 80 GB GPU. No stage cuts a row, or a layer while it computes. Then ask why rank 0 has
# 508 where the formula says 396: 1,024 rows of a key matrix do not divide by 16,384. -->

# %% slideshow={"slide_type": "fragment"}
NUM_LAYERS = 126


def fused_attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def very_large(comm, model):
    precision = MixedPrecision(torch.bfloat16, torch.float32)
    fsdp = FSDP(model, comm, model.layers, precision=precision)
    optimizer = torch.optim.AdamW(fsdp.parameters())
    rows = torch.zeros(1, 4097, dtype=torch.long)
    logits = fsdp(rows[:, :-1], attend=fused_attention)
    F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()).backward()
    held = comm.memory.use
    optimizer.step()
    after = comm.memory.use.current
    return sum(after[s] for s in STATES), held.at_peak, comm.traffic.total().wire_bytes


config = dataclasses.replace(PRESETS["llama-3.1-405b"], num_layers=NUM_LAYERS)
with torch.device("meta"):
    giant = Llama(config)
count = sum(p.numel() for p in giant.parameters())
states, at_peak, sent = run_one_rank(16_384, very_large, giant).results[0]
print(f"{count:,} parameters on 16,384 ranks")
print(f"model states on rank 0: {states / 1e6:.1f} MB; formula, equal parts: "
      f"{model_states_bytes(count, 16_384, 3).total / 1e6:.1f} MB")  # fmt: skip
print(f"gathered at the peak: {at_peak['communication_buffers'] / GB:.1f} GB; activations of one "
      f"row of 4,096 tokens: {at_peak['activations'] / GB:.0f} GB")  # fmt: skip
print(f"sent in a step: {sent / GB:,.0f} GB")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Half a gigabyte of states (rank 0 has more than its share, since a parameter is cut by whole rows,
# and many have fewer rows than there are ranks), and still a rank of 80 GB does not hold one row of
# the batch: the activations do not shrink, and nor does the batch, of at least 16,384 rows. At this
# size data parallelism alone is not enough, sharded or not: chapters 13 to 15.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. What breaks in practice
#
# - **An optimizer that is not elementwise** (LAMB's norms, Muon's matrices) must see whole tensors:
#   parts, flat or rows, give it garbage, silently. Gather first.
# - **Clipping** plain shards by `clip_grad_norm_` clips by each rank's own norm (section 7).
# - **A parameter that one rank used and the others did not** (a branch, an expert): if a reduction
#   starts whenever a gradient arrives, ranks add different layers to each other, or wait for ever
#   (DeepSpeed #777). Ours leave in one order, with zeros for what is missing.
# - **Accumulation in which each pass uses other parameters**: what only an early pass had used was
#   never reduced (pytorch #69031). Ours counts from step to step.
# - **One giant unit** (no wrapping) gathers the whole model at once: FSDP without its savings.
# - **Weights used outside of their unit** (a penalty in the loss, a head that another module reads)
#   are this rank's rows, not the weight. Ours says so when backward comes by:
#
# <!-- notes: For reading, or the last five minutes of the laboratory. Ask which of these raise an
# error: only the last one. The first is the nastiest, since a part has a norm, too, just not that
# of a matrix. -->


# %% slideshow={"slide_type": "fragment"} tags=["raises-exception"]
def penalised(comm):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers)
    weight = model.layers[0].mlp.down_proj.weight
    if comm.rank == 0:
        print(f"this rank has {tuple(weight.shape)} of {tuple(weight.whole_shape)}")
    (loss_of(fsdp, rows_of(comm)) + weight.square().sum()).backward()


try:
    run(2, penalised)
except RuntimeError as error:
    print(type(error).__name__, "-", *str(error).split("\n")[0].split("; "), sep="\n  ")


# %% [markdown] slideshow={"slide_type": "subslide"}
# And the giant unit, on the ledger: a model in one unit (its message, and the parameters copied out
# of it), or a unit a block.


# %% slideshow={"slide_type": "fragment"}
def one_unit(comm, wrapped):
    model = new_model()
    fsdp = FSDP(model, comm, model.layers if wrapped else [])
    loss_of(fsdp, rows_of(comm)).backward()
    return comm.memory.use.peak["communication_buffers"]


for wrapped in (False, True):
    peak = run(4, one_unit, wrapped).results[0]
    print(f"{'a unit a block' if wrapped else 'one unit      '}: "
          f"{peak / 4 / num_parameters:.2f} P gathered and in flight at the peak")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16. Summary
#
# - Data parallelism holds 16 bytes a parameter on each rank. Stage 1 shards 12 of them, stage 2 two
#   more, stage 3 the rest.
# - Traffic: 2 P, 2 P, 2 P, 3 P. Sharding saves memory; it never saves traffic.
# - FSDP is: gather, compute, forget. What autograd saves must be forgotten as well.
# - Prefetch buys time with one more unit of memory.
# - Norms, checkpoints and accumulation are where sharding shows: squares add up, cuts move, and
#   sums that nobody holds must leave.
# - No stage shards activations.
#
# **Further reading.** Rajbhandari et al. 2020, *ZeRO* (arXiv 1910.02054); Zhao et al. 2023,
# *PyTorch FSDP* (arXiv 2304.11277); Ren et al. 2021, *ZeRO-Offload* (arXiv 2101.06840);
# Rajbhandari et al. 2021, *ZeRO-Infinity* (arXiv 2104.07857).
#
# <!-- notes: Students should be able to fill in 16 bytes and 2 P, 2 P, 2 P, 3 P for each stage
# without looking, and to say why stage 2 and accumulation do not go together. Close with the last
# line: no stage shards activations. Chapter 13 divides the matrix product itself, and most
# activations with it. -->
