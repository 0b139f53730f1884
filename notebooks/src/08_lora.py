# %% [markdown] slideshow={"slide_type": "slide"}
# # 08 LoRA and its relatives
#
# A model of 175 billion parameters is to learn a new subject. Training all of them takes 16 bytes
# each, and a full copy for every subject. Yet what fine-tuning *changes* is small. How small, and
# can one train just that?
#
# In this chapter you measure the change, build LoRA, merge it away, serve many adapters from one
# base, write files that `peft` reads, and race full fine-tuning, LoRA, prefixes and GaLore on real
# text.
#
# You need: chapter 05 (the model that is tuned here).

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1 GB of memory are enough. The slow cells are the runs of
# > sections 1 and 8 (about 3 seconds each; shrink `NUM_STEPS`) and the search of section 12 (shrink
# > `NUM_TRIALS`).

# %% slideshow={"slide_type": "skip"}
import argparse
import copy
import heapq
import inspect
import textwrap
import time

import matplotlib.pyplot as plt
import optuna
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autograder.notebook import check
from figures import style
from reference.lora import (
    GaLoreAdamW,
    LoRAConfig,
    PrefixTuning,
    PromptTuning,
    adapter_flops,
    add_adapter,
    add_bottlenecks,
    galore_bytes,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge,
    optimizer_state_bytes,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
    update_in_backward,
    use_rows,
)
from reference.transformer import Llama, LlamaConfig
from reference.transformer.course_model import load_course_model

torch.set_num_threads(1)
style.use()


def table(*rows):
    """Print rows as a table; the first row is the head, the first column stands left."""
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for i, row in enumerate(texts):
        first, *rest = (
            t.rjust(w) if j else t.ljust(w)
            for j, (t, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]))
        if i == 0:
            print("  ".join("-" * w for w in widths))


# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. How much of a weight changes?
#
# The small model of chapter 05 has read English prose about Python. Now it is to read Python: the
# source of `argparse`, `textwrap` and `heapq`. First by training everything.
#
# **Question.** A matrix of 344 x 128 changes by some $\Delta W$. How many directions does the
# change need?

# %% slideshow={"slide_type": "skip"}
NUM_STEPS, BATCH, SEQ_LEN = 40, 8, 64
base, tokenizer = load_course_model()
code = "".join(inspect.getsource(module) for module in (argparse, textwrap, heapq))
ids = torch.tensor(tokenizer.encode(code))
training, held_out = ids[:-4096], ids[-4096:].view(-1, SEQ_LEN)[:48]


def batches(num_steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(training) - SEQ_LEN, (BATCH,), generator=generator)
        yield training[starts[:, None] + torch.arange(SEQ_LEN)]


def loss_of(model, rows):
    return F.cross_entropy(model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def new_base():
    return copy.deepcopy(base).train()


@torch.no_grad()
def held_out_loss(model):
    return loss_of(model.eval(), held_out).item()


def tune(model, optimizer, num_steps=NUM_STEPS):
    """Train on code; (held-out loss, seconds a step)."""
    model.train()
    start = time.perf_counter()
    for rows in batches(num_steps):
        loss_of(model, rows).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.perf_counter() - start) / num_steps
    return held_out_loss(model), seconds


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, foreach=False)


# %% slideshow={"slide_type": "skip"}
full = new_base()
full_optimizer = adamw(full.parameters(), 1e-3)
full_loss, full_seconds = tune(full, full_optimizer)
before = held_out_loss(base)
print(f"{len(training):,} tokens of code; held-out loss {before:.2f} -> {full_loss:.2f}")

# %% slideshow={"slide_type": "subslide"}
fig, ax = plt.subplots()
half = {}
for name, colour in (("q_proj", "blue"), ("up_proj", "vermilion")):
    path = next(n for n, _ in full.named_modules() if n.endswith(f"layers.2.self_attn.{name}")
                or n.endswith(f"layers.2.mlp.{name}"))  # fmt: skip
    old, new = (m.get_submodule(path).weight.detach() for m in (base, full))
    for what, matrix, dashes in (("change", new - old, "-"), ("weight", old, "--")):
        values = torch.linalg.svdvals(matrix)
        share = values.square().cumsum(0) / values.square().sum()
        ax.plot(range(1, len(share) + 1), share, dashes, color=style.COLOURS[colour],
                label=f"{name}, {what}")  # fmt: skip
        half[name, what] = int((share < 0.9).sum()) + 1
ax.set(xscale="log", xlabel="singular directions kept", ylabel="share of the squared norm",
       ylim=(0, 1.02))  # fmt: skip
ax.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
ax.minorticks_off()
ax.legend(loc="lower right")
plt.show()
for (name, what), count in half.items():
    print(f"{name}, {what}: {count} of 128 directions for 90 %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The change needs fewer directions than the weight. Not *few*, in so small a model: the papers'
# models are a thousand times wider, and their changes no wider. But a question is worth asking: if
# we allow it only $r$ directions from the start, what is lost?

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Two thin matrices
#
# **Idea.** Freeze $W$ ($F \times D$). Beside it a product of two thin matrices learns:
#
# $$h = Wx + \frac{\alpha}{r}\, B A x \qquad A: r \times D, \quad B: F \times r$$
#
# $r(D + F)$ numbers in place of $DF$. The factor $\alpha / r$ keeps the update's size when $r$
# changes (about: rsLoRA argues for $\alpha / \sqrt r$).

# %% slideshow={"slide_type": "fragment"}
tuned = add_adapter(new_base(), LoRAConfig(rank=4, alpha=8, targets="all-linear"))
layer = tuned.layers[0].mlp.up_proj
print("weight ", tuple(layer.weight.shape), " requires a gradient:", layer.weight.requires_grad)
for name, p in layer.adapters["default"].named_parameters():
    print(f"{name}      ", tuple(p.shape), " requires a gradient:", p.requires_grad)
count = sum(p.numel() for p in trainable_parameters(tuned))
print(f"trained: {count:,} of {sum(p.numel() for p in base.parameters()):,}")

# %% [markdown] slideshow={"slide_type": "slide"}
# **Question.** With $\alpha$ fixed, how does the size of an update depend on the rank? Random A and
# B of unit variance, for both scalings.

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
rows = [("rank", "alpha / r", "alpha / sqrt(r)")]
for rank in (1, 4, 16, 64):
    a, b = (torch.randn(s, generator=generator) for s in ((rank, 128), (344, rank)))
    size = (b @ a).square().mean().sqrt().item()
    rows.append((rank, f"{size / rank:.2f}", f"{size / rank**0.5:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# By $r$ the update shrinks as the rank grows: large ranks learn slowly. By $\sqrt r$ it stays.
#
# **Exercise.** `lora_forward`

# %% slideshow={"slide_type": "skip"}
check("lora_forward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Where it begins
#
# **Question.** $BA$ must be zero at the start, or the model is damaged before it learns. Three
# ways: both random; both zero; A random and B zero. Which of them learn?
#
# <!-- notes: take a vote. "Both zero" usually wins some hands: it is safe, and it is dead. -->


# %% slideshow={"slide_type": "fragment"}
def begun(kind):
    torch.manual_seed(0)
    model = add_adapter(new_base(), LoRAConfig(rank=4, alpha=8, targets="all-linear"))
    with torch.no_grad():
        for layer in lora_layers(model):
            adapter = layer.adapter("default")
            if kind == "both random":
                adapter.b.normal_(std=0.5)
            if kind == "both zero":
                adapter.a.zero_()
    first = held_out_loss(model)
    return first, tune(model, adamw(trainable_parameters(model), 5e-3), 15)[0]


rows = [("start", "loss before", "after 15 steps")]
for kind in ("both random", "both zero", "A random, B zero"):
    rows.append((kind, *(f"{loss:.2f}" for loss in begun(kind))))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Both zero is a saddle: each gradient is a product with the other matrix.
#
# **Exercise.** `initial_adapter`

# %% slideshow={"slide_type": "skip"}
check("initial_adapter")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. What learns first
#
# **Question.** With $y = s\, x A^\top B^\top$ and $B = 0$: which of the two has a gradient in the
# first step?
#
# $$\nabla_B = s\, \nabla_y^\top (x A^\top) \qquad \nabla_A = s\, (\nabla_y B)^\top x$$

# %% slideshow={"slide_type": "fragment"}
torch.manual_seed(0)
watched = add_adapter(new_base(), LoRAConfig(rank=4, alpha=8, targets="all-linear"))
optimizer = adamw(trainable_parameters(watched), 5e-3)
rows = [("step", "gradient of A", "gradient of B")]
for step, batch in enumerate(batches(3)):
    optimizer.zero_grad()
    loss_of(watched, batch).backward()
    sizes = [
        torch.stack([getattr(m.adapter("default"), n).grad.norm() for m in lora_layers(watched)])
        for n in "ab"
    ]
    rows.append((step, *(f"{size.norm().item():.3f}" for size in sizes)))
    optimizer.step()
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# B moves first, A from the second step on. And $W$? It has no gradient, but $\nabla_x$ must pass
# through it.
#
# **Exercise.** `adapter_gradients`

# %% slideshow={"slide_type": "skip"}
check("adapter_gradients")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Merging
#
# **Question.** "An adapter costs time at inference." Does it have to?
#
# $Wx + sBAx = (W + sBA)x$: add it in, and the layer is an ordinary one.


# %% slideshow={"slide_type": "fragment"}
def flops(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(held_out[:2])
    return counter.get_total_flops()


model = add_adapter(new_base(), LoRAConfig(rank=16, alpha=32, targets="all-linear"))
tune(model, adamw(trainable_parameters(model), 5e-3), 5)
weights = copy.deepcopy(model.state_dict())
plain, with_adapter = flops(base), flops(model)
logits = model(held_out[:2]).detach()
merge(model)
merged = model(held_out[:2]).detach()
print(f"FLOPs: base {plain:,}, with adapter {with_adapter:,}, merged {flops(model):,}")
print(f"logits merged and not: differ by at most {(merged - logits).abs().max():.0e}")
assert with_adapter == plain + adapter_flops(base, 0) + 2 * 2 * SEQ_LEN * sum(
    16 * sum(m.weight.shape) for m in lora_layers(model)
)
unmerge(model)
same = all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
print("after unmerge the weights are as they were, bit for bit:", same)

# %% [markdown] slideshow={"slide_type": "fragment"}
# To unmerge by subtracting is not exact: $(W + \Delta) - \Delta$ rounds twice. We keep $W$.

# %% slideshow={"slide_type": "fragment"}
w, delta = layer.weight.detach(), torch.randn_like(layer.weight) * 0.02
for dtype in (torch.float32, torch.bfloat16):
    back = (w.to(dtype) + delta.to(dtype)) - delta.to(dtype)
    changed = (back != w.to(dtype)).float().mean().item()
    print(f"{str(dtype)[6:]:9} added and subtracted: {100 * changed:.0f} % of the weights changed")

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `merge_adapters`

# %% slideshow={"slide_type": "skip"}
check("merge_adapters")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Many adapters, one base
#
# **Question.** A hundred customers, a hundred adapters. Their requests come in one batch. A hundred
# models?
#
# The base is shared: one product for all rows. Only the thin ones differ, and go in a batched
# product, each row with its own A and B.

# %% slideshow={"slide_type": "fragment"}
many = new_base()
for seed, name in enumerate(("ann", "bob", "cy")):
    add_adapter(many, LoRAConfig(rank=2 * seed + 2, alpha=8, targets="all-linear"), name)
    torch.manual_seed(seed)
    for layer in lora_layers(many):
        nn.init.normal_(layer.adapter(name).b, std=0.1)
many.eval()
batch, names = held_out[:4], ["bob", None, "cy", "ann"]
with torch.no_grad():
    with use_rows(many, names):
        together = many(batch)
    for row, name in enumerate(names):
        set_adapter(many, *([name] if name else []))
        alone = many(batch[row : row + 1])
        worst = (together[row] - alone[0]).abs().max().item()
        print(f"row {row}, {name or 'no adapter'}: as alone, to {worst:.0e}")
        assert worst < 1e-4

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `batched_lora`

# %% slideshow={"slide_type": "skip"}
check("batched_lora")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. What it costs
#
# **Question.** LoRA trains 2 % of the parameters. Which of these falls to 2 %: the optimizer's
# memory, the gradients' memory, the activations, the FLOPs of a step?


# %% slideshow={"slide_type": "fragment"}
def step_flops(model):
    with FlopCounterMode(display=False) as counter:
        loss_of(model, next(batches(1))).backward()
    return counter.get_total_flops()


tuned = add_adapter(new_base(), LoRAConfig(rank=4, alpha=8, targets="all-linear"))
optimizer = adamw(trainable_parameters(tuned), 5e-3)
rows = [("", "full", "LoRA r = 4", "ratio")]
flops_of = step_flops(full), step_flops(tuned)
full_optimizer.step(), optimizer.step()
gradients = [
    sum(p.grad.nbytes for p in m.parameters() if p.grad is not None) for m in (full, tuned)
]
states = [optimizer_state_bytes(o) for o in (full_optimizer, optimizer)]
for what, (ours, lora) in (("gradients, bytes", gradients), ("optimizer, bytes", states),
                           ("FLOPs of a step", flops_of)):  # fmt: skip
    rows.append((what, f"{ours:,}", f"{lora:,}", f"{lora / ours:.3f}"))
table(*rows)
full.zero_grad()

# %% [markdown] slideshow={"slide_type": "fragment"}
# A myth: "LoRA makes forward and backward cheap". Forward costs *more*; backward saves one of two
# products a layer, the frozen weight's gradient. A step takes some 70 % of the FLOPs.
#
# **Exercises.** `training_bytes`, `layer_flops`

# %% slideshow={"slide_type": "skip"}
check("training_bytes")

# %% slideshow={"slide_type": "skip"}
check("layer_flops")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Another domain
#
# **Question.** Full fine-tuning, LoRA of rank 1, 4, 16, 64, a prefix of 16 tokens, bottlenecks,
# GaLore: the same 40 steps of code. Rank them by held-out loss.


# %% slideshow={"slide_type": "skip"}
def with_lora(rank):
    model = add_adapter(new_base(), LoRAConfig(rank=rank, alpha=2 * rank, targets="all-linear"))
    return model, adamw(trainable_parameters(model), 5e-3)


def with_prefix():
    model = PrefixTuning(new_base(), 16)
    return model, adamw(trainable_parameters(model), 3e-2)


def with_bottlenecks():
    model = add_bottlenecks(new_base(), 16)
    return model, adamw(trainable_parameters(model), 3e-3)


def with_galore(rank=16):
    model = new_base()
    names = {p: n for n, p in model.named_parameters()}
    wide = [p for p in names if p.ndim == 2 and "layers" in names[p]]
    rest = [p for p in names if p not in set(wide)]
    groups = [{"params": wide, "rank": rank, "scale": 1.0}, {"params": rest}]
    return model, GaLoreAdamW(groups, lr=1e-3, gap=20)


METHODS = {
    **{f"LoRA r = {rank}": (lambda rank=rank: with_lora(rank)) for rank in (1, 4, 16, 64)},
    "prefix of 16": with_prefix,
    "bottleneck of 16": with_bottlenecks,
    "GaLore r = 16": with_galore,
}
found = {"full": (full_loss, sum(p.numel() for p in full.parameters()),
                  optimizer_state_bytes(full_optimizer), full_seconds)}  # fmt: skip
for name, make in METHODS.items():
    torch.manual_seed(0)
    model, optimizer = make()
    loss, seconds = tune(model, optimizer)
    learning = sum(p.numel() for p in trainable_parameters(model))
    found[name] = loss, learning, optimizer_state_bytes(optimizer), seconds
    if name == "LoRA r = 16":
        adapted = model

# %% slideshow={"slide_type": "subslide"}
table(("", "held-out loss", "trained parameters", "optimizer bytes"),
      ("untuned", f"{before:.2f}", 0, 0),
      *((n, f"{loss:.2f}", f"{count:,}", f"{size:,}")
        for n, (loss, count, size, _) in found.items()))  # fmt: skip

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
print({n: f"{1e3 * seconds:.0f} ms a step" for n, (*_, seconds) in found.items()})

# %% slideshow={"slide_type": "subslide"}
fig, ax = plt.subplots(figsize=(8, 4.4))
for name, (loss, _, size, _) in found.items():
    colour = {"L": "blue", "f": "black", "p": "purple", "b": "green", "G": "vermilion"}[name[0]]
    ax.plot(size / 1e3, loss, "o", ms=9, color=style.COLOURS[colour])
    below = name in ("LoRA r = 4", "LoRA r = 16", "GaLore r = 16", "full", "LoRA r = 64")
    ax.annotate(name, (size / 1e3, loss), xytext=(0, -16 if below else 9), ha="center",
                textcoords="offset points", color=style.COLOURS[colour], fontsize=11)  # fmt: skip
ax.axhline(before, color="0.5", lw=1, ls="--")
ax.text(9000, before - 0.02, "untuned", color="0.35", va="top", ha="right")
ax.set(xscale="log", xlabel="optimizer states (kB)", ylabel="held-out loss on code",
       xlim=(30, 1.2e4), ylim=(4.3, 5.05))  # fmt: skip
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# With one learning rate for all, ranks 1 to 16 are alike and 64 is worse: more rank is not more
# learning (the LoRA paper's table 6 is as flat). Full fine-tuning goes further: code is far from
# the prose that this model knows, and at this size capacity matters. GaLore keeps up with it, on
# less than a third of the optimizer's memory.
#
# It writes code now, after a fashion:

# %% slideshow={"slide_type": "fragment"}
prompt = torch.tensor([tokenizer.encode("def __init__(self, ")])
with torch.no_grad():
    for name, model in (("untuned", base), ("LoRA", adapted.eval())):
        text = prompt
        for _ in range(24):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
        print(f"{name:8}", repr(tokenizer.decode(text[0].tolist())))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Prefixes and prompts
#
# **Question.** Good prompts help. Why should a prompt be made of *words*?
#
# - **Prompt tuning**: p trained vectors before the embedded text. $pD$ numbers.
# - **P-tuning**: the same, made by a small network, which trains more easily.
# - **Prefix tuning**: p trained keys and values in *every* layer. $2pLKd$ numbers, seen by all
#   queries.
#
# All take p places of the context in every request, and none can be merged.

# %% slideshow={"slide_type": "fragment"}
rows = [("16 tokens", "trained parameters", "held-out loss")]
words = torch.tensor(tokenizer.encode("def run(self, args): return self.parse(args)  # Python"))[
    :16
]
for name, make, lr in (
    ("prompt, random", lambda m: PromptTuning(m, 16), 3e-2),
    ("prompt, from words", lambda m: PromptTuning(m, 16, initial_tokens=words), 3e-2),
    ("P-tuning, MLP", lambda m: PromptTuning(m, 16, encoder="mlp"), 3e-3),
    ("prefix", lambda m: PrefixTuning(m, 16), 3e-2),
):
    torch.manual_seed(0)
    model = make(new_base())
    loss, _ = tune(model, adamw(trainable_parameters(model), lr), 20)
    rows.append((name, sum(p.numel() for p in trainable_parameters(model)), f"{loss:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Weak, all of them, on a model of under a million parameters; so the prompt tuning paper found:
# prompts catch up with size (fig. 1 there). Starting from words makes no difference yet.
#
# **Exercise.** `prefix_attention`

# %% slideshow={"slide_type": "skip"}
check("prefix_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. GaLore
#
# **Question.** LoRA restricts the *weights'* change to r directions, for good. But is it not the
# optimizer's memory that we wanted to save?
#
# GaLore trains all weights; each *gradient* is projected on its own leading directions, Adam works
# on the small one, and the directions are computed anew every few steps. It is an optimizer, not an
# adapter: there is nothing to merge.


# %% slideshow={"slide_type": "fragment"}
def change_of(model):
    paths = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    ranks = []
    for path in paths:
        delta = model.get_submodule(path).weight - base.get_submodule(path).weight
        values = torch.linalg.svdvals(delta.detach())
        ranks.append(int((values > 1e-4 * values[0]).sum()))
    return sum(ranks) / len(ranks)


rows = [("gap between projections", "rank of the change", "held-out loss")]
for gap in (100, 5):
    torch.manual_seed(0)
    model, _ = with_galore(8)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    optimizer = GaLoreAdamW([{"params": matrices, "rank": 8}], lr=1e-3, gap=gap)
    loss, _ = tune(model, optimizer, 20)
    rows.append((gap, f"{change_of(model):.0f}", f"{loss:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Rank 8 at any moment, more over time: the subspaces add up.
#
# The second trick: update each weight as soon as its gradient is there, *inside* backward, and free
# the gradient. No two live together.


# %% slideshow={"slide_type": "fragment"}
def most_gradients(model, inside):
    held, most = set(), [0]

    def arrived(p):
        held.add(p)
        most[0] = max(most[0], sum(q.grad.nbytes for q in held if q.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrived)
    if inside:
        update_in_backward(model, lr=1e-3, rank=None)
    loss_of(model, next(batches(1))).backward()
    return most[0]


for inside in (False, True):
    print(f"gradients held at most, update {'inside' if inside else 'after '} backward: "
          f"{most_gradients(new_base(), inside):,} bytes")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Exercise.** `galore_step`

# %% slideshow={"slide_type": "skip"}
check("galore_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Which matrices?
#
# **Question.** The same number of trained parameters: queries alone at a high rank, or all matrices
# at a low one?

# %% slideshow={"slide_type": "fragment"}
rows = [("targets", "rank", "trained parameters", "held-out loss")]
for targets, rank in ((("q_proj",), 32), (("q_proj", "v_proj"), 18), (("up_proj",), 18),
                      ("all-linear", 4)):  # fmt: skip
    torch.manual_seed(0)
    model = add_adapter(new_base(), LoRAConfig(rank=rank, alpha=2 * rank, targets=targets))
    loss, _ = tune(model, adamw(trainable_parameters(model), 5e-3), 20)
    name = targets if isinstance(targets, str) else ", ".join(targets)
    learning = sum(p.numel() for p in trainable_parameters(model))
    rows.append((name, rank, f"{learning:,}", f"{loss:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Searching for a rank
#
# **Question.** Rank and learning rate depend on each other. A search with a library: Optuna tries
# pairs, learns from what it saw, and looks where it is promising.

# %% slideshow={"slide_type": "fragment"}
NUM_TRIALS = 6
optuna.logging.set_verbosity(optuna.logging.ERROR)


def objective(trial):
    rank = trial.suggest_categorical("rank", [1, 2, 4, 8, 16])
    lr = trial.suggest_float("lr", 1e-3, 3e-2, log=True)
    torch.manual_seed(0)
    model = add_adapter(new_base(), LoRAConfig(rank=rank, alpha=2 * rank, targets="all-linear"))
    loss, _ = tune(model, adamw(trainable_parameters(model), lr), 15)
    return round(loss, 2)


study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=NUM_TRIALS)
table(("trial", "rank", "learning rate", "held-out loss"),
      *((t.number, t.params["rank"], f"{t.params['lr']:.4f}", f"{t.value:.2f}")
        for t in study.trials))  # fmt: skip
print("best:", {name: round(value, 4) for name, value in study.best_params.items()})

# %% [markdown] slideshow={"slide_type": "fragment"}
# Few trials, and noisy. And the held-out text chose: its loss is no longer an honest estimate for
# the winner. Keep a third part for that.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Proof against production
#
# The adapter that we trained, written in peft's format, read again; the tests load it in peft
# itself, merge it there and here, and find every logit and every gradient equal, bit for bit.

# %% slideshow={"slide_type": "fragment"}
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    save_adapter(adapted, folder)
    sizes = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
    again = new_base().eval()
    load_adapter(again, folder)
    with torch.no_grad():
        print("same logits:", torch.equal(again(held_out[:2]), adapted(held_out[:2])))
print("files:", sorted(sizes))
print(f"{sizes['adapter_model.safetensors'] / 1e3:.0f} kB beside "
      f"{sum(p.nbytes for p in base.parameters()) / 1e3:.0f} kB of base")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Published figures, recomputed


# %% slideshow={"slide_type": "fragment"}
def gpt_3(rank, matrices):
    return lora_parameters([(12288, 12288)] * 96 * matrices, rank)


prefix = 10 * 24 * 2 * 1024 / 354.8e6
dim, hidden = 2048, 5461
shapes = ([(dim, dim)] * 4 + [(hidden, dim)] * 2 + [(dim, hidden)]) * 24
others = 8 * (2 * 32000 * dim + 49 * dim)
adam = 8 * sum(f * d for f, d in shapes) + others
galore = sum(galore_bytes(s, 512) for s in shapes) + others
table(
    ("", "published", "here"),
    ("GPT-3, r = 1 on 2 matrices", "4.7 M", f"{gpt_3(1, 2) / 1e6:.2f} M"),
    ("GPT-3, r = 8 on 2 matrices", "37.7 M", f"{gpt_3(8, 2) / 1e6:.2f} M"),
    ("GPT-3, r = 64 on 2 matrices", "301.9 M", f"{gpt_3(64, 2) / 1e6:.2f} M"),
    ("checkpoint, r = 4", "350 GB -> 35 MB", f"350.5 GB -> {2 * gpt_3(4, 2) / 2**20:.0f} MiB"),
    ("that is, times smaller", "roughly 10,000", f"{350.5e9 / (2 * gpt_3(4, 2)):,.0f}"),
    ("memory to train GPT-3", "1.2 TB -> 350 GB", f"16 bytes each: {16 * 175e9 / 1e12:.1f} TB"),
    ("tokens/s: 43.1 and 32.5", "25 % faster", f"{100 * (1 - 32.5 / 43.1):.1f} % less time"),
    ("prefix of 10, GPT-2 medium", "0.1 %", f"{100 * prefix:.2f} %"),
    ("GaLore 1B, r = 512: states", "-65.5 %", f"-{100 * (1 - galore / adam):.1f} %"),
    ("GaLore: 7B needs", "58 GB", f"{(2 + 6) * 6.74 + 2:.0f} GB"),
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two that do not fit. The 1.2 TB are 6.9 bytes a parameter, less than half of what Adam in mixed
# precision takes: an open question. And our count for GaLore's 1B model includes the projections,
# and embeddings and head, which are not projected.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. What breaks in practice

# %% slideshow={"slide_type": "fragment"}
attempts = {
    "a rank that is not low": lambda: add_adapter(new_base(), LoRAConfig(rank=65, alpha=1)),
    "targets of another model": lambda: add_adapter(
        new_base(), LoRAConfig(rank=1, alpha=1, targets=("c_attn",))
    ),
    "merging twice": lambda: (merge(adapted), merge(adapted)),
    "an adapter for another base": lambda: load_adapter(
        Llama(LlamaConfig(vocab_size=9, dim=64, hidden_dim=8, num_layers=1, num_heads=2)), saved
    ),
}
with tempfile.TemporaryDirectory() as saved:
    save_adapter(adapted, saved)
    for what, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            print(f"{what}:\n    {textwrap.shorten(str(error), 88)}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Merging into a quantised base** rounds the adapter away: dequantise, merge, quantise again,
#   and measure (chapter 09).
# - **Dropout** acts on the adapter's input alone; merged models have none.
# - **The head and the embeddings** are left out of "all-linear"; new tokens need them.
# - **alpha** is a learning rate in disguise: change it with the rank, or fix it, but say which.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 16. Summary
#
# - LoRA trains $r(D + F)$ numbers a matrix: A random, B zero, factor $\alpha / r$.
# - It saves gradients and optimizer states. Forward costs more, a training step less than a
#   third less.
# - Merged, it costs exactly nothing; unmerged, hundreds share a base.
# - Prefixes and prompts train what the model reads; they take context and cannot be merged.
# - GaLore trains everything with a small optimizer.
#
# **Further reading.** Hu et al. 2021, *LoRA* (arXiv 2106.09685); Kalajdzievski 2023, *rsLoRA*
# (arXiv 2312.03732); Li and Liang 2021, *Prefix-Tuning* (arXiv 2101.00190); Lester et al. 2021,
# *Prompt tuning* (arXiv 2104.08691); Houlsby et al. 2019, *Adapters* (arXiv 1902.00751); Zhao
# et al. 2024, *GaLore* (arXiv 2403.03507); Chen et al. 2023, *Punica* (arXiv 2310.18547).
