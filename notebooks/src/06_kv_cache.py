# %% [markdown] slideshow={"slide_type": "slide"}
# # 06 KV cache and serving
#
# A language model answers one token at a time, and each token needs everything before it. Computed
# anew, the hundredth token costs a hundred times the first. Kept, it costs the same, and takes
# memory instead. What is kept, where it lies, and who may use it next is the subject.
#
# In this chapter you build a growing cache, a static one, one that rolls, one that lies in pages,
# and one in bytes; you generate for prompts of different lengths; and you write the bookkeeping of
# a server that takes in and lets go of requests at every token.
#
# You need: chapters 03 (RoPE), 04 (attention, masks), 05 (the model).
#
# <!-- notes: Lecture of 75 minutes: 40 for sections 1 to 6, 35 for 7 to 10; 11 to 13 are for home.
# Begin with a live generation if you can, or ask: why does a chat answer come word by word at an
# even pace, whatever its length? By section 2 everybody should be able to say why. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 2.5 GB of memory are enough; everything takes about a
# > minute. The slowest cells run SmolLM2-135M (sections 1, 8 and 11; fetched once by `make model`);
# > for less, cut their numbers of tokens. The rest runs on the course's own small model.

# %% slideshow={"slide_type": "skip"}
import random
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from transformers import DynamicCache, StaticCache

import reference.kv_cache as kv
from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.attention import decode_intensity, kv_cache_bytes
from reference.flash_attention import paged_attention
from reference.positions import rope_frequencies, rope_table, rotation
from reference.pretrained import SMOLLM2, capture_attention, corpus, load_smollm2, passage
from reference.transformer import PRESETS, fused_causal_attention, load_pretrained
from reference.transformer.course_model import HELD_OUT, load_course_model

torch.set_num_threads(1)
torch.set_grad_enabled(False)
style.use()
BLUE, RED, GREEN = (style.COLOURS[name] for name in ("blue", "vermilion", "green"))
GREY = "0.6"

# %% slideshow={"slide_type": "skip"}
theirs, tokenizer = load_smollm2()
smollm2 = partial(load_pretrained(SMOLLM2), attend=fused_causal_attention)
ids = tokenizer(passage(), return_tensors="pt").input_ids[0]
course, course_tokenizer = load_course_model()
held_out = torch.tensor(course_tokenizer.encode(corpus()[-HELD_OUT:]))
print(f"a page of Alice: {len(ids)} tokens; held-out text of the course: {len(held_out)} tokens")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Recomputing the past
#
# **Question.** SmolLM2 has written $n$ tokens. How long does the next one take, if the whole text
# goes through the model again? And if keys and values of the $n$ tokens were kept?
#
# <!-- notes: Six minutes for the section. Let them draw both curves, seconds for the next token
# against length. Wait for somebody who draws the lower one rising: attention reads more keys.
# Right, but with a model of this size and 256 tokens it does not show. -->


# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
def seconds(call, turns=3):
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[turns // 2]


lengths = [16, 64, 128, 192, 256]
without, with_cache = [], []
for n in lengths:
    without.append(seconds(lambda n=n: smollm2(ids[None, :n], num_logits=1), turns=1))
    cache = kv.DynamicCache()
    smollm2(ids[None, : n - 1], cache=cache, num_logits=1)
    with_cache.append(seconds(lambda n=n, c=cache: smollm2(ids[None, n - 1 : n], cache=c)))
figure, ax = plt.subplots()
ax.plot(lengths, without, "o-", color=RED, label="without a cache")
ax.plot(lengths, with_cache, "o-", color=BLUE, label="with a cache")
ax.set(xlabel="tokens of text", ylabel="seconds for the next token", ylim=(0, None))
style.label_lines(ax)
plt.show()
print(f"at 256 tokens: {without[-1] / with_cache[-1]:.0f} times slower without")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Timings depend on the machine; the work does not. Tokens that go through the model for 256 new
# ones after a prompt of 16:
#
# <!-- notes: Have them do the sum: 16 + 17 + ... + 271 against 16 + 255. 36,736 against 271, 136
# times. It is quadratic against linear, so twice the text is four times the work. -->

# %% slideshow={"slide_type": "fragment"}
again = sum(16 + i for i in range(256))
kept = 16 + 255
print(f"without a cache {again:,}, with one {kept}: {again / kept:.0f} times as many")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The pass over the prompt is called **prefill**: many tokens, one read of the weights. Each pass
# after it is a **decode** step: one token, and again a read of all weights.
#
# <!-- notes: Write the two words on the board and leave them: prefill computes, decode reads. Ask
# which of the two a user notices as waiting for the first word, and which as pace. Section 10 puts
# numbers to it. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Keys and values, and no queries
#
# **Question.** Attention has queries, keys and values. Which of them does the next token need from
# the tokens before it?
#
# $$o_t=\sum_{s\le t}\text{softmax}_s\!\left(\frac{q_t\cdot k_s}{\sqrt d}\right)v_s$$
#
# <!-- notes: Six minutes for the section. Ask first, then point at the indices of the formula: q
# has t, k and v have s. The usual wrong answer is "all three, to be safe". Ask that student for a
# place where an old q is read. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# Of the past, $k_s$ and $v_s$; of the present, $q_t$. An old query asked for an old output, and got
# it. (With a causal mask that output never changes, which is why layer 2 need not look either.)
#
# <!-- notes: 576 numbers a token are dropped, 2 times 192 are kept: grouped heads of chapter 04 pay
# here. Ask about the sentence in brackets: what would change in a model without the causal mask?
# Old outputs would move with every new token, and nothing could be kept. -->

# %% slideshow={"slide_type": "fragment"}
layer = capture_attention(theirs, ids[None, :128], layer=5)
attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
whole = attend(layer.q, layer.k, layer.v, is_causal=True)[:, :, -1:]
one = attend(layer.q[:, :, -1:], layer.k, layer.v)
print("the last query alone gives the last row:", torch.allclose(one, whole, atol=1e-5))
for name, tensor in (("queries", layer.q), ("keys", layer.k), ("values", layer.v)):
    asked = "kept" if name != "queries" else "never asked for again"
    print(f"{name:8} {tuple(tensor.shape)}: {tensor[0, :, 0].numel():4} numbers a token, {asked}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The cache is `update(k, v, layer)`: append, and return everything
# (`reference/kv_cache/dynamic.py`). It is called in every layer of every pass, with the name and
# order of arguments of transformers' `DynamicCache`, so that either fits either model.
#
# <!-- notes: Check the bytes with the room: 1,059,840 less 1,013,760 is 46,080 a token = 2 x 30
# layers x 3 heads x 64 x 4 bytes. The interface has one method. cached_attention, twenty minutes,
# is the first exercise of the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
cache = kv.DynamicCache()
smollm2(ids[None, :20], cache=cache)
for step in range(3):
    smollm2(ids[None, 20 + step : 21 + step], cache=cache)
    k = cache.keys[0]
    print(
        f"{cache.get_seq_length()} tokens, keys of a layer {tuple(k.shape)}, {cache.nbytes:,} bytes"
    )

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `cached_attention`** (build, 20 minutes, difficulty 2 of 3). A check counts the rows
# that go through your weights.

# %% slideshow={"slide_type": "skip"}
check("cached_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Positions
#
# Keys are rotated by their positions (chapter 03) and *then* cached. **Question.** What happens to
# the model's surprise if the positions begin at 0 again after the prompt? If cached keys are
# rotated once more at each step? If new keys are not rotated?
#
# <!-- notes: Six minutes for the section. Let them rank the four mistakes by damage before you show
# the numbers, all on paper. Right is 2.92 nats. Ask why restarting positions costs only 0.35:
# distances within the answer are still right. -->


# %% slideshow={"slide_type": "fragment"}
def turn(positions, k):
    """RoPE of the course's model at these positions."""
    frequencies = rope_frequencies(course.config.head_dim, course.config.rope_theta)
    return rotation(*rope_table(positions, frequencies))(k)


class RotatedAgain(kv.DynamicCache):
    def update(self, k, v, layer):
        if layer < len(self.keys):
            held = self.keys[layer]
            self.keys[layer] = turn(torch.arange(held.shape[2]), held)
        return super().update(k, v, layer)


class NotRotated(kv.DynamicCache):
    def update(self, k, v, layer):
        if layer < len(self.keys):  # a new key: undo what attention did
            k = turn(-torch.tensor([self.keys[layer].shape[2]]), k)
        return super().update(k, v, layer)


def surprise(cache, position=lambda t: t, prompt=32, text=held_out[:128]):
    """Mean surprise, in nats, of the tokens after the prompt, given one by one."""
    logits = [course(text[None, :prompt], cache=cache, num_logits=1)[:, -1]]
    for t in range(prompt, len(text) - 1):
        where = torch.tensor([position(t)])
        logits.append(course(text[None, t : t + 1], where, cache)[:, -1])
    return F.cross_entropy(torch.cat(logits), text[prompt:]).item()


right = surprise(kv.DynamicCache())
for name, value in (
    ("right", right),
    ("positions restart after the prompt", surprise(kv.DynamicCache(), lambda t: t - 32)),
    ("all new tokens at position 0", surprise(kv.DynamicCache(), lambda t: 0)),
    ("cached keys rotated again", surprise(RotatedAgain())),
    ("new keys cached at position 0", surprise(NotRotated())),
):
    print(f"{name:36} {value:.2f} nats")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Nothing crashes. The text gets worse, by tenths of a nat or by whole ones, which is why this bug
# lives long: compare with the uncached model, number for number, before you trust a cache.
#
# <!-- notes: Ask how a test should look that finds the 3.27. Reading the text does not: it still
# looks like text. Compare logits with the uncached model, number for number. rotary_scores, ten
# minutes, is the repair of this slide. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `rotary_scores`** (repair, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("rotary_scores")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. The static cache
#
# The growing cache copies everything it holds for each token. Room for the longest text from the
# start needs no copy, and its addresses never change, which compiled graphs ask for.
#
# **Question.** The room is filled with zeros. Do zeros matter, if a query looks at all of it?
#
# <!-- notes: Seven minutes for the section. Vote: do zeros matter? Expect a no: a zero key has
# score 0 and adds nothing. Write exp(0) on the board and wait. It is the sentence of the dropout
# slide in chapter 04. -->

# %% slideshow={"slide_type": "fragment"}
q, keys = layer.q[0, :, -1], layer.k[0].repeat_interleave(3, 0)
scores = torch.einsum("hd,hsd->hs", q, keys) / q.shape[-1] ** 0.5
empty = torch.tensor([0, 16, 64, 128, 256, 512, 1024, 1920])
real = scores.double().exp().sum(1, keepdim=True)
lost = empty / (real + empty)  # a zero key has score 0, and exp(0) = 1
figure, ax = plt.subplots()
ax.plot(empty, 100 * lost.T, color=GREY, lw=1)
ax.text(1100, 70, "grey: each head", color="0.35")
ax.plot(empty, 100 * lost.mean(0), "o-", color=RED, label="mean of 9 heads")
ax.set(
    xlabel="empty rows behind 128 tokens", ylabel="% of the weight that zeros get", ylim=(0, 100)
)
style.label_lines(ax)
plt.show()
shares = (100 * lost.mean(0)).round().int().tolist()
print("mean over heads, %:", dict(zip(empty.tolist(), shares, strict=True)))

# %% [markdown] slideshow={"slide_type": "fragment"}
# A zero key is a key: score 0, weight $e^0$. Either mask what was not written, or return the
# written part alone, as `StaticCache` does here.
#
# <!-- notes: At 1,920 empty rows the mean is 27 %, and one head loses over 90 %. Ask what kind of
# head that is: one whose real scores are all low. The error grows with the room, so a short test
# does not find it. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# The room itself is the price:
#
# <!-- notes: 4.6 MB against 94.4 MB for the same 100 tokens. Ask who would accept that: a compiled
# graph, a single user on one machine. A server with many users would not; that is the way to
# section 7. static_step is in the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
growing, static = kv.DynamicCache(), kv.StaticCache(2048)
for cache in (growing, static):
    smollm2(ids[None, :100], cache=cache, num_logits=1)
for name, cache in (("growing", growing), ("static, for 2,048", static)):
    print(f"100 tokens, {name}: {cache.nbytes / 1e6:.1f} MB")
print("what they return is equal:", torch.equal(growing.keys[7], static.keys[7][:, :, :100]))

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `static_step`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("static_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Prompts of different lengths
#
# Weights are read once for a whole batch, so we want batches. Prompts of different lengths are
# padded **at the left**: then all rows end together, and the next token of each stands in the same
# column. Who sees whom:
#
# <!-- notes: Eight minutes for the section. Draw three prompts of 7, 4 and 2 tokens, padded at the
# right, and ask in which column each next token stands. Then at the left. Pairs seen are 28, 10 and
# 3, as for each prompt alone: a test worth having. -->

# %% slideshow={"slide_type": "fragment"}
prompts = [ids[:7], ids[20:24], ids[40:42]]
tokens, padding = kv.left_pad(prompts)
columns = torch.arange(tokens.shape[1])
mask = kv.column_mask(columns, columns, padding)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.1))
for ax, m, n in zip(axes, mask[:, 0], padding.tolist(), strict=True):
    ax.imshow(m, cmap=ListedColormap(["0.88", style.COLOURS["sky"]]), vmin=0, vmax=1)
    ax.set(xlabel="key column", ylabel="query column", title=f"{7 - n} tokens, {n} pads")
    ax.set_xticks(range(7))
    ax.set_yticks(range(7))
    ax.grid(False)
plt.show()
print("pairs seen:", mask.sum((1, 2, 3)).tolist(), "= n (n + 1) / 2 of", [len(p) for p in prompts])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Three mistakes: padding at the right, padding that is seen, positions that count the
# columns. Which of them harms a model with rotary positions?
#
# <!-- notes: Take a vote on each of the three. Expect most for positions that count columns, since
# it looks careless. Wait for one voice that says: only distances count. Then show the numbers:
# 0.57, 0.14, 0.00. -->

# %% slideshow={"slide_type": "skip"}
prompts = [held_out[:30], held_out[100:110], held_out[200:217]]
tokens, padding = kv.left_pad(prompts)
columns = torch.arange(tokens.shape[1])
counted = (columns - padding[:, None]).clamp(min=0)
hidden = kv.column_mask(columns, columns, padding)
causal = kv.column_mask(columns, columns, torch.zeros_like(padding))
right_padded = torch.stack([torch.cat((p, p.new_zeros(30 - len(p)))) for p in prompts])
alone = torch.cat([course(p[None], num_logits=1) for p in prompts])[:, 0].softmax(-1)

# %% slideshow={"slide_type": "fragment"}
for name, (inputs, positions, m) in {
    "right": (tokens, counted, hidden),
    "padding at the right": (right_padded, columns, causal),
    "padding is seen": (tokens, counted, causal),
    "positions are columns": (tokens, columns, hidden),
}.items():
    got = course(inputs, positions, mask=m)[:, -1].softmax(-1)
    change = (got - alone).abs().sum(-1) / 2
    print(f"{name:22} probability that moved: {change.mean():.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Positions that count columns do no harm here: a rotary score depends on the distance alone, and
# all of a row's tokens are shifted alike. With learned positions (GPT-2) they do harm, and with any
# model they use up the context sooner. So count tokens.
#
# <!-- notes: The lesson is not that one may be careless: with learned positions the same code is
# wrong. Ask for a case where it harms with rotary ones too: a long padding pushes positions beyond
# the trained context. prefill_batch, fifteen minutes, in the room. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `prefill_batch`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("prefill_batch")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. The rolling cache
#
# A layer whose attention looks back $W$ tokens (Mistral 7B, arXiv 2310.06825, sec. 2) never reads
# older keys. Position $p$ goes to slot $p \bmod W$, over the one that has just left the window.
#
# <!-- notes: Seven minutes for the section. Fill the four slots on the board by hand up to n = 6,
# then let the room say the row for 11: 8 9 10 7. -->

# %% slideshow={"slide_type": "fragment"}
print("slots of a window of 4, after n tokens:")
for n in (2, 4, 5, 6, 7, 8, 11):
    print(f"  n = {n:2}: positions", kv.slot_columns(n, 4).tolist())

# %% [markdown] slideshow={"slide_type": "fragment"}
# The keys are out of order, and it does not matter: a key carries its position in its rotation, and
# a sum has no order.
#
# **Question.** The course's model was trained without a window. How short may one be before it
# hurts?
#
# <!-- notes: Ask whether the sorted order must be restored before attention. No: chapter 04,
# section 2, shuffled keys and values together. For the question let them bet on a window: 64, 16,
# or more than 64? -->

# %% slideshow={"slide_type": "fragment"}
windows = [2, 4, 8, 16, 64]
losses = [surprise(kv.RollingCache(w), prompt=1) for w in windows]
full = surprise(kv.DynamicCache(), prompt=1)
figure, ax = plt.subplots(figsize=(11, 3.6))
ax.semilogx(windows, losses, "o-", color=BLUE, base=2)
ax.axhline(full, color=GREY, lw=1.5)
ax.text(2, full - 0.02, "everything is kept", color="0.35", va="top")
ax.set(xlabel="window, tokens", ylabel="surprise, nats a token")
ax.set_xticks(windows, windows)
ax.set_ylim(full - 0.25, None)
plt.show()
print(
    "nats:", {w: round(x, 2) for w, x in zip(windows, losses, strict=True)}, "all:", round(full, 2)
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# At 64 tokens nothing is lost here, and at 16 little: each of four layers looks one window further
# back than the one below it, and this small model makes little of what is older. A large one makes
# more of it, and is trained with its window.
#
# <!-- notes: Beware of the easy conclusion that windows are free. The model is small and was
# trained on 128 tokens; 16 costs 0.05 nats, 4 costs 0.4. Ask how a window of 4 in four layers can
# see more than 4 back. Forty minutes by here. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `ring_positions`** (derive, 10 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("ring_positions")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Pages
#
# A server does not know how long an answer will be. Room for the longest is mostly empty. An
# operating system solved this long ago: cut memory into blocks, give each sequence a **block
# table**, and hand out a block when the last one is full (vLLM, arXiv 2309.06180).
#
# <!-- notes: Twelve minutes for the section. Three requests, 128 slots, nobody knows how long an
# answer gets: how would you share them out? Collect two proposals on the board. Somebody will
# propose moving data when room runs out; ask what it costs. -->


# %% slideshow={"slide_type": "fragment"}
def draw_memory(ax, owners, title):
    """owners: for each slot 0 (free), 1-3 (a sequence's token), 4-6 (reserved for it)."""
    colours = ["white", BLUE, RED, GREEN, "#BBD7EA", "#F2CDB3", "#B5E0D3"]
    grid = torch.tensor(owners).view(8, 16)
    ax.imshow(grid, cmap=ListedColormap(colours), vmin=0, vmax=6, aspect="auto")
    ax.set(title=title, xlabel="slot", ylabel="slots, by 16")
    ax.set_xticks(torch.arange(17) - 0.5, [], minor=True)
    ax.set_xticks(range(0, 16, 4))
    ax.set_yticks(torch.arange(9) - 0.5, [], minor=True)
    ax.set_yticks(range(8))
    ax.grid(False)
    ax.grid(True, which="minor", color="0.75", alpha=1)


wanted = {1: 21, 2: 9, 3: 30}
reserved = [0] * 128
for i, (name, n) in enumerate(wanted.items()):
    reserved[40 * i : 40 * i + 40] = [name] * n + [name + 3] * (40 - n)
blocks = kv.BlockManager(32, 4)
for name in wanted:
    blocks.allocate(name, [name])
for t in range(1, 30):  # they grow in turns
    for name, n in wanted.items():
        if t < n:
            blocks.append(name)
paged = [0] * 128
for name, n in wanted.items():
    for t in range(4 * len(blocks.tables[name])):
        slot = 4 * blocks.tables[name][t // 4] + t % 4
        paged[slot] = name if t < n else name + 3
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
draw_memory(axes[0], reserved, "40 slots reserved for each")
draw_memory(axes[1], paged, "blocks of 4 slots")
plt.show()
for name, owners in (("reserved", reserved), ("paged", paged)):
    held, taken = sum(1 <= o <= 3 for o in owners), sum(o > 0 for o in owners)
    print(f"{name}: {held} tokens in {taken} slots, {100 * held / taken:.0f} %; {128 - taken} free")
print("table of sequence 2:", blocks.tables[2])

# %% [markdown] slideshow={"slide_type": "fragment"}
# Dark: tokens. Pale: set aside and empty. At most `block_size - 1` slots a sequence are empty, and
# no hole is too small to use, for all blocks are alike.
#
# <!-- notes: Let them count the pale slots on both sides: 60 and 8, so 50 % and 88 % are used. Then
# follow the table of sequence 2, blocks 1, 4 and 7, with your finger. Why is the waste at most
# three slots a sequence here? -->

# %% slideshow={"slide_type": "skip"}
config = course.config


def paged_cache(num_blocks, block_size=16, config=config):
    return kv.PagedCache(
        kv.BlockManager(num_blocks, block_size), num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
    )  # fmt: skip


# %% [markdown] slideshow={"slide_type": "subslide"}
# Attention reads keys wherever they lie:
#
# <!-- notes: Two sequences with tables of their own share one pool, and the output equals
# contiguous attention. Say that a real kernel reads through the table in place, without gathering
# first. That is why a page costs nothing but its table. -->

# %% slideshow={"slide_type": "fragment"}
cache = paged_cache(20, block_size=4)
for i, length in enumerate((9, 14)):
    text = held_out[100 * i : 100 * i + length]
    cache.blocks.allocate(i, text.tolist())
    batch = cache.batch([i], length)
    course(text[None], batch.positions, batch, mask=batch.mask)
batch = cache.batch([0, 1], 1)
one = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(0))
in_place = paged_attention(one, cache.keys[0], cache.values[0], batch.tables, batch.lengths)
for row, length in enumerate((9, 14)):
    contiguous = kv.DynamicCache()
    course(held_out[None, 100 * row : 100 * row + length], cache=contiguous)
    expected = attend(one[row : row + 1], contiguous.keys[0], contiguous.values[0])
    print(f"sequence {row}, blocks {cache.blocks.tables[row]}: equal to contiguous attention:",
          torch.allclose(in_place[row : row + 1], expected, atol=1e-5))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** How much of the memory holds tokens, under each policy, for real mixtures of
# lengths? Two traces with geometric lengths: long requests (500 tokens on average, as in
# conversations) and short ones (78, as in instructions). Every token is a moment in which memory
# is held.
#
# <!-- notes: Have each student write four percentages for the long requests before the figure. The
# one to look at is the third: reserve the exact length, known by a miracle. Expect 100. -->


# %% slideshow={"slide_type": "subslide"}
def lengths_of(mean_prompt, mean_output, count=400, seed=0):
    generator = random.Random(seed)

    def draw(mean):
        return 1 + int(generator.expovariate(1 / mean))

    drawn = ((draw(mean_prompt), draw(mean_output)) for _ in range(10 * count))
    return [pair for pair in drawn if sum(pair) <= 2048][:count]


traces = {"long": lengths_of(161, 338), "short": lengths_of(19, 58)}
policies = ("max", "pow2", "oracle", "paged")
used = {n: [100 * kv.utilization(t, p) for p in policies] for n, t in traces.items()}
figure, ax = plt.subplots(figsize=(11, 3.4))
for i, (name, colour) in enumerate((("long", BLUE), ("short", RED))):
    places = [p + 0.38 * i - 0.19 for p in range(4)]
    bars = ax.bar(places, used[name], 0.36, color=colour)
    ax.bar_label(bars, fmt="%.0f", color=colour)
ax.set_xticks(range(4), ["2,048 reserved", "next power of 2", "exact length", "blocks of 16"])
ax.set(ylabel="% of the slots that hold a token", ylim=(0, 112))
ax.text(-0.35, 95, "requests of about 500 tokens", color=BLUE)
ax.text(-0.35, 80, "requests of about 78 tokens", color=RED)
plt.show()
table(("% used", *policies), *((n, *(f"{x:.1f}" for x in u)) for n, u in used.items()))

# %% [markdown] slideshow={"slide_type": "fragment"}
# Even who knows the length ahead wastes a third: the room waits for tokens still to come. Blocks
# waste half a block a request, whatever its length: little of a long one, much of a short one.
#
# <!-- notes: Explain the 61 %: half of the answer's room is empty on average while it is being
# written. Ask what a larger block would do to the orange bar, and what a block of 1 would cost: a
# table as long as the text. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Sharing
#
# Blocks have holders, not an owner. A table may name another's blocks: four answers to one prompt,
# beams, requests with the same beginning. Who writes into a block that others hold gets a copy
# first (**copy-on-write**); a block is free when nobody holds it.
#
# <!-- notes: Draw two tables and three blocks, and move arrows as the lines appear. b writes: block
# 1 is copied to 2, one more is taken, free goes from 10 to 9. Then a writes in place, since nobody
# else holds it. Ask who frees block 0: the last one who lets go. -->

# %% slideshow={"slide_type": "fragment"}
blocks = kv.BlockManager(12, 4)
blocks.allocate("a", list(range(6)))
blocks.fork("a", "b")
print("after the fork:     ", blocks.tables, " free", blocks.num_free)
print("b writes: copy", blocks.append("b"), blocks.tables, " free", blocks.num_free)
print("a writes: copy", blocks.append("a"), "     (the last holder writes in place)")
blocks.free("a")
print("a ends:             ", blocks.tables, "            free", blocks.num_free)
blocks.publish("b", list(range(6)))
print("c begins alike, tokens that are there already:", blocks.allocate("c", list(range(9))))
blocks.check()

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Question.** Beam search keeps the best few texts. Do beams share more than independent samples
# of the same prompt?
#
# <!-- notes: Ask first, then point: beams agree in the first 9 of 16 tokens, samples in none.
# Reason: beams die and survivors have common parents. So sharing saves up to 79 % for beams with
# long requests, and 19 % for short samples. paged_memory is the challenge for home. -->

# %% slideshow={"slide_type": "fragment"}
cache = paged_cache(64, block_size=4)
prompt = held_out[:21]
beams, scores = kv.beam_search(course, prompt, 16, num_beams=4, cache=cache)
print("log-probabilities of four beams:", [round(x, 1) for x in scores.tolist()])
torch.manual_seed(0)
samples = kv.sample_parallel(course, prompt, 16, num_samples=4, cache=cache)
for name, rows in (("beams", beams), ("samples", samples)):
    common = sum(int((rows[:, :t] == rows[0, :t]).all()) for t in range(1, 17))
    print(f"{name}: the first {common} of 16 tokens are the same in all four")
print("all blocks came back:", cache.blocks.num_free == 64)


def percent_saved(saved, lengths, count):
    """Over the first 12 requests of a trace, each as long as it holds memory."""
    weighted = sum(saved(p, o, count) * o for p, o in lengths[:12])
    return 100 * weighted / sum(o for _, o in lengths[:12])


shared = {
    (name, what): [percent_saved(saved, lengths, n) for n in (2, 4, 6)]
    for name, lengths in traces.items()
    for what, saved in (("samples", kv.sampling_saved), ("beams", kv.beam_saved))
}
table(
    ("% of blocks saved, with", "2", "4", "6 answers"),
    *((f"{n} requests, {w}", *(f"{x:.1f}" for x in found)) for (n, w), found in shared.items()),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `paged_memory`** (challenge, 40 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("paged_memory")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Continuous batching
#
# A static batch ends with its longest answer; the rest wait. Orca (OSDI 2022) decides before *each
# iteration* who takes part: who is done leaves, who waits comes in.
#
# <!-- notes: Eleven minutes for the section. Before the figure: four places, sixteen answers from 1
# to 29 tokens. How much of a static batch is idle? The grey is 44 %. Then 93 iterations become 53
# with the same work. Ask which requests gain least: the longest of each batch. -->


# %% slideshow={"slide_type": "fragment"}
def count_up(step):
    """Any token: what is scheduled does not depend on it."""
    return [0] * (len(step.prefill) + len(step.decode))


generator = random.Random(5)
answers = [min(40, 1 + int(generator.expovariate(1 / 10))) for _ in range(16)]
requests = [kv.Request(f"{i}", (i,) * 4, n) for i, n in enumerate(answers)]
spans = {}


def watch(step):
    for sequence in [s for s, _ in step.prefill] + step.decode:
        spans.setdefault(sequence.request.name, []).append(len(seen))
    seen.append(step)
    return count_up(step)


seen = []
scheduler = kv.Scheduler(kv.BlockManager(64, 4), max_batch=4)
kv.run(requests, scheduler, watch)
figure, axes = plt.subplots(2, 1, figsize=(11, 3.7), sharex=True)
start = 0
for first in range(0, 16, 4):
    longest = max(answers[first : first + 4])
    for place, n in enumerate(answers[first : first + 4]):
        axes[0].barh(place, n, left=start, color=BLUE, ec="white")
        axes[0].barh(place, longest - n, left=start + n, color="0.85", ec="white")
    start += longest
free = [0] * 4
for span in sorted(spans.values()):
    place = free.index(min(free))
    axes[1].barh(place, len(span), left=span[0], color=BLUE, ec="white")
    free[place] = span[-1] + 1
for ax, title, end in ((axes[0], "static", start), (axes[1], "continuous", len(seen))):
    ax.set(ylabel="place", title=f"{title}: {end} iterations")
    ax.set_yticks(range(4))
axes[1].set_xlabel("iteration")
plt.show()
print("answers of", answers, "tokens")
print(f"places used: static {100 * sum(answers) / (4 * start):.0f} %, "
      f"continuous {100 * sum(answers) / (4 * len(seen)):.0f} %")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** On a real model, how many passes does that save, and do the answers change? SmolLM2
# serves ten requests, four at a time; pages of 16 tokens.
#
# <!-- notes: Ten requests on SmolLM2. Ask whether answers may change when neighbours in the batch
# change. They are the same here; section 13 says when not. 34 passes become 22. The times depend on
# the machine, the passes do not. -->

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
generator = random.Random(3)
trace = []
for i in range(10):
    begin = generator.randrange(200)
    prompt = tuple(ids[begin : begin + generator.randint(4, 20)].tolist())
    trace.append(kv.Request(f"r{i}", prompt, min(32, 1 + int(generator.expovariate(1 / 8)))))
cache = paged_cache(24, config=smollm2.func.config)
start = time.perf_counter()
continuous, history = kv.serve(smollm2, trace, cache, max_batch=4)
middle = time.perf_counter()
static, static_history = kv.serve_static(smollm2, trace, batch_size=4, max_len=64)
total = sum(map(len, continuous.values()))
print(f"tokens a second: static {total / (time.perf_counter() - middle):.1f}, "
      f"continuous {total / (middle - start):.1f}")  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
print(
    "answers of",
    [r.max_new_tokens for r in trace],
    "tokens, the same from both:",
    static == continuous,
)
table(
    ("", "static", "continuous"),
    ("iterations", len(static_history), len(history)),
    ("places used, %", *(round(100 * total / (4 * len(h))) for h in (static_history, history))),
    (
        "cache set aside at most, slots",
        *(max(i.used_slots for i in h) for h in (static_history, history)),
    ),
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Preemption.** Nothing is reserved, so memory may run out while everybody grows. Then the
# youngest gives all its blocks back and waits in front of the queue; when it returns, prompt and
# answer so far go through the model once more (**recomputation**).
#
# <!-- notes: Ask what to do when blocks run out: refuse, wait, or throw somebody out? And whom:
# youngest or longest? Read the last row: 16 blocks, ten preemptions, 454 tokens through the model
# in place of 246. Slower, and the answers are the same. -->

# %% slideshow={"slide_type": "fragment"}
requests = [
    kv.Request(f"{i}", tuple(held_out[50 * i : 50 * i + 12].tolist()), 30) for i in range(6)
]
rows = [("blocks of 4", "iterations", "preemptions", "tokens through the model")]
results = []
for num_blocks in (66, 40, 24, 16):
    answers_here, history = kv.serve(course, requests, paged_cache(num_blocks, 4), max_batch=6)
    results.append(answers_here)
    rows.append((num_blocks, len(history), sum(i.num_preempted for i in history),
                 sum(i.num_tokens for i in history)))  # fmt: skip
table(*rows)
print("\nthe answers are the same:", all(r == results[0] for r in results))

# %% [markdown] slideshow={"slide_type": "subslide"}
# What does all of it give on a GPU? We have none, but we can count: an iteration takes as long as
# its slower half, reading (weights and caches) or computing (`kv.iteration_seconds`). OPT-13B in
# 16 bits on an A100 with 40 GB: 26 GB of weights, some 12 GB for the cache.
#
# <!-- notes: Do the room's arithmetic aloud: 12 GB over 819,200 bytes a token are some 14,600
# tokens, so seven sequences of 2,048, or 915 blocks. That difference, not the scheduler alone,
# gives the factors 5.6 and 8.6. -->

# %% slideshow={"slide_type": "skip"}
a100 = kv.Machine(flops_per_second=312e12, bytes_per_second=1.555e12)
token_bytes = kv_cache_bytes(num_layers=40, num_kv_heads=40, head_dim=128)
opt_13b = kv.ServedModel(
    num_parameters=13 * 10**9, bytes_per_parameter=2, kv_bytes_per_token=token_bytes
)
room = 12 * 10**9
rows = [("requests", "tokens/s static", "tokens/s continuous, paged", "ratio")]
for name, lengths in traces.items():
    requests = [kv.Request(str(i), (i,) * p, o) for i, (p, o) in enumerate(lengths[:160])]
    batch_size = room // (2048 * token_bytes)
    static = kv.static_iterations(requests, batch_size=batch_size, max_len=4096)
    blocks = kv.BlockManager(room // (16 * token_bytes), 16)
    _, served = kv.run(requests, kv.Scheduler(blocks, max_batch=256, reserve=8), count_up)
    tokens = sum(r.max_new_tokens for r in requests)
    speed = [
        tokens / sum(kv.iteration_seconds(opt_13b, i, a100) for i in h) for h in (static, served)
    ]
    rows.append((name, *(round(s) for s in speed), f"{speed[1] / speed[0]:.1f}"))

# %% slideshow={"slide_type": "fragment"}
table(*rows)
print(f"\nroom for {batch_size} sequences of 2,048 tokens, or {blocks.num_blocks} blocks")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Two causes multiply: fewer iterations with empty places, and far more places in the same memory.
# On a server the prompts go through the model in the same pass as the others' single tokens (Orca's
# selective batching; `FlatBatch` here). This counts neither kernels nor queues, and all requests
# are there from the start: a bound on the trend, not a benchmark.
#
# <!-- notes: Ask for the weak points of this estimate before you read them: no kernels, no queue,
# all requests present at the start. A bound on the trend. serving_iterations is for home; it is
# this model of cost in small. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `serving_iterations`** (estimate, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("serving_iterations")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Bytes
#
# $$\text{bytes a token}=\underbrace{2}_{K,V}\cdot L\cdot K\cdot d\cdot\text{bytes an element}$$
#
# Layers times key/value heads times their width, twice. Not the query heads, not the model's width.
#
# <!-- notes: Five minutes for the section. On the board, by the room: Llama 3 8B, 2 x 32 x 8 x 128
# x 2 bytes = 128 KiB a token, 0.54 GB at 4,096. Then compare 7B and 70B of Llama 2: 512 against 320
# KiB, the larger model has the smaller cache. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("16 bits", "KiB a token", "GB at 4,096", "sequences of 4,096 in 40 GB")]
for name in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3.1-405b",
             "smollm2-135m"):  # fmt: skip
    c = PRESETS[name]
    n = kv_cache_bytes(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    rows.append((name, f"{n / 1024:g}", f"{4096 * n / 1e9:.2f}", int(40e9 // (4096 * n))))
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** What if each element takes one byte? `Int8Cache` keeps a code for each element and a
# scale for each row of 64. How often does SmolLM2 change its mind about the next token?
#
# <!-- notes: Ask for the factor in bytes first: not quite 4 against float32, since each row of 64
# has a scale: 9.22 to 2.45 MB. Then bets on how often the next token changes: 1 % of 200 positions,
# at equal surprise. -->

# %% slideshow={"slide_type": "fragment"}
page, results = ids[:200], {}
for name, cache in (("float32", kv.DynamicCache()), ("int8", kv.Int8Cache())):
    logits = smollm2(page[None], cache=cache)[0]
    surprise_here = F.cross_entropy(logits[:-1], page[1:]).item()
    results[name] = (logits.argmax(-1), cache.nbytes, surprise_here)
same = (results["float32"][0] == results["int8"][0]).float().mean().item()
for name, (_, nbytes, loss) in results.items():
    print(f"{name:8} {nbytes / 1e6:5.2f} MB, surprise {loss:.2f} nats")
print(f"the most likely token is the same for {100 * same:.0f} % of {len(page)} positions")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** A scale for each token's row, or for each channel: which of them is nearer to the
# keys?
#
# <!-- notes: Draw a matrix of tokens by channels with two large columns. Which direction of scaling
# lets the small ones suffer? One large channel spoils every row; by channel it spoils itself alone:
# 0.90 against 0.51 %. -->

# %% slideshow={"slide_type": "fragment"}
k = capture_attention(theirs, ids[None, :128], layer=0).k
for name, dim in (("each token's row", -1), ("each channel", -2)):
    error = (kv.dequantize(*kv.quantize_rows(k, dim)) - k).norm() / k.norm()
    print(f"layer 0, a scale for {name}: error of the keys {100 * error:.2f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Keys have a few channels that are large in all tokens; a scale for each channel suits them better
# (KIVI, arXiv 2402.02750), and matters with 4 or 2 bits. With 8 bits a scale for each row will do,
# and a new token does not touch the old ones.
#
# <!-- notes: Ask for the drawback of scales by channel in a cache that grows: a new token may
# exceed the old scale, and the old codes would have to be written again. So 8 bits by rows. Chapter
# 09 takes up scales and outliers. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `serving_memory`** (estimate, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("serving_memory")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. What decoding costs
#
# A decode step reads all weights and all caches, and does 2 FLOPs with each weight and sequence.
# **Question.** How many sequences must decode together until arithmetic is the limit?
#
# <!-- notes: Seven minutes for the section. Derive it on the board: b sequences do 2 b FLOPs with a
# weight of 2 bytes, so b FLOPs a byte. An A100 with 40 GB wants 201. Vote: 200 sequences and we are
# there? Then add the caches. -->

# %% slideshow={"slide_type": "subslide"}
c = PRESETS["llama-3-8b"]
llama = kv.ServedModel(
    num_parameters=8_030_261_248,
    bytes_per_parameter=2,
    kv_bytes_per_token=kv_cache_bytes(
        num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim
    ),
)
batches = [2**i for i in range(11)]
most = {}
figure, ax = plt.subplots(figsize=(11, 3.5))
for held, colour in ((0, BLUE), (1024, GREEN), (8192, RED)):
    steps = [kv.Iteration(0, b, b, b * held, b * held) for b in batches]
    intensity = [kv.iteration_intensity(llama, s) for s in steps]
    label = f"{held:,} tokens held" if held else "no cache to read"
    ax.loglog(batches, intensity, "o-", color=colour, label=label)
    most[held] = round(intensity[-1])
ax.axhline(a100.ridge_point, color=GREY, lw=1.5)
ax.text(1, a100.ridge_point * 1.15, "A100: from here on arithmetic is the limit", color="0.35")
ax.set(xlabel="sequences that decode together (Llama 3 8B)", ylabel="FLOPs a byte")
style.label_lines(ax)
plt.show()
print(f"FLOPs a byte at {batches[-1]:,} sequences, by tokens held: {most}")
ridges = {"A100 80 GB": 312 / 2.039, "A100 40 GB": 312 / 1.555, "H100": 989.5 / 3.35}
print("ridge points, FLOPs a byte:", {n: round(x) for n, x in ridges.items()})
alone = [decode_intensity(num_heads=32, num_kv_heads=kv_heads) for kv_heads in (32, 8)]
print("attention alone, FLOPs a byte: 1 for MHA, the group size for GQA:", alone)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The weights are shared by the batch; the caches are not. With long texts no batch is large enough,
# and only fewer bytes help: grouped heads, fewer bits, a window.
#
# <!-- notes: Follow the orange curve: with 8,192 tokens held it bends at 15 FLOPs a byte and no
# batch lifts it. Ask what could: fewer key/value heads, fewer bits, a window. Three answers, three
# chapters. Which of them may change the model's output? -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# Two things that a cache does *not* do. **Question.** Does it make the new token's MLP cheaper?
# Does it help in training?
#
# <!-- notes: Two quick votes. The wrong answer to the first is yes, because generation got faster.
# Count rows: 64 against 1,584 through the MLP, and the new one always goes through. Generation is
# faster because the old ones do not go again. -->

# %% slideshow={"slide_type": "fragment"}
rows_in = []
handle = course.layers[0].mlp.register_forward_hook(lambda m, a, o: rows_in.append(a[0].shape[1]))
text = held_out[None, :64]
for name, step in (("decoding with a cache", True), ("without a cache", False)):
    rows_in.clear()
    cache = kv.DynamicCache() if step else None
    course(text[:, :32], cache=cache)
    for t in range(32, 64):
        course(text[:, t : t + 1] if step else text[:, : t + 1], cache=cache)
    print(f"{name:22} {len(rows_in)} passes, {sum(rows_in):5} tokens through each MLP")
rows_in.clear()
course(text)
print(f"{'one step of training':22} {len(rows_in)} pass, {sum(rows_in):6} tokens through each MLP")
handle.remove()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The new token goes through the MLP as ever; the old ones need not go again. In training all tokens
# are known and go through side by side, each once: there is no past to keep.
#
# <!-- notes: Second vote, training: one pass, 64 tokens, all known. Nothing to keep, and a cache
# would only take memory. generation_flops, fifteen minutes, is for home. End of the lecture. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `generation_flops`** (estimate, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("generation_flops")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Proof against production
#
# transformers' `generate`, greedy, with its growing and its static cache, on SmolLM2 and three
# prompts of different lengths. (The tests do it for 64 tokens.)
#
# <!-- notes: For home, or one minute. Equal tokens to transformers' generate, with three prompts of
# different lengths. Ask why the three lengths are the point: one prompt alone tests neither padding
# nor positions. -->

# %% slideshow={"slide_type": "fragment"}
prompts, new = [ids[:37], ids[50:61], ids[100:124]], 16
tokens, padding = kv.left_pad(prompts)
seen = (torch.arange(tokens.shape[1]) >= padding[:, None]).long()
ours = kv.generate(smollm2, prompts, new, cache=kv.StaticCache(tokens.shape[1] + new))
for name, cache in (
    ("DynamicCache", DynamicCache(config=theirs.config)),
    ("StaticCache", StaticCache(config=theirs.config, max_cache_len=tokens.shape[1] + new)),
):
    expected = theirs.generate(
        tokens, attention_mask=seen, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        past_key_values=cache, pad_token_id=0,
    )[:, tokens.shape[1] :]  # fmt: skip
    same = torch.equal(ours, expected)
    print(f"{new} tokens, three prompts, equal to transformers with {name}: {same}")
print(repr(tokenizer.decode(ours[2])))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Each of our caches against the plain one, on the course's model:
#
# <!-- notes: Five variants, 100 % each, one of them after a preemption. Ask which of the five is
# not bound to give 100 %: int8, and the rolling one if texts were longer than its window. Greedy
# choice hides small differences. -->

# %% slideshow={"slide_type": "fragment"}
prompts = [held_out[:23], held_out[200:207], held_out[400:401]]
plain = kv.generate(course, prompts, 40)
names = [kv.Request(str(i), tuple(p.tolist()), 40) for i, p in enumerate(prompts)]
answers_paged, history = kv.serve(course, names, paged_cache(30, 4), max_batch=3)
for name, got in (
    ("static", kv.generate(course, prompts, 40, cache=kv.StaticCache(64))),
    ("rolling, window 64", kv.generate(course, prompts, 40, cache=kv.RollingCache(64))),
    ("prefill in chunks of 5", kv.generate(course, prompts, 40, chunk_size=5)),
    (
        f"paged, {sum(i.num_preempted for i in history)} preemptions",
        torch.tensor([answers_paged[r.name] for r in names]),
    ),
    ("int8", kv.generate(course, prompts, 40, cache=kv.Int8Cache())),
):
    print(f"{name:24} tokens that are the same: {100 * (got == plain).float().mean():.0f} %")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Published figures, recomputed
#
# **vLLM** (arXiv 2309.06180). Sec. 3: a token of OPT-13B takes "800 KB", a request "1.6 GB". Sec.
# 1: existing systems use 20.4 to 38.2 % of the cache's memory; fig. 2 gives vLLM 96.3 %. Its
# authors' announcement says "under 4 %" waste.
#
# <!-- notes: For home or the discussion. Before the table ask which published number our toy should
# not meet: the exact length, 38.2 against our 60.6 %. The 7.5 of the last lines is the mean of 0 to
# 15 empty slots. -->

# %% slideshow={"slide_type": "skip"}
rows = (
    ("", "published", "here"),
    ("OPT-13B, a token", "800 KB", f"{token_bytes / 1024:g} KiB = {token_bytes:,} B"),
    ("OPT-13B, 2,048 tokens", "1.6 GB", f"{2048 * token_bytes / 1e9:.3f} GB"),
    ("room for 2,048, long requests", "20.4 %", f"{used['long'][0]:.1f} %"),
    ("exact length reserved, long", "38.2 %", f"{used['long'][2]:.1f} %"),
    ("blocks of 16, long", "96.3 %", f"{used['long'][3]:.1f} %"),
    ("blocks of 16, short", "", f"{used['short'][3]:.1f} %"),
)

# %% slideshow={"slide_type": "fragment"}
table(*rows)
for n in (78, 180, 500):
    print(f"{n} tokens: waste about 7.5 / ({n} + 7.5) = {100 * 7.5 / (n + 7.5):.1f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# The 800 KB are KiB. Our exact-length policy does better than the published one: the paper's
# allocator (buddies) leaves holes between requests, which we do not count. And "under 4 %" holds
# for requests above 180 tokens; of short ones more is lost.
#
# <!-- notes: Where it does not agree, say why, and do not tune until it does: the paper's allocator
# leaves holes, ours does not count them. The 4 % holds from about 180 tokens on. A slogan needs its
# condition. -->

# %% slideshow={"slide_type": "skip"}
published = {
    ("short", "samples"): "6.1 - 9.8",
    ("short", "beams"): "37.6 - 55.2",
    ("long", "samples"): "16.2 - 30.5",
    ("long", "beams"): "44.3 - 66.3",
}
rows = [("blocks saved by sharing, 2 to 6 answers, %", "published", "here")]
for (n, w), text in published.items():
    first, _, last = shared[n, w]
    rows.append((f"{n} requests, {w}", text, f"{first:.1f} - {last:.1f}"))

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Sec. 6.3; short is Alpaca, long is ShareGPT. Our lengths are geometric around means of about that
# size, and our beams draw their parents by lot: the order of magnitude comes out, and that beams
# share far more than samples. The paper's throughput, 2 to 4 times that of
# FasterTransformer and Orca at the same latency, and Orca's 36.9 times FasterTransformer's (GPT-3
# 175B) need the machines; section 8 shows where they come from.
#
# <!-- notes: Our ranges lie above the published ones for samples: 11.3 - 18.9 against 6.1 - 9.8.
# Order of magnitude, and beams above samples: that is what the toy can claim. What needs the
# machines is said, not imitated. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **DeepSeek-V2** (arXiv 2405.04434) caches one compressed vector of $\frac92 d_h$ numbers a layer,
# "equal to GQA with only 2.25 groups" (table 1), and says that its cache is 93.3 % smaller than
# that of DeepSeek 67B.
#
# <!-- notes: Give the two printed claims, 2.25 groups and 93.3 %, and let students check the second
# one: 34,560 against 194,560 numbers is 82.2 %. -->

# %% slideshow={"slide_type": "fragment"}
compressed, grouped = 60 * (512 + 64), 95 * 2 * 8 * 128
print(f"groups: (512 + 64) / (2 x 128) = {576 / 256}")
fewer = 100 * (1 - compressed / grouped)
print(f"numbers a token: {compressed:,} and {grouped:,}: {fewer:.1f} % fewer")
print(f"6 bits each instead of 16: {100 * (1 - compressed * 6 / (grouped * 16)):.1f} % fewer bytes")

# %% [markdown] slideshow={"slide_type": "fragment"}
# In numbers it is 82 %: the published 93.3 % comes out with the 6 bits of the paper's sec. 3.2.3.
# (The shape of DeepSeek 67B, 95 layers and 8 key/value heads, is its published configuration's.)
#
# <!-- notes: Ask what is missing between 82 and 93: bits. With 6 instead of 16 it comes out
# exactly. Reading a percentage, ask first: percent of what, in which unit? -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Speculative decoding** (Leviathan et al., arXiv 2211.17192, eq. 1): a small model guesses
# $\gamma$ tokens, the large one checks all of them in one pass, and the cache is cut back behind
# the first wrong one (`DynamicCache.crop`). Each guess is accepted with probability $\alpha$:
# $E=\frac{1-\alpha^{\gamma+1}}{1-\alpha}$ tokens a pass.
#
# <!-- notes: Derive E on the board as a sum: 1 + alpha + alpha squared and so on. Ask why the large
# model can check five guesses at the price of one step: decoding reads, it has arithmetic to spare.
# With 0.8 and 5 guesses, 3.69 tokens a pass. -->

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
rows = [("acceptance, guesses", "eq. 1", "simulated")]
for alpha, gamma in ((0.6, 2), (0.8, 5), (0.9, 10)):
    accepted = torch.rand(200_000, gamma, generator=generator) < alpha
    simulated = 1 + accepted.long().cumprod(1).sum(1).double().mean().item()
    formula = (1 - alpha ** (gamma + 1)) / (1 - alpha)
    rows.append((f"{alpha}, {gamma}", f"{formula:.2f}", f"{simulated:.2f}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. What breaks in practice
#
# - **A used cache.** A cache belongs to one batch of texts. Given to the next, its keys are seen.
# - **One layer ahead.** The length is a layer's, until all layers are updated: read it before the
#   pass, not within.
# - **NaN in hidden rows.** A hidden value is multiplied by 0, and $0\times$NaN is NaN. Rows that
#   are all padding must come out as zeros:
#
# <!-- notes: For home. Ask what a chat server does wrong that hands a used cache to the next user:
# it answers with somebody else's text in sight. Here it is refused with a reason. The second point,
# one layer ahead, is easily made and hard to see. -->

# %% slideshow={"slide_type": "fragment"}
cache = kv.DynamicCache()
columns = torch.arange(tokens.shape[1])
positions = (columns - padding[:, None]).clamp(min=0)
smollm2(tokens, positions, cache, mask=kv.column_mask(columns, columns, padding))
print("all cached values are finite, those of the padding too:",
      all(bool(x.isfinite().all()) for x in (*cache.keys, *cache.values)))  # fmt: skip
try:
    kv.generate(course, [held_out[:4]], 3, cache=cache)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Another batch, other bits.** Sums in another order differ in the last digit, and where two
#   tokens are nearly equal a greedy answer can change with the batch that it shares.
# - **Shared prefixes leak time.** Who sends your prompt's beginning sees that it answers faster:
#   servers share within a tenant only.
# - **Preemption storms.** With no reserve, each admission can push out the one before, again and
#   again: `Scheduler(..., reserve=)` keeps blocks for those who run.
#
# <!-- notes: Return to the vote whether answers may change with the batch. Ask what a customer
# should be told who gets two answers at temperature 0. Shared prefixes: who would have thought that
# a speed-up tells what others wrote? -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** One request's NaN stayed in its blocks, and the next owner's
# answer was NaN (vllm #641, #50283). A request that fits the context and not the cache was tried
# again for ever, and all behind it waited (vllm #39734, #35541). A client that goes away must not
# keep its blocks.
#
# <!-- notes: Ask who is to blame when your answer depends on a stranger's. A block is cleared when
# its first slot is written, and hidden values do not enter the sum. What can never be served is
# refused before the first step, not after the others have been answered. Three minutes. -->

# %% slideshow={"slide_type": "fragment"}
cache = kv.PagedCache(kv.BlockManager(8, 4), num_layers=course.config.num_layers,
                      num_kv_heads=course.config.num_kv_heads,
                      head_dim=course.config.head_dim)  # fmt: skip
cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)  # what another request left
weights = torch.tensor([1.0, 0.0])  # the second slot is hidden
print("plain product with a hidden slot:", (weights @ cache.values[0, 0, :2, 0, :1]).item())
prompt = held_out[:6]
answers, _ = kv.serve(course, [kv.Request("a", tuple(prompt.tolist()), 8)], cache, max_batch=2)
print("served in such memory as alone:",
      answers["a"] == kv.generate(course, [prompt], 8)[0].tolist())  # fmt: skip
scheduler = kv.Scheduler(cache.blocks, max_batch=2)
try:
    kv.run([kv.Request("b", (1, 2), 3), kv.Request("c", (1,) * 40, 3, arrival=9)], scheduler, None)
except ValueError as error:
    print("before the first step:", error)
scheduler.submit(kv.Request("d", (1, 2, 3, 4, 5), 9))
scheduler.step(lambda step: [7])
print("blocks free:", cache.blocks.num_free, end="")
scheduler.abort("d")
print(", after abort:", cache.blocks.num_free)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Summary
#
# - Keep keys and values; queries are answered and gone. Rotate a key once, where it stands.
# - Prefill computes, decode reads. A cache turns quadratic work into linear memory.
# - What was never written must not be seen: zeros are keys.
# - Blocks, tables, holders: no reservation, no holes, sharing with copy-on-write.
# - Schedule by the iteration. Preempt, recompute, and the answers stay the same.
# - $2LKd$ numbers a token decide how many can be served.
#
# **Further reading.** Kwon et al. 2023 (vLLM, arXiv 2309.06180); Yu et al., *Orca*, OSDI 2022;
# Shazeer 2019 (arXiv 1911.02150); Jiang et al. 2023 (Mistral 7B, arXiv 2310.06825); Liu et al. 2024
# (KIVI, arXiv 2402.02750); Leviathan et al. 2023 (arXiv 2211.17192).
#
# <!-- notes: Students should be able to decode with static, rolling and paged caches, and say what
# limits a server. In the laboratory: cached_attention, rotary_scores, prefill_batch, static_step;
# the rest at home. Chapter 07 reads the same keys without ever writing the scores down. -->
