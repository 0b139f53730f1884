# %% [markdown] slideshow={"slide_type": "slide"}
# # 10 Mixed precision
#
# A 16-bit number takes half the memory of a 32-bit one, half the traffic, and a sixteenth of the
# time on a tensor core (A100: 312 TFLOP/s in float16, 19.5 in float32). Cast everything down, then?
#
# In this chapter you take the formats apart bit by bit, watch a training run die in float16 and
# save it with the recipe that made 16-bit training work, build the loss scaler and prove it equal
# to PyTorch's, and see why bfloat16 made half of the recipe unnecessary.
#
# You need: chapter 05 helps but is not needed; what backward() does.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 5, from the formats to the recipe, and 35 for 6 to
# 11. Sections 12 to 14 go to the laboratory. Ask who trains in bfloat16 and has never set a loss
# scale; section 5 says what that saves them and what it does not. Sixteen is the ratio of 312 to
# 19.5: have somebody check it. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 2 GB of memory are enough. The slow cells: one training
# > step of SmolLM2-135M on 96 tokens (section 4; fetched once by `make model`), and some short
# > runs of a small network in float16, which CPUs compute slowly (sections 1, 5 and 6; shrink
# > `NUM_STEPS`).

# %% slideshow={"slide_type": "skip"}
import copy
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import reference.mixed_precision as mp
from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.pretrained import capture, corpus, load_smollm2, passage

torch.set_num_threads(1)
style.use()
COLOUR = {
    "float32": style.COLOURS["black"],
    "tf32": style.COLOURS["sky"],
    "float16": style.COLOURS["vermilion"],
    "bfloat16": style.COLOURS["blue"],
    "float8_e5m2": style.COLOURS["green"],
    "float8_e4m3fn": style.COLOURS["purple"],
}

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Cast everything down?
#
# **Question.** Here is a small network that predicts the next character from the last eight. Cast
# it to float16 with `.half()`, give it to Adam, train. What can go wrong?
#
# <!-- notes: collect guesses: overflow of activations? gradients too small? The run dies for a
# third reason, in the first step: 4.6, NaN, NaN. Keep the guesses on the board, sections 3 and 4
# come back to them. Before the last cell ask what 1e-8 is in float16; the answer is 0.0, and in
# bfloat16 it is still there. Six minutes. -->


# %% slideshow={"slide_type": "skip"}
text = corpus()[:100_000]
alphabet = sorted(set(text))
characters = torch.tensor([alphabet.index(c) for c in text])
CONTEXT, NUM_STEPS = 8, 150


class NextCharacter(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), 16)
        self.hidden = nn.Linear(16 * CONTEXT, width)
        self.out = nn.Linear(width, len(alphabet))

    def forward(self, tokens):
        return self.out(F.relu(self.hidden(self.embed(tokens).flatten(1))))


def batches(num_steps=NUM_STEPS, size=128):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        starts = torch.randint(len(characters) - CONTEXT, (size,), generator=generator)
        windows = characters[starts[:, None] + torch.arange(CONTEXT + 1)]
        yield windows[:, :-1], windows[:, -1]


def new_model(dtype=torch.float32):
    torch.manual_seed(0)
    return NextCharacter().to(dtype)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def train_naively(dtype):
    """Weights, gradients and Adam's moments all in one dtype."""
    model = new_model(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, foreach=False)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def smooth(losses, window=10):
    return torch.tensor(losses).unfold(0, window, 1).mean(1)


# %% slideshow={"slide_type": "fragment"}
curves = {}
for dtype in (torch.float32, torch.float16):
    name = str(dtype).removeprefix("torch.")
    curves[name], trained = train_naively(dtype)
    print(f"{name:8} first losses {[round(v, 2) for v in curves[name][:3]]}")
bad = {n for n, p in trained.named_parameters() if not p.isfinite().all()}
print(f"float16: not finite after training: {len(bad)} of 5 parameter tensors")
figure, ax = plt.subplots()
ax.plot(smooth(curves["float32"]), color=COLOUR["float32"], label="float32")
ax.plot([0], curves["float16"][:1], "x", ms=14, mew=4, color=COLOUR["float16"])
ax.annotate(
    "float16: NaN from step 1 on", (0, curves["float16"][0]), (12, -4), textcoords="offset points",
    color=COLOUR["float16"],
)  # fmt: skip
ax.set(xlabel="step", ylabel="loss, nats a character", xlim=(-3, NUM_STEPS))
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# It dies in its first step, and not from a large number: from a small one. Adam divides by
# $\sqrt{v} + \varepsilon$ with $\varepsilon = 10^{-8}$. What is $10^{-8}$ in float16?

# %% slideshow={"slide_type": "fragment"}
eps = torch.tensor(1e-8)
print(f"1e-8 in float16: {eps.half().item()}    in bfloat16: {eps.bfloat16().item():.2e}")
print(
    "a character that the batch does not contain: gradient 0, so 0 / (sqrt(0) + 0) =", 0 * torch.inf
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. What a format can say
#
# A float has three fields: a sign, an exponent field $E$ and a mantissa field $M$ of $m$ bits.
#
# $$E>0:\; (-1)^s\, 2^{E-\text{bias}} \Big(1+\frac{M}{2^m}\Big)
# \qquad E=0:\; (-1)^s\, 2^{1-\text{bias}}\, \frac{M}{2^m}$$
#
# Exponent bits buy *range*, mantissa bits buy *precision*. 16 bits can be spent on either.
#
# <!-- notes: Write one third in binary with the room, 1.0101... times 2^-2, and cut it after ten
# and after seven digits. In the table compare two cells only: 65,504 and 3.39e+38. Then the shape
# of the spacing: most draw a straight line or a constant, it is a staircase with a flat first step.
# At 1,000 bfloat16 moves in steps of 4. Nine minutes; `float_limits`, `to_bfloat16` in the
# laboratory. -->

# %% slideshow={"slide_type": "fragment"}
print("one third, sign exponent mantissa:")
for fmt in mp.FORMATS.values():
    value = mp.round_to(torch.tensor(1 / 3), fmt)
    print(f"  {fmt.name:14} {mp.bit_string(1 / 3, fmt):36} {value:.8f}")
print("\n2^-24 in float16, its smallest value:", mp.bit_string(2.0**-24, mp.FLOAT16))
print("infinity in float16:                 ", mp.bit_string(float("inf"), mp.FLOAT16))

# %% slideshow={"slide_type": "skip"}
landmarks = [
    (
        f.name,
        f.bits,
        f"{f.max:.4g}",
        f"{f.min_normal:.3g}",
        f"{f.min_subnormal:.3g}",
        f"{f.eps:.3g}",
    )
    for f in mp.FORMATS.values()
]

# %% slideshow={"slide_type": "subslide"}
table(("format", "bits", "largest", "smallest normal", "smallest", "eps"), *landmarks)

# %% [markdown] slideshow={"slide_type": "skip"}
# float8 e4m3 breaks the rule of IEEE formats on purpose: it has no infinity. The codes that would
# be infinities are numbers, up to 448, and only one mantissa is NaN.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** How far apart are neighbouring values? Guess the shape of the curve of spacing
# over size, before you look.

# %% slideshow={"slide_type": "fragment"}
figure, ax = plt.subplots(figsize=(11, 3))
for name, at in (
    ("float32", (1e-9, 1e-14)),
    ("bfloat16", (4e-10, 1e-9)),
    ("float16", (3e-9, 1.5e-7)),
    ("float8_e4m3fn", (3e-6, 2e-2)),
):
    fmt = mp.FORMATS[name]
    x = torch.logspace(-10, 8, 4000, dtype=torch.float64)
    x = x[(x >= fmt.min_subnormal) & (x <= fmt.max)]
    ax.loglog(x, mp.spacing(x, fmt), color=COLOUR[name])
    ax.text(*at, name, color=COLOUR[name])
ax.set(xlabel="size of the number", ylabel="distance to the next", xlim=(1e-10, 1e8))
plt.show()
at_1000 = [mp.spacing(torch.tensor(1000.0), f).item() for f in (mp.BFLOAT16, mp.FLOAT16)]
print("spacing at 1000: bfloat16 {}, float16 {}".format(*at_1000))

# %% [markdown] slideshow={"slide_type": "fragment"}
# Steps: the spacing doubles with each power of two, so the *relative* precision is the same
# everywhere. The flat piece at the left end is the subnormals. float16 is eight times finer than
# bfloat16, over 12 decades instead of 78.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `float_limits`** (derive, 10 minutes, difficulty 1 of 3). From the two widths to the
# four landmarks.

# %% slideshow={"slide_type": "skip"}
check("float_limits")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `to_bfloat16`** (build, 15 minutes, difficulty 2 of 3). A cast with integers alone.

# %% slideshow={"slide_type": "skip"}
check("to_bfloat16")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Sums stall
#
# **Question.** Add 1 to itself 5,000 times in float16. What comes out?
#
# <!-- notes: Bets: 5,000, infinity, 65,504 are the usual ones. It is 2,048, and 256 in bfloat16,
# which many take for the safe format. Do 2,048 + 1 on the board: the neighbours are 2,048 and
# 2,050, a tie, and even wins. Then ask what in a network is a long sum. The second page answers:
# over 16,384 terms an error of 9e-3, or 1e-6 in float32. Seven minutes. -->

# %% slideshow={"slide_type": "fragment"}
ones = torch.ones(5000)
figure, ax = plt.subplots(figsize=(11, 3.1))
for name, dtype in (
    ("float32", torch.float32),
    ("float16", torch.float16),
    ("bfloat16", torch.bfloat16),
):
    at = list(range(0, 5001, 250))
    totals = [mp.running_sum(ones[:n], dtype=dtype).item() for n in at]
    ax.plot(at, totals, color=COLOUR[name], label=f"{name}: {totals[-1]:.0f}")
ax.set(xlabel="ones added", ylabel="running sum", xlim=(0, 5000))
style.label_lines(ax)
plt.show()
print("float16, keeping what is rounded off:", mp.compensated_sum(ones, dtype=torch.float16).item())

# %% [markdown] slideshow={"slide_type": "fragment"}
# At $2^{m+1}$ the spacing is 2: the sum lies half way to the next value, the tie goes to even, and
# nothing moves any more. A matrix product is a long sum. Tensor cores therefore multiply 16-bit
# numbers and *accumulate in float32* (Micikevicius et al., arXiv 1710.03740, sec. 3.3).

# %% slideshow={"slide_type": "subslide"}
generator = torch.Generator().manual_seed(0)
lengths = [2**k for k in range(5, 15)]
errors = {torch.float32: [], torch.float16: []}
for length in lengths:
    a = torch.rand(8, length, generator=generator).half()
    b = torch.rand(length, 8, generator=generator).half()
    exact = a.double() @ b.double()
    for accumulate in errors:
        product = mp.matmul_accumulating(a, b, accumulate=accumulate)
        errors[accumulate].append(((product - exact).abs() / exact).max().item())
figure, ax = plt.subplots()
for accumulate, name in ((torch.float32, "float32"), (torch.float16, "float16")):
    ax.loglog(lengths, errors[accumulate], "o-", color=COLOUR[name], label=f"in {name}")
ax.axhline(2**-11, color="0.5", lw=1, ls="--")
ax.text(lengths[4], 2**-11 / 2, "one rounding to float16", color="0.4")
ax.set(
    xlabel="terms in the sum", ylabel="largest relative error", title="float16 factors, accumulated"
)
style.label_lines(ax)
plt.show()
print("16384 terms:", {str(d)[6:]: f"{e[-1]:.0e}" for d, e in errors.items()})
assert errors[torch.float16][-1] > 1000 * errors[torch.float32][-1]

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Where gradients lie
#
# **Question.** Weights and activations are near 1. How small are the gradients of a real model:
# which share of them does float16 round to zero? The histogram is of one training step of
# SmolLM2-135M on a page of *Alice*, computed in float32.
#
# <!-- notes: Ask for an exponent of two, then for a share. The point of the figure is the empty
# green half on the right: the range is there, at the wrong end. Of the embedding's gradients 41 %
# are lost at scale 1 and none at 65,536; the matrices lose none, but 29 % are subnormal. Leave the
# paper's 5 % beside our 34 %: other networks, other gradients. Eight minutes; `lost_fraction` in
# the laboratory. -->

# %% slideshow={"slide_type": "skip"}
smollm2, tokenizer = load_smollm2()
tokens = tokenizer(passage(), return_tensors="pt").input_ids[:, :96]
layers = [
    layer.get_parameter(f"{name}.weight").requires_grad_()
    for layer in smollm2.model.layers[::5]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]
embedding = smollm2.model.embed_tokens.weight.requires_grad_()
loss = smollm2(tokens, labels=tokens).loss
*of_layers, of_embedding = torch.autograd.grad(loss, [*layers, embedding])
gradients = {
    "24 matrices of 6 layers": mp.widened(of_layers),
    "embedding and output layer": mp.widened([of_embedding]),
}
smollm2.requires_grad_(False)
for name, values in gradients.items():
    print(f"{name}: {len(values) / 1e6:.1f} million gradients")
print(f"loss {loss.item():.2f}")

# %% slideshow={"slide_type": "fragment"}
exponents = {n: torch.frexp(g[g != 0]).exponent - 1 for n, g in gradients.items()}
figure, ax = plt.subplots(figsize=(10.5, 3.9))
for (name, e), colour in zip(exponents.items(), ("blue", "vermilion"), strict=True):
    counts = torch.bincount(e + 60, minlength=80)[:80] / len(e)
    ax.step(range(-60, 20), 100 * counts, where="mid", color=style.COLOURS[colour])
    peak = int(counts.argmax()) - 60
    at = (peak + 4, "left") if colour == "blue" else (peak - 5, "right")
    ax.text(at[0], 85 * counts.max(), name.replace(" and ", "\nand "), ha=at[1],
            color=style.COLOURS[colour])  # fmt: skip
for left, right, colour, label in (
    (-45, -25, "vermilion", "become 0"),
    (-25, -14, "orange", "subnormal"),
    (-14, 16, "green", "float16's normal range"),
):
    ax.axvspan(left - 0.5, right - 0.5, color=style.COLOURS[colour], alpha=0.1, lw=0)
    ax.text((left + right) / 2 - 0.5, 24.5, label, ha="center", color="0.25")
ax.set(xlabel="exponent of the gradient, base 2", ylabel="share of gradients, %")
ax.set(xlim=(-45, 15), ylim=(0, 27))
plt.show()
shares = [("lost / subnormal / overflowed in %, scale", "1", "8", "1024", "65536")]
for name, values in gradients.items():
    parts = [mp.coverage(values[::7], mp.FLOAT16, scale=s) for s in (1.0, 8.0, 2.0**10, 2.0**16)]
    shares.append((name, *(f"{100 * p.lost:.0f} / {100 * p.subnormal:.0f} / "
                           f"{100 * p.overflowed:.0f}" for p in parts)))  # fmt: skip
table(*shares)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The gradients sit at the lower edge of the range, and its upper half is empty. Worst off is the
# embedding: it is the output layer too, and most of the 49,152 words get a probability near zero,
# which is their gradient. The paper found about 5 % of weight gradients with exponents below $-24$
# in its networks (arXiv 1710.03740, sec. 3.1). So *move* them: multiply by a power of two, which
# costs no digit.

# %% slideshow={"slide_type": "fragment"}
every = torch.cat(list(exponents.values()))
share = (every < -24).double().mean().item()
print(f"exponent below -24: paper about 5 %; these weights of SmolLM2 {100 * share:.0f} %")
for name, values in gradients.items():
    lost = mp.coverage(values[::7], mp.BFLOAT16).lost
    print(f"bfloat16 without a scale, {name}: lost {100 * lost:.0f} %")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `lost_fraction`** (estimate, 10 minutes, difficulty 1 of 3). Predict what a cast
# loses, without casting.

# %% slideshow={"slide_type": "skip"}
check("lost_fraction")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. The recipe
#
# Gradients of $S\cdot L$ are $S$ times those of $L$: multiply the *loss*, one number, and every
# gradient of the network is lifted, activations' gradients included. The whole recipe:
#
# 1. keep **master weights** in float32; round them to float16 for each step
# 2. forward and backward in float16
# 3. the loss itself in float32
# 4. times the **loss scale** $S$
# 5. copy gradients to float32, **unscale** them there
# 6. if one is inf or NaN, **skip** the step
# 7. clip, and update the float32 weights
#
# <!-- notes: ask which of the seven bfloat16 makes unnecessary: 4, 5's division, 6. Not 1. The run
# ends at 2.53 beside 2.50. For the width of the window most say a few powers of two; the plateau
# goes from 2^-8 to 2^16. The last page is the one to remember: a weight of 1.000 after 10,000
# updates, in bfloat16 too. Ten minutes; `train_in_float16`, a repair, is for home. -->


# %% slideshow={"slide_type": "subslide"}
def train(scaler, num_steps=NUM_STEPS, make_optimizer=torch.optim.Adam, **options):
    model = new_model(torch.float16)
    master = mp.MasterWeights(model)
    optimizer = make_optimizer(master.parameters, lr=3e-3)
    return [
        mp.mixed_precision_step(
            lambda batch=batch: loss_of(model, batch), master, optimizer, scaler, **options
        )
        for batch in batches(num_steps)
    ]


reports = train(mp.LossScaler(init_scale=2.0**24))
figure, ax = plt.subplots(figsize=(10.5, 3.4))
ax.plot(smooth(curves["float32"]), color=COLOUR["float32"], lw=5, alpha=0.35)
ax.plot(smooth([r.loss for r in reports]), color=COLOUR["float16"])
ax.text(60, 3.35, "float32 (grey) and float16 by the recipe", color="0.3")
ax.set(xlabel="step", ylabel="loss, nats a character", xlim=(0, NUM_STEPS))
plt.show()
last = [sum(values[-20:]) / 20 for values in (curves["float32"], [r.loss for r in reports])]
print(f"mean of the last 20 losses: float32 {last[0]:.2f}, recipe {last[1]:.2f}")
assert abs(last[0] - last[1]) < 0.05

# %% [markdown] slideshow={"slide_type": "fragment"}
# (The first steps were skipped while the scale, begun far too high, came down: section 6.)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Question.** Which scales work? A scale too small leaves gradients lost, one too large makes
# them overflow. How wide is the window between? Each point is a run with a *static* scale.

# %% slideshow={"slide_type": "subslide"}
powers = list(range(-16, 25, 4))
results = []
for power in powers:
    runs = train(mp.LossScaler(init_scale=2.0**power, rule=mp.ScaleRule.static()), 60)
    skipped = sum(not r.has_stepped for r in runs)
    results.append((sum(r.loss for r in runs[-10:]) / 10, skipped))
figure, ax = plt.subplots(figsize=(10.5, 3.3))
ax.plot(powers, [loss for loss, _ in results], "o-", color=COLOUR["float16"])
ax.text(18, 4.55, "overflows at every step", ha="right")
ax.set(xlabel="loss scale, power of two", ylabel="loss after 60 steps", ylim=(2, 5))
plt.show()
print("scale   ", *(f"{f'2^{power}':>5}" for power in powers))
print("loss    ", *(f"{loss:5.1f}" for loss, _ in results))
print("skipped ", *(f"{skipped:5d}" for _, skipped in results))

# %% [markdown] slideshow={"slide_type": "fragment"}
# A plateau many powers of two wide, and a wall on its right. This small network would train at
# $S = 1$ as well: how much scale a model needs depends on its gradients. A static scale has to be
# found by trying; the next section lets it find itself.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Are the master weights needed, if the learning rate is small? One weight of 1.0,
# ten thousand updates of $-10^{-4}$:

# %% slideshow={"slide_type": "fragment"}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    weight = torch.ones((), dtype=dtype)
    for _ in range(10_000):
        weight = weight - 1e-4
    print(f"{str(dtype)[6:]:8} weight after 10,000 updates: {weight.item():.3f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# A *small* learning rate is what makes them needed: half a spacing below 1 is $2^{-12}$ in float16
# and $2^{-9}$ in bfloat16, and every update below it is lost. bfloat16 saves the scale, not the
# master weights.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. The scale finds its own size
#
# Start high. After an overflow: skip the step, halve the scale. After 2,000 steps in a row
# without one: double it. The run above began at $2^{24}$:
#
# <!-- notes: Let a student play the scaler for ten calls, "fine" or "overflow", and say the scale
# aloud. Both runs come down from 2^24 to 2^18 in six skipped steps; with an interval of 15 the
# scale then probes upwards and pays six more. Ask what a skipped step may change: not weights, not
# moments, not the schedule. That is the detail of `scale_trajectory`. Six minutes. -->

# %% slideshow={"slide_type": "fragment"}
eager = train(mp.LossScaler(init_scale=2.0**24, rule=mp.ScaleRule(growth_interval=15)))
figure, ax = plt.subplots(figsize=(11, 2.8))
for runs, colour, label in ((reports, style.COLOURS["blue"], "interval 2000"),
                            (eager, style.COLOURS["green"], "interval 15")):  # fmt: skip
    ax.step(range(NUM_STEPS), [r.scale for r in runs], where="post", color=colour, label=label)
    skipped = [i for i, r in enumerate(runs) if not r.has_stepped]
    ax.plot(skipped, [runs[i].scale for i in skipped], "x", ms=9, mew=2.5, color="black")
    print(f"{label}: skipped {len(skipped)} steps, ends at 2^{math.log2(runs[-1].scale):.0f}")
ax.set_yscale("log", base=2)
ax.set(
    xlabel="step", ylabel="loss scale", title="crosses: overflowed and skipped", xlim=(0, NUM_STEPS)
)
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Overflow here is not a failure but the probe: the scale rides just under it. A skipped step is
# no step: weights, moments and the learning-rate schedule stay as they are.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `scale_trajectory`** (build, 10 minutes, difficulty 1 of 3). The rule itself.

# %% slideshow={"slide_type": "skip"}
check("scale_trajectory")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Unscale, then clip
#
# **Question.** Clipping to norm 1 and dividing by $S$: does the order matter? With $S = 65536$,
# what is the length of the step that the wrong order takes?
#
# <!-- notes: They compute it: a norm clipped to 1, divided by 65,536, is 1.5e-05. Ask then who
# notices. With SGD everybody, with Adam nobody: it divides by the gradient's own size. That is the
# week's best argument for testing values and not curves. The last page: scales 2^6 and 2^14 give
# the same losses. Six minutes; `unscale_and_clip` in the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
scale, max_norm = 65536.0, 1.0
gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1
right = gradient * scale / scale
right = right * min(1, max_norm / right.norm().item())
wrong = gradient * scale
wrong = wrong * min(1, max_norm / wrong.norm().item()) / scale
print(
    f"true norm {gradient.norm():.2f}; unscale, clip: {right.norm():.2f};",
    f"clip, unscale: {wrong.norm():.1e}",
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# With SGD, training crawls. With Adam it does not even show: Adam divides by the gradient's own
# size, so the wrong order trains almost as well, with its clipping silently replaced by
# normalisation, until $\varepsilon$ is no longer small beside $10^{-5}$. That is why the mistake
# lives long.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Nor is the scale a learning rate: taken off correctly, it leaves no trace.

# %% slideshow={"slide_type": "fragment"}
traces = []
for power in (6, 14):
    scaler = mp.LossScaler(init_scale=2.0**power, rule=mp.ScaleRule.static())
    traces.append([r.loss for r in train(scaler, 30, torch.optim.SGD, max_norm=1.0)])
difference = max(abs(a - b) for a, b in zip(*traces, strict=True))
print(f"SGD at scale 2^6 and 2^14: losses differ by at most {difference:.3f}")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `unscale_and_clip`** (build, 10 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("unscale_and_clip")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `train_in_float16`** (repair, 20 minutes, difficulty 2 of 3). A training loop that
# somebody wrote. It runs, its losses fall.

# %% slideshow={"slide_type": "skip"}
check("train_in_float16")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. What it costs and saves
#
# **Question.** Half the bits: does training need half the memory?
#
# <!-- notes: Have the two rows filled in on the board, four columns each, before the table. Nearly
# everybody forgets the master copy and arrives at 12. It is 16 and 16. Then ask what is halved
# after all: activations, and what travels. 7.5 billion times 16 are the 120 GB with which chapter
# 12 begins. Four minutes. -->

# %% slideshow={"slide_type": "skip"}
rows = [("bytes a parameter", "weight", "gradient", "master", "moments", "sum")]
for name, weight, gradient_bytes, has_master in (("float32", 4, 4, False), ("mixed", 2, 2, True)):
    total = mp.training_state_bytes(
        weight_bits=8 * weight, gradient_bits=8 * gradient_bytes, has_master=has_master
    )
    rows.append((name, weight, gradient_bytes, 4 * has_master, 8, total))

# %% slideshow={"slide_type": "fragment"}
table(*rows)
print(
    f"\n7.5 billion parameters, mixed: {7.5 * rows[2][-1]:.0f} GB",
    "(ZeRO, arXiv 1910.02054: 120 GB)",
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Sixteen bytes either way. What is halved are activations, and traffic: of weights and
# activations through the memory of one device, of gradients between devices. Chapter 12 shards
# the sixteen bytes.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `training_memory`** (estimate, 5 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("training_memory")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Rounding by lot
#
# **Question.** Can a 16-bit weight learn without a 32-bit master? Rounding to nearest drops each
# small update. What if $x$ between two neighbours went up with probability equal to its distance
# from the lower one?
#
# <!-- notes: Do one update on the board: 2^-12 is a thirty-second of the bfloat16 step 2^-7 above
# 1, so one lot in 32 goes up, by 32 times too much, and the mean is right. In the figure the green
# walk is off the line, but it goes along; the mean of 20 walks is 1.50, exact is 1.488. Nearest
# stays at 1.000. Five minutes; `stochastic_round` at home. -->

# %% slideshow={"slide_type": "fragment"}
steps, update = 2000, 2.0**-12
exact = 1.0 + update * torch.arange(steps + 1)
walks = {"nearest": [1.0], "by lot": [1.0]}
generator = torch.Generator().manual_seed(0)
lots = torch.ones(20, dtype=torch.float64)
for _ in range(steps):
    nearest = torch.tensor(walks["nearest"][-1] + update, dtype=torch.float64)
    walks["nearest"].append(mp.round_to(nearest, mp.BFLOAT16).item())
    lots = mp.round_stochastically(lots + update, mp.BFLOAT16, generator=generator)
    walks["by lot"].append(lots[0].item())
figure, ax = plt.subplots()
ax.plot(exact, color=COLOUR["float32"], label="float32")
ax.plot(walks["nearest"], color=COLOUR["bfloat16"], label="nearest")
ax.plot(walks["by lot"], color=style.COLOURS["green"], lw=1.2, label="by lot")
ax.set(xlabel="updates of $2^{-12}$", ylabel="weight", title="a bfloat16 weight", xlim=(0, steps))
style.label_lines(ax)
plt.show()
print(f"exact {exact[-1]:.3f}   nearest {walks['nearest'][-1]:.3f}   "
      f"by lot, mean of 20: {lots.mean():.2f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Right on average (Gupta et al. 2015, arXiv 1502.02551), at the price of noise, which the noise
# of minibatches usually drowns. Some accelerators round so in hardware.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `stochastic_round`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("stochastic_round")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Eight bits
#
# e4m3 has 126 positive values, e5m2 123. **Question.** With three mantissa bits, how wrong is a
# matrix product? And does it help to give each row a scale of its own? Real input: what the
# `down_proj` of SmolLM2's layers is given, outliers and all.
#
# <!-- notes: Three mantissa bits: ask for the largest relative error of one rounding, 1/16. So
# guesses for a product go up to 10 %; it is 3 %. Two mantissa bits double it, 6.2 %. The second bet
# fails for most: a scale for each row brings 3.3 to 3.1. Recall the 12 % that one outlier cost int8
# in chapter 09, and ask what a float has that an integer has not. Five minutes; `fp8_linear` is the
# challenge. -->

# %% slideshow={"slide_type": "skip"}
with torch.no_grad():
    watched = [f"model.layers.{i}.mlp.down_proj" for i in range(30)]
    down_inputs = [a.input[0] for a in capture(smollm2, tokens, watched).values()]
down_weights = [layer.mlp.down_proj.weight.detach() for layer in smollm2.model.layers]


def fp8_product(x, weight, fmt, dim):
    """x @ weight.T, both rounded to fmt with one scale for each row, or one in all (dim=None)."""
    values = []
    for matrix in (x, weight):
        peak = matrix.abs().amax(dim, keepdim=True) if dim else matrix.abs().max()
        factor = fmt.max / peak
        values.append(mp.round_to(matrix * factor, fmt).float() / factor)
    return values[0] @ values[1].T


# %% slideshow={"slide_type": "fragment"}
figure, ax = plt.subplots(figsize=(10.5, 3.3))
for fmt, dim, label, colour in (
    (mp.E5M2, 1, "e5m2, rows", style.COLOURS["green"]),
    (mp.E4M3, None, "e4m3, one scale", style.COLOURS["sky"]),
    (mp.E4M3, 1, "e4m3, rows", style.COLOURS["purple"]),
):
    relative = []
    for x, weight in zip(down_inputs[::3], down_weights[::3], strict=True):
        exact = x @ weight.T
        relative.append(((fp8_product(x, weight, fmt, dim) - exact).norm() / exact.norm()).item())
    ax.plot(range(0, 30, 3), [100 * r for r in relative], "o-", color=colour, label=label)
    print(f"{label:16} mean relative error {100 * sum(relative) / len(relative):.1f} %")
ax.set(xlabel="layer of SmolLM2", ylabel="error of the product, %", ylim=(0, None))
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# With scales at hand, mantissa bits are worth more than exponent bits: e4m3 for weights and
# activations, e5m2 for gradients, whose range is wide (Micikevicius et al. 2022, arXiv
# 2209.05433). The scale here plays the part of the loss scale, tensor by tensor.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `fp8_linear`** (challenge, 20 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("fp8_linear")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Autocast
#
# Which operation deserves which precision? `torch.autocast` answers with three lists. Ours is a
# hundred lines of Python (`reference/mixed_precision/autocast.py`). **Question.** Predict the dtype
# of each line before you run it.
#
# <!-- notes: Read the six lines aloud and take hands for each: 16 or 32? The two that go wrong are
# relu, which is on no list and takes what comes, and product + x, where the float32 operand wins.
# Ask why softmax goes up, and think of section 3: it is a sum. The last page: 1 % of a logit's
# spread, the same loss of 3.63. Seven minutes, end of the lecture. -->

# %% slideshow={"slide_type": "fragment"}
x, weight = torch.randn(4, 8), nn.Parameter(torch.randn(8, 8))
with mp.Autocast(torch.bfloat16, policy=mp.CUDA):
    product = x @ weight
    for name, value in (
        ("x @ weight", product),
        ("relu(product)", F.relu(product)),
        ("softmax(product)", product.softmax(-1)),
        ("layer_norm(product)", F.layer_norm(product, (8,))),
        ("product + x", product + x),
        ("cross_entropy(product, ...)", F.cross_entropy(product, torch.arange(4))),
    ):
        print(f"{name:28} {value.dtype}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Matrix products go down; exponentials, norms and losses go up; the rest takes what comes. The
# weights stay float32, and since a cast is an operation of autograd, so are their gradients:
# autocast has master weights without copying them.

# %% slideshow={"slide_type": "fragment"}
short = tokens[:, :48]
with torch.no_grad():
    exact = smollm2(short, labels=short)
    with mp.Autocast(torch.bfloat16, policy=mp.CUDA):
        cast = smollm2(short, labels=short)
change = (cast.logits.float() - exact.logits).abs().mean() / exact.logits.std()
print(f"SmolLM2, loss: float32 {exact.loss:.2f}, autocast to bfloat16 {cast.loss:.2f}")
print(f"mean change of a logit: {100 * change:.0f} % of their standard deviation")
assert abs(cast.loss - exact.loss) < 0.1

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# The same gradients, overflows now and then, in PyTorch's `GradScaler` and in ours; and the same
# block under both autocasts.
#
# <!-- notes: Two minutes in the laboratory. Read the list of scales with the rule in hand: growth
# after three good steps, here 65,536 to 131,072 at the third, and a fall at the sixth, where the
# cell puts an infinity into a gradient. Everything is equal bit for bit; whoever's own scaler
# differs compares this list first. -->

# %% slideshow={"slide_type": "fragment"}
theirs, ours = (
    torch.amp.GradScaler("cpu", growth_interval=3),
    mp.LossScaler(rule=mp.ScaleRule(growth_interval=3)),
)
trajectories, weights = [], []
for scaler in (theirs, ours):
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    scales = []
    for step, batch in enumerate(batches(40)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if step % 7 == 5:
            model.out.bias.grad[0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale() if scaler is theirs else scaler.state.scale)
    trajectories.append(scales)
    weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
print("same scales at all 40 steps:", trajectories[0] == trajectories[1])
print("same weights, bit for bit:  ", torch.equal(*weights))
print("scales:", [int(s) for s in trajectories[1][:12]])

# %% slideshow={"slide_type": "skip"}
block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
twin = copy.deepcopy(block)
x = torch.randn(10, 64)
with torch.autocast("cpu", torch.bfloat16):
    expected = twin(x)
with mp.Autocast(torch.bfloat16, policy=mp.CPU):
    got = block(x)
expected.float().square().mean().backward()
got.float().square().mean().backward()
equal = [
    torch.equal(a.grad, b.grad) for a, b in zip(block.parameters(), twin.parameters(), strict=True)
]
codes = torch.arange(2**16)
every = codes.to(torch.int32).to(torch.int16).view(torch.float16).double()

# %% slideshow={"slide_type": "fragment"}
print(
    "outputs equal to torch.autocast, bit for bit:",
    torch.equal(got, expected),
    "  gradients:",
    all(equal),
)
print("all 65536 values of float16 decoded as torch has them:",
      torch.equal(mp.decode(codes, mp.FLOAT16).nan_to_num(7), every.nan_to_num(7)))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Published figures, recomputed
#
# <!-- notes: Three minutes, or home. Go to the one row that does not agree: about 5 % and 34 %. It
# is not an error of either; the networks differ, and ours counts an embedding of 28.3 million
# gradients. Then the 31 % that everybody quotes: ask who has seen that histogram, and where it is
# from. Citations travel without their source. -->

# %% slideshow={"slide_type": "skip"}
spread = 2.0 ** (-40 + 30 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
zeros = [100 * mp.coverage(spread, mp.FLOAT16, scale=s).lost for s in (1.0, 8.0, 32768.0)]
scaler = torch.amp.GradScaler("cpu")
assert scaler.get_growth_interval() == 2000
published = (
    ("", "published", "here"),
    ("float16: largest value", "65504", f"{mp.FLOAT16.max:.0f}"),
    ("float16: smallest, 2^-24", "5.96e-08", f"{mp.FLOAT16.min_subnormal:.2e}"),
    ("bfloat16: largest value", "3.39e+38", f"{mp.BFLOAT16.max:.2e}"),
    ("float16: 2048 + 1", "2048", f"{(torch.tensor(2048.0).half() + 1).item():.0f}"),
    ("weight gradients below 2^-24 (other nets)", "about 5 %", f"{100 * share:.0f} %"),
    ("GradScaler: first scale", "65536", f"{ours.__class__().state.scale:.0f}"),
    ("GradScaler: steps to grow", "2000", f"{mp.ScaleRule().growth_interval}"),
    ("DeepSpeed: window, hysteresis", "1000, 2", "ScaleRule(growth_interval=1000, hysteresis=2)"),
    ("bytes of state, 7.5 B parameters", "120 GB", f"{7.5 * rows[2][-1]:.0f} GB"),
)

# %% slideshow={"slide_type": "fragment"}
table(*published)
print("\nlog-uniform gradients, 2^-40 to 2^-10, lost at scale 1, 8, 32768:",
      ", ".join(f"{z:.0f} %" for z in zeros))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The often-quoted histogram in which 31 % of activation gradients turn to zero (an SSD detector)
# comes from NVIDIA's mixed-precision training guide; the ICLR paper reports the 5 % of weight
# gradients.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. What breaks in practice
#
# <!-- notes: Show the five lines of code and let each row of the room predict one output; they are
# -inf, NaN, inf, 0.0, inf. Ask which of them bfloat16 repairs: three. The masked row stays NaN, and
# the sum, no longer inf, stalls as in section 3. Of the bullets take "a scale that falls and
# falls": the infinity is in the forward pass, and looking at the scaler does not find it. -->

# %% slideshow={"slide_type": "fragment"}
half = torch.float16
scores = torch.tensor([1.0, 2.0, 3.0], dtype=half)
print("mask of -1e20 in float16:  ", torch.tensor(-1e20).to(half).item())
print("all masked, softmax:       ", torch.full((3,), -torch.inf, dtype=half).softmax(-1).tolist())
print("mean of squares of 300:    ", torch.full((4,), 300.0, dtype=half).square().mean().item())
print("variance eps of 1e-8:      ", torch.tensor(1e-8, dtype=half).item())
print("sum of 4096 losses of 20:  ", mp.running_sum(torch.full((4096,), 20.0), dtype=half).item())

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Gradient accumulation**: the scale must stay the same within one accumulated step; unscale and
#   update once, at its end.
# - **Resuming** without the scaler's state starts at 65536 with a row of skipped steps.
#   `scaler.state_dict()` belongs into the checkpoint.
# - **A scale that falls and falls** is not the scaler's fault: some activation is inf in the
#   forward pass, and no scale helps. Look at the loss first.
# - **bfloat16 everywhere** needs no scaler and has no overflow to skip; its sums and small updates
#   need float32 all the more.

# %% slideshow={"slide_type": "skip"}
scaler = mp.LossScaler(init_scale=2.0**20)
weight = nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(3):
    weight.grad = torch.tensor([torch.inf])
    scaler.step(optimizer)
    scaler.update()
resumed = mp.LossScaler()
resumed.load_state_dict(scaler.state_dict())
print("saved and resumed:", resumed.state == scaler.state, " scale", int(resumed.state.scale))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **This went wrong in production.** A loss that is NaN halves the scale at each step, until it is 0
# and the run dies of a division, a thousand steps after its cause (FactSeg #6; Paddle #67895: the
# scale at zero, and the gradients still NaN).
#
# <!-- notes: Ask where the error shows: in the scaler, which is the last to blame. Ours stops at
# the smallest scale whose inverse float32 holds. A scale at its floor says: look at the loss.
# DeepSpeed has min_scale=1 and ends the run there. One minute. -->

# %% slideshow={"slide_type": "fragment"}
scale, steps = 65536.0, 0
try:
    while True:
        inverse = 1.0 / scale  # to unscale by
        scale, steps = scale / 2, steps + 1
except ZeroDivisionError as error:
    print(f"halved at every step: {error}, after {steps} steps")
scaler = mp.LossScaler()
for _ in range(2000):
    weight.grad = torch.tensor([torch.nan])
    scaler.step(optimizer)
    scaler.update()
print("ours after 2000 steps: 2 **", int(math.log2(scaler.state.scale)))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Summary
#
# - Exponent bits are range, mantissa bits precision. float16 lacks range, bfloat16 precision.
# - Sums stall at $2^{m+1}$ terms: accumulate in float32.
# - Gradients sit at float16's lower edge. Scale the loss, unscale in float32, *then* clip.
# - Overflow is found, skipped, and lowers the scale. It guards against underflow.
# - Small updates vanish in 16-bit weights: float32 masters, or rounding by lot.
# - Mixed precision halves activations and traffic, not the 16 bytes of state.
#
# <!-- notes: Cover the slide: does bfloat16 need a loss scale; in which order do unscaling and
# clipping come; what does the float32 copy buy? In the laboratory: `float_limits`, `to_bfloat16`,
# `lost_fraction`, `scale_trajectory`, `unscale_and_clip`. At home: `train_in_float16`,
# `training_memory`, `stochastic_round`, `fp8_linear`. From chapter 11 on there is more than one
# device. -->
#
# **Further reading.** Micikevicius et al. 2018, *Mixed precision training* (arXiv 1710.03740);
# Kalamkar et al. 2019, *A study of bfloat16 for deep learning training* (arXiv 1905.12322);
# Micikevicius et al. 2022, *FP8 formats for deep learning* (arXiv 2209.05433); Gupta et al. 2015,
# *Deep learning with limited numerical precision* (arXiv 1502.02551).
