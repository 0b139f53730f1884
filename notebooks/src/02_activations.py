# %% [markdown] slideshow={"slide_type": "slide"}
# # 02 Activations
#
# Between two matrix products stands a curve, applied to each number by itself. It costs almost
# nothing and decides two things: what a layer can say, and which inputs can still teach it.
#
# In this chapter you build the curves from sigmoid to GELU and their slopes, watch gradients die
# and units with them, and arrive at the SwiGLU layer that Llama uses, down to its odd width 11008.
# Then you make every usual mistake in a real trained model and see what each one costs.
#
# You need: matrix products, the chain rule, PyTorch tensors. One normalisation appears, which is
# chapter 01's.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 6, curves and slopes, 35 for 7 to 11, gates. Sections
# 12 and 13 are for home; 14 is a ranking for the end of the laboratory. Begin with the one sentence
# to remember: the slope of the curve is the gradient's fate. Everything up to section 6 is that
# sentence, measured. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory are enough; the whole notebook runs in
# > less than a minute. The slow experiments: twelve small models on text (section 10, a second
# > each; shrink `NUM_SEEDS`), and SmolLM2-135M on 100 tokens (sections 11 and 14, a second a
# > pass; fetched once by `make model`).

# %% slideshow={"slide_type": "skip"}
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import reference.activations as act
from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.normalization import PreNorm, RMSNorm
from reference.pretrained import capture, corpus, load_smollm2, passage

torch.set_num_threads(1)
style.use()
COLOUR = {
    "none": style.COLOURS["black"],
    "sigmoid": style.COLOURS["purple"],
    "tanh": style.COLOURS["vermilion"],
    "ReLU": style.COLOURS["blue"],
    "leaky ReLU": style.COLOURS["sky"],
    "GELU": style.COLOURS["orange"],
    "SiLU": style.COLOURS["green"],
    "SwiGLU": style.COLOURS["green"],
}

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. Why a curve at all
#
# **Question.** A network reads 8 bytes of English and predicts the ninth. It has two matrices
# after its embedding. You leave out the curve between them. What do you lose: some speed of
# training, some accuracy, or the second layer?
#
# <!-- notes: Let the room vote. "Some accuracy" is the usual answer; the algebra says: the whole
# layer. Write W2(W1 x) on the board and let somebody move the brackets. In the figure the two end
# near 2.7 and 2.3. Objection that comes: biases. They fold into one as well. Six minutes. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# The text of this chapter is `pydoc_data.topics` of the standard library: the Python language
# reference, byte by byte. The last tenth is held out.

# %% slideshow={"slide_type": "skip"}
CONTEXT = 8
text = torch.tensor(list(corpus().encode()))
held_out_from = int(0.9 * len(text))


def batch_of_bytes(size, generator, is_held_out=False):
    """Contexts of 8 bytes, (size, 8), and the byte that follows each, (size,)."""
    low, high = (held_out_from, len(text)) if is_held_out else (0, held_out_from)
    starts = torch.randint(low, high - CONTEXT - 1, (size,), generator=generator)
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :CONTEXT], windows[:, CONTEXT]


probe = batch_of_bytes(4096, torch.Generator().manual_seed(9), is_held_out=True)


class BytePredictor(nn.Module):
    """Embedding, one hidden layer of 256 units with biases, 256 logits."""

    def __init__(self, curve, embedding_dim=12, hidden_dim=256):
        super().__init__()
        self.curve = curve
        self.embed = nn.Embedding(256, embedding_dim)
        self.up = nn.Linear(CONTEXT * embedding_dim, hidden_dim)
        self.head = nn.Linear(hidden_dim, 256)

    def preactivation(self, contexts):
        return self.up(self.embed(contexts).flatten(1))

    def forward(self, contexts):
        return self.head(self.curve(self.preactivation(contexts)))


def train(curve, learning_rate=1e-2, warmup=1, num_steps=200, watch=lambda model: None):
    """Train with Adam; returns the model, its losses, and what `watch` saw every 20 steps."""
    torch.manual_seed(0)
    model, generator = BytePredictor(curve), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses, seen = [], [watch(model)]
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warmup)
        contexts, following = batch_of_bytes(128, generator)
        loss = F.cross_entropy(model(contexts), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            seen.append(watch(model))
    return model, losses, seen


# %% slideshow={"slide_type": "subslide"}
straight, straight_losses, _ = train(lambda x: x)
bent, bent_losses, _ = train(act.relu)
figure, ax = plt.subplots(figsize=(11, 3.4))
for name, losses in (("none", straight_losses), ("ReLU", bent_losses)):
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(-1)
    ax.plot(range(9, 200), smooth, label=name, color=COLOUR[name])
ax.set(xlabel="step", ylabel="loss on the next byte (mean of 10)", xlim=(0, 200), ylim=(1.9, 4.2))
style.label_lines(ax)
plt.show()
with torch.no_grad():
    product = straight.head.weight @ straight.up.weight
    bias = straight.head.weight @ straight.up.bias + straight.head.bias
    one_layer = F.linear(straight.embed(probe[0]).flatten(1), product, bias)
    same = torch.allclose(one_layer, straight(probe[0]), atol=1e-3)
print("the network without a curve equals ONE matrix of shape", tuple(product.shape), "-", same)

# %% [markdown] slideshow={"slide_type": "fragment"}
# You lose the second layer: $W_2(W_1x)=(W_2W_1)x$. However deep, without a curve there is one
# matrix. With ReLU the same numbers of weights predict visibly better.
#
# So a curve must *bend*. Everything else is about what bending does to the way back.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. The curves and their slopes
#
# On the way back each number is multiplied by the **slope** of the curve where it stood. Look at
# the lower row first: where is it zero?
#
# <!-- notes: Cover the upper row with your hand and let students name the curves by their slopes.
# Ask for the largest slope of sigmoid, 1/4, and for what five such layers leave of a gradient: less
# than a thousandth. Then find the two slopes below zero in the table: GELU at -1, SiLU at -5. Eight
# minutes. -->

# %% slideshow={"slide_type": "fragment"}
FAMILIES = (
    ("saturate", {"sigmoid": (act.sigmoid, act.sigmoid_slope),
                  "tanh": (act.tanh, act.tanh_slope)}),
    ("rectify", {"ReLU": (act.relu, act.relu_slope),
                 "leaky ReLU": (lambda x: act.leaky_relu(x, negative_slope=0.1),
                                lambda x: act.leaky_relu_slope(x, negative_slope=0.1))}),
    ("rectify smoothly", {"GELU": (act.gelu, act.gelu_slope),
                          "SiLU": (act.silu, act.silu_slope)}),
)  # fmt: skip
x = torch.linspace(-5, 5, 501)
figure, axes = plt.subplots(2, 3, figsize=(13, 4.3), sharex=True)
for row, (family, curves) in zip(axes.T, FAMILIES, strict=True):
    for name, (curve, slope) in curves.items():
        dashes = "--" if name in ("leaky ReLU", "SiLU") else "-"
        row[0].plot(x, curve(x), dashes, color=COLOUR[name], label=name)
        row[1].plot(x, slope(x), dashes, color=COLOUR[name], label=name)
    row[0].set(title=f"{family}: value", ylabel="f(x)", ylim=(-1.2, 2.2))
    row[1].set(title=f"{family}: slope", ylabel="f'(x)", ylim=(-0.2, 1.25))
    row[0].legend(loc="upper left", fontsize=11)
for ax in axes[1]:
    ax.set_xlabel("x")
plt.show()
table(
    ("slope at", "-5", "-1", "0", "1", "5"),
    *[(name, *[round(slope(torch.tensor(v)).item(), 4) + 0.0 for v in (-5.0, -1.0, 0.0, 1.0, 5.0)])
      for _, curves in FAMILIES for name, (_, slope) in curves.items()],
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# | | formula | slope |
# |---|---|---|
# | sigmoid | $s(x)=1/(1+e^{-x})$ | $s(1-s)\le\frac14$ |
# | tanh | $2s(2x)-1=(1-e^{-2x})/(1+e^{-2x})$ | $1-\tanh^2\le1$ |
# | ReLU | $\max(x,0)$ | 1 where $x>0$, else 0 |
# | leaky ReLU | $x$ where $x>0$, else $ax$ | 1, else $a$ (0.01 in torch; 0.1 in the plot) |
# | GELU | $x\,\Phi(x)$ | $\Phi+x\phi$ |
# | SiLU | $x\,s(x)$ | $s+x\,s(1-s)$ |
#
# Mind the minus sign in the exponents. Without it, sigmoid and tanh turn around and *fall*.
#
# Both smooth rectifiers dip below zero and have a slope below zero on the left, and neither is
# ever exactly flat.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Flat means silent: sigmoid and tanh
#
# **Question.** The derivative of tanh is never zero on paper. In a computer it is. From which $x$
# on, in float32, in bfloat16?
#
# <!-- notes: Guesses come at 50 or 100. It is 8.3 in float32 and only 3.5 in bfloat16, a value that
# a preactivation reaches every day. Ask which of the two right columns they would have programmed:
# most write 1 - tanh squared, the one that is exactly zero. Ten minutes with the fifty layers. -->

# %% slideshow={"slide_type": "fragment"}
rows = [("dtype", "tanh(x) = 1 from x =", "1 - tanh(x)^2 there", "4 s(2x) s(-2x) there")]
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.arange(0, 12, 1 / 64).to(dtype)
    y = act.tanh(x)
    first = int((y == 1).nonzero()[0])
    slope = act.tanh_slope(x[first]).item()
    rows.append((str(dtype)[6:], x[first].item(), (1 - y[first] ** 2).item(), f"{slope:.1e}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Once the *value* has rounded to 1, a slope computed from the value is exactly zero: the unit is
# silent. (The other way of writing it keeps its digits, which is right; but what is left teaches
# next to nothing.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# And the textbook formula has a worse corner, where both exponentials leave the range:

# %% slideshow={"slide_type": "fragment"}
z = torch.tensor([1.0, 50.0, 100.0])
textbook = (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())
table(
    ("x", *z.tolist()),
    ("(e^x - e^-x) / (e^x + e^-x)", *textbook.tolist()),
    ("reference", *act.tanh(z).tolist()),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `soft_cap`** (build, 15 minutes, difficulty 1 of 3). tanh has one good job in a modern
# model: Gemma 2 (arXiv 2408.00118, sec. 2) bounds its attention scores and its logits by
# $\text{cap}\cdot\tanh(x/\text{cap})$. Build it with its slope, in `exercises/activations.py`.

# %% slideshow={"slide_type": "skip"}
check("soft_cap")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Fifty layers.** "tanh vanishes, ReLU does not." Guess before you run it: 50 layers of width
# 256, random weights of standard deviation $g/\sqrt{256}$, a random gradient from above. How
# large is the gradient that arrives at the bottom, for tanh, ReLU and SiLU, at $g=1$?
#
# <!-- notes: Ask for three powers of ten on paper, one for each curve. Nearly all put tanh lowest.
# At g = 1 it is the other way round: tanh 0.1, ReLU 3e-8, SiLU 1e-15. Then the right panel: with
# its own gain ReLU is flat. The lesson is curve and weights together, not a ranking of curves. -->


# %% slideshow={"slide_type": "fragment"}
DEPTH, WIDTH = 50, 256
normal = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
curves = {"sigmoid": act.sigmoid, "tanh": act.tanh, "ReLU": act.relu, "SiLU": act.silu}


def own_gain(curve):
    """The g at which a layer returns unit scale for unit scale: 1 / rms of curve(normal)."""
    return 1 / curve(normal).square().mean().sqrt().item()


def gradient_through(curve, gain, bias_std=0.0):
    """Norm of the gradient at each layer, relative to the top; rms of the last layer's output."""
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(32, WIDTH, generator=generator).double().requires_grad_()]
    for _ in range(DEPTH):
        weight = torch.randn(WIDTH, WIDTH, generator=generator) * gain / math.sqrt(WIDTH)
        bias = torch.randn(WIDTH, generator=generator) * bias_std
        streams.append(curve(F.linear(streams[-1], weight.double(), bias.double())))
    top = torch.randn(32, WIDTH, generator=generator)
    grads = torch.autograd.grad(streams[-1], streams, top)
    return ([g.norm().item() / top.norm().item() for g in grads],
            streams[-1].square().mean().sqrt().item())  # fmt: skip


figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
rows = [("gradient at the bottom", "g = 1", "own g", "with the own g", "factor a layer")]
for name, curve in curves.items():
    at_one, _ = gradient_through(curve, 1.0)
    at_own, _ = gradient_through(curve, own_gain(curve))
    for ax, norms in ((axes[0], at_one), (axes[1], at_own)):
        ax.semilogy(range(DEPTH, -1, -1), norms[::-1],
                    color=COLOUR[name], label=name)  # fmt: skip
    rows.append((name, f"{at_one[0]:.0e}", round(own_gain(curve), 2), f"{at_own[0]:.0e}",
                 round(at_own[0] ** (1 / DEPTH), 2)))  # fmt: skip
for ax, title in zip(
    axes, ("the same weights for all, g = 1", "each curve its own g"), strict=True
):
    ax.set(title=title, xlabel="layer (the gradient enters at 50)", xlim=(DEPTH, 0))
    ax.set(ylim=(1e-34, 1e6), ylabel="norm of the gradient, relative")
    style.label_lines(ax)
plt.show()

# %% slideshow={"slide_type": "fragment"}
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The slogan is half wrong. At $g=1$ it is *ReLU and SiLU* that vanish, and tanh loses one digit in
# 50 layers. ReLU throws half of the signal away, so its weights must be larger by $\sqrt2$ (He et
# al. 2015, arXiv 1502.01852, sec. 2.2); then it passes gradients unchanged. SiLU's own gain keeps
# the *values* in scale and lets gradients grow: 1.2 a layer. Sigmoid vanishes in every case, with
# slopes of at most 1/4. Curve and weights make a gradient together.

# %% [markdown] slideshow={"slide_type": "subslide"}
# So when does tanh vanish? When its units are pushed to the flat ends by something that does not
# amplify the gradient as well:

# %% slideshow={"slide_type": "fragment"}
rows = [("tanh, 50 layers", "gradient at the bottom", "rms of the output")]
for label, gain, bias_std in (
    ("g = 1", 1.0, 0.0),
    ("g = 3: large weights", 3.0, 0.0),
    ("g = 1, biases of std 2", 1.0, 2.0),
):
    norms, size = gradient_through(act.tanh, gain, bias_std)
    rows.append((label, f"{norms[0]:.0e}", round(size, 2)))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Large weights saturate tanh *and* multiply the gradient, and the second wins: it explodes.
# Biases saturate it and multiply nothing: it vanishes. (The theory of both is Schoenholz et al.
# 2017, arXiv 1611.01232.) Transformers go around the problem: a residual connection
# gives the gradient a path that no curve stands on (chapter 01, section 9).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Dead units
#
# **Question.** "A ReLU unit with negative input is dead; it learns nothing." True?
#
# Train the byte predictor with a learning rate that is somewhat too high, then ask for each unit
# and each input: does this input send a gradient to this unit?
#
# <!-- notes: Take a vote on the sentence; many have it from lecture notes. Wait for the word
# "always": negative for this input, or for all inputs? In the figure a white cell is one silence, a
# white row is death. 96 % of the cells are silent, 21 % of the units are dead. Eight minutes. -->


# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
def watch_units(model):
    with torch.no_grad():
        pre = model.preactivation(probe[0])
    return act.dead_units(pre).float().mean().item(), act.active_share(pre).mean().item()


hot, _, _ = train(act.relu, learning_rate=3e-2)
pre = hot.preactivation(probe[0]).detach()
share, is_dead = act.active_share(pre), act.dead_units(pre)
order = share.argsort(descending=True)
teaches = (pre[:120, order] > 0).T
figure, ax = plt.subplots(figsize=(9, 4.6))
ax.imshow(teaches, cmap="Greys", aspect="auto", vmin=0, vmax=1.3)
first_dead = int((~is_dead).sum())
ax.axhline(first_dead - 0.5, color=style.COLOURS["vermilion"])
ax.text(121, (first_dead + 256) / 2, "dead", color=style.COLOURS["vermilion"], va="center")
ax.text(121, first_dead / 2, "selective", va="center")
ax.set(xlabel="input (120 of 4096 held-out contexts)", ylabel="unit, sorted by active share")
ax.grid(False)
plt.show()
print(f"an input sends no gradient to {100 * (1 - share.mean()):.0f} % of the units on average")
print(f"units that no input of 4096 reaches: {100 * is_dead.float().mean():.0f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Black: this input teaches this unit. Every unit has white cells, so nearly every unit is silent
# for *most* inputs. That is its work: it has specialised. **A ReLU unit gets no gradient from the
# inputs where $x\le0$, and a full gradient from all others.** Dead is a unit whose whole row is
# white. The proof by autograd, unit by unit:

# %% slideshow={"slide_type": "fragment"}
leaf = hot.up.bias.detach().expand(len(probe[0]), -1).clone().requires_grad_()
hidden = F.relu(F.linear(hot.embed(probe[0]).flatten(1), hot.up.weight) + leaf)
F.cross_entropy(hot.head(hidden), probe[1]).backward()
reaches = leaf.grad != 0
print("gradient only where x > 0:", bool((reaches <= (pre > 0)).all()))
print("dead units get exactly none:", not leaf.grad[:, is_dead].any())
alive = ~is_dead & (share < 0.05)
print("units active on fewer than 5 % of inputs, yet taught by some:",
      bool(reaches[:, alive].any(0).all()))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** When do units die: at the start, steadily, at the end? And does leaky ReLU keep
# them alive? A unit of leaky ReLU that is negative on all inputs still gets a hundredth of the
# gradient, so it can come back.
#
# <!-- notes: Draw the axis and let three students draw their curve: most draw a slow rise. At rate
# 0.1 it is 76 % after twenty steps. Ask which unit of length the first Adam step has: about the
# learning rate for every weight. Warm-up takes 21 % down to 5 % at rate 0.03. -->

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
steps = range(0, 201, 20)
died = {}
for ax, (name, curve) in zip(
    axes, (("ReLU", act.relu), ("leaky ReLU", act.leaky_relu)), strict=True
):
    for rate, alpha in ((1e-2, 0.45), (3e-2, 0.7), (1e-1, 1.0)):
        _, _, seen = train(curve, learning_rate=rate, watch=watch_units)
        dead = [100 * d for d, _ in seen]
        died[name, rate] = dead
        ax.plot(steps, dead, color=COLOUR[name], alpha=alpha, label=f"rate {rate:g}")
    ax.set(title=name, xlabel="step", ylabel="units negative on all 4096 inputs, %")
    ax.set(xlim=(0, 200), ylim=(-3, 103))
    style.label_lines(ax)
plt.show()
_, _, warmed = train(act.relu, learning_rate=3e-2, warmup=50, watch=watch_units)
print(f"ReLU, rate 0.1: {died['ReLU', 1e-1][1]:.0f} % after 20 steps")
print(f"ReLU, rate 0.03: {died['ReLU', 3e-2][-1]:.0f} % at the end, "
      f"{100 * warmed[-1][0]:.0f} % with a warm-up of 50 steps")  # fmt: skip
assert died["ReLU", 1e-2][-1] == 0 and died["ReLU", 1e-1][-1] > 80
assert died["leaky ReLU", 1e-1][-1] < died["ReLU", 1e-1][-1] - 20

# %% [markdown] slideshow={"slide_type": "fragment"}
# At a sensible rate nobody dies. At ten times that, three quarters die within twenty steps: Adam's
# first steps move every weight by about the rate, 0.1, and the weights started within
# $1/\sqrt{96}\approx0.1$. A unit that is thrown below zero for all inputs gets no gradient that
# could lift it. (A few come back when the *embedding* below them moves.) Leaky units are knocked
# out as well, but not for good. A warm-up keeps the first steps small.
#
# **Exercise `dead_units`** (build, 15 minutes, difficulty 2 of 3). Over a data set that comes in
# batches.

# %% slideshow={"slide_type": "skip"}
check("dead_units")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. GELU and SiLU
#
# ReLU asks one question: is $x>0$? Yes passes $x$, no passes nothing. GELU (Hendrycks and Gimpel
# 2016, arXiv 1606.08415) answers with a *share*: how much of a normal distribution lies below
# $x$? That share of $x$ passes:
#
# $$\text{GELU}(x)=x\,\Phi(x)=\tfrac x2\Big(1+\operatorname{erf}\tfrac{x}{\sqrt2}\Big)$$
#
# SiLU takes the sigmoid for the share, and Swish (Ramachandran et al. 2017, arXiv 1710.05941) adds
# a number that can be trained, $x\,s(\beta x)$.
#
# **Question.** People write "GELU, that is $x\cdot\text{sigmoid}(x)$", or "Swish is GELU". How
# far apart are they?
#
# <!-- notes: Ask for the largest distance and where: at zero, far out, or in between? It is 0.19
# near x = 2, in the middle of what a layer sees. The tanh form is 400 times closer. Practical end:
# read the config's name for the curve before loading a checkpoint. Exercise `gelu`, ten minutes, in
# the laboratory. Eight minutes. -->

# %% slideshow={"slide_type": "fragment"}
x = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
exact = act.gelu(x)
others = {
    "x sigmoid(x), SiLU": (act.silu(x), "green"),
    "x sigmoid(1.702 x)": (act.gelu(x, approximate="sigmoid"), "vermilion"),
    "tanh form": (act.gelu(x, approximate="tanh"), "blue"),
}
figure, ax = plt.subplots()
rows = [("instead of GELU", "largest error", "at |x| =")]
for name, (values, colour) in others.items():
    gap = (values - exact).abs()
    ax.semilogy(x, gap.clamp(min=1e-7), color=style.COLOURS[colour], label=name)
    rows.append((name, f"{gap.max():.3e}", round(x[gap.argmax()].abs().item(), 3)))
ax.set(xlabel="x", ylabel="distance from GELU", xlim=(-6, 6), ylim=(1e-6, 1))
style.label_lines(ax, size=11)
plt.show()
table(*rows)
fine = torch.linspace(-1.3, -1.25, 50_001, dtype=torch.float64)
lowest = fine[act.silu(fine).argmin()]
print(f"\nSiLU is lowest at x = {lowest:.5f}: {act.silu(lowest):.5f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Three different functions. $x\,s(1.702x)$ is the paper's coarse approximation of GELU, and a
# Swish with $\beta=1.702$; $x\,s(x)$ is SiLU, off by up to 0.19. The fine approximation is
#
# $$\text{GELU}(x)\approx\tfrac x2\Big(1+\tanh\big[\sqrt{2/\pi}\,(x+0.044715\,x^3)\big]\Big),$$
#
# off by 0.0005. In torch it is `F.gelu(x, approximate="tanh")`; in transformers' configurations
# `gelu_new` and `gelu_pytorch_tanh` are this form, `gelu` is the exact one, and `quick_gelu` the
# coarse one. Take the one that the checkpoint was trained with.

# %% slideshow={"slide_type": "subslide"}
x = torch.linspace(-4, 4, 401)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.9))
for beta, alpha in ((0.0, 0.3), (0.5, 0.5), (1.0, 0.75), (10.0, 1.0)):
    axes[0].plot(x, act.swish(x, beta=beta), color=style.COLOURS["green"], alpha=alpha,
                 label=f"beta {beta:g}")  # fmt: skip
axes[0].set(title="Swish: from x / 2 to ReLU", xlabel="x", ylabel="x sigmoid(beta x)", xlim=(-4, 4))
style.label_lines(axes[0], size=11)
tail = torch.linspace(-8, -2, 200)
phi = torch.special.log_ndtr(tail.double()).exp()
relative = (F.gelu(tail).double() / (tail.double() * phi) - 1).abs()
by_erfc = (0.5 * tail * torch.erfc(-tail / math.sqrt(2))).double() / (tail.double() * phi) - 1
axes[1].semilogy(tail, relative.clamp(1e-9, 1), color=style.COLOURS["vermilion"], label="1 + erf")
axes[1].semilogy(tail, by_erfc.abs().clamp(min=1e-9), color=style.COLOURS["blue"], label="erfc")
axes[1].set(title="GELU's left tail in float32", xlabel="x", ylabel="relative error",
            xlim=(-8, -2), ylim=(1e-9, 3))  # fmt: skip
axes[1].text(-7.8, 0.2, "1 + erf", color=style.COLOURS["vermilion"], va="top")
axes[1].text(-7.8, 3e-5, "erfc", color=style.COLOURS["blue"])
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# The right picture is a warning about formulas, not about models: at $x=-6$ the value is
# $6\cdot10^{-9}$ and no layer will notice. But where a *logarithm* follows, such as in a
# likelihood, the digits of a tail are all there is.
#
# **Exercise `gelu`** (build, 10 minutes, difficulty 1 of 3). Exact, with the tail.

# %% slideshow={"slide_type": "skip"}
check("gelu")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. The backward pass, by hand
#
# A curve works on each number alone, so its backward is one product, $\frac{\partial L}{\partial
# x}=\frac{\partial L}{\partial y}\,f'(x)$. For $f(x)=x\,s(\beta x)$ the product rule gives two
# terms, since $x$ stands in two places ($s'=s(1-s)$):
#
# $$f'(x)=s(\beta x)+\beta x\,s(\beta x)\big(1-s(\beta x)\big)\qquad
# \frac{\partial f}{\partial\beta}=x^2\,s(\beta x)\big(1-s(\beta x)\big)$$
#
# Numerically, $1-s(z)$ is $s(-z)$, which cancels nothing.
#
# <!-- notes: Let the room do the product rule before you show the line; the usual slip is to forget
# the inner beta. Then the question of what to keep: two inputs, -0.5 and -2.509, with the same SiLU
# and slopes of opposite sign. So the output cannot be enough. `swish_backward`, 20 minutes, in the
# laboratory. Six minutes. -->

# %% slideshow={"slide_type": "fragment"}
x = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
rows = [("", "largest difference from autograd on torch's own function")]
for name, theirs, slope in (
    ("ReLU", F.relu, act.relu_slope),
    ("leaky ReLU", F.leaky_relu, act.leaky_relu_slope),
    ("sigmoid", torch.sigmoid, act.sigmoid_slope),
    ("tanh", torch.tanh, act.tanh_slope),
    ("SiLU", F.silu, act.silu_slope),
    ("GELU", F.gelu, act.gelu_slope),
    ("GELU, tanh form", lambda t: F.gelu(t, approximate="tanh"),
     lambda t: act.gelu_slope(t, approximate="tanh")),
):  # fmt: skip
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    gap = (slope(x) - expected).abs().max().item()
    rows.append((name, "0" if gap == 0 else f"below 1e-14: {gap < 1e-14}"))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# **What it must keep.** sigmoid and tanh can be differentiated from their *output* ($y(1-y)$,
# $1-y^2$), ReLU from one bit. SiLU and GELU are not one-to-one, so they need their *input*:

# %% slideshow={"slide_type": "fragment"}
left = torch.linspace(-6, -1.2785, 100_001, dtype=torch.float64)
right_of = torch.tensor(-0.5, dtype=torch.float64)
twin = left[(act.silu(left) - act.silu(right_of)).abs().argmin()]
for x in (right_of, twin):
    print(f"x = {x:.3f}   SiLU {act.silu(x):.4f}   slope {act.silu_slope(x):.4f}")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `swish_backward`** (derive, 20 minutes, difficulty 2 of 3). Both gradients, with one
# trained $\beta$ for the whole tensor.

# %% slideshow={"slide_type": "skip"}
check("swish_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. Gates
#
# So far each number decided about itself. A **gate** lets one projection of the token decide about
# another (GLU: Dauphin et al. 2016, arXiv 1612.08083; the others: Shazeer 2020, arXiv 2002.05202,
# sec. 2):
#
# $$y=W_{\text{down}}\Big(f(W_{\text{gate}}x)\odot W_{\text{up}}x\Big)\qquad
# f=\begin{cases}\text{sigmoid}&\text{GLU}\\\text{ReLU}&\text{ReGLU}\\\text{GELU}&\text{GEGLU}\\
# \text{SiLU}&\text{SwiGLU}\end{cases}$$
#
# The curve is on the gate **alone**. `up` stays linear. What changes if you put it on the other
# branch, or on both?
#
# <!-- notes: Second half, 35 minutes; ten for this section. Draw the layer as two pipes and a
# valve. Ask where in the first picture the output is large and negative: below right, an open gate
# and a negative up. The third picture has no such corner: -0.80 instead of -8.57. Exchanged
# branches look harmless, until somebody loads a checkpoint. -->

# %% slideshow={"slide_type": "fragment"}
grid = torch.linspace(-3, 3, 121)
gate, up = torch.meshgrid(grid, grid, indexing="xy")
surfaces = {
    "SwiGLU: silu(gate) up": act.swiglu(gate, up),
    "on up: gate silu(up)": act.swiglu(up, gate),
    "on both": act.silu(gate) * act.silu(up),
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
for ax, (name, values) in zip(axes, surfaces.items(), strict=True):
    image = ax.contourf(gate, up, values, levels=torch.linspace(-9, 9, 19).tolist(), cmap="PuOr")
    ax.set(title=name, xlabel="gate")
    ax.grid(False)
axes[0].set_ylabel("up")
figure.colorbar(image, ax=axes, label="hidden activation")
plt.show()
for name, values in surfaces.items():
    print(f"{name:23} from {values.min():5.2f} to {values.max():.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# SwiGLU: the left half is nearly shut, and the right half is linear in `up`, positive or negative.
# On the other branch, the roles are exchanged: retrained from scratch, the layer is the same
# family; with a *given* checkpoint it is another function. On both branches the large negative
# values are gone.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The gradients of a gate, with $g$ for gate and $u$ for up:
# $\frac{\partial L}{\partial g}=\frac{\partial L}{\partial h}\,u\,f'(g)$,
# $\;\frac{\partial L}{\partial u}=\frac{\partial L}{\partial h}\,f(g)$. Where $u$ is linear, one
# factor of every path is never flat.

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
g, u, grad = (torch.randn(64, 32, generator=generator, dtype=torch.float64) for _ in range(3))
rows = [("", "equals torch", "backward equals autograd")]
for name, theirs, ours, backward in (
    ("GLU", torch.sigmoid, act.glu, act.glu_backward),
    ("ReGLU", F.relu, act.reglu, act.reglu_backward),
    ("GEGLU", F.gelu, act.geglu, act.geglu_backward),
    ("SwiGLU", F.silu, act.swiglu, act.swiglu_backward),
):
    a, b = g.clone().requires_grad_(), u.clone().requires_grad_()
    expected = torch.autograd.grad(theirs(a) * b, (a, b), grad)
    is_same = all(map(torch.allclose, backward(grad, g, u), expected))
    rows.append((name, torch.allclose(ours(g, u), theirs(g) * u), is_same))
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **The 2/3 rule.** Three matrices instead of two: at the width $4D$ the layer would be half as
# large again. "We reduce the number of hidden units [...] by a factor of 2/3" (arXiv 2002.05202,
# sec. 2): $3\,D\cdot\frac23\,4D=2\,D\cdot4D$.
#
# **Question.** $\frac23\cdot4\cdot4096=10922.67$. Llama's layer has width 11008. Why?
#
# <!-- notes: Let them factor 11008: it is 43 times 256. "A power of two" is the wrong guess that
# comes first. Then ask for Llama 3's 14336 and wait for the objection that 3.5 is not 8/3; the
# multiplier is a choice. `feed_forward_plan`, ten minutes, in the laboratory. -->

# %% slideshow={"slide_type": "skip"}
llamas = (
    # name, model_dim, ffn_dim_multiplier, multiple_of, width in the checkpoint
    ("Llama 1 and 2, 7B", 4096, 1.0, 256, 11008),
    ("Llama 1 and 2, 13B", 5120, 1.0, 256, 13824),
    ("Llama 1, 33B", 6656, 1.0, 256, 17920),
    ("Llama 1, 65B", 8192, 1.0, 256, 22016),
    ("Llama 2 and 3, 70B", 8192, 1.3, 4096, 28672),
    ("Llama 3, 8B", 4096, 1.3, 1024, 14336),
    ("Llama 3.1, 405B", 16384, 1.2, 4096, 53248),
)

# %% slideshow={"slide_type": "fragment"}
rows = [("", "D", "2/3 of 4D", "multiplier", "multiple of", "width", "published", "F / D")]
for name, dim, multiplier, multiple_of, published in llamas:
    width = act.swiglu_hidden_dim(dim, multiplier=multiplier, multiple_of=multiple_of)
    assert width == published
    rows.append((name, dim, int(8 * dim / 3), multiplier, multiple_of, width, published,
                 f"{width / dim:.2f}"))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Cut to a whole number, times the multiplier, cut again, then rounded **up** to a multiple of 256
# or more, so that matrices split evenly into tiles and among devices (meta-llama/llama-models,
# `models/llama3/model.py`, class `FeedForward`). The multiplier is no rule of nature: in its 70B
# models, and in all of Llama 3, Meta made the layer wider than 8/3.
#
# **Exercise `feed_forward_plan`** (estimate, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("feed_forward_plan")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. One matrix for gate and up
#
# Gate and up multiply the same token. Stacked into one matrix $(2F, D)$ they need one product
# instead of two, and one read of $x$. Phi-3's checkpoints are stored so. Which half is the gate?
#
# <!-- notes: Ask for a way to find out from the file. There is none: shapes agree and all three
# readings train. Mention that torch's own F.glu has the gate in the second half. Then the two
# devices: let somebody name what device 0 holds before you click. `fused_feed_forward` is five
# minutes in the laboratory; `shard_gate_up` is for home. Six minutes. -->

# %% slideshow={"slide_type": "skip"}
torch.manual_seed(0)
separate = act.SwiGLU(64, 172)
fused = act.FusedSwiGLU.from_separate(separate)
x = torch.randn(5, 64)
both = fused.gate_up_proj(x)
gate_first = act.swiglu(*both.chunk(2, dim=-1))
glu_order = act.swiglu(*both.chunk(2, dim=-1)[::-1])
interleaved = act.swiglu(both[..., ::2], both[..., 1::2])
hidden = act.swiglu(separate.gate_proj(x), separate.up_proj(x))

# %% slideshow={"slide_type": "fragment"}
table(
    ("packed by rows, gate first; read as", "equals the separate layer"),
    ("gate, up", torch.allclose(gate_first, hidden, atol=1e-6)),
    ("up, gate (the order of F.glu)", torch.allclose(glu_order, hidden, atol=1e-6)),
    ("every other row", torch.allclose(interleaved, hidden, atol=1e-6)),
)
a, b = torch.randn(4), torch.randn(4)
print("\nF.glu(a joined b) is a sigmoid(b):",
      torch.allclose(F.glu(torch.cat((a, b))), a * torch.sigmoid(b)))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# All three readings have the right shapes and train. Only one speaks the checkpoint's language.
# Nothing in the file says which; the code that wrote it does.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `fused_feed_forward`** (repair, 5 minutes, difficulty 1 of 3). A port that went wrong.

# %% slideshow={"slide_type": "skip"}
check("fused_feed_forward")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Two devices share the layer. Device 0 takes the first half of the packed rows,
# device 1 the second half. What does device 0 hold?

# %% slideshow={"slide_type": "fragment"}
labels = [f"{kind}{i}" for kind in ("gate", "up") for i in range(4)]
print("cut in one piece: ", labels[:4], labels[4:])
print("cut apart, packed:", labels[0:2] + labels[4:6], labels[2:4] + labels[6:8])

# %% [markdown] slideshow={"slide_type": "fragment"}
# In the first line device 0 has gates without ups. Its shapes are right, its `chunk(2)` works,
# and it multiplies gates by gates.
#
# **Exercise `shard_gate_up`** (build, 20 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("shard_gate_up")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. What backward keeps
#
# **Question.** Which hidden tensors, each with $F$ numbers a token, must a SwiGLU layer keep from
# forward to backward?
#
# <!-- notes: Let them list: gate, sigmoid of it, silu of it, up, product. Then strike out what can
# be computed again; two remain, gate and up. The formula keeps four, torch's kernel three, by hand
# two. Say that one of these tensors is 3.5 GiB for Llama 3 8B at 131,072 tokens. Six minutes; the
# challenge `tiled_feed_forward` goes on from here. -->


# %% slideshow={"slide_type": "fragment"}
def kept_bytes(call):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storages.values())


num_tokens, width = 64, 1536
g, u = (torch.randn(num_tokens, width).requires_grad_() for _ in range(2))
down = nn.Linear(width, 576, bias=False)
weight_bytes = 4 * down.weight.numel()
rows = [("kept, in tensors of T x F", "gate * up part", "with the down projection")]
for name, hidden_of in (
    ("formula, x sigmoid(x)", lambda g, u: g * torch.sigmoid(g) * u),
    ("act.swiglu, torch's silu kernel", act.swiglu),
    ("act.SwiGLUFunction, by hand", act.SwiGLUFunction.apply),
):
    alone = kept_bytes(lambda f=hidden_of: f(g, u))
    layer = kept_bytes(lambda f=hidden_of: down(f(g, u))) - weight_bytes
    rows.append((name, *[round(b / (4 * num_tokens * width), 2) for b in (alone, layer)]))
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Gate and up are enough: $f(g)$ and $f'(g)$ cost a few operations a number, and reading them from
# memory would take longer than computing them anew. Recompute is the rule of every fused kernel
# (chapter 07 does it for attention). The product itself is kept by the *down projection*, which
# needs its input; to save that one too, the layer has to be recomputed as a whole.

# %% [markdown] slideshow={"slide_type": "subslide"}
# For Llama 3 8B with 131,072 tokens in bfloat16, one tensor of $T\times F$ is

# %% slideshow={"slide_type": "fragment"}
for name, bytes_ in (
    ("hidden, T x F", 131_072 * 14_336 * 2),
    ("all gate and up, T x 2F", 131_072 * 2 * 14_336 * 2),
    ("residual stream, T x D", 131_072 * 4096 * 2),
):
    print(f"{name:24} {bytes_ / 2**30:5.2f} GiB")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Tokens do not meet in a feed-forward layer. So it can be computed, and differentiated, a tile of
# tokens at a time.
#
# **Exercise `tiled_feed_forward`** (challenge, 35 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("tiled_feed_forward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Does the gate pay?
#
# **Question.** Same number of weights, same data, same steps: plain layer with ReLU or GELU, width
# 384, against SwiGLU, width 256. Which predicts bytes better, and is the difference larger than
# that between two seeds?
#
# The model: 8 bytes, two residual feed-forward blocks of width 96 with RMSNorm, 256 logits. Each
# seed fixes the order of the data for all kinds, so that they can be compared in pairs.
#
# <!-- notes: Ask first how one would cheat here: keep the width 384 and give SwiGLU half as many
# weights again, 221,376 against 147,648. Then read the figure along the grey lines, not up and
# down: each falls from ReLU to SwiGLU. The squares alone, with their error bars, would have left a
# doubt. Six minutes. -->


# %% slideshow={"slide_type": "fragment"}
NUM_SEEDS = 4
KINDS = {
    "ReLU": lambda: act.MLP(96, 384),
    "GELU": lambda: act.MLP(96, 384, curve=act.gelu),
    "SwiGLU": lambda: act.SwiGLU(96, 256),
}


class DeeperPredictor(nn.Module):
    def __init__(self, make_layer, dim=96, embedding_dim=12):
        super().__init__()
        self.embed = nn.Embedding(256, embedding_dim)
        self.project = nn.Linear(CONTEXT * embedding_dim, dim, bias=False)
        self.blocks = nn.Sequential(*[PreNorm(make_layer(), RMSNorm(dim)) for _ in range(2)])
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, 256, bias=False)

    def forward(self, contexts):
        x = self.project(self.embed(contexts).flatten(1))
        return self.head(self.norm(self.blocks(x)))


def held_out_loss(make_layer, seed, num_steps=200, peak_rate=7e-3):
    torch.manual_seed(seed)
    model, generator = DeeperPredictor(make_layer), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_rate)
    for step in range(num_steps):
        rate = peak_rate * min(1, (step + 1) / 20) * (1 - step / num_steps)
        optimizer.param_groups[0]["lr"] = rate
        contexts, following = batch_of_bytes(128, generator)
        loss = F.cross_entropy(model(contexts), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(probe[0]), probe[1]).item()
    return loss, sum(p.numel() for p in model.blocks.parameters())


runs = {kind: [held_out_loss(make, s) for s in range(NUM_SEEDS)] for kind, make in KINDS.items()}
too_wide = 2 * (act.feed_forward_parameters(96, 384, is_gated=True) + 96)  # 96: the norm's
losses = {kind: torch.tensor([loss for loss, _ in results]) for kind, results in runs.items()}
print("weights of the blocks:", {kind: results[0][1] for kind, results in runs.items()})
print("SwiGLU that kept the width 384:", too_wide)


# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
def with_error(values):
    return f"{values.mean():.3f} ± {values.std() / math.sqrt(len(values)):.3f}"


figure, ax = plt.subplots(figsize=(11, 3.1))
for seed in range(NUM_SEEDS):
    ax.plot(range(3), [losses[kind][seed] for kind in KINDS], color="0.8", lw=1.2, zorder=1)
for i, kind in enumerate(KINDS):
    ax.plot([i] * NUM_SEEDS, losses[kind], "o", color=COLOUR[kind], alpha=0.6)
    ax.errorbar(i + 0.12, losses[kind].mean(), losses[kind].std() / math.sqrt(NUM_SEEDS),
                fmt="s", color=COLOUR[kind], capsize=5)  # fmt: skip
ax.set(xticks=range(3), xticklabels=KINDS, xlim=(-0.4, 2.5), ylabel="held-out loss, nats a byte")
ax.set_xlabel("lines join runs of one seed; squares: mean and its standard error")
plt.show()
table(
    ("4 seeds", "held-out loss", "minus ReLU, seed by seed"),
    *[(kind, with_error(losses[kind]),
       "" if kind == "ReLU" else with_error(losses[kind] - losses["ReLU"])) for kind in KINDS],
)  # fmt: skip

# %% slideshow={"slide_type": "skip"}
gap = losses["SwiGLU"] - losses["ReLU"]
error = gap.std() / math.sqrt(NUM_SEEDS)
print("SwiGLU beats ReLU in every seed:", bool((gap < 0).all()))
print("by more than three standard errors:", bool(gap.mean() < -3 * error))

# %% [markdown] slideshow={"slide_type": "fragment"}
# The gate pays, in every seed, several standard errors from zero. GELU instead of ReLU does not
# show, at this size and with four seeds. Note how far the *seeds* lie apart: with one run of
# each kind, on different data, the order could have come out either way.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Why does it pay? The paper that proposed it: "We offer no explanation as to why
# these architectures seem to work; we attribute their success, as all else, to divine
# benevolence" (arXiv 2002.05202, sec. 4).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. The gates of a trained model
#
# SmolLM2's 30 layers have 1536 hidden units each, with a SiLU gate. **Question.** SiLU is never
# exactly zero. Are these gates nevertheless mostly shut? And are there dead units?
#
# <!-- notes: Two votes: what share of gates is below zero, and what share of units is below zero on
# all 100 tokens? 42 to 79 %, and at most 2.6 %: so hardly any dead unit. The purple line is the
# finding, a tenth of the units with most of the energy. Ask how many units one could leave out;
# half, and the loss goes from 3.6 to 3.67. Seven minutes. -->

# %% slideshow={"slide_type": "skip"}
smollm2, tokenizer = load_smollm2()
tokens = tokenizer(passage(), return_tensors="pt").input_ids[:, :100]
num_layers = smollm2.config.num_hidden_layers
names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(num_layers) for p in ("gate", "up")]
captured = capture(smollm2, tokens, names)
gates = [captured[n].output[0] for n in names[::2]]  # each (T, F)
ups = [captured[n].output[0] for n in names[1::2]]

# %% slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 2, figsize=(11, 4))
edges = torch.linspace(-4, 4, 81)
for layer, colour in ((5, "blue"), (15, "green"), (29, "vermilion")):
    height = torch.histogram(gates[layer].flatten(), edges, density=True).hist
    axes[0].plot((edges[:-1] + edges[1:]) / 2, height, color=style.COLOURS[colour])
axes[0].plot(edges, act.silu(edges), ":", color="0.4", lw=1.5)
axes[0].text(1.5, 0.85, "silu", color="0.4")
for layer, colour, height in ((5, "blue", 0.9), (15, "green", 0.8), (29, "vermilion", 0.7)):
    axes[0].text(-3.9, height, f"layer {layer}", color=style.COLOURS[colour])
axes[0].set(xlabel="gate before the curve", ylabel="density", ylim=(-0.3, 1.0), xlim=(-4, 4))
shut = [100 * (g < 0).float().mean().item() for g in gates]
never = [100 * act.dead_units(g).float().mean().item() for g in gates]
hidden_units = [act.swiglu(g, u).square() for g, u in zip(gates, ups, strict=True)]
top = [100 * (h.topk(154, -1).values.sum(-1) / h.sum(-1)).mean().item() for h in hidden_units]
for values, colour, name in (
    (top, "purple", "energy in the\nlargest 10 %"),
    (shut, "blue", "gate below 0"),
    (never, "vermilion", "gate below 0\non all tokens"),
):
    axes[1].plot(values, color=style.COLOURS[colour], label=name)
axes[1].set(xlabel="layer of SmolLM2", ylabel="%", ylim=(-3, 103), xlim=(0, 29))
style.label_lines(axes[1], size=11)
plt.show()
print(f"gates below 0: {min(shut):.0f} % to {max(shut):.0f} %; below 0 on all 100 tokens: "
      f"at most {max(never):.1f} % of a layer's units")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Gates sit just left of zero: more than half of them negative in most layers, and hardly a unit
# that is negative on every token. Not shut, as ReLU would be; but in every layer a tenth of
# the units holds most of the energy. Can one leave the rest out? Keep the largest share of each
# token's hidden units, zero the others, in all 30 layers:


# %% slideshow={"slide_type": "fragment"}
def loss_with(hidden_of):
    """SmolLM2's loss on the passage when each layer's hidden units are hidden_of(gate, up)."""

    def replace(mlp, args, _):
        return mlp.down_proj(hidden_of(mlp.gate_proj(args[0]), mlp.up_proj(args[0])))

    handles = [layer.mlp.register_forward_hook(replace) for layer in smollm2.model.layers]
    with torch.no_grad():
        loss = smollm2(tokens, labels=tokens).loss.item()
    for handle in handles:
        handle.remove()
    return loss


def keep_largest(share):
    def hidden_of(gate, up):
        hidden = act.swiglu(gate, up)
        smallest = hidden.abs().topk(int(share * hidden.shape[-1]), -1).values[..., -1:]
        return hidden * (hidden.abs() >= smallest)

    return hidden_of


right = loss_with(act.swiglu)
table(
    ("hidden units kept", "loss", "perplexity"),
    *[(f"{100 * share:.0f} %", round(loss, 2), round(math.exp(loss)))
      for share, loss in ((s, right if s == 1 else loss_with(keep_largest(s)))
                          for s in (1, 0.5, 0.25, 0.1))],
)  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Half of the hidden units can go, token by token, and the loss hardly moves; a quarter left, and
# it is felt. This is *activation sparsity*, which inference engines try to turn into time (for
# instance CATS, arXiv 2404.08763). The catch: which half, one knows after computing the gate.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# The layer, separate and packed, beside transformers' `LlamaMLP` and `Phi3MLP`; the curves beside
# torch's:
#
# <!-- notes: For home, or one minute: ask why the packed layer agrees with Phi-3 to the last bit
# and with Llama only in tolerance. It is one matrix product of another shape, so the sums run in
# another order. Equality of bits needs the same operations, not only the same formula. -->

# %% slideshow={"slide_type": "fragment"}
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP

mlp = smollm2.model.layers[9].mlp
x = captured["model.layers.9.mlp.gate_proj"].input
assert isinstance(mlp, LlamaMLP)
phi3 = Phi3MLP(Phi3Config(hidden_size=576, intermediate_size=1536, pad_token_id=0))


def verdict(ours, theirs, is_exact):
    if is_exact:
        return "bit for bit" if torch.equal(ours, theirs) else "differs"
    error = (ours.double() - theirs.double()).abs() / (1 + theirs.double().abs())
    return "in tolerance" if error.max() < 16 * torch.finfo(ours.dtype).eps else "differs"


rows = [("", "float64", "float32", "bfloat16", "float16")]
lines = {name: [name] for name in (
    "SwiGLU, LlamaMLP", "FusedSwiGLU, Phi3MLP", "FusedSwiGLU, LlamaMLP",
    "gelu, F.gelu", "gelu tanh, F.gelu tanh", "swish, F.silu", "tanh, torch.tanh")}  # fmt: skip
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    theirs, z = mlp.to(dtype), x.to(dtype)
    ours = act.SwiGLU(576, 1536).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    fused = act.FusedSwiGLU.from_separate(ours)
    phi3.to(dtype).load_state_dict(fused.state_dict())
    with torch.no_grad():
        pairs = (
            (ours(z), theirs(z)), (fused(z), phi3(z)), (fused(z), theirs(z)),
            (act.gelu(z), F.gelu(z)),
            (act.gelu(z, approximate="tanh"), F.gelu(z, approximate="tanh")),
            (act.swish(z), F.silu(z)), (act.tanh(z), torch.tanh(z)),
        )  # fmt: skip
    for i, (line, pair) in enumerate(zip(lines.values(), pairs, strict=True)):
        line.append(verdict(*pair, is_exact=i < 2))
    mlp.float()
table(*rows, *lines.values())

# %% [markdown] slideshow={"slide_type": "fragment"}
# The layer itself, with the weights of a real model, is Llama's to the last bit in every dtype.
# (`act.silu` is torch's kernel for that reason; `act.swish` is the formula, one rounding away.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Published figures, recomputed
#
# Above: GELU's approximations (section 5), SiLU's minimum (5), the 2/3 rule and the Llama widths
# (7). One more: how much did the gate bring in the paper? T5 base models,
# log-perplexity on held-out text (arXiv 2002.05202, table 1):
#
# <!-- notes: For home. If you show it, cover the last two columns and ask whether 1.677 against
# 1.636 is much; in perplexity it is 4 %. Then compare the two columns of steps: GELU's lead over
# ReLU at 65,536 steps, 1.983 against 1.997, is gone at the end. Short runs rank wrongly. -->

# %% slideshow={"slide_type": "skip"}
published = {
    "ReLU": (1.997, 1.677),
    "GELU": (1.983, 1.679),
    "Swish": (1.994, 1.683),
    "GEGLU": (1.942, 1.633),
    "SwiGLU": (1.944, 1.636),
}
rows = [("", "65,536 steps", "524,288 steps", "perplexity, end", "less than ReLU")]
for kind, (early, late) in published.items():
    rows.append((kind, f"{early:.3f}", f"{late:.3f}", round(math.exp(late), 3),
                 f"{100 * (1 - math.exp(late - published['ReLU'][1])):.1f} %"))  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
table(*rows)
ours = (losses["SwiGLU"] - losses["ReLU"]).mean().item()
print("\nours, section 10: the same direction as the paper's:", ours < 0)

# %% [markdown] slideshow={"slide_type": "fragment"}
# A gate is worth about 4 % of perplexity there. GELU and Swish against ReLU: nothing after long
# training. Both agree with our small experiment in direction; the sizes cannot be compared.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. What breaks in practice
#
# **Question.** SmolLM2 again, one mistake at a time in all 30 layers, nothing retrained. Rank them
# before you look: GELU for SiLU; ReLU for SiLU; sigmoid for SiLU (that is GLU); the curve on `up`;
# on both; after the product; rows read interleaved.
#
# <!-- notes: For the end of the laboratory, ten minutes. Pairs rank the seven on paper, then the
# table. Most take ReLU for harmless, since it looks like SiLU from afar: loss 8.2. The dangerous
# line is GELU, 94 instead of 37 in perplexity, since it still writes English. Ask how each would
# have been caught in review. -->


# %% slideshow={"slide_type": "skip"}
def read_interleaved(gate, up):
    both = torch.cat((gate, up), -1)
    return act.swiglu(both[..., ::2], both[..., 1::2])


mistakes = {
    "GELU for SiLU": act.geglu,
    "x sigmoid(1.702 x) for SiLU": lambda g, u: act.gelu(g, approximate="sigmoid") * u,
    "ReLU for SiLU": act.reglu,
    "curve on both": lambda g, u: act.silu(g) * act.silu(u),
    "sigmoid for SiLU": act.glu,
    "curve on up (halves exchanged)": lambda g, u: act.swiglu(u, g),
    "curve after the product": lambda g, u: act.silu(g * u),
    "rows read interleaved": read_interleaved,
}

# %% slideshow={"slide_type": "fragment"}
results = {"right": right} | {name: loss_with(formula) for name, formula in mistakes.items()}
table(
    ("", "loss", "perplexity"),
    *[(name, f"{loss:.1f}", round(math.exp(loss)) if loss < 6 else "> 1000")
      for name, loss in sorted(results.items(), key=lambda item: item[1])],
)  # fmt: skip
print(f"\nguessing among 49,152 tokens: {math.log(49152):.1f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Felt:** GELU for SiLU doubles the perplexity. The text still reads like English: the kind of
#   fault that is blamed on the quantisation, or on the prompt.
# - **Fatal:** everything else. ReLU cuts off the negative lobe of SiLU, on which, as section 11
#   shows, most of these gates sit. And the exchanged halves, which run without any complaint,
#   are worse than guessing.
#
# In training from scratch all of these *learn* (a layer with the curve on `up` is the same family
# with other names). So a falling loss proves nothing; loading a checkpoint does.
#
# Also seen in practice: a slope from a rounded value (section 3), a learning rate that kills units
# in twenty steps (4), a packed matrix cut in one piece (8), the width $4D$ kept (7: half as many
# weights again), and `F.gelu` for a checkpoint that was trained with the tanh form.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Summary
#
# - Without a curve all layers are one matrix. The slope of the curve multiplies the gradient.
# - Sigmoid and tanh go flat at both ends. Whether gradients vanish depends on curve *and* weights.
# - A ReLU unit learns from the inputs where $x>0$. Dead is one that no input reaches; large steps
#   kill, small first steps prevent it.
# - GELU is $x\,\Phi(x)$, SiLU is $x\,s(x)$; they differ by up to 0.19 and are no substitutes.
# - SwiGLU is $W_{\text{down}}(\text{silu}(W_{\text{gate}}x)\odot W_{\text{up}}x)$, the curve on the
#   gate alone, at 2/3 of the width, rounded up.
# - Packed weights have an order that nothing in the file tells. Cut gate and up apart.
# - Keep gate and up; compute the rest again.
#
# **Next.** Chapter 03 gives tokens a position; chapter 05 stacks this layer and attention into
# Llama; chapter 13 cuts it between devices.
#
# **Further reading.** Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU, SiLU). Ramachandran, Zoph
# and Le 2017, 1710.05941 (Swish, found by search). Shazeer 2020, 2002.05202 (the gates). He et al.
# 2015, 1502.01852 (weights for ReLU). Schoenholz et al. 2017, 1611.01232 (when gradients survive
# depth). Dauphin et al. 2016, 1612.08083 (GLU).
#
# <!-- notes: Students should be able to read a slope as a gradient's fate, to say what a dead unit
# is and what it is not, and to write SwiGLU with its width from memory. Laboratory: `soft_cap`,
# `gelu`, `fused_feed_forward`, `swish_backward`, `feed_forward_plan`. Chapter 03 turns to what
# neither norm nor curve can see: where a token stands. -->
