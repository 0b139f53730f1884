# %% [markdown] slideshow={"slide_type": "slide"}
# # 05 Transformer
#
# The four chapters before this one were parts. Here they become a model that writes: tokens in,
# a probability for every next token out. You build the block, count its parameters and FLOPs, learn
# a vocabulary, train from random numbers, and sample.
#
# Nothing is simplified: the same code, with other numbers in its configuration, is Llama 3.1 405B,
# and its logits equal those of transformers bit for bit.
#
# You need: chapters 01 to 04.
#
# <!-- notes: Lecture of 75 minutes: 40 for sections 1 to 6, 35 for 7 to 10; 12 and 13 are for home.
# Nothing new is invented today, four chapters are put together, so ask at each part which chapter
# it came from. Run the notebook before the lecture: the training takes minutes. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory. The whole notebook takes about two
# > minutes; nearly all of it is the training in section 8 (shrink `NUM_STEPS`).

# %% slideshow={"slide_type": "skip"}
import dataclasses
import math
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.attention import kv_cache_bytes
from reference.pretrained import corpus
from reference.transformer import (
    PRESETS,
    Llama,
    LlamaConfig,
    bert_parameters,
    encoder_decoder_parameters,
    gpt_parameters,
    llama_parameters,
    load_pretrained,
    mixtral_parameters,
    model_flops_utilization,
    next_token_loss,
    save_pretrained,
    six_n,
    training_flops_per_token,
)
from reference.transformer.course_model import RUN, load_course_model, train_course_model
from reference.transformer.optimizer import AdamW
from reference.transformer.sampling import filter_logits, generate, sample
from reference.transformer.schedule import cosine_with_warmup, noam
from reference.transformer.tokenizer import Tokenizer

torch.set_num_threads(1)
style.use()
NUM_STEPS = 300

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. The question
#
# Here is a Llama with 0.9 million parameters, all of them random. It knows a vocabulary of 1,024
# pieces of text and nothing else.

# %% slideshow={"slide_type": "skip"}
trainer, tokenizer, held_out = train_course_model(
    dataclasses.replace(RUN, total_steps=NUM_STEPS, warmup_steps=20)
)
model, SHAPE = trainer.model, trainer.model.config


def write(model, prompt, num_tokens=50, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = generate(model, ids, num_tokens, context=128,
                   choose=lambda x: sample(x, generator=generator, **options))  # fmt: skip
    return tokenizer.decode(out[0].tolist())


def one_line(text, num_chars=150):
    """The beginning of a text, in printable ASCII, with each gap one space wide."""
    words = text.encode("ascii", "replace").decode().split()
    return "".join(c if c.isprintable() else "?" for c in " ".join(words))[:num_chars]


# %% slideshow={"slide_type": "fragment"}
PROMPT = "The statement"
before = write(model, PROMPT)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters\n")
print(one_line(before))

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Question.** How much text and how many minutes of one CPU core does it take until it writes
# something that looks like a manual of a programming language? Guess. (Section 8.)
#
# <!-- notes: Three minutes. Write the guesses on the board, text in pages and time in minutes, and
# keep them. Ask also what the letters on the slide are: tokens drawn nearly evenly from 1,024, so
# pieces of words without any order. Section 8 answers. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. From 2017 to Llama
#
# The transformer of 2017 translated: an encoder reads, a decoder writes and looks across. A
# language model needs the decoder alone. What else has changed in six years is small:
#
# <!-- notes: Eight minutes for the section. Let students find the differences between the last two
# columns before the next page. RoPE and SwiGLU come at once; wait for where the norm stands, and
# that the cross-attention is gone. Colours: orange norms, blue attention, green the wide layer. -->


# %% slideshow={"slide_type": "fragment"}
def box(ax, x, y, text, colour, width=3.0):
    ax.add_patch(plt.Rectangle((x - width / 2, y), width, 0.72, fc=colour, ec="0.35"))
    ax.text(x, y + 0.36, text, ha="center", va="center", fontsize=13)


figure, ax = plt.subplots(figsize=(11, 5))
pale, warm, cool, green = "#F0F0F0", "#F7D9C4", "#CFE3F2", "#CDEBDD"
for x, title, stack in (
    (1.55, "encoder, 2017", ["embedding + sinusoids", "self-attention", "add, LayerNorm",
                            "ReLU layer, 4D", "add, LayerNorm"]),
    (5.25, "decoder, 2017", ["embedding + sinusoids", "masked self-attention", "add, LayerNorm",
                            "cross-attention", "add, LayerNorm", "ReLU layer, 4D",
                            "add, LayerNorm", "head"]),
    (9.0, "Llama", ["embedding", "RMSNorm", "masked GQA with RoPE", "add", "RMSNorm",
                    "SwiGLU, about 8D/3", "add", "RMSNorm, head"]),
):  # fmt: skip
    ax.text(x, 8.25, title, ha="center", fontsize=15, weight="bold")
    for level, text in enumerate(stack):
        colour = cool if "ttention" in text or "GQA" in text else pale
        colour = warm if "Norm" in text else colour
        colour = green if "layer" in text or "GLU" in text else colour
        box(ax, x, level, text, colour)
ax.annotate(
    "", (3.75, 3.36), (3.05, 4.4), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "0.3"}
)
ax.set(xlim=(0, 10.6), ylim=(-0.2, 8.8))
ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# - The norm moved in front of each sublayer and lost its mean (chapter 01).
# - The ReLU became a gate (02).
# - Positions turn queries and keys instead of being added (03).
# - Key/value heads are shared (04).
#
# Both are built from the same modules here; `reference/transformer/encoder_decoder.py` is the one
# of 2017.
#
# <!-- notes: Tick off what the room found. Ask for the reason of each in one sentence, from its
# chapter: depth that trains, a gate, distance instead of place, bytes of cache. None of them
# changes the shape of what flows, T times D, and that is why parts can be exchanged. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** "Llama 2 uses grouped queries, Llama 3.1 reads 148k tokens." True?
#
# <!-- notes: Such sentences stand in many summaries, so let them check it on the table themselves:
# two minutes in pairs. The trap is Llama 2 7B and 13B, with as many key/value heads as query heads.
# Ask which column changed between Llama 3 and 3.1: only the context. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("", "layers", "query heads", "kv heads", "context", "vocabulary")]
for name in ("llama-1-7b", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "llama-3-70b",
             "llama-3.1-8b", "llama-3.1-405b", "smollm2-135m"):  # fmt: skip
    c = PRESETS[name]
    rows.append(
        (name, c.num_layers, c.num_heads, c.num_kv_heads, f"{c.max_seq_len:,}", f"{c.vocab_size:,}")
    )
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Both false: of Llama 2 only the 70B shares its key/value heads (arXiv 2307.09288, table 1), and
# 128k means $2^{17}$ = 131,072.
#
# <!-- notes: The lesson is to read configs and not summaries. 131,072 is written 128k where k means
# 1,024; 148k is nowhere. full_context_cache_bytes, ten minutes, uses this table; it is for home.
# -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `full_context_cache_bytes`** (estimate, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("full_context_cache_bytes")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Tokens: byte-level BPE
#
# A model needs a fixed alphabet. Bytes are one: 256, for every text of the world. But "the" would
# be three steps. Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) merges the most
# frequent pair of neighbours into a new token, again and again.
#
# <!-- notes: Nine minutes for the section. Do three merges of a short line by hand on the board
# before the cell. Ask what the first merge of a programming manual will be: two spaces, not th. A
# token with a space in front is another token than that without. -->

# %% slideshow={"slide_type": "fragment"}
first = [tokenizer.decode([i]) for i in range(257, 269)]
print("the first merges:", first)
print("the last merges: ", [tokenizer.decode([i]) for i in range(1018, 1024)])
sentence = "A generator function returns an iterator. Straße, 東京!"
ids = tokenizer.encode(sentence)
print("\n" + "|".join(tokenizer.decode([i]) for i in ids).replace("\ufffd", "·"))
print("and back:", tokenizer.decode(ids) == sentence)

# %% [markdown] slideshow={"slide_type": "fragment"}
# (A dot is a piece of a letter: 東 has three bytes, and the text that was learned from has no 東.
# Nothing is ever unknown.)
#
# <!-- notes: Ask what happens to a letter that was never seen. The answer unknown was right for
# word vocabularies; here it falls back to bytes, six of them for the two Japanese letters, and
# comes back exactly. The price is length. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** A larger vocabulary makes texts shorter. By how much, and where does it end?
#
# <!-- notes: Let them sketch the curve first: characters a token against vocabulary. At 257 it is
# 1, by construction. From 600 to 2,200 it goes from 2.4 to 3.9 only. Ask what each new row costs,
# and who pays. -->

# %% slideshow={"slide_type": "fragment"}
part = corpus()[:120_000]
sizes = [257, 300, 400, 600, 1000, 1500, 2200]
lengths = [len(part) / len(Tokenizer.train(part, vocab_size=size).encode(part)) for size in sizes]
figure, ax = plt.subplots(figsize=(11, 3.4))
ax.plot(sizes, lengths, "o-", color=style.COLOURS["blue"])
ax.set(xlabel="vocabulary", ylabel="characters a token", xlim=(200, 2300), ylim=(0, 4.2))
plt.show()
print(", ".join(f"{size}: {length:.2f}" for size, length in zip(sizes, lengths, strict=True)))

# %% [markdown] slideshow={"slide_type": "fragment"}
# Less and less. Each token costs a row of the embedding and of the head; Llama went from 32,000 to
# 128,256 rows when its models had grown large enough to afford them.
#
# <!-- notes: Compute one case: 128,256 rows of width 4,096 are 525 million numbers, twice if the
# head is not tied. For an 8B model that is bearable, for our 0.9 million it would be absurd.
# merge_step is the challenge for home. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `merge_step`** (challenge, 25 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("merge_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. The decoder
#
# All of it: look up, $L$ times (norm, attend, add; norm, gate, add), norm, compare with every row
# of the vocabulary.
#
# <!-- notes: Seven minutes for the section. Have students say what each of the nine weights is for,
# and why k and v have 64 rows where q has 128: two key/value heads for four query heads, each 32
# wide. 344 is about eight thirds of 128. -->

# %% slideshow={"slide_type": "fragment"}
tokens = torch.tensor([tokenizer.encode("The for statement is used to")])
x = model.embed_tokens(tokens)
print("tokens", tuple(tokens.shape), " embedding", tuple(x.shape))
print("logits", tuple(model(tokens).shape), ": one for each next token, at every position")
for name, weight in model.layers[0].named_parameters():
    print(f"{name:34} {tuple(weight.shape)}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Every position predicts. Does position 3 change when a token behind it does?
#
# <!-- notes: Vote: does the output at position 3 change when token 4 does? Then the harder one: at
# position 4 itself? Yes, since it reads token 4. The list shows four True, then False. If this test
# fails, the loss will fall too fast. -->

# %% slideshow={"slide_type": "fragment"}
other = tokens.clone()
other[0, 4] = 300
same = (model(tokens) == model(other)).all(-1)[0]
print("logits equal before and after changing token 4:", same.tolist())

# %% [markdown] slideshow={"slide_type": "fragment"}
# No: the causal mask makes one pass over $T$ tokens $T$ training examples.
#
# <!-- notes: This is why training is cheap beside generation: one pass gives T examples, a
# generated token gives one. Chapter 06 starts from there. decoder_block, thirty minutes, opens the
# laboratory; say that the order of norm and add is where it goes wrong. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `decoder_block`** (build, 30 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("decoder_block")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Counting parameters
#
# $$N=\underbrace{VD}_{\text{twice if untied}}+L\,(\underbrace{2DHd+2DKd}_{\text{attention}}+
# \underbrace{3DF}_{\text{SwiGLU}}+\underbrace{2D}_{\text{norms}})+D$$
#
# **Question.** Which part is the largest? Does the answer change with size?
#
# <!-- notes: Seven minutes for the section. Let them put numbers of Llama 3 8B into the formula, in
# pairs: D 4096, F 14336, L 32, K 8. Vote before the figure which part is the largest; attention is
# the usual answer, and wrong at every size. -->

# %% slideshow={"slide_type": "fragment"}
names = ["smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"]
figure, ax = plt.subplots(figsize=(11, 3.8))
left = [0.0] * len(names)
rows = [("share, %", *names)]
for part, colour in (("embedding", "sky"), ("head", "blue"), ("attention", "orange"),
                     ("feed_forward", "green")):  # fmt: skip
    counts = [llama_parameters(PRESETS[n]) for n in names]
    shares = [100 * getattr(c, part) / c.total for c in counts]
    bars = ax.barh(
        names, shares, left=left, color=style.COLOURS[colour], label=part.replace("_", "-")
    )
    ax.bar_label(bars, [f"{s:.0f}" if s > 4 else "" for s in shares], label_type="center",
                 color="white")  # fmt: skip
    left = [a + b for a, b in zip(left, shares, strict=True)]
    rows.append((part.replace("_", "-"), *[round(s) for s in shares]))
ax.set(xlabel="share of parameters, %", xlim=(0, 100))
ax.grid(False)
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
plt.show()
table(*rows)

# %% slideshow={"slide_type": "subslide"}
published = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}  # fmt: skip
rows = [("", "published", "formula", "built, on the meta device")]
for name, count in published.items():
    formula = llama_parameters(PRESETS[name]).total
    built = "-"
    if name != "llama-3.1-405b":
        with torch.device("meta"):
            built = f"{sum(p.numel() for p in Llama(PRESETS[name]).parameters()):,}"
    assert formula == count
    rows.append((name, f"{count:,}", f"{formula:,}", built))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# To the digit. The meta device has shapes and no memory: 70 billion parameters in a second.
#
# <!-- notes: Three columns agree to the last digit, and the formula was written before the models
# were built. Ask how one builds 70 billion parameters on a laptop: no memory is touched, only
# shapes exist. One missing norm would show, as a difference of some thousands. -->

# %% slideshow={"slide_type": "skip"}
base = dict(vocab_size=37000, dim=512, hidden_dim=2048, num_layers=6)
experts = LlamaConfig(
    vocab_size=32000, dim=4096, hidden_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8
)
mixtral = mixtral_parameters(experts, num_experts=8, experts_per_token=2)
gpt3 = gpt_parameters(dim=12288, num_layers=96, context=2048)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Other architectures count otherwise. Their published totals, and ours:
#
# <!-- notes: Skip through it in a minute. Ask about the two lines that do not agree: 65M against
# 63.1M and 340M against 335.1M. Which parts may a paper leave out, or round? Mixtral: why are 46.7B
# stored and 12.9B used? Two of eight experts a token. -->

# %% slideshow={"slide_type": "fragment"}
table(
    ("", "published", "here"),
    ("transformer base, 37,000 tokens", "65M", f"{encoder_decoder_parameters(**base) / 1e6:.1f}M"),
    ("BERT base", "110M", f"{bert_parameters(dim=768, num_layers=12) / 1e6:.1f}M"),
    ("BERT large", "340M", f"{bert_parameters(dim=1024, num_layers=24) / 1e6:.1f}M"),
    ("GPT-2 small", "124M", f"{gpt_parameters(dim=768, num_layers=12, context=1024) / 1e6:.1f}M"),
    ("GPT-3", "174,600M", f"{gpt3 / 1e6:,.0f}M"),
    (
        "Mixtral 8x7B: all, active",
        "46.7B, 12.9B",
        f"{mixtral.total / 1e9:.1f}B, {mixtral.active / 1e9:.1f}B",
    ),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `llama_parameters`** (estimate, 15 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("llama_parameters")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. The loss
#
# $$\mathcal L=-\frac1{T-1}\sum_{t<T}\log p(x_{t+1}\mid x_{\le t})$$
#
# **Question.** What is the loss before any training? And what if one forgets to shift, and asks
# position $t$ for token $t$, which it has seen?
#
# <!-- notes: Six minutes for the section. First question: everybody should get ln of the
# vocabulary, 6.93; a first loss far from it is a bug. For the second, take a vote before the cell:
# lower or higher without the shift? Expect lower; for this model it is 7.6 against 3.5. -->

# %% slideshow={"slide_type": "fragment"}
batch = held_out[:1024].view(8, 128)
with torch.no_grad():
    print(
        f"random model: {next_token_loss(model(batch), batch):.2f}   ln 1024 = {math.log(1024):.2f}"
    )
trained, trained_tokenizer = load_course_model()
with torch.no_grad():
    logits = trained(batch)
    shifted = next_token_loss(logits, batch)
    unshifted = F.cross_entropy(logits.flatten(0, 1), batch.flatten())
print(f"a trained model: {shifted:.1f} with the shift, {unshifted:.1f} without")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Trained *without* the shift, a model learns to copy its input: the loss goes to zero and the
# text it writes is one token, for ever. A loss that is too good is the sign.
#
# Padding is labelled -100 and counts neither in the sum nor in the number of tokens:
#
# <!-- notes: The vote was right for a model trained that way: copying is easy, loss goes to zero.
# Our model was trained to predict, so it puts little on the token that it has just read. Both sides
# can be right; ask which experiment would show each. Forty minutes by here. -->

# %% slideshow={"slide_type": "fragment"}
labels = batch.clone()
labels[:, 64:] = -100
with torch.no_grad():
    alone = next_token_loss(trained(batch[:, :64]), batch[:, :64])
    padded = next_token_loss(trained(batch), labels)
print(
    "loss of the first half alone equals that with the rest ignored:",
    torch.allclose(alone, padded, atol=1e-4),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `next_token_loss`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("next_token_loss")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. AdamW, schedule, clipping
#
# **Question.** Two weights start at 1 and have noisy gradients without direction, one a thousand
# times larger than the other. Weight decay should shrink both alike. Add it to the gradient (L2),
# and Adam divides it by the size of the gradient. Which weight still decays?
#
# <!-- notes: Nine minutes for the section. Write Adam's step on the board: first moment over root
# of second. Then ask where to add decay. With L2 it passes through the division; with a gradient a
# thousand times larger, it is divided by a thousand times more. Which curve stays at 1? -->

# %% slideshow={"slide_type": "subslide"}
noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0])
paths = {}
for name in ("decoupled", "L2"):
    weights = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([weights], lr=3e-3, weight_decay=0.5 if name == "decoupled" else 0.0)
    paths[name] = []
    for gradient in noise:
        weights.grad = gradient + (0.5 * weights.detach() * 1e-3 if name == "L2" else 0)
        optimizer.step()
        paths[name].append(weights.tolist())
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
for ax, (name, path) in zip(axes, paths.items(), strict=True):
    for i, (label, colour) in enumerate(
        (("small gradient", "blue"), ("large gradient", "vermilion"))
    ):
        ax.plot([p[i] for p in path], color=style.COLOURS[colour], label=label)
    ax.set(title=name, xlabel="step", xlim=(0, 400))
    style.label_lines(ax)
axes[0].set_ylabel("weight")
plt.show()
print({name: [round(v, 1) for v in path[-1]] for name, path in paths.items()})

# %% [markdown] slideshow={"slide_type": "fragment"}
# Decoupled (Loshchilov and Hutter, arXiv 1711.05101), both shrink at the same rate; as L2, only the
# one whose gradients are small. Norms and biases usually do not decay; nothing breaks if they do.
#
# <!-- notes: The orange curve on the right stays near 1.0, all others end at 0.5. It is the one
# with the large gradient. Ask what the step divides by, for each of the four. The exercise
# adamw_step is fifteen minutes, at home. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# The learning rate goes up in a line, since Adam's second moment is unreliable in the first steps,
# and down along half a cosine.
#
# <!-- notes: Ask why not start at the peak. Adam's second moment is an average over few gradients
# then, and one unlucky small value gives a giant step. Ask also what the last part of the curve
# buys. 2017 used another shape, peak at step 4,000. -->

# %% slideshow={"slide_type": "fragment"}
steps = range(0, 301)
shape = dict(peak=RUN.peak_lr, warmup_steps=20, total_steps=300, final=RUN.final_lr)
rates = [cosine_with_warmup(s, **shape) for s in steps]
figure, ax = plt.subplots(figsize=(11, 3.8))
ax.plot(steps, [1000 * r for r in rates], color=style.COLOURS["green"])
ax.set(xlabel="step", ylabel="learning rate, thousandths", xlim=(0, 300), ylim=(0, 3.3))
plt.show()
print(
    f"2017: peak {noam(4000, dim=512):.2e} (base), {noam(4000, dim=1024):.2e} (big), at step 4000"
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `adamw_step`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("adamw_step")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `optimizer_step`** (repair, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("optimizer_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. Training
#
# Text: 420,000 characters of Python's language reference. Batches of 16 windows of 128 tokens.
# AdamW, cosine, clipping at norm 1.
#
# <!-- notes: Ten minutes for the section. Ask three numbers before the curve: where does it begin
# (6.93), where will it end, and will text it has not seen be better or worse? If you run it live,
# start the cell now; it takes some minutes. -->

# %% slideshow={"slide_type": "fragment"}
started = time.perf_counter()
written = {}
for until in (NUM_STEPS // 6, NUM_STEPS):
    trainer.run(until=until)
    written[until] = write(model.eval(), PROMPT, 60, temperature=0.7)
seconds = time.perf_counter() - started

# %% slideshow={"slide_type": "fragment"}
losses = [step.loss for step in trainer.history]
with torch.no_grad():
    text = held_out[: 40 * 128].view(40, 128)
    unseen = next_token_loss(model(text), text).item()
smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
figure, ax = plt.subplots()
ax.plot(losses, color="0.8", lw=1)
ax.plot(range(5, 5 + len(smooth)), smooth, color=style.COLOURS["blue"])
ax.axhline(math.log(1024), color="0.5", lw=1, ls="--")
ax.text(NUM_STEPS, math.log(1024) - 0.25, "a guess among 1,024", ha="right", color="0.4")
ax.plot([NUM_STEPS], [unseen], "o", ms=9, color=style.COLOURS["vermilion"])
ax.text(
    NUM_STEPS - 6,
    unseen + 0.35,
    "text it has not seen",
    ha="right",
    color=style.COLOURS["vermilion"],
)
ax.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, NUM_STEPS + 3), ylim=(2, 7.3))
plt.show()
last_ten = sum(losses[-10:]) / 10
print(f"loss: first {losses[0]:.1f}, last ten steps {last_ten:.1f}, unseen text {unseen:.1f}")

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
print(f"{NUM_STEPS * RUN.tokens_per_step / seconds:,.0f} tokens a second, {seconds:.0f} s\n")
for step, text in ((0, before), *written.items()):
    print(f"after {step} steps: {one_line(text, 180)}\n")

# %% [markdown] slideshow={"slide_type": "fragment"}
# First frequent words, then the look of the manual: clauses, code in quotes, cross-references.
# The model of `load_course_model()` is the same after 600 steps, three minutes; later chapters use
# it. (Try 2,400 steps on this short text: where does the orange point go, and why?)
#
# <!-- notes: Read the samples aloud. Ask what the model has learned first: spaces and frequent
# words, then the form of sentences, meaning last or never. The orange point lies at 4.0, training
# at 3.6. Where would it go with 2,400 steps? That is for home. -->

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
print(one_line(write(trained, "The for statement", 70, temperature=0.6), 300))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** The power fails at step 3 of 6. What must the checkpoint hold so that the run
# continues *exactly*, bit for bit?
#
# <!-- notes: Collect the list on the board. Weights come at once, moments after a hint, and the
# step, which both the schedule and Adam's bias correction need. The order of data is found last.
# The second trainer starts from another seed on purpose: everything must come from the file. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Weights, both moments of Adam, the step; and the order of the data. Here a batch is a function of
# seed and step, so the step is enough.

# %% slideshow={"slide_type": "fragment"}
short = dataclasses.replace(RUN, total_steps=6, batch_size=2, seq_len=32, warmup_steps=2)
whole, _, _ = train_course_model(short)
whole.run()
first, _, _ = train_course_model(short)
first.run(until=3)
with tempfile.TemporaryDirectory() as folder:
    first.save(f"{folder}/run.safetensors")
    second, _, _ = train_course_model(short, seed=1)
    second.load(f"{folder}/run.safetensors")
second.run()
print(
    "losses equal, bit for bit:",
    [s.loss for s in second.history] == [s.loss for s in whole.history],
)
pairs = zip(second.model.parameters(), whole.model.parameters(), strict=True)
print("weights equal, bit for bit:", all(torch.equal(a, b) for a, b in pairs))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Sampling
#
# The most likely token each time (greedy) is dull and soon repeats itself. So draw; but the tail of
# 1,000 unlikely tokens together is not unlikely. Cut it.
#
# <!-- notes: Seven minutes for the section. Ask what greedy would write, and what is wrong with
# drawing from everything: beyond rank 50 lies 20 % in all, so every fifth token comes from there.
# Then: which cut adapts to how sure the model is? Top-p keeps 17 tokens here. -->

# %% slideshow={"slide_type": "fragment"}
ids = torch.tensor([trained_tokenizer.encode("The for statement is used to")])
with torch.no_grad():
    last = trained(ids)[0, -1]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
for ax, (title, options) in zip(axes, (
    ("temperature 1", {}), ("temperature 0.5", {"temperature": 0.5}), ("top-p 0.6", {"top_p": 0.6}),
), strict=True):  # fmt: skip
    probabilities = filter_logits(last, **options).softmax(-1).sort(descending=True).values
    kept = int((probabilities > 0).sum())
    ax.bar(range(25), probabilities[:25], color=style.COLOURS["blue"])
    ax.set(title=title, xlabel="rank of the token")
    ax.text(0.95, 0.9, f"{kept} kept", ha="right", transform=ax.transAxes)
axes[0].set_ylabel("probability")
plt.show()
tail = filter_logits(last).softmax(-1).sort(descending=True).values[50:].sum()
print(f"probability of everything beyond rank 50: {100 * tail:.0f} %")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The trained model goes on with *An exception*, and chooses in three ways:
#
# <!-- notes: Read the three texts aloud: greedy goes in circles, 1.5 falls apart, 0.8 with top-p
# holds together. Ask what top-p does to a flat distribution: it keeps nearly all. That is one of
# the questions for the discussion. -->

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
for name, options in (
    ("greedy", {"top_k": 1}), ("temperature 1.5", {"temperature": 1.5}),
    ("temperature 0.8, top-p 0.9", {"temperature": 0.8, "top_p": 0.9}),
):  # fmt: skip
    print(f"{name}:\n  {one_line(write(trained, 'An exception', 40, **options), 200)}\n")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `next_token_probabilities`** (build, 20 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("next_token_probabilities")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. FLOPs and utilisation
#
# A token is multiplied by each weight once: 2 FLOPs a parameter forward, 4 backward. Hence the rule
# of thumb, $6N$ a token and $6ND$ for $D$ tokens. It leaves attention out.
#
# **Question.** When does that matter?
#
# <!-- notes: Nine minutes for the section. Let them derive the 6: two forward, and each product has
# two products backward. Then the question; guesses go to "always". At 2k tokens 8B differs by
# nothing from 6N, at 128k by 5.2 times; the small model already at 2k by half. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("FLOPs a token / 6N", "2k tokens", "8k", "32k", "128k")]
for name in ("smollm2-135m", "llama-3-8b", "llama-3.1-405b"):
    config = dataclasses.replace(PRESETS[name], max_seq_len=131072)
    ratios = [
        training_flops_per_token(config, n) / six_n(config) for n in (2048, 8192, 32768, 131072)
    ]
    rows.append((name, *[f"{r:.2f}" for r in ratios]))
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Model FLOPs utilisation**: those FLOPs, over what the machine could do at best. For this CPU the
# best is a large matrix product.
#
# <!-- notes: Ask what the denominator should be: the data sheet or a measured product? Here it is
# measured, on a CPU. The number changes from machine to machine. Is it a property of the model, the
# program or the machine? Keep that for the discussion. -->

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
a = torch.randn(1024, 1024)
(a @ a).sum()
start = time.perf_counter()
for _ in range(20):
    a @ a
peak = 20 * 2 * 1024**3 / (time.perf_counter() - start)
rate = NUM_STEPS * RUN.tokens_per_step / seconds
mfu = model_flops_utilization(
    tokens_per_second=rate,
    flops_per_token=training_flops_per_token(SHAPE, RUN.seq_len),
    peak_flops_per_second=peak,
)
print(f"one core: {peak / 1e9:.0f} GFLOP/s at best; our training: {100 * mfu:.0f} % of it")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same arithmetic on published runs.
#
# <!-- notes: Take one row and do it aloud: 6 x 405.85e9 x 15.6e12 = 3.8e25. Then ask where two
# thirds of 30.84 million H100 hours went, at 34.6 % of the peak. Waiting, messages, restarts:
# chapters 11 to 15. -->


# %% slideshow={"slide_type": "fragment"}
def mfu_of_hours(parameters, tokens, hours, peak):
    return 100 * 6 * parameters * tokens / (hours * 3600 * peak)


largest = published["llama-3.1-405b"]
palm = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
table(
    ("", "published", "here"),
    ("transformer base, 2017: FLOPs (time x 9.5e12)", "3.3e18", f"{8 * 9.5e12 * 12 * 3600:.1e}"),
    ("transformer big, 2017", "2.3e19", f"{8 * 9.5e12 * 3.5 * 86400:.1e}"),
    ("GPT-3: FLOPs", "3.14e23", f"{6 * gpt3 * 3e11:.2e}"),
    ("PaLM: MFU with attention, %", "46.2", f"{100 * 238.3e3 * palm / (6144 * 275e12):.1f}"),
    ("Llama 3.1 405B: FLOPs, 15.6T tokens", "3.8e25", f"{6 * largest * 15.6e12:.1e}"),
    (
        "Llama 3.1 405B: MFU of 30.84M H100 hours, %",
        "-",
        f"{mfu_of_hours(largest, 15.6e12, 30.84e6, 989.5e12):.1f}",
    ),
    (
        "Llama 2 7B: MFU of 184,320 A100 hours, %",
        "-",
        f"{mfu_of_hours(published['llama-2-7b'], 2e12, 184320, 312e12):.1f}",
    ),
    ("Chinchilla: 6 x 70B x 1.4T FLOPs", "5.76e23", f"{6 * 70e9 * 1.4e12:.2e}"),
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The figures of 2017 are time multiplied by an assumed sustained rate, not counted FLOPs. Two rows
# are derived, not printed by their papers.
#
# <!-- notes: One sentence on honesty: 3.3e18 is not a count, it assumes a sustained rate of 9.5e12.
# So do not set it beside a counted figure. utilization is for home, twenty minutes. End of the
# lecture. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `utilization`** (estimate, 20 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("utilization")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Exercises
#
# Nine, in `exercises/transformer.py`, each checked in its section: `full_context_cache_bytes` (2),
# `merge_step` (3), `decoder_block` (4), `llama_parameters` (5), `next_token_loss` (6), `adamw_step`
# and `optimizer_step` (7), `next_token_probabilities` (9), `utilization` (10). The block and the
# merge are the long ones.
#
# <!-- notes: In the room, in this order: decoder_block 30 minutes, next_token_loss 15,
# llama_parameters 15. In pairs, and block and loss from the docstring alone. The other six are for
# home, 105 minutes; merge_step is a challenge. Use the last quarter for the three questions of the
# plan. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# Write our model to a folder; let transformers read it. Then the other way.
#
# <!-- notes: For home, or one minute: equal bit for bit in both directions, so names, layouts and
# order of operations agree. Ask why torch.equal and not allclose: a tolerance would hide a wrong
# epsilon or a wrong RoPE base for short texts. -->

# %% slideshow={"slide_type": "fragment"}
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    save_pretrained(trained, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        print("logits of transformers' Llama equal ours, bit for bit:",
              torch.equal(theirs(batch).logits, trained(batch)))  # fmt: skip
    theirs.save_pretrained(f"{folder}/theirs")
    back = load_pretrained(f"{folder}/theirs")
    with torch.no_grad():
        print("and read back from their file:", torch.equal(back(batch), trained(batch)))

# %% [markdown] slideshow={"slide_type": "fragment"}
# The tests do the same with SmolLM2's real weights, with each kind of RoPE scaling, in half
# precision, for gradients, and with transformers' own KV cache.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. What breaks in practice
#
# Each of these once cost somebody a day. Here they are refused, with a reason.
#
# <!-- notes: Give the left names only and ask what a program without checks would do with each, and
# which of them would run to the end. An error that says expected, got and remedy costs one line.
# -->

# %% slideshow={"slide_type": "skip"}
cases = {
    "an id from another tokenizer": lambda: trained(torch.tensor([[5, 1024]])),
    "an empty prompt": lambda: trained(torch.zeros(1, 0, dtype=torch.long)),
    "a text beyond the context": lambda: trained(torch.zeros(1, 513, dtype=torch.long)),
    "logits that are NaN": lambda: filter_logits(last * torch.nan),
    "heads that do not divide": lambda: LlamaConfig(
        vocab_size=8, dim=16, hidden_dim=32, num_layers=1, num_heads=3
    ),
}

# %% slideshow={"slide_type": "fragment"}
for name, call in cases.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}:\n   {str(error)[:150]}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** Logits over a tiny temperature overflow, and all probabilities
# are NaN (vllm #1623, #3063). A sum of 128,256 probabilities in float32 is 1 before its end, so
# that `top_p=1` cuts tokens although it means "none". And text has characters that are no UTF-8
# (tiktoken #82), or spells a special token.
#
# <!-- notes: Ask what top_p of 1 should do, then show how many tokens it costs: they are those of
# the tail, which nobody misses until a likelihood is wrong. Temperature 0 means greedy, everywhere.
# The last line is what a chat server must decide: refuse, or read it as text; never as the end. -->

# %% slideshow={"slide_type": "fragment"}
draws = 2 * torch.randn(20, 128_256, generator=torch.Generator().manual_seed(0))
likely_first = draws.softmax(-1).sort(descending=True).values
cut = ((likely_first.cumsum(-1) - likely_first) >= 1.0).any(-1).sum().item()
print(f"top_p=1 by a float32 sum: some of 20 draws lose tokens: {cut > 0};", end=" ")
print("ours cuts none:", torch.equal(filter_logits(draws, top_p=1.0), draws))
wide = draws[:1]
print(
    "temperature 1e-39: NaN by division:",
    bool((wide / 1e-39).softmax(-1).isnan().any()),
    "  ours is greedy:",
    torch.equal(sample(wide, temperature=1e-39), wide.argmax(-1)),
)
half_a_pair = "end \ud83d"
print("half a character:", repr(tokenizer.decode(tokenizer.encode(half_a_pair))))
try:
    tokenizer.encode("Goodbye.<|endoftext|>", disallow_special="all")
except ValueError as error:
    print(str(error)[:62])

# %% [markdown] slideshow={"slide_type": "fragment"}
# What nothing can refuse: a loss without the shift, padding that is counted, a RoPE base or layout
# that is not the checkpoint's (chapter 03), and a tokenizer that is not the model's. All of them
# run, and all of them show in the loss of a page of known text. Measure it after every conversion.
#
# <!-- notes: The list to remember of this page: four mistakes that run. One remedy for all: the
# loss of a page of known text, after every conversion. Ask which of the four raises the loss least.
# And 16 GiB for one text is the bridge to chapter 06. -->

# %% slideshow={"slide_type": "fragment"}
cache = kv_cache_bytes(num_layers=32, num_kv_heads=8, head_dim=128, num_tokens=131072)
print(f"and memory: one text at Llama 3.1 8B's full context caches {cache / 2**30:.0f} GiB")

# %% [markdown] slideshow={"slide_type": "slide"}
# **This went wrong in production.** A new save into an old folder left the index of the old shards
# beside the new weights, and readers followed the one or the other (diffusers #14719, mlx-vlm
# #1464); a key in config.json that a reader did not know was passed over. Two models of one folder:
#
# <!-- notes: Ask which of the two files a reader should believe. Libraries differ, so the folder is
# ambiguous, and the only right answer is to say so. The same with the window: attention that sees
# more than in training runs, and answers. -->

# %% slideshow={"slide_type": "skip"}
small = LlamaConfig(vocab_size=8, dim=16, hidden_dim=32, num_layers=2, num_heads=2)


def load_two_saves(folder):
    save_pretrained(Llama(small), folder, max_shard_bytes=4000)
    index = (Path(folder) / "model.safetensors.index.json").read_text()
    save_pretrained(Llama(small), folder)  # removes it; other tools leave it there
    (Path(folder) / "model.safetensors.index.json").write_text(index)
    load_pretrained(folder)


stale = {
    "two saves in one folder": load_two_saves,
    "a window in config.json": lambda folder: save_pretrained(
        Llama(small), folder, entries={"sliding_window": 4096}
    ),
}

# %% slideshow={"slide_type": "fragment"}
for name, call in stale.items():
    with tempfile.TemporaryDirectory() as folder:
        try:
            call(folder)
        except ValueError as error:
            print(f"{name}:\n   {str(error).replace(folder, 'folder')[:150]}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Summary
#
# - Embedding, $L$ blocks of attention and gated layer on a normalised stream, one norm, one head.
# - Parameters and FLOPs are closed forms; $6N$ a token, plus attention when texts are long.
# - BPE: bytes, merged by frequency. Nothing is unknown.
# - Shift by one, leave padding out, decay the matrices, clip, warm up, cool down.
# - A checkpoint holds weights, moments, step and the order of the data.
#
# **Further reading.** Vaswani et al. 2017 (arXiv 1706.03762); Touvron et al. 2023 (arXiv
# 2302.13971, 2307.09288); Llama team 2024 (arXiv 2407.21783); Kaplan et al. 2020 (arXiv
# 2001.08361); Hoffmann et al. 2022, *Chinchilla* (arXiv 2203.15556).
#
# <!-- notes: Students should be able to put a Llama together from its parts, count parameters and
# FLOPs from a config, say what a checkpoint holds, and where to look first when a loss falls too
# fast. Chapter 06 keeps keys and values, so that writing does not read everything again. -->
