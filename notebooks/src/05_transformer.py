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

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory. The whole notebook takes about two
# > minutes; nearly all of it is the training in section 8 (shrink `NUM_STEPS`).

# %% slideshow={"slide_type": "skip"}
import dataclasses
import math
import tempfile
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from autograder.notebook import check
from figures import style
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


def table(*rows):
    """Print rows as a table; the first row is the head, the first column stands left."""
    texts = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for i, row in enumerate(texts):
        cells = zip(row, widths, strict=True)
        print("  ".join(t.rjust(w) if j else t.ljust(w) for j, (t, w) in enumerate(cells)))
        if i == 0:
            print("  ".join("-" * w for w in widths))


# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. The question
#
# Here is a Llama with 0.9 million parameters, all of them random. It knows a vocabulary of 1,024
# pieces of text and nothing else.

# %% slideshow={"slide_type": "fragment"}
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


PROMPT = "The statement"
before = write(model, PROMPT)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters\n")
print(before.encode("ascii", "replace").decode()[:150])

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Question.** How much text and how many minutes of one CPU core does it take until it writes
# something that looks like a manual of a programming language? Guess. (Section 8.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. From 2017 to Llama
#
# The transformer of 2017 translated: an encoder reads, a decoder writes and looks across. A
# language model needs the decoder alone. What else has changed in six years is small:


# %% slideshow={"slide_type": "fragment"}
def box(ax, x, y, text, colour, width=2.6):
    ax.add_patch(plt.Rectangle((x - width / 2, y), width, 0.72, fc=colour, ec="0.35"))
    ax.text(x, y + 0.36, text, ha="center", va="center", fontsize=11)


figure, ax = plt.subplots(figsize=(11, 5.6))
pale, warm, cool, green = "#F0F0F0", "#F7D9C4", "#CFE3F2", "#CDEBDD"
for x, title, stack in (
    (1.6, "encoder, 2017", ["embedding + sinusoids", "self-attention", "add, LayerNorm",
                            "ReLU layer, 4D", "add, LayerNorm"]),
    (5.0, "decoder, 2017", ["embedding + sinusoids", "masked self-attention", "add, LayerNorm",
                            "cross-attention", "add, LayerNorm", "ReLU layer, 4D",
                            "add, LayerNorm", "head"]),
    (9.0, "Llama", ["embedding", "RMSNorm", "masked GQA with RoPE", "add", "RMSNorm",
                    "SwiGLU, about 8D/3", "add", "RMSNorm, head"]),
):  # fmt: skip
    ax.text(x, 8.25, title, ha="center", fontsize=13, weight="bold")
    for level, text in enumerate(stack):
        colour = cool if "ttention" in text or "GQA" in text else pale
        colour = warm if "Norm" in text else colour
        colour = green if "layer" in text or "GLU" in text else colour
        box(ax, x, level, text, colour)
ax.annotate(
    "", (3.65, 3.36), (2.95, 4.4), arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "0.3"}
)
ax.set(xlim=(0, 10.6), ylim=(-0.2, 8.8))
ax.axis("off")
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The norm moved in front of each sublayer and lost its mean (chapter 01), the ReLU became a gate
# (02), positions turn queries and keys instead of being added (03), key/value heads are shared
# (04). Both are built from the same modules here; `reference/transformer/encoder_decoder.py` is the
# one of 2017.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** "Llama 2 uses grouped queries, Llama 3.1 reads 148k tokens." True?

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

# %% slideshow={"slide_type": "fragment"}
first = [tokenizer.decode([i]) for i in range(257, 275)]
print("the first merges:", first)
print("the last merges: ", [tokenizer.decode([i]) for i in range(1014, 1024)])
sentence = "A generator function returns an iterator. Straße, 東京!"
ids = tokenizer.encode(sentence)
print("\n" + "|".join(tokenizer.decode([i]) for i in ids).replace("\ufffd", "·"))
print("and back:", tokenizer.decode(ids) == sentence)

# %% [markdown] slideshow={"slide_type": "fragment"}
# (A dot is a piece of a letter: 東 has three bytes, and the text that was learned from has no 東.
# Nothing is ever unknown.)
#
# **Question.** A larger vocabulary makes texts shorter. By how much, and where does it end?

# %% slideshow={"slide_type": "fragment"}
part = corpus()[:120_000]
sizes = [257, 300, 400, 600, 1000, 1500, 2200]
lengths = [len(part) / len(Tokenizer.train(part, vocab_size=size).encode(part)) for size in sizes]
figure, ax = plt.subplots()
ax.plot(sizes, lengths, "o-", color=style.COLOURS["blue"])
ax.set(xlabel="vocabulary", ylabel="characters a token", xlim=(200, 2300), ylim=(0, 4.2))
plt.show()
print(", ".join(f"{size}: {length:.2f}" for size, length in zip(sizes, lengths, strict=True)))

# %% [markdown] slideshow={"slide_type": "fragment"}
# Less and less. Each token costs a row of the embedding and of the head; Llama went from 32,000 to
# 128,256 rows when its models had grown large enough to afford them.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `merge_step`** (challenge, 25 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("merge_step")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. The decoder
#
# All of it: look up, $L$ times (norm, attend, add; norm, gate, add), norm, compare with every row
# of the vocabulary.

# %% slideshow={"slide_type": "fragment"}
tokens = torch.tensor([tokenizer.encode("The for statement is used to")])
x = model.embed_tokens(tokens)
print("tokens", tuple(tokens.shape), " embedding", tuple(x.shape))
print("logits", tuple(model(tokens).shape), ": one for each next token, at every position")
print(model.layers[0])

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Question.** Every position predicts. Does position 3 change when a token behind it does?

# %% slideshow={"slide_type": "fragment"}
other = tokens.clone()
other[0, 4] = 300
same = (model(tokens) == model(other)).all(-1)[0]
print("logits equal before and after changing token 4:", same.tolist())

# %% [markdown] slideshow={"slide_type": "fragment"}
# No: the causal mask makes one pass over $T$ tokens $T$ training examples.

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

# %% slideshow={"slide_type": "fragment"}
names = ["smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"]
figure, ax = plt.subplots(figsize=(9, 3.8))
left = [0.0] * len(names)
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
    print(f"{part:12}", dict(zip(names, [round(s) for s in shares], strict=True)))
ax.set(xlabel="share of parameters, %", xlim=(0, 100))
ax.grid(False)
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
plt.show()

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

# %% slideshow={"slide_type": "fragment"}
base = dict(vocab_size=37000, dim=512, hidden_dim=2048, num_layers=6)
experts = LlamaConfig(
    vocab_size=32000, dim=4096, hidden_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8
)
mixtral = mixtral_parameters(experts, num_experts=8, experts_per_token=2)
gpt3 = gpt_parameters(dim=12288, num_layers=96, context=2048)
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

# %% slideshow={"slide_type": "fragment"}
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
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
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
# The learning rate goes up in a line, since Adam's second moment is unreliable in the first steps,
# and down along half a cosine.

# %% slideshow={"slide_type": "fragment"}
steps = range(0, 301)
shape = dict(peak=RUN.peak_lr, warmup_steps=20, total_steps=300, final=RUN.final_lr)
rates = [cosine_with_warmup(s, **shape) for s in steps]
figure, ax = plt.subplots(figsize=(7.5, 3.2))
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
print("before training:\n ", before.encode("ascii", "replace").decode()[:110].replace("\n", " "))
for step, text in written.items():
    print(f"after {step} steps:\n ", text[:260].replace("\n", "\n  "))

# %% [markdown] slideshow={"slide_type": "fragment"}
# First frequent words, then the look of the manual: clauses, code in quotes, cross-references.
# The model of `load_course_model()` is the same after 600 steps, three minutes; later chapters use
# it. (Try 2,400 steps on this short text: where does the orange point go, and why?)

# %% slideshow={"slide_type": "fragment"} tags=["nbval-ignore-output"]
print(write(trained, "The for statement", 70, temperature=0.6))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** The power fails at step 3 of 6. What must the checkpoint hold so that the run
# continues *exactly*, bit for bit?
#
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

# %% slideshow={"slide_type": "subslide"} tags=["nbval-ignore-output"]
for name, options in (
    ("greedy", {"top_k": 1}), ("temperature 1.5", {"temperature": 1.5}),
    ("temperature 0.8, top-p 0.9", {"temperature": 0.8, "top_p": 0.9}),
):  # fmt: skip
    print(f"{name}:\n  {write(trained, 'An exception', 40, **options)!r}\n")

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

# %% slideshow={"slide_type": "fragment"}
rows = [("FLOPs a token / 6N", "2k tokens", "8k", "32k", "128k")]
for name in ("smollm2-135m", "llama-3-8b", "llama-3.1-405b"):
    config = dataclasses.replace(PRESETS[name], max_seq_len=131072)
    ratios = [
        training_flops_per_token(config, n) / six_n(config) for n in (2048, 8192, 32768, 131072)
    ]
    rows.append((name, *[f"{r:.2f}" for r in ratios]))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Model FLOPs utilisation**: those FLOPs, over what the machine could do at best. For this CPU the
# best is a large matrix product.

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
    ("Llama 3.1 405B: MFU of 30.84M H100 hours, %", "-",
     f"{mfu_of_hours(largest, 15.6e12, 30.84e6, 989.5e12):.1f}"),
    ("Llama 2 7B: MFU of 184,320 A100 hours, %", "-",
     f"{mfu_of_hours(published['llama-2-7b'], 2e12, 184320, 312e12):.1f}"),
    ("Chinchilla: 6 x 70B x 1.4T FLOPs", "5.76e23", f"{6 * 70e9 * 1.4e12:.2e}"),
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The figures of 2017 are time multiplied by an assumed sustained rate, not counted FLOPs. Two rows
# are derived, not printed by their papers.

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

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# Write our model to a folder; let transformers read it. Then the other way.

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

# %% slideshow={"slide_type": "fragment"}
cases = {
    "an id from another tokenizer": lambda: trained(torch.tensor([[5, 1024]])),
    "an empty prompt": lambda: trained(torch.zeros(1, 0, dtype=torch.long)),
    "a text beyond the context": lambda: trained(torch.zeros(1, 513, dtype=torch.long)),
    "a temperature of 0": lambda: filter_logits(last, temperature=0.0),
    "heads that do not divide": lambda: LlamaConfig(
        vocab_size=8, dim=16, hidden_dim=32, num_layers=1, num_heads=3
    ),
}
for name, call in cases.items():
    try:
        call()
    except ValueError as error:
        print(f"{name}:\n   {str(error)[:150]}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# What nothing can refuse: a loss without the shift, padding that is counted, a RoPE base or layout
# that is not the checkpoint's (chapter 03), and a tokenizer that is not the model's. All of them
# run, and all of them show in the loss of a page of known text. Measure it after every conversion.

# %% slideshow={"slide_type": "fragment"}
cache = kv_cache_bytes(num_layers=32, num_kv_heads=8, head_dim=128, num_tokens=131072)
print(f"and memory: one text at Llama 3.1 8B's full context caches {cache / 2**30:.0f} GiB")

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
