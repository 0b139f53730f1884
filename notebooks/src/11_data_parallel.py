# %% [markdown] slideshow={"slide_type": "slide"}
# # 11 Collectives and data parallelism
#
# One GPU would take 2,700 years for a model of which 16,000 GPUs take two months. What do they have
# to say to each other, how often, and how long does that take?
#
# In this chapter you build all-reduce out of messages, train one model on many ranks, and hide the
# talking behind the computing. The ranks are simulated: real tensors and real autograd, one thread
# each, with every byte counted. The same programs then run on real processes, and equal PyTorch's
# `DistributedDataParallel` bit for bit.
#
# You need: chapter 05 (the model).
#
# <!-- notes: 75 minutes: 40 for sections 1 to 7, from names to overlap, and 35 for 8 to 13.
# Sections 14 to 16 go to the laboratory. Have the first sentence checked: 16,000 GPUs times two
# months are 2,700 years, if nobody ever waits. Say once that ranks here are threads with a ledger,
# so every byte can be counted, and the last proof is against real processes. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1 GB of memory are enough; ranks are simulated. The slow
# > cells are those that start processes (sections 2 and 14) and the sweep over bucket sizes
# > (section 8): take fewer sizes.

# %% slideshow={"slide_type": "skip"}
import asyncio
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autograder.notebook import check
from figures import style
from figures.stepper import Stepper
from figures.tables import table
from figures.timeline import timeline
from figures.traffic import traffic
from reference.parallel.data_parallel import (
    DDP,
    SyncBatchNorm,
    all_reduce_cost,
    data_parallel_step,
    divide,
    gossip_all_reduce,
    load_replica,
    num_bytes,
    ring_all_reduce,
    rows_of_step,
    run_with_restarts,
    save_replica,
    star_all_reduce,
    tree_all_reduce,
    uneven,
)
from reference.parallel.ranks import CLASSROOM, DGX_H100, CollectiveMismatch, Deadlock, run
from reference.pretrained import passage
from reference.transformer import Llama, LlamaConfig

torch.set_num_threads(1)
style.use()
ALGORITHMS = {
    "star": star_all_reduce,
    "tree": tree_all_reduce,
    "ring": ring_all_reduce,
    "gossip": gossip_all_reduce,
}

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Four copies of a model
#
# **Question.** Four ranks train the same small Llama, each on its own quarter of a page of English.
# After twelve steps, do they have one model or four? What if they exchange gradients, but began
# with weights of their own?
#
# <!-- notes: take a vote on the second question. Many expect the weights to come together. They do
# not: 0.51 falls to 0.49 in twelve steps, since equal gradients move both by the same. Ask what the
# green line at 0.00 needs: one broadcast, and then nothing but gradients. Five minutes. -->

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


def new_model(seed=0):
    torch.manual_seed(seed)
    return Llama(CONFIG)


def loss_of(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def rows_of(comm):
    return tokens.chunk(comm.size)[comm.rank]


# %% slideshow={"slide_type": "subslide"}
def four_copies(comm, same_start, exchanges):
    """How far this rank's weights are from rank 0's, after each step."""
    model = new_model(seed=0 if same_start else comm.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    distances = []
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(model, rows_of(comm)).backward()
        if exchanges:
            for p in model.parameters():
                comm.all_reduce(p.grad, "mean")
        optimizer.step()
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        first = comm.broadcast(mine.clone(), src=0)
        distances.append(((mine - first).norm() / first.norm()).item())
    return distances


fig, ax = plt.subplots(figsize=(8, 4))
for label, options in (
    ("equal start, no exchange", (True, False)),
    ("other starts, mean gradients", (False, True)),
    ("equal start, mean gradients", (True, True)),
):
    found = run(4, four_copies, *options, is_measured=False).results[3]
    ax.plot(range(1, 13), found, label=label)
    print(f"{label}: {found[-1]:.2f}")
ax.set(xlabel="step", ylabel="distance of rank 3 from rank 0\n(relative to the weights' norm)")
ax.set_ylim(-0.05, None)
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Equal weights and equal gradients: equal for ever. Take one away and there are four models. A
# broadcast of the first weights is not optional, and nothing later repairs it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Names
#
# A **rank** is one process with one GPU. The **world size** N is how many there are. Machines have
# 8 GPUs or so; the **local rank** is a rank's number on its machine.
#
# | | rank | local rank | node |
# |---|---|---|---|
# | names | the process among all | the GPU on the machine | the machine |
# | decides | which rows, which part | `cuda:0` ... `cuda:7` | which link is near |
#
# <!-- notes: Draw two boxes with eight dots each and let the room number them twice. Before the
# cell: what is rank 8's local rank? 0, on node 1. Then ask which of the two numbers chooses the
# rows of the batch. Whoever takes the local rank trains twice on the same rows on two machines, and
# nothing complains. Four minutes; `place_of_rank` in the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
placed = run(16, lambda comm: (comm.rank, comm.local_rank, comm.node), is_measured=False).results
table(("rank", "local rank", "node"), *(placed[r] for r in (0, 7, 8, 15)))

# %% [markdown] slideshow={"slide_type": "fragment"}
# A myth: "the local rank is the rank". True on one machine, which is where programs are tried out.
#
# **Exercise.** `place_of_rank`: a program that worked until the second machine came.

# %% slideshow={"slide_type": "skip"}
check("place_of_rank")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** Why processes, and not threads or coroutines? Two equal jobs in Python, and two
# chains of matrix products; at best both take as long as one.
#
# <!-- notes: Ask for two rows of three numbers between 1 and 2. The times were measured on a busy
# machine, so read them as an order and run the cell yourself if you can. What to get across:
# waiting is not computing, coroutines only help with the former; threads help where Python is left;
# processes pay with messages, which is what the rest is about. Four minutes. -->


# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
def python_job(_):
    return sum(i * i for i in range(1_200_000))


def torch_job(_):
    x = torch.ones(700, 700)
    for _ in range(8):
        x = (x @ x).clamp(max=1)
    return x.shape[0]


async def both_as_coroutines(job):
    async def one(i):
        return job(i)

    return await asyncio.gather(one(0), one(1))


def seconds_of(act):
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def in_a_thread_of_its_own(act):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def beside_one(job):
    once = min(seconds_of(lambda: job(0)) for _ in range(3))
    ways = (
        lambda: in_a_thread_of_its_own(lambda: asyncio.run(both_as_coroutines(job))),
        lambda: list(threads.map(job, range(2))),
        lambda: list(processes.map(job, range(2))),
    )
    return [f"{min(map(seconds_of, [way] * 3)) / once:.1f} x" for way in ways]


context = multiprocessing.get_context("fork")
with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, mp_context=context) as processes:
    list(processes.map(abs, range(2)))  # started
    table(("two jobs beside one", "coroutines", "threads", "processes"),
          *((job.__name__, *beside_one(job)) for job in (python_job, torch_job)))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Coroutines take turns by design. Threads share one interpreter lock: Python runs in one of them at
# a time, while matrix products run outside of it. Processes share nothing, and have to send.
#
# Our simulated ranks are threads that take turns on purpose: the same order each time.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Collectives
#
# **Idea.** All ranks call the same function; together they do what none could alone. Five are
# enough for this course. Three ranks, whose tensors say whose they are:
#
# <!-- notes: Write the first row on the board, 1 2 3, 10 20 30, 100 200 300, and let three students
# play the ranks for each line of the table before it appears. Reduce-scatter is the one that goes
# wrong: a third of the sum each, not the sum. Then ask which two lines make a third: 111, 222, 333
# gathered is the all-reduce. Chapter 12 lives on that. Six minutes. -->


# %% slideshow={"slide_type": "skip"}
def five(comm):
    mine = torch.tensor([1, 2, 3]) * 10**comm.rank  # rank 0: 1 2 3, rank 1: 10 20 30, ...
    return {
        "before": mine.clone(),
        "broadcast from rank 1": comm.broadcast(mine.clone(), src=1),
        "all_reduce": comm.all_reduce(mine.clone()),
        "reduce_scatter": comm.reduce_scatter(mine),
        "all_gather": comm.all_gather(mine[:1]),
        "all_to_all": comm.all_to_all(mine),
    }


# %% slideshow={"slide_type": "fragment"}
found = run(3, five).results
table(("", *(f"rank {r}" for r in range(3))),
      *((name, *(" ".join(str(v) for v in result[name].tolist()) for result in found))
        for name in found[0]))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Read the table: a reduce-scatter followed by an all-gather is an all-reduce. An all-to-all is the
# transpose of a matrix whose rows lie on ranks.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. All-reduce from messages
#
# **Question.** Rank 0 could collect all tensors, add them, and send the sum back. What is wrong
# with that?
#
# <!-- notes: Let four students with four sheets each play the ring; six rounds take three minutes
# and save the figure's explanation. Most give everybody the whole sum too early: after N - 1 steps
# each has one finished part, another one each. On the next page compare titles: the busiest rank
# sends 280, 120, 70 and 280 kB for a tensor of 40. Eight minutes. `ring_all_reduce` opens the
# laboratory. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Its link carries everything, and all others wait. In a **ring** each rank talks to its neighbours
# only. The tensor is cut into N parts; each part travels once round to be summed, and once more to
# be shared, and at each moment every rank sends one part.


# %% slideshow={"slide_type": "subslide"}
def ring_frames(n=4):
    """Which ranks' contributions each rank holds of each part, before and after each step."""
    held = [[{r} for _ in range(n)] for r in range(n)]
    frames = [("before", [[set(s) for s in row] for row in held], [])]
    for step in range(2 * (n - 1)):
        is_adding = step < n - 1
        moves = [(r, (r + 1) % n, (r - step) % n) for r in range(n)]
        leaving = [set(held[sender][part]) for sender, _, part in moves]
        for (_, receiver, part), arriving in zip(moves, leaving, strict=True):
            held[receiver][part] = held[receiver][part] | arriving if is_adding else arriving
        title = f"step {step + 1}: {'add' if is_adding else 'copy'} what arrives"
        arrived = [(receiver, part) for _, receiver, part in moves]
        frames.append((title, [[set(s) for s in row] for row in held], arrived))
    return frames


def draw_ring(figure, frame):
    title, held, arrived = frame
    ax = figure.add_subplot()
    shades = ["white", "#d9ebf7", "#a9d3ee", style.COLOURS["sky"]]
    for rank, row in enumerate(held):
        for part, ranks in enumerate(row):
            edge = style.COLOURS["vermilion"] if (rank, part) in arrived else "0.6"
            ax.add_patch(plt.Rectangle((part + 0.04, rank + 0.04), 0.92, 0.92, ec=edge,
                                       fc=shades[len(ranks) - 1], lw=3 if arrived and
                                       (rank, part) in arrived else 1))  # fmt: skip
            text = "+".join("abcd"[r] for r in sorted(ranks))
            ax.text(part + 0.5, rank + 0.5, text, ha="center", va="center", fontsize=12)
    ax.set(xlim=(0, 4), ylim=(4, 0), xlabel="part", xticks=[0.5, 1.5, 2.5, 3.5],
           xticklabels=range(4), yticks=[0.5, 1.5, 2.5, 3.5],
           yticklabels=[f"rank {r}" for r in range(4)], title=title)  # fmt: skip
    ax.grid(visible=False)


Stepper(ring_frames(), draw_ring, strip=[0, 1, 3, 6], size=(5.4, 2.8))

# %% [markdown] slideshow={"slide_type": "fragment"}
# After N - 1 steps each part is finished somewhere (a reduce-scatter); after N - 1 more it is
# finished everywhere (an all-gather). A myth: "a ring gathers everything on one GPU". Nobody holds
# more than one tensor, at any time.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Below, four ways to the same sum, on eight ranks: the ledger's matrix says who sent how much to
# whom.

# %% slideshow={"slide_type": "fragment"}
x = torch.ones(8, 1250)  # 40 kB
done = {
    name: run(8, lambda comm, each=each: each(comm, x).sum().item(), hardware=CLASSROOM)
    for name, each in ALGORITHMS.items()
}
largest = max(max(map(max, d.trace.traffic_matrix())) for d in done.values())
fig, axes = plt.subplots(1, 4, figsize=(13.5, 3.7))
for ax, (name, d) in zip(axes, done.items(), strict=True):
    traffic(ax, d.trace, largest_bytes=largest)
    busiest = max(d.trace.total(rank=r).wire_bytes for r in range(8))
    ax.set_title(f"{name}: the busiest\nrank sends {busiest / 1e3:.0f} kB")
    if name != "gossip":
        ax.images[0].colorbar.remove()  # one scale for all
plt.show()
assert all(result == 8 * x.numel() for d in done.values() for result in d.results)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Gossip passes whole tensors round the ring and adds at home. Its values are right. "All-reduce is
# just an all-gather and a local sum" is a myth that costs a factor of N/2 in bytes.
#
# **Exercise.** `ring_all_reduce`, from `isend` and `recv`. Bytes and time are graded as well.

# %% slideshow={"slide_type": "skip"}
check("ring_all_reduce")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. What it costs
#
# A message of n bytes takes $\alpha + n/\beta$: a latency, and n over the bandwidth. For a tensor
# of B bytes on N ranks:
#
# | | steps | bytes a step | seconds |
# |---|---|---|---|
# | star | $2(N-1)$ | $B$ | $2(N-1)(\alpha + B/\beta)$ |
# | tree | $2\lceil\log_2 N\rceil$ | $B$ | $2\lceil\log_2 N\rceil(\alpha + B/\beta)$ |
# | ring | $2(N-1)$ | $B/N$ | $2(N-1)(\alpha + B/N\beta)$ |
# | gossip | $N-1$ | $B$ | $(N-1)(\alpha + B/\beta)$ |
#
# **Question.** 64 ranks. Which is fastest for 1 kB, which for 100 MB?
#
# <!-- notes: Let them put N = 64 in: 126 steps for star and ring, 12 for the tree, 63 for gossip.
# With 1 kB only steps count, so the tree; with 100 MB the ring, whose steps carry a 64th. "The ring
# is best" is the wrong sentence to clear away. On the last page count the bars: 30 µs beside 12,
# with the same six steps. Seven minutes; `all_reduce_seconds` in the laboratory. -->

# %% slideshow={"slide_type": "subslide"}
sizes = [4 * 8 * 2**i for i in range(0, 24)]
fig, ax = plt.subplots(figsize=(8, 4.4))
for name, each in ALGORITHMS.items():
    seconds = [all_reduce_cost(name, 64, size).seconds(DGX_H100.intra) for size in sizes]
    (line,) = ax.loglog(sizes, [s * 1e6 for s in seconds], label=name)
    for size in sizes[3:16:4]:  # up to 1 MB, the simulated machine itself
        y = torch.ones(size // 4)
        one_node = run(8, lambda comm, each=each, y=y: each(comm, y).numel()).trace.seconds
        formula = all_reduce_cost(name, 8, size).seconds(DGX_H100.intra)
        assert abs(one_node / formula - 1) < 1e-9
style.label_lines(ax)
ax.set(xlabel="bytes of the tensor", ylabel="microseconds on 64 ranks (NVLink)")
plt.show()
fastest = {
    size: min(ALGORITHMS, key=lambda n: all_reduce_cost(n, 64, size).seconds(DGX_H100.intra))
    for size in (1_000, 100_000_000)
}
print(fastest)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Few steps win for small tensors, few bytes for large ones: libraries have several algorithms and
# choose. The cell also asserts that the simulated machine, message by message on eight ranks, takes
# exactly what the formula says.

# %% slideshow={"slide_type": "subslide"}
fig, axes = plt.subplots(2, 1, figsize=(11, 4.4), sharex=True)
for ax, name in zip(axes, ("star", "ring"), strict=True):
    trace = run(4, lambda comm, name=name: ALGORITHMS[name](comm, x).numel(),
                hardware=CLASSROOM).trace  # fmt: skip
    timeline(ax, trace, streams=["communication"], seconds=3e-5,
             colours={"send": style.COLOURS["blue"], "recv": style.COLOURS["sky"]})  # fmt: skip
    ax.set_title(f"{name}: {trace.seconds * 1e6:.0f} µs", fontsize=12)
axes[0].set_xlabel("")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# In the star one pair talks while the others wait. In the ring everybody sends and receives all
# the time: two bars above each other.
#
# **Exercise.** `all_reduce_seconds`

# %% slideshow={"slide_type": "skip"}
check("all_reduce_seconds")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Data parallelism
#
# The loss of a batch is a mean over rows, so its gradient is a mean of gradients:
#
# $$\nabla L = \frac{1}{B}\sum_{i=1}^{B} \nabla \ell_i = \frac{1}{N}\sum_{r=1}^{N} \nabla L_r$$
#
# if each of N ranks has B/N rows.
#
# **Question.** And if they do not?
#
# <!-- notes: Two numbers on the board do it: the mean of 13 rows and the means of single rows,
# averaged as if equal. With 13, 1, 1, 1 rows the gradient is off by 48 %, and the loss still falls,
# which is why the mistake lives. Ask for the repair: sum the gradients of sums, divide by all rows.
# The same trap waits with padded tokens. Five minutes; `mean_gradient` in the laboratory. -->


# %% slideshow={"slide_type": "fragment"}
def gradient_of(model, rows):
    model.zero_grad()
    loss_of(model, rows).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def mean_of_means(comm, sizes):
    return comm.all_reduce(gradient_of(new_model(), tokens.split(sizes)[comm.rank]), "mean")


whole = gradient_of(new_model(), tokens)
for sizes in ([4, 4, 4, 4], [13, 1, 1, 1]):
    ours = run(4, mean_of_means, sizes, is_measured=False).results[0]
    print(f"rows {sizes}: error {100 * ((ours - whole).norm() / whole.norm()).item():.3f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# With equal parts the difference is rounding. With unequal ones a mean of means is another
# gradient: sum, and divide by all rows. And a *sum* over ranks would be four times too long.
#
# **Exercise.** `mean_gradient`

# %% slideshow={"slide_type": "skip"}
check("mean_gradient")

# %% [markdown] slideshow={"slide_type": "slide"}
# The older way, `nn.DataParallel`: one process owns the model. In each step it sends the weights to
# all devices and the rows to each, gathers all outputs, computes the loss, sends gradients of the
# outputs back, and collects those of the weights.
#
# **Question.** The values are the same. Is it the same but slower?
#
# <!-- notes: Let one student draw the arrows of a step of `nn.DataParallel`: weights out, rows out,
# outputs back, gradients out and back. Then the table: the error is the same, the bytes are about
# the same on this tiny model, and memory is not: 6.49 MB on rank 0, 4.75 on the others. Ask what
# grows with the batch on rank 0. Three minutes. -->


# %% slideshow={"slide_type": "fragment"}
def dp(comm):
    model = new_model()
    comm.traffic.reset()
    loss = lambda logits: F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())  # noqa: E731
    data_parallel_step(comm, model, tokens[:, :-1], loss)
    return torch.cat([p.grad.flatten() for p in model.parameters()]) if comm.rank == 0 else None


def ddp(comm):
    model = new_model()
    wrapped = DDP(model, comm, broadcast_buffers=False)
    comm.traffic.reset()
    loss_of(wrapped, rows_of(comm)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


rows = [("", "error", "sent by rank 0", "by the others", "at most held by rank 0", "by rank 1")]
for name, program in (("DP", dp), ("DDP", ddp)):
    trace = (done := run(4, program)).trace
    ours = done.results[0]
    sent = [trace.total(rank=r).wire_bytes / 1e3 for r in range(4)]
    held = [use.peak_bytes / 1e6 for use in trace.memory().values()]
    rows.append((name, f"{((ours - whole).norm() / whole.norm()).item():.0e}",
                 f"{sent[0]:,.0f} kB", f"{sent[3]:,.0f} kB", f"{held[0]:.2f} MB",
                 f"{held[1]:.2f} MB"))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# No. Weights travel in every step; rank 0 holds all logits, so it runs out of memory first; and one
# interpreter drives all devices. In DDP all ranks are alike, and only gradients travel.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Hooks and overlap
#
# **Question.** Backward makes the last layer's gradient first. Why wait for the first layer's
# before sending anything?
#
# <!-- notes: Nobody finds a reason to wait, so ask what stops them: who would call the network in
# the middle of backward? Hence hooks. The three timelines are 470, 363 and 493 µs: sending each
# tensor alone is slower than not overlapping at all, which few predict. Point at the orange that
# sticks out at the right end: nothing is left to hide it. End of the first 40 minutes. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# A hook on each parameter runs when its gradient is there. It starts an all-reduce and returns;
# backward goes on. At the end of backward the results are awaited.


# %% slideshow={"slide_type": "subslide"}
def one_step(comm, bucket_bytes):
    model = new_model()
    wrapped = DDP(model, comm, bucket_bytes=bucket_bytes, broadcast_buffers=False)
    start = comm.now_seconds
    with comm.region("forward"):
        loss = loss_of(wrapped, rows_of(comm).repeat(2, 1))
    with comm.region("backward"):
        loss.backward()
    return start, comm.now_seconds - start


fig, axes = plt.subplots(3, 1, figsize=(11, 4.4), sharex=True)
shown = {"one bucket, at the end": 10**9, "buckets of 100 kB": 100_000, "one for each tensor": 1}
for ax, (name, bucket_bytes) in zip(axes, shown.items(), strict=True):
    done = run(4, one_step, bucket_bytes, hardware=CLASSROOM)
    start, seconds = done.results[0]
    for event in done.trace.timeline(rank=0):
        if event.start_seconds >= start:
            ax.barh(
                event.stream == "compute",
                (event.end_seconds - event.start_seconds) * 1e6,
                left=(event.start_seconds - start) * 1e6,
                color=style.COLOURS["blue" if event.stream == "compute" else "vermilion"],
                alpha=0.55 if event.name == "forward" else 1,
                edgecolor="white",
            )
    ax.set(yticks=(0, 1), yticklabels=("network", "compute"), ylim=(-0.5, 1.5))
    ax.set_title(f"{name}: {seconds * 1e6:.0f} µs", fontsize=12)
    ax.grid(visible=False)
axes[-1].set_xlabel("virtual time on rank 0 of 4 (µs); pale: forward")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The whole of DDP: a broadcast at the start, hooks, and a wait. What cannot hide is what comes
# last: the bucket of the first layer, for which there is no more backward to hide behind.
#
# **Exercise.** `overlapped_backward`: graded by the clock.

# %% slideshow={"slide_type": "skip"}
check("overlapped_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Buckets
#
# **Question.** Small buckets start early. Large ones pay the latency less often. Where is the best?
#
# <!-- notes: Have the curve drawn by somebody before it is shown; a valley is the easy part. The
# best is ten buckets with 359 µs, and computing alone is the floor that no bucket reaches. Ask what
# happens if rank 0 fills bucket 3 first and rank 1 bucket 2: different sums meet, or nobody moves.
# So buckets leave in order. Six minutes; `assign_buckets` is for home. -->

# %% slideshow={"slide_type": "fragment"}
bucket_sizes = [1, 10_000, 30_000, 60_000, 100_000, 150_000, 250_000, 500_000, 10**9]
times = [run(4, one_step, size, hardware=CLASSROOM).results[0][1] * 1e6 for size in bucket_sizes]
computing = [e for e in run(4, one_step, 1, hardware=CLASSROOM).trace.timeline(rank=0)
             if e.stream == "compute"]  # fmt: skip
alone = sum(e.end_seconds - e.start_seconds for e in computing) * 1e6
counts = [len(divide(new_model().named_parameters(), size)) for size in bucket_sizes]
fig, ax = plt.subplots(figsize=(11, 2.8))
ax.plot(counts, times, "o-")
ax.axhline(alone, color="0.5", lw=1, ls="--")
ax.text(1, alone + 4, "computing alone", color="0.35")
ax.set(xlabel="number of buckets", ylabel="step on 4 ranks (µs)", xscale="log",
       ylim=(alone - 15, None), xticks=[1, 2, 5, 10, 20, 40],
       xticklabels=["1", "2", "5", "10", "20", "40"])  # fmt: skip
ax.minorticks_off()
plt.show()
best = min(range(len(times)), key=times.__getitem__)
print(f"best: {bucket_sizes[best]:,} bytes, {counts[best]} buckets, {times[best]:.0f} µs; "
      f"one bucket {times[-1]:.0f} µs, one a tensor {times[0]:.0f} µs")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# PyTorch takes 25 MiB, and 1 MiB for the first bucket, so that the network starts early. All ranks
# must reduce the same bucket next, whatever is full first: buckets leave strictly in order.
#
# **Exercise.** `assign_buckets`

# %% slideshow={"slide_type": "skip"}
check("assign_buckets")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Accumulation
#
# **Question.** Four micro-batches make one step. How often must gradients travel?
#
# <!-- notes: Vote between once and four times, then ask the harder question: if they travel four
# times, is the result wrong? No, both errors are 1e-07; only 3.48 MB become 0.87. Let somebody show
# why: the mean of a mean and of new parts is linear. Show the one line, `with wrapped.no_sync()`,
# in the notebook. Four minutes; `accumulated_gradient` is for home. -->


# %% slideshow={"slide_type": "skip"}
def accumulate(comm, is_lazy):
    model = new_model()
    wrapped = DDP(model, comm, broadcast_buffers=False)
    comm.traffic.reset()
    *first, last = rows_of(comm).chunk(4)
    for rows in first:
        if is_lazy:
            with wrapped.no_sync():
                (loss_of(wrapped, rows) / 4).backward()
        else:
            (loss_of(wrapped, rows) / 4).backward()
    (loss_of(wrapped, last) / 4).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), comm.traffic.total()


# %% slideshow={"slide_type": "fragment"}
for is_lazy in (False, True):
    gradient, sent = run(2, accumulate, is_lazy).results[0]
    error = ((gradient - whole).norm() / whole.norm()).item()
    print(f"{'no_sync   ' if is_lazy else 'every time'}: {sent.wire_bytes / 1e6:.2f} MB sent, "
          f"error {error:.0e}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Once. Both are right: an average of what is already averaged does not change it, and the new part
# is averaged with it. Only the bytes differ.
#
# **Exercise.** `accumulated_gradient`

# %% slideshow={"slide_type": "skip"}
check("accumulated_gradient")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Unused parameters
#
# **Question.** A model with two branches takes the left one on rank 0 and the right one on rank 1.
# Whose hook fires for the right branch on rank 0?
#
# <!-- notes: Wait for "nobody's", then ask what the other rank does meanwhile: it waits, for ever.
# The error message names the four tensors, and the remedy. In the last line explain the 1.: two
# rows give 2 on one rank, 0 on the other, and the mean is 1. Idle stays None, not zero; ask what
# AdamW would do with a zero. Six minutes. -->


# %% slideshow={"slide_type": "skip"}
class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.idle = nn.Linear(3, 1), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, goes_left):
        return (self.left if goes_left else self.right)(x)


def branch(comm, finds_unused):
    model = Branches()
    wrapped = DDP(model, comm, find_unused_parameters=finds_unused)
    wrapped(torch.ones(2, 3), comm.rank == 0).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}


# %% slideshow={"slide_type": "fragment"}
try:
    run(2, branch, False)
except RuntimeError as error:
    print(str(error).split("\n")[0], "\n")
print(run(2, branch, True).results[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# Nobody's: the bucket would never be full, and the others would wait for ever. With
# `find_unused_parameters` the graph is searched after each forward, and what it does not reach
# counts as there, with zeros. The means are right: each branch got 2 from one rank of two. What no
# rank used keeps its `None`, so that an optimizer leaves it alone.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Buffers and batch normalization
#
# DDP exchanges gradients. Running statistics are no gradients: each rank's BatchNorm sees its own
# rows, and rank 0's buffers simply overwrite the others'.
#
# **Question.** Eight ranks with two rows each. How far is their variance from that of all 16?
#
# <!-- notes: Send them back to chapter 01: two numbers, centred and scaled, are +1 and -1, whatever
# they were. So the guess of a few per cent is far off: 88.6 % at two rows, and still 31.8 % at
# eight. SyncBatchNorm is 0.0 % everywhere, for one message each way. Ask why nobody with a
# transformer has met this. Six minutes; `batch_statistics` is for home. -->


# %% slideshow={"slide_type": "skip"}
features = torch.randn(16, 4, 50, generator=torch.Generator().manual_seed(0)) * 2 + 1


def normalized(comm, is_synchronised):
    layer = nn.BatchNorm1d(50)
    layer = SyncBatchNorm(layer, comm) if is_synchronised else layer
    return layer(features[:, 0].chunk(comm.size)[comm.rank])


truth = nn.BatchNorm1d(50)(features[:, 0])
rows = [("ranks", "rows on each", "BatchNorm", "SyncBatchNorm")]
for n in (1, 2, 4, 8):
    errors = []
    for is_synchronised in (False, True):
        out = torch.cat(run(n, normalized, is_synchronised).results)
        errors.append(f"{100 * ((out - truth).norm() / truth.norm()).item():.1f} %")
    rows.append((n, 16 // n, *errors))

# %% slideshow={"slide_type": "fragment"}
table(*rows)
print("(error of the normalized output, beside one rank with all 16 rows)")

# %% [markdown] slideshow={"slide_type": "fragment"}
# With two rows on a rank, BatchNorm is another function: outputs are near 1 and -1 whatever comes
# in. SyncBatchNorm gathers each rank's mean, squares around it, and number of rows, and merges
# them: one message forward, one backward.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** Sums of $x$ and $x^2$ would travel as well, and their variance
# is $E[x^2] - E[x]^2$: two large numbers, far from zero, of whose difference nothing is right.
# tt-metal's batch norm gave NaN (tt-metal #45968); XLA's had the same formula (tensorflow #25115).
#
# <!-- notes: At a mean of 1000 both are a million, and float32's spacing there is 0.06: ask what
# can be left of a variance of 0.01. The merged form adds squares of small distances alone. Two
# minutes. In the exercise the one-pass answer is refused by name; two rounds are fine. -->


# %% slideshow={"slide_type": "fragment"}
def variances(comm, mean):
    x = mean + 0.1 * features[:, 0].chunk(comm.size)[comm.rank]
    sums = comm.all_reduce(torch.stack([x.sum(0), x.square().sum(0)])) / len(features)
    layer = SyncBatchNorm(nn.BatchNorm1d(50, momentum=1), comm)
    layer(x)
    return sums[1] - sums[0].square(), layer.running_var * 15 / 16


rows = [("mean", "from two sums", "merged")]
for mean in (0, 10, 1000):
    exact = (mean + 0.1 * features[:, 0]).double().var(0, unbiased=False)
    errors = [
        ((var - exact).norm() / exact.norm()).item() for var in run(4, variances, mean).results[0]
    ]
    rows.append((mean, *(f"{100 * e:.0f} %" if e < 1 else "over 100 %" for e in errors)))
table(*rows)
print("(error of the variance of 16 rows on 4 ranks)")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `batch_statistics`

# %% [markdown] slideshow={"slide_type": "skip"}
# Transformers normalize rows by themselves (chapter 01) and have no such problem.

# %% slideshow={"slide_type": "skip"}
check("batch_statistics")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Uneven inputs
#
# **Question.** Rank 2 has one batch less than the others, and leaves the loop. What happens?
#
# <!-- notes: Ask who has watched a job hang, and how it was found. The simulator says it in four
# lines: ranks 0 and 1 wait in collective 4, rank 2 has finished. Before the second page collect
# remedies: drop the batch, repeat one, go on with zeros. Then ask for the divisor with zeros, 3 or
# 2; both exist, and the page says which is PyTorch's. Six minutes. -->


# %% slideshow={"slide_type": "fragment"}
def leaves_early(comm):
    wrapped = DDP(nn.Linear(3, 1), comm)
    for _ in range(2 if comm.rank == 2 else 3):
        wrapped(torch.ones(1, 3)).sum().backward()


try:
    run(3, leaves_early)
except Deadlock as error:
    for line in str(error).split("\n"):
        print(line.split(" (asked by")[0].split(".py:")[0].rsplit(" at ", 1)[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# On real machines: silence, and after half an hour a timeout. Here nobody is left who could run, so
# it is known at once who waits for whom, and in which line.


# %% slideshow={"slide_type": "fragment"}
def stays(comm):
    model = nn.Linear(3, 1, bias=False)
    wrapped = DDP(model, comm)
    batches = [torch.ones(1, 3)] * (2 if comm.rank == 2 else 3)
    means = []
    for batch in uneven(wrapped, batches, divide_by_initial_world_size=False):
        model.zero_grad()
        wrapped(batch).sum().backward()
        means.append(model.weight.grad[0, 0].item())
    return means


print("mean gradients by rank:", run(3, stays).results)

# %% [markdown] slideshow={"slide_type": "fragment"}
# `uneven` keeps the rank in the game: it answers each all-reduce with zeros until all are done. The
# mean is over those who have data; dividing by all ranks is the other choice, PyTorch's default.
#
# **Exercise.** `train_until_all_are_done`

# %% slideshow={"slide_type": "skip"}
check("train_until_all_are_done")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. When a rank dies
#
# **Question.** Step 9 of 16: a node fails, and three ranks are left. What must have been saved, and
# which rows come next?
#
# <!-- notes: Collect what must be in the file. Weights come at once, optimizer states after a
# while, the step last, and the order of the rows hardly ever. Then the figure: saved after step 7,
# died at 9, so step 8 is done twice, and the losses of three ranks lie on those of four, to 0.0000.
# Ask what would be seen if rows depended on N. Seven minutes, end of the lecture. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Replicas are equal, so rank 0's weights and optimizer states are everybody's. If the rows of step
# i depend on i alone, and not on N, three ranks can go on where four stopped.


# %% slideshow={"slide_type": "subslide"}
def train(comm, path, dies_at=None):
    model = new_model()
    wrapped, optimizer = DDP(model, comm), torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = {}
    for step in range(load_replica(comm, path, model, optimizer), 16):
        if (comm.size, step) == (4, dies_at) and comm.rank == 3:
            raise OSError("the node of rank 3 has died")
        rows = tokens[rows_of_step(len(tokens), 12, step, comm.size, comm.rank)]
        optimizer.zero_grad()
        loss = loss_of(wrapped, rows)
        loss.backward()
        optimizer.step()
        losses[step] = comm.all_reduce(loss.detach(), "mean").item()
        if step % 4 == 3:
            save_replica(comm, path, model, optimizer, step + 1)
    return losses


with tempfile.TemporaryDirectory() as folder:
    done = run_with_restarts((4, 3), train, Path(folder) / "state.pt", 9, is_measured=False)
    whole_run = run(4, train, Path(folder) / "other.pt", is_measured=False).results[0]
print("ended by:", *done.failures)
after = done.run.results[0]
print(f"went on with {len(done.run.results)} ranks from step {min(after)}, of which step 8 is done "
      "again")  # fmt: skip
print(f"largest difference of the losses: {max(abs(after[s] - whole_run[s]) for s in after):.4f}")

# %% slideshow={"slide_type": "fragment"}
fig, ax = plt.subplots(figsize=(10.5, 3.4))
ax.plot(
    list(whole_run), list(whole_run.values()), color="0.6", lw=6, label="four ranks, never stopped"
)
ax.plot(list(after), list(after.values()), label="three ranks, from step 8")
ax.axvline(9, color=style.COLOURS["vermilion"], lw=1, ls="--")
ax.text(9.1, max(whole_run.values()), "the node dies", color=style.COLOURS["vermilion"], va="top")
ax.set(xlabel="step", ylabel="loss", xlim=(0, 15))
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# This is `torchrun`'s rule: when one dies, stop all, and start again from the last checkpoint with
# those who are there.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Proof against production
#
# Two real processes, gloo between them: PyTorch's DistributedDataParallel and ours train the same
# Llama on the same rows; then the same program on simulated ranks.
#
# <!-- notes: Two minutes in the laboratory. The lines to read are the first two, 39 of 39 tensors
# equal bit for bit, and the third, 2e-05: data parallelism is not bit for bit the same as one rank
# with all rows. Ask why: sums are taken in another order. Whoever demands equality there tests the
# wrong thing. -->


# %% slideshow={"slide_type": "fragment"}
def three_steps(comm, wrap):
    model = new_model()
    wrapped = wrap(model, comm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(wrapped, rows_of(comm)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def both(comm):
    return three_steps(comm, lambda m, _: DistributedDataParallel(m)), three_steps(comm, DDP)


theirs, ours = run(2, both, backend="processes", is_measured=False).results[1]
simulated = run(2, three_steps, DDP).results[1]
for name, found in (("on real processes", ours), ("on simulated ranks", simulated)):
    equal = sum(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    print(f"{name}: {equal} of {len(theirs)} tensors equal PyTorch's bit for bit")
alone = run(1, three_steps, DDP).results[0]
difference = max((a - b).abs().max().item() for a, b in zip(ours, alone, strict=True))
print(f"largest difference from one rank with all rows: {difference:.0e}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests go on: all collectives against gloo, buckets against PyTorch's own rule, unused
# parameters, buffers, `join`, `DistributedSampler`, BatchNorm on all rows.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Published figures, recomputed
#
# <!-- notes: For home, or two minutes. Have 497.8 MB divided by 25 MiB: 19 buckets and one for the
# first MiB. It is 13, and the question is where the others went. A tensor is never cut, so buckets
# overshoot, and the embedding alone is 147 MiB. The ring's row, 1 to 1.97, says why the cost hardly
# depends on N. -->

# %% slideshow={"slide_type": "skip"}
shares = []
for n in (2, 4, 8, 64):
    y = torch.ones(n * 4)
    trace = run(n, lambda comm, y=y: ring_all_reduce(comm, y).numel(), is_measured=False).trace
    shares.append(trace.total(rank=0).wire_bytes / y.nbytes)

block = [(768,)] * 2 + [(768, 2304), (2304,), (768, 768), (768,)]  # GPT-2, 124 million
block += [(768,)] * 2 + [(768, 3072), (3072,), (3072, 768), (768,)]
shapes = [(50257, 768), (1024, 768)] + 12 * block + [(768,)] * 2
gpt2 = [(str(i), nn.Parameter(torch.empty(s, device="meta"))) for i, s in enumerate(shapes)]
buckets = divide(gpt2, 25 * 2**20, 2**20)
published = (
    ("", "published", "here"),
    ("ring all-reduce, N = 2, 4, 8, 64: bytes / B", "2 (N-1)/N",
     ", ".join(f"{s:.5g}" for s in shares)),
    ("GPT-2's gradients in float32", "497.8 MB", f"{num_bytes(p for _, p in gpt2) / 1e6:.1f} MB"),
    ("in buckets of 25 MiB, the first 1 MiB", "at least 19 + 1", len(buckets)),
    ("the largest bucket (the embedding)", "",
     f"{max(num_bytes(p for _, p in b) for b in buckets) / 2**20:.0f} MiB"),
)  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
table(*published)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Fewer buckets than the quotient of bytes: a tensor is never cut, so buckets overshoot, and the
# embedding's 147 MiB lie in one, the last to leave, with nothing left to hide behind.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16. What breaks in practice
#
# - **A collective in a branch**: `if rank == 0: all_reduce(...)`. The others go on to their next
#   collective, and two different ones meet.
#
# <!-- notes: Show the program and let the room find the line; the comment "only rank 0 prints"
# misleads. Then the three lines of the error: an all_reduce has met a broadcast. On the next page
# ask of each bullet whether it hangs, fails or stays silent. All five are silent, which is the
# point. In the laboratory's discussion: which mistake of yours would have hung 1,000 GPUs? -->


# %% slideshow={"slide_type": "fragment"}
def in_a_branch(comm):
    loss = torch.ones(())
    if comm.rank == 0:
        comm.all_reduce(loss)  # "only rank 0 prints"
    comm.broadcast(torch.ones(4), src=0)


try:
    run(2, in_a_branch)
except RuntimeError as error:
    for line in str(error).split("\n")[:3]:
        print(line.split(" (asked by")[0].split(".py:")[0].rsplit(" at ", 1)[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **The seed is the same on all ranks**: every rank draws the same dropout masks. Seed with
#   seed + rank, but shuffle with the same seed everywhere.
# - **`set_epoch` is forgotten**: each epoch has the same order.
# - **The learning rate stays** when the batch grows N-fold: fewer steps of the same size.
# - **Metrics of rank 0** are metrics of one N-th of the data.
# - **Buffers are broadcast in each forward**, also those that never change.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** Backends compare nothing. Ranks whose tensors differ hang or
# get garbage (nccl #1394, #1417); a max keeps a NaN or loses it by the rank that has it (mlx
# #4072, and gloo below); a buffer is used again while it is still being sent (sglang #28901).
#
# <!-- notes: Two real processes, first as gloo has it, then as `Comm` has it. Ask before the first
# line what 1 and 1 make when one rank says float32 and the other int32: 1 on one rank, on the other
# the bits of 1.0 read as an integer, and no error anywhere. Then the NaN: rank 1's is lost, the
# other stays; a guard that looks for NaN in the maximum works for one rank in two. Last the buffer:
# the message leaves when it likes: what arrives is the old value or the new. Three minutes. -->


# %% slideshow={"slide_type": "skip"}
def went_wrong(comm):
    said = []
    ones = torch.ones(2, dtype=torch.int32 if comm.rank else torch.float32)
    loss = torch.tensor([1.0, torch.nan] if comm.rank else [torch.nan, 2.0])
    plain_sum, plain_max = ones.clone(), loss.clone()
    dist.all_reduce(plain_sum)
    dist.all_reduce(plain_max, dist.ReduceOp.MAX)
    try:
        comm.all_reduce(ones)
    except CollectiveMismatch as error:
        said.append(str(error).split("\n")[0])
    ours_max = comm.all_reduce(loss, "max")
    message = torch.zeros(2)
    under_way = comm.irecv(message, src=0) if comm.rank else comm.isend(message, dst=1)
    if comm.rank == 0:
        message += 1
    try:
        under_way.wait()
    except RuntimeError as error:
        said.append(str(error).split(";")[0])
    return [t.tolist() for t in (plain_sum, plain_max, ours_max)], said


# %% slideshow={"slide_type": "fragment"}
for rank, (values, said) in enumerate(run(2, went_wrong, backend="processes").results):
    print(f"rank {rank}: sum of 1 and 1 by gloo {values[0]}")
    print(f"        max by gloo {values[1]}, ours {values[2]}")
    print("        ours:", "\n              ".join(said))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 17. Summary
#
# - Equal starts and equal gradients keep replicas equal: one broadcast, then one all-reduce a step.
# - A ring sends 2(N-1)/N of the tensor from each rank, however many there are; a tree has fewer
#   steps. Latency or bytes: the size decides.
# - Means over ranks are means over rows only if all have equally many.
# - Hooks and buckets hide the network behind backward, all but the last bucket.
# - What is no gradient must be looked after by itself: buffers, batch statistics, unused
#   parameters, ranks without data.
# - Every rank still holds the whole model, the whole gradient and all optimizer states: chapter 12.
#
# <!-- notes: They should be able to say when a mean of means is wrong, why there are buckets and
# why not one, and what is no gradient and is forgotten. In the laboratory: `ring_all_reduce`,
# `all_reduce_seconds`, `place_of_rank`, `mean_gradient`. At home: `assign_buckets`,
# `accumulated_gradient`, `batch_statistics`, `overlapped_backward`, `train_until_all_are_done`. The
# last bullet is next week's first question. -->
#
# **Further reading.** Li et al. 2020, *PyTorch Distributed* (arXiv 2006.15704); Patarasuk and Yuan
# 2009, *Bandwidth optimal all-reduce algorithms* (J. Parallel Distrib. Comput. 69); Thakur,
# Rabenseifner and Gropp 2005, *Optimization of collective communication operations in MPICH* (Int.
# J. High Perform. Comput. Appl. 19).
