# %% [markdown] slideshow={"slide_type": "slide"}
# # 00 Start here
#
# You know how a thing works when you can build it, and when somebody who tries to break your
# version fails. This course is made for that: in each chapter you read a small reference, watch it
# do something that could have come out otherwise, and write the next piece yourself. A grader then
# tries to break it, and if it can it tells you what you believed.
#
# This first notebook takes 15 minutes. You check your machine, meet the model that the course
# experiments on, and take one small exercise from a wrong answer to a right one.
#
# <!-- notes: Ten minutes in the lecture: run sections 1 to 3, then one exercise together, wrongly
# on purpose (4 to 6). Give the class two minutes to run the first three cells before you speak:
# whoever has a broken environment finds out now and not in chapter 05. Sections 7 to 9 are for
# home. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** Executes in about 10 seconds on one CPU core with 2 GB of memory. No GPU
# > is needed here or in any exercise. The longest cell passes five sentences through a model of
# > 135M parameters; to shrink it, drop the last sentence of `SENTENCES` for a shorter one.

# %% slideshow={"slide_type": "skip"}
import os
import platform

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from autograder.notebook import check
from figures import style
from reference.pretrained import load_smollm2, passage

torch.set_num_threads(1)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Is everything in place?
#
# The cell below names what it found. If it stops, its message says what to do; most often that is
# `make model` in the course's folder, once.
#
# <!-- notes: Ask who sees another last line than SmolLM2 with 30 layers; they sit together with
# somebody whose cell ran, and mend it after the lecture. Say that no GPU is needed in the whole
# course: experiments are small on purpose, so that you can change them and run them again. -->

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
model, tokenizer = load_smollm2()
found = {
    "Python": platform.python_version(),
    "PyTorch": torch.__version__,
    "CPU cores": os.cpu_count(),
    "threads used here": torch.get_num_threads(),
    "GPU": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (none is needed)",
    "model": f"SmolLM2, {model.config.num_hidden_layers} layers, "
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters",
}
for name, value in found.items():
    print(f"{name:<18} {value}")

# %% [markdown] slideshow={"slide_type": "skip"}
# One thread, on purpose: our tensors are small, and two threads that wait for each other can be
# slower than one.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. A model of your own
#
# **SmolLM2** (Ben Allal et al., arXiv 2502.02737) is a Llama with 30 layers, small enough for a
# laptop and trained well enough to be worth opening up. It maps tokens to scores for the token
# that comes next, and does nothing else.
#
# **Before you run the cell:** which word comes after *The capital of France is*, and how sure
# would you expect so small a model to be: 30 %, 75 %, 99 %? What would you expect in second place?
#
# <!-- notes: Take a show of hands on the three numbers (it is 77 %). The second place is the better
# question. Most name another city, and London comes only third, with 1.2 %. Ask for a sentence that
# goes on with "the"; whoever finds one has understood that the model continues text. -->

# %% slideshow={"slide_type": "fragment"}
prompt = "The capital of France is"
with torch.no_grad():
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits
probabilities = logits[0, -1].softmax(-1)
best = probabilities.topk(5)
words = [tokenizer.decode(i).strip() for i in best.indices]

figure, ax = plt.subplots(figsize=(8.5, 2.6))
bars = ax.barh(words, best.values, color=style.COLOURS["blue"])
ax.bar_label(bars, [f"{p:.0%}" if p > 0.1 else f"{p:.1%}" for p in best.values], padding=4)
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="probability", title=f"{prompt} ...")
ax.grid(axis="y", visible=False)
print({word: round(p, 2) for word, p in zip(words, best.values.tolist(), strict=True)})

# %% [markdown] slideshow={"slide_type": "fragment"}
# Second place does not go to another city but to *the*, as in *the largest city of Europe*: the
# model continues text, it does not answer questions. The five bars hold most of the probability of
# a vocabulary of 49,152 tokens.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. A problem: sentences of different lengths
#
# On its way to the scores the model computes one vector per token. Their mean is a vector for the
# whole sentence, and sentences that mean the same should point the same way.
#
# A batch is a rectangle, so that short sentences are filled up with *padding*. The causal mask
# keeps the padding on the right from changing what the model computes for the words before it. So
# the padding is harmless.
#
# **Is it?** Below one sentence gets more and more padding. What happens to its mean vector?
#
# <!-- notes: The argument on this slide sounds complete. Ask who would merge it in a review, and
# wait until somebody defends it. Each sentence is true up to the last. Then ask for a curve in the
# air: cosine against padding. Most draw a flat line; it falls to 0.63 with 64 positions of padding.
# -->

# %% slideshow={"slide_type": "fragment"}
SENTENCE = "The cat sleeps on the warm windowsill."
ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
num_real = ids.shape[1]
num_padded = [0, 1, 2, 4, 8, 16, 32, 64]


@torch.no_grad()
def hidden_states(input_ids):
    """The last layer's vectors, (B, T, D)."""
    return model.model(input_ids).last_hidden_state


alone = hidden_states(ids).mean(1)
over_all, over_real = [], []
for count in num_padded:
    hidden = hidden_states(F.pad(ids, (0, count), value=tokenizer.pad_token_id))
    over_all.append(F.cosine_similarity(hidden.mean(1), alone).item())
    over_real.append(F.cosine_similarity(hidden[:, :num_real].mean(1), alone).item())

figure, ax = plt.subplots(figsize=(11, 2.9))
ax.plot(num_padded, over_real, "o-", label="mean over the words", color=style.COLOURS["blue"])
ax.plot(
    num_padded, over_all, "s-", label="mean over all positions", color=style.COLOURS["vermilion"]
)
ax.set(xlabel="padding positions after a sentence of 10 tokens", ylim=(0.5, 1.05),
       ylabel="cosine with the\nunpadded sentence")  # fmt: skip
style.label_lines(ax)
print("padding            ", num_padded)
print("mean over all      ", [round(c, 2) for c in over_all])
print("mean over the words", [round(c, 2) for c in over_real])

# %% [markdown] slideshow={"slide_type": "fragment"}
# The vectors of the words did not change; the *mean* did, because it counts positions that are
# nobody's words. With the wrong mean a sentence means something else when its neighbour in the
# batch is longer. Nothing crashes, no shape is wrong, and a test with sentences of one length
# passes. Most bugs in this course are of that kind.

# %% [markdown] slideshow={"slide_type": "subslide"}
# How much damage is that? Two sentences about cats, two about interest rates, and one long
# neighbour that fills up the batch:
#
# <!-- notes: Ask for a guess of the cosine between a cat and a bank under the wrong mean. Left,
# everything is 0.99: all four vectors are mostly the same padding. Right, cats are near cats (0.87)
# and rates near banks (0.89). Nobody would have seen an error message. -->

# %% slideshow={"slide_type": "fragment"}
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Interest rates rose for the third time this year.",
    "The central bank made borrowing more expensive again.",
    passage().split("\n\n")[0],
]
batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
hidden, is_real = hidden_states(batch.input_ids), batch.attention_mask.bool()
print("hidden (B, T, D):", tuple(hidden.shape), "  real tokens:", is_real.sum(1).tolist())


def similarities(vectors):
    """Cosines between the four short sentences."""
    short = vectors[:4]
    return F.cosine_similarity(short[:, None], short[None], dim=-1)


def show(ax, cosines, title):
    image = ax.imshow(cosines, vmin=0.6, vmax=1)
    names = ["cat", "kitten", "rates", "bank"]
    ax.set(xticks=range(4), yticks=range(4), xticklabels=names, yticklabels=names, title=title)
    ax.grid(False)
    for i in range(4):
        for j in range(4):
            ink = "black" if cosines[i, j] > 0.85 else "white"
            ax.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", color=ink)
    return image


def mean_of_words(hidden, is_real):
    """For this plot: each sentence's real rows, one at a time."""
    return torch.stack(
        [vectors[real].mean(0) for vectors, real in zip(hidden, is_real, strict=True)]
    )


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
show(left, similarities(hidden.mean(1)), "mean over all positions")
image = show(right, similarities(mean_of_words(hidden, is_real)), "mean over the words")
figure.colorbar(image, ax=(left, right), label="cosine", shrink=0.8)
apart = similarities(mean_of_words(hidden, is_real))[:2, 2:].max().item()
print(f"cats and banks, at most: {similarities(hidden.mean(1))[:2, 2:].max().item():.2f} over all, "
      f"{apart:.2f} over the words")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. What an exercise asks
#
# > **Exercise `mean_pool`** · build · 5 minutes · difficulty 1 of 3
# >
# > One vector per sentence: the mean of the vectors of its real tokens. Write it in
# > `exercises/start_here.py`.
#
# Each exercise is one function with a docstring, and the docstring is the specification: shapes,
# dtypes, what to do at the edges. Open [exercises/start_here.py](../exercises/start_here.py) and
# read it now; it takes a minute, and two of its sentences matter below.
#
# There are five kinds: *build* a thing in its plainest form, *derive* a formula or a backward pass,
# *repair* a program that runs and is wrong, *estimate* bytes or FLOPs before you measure them, and
# at the end of a chapter one *challenge*.
#
# `check("mean_pool")` grades the file. Nobody has written anything there yet, so:
#
# <!-- notes: Two minutes of silence: everybody opens the file and reads the docstring. Ask
# afterwards for one sentence of it that a hurried reader would skip. Do not discuss the edges yet;
# section 6 needs them. The 9 points lie on six checks, and the ordinary mean is only one of them.
# -->

# %% slideshow={"slide_type": "fragment"}
check("mean_pool")

# %% [markdown] slideshow={"slide_type": "skip"}
# Below the checks are three hints, folded. The first is a nudge, the second explains the errors
# that people see here, the third is pseudocode. Unfold them in that order, and only when you have
# been stuck for longer than the exercise should take.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. A first answer, and what the grader makes of it
#
# `check` also takes a function from a cell, which is good for trying out. Next comes the answer
# that most people write first. It is one line, and it has the right shape: the mean over all
# positions.
#
# **How many of the six checks does it pass?** When you see the verdict, read two things. Each check
# says what was expected, what came and where they differ. And at the end stands a *diagnosis*.
#
# <!-- notes: Let them bet on the number of checks; it passes one, the one without padding. Then
# read the diagnosis aloud, slowly. The point of the chapter is that a grader can say what you
# believed, and not only that you are wrong. Three minutes, and the most important ones of this
# notebook. -->


# %% slideshow={"slide_type": "fragment"}
def mean_pool(hidden, is_real):
    return hidden.mean(dim=1)


check(mean_pool)

# %% [markdown] slideshow={"slide_type": "skip"}
# The grader knows the wrong answers that people give, runs each one on the inputs that it gave
# yours, and found one with your outputs. The diagnosis names what you built, and where to read
# about it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. A second answer, and the edges
#
# So the padding must not count: multiply it by zero, and divide by the number of real tokens.
# **Which checks will this pass?** Two sentences of the docstring say.
#
# <!-- notes: Let them open the docstring and name the three edges before you click: nan at padding,
# a sentence without tokens, float16. Usually the first two are found and the third is not. Then one
# line of arithmetic each: 0 times nan is nan, 0 / 0 is nan, and a sum of 200,000 is infinite in
# float16. -->


# %% slideshow={"slide_type": "fragment"}
def mean_pool(hidden, is_real):
    kept = hidden * is_real[:, :, None]
    return kept.sum(dim=1) / is_real.sum(dim=1, keepdim=True)


check(mean_pool)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Right on every ordinary sentence, wrong at three edges. None of them is exotic; each is one line
# of arithmetic:

# %% slideshow={"slide_type": "fragment"}
print("0 * nan =", (torch.tensor(0.0) * float("nan")).item())
print("0 / 0   =", (torch.tensor(0.0) / 0).item())
thousand = torch.full((200,), 1000.0, dtype=torch.float16)
print("200 * 1000 in float16:", thousand.sum().item(), "  their mean:", thousand.mean().item())
assert thousand.sum().isinf() and thousand.mean() == 1000

# %% [markdown] slideshow={"slide_type": "subslide"}
# Mend one at a time and look at the verdict in between: there is no penalty for asking often.
# Three changes later:
#
# <!-- notes: Match the three changes with the three edges: masked_fill for nan, clamp for the empty
# sentence, promote_types for float16. Ask which line could be left out without a student's noticing
# on ordinary text. Any of the three. -->


# %% slideshow={"slide_type": "fragment"}
def mean_pool(hidden, is_real):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = hidden.to(wide).masked_fill(~is_real[:, :, None], 0)
    num_real = is_real.sum(dim=1, keepdim=True).clamp(min=1)
    return (kept.sum(dim=1) / num_real).to(hidden.dtype)


check(mean_pool)

# %% [markdown] slideshow={"slide_type": "skip"}
# And it does what we wanted of it: on the batch of section 3, it equals the means taken one
# sentence at a time.

# %% slideshow={"slide_type": "skip"}
torch.testing.assert_close(mean_pool(hidden, is_real), mean_of_words(hidden, is_real))
print("equal to the means of section 3")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Hand it in
#
# What counts is the file. Write your version into `exercises/start_here.py` (from memory: it
# sticks better), save it, and run the cell. In the notebook as it is stored, the file is still
# empty.
#
# <!-- notes: Here the lecture's part ends. Everybody writes `mean_pool` from memory before the
# laboratory, five minutes; nothing else of this chapter is handed in. Show `watch` once, in a
# terminal beside an editor: save a wrong version, save the right one, and let them see the verdict
# change. -->

# %% slideshow={"slide_type": "fragment"}
check("mean_pool")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same grader works in a terminal, in the course's folder and with its environment on
# (`source .venv/bin/activate`):
#
# | command | what it does |
# |---|---|
# | `python -m autograder` | grades everything: points and a status table |
# | `python -m autograder start_here` | one chapter |
# | `python -m autograder mean_pool --hint 1` | one exercise, with its first hint |
# | `python -m autograder mean_pool --pdb` | stops in the debugger where it fails |
# | `python -m autograder watch` | grades again whenever you save |
#
# `watch` in a terminal beside your editor is the fastest way to work. The graders are ordinary
# tests in `tests/exercises/`; read them if you wonder what a check does.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. How the course is built
#
# - `notebooks/` is what you read and run. Change whatever you like; `git checkout notebooks` brings
#   the originals back.
# - `exercises/` is what you write. No command of the course overwrites your work.
# - `reference/` is the library that the notebooks call, written to be read beside its equations.
#   Exercises ask for another form or the next step, so reading it is allowed and helps.
# - `solutions/` holds complete answers. Looking one up after you have passed is a good way to
#   learn; before, it is the most expensive hint there is.
#
# If an AI assistant helps you, point it at `AGENTS.md`: that file asks it to tutor you, not to
# write your answers.
#
# <!-- notes: One minute. Students ask whether reading the reference is cheating: it is not, the
# exercises ask for another form or for the next step. Say plainly what you think of solutions
# before passing, and what your own rules about assistants are; the file AGENTS.md is a default. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. What comes
#
# | | chapter | you build |
# |---|---|---|
# | 01 | normalization | LayerNorm, RMSNorm, BatchNorm, DeepNorm, and why placement decides |
# | 02 | activations | GELU, SiLU, SwiGLU, and what saturates |
# | 03 | positions | sinusoids, rotary embeddings, longer contexts |
# | 04 | attention | masks, heads, grouped queries, the backward pass by hand |
# | 05 | transformer | a Llama, trained on two CPU cores in minutes |
# | 06 | kv_cache | prefill, decode, paging, continuous batching |
# | 07 | flash_attention | online softmax, tiles, memory traffic |
# | 08 | lora | low-rank adapters, prefixes, GaLore |
# | 09 | quantization | int8, NF4, QLoRA, AWQ |
# | 10 | mixed_precision | formats bit by bit, loss scaling |
# | 11 | data_parallel | collectives, ring all-reduce, DDP |
# | 12 | zero, fsdp | sharded states, gradients, parameters |
# | 13 | tensor_parallel | columns, rows, sequence parallelism |
# | 14 | context_parallel | Ulysses, ring attention |
# | 15 | pipeline_parallel | schedules, 3D layouts, a planner |
# | 16 | alignment | reward models, PPO, DPO |
#
# The README says which chapters are finished. Each takes 40 to 90 minutes, and each begins with
# what goes wrong without its idea.
#
# <!-- notes: Do not read the table. Point at three blocks: 01 to 05 build a model, 06 to 10 make it
# cheap to run and to train, 11 to 15 spread it over machines. Ask which block people came for; it
# tells you where to spend time later. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Summary
#
# - The docstring is the specification, the grader tries its edges, and a wrong answer that others
#   have given too is recognised and explained.
# - Right on ordinary input is not right: padding, empty rows and narrow dtypes are where systems
#   break.
# - A mean over the wrong positions made cats and banks nearly the same thing, and no shape showed
#   it.
#
# **Further reading.** Reimers and Gurevych, *Sentence-BERT* (arXiv 1908.10084), sec. 3: pooling
# strategies compared. Ben Allal et al., *SmolLM2* (arXiv 2502.02737): how the model that you just
# ran was trained.
#
# Next: [01 normalization](01_normalization.ipynb).
#
# <!-- notes: Students should be able to say what a docstring decides, and why code that earned 4 of
# 9 points looked finished on ordinary sentences. Ask one of them to retell how cats became banks.
# Chapter 01 begins at once: it asks what happens to numbers on their way through 48 layers. -->
