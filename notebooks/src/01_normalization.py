# %% [markdown] slideshow={"slide_type": "slide"}
# # 01 Normalisation
#
# A deep network multiplies. A factor of 1.4 a layer, harmless once, is ten million after 48 layers.
# A norm is the part that forbids this: it brings every token back to a fixed scale, thousands of
# times in one forward pass.
#
# In this chapter you build LayerNorm, RMSNorm and BatchNorm, derive their gradients, see why the
# *place* of the norm decides how deep a network can train, and find out which of the usual mistakes
# ruin a real trained model and which nobody would ever notice.
#
# You need: matrix products, the chain rule, PyTorch tensors. Attention appears once as a closed
# box; chapter 04 opens it.
#
# <!-- notes: The lecture has 65 minutes for this chapter: 35 for sections 1 to 5, 30 for 6 to 10.
# Sections 1 to 4 and 9 to 10 carry the story; leave 11 to 13 for home. Section 14 is the best
# discussion: keep it for the last quarter of the laboratory and collect rankings on the board
# before you show the table. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory are enough. The whole notebook runs in
# > about half a minute. The two slow experiments: training four small transformers (section 10;
# > shrink `NUM_STEPS`), and SmolLM2-135M on one page of text (sections 2 and 14; about a second a
# > pass; fetched once by `make model`).

# %% slideshow={"slide_type": "skip"}
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import reference.normalization as norms
from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.pretrained import capture, load_smollm2, passage

torch.set_num_threads(1)
style.use()
COLOUR = {
    "no norm": style.COLOURS["black"],
    "Post-LN": style.COLOURS["vermilion"],
    "Pre-LN": style.COLOURS["blue"],
    "Sandwich-LN": style.COLOURS["sky"],
    "DeepNorm": style.COLOURS["green"],
}

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. What goes wrong without it
#
# **Question.** A transformer adds the output of each sublayer to its input: $x \leftarrow x +
# f(x)$. The weights are initialised so that $f$ keeps the size of what it gets. How large is $x$
# after 48 layers?
#
# Guess before you run the next cells: about the same, some ten times larger, or something else?
#
# <!-- notes: Let the room vote; "some ten times" wins. On the board: adding two independent vectors
# of equal size gives sqrt(2), so the honest guess is 2^(96/2) for 96 sublayers. The FFN passes less
# than that, because of the ReLU: the figure will show 1.58 a layer, not 2. Five minutes for this
# section. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# The test bench of the chapter: a small decoder, as plain as it can be.


# %% slideshow={"slide_type": "skip"}
class SelfAttention(nn.Module):
    """A sublayer that mixes positions. A closed box here; chapter 04 opens it."""

    def __init__(self, dim, gain):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for layer, g in ((self.q, 1), (self.k, 1), (self.v, gain), (self.o, gain)):
            nn.init.xavier_normal_(layer.weight, gain=g)

    def forward(self, x):
        q, k, v = (f(x).unsqueeze(1) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class FeedForward(nn.Sequential):
    """A sublayer that works on each position by itself."""

    def __init__(self, dim, gain):
        wide = 4 * dim
        super().__init__(
            nn.Linear(dim, wide, bias=False), nn.ReLU(), nn.Linear(wide, dim, bias=False)
        )
        for layer in (self[0], self[2]):
            nn.init.xavier_normal_(layer.weight, gain=gain)


# %% [markdown] slideshow={"slide_type": "subslide"}
# The test bench: a small decoder, 48 layers of attention and feed-forward. `residual` is the one
# place where the variants differ; each wrapper is three lines long in
# `reference/normalization/residual.py`.


# %% slideshow={"slide_type": "fragment"}
def residual(placement, sublayer, dim, alpha):
    norm = norms.LayerNorm(dim)
    match placement:
        case "no norm":
            return norms.PreNorm(sublayer, nn.Identity())
        case "Post-LN":
            return norms.PostNorm(sublayer, norm)
        case "Pre-LN":
            return norms.PreNorm(sublayer, norm)
        case "Sandwich-LN":
            return norms.SandwichNorm(sublayer, norm, norms.LayerNorm(dim))
        case "DeepNorm":
            return norms.DeepNorm(sublayer, norm, alpha=alpha)


# %% slideshow={"slide_type": "skip"}
class Decoder(nn.Module):
    def __init__(self, placement, num_layers, dim, vocabulary, alpha=None):
        super().__init__()
        beta = 1.0
        if placement == "DeepNorm":
            constants = norms.deepnorm_constants(num_layers)
            alpha, beta = alpha or constants.alpha, constants.beta
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                residual(placement, SelfAttention(dim, beta), dim, alpha),
                residual(placement, FeedForward(dim, beta), dim, alpha),
            )
            for _ in range(num_layers)
        )
        has_last_norm = placement in ("Pre-LN", "Sandwich-LN")
        self.last_norm = norms.LayerNorm(dim) if has_last_norm else nn.Identity()
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.xavier_normal_(self.head.weight)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_norm(x))


# %% [markdown] slideshow={"slide_type": "skip"}
# The text: the opening of *Alice's Adventures in Wonderland*, one token a character.

# %% slideshow={"slide_type": "skip"}
text = passage()
alphabet = sorted(set(text))
characters = torch.tensor([alphabet.index(c) for c in text])


def batch_of_text(num_sequences, seq_len, generator):
    starts = torch.randint(len(characters) - seq_len - 1, (num_sequences,), generator=generator)
    windows = torch.stack([characters[i : i + seq_len + 1] for i in starts])
    return windows[:, :-1], windows[:, 1:]


def loss_of(model, tokens, targets):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


print(f"{len(characters)} characters, {len(alphabet)} different: {text[:47]!r}")


# %% slideshow={"slide_type": "subslide"}
def size_of_the_stream(placement, num_layers=48, dim=64):
    """Root mean square of x after each block, at initialisation."""
    torch.manual_seed(0)
    model = Decoder(placement, num_layers, dim, len(alphabet))
    tokens, targets = batch_of_text(8, 32, torch.Generator().manual_seed(1))
    sizes = []
    with torch.no_grad():
        x = model.embed(tokens)
        for block in model.blocks:
            sizes.append(x.square().mean().sqrt().item())
            x = block(x)
        return [*sizes, x.square().mean().sqrt().item()], loss_of(model, tokens, targets).item()


figure, ax = plt.subplots(figsize=(11, 3.3))
for placement in ("no norm", "Pre-LN", "Post-LN"):
    sizes, loss = size_of_the_stream(placement)
    ax.semilogy(sizes, label=placement, color=COLOUR[placement])
    print(f"{placement:8} rms of x after 12 layers: {sizes[12]:8.2g}   after 48: {sizes[-1]:8.2g}"
          f"   first loss: {loss:8.2g}")  # fmt: skip
    if placement == "no norm":
        factor = (sizes[-1] / sizes[0]) ** (1 / 48)
        overflow = next(i for i, size in enumerate(sizes) if 4 * size > 65504)
ax.axhline(65504, color="0.5", lw=1, ls="--")
ax.text(0.5, 9e4, "largest float16", color="0.4")
ax.set(xlabel="layer (48, untrained)", ylabel="rms of the residual stream", xlim=(0, 48))
style.label_lines(ax)
plt.show()
print(f"without a norm: a factor of {factor:.2f} a layer; four-sigma values leave float16 at layer "
      f"{overflow}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# Without a norm the stream grows by a constant *factor* a layer. Pre-LN lets it grow, but slowly:
# each sublayer sees normalised input, so what it adds has a fixed size, and sizes add up like
# $\sqrt{\text{layer}}$: with four times the layers, twice the size. Post-LN pins it to 1.
#
# <!-- notes: Read the slope first: a straight line on a logarithmic axis is a factor a layer. Then
# Pre-LN, 3.3 after 12 layers and 7.4 after 48: ask which law doubles when the depth is four times
# as large. Last the dashed line: float16 is left at layer 21, before any training. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# (One can also do without norms by scaling the initial weights with depth: Zhang et al. 2019,
# Fixup, arXiv 1901.09321. A norm holds at every step of training; an initialisation, at the
# first.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. LayerNorm
#
# **Question.** To bring a number to unit scale we need statistics. *Whose?* Here are 6 tokens of a
# trained model with their first 10 features. LayerNorm takes a row, BatchNorm a column.
#
# <!-- notes: Ask first which of the two boxes is available when a model writes one token for one
# user. Leave it open; section 7 answers it. The usual confusion is that LayerNorm normalises "the
# layer", that is the whole rectangle: trace the row with your finger, one token and its own
# features, nothing else. -->

# %% slideshow={"slide_type": "skip"}
smollm2, tokenizer = load_smollm2()
tokens = tokenizer(text, return_tensors="pt").input_ids
num_layers = smollm2.config.num_hidden_layers
watched = [f"model.layers.{i}.input_layernorm" for i in range(num_layers)] + ["model.norm"]
stream = [a.input[0] for a in capture(smollm2, tokens, watched).values()]  # each (T, D)
hidden = stream[9]
print(f"SmolLM2: {tokens.shape[1]} tokens of Alice, residual stream {tuple(hidden.shape)} a layer")

# %% slideshow={"slide_type": "fragment"}
sample = hidden[20:26, :10]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, title, corner, shape in (
    (axes[0], "LayerNorm, RMSNorm: one token", (-0.5, 1.5), (10, 1)),
    (axes[1], "BatchNorm: one feature, all tokens", (2.5, -0.5), (1, 6)),
):
    image = ax.imshow(sample, cmap="coolwarm", vmin=-8, vmax=8, aspect="auto")
    ax.add_patch(plt.Rectangle(corner, *shape, fill=False, lw=4, color="black"))
    ax.set(
        title=title, xlabel="feature", ylabel="token", yticks=range(6), yticklabels=range(20, 26)
    )
    ax.grid(False)
figure.colorbar(image, ax=axes, label="activation")
plt.show()
print(
    "rms of each token over these 10 features:",
    [round(v, 1) for v in sample.square().mean(1).sqrt().tolist()],
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# LayerNorm (Ba, Kiros, Hinton 2016, arXiv 1607.06450, eq. 4) uses the token's own $D$ features:
#
# $$\mu=\frac1D\sum_i x_i\qquad \sigma^2=\frac1D\sum_i (x_i-\mu)^2\qquad
# y_i=\frac{x_i-\mu}{\sqrt{\sigma^2+\varepsilon}}\,w_i+b_i$$
#
# Two details that copies get wrong: the variance divides by $D$, not by $D-1$ (it normalises these
# numbers, it does not estimate a population), and $\varepsilon$ stands *under* the root.
#
# <!-- notes: Let them do 1, 2, 3, 4 on paper: mean 2.5, variance 1.25 with D and 1.67 with D - 1.
# The table's last line is the check: 1.0 against 0.866. With 576 features nobody would see the
# difference. Exercise `layer_norm` belongs to the laboratory, 15 minutes. -->

# %% slideshow={"slide_type": "fragment"}
y = norms.layer_norm(hidden)
table(
    ("", "token 20", "token 21", "token 22"),
    ("mean before", *hidden[20:23].mean(-1).tolist()),
    ("std before", *hidden[20:23].std(-1, correction=0).tolist()),
    ("mean after", *[round(v, 4) + 0.0 for v in y[20:23].mean(-1).tolist()]),
    ("std after", *y[20:23].std(-1, correction=0).tolist()),
)
narrow = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
print("\nstd with D:", norms.layer_norm(narrow).std(correction=0).item().__round__(4),
      "  with D - 1 in the norm:",
      ((narrow - 2.5) / narrow.std()).std(correction=0).item().__round__(4))  # fmt: skip

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `layer_norm`** (build, 15 minutes, difficulty 1 of 3). In `exercises/normalization.py`,
# along any dimension, in any dtype. (The half-precision rule in its docstring is explained in
# section 4; the check tells you if it is missing.)

# %% slideshow={"slide_type": "skip"}
check("layer_norm")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. RMSNorm
#
# **Question.** LayerNorm does two things: it removes the mean, and it fixes the scale. Which of the
# two does a network need? Look at a trained one: how much of a token's energy
# $\frac1D\sum_i x_i^2$ is in its mean, $\mu^2$?
#
# <!-- notes: Most guess a third or a half. Give them a minute for the baseline: one fixed direction
# among 576 holds 1/576 of the energy, 0.17 %. The measured mean over layers is 0.12 %, so below
# chance. Objection that comes: this model never had a reason to use its mean. True, and said on the
# slide. -->

# %% slideshow={"slide_type": "fragment"}
share = [(x.mean(-1).square() / x.square().mean(-1)).mean().item() for x in stream]
figure, ax = plt.subplots(figsize=(11, 2.4))
ax.bar(range(len(share)), [100 * s for s in share], color=style.COLOURS["blue"])
ax.set(xlabel="layer of SmolLM2", ylabel="share of the mean, %", ylim=(0, 1))
plt.show()
print(f"mean over layers: {100 * sum(share) / len(share):.2f} %; largest: {100 * max(share):.2f} %")
assert max(share) < 0.01

# %% [markdown] slideshow={"slide_type": "fragment"}
# Well below one per cent (for random directions it would be $1/D = 0.17\,\%$). This model was
# trained with RMSNorm and never asked to have mean zero; there is little left to remove.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Zhang and Sennrich (2019, arXiv 1910.07467, eq. 4) drop the mean:
#
# $$y_i=\frac{x_i}{\sqrt{\frac1D\sum_j x_j^2+\varepsilon}}\,w_i$$
#
# One reduction instead of two, one parameter vector instead of two. Llama uses it (arXiv
# 2302.13971, sec. 2.2), and with it SmolLM2, which has the same architecture.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **A picture of both.** In three dimensions RMSNorm sends every point to a sphere: it forgets the
# length. LayerNorm first drops the component along $(1,1,1)$, so its outputs lie on one circle of
# that sphere: it forgets length *and* mean. Remember this for section 8. (Colour: mean of the
# input.)
#
# <!-- notes: Before the figure, draw the axis (1,1,1) and ask what is left of the sphere when that
# component is gone. Some say a plane, some a point; it is a great circle. Two minutes, well spent:
# section 8 reads the lost directions of the gradient off this picture. -->

# %% slideshow={"slide_type": "fragment"}
points = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) * 2 + 0.5
figure = plt.figure(figsize=(12, 4))
for i, (name, after) in enumerate(
    (
        ("input", points),
        ("RMSNorm", norms.rms_norm(points)),
        ("LayerNorm", norms.layer_norm(points)),
    )
):
    ax = figure.add_subplot(1, 3, i + 1, projection="3d")
    ax.scatter(*after.T, c=points.mean(1), cmap="viridis", s=14, depthshade=False)
    limit = 6 if name == "input" else 2
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-limit, limit), title=name)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", zlabel="$x_3$")
    ax.zaxis.set_rotate_label(False)
    ticks = (-limit / 2, 0, limit / 2)
    ax.set(xticks=ticks, yticks=ticks, zticks=ticks)
    ax.set_box_aspect(None, zoom=0.92)
    ax.view_init(elev=18, azim=35)
plt.show()
print(
    "length after RMSNorm, all points:",
    f"{norms.rms_norm(points).norm(dim=1).mean():.3f} = sqrt(3)",
)
print("largest |sum| after LayerNorm:   ", f"{norms.layer_norm(points).sum(1).abs().max():.3f}")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `rms_norm`** (build, 10 minutes, difficulty 1 of 3). Over as many trailing dimensions
# as the weight has: one for a token, two if heads are normalised together.

# %% slideshow={"slide_type": "skip"}
check("rms_norm")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. Half precision and eps
#
# **Question.** The model runs in float16, whose largest number is 65,504. How large may an
# activation be before RMSNorm breaks?
#
# First look at how large they *are*.
#
# <!-- notes: The usual answer is 65,504; the right one is 256, since the square has to fit. Do not
# give it away: the dashed line does. Ask instead where the largest number of the model sits. Nobody
# expects the first token, one channel, 23,989, while other tokens have an rms of 6.3. -->

# %% slideshow={"slide_type": "fragment"}
largest = [x.abs().max().item() for x in stream]
typical = [x[1:].square().mean().sqrt().item() for x in stream]
figure, ax = plt.subplots(figsize=(11, 3.2))
ax.semilogy(largest, "o-", ms=4, color=style.COLOURS["vermilion"], label="largest |x|")
ax.semilogy(typical, color=style.COLOURS["blue"], label="rms (first token left out)")
ax.axhline(256, color="0.5", lw=1, ls="--")
ax.text(16.3, 290, "its square leaves float16", color="0.4", fontsize=11)
ax.set(xlabel="layer of SmolLM2", ylabel="residual stream", xlim=(0, 30))
style.label_lines(ax)
plt.show()
massive = [layer for layer, x in enumerate(largest) if x > 10_000]
print(f"above 10,000: layers {massive[0]} to {massive[-1]}, {len(massive)} of them")
position, channel = divmod(stream[15].abs().argmax().item(), 576)
print(f"layer 15: |x| = {largest[15]:,.0f} at token {position} "
      f"({tokenizer.decode(tokens[0, 0])!r}), channel {channel};\n"
      f"rms of that token {stream[15][0].square().mean().sqrt():,.0f}, of the others "
      f"{typical[15]:.1f}")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# From layer 12 to 28 one channel of the very first token is thousands of times larger than a
# typical value. Trained transformers grow such *massive activations* (Sun et al. 2024, arXiv
# 2402.17762).

# %% [markdown] slideshow={"slide_type": "subslide"}
# And 24,000 fits float16; its square does not. The first three tokens of layer 15, normalised with
# squares in float16 and in float32:
#
# <!-- notes: Ask what comes out for token 0: inf, nan, or a number? Most say nan. It is 0, since
# rsqrt(inf) is 0, and zero is the worst of the three: no warning, no crash. Let somebody say the
# upcast rule in own words before you show it: widen, compute, round once. -->

# %% slideshow={"slide_type": "fragment"}
x = stream[15][:3].half()
in_half = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
in_float = norms.rms_norm(x, eps=1e-5)
table(
    ("rms of the output", "token 0", "token 1", "token 2"),
    ("squares in float16", *in_half.float().square().mean(-1).sqrt().tolist()),
    ("squares in float32", *in_float.float().square().mean(-1).sqrt().tolist()),
)
print(
    "\nsquare of 255 and 256 in float16:",
    [torch.tensor(v).half().square().item() for v in (255.0, 256.0)],
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# `inf` in the mean square gives `rsqrt(inf) = 0`: the token silently becomes zero, no NaN, no
# warning. Hence the **upcast rule** that every production norm follows: *widen to float32, take
# the statistics and the quotient there, round once to the input's dtype.* What that is worth in a
# trained model, you will see in section 14.
#
# When to round is a matter of convention. Llama rounds the quotient, then multiplies by the weight;
# torch multiplies in float32 and rounds at the end. Bit-exact parity needs the right one:

# %% slideshow={"slide_type": "fragment"}
weight = smollm2.model.layers[15].input_layernorm.weight.detach()
for dtype in (torch.float32, torch.bfloat16):
    x, w = stream[15].to(dtype), weight.to(dtype)
    same = norms.rms_norm(x, w, eps=1e-5) == F.rms_norm(x, (576,), w, 1e-5)
    print(f"{str(dtype):14} Llama's order equals torch's in {100 * same.float().mean():.0f} %")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **And eps?** It is there for tokens near zero. Under the root it guards an rms of
# $\sqrt{\varepsilon}$: with $10^{-6}$, an rms of 0.001. Outside the root the same number would
# guard an rms of 0.000001 only. And in float16 a small eps is not even a number:
#
# <!-- notes: Ask for the smallest rms that eps = 1e-6 protects; half of the room forgets the root.
# In the figure after the table, every dot stands at rms = sqrt(eps), where the output is 0.707. The
# dashed line is the same 1e-6 outside the root: three decades further left. -->

# %% slideshow={"slide_type": "fragment"}
table(
    ("eps", "1e-05", "1e-06", "1e-07", "1e-08"),
    ("held in float16 as", *[torch.tensor(10.0**-k).half().item() for k in (5, 6, 7, 8)]),
    ("spacing there", *["6e-08"] * 4),
)
zero = torch.zeros(1, 4, dtype=torch.float16)
print(
    "\na zero token, eps = 1e-8 in float16:",
    (zero / (zero.square().mean(-1, keepdim=True) + torch.tensor(1e-8).half()).sqrt()).tolist()[0],
)
print("the same with the upcast rule:      ", norms.rms_norm(zero, eps=1e-8).tolist()[0])

# %% slideshow={"slide_type": "subslide"}
sizes = torch.logspace(-7, 1, 60)
direction = F.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0) * 8
figure, ax = plt.subplots()
for eps, colour in ((1e-5, "blue"), (1e-6, "green"), (1e-8, "orange")):
    out = norms.rms_norm(sizes[:, None] * direction, eps=eps).square().mean(-1).sqrt()
    ax.loglog(sizes, out, color=style.COLOURS[colour], label=f"eps {eps:g}")
    ax.plot([math.sqrt(eps)], [math.sqrt(0.5)], "o", color=style.COLOURS[colour])
outside = sizes / (sizes + 1e-6)
ax.loglog(sizes, outside, "--", color=style.COLOURS["vermilion"])
ax.text(1e-7, 0.72, "1e-6 outside\nthe root", color=style.COLOURS["vermilion"])
ax.text(1.6e-6, 0.02, "1e-8", color=style.COLOURS["orange"], ha="right")
ax.text(1.6e-5, 0.02, "1e-6", color=style.COLOURS["green"], ha="right")
ax.text(8e-5, 0.02, "eps = 1e-5 under the root", color=style.COLOURS["blue"])
ax.set(xlabel="rms of the input", ylabel="rms of the output", ylim=(1e-2, 2))
plt.show()
half_way = norms.rms_norm(math.sqrt(1e-6) * direction, eps=1e-6).square().mean().sqrt()
print(f"at rms = sqrt(eps) the output has rms {half_way:.4f} = 1 / sqrt(2)")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. What each norm cannot see
#
# A norm is defined by what it ignores. Take a linear layer with a norm behind it,
# $y=\text{norm}(Wx)$. Change the weights or the data; does the output change?
#
# Guess for LayerNorm and RMSNorm, then compare with the table in the papers (LayerNorm, table 1;
# RMSNorm, table 1). WN is weight normalisation, $w \to g\,w/\lVert w\rVert$ (arXiv 1602.07868).
#
# - **Weights:** all of $W$ times 3; the same vector added to each of its rows; one row times 5
# - **Data:** all cases times 3; the same vector added to all cases; one case times 5
#
# <!-- notes: 24 entries; have pairs fill in the two columns LayerNorm and RMSNorm in two minutes.
# The row that divides the room is the shifted W: only LayerNorm ignores it. Then the last row, the
# scale of one case, and why a residual stream needs it. End of the first 35 minutes. -->

# %% slideshow={"slide_type": "subslide"}
generator = torch.Generator().manual_seed(0)
W = torch.randn(12, 8, generator=generator, dtype=torch.float64)
X = torch.randn(32, 8, generator=generator, dtype=torch.float64) + 0.5
shift = torch.randn(8, generator=generator, dtype=torch.float64)
one_row = torch.ones(12, 1, dtype=torch.float64)
one_row[3] = 5.0
one_case = torch.ones(32, 1, dtype=torch.float64)
one_case[7] = 5.0

methods = {
    "BatchNorm": lambda W, X: norms.batch_norm(X @ W.T, training=True, eps=0.0).y,
    "WeightNorm": lambda W, X: X @ F.normalize(W, dim=1).T,
    "LayerNorm": lambda W, X: norms.layer_norm(X @ W.T, eps=0.0),
    "RMSNorm": lambda W, X: norms.rms_norm(X @ W.T, eps=0.0),
}
changes = {
    "W scaled": (3 * W, X),
    "W shifted": (W + shift, X),
    "one row of W scaled": (one_row * W, X),
    "data scaled": (W, 3 * X),
    "data shifted": (W, X + shift),
    "one case scaled": (W, one_case * X),
}
papers = {
    "BatchNorm": "yes no yes yes yes no",
    "WeightNorm": "yes no yes no no no",
    "LayerNorm": "yes yes no yes no yes",
    "RMSNorm": "yes no no yes no yes",
}
rows = [("invariant to", *methods)]
for i, (change, (W_changed, X_changed)) in enumerate(changes.items()):
    row = [change]
    for name, method in methods.items():
        is_same = torch.allclose(method(W, X), method(W_changed, X_changed), atol=1e-8)
        assert is_same == (papers[name].split()[i] == "yes")
        row.append(f"{'yes' if is_same else 'no'} ({papers[name].split()[i]})")
    rows.append(row)
table(*rows)
print("\ncomputed (paper): all 24 entries agree")

# %% [markdown] slideshow={"slide_type": "fragment"}
# LayerNorm and RMSNorm differ in one entry: a shift common to all rows of $W$. The paper's bet is
# that this one does not matter; section 3 suggests why.
#
# Read the last line: LayerNorm and RMSNorm ignore the scale of a *single* case, BatchNorm does not.
# That is the property that a residual stream needs, where the first token is more than a hundred
# times larger than its neighbours (section 4).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. BatchNorm
#
# BatchNorm (Ioffe and Szegedy 2015, arXiv 1502.03167) normalises a channel by the batch. So an
# example's output depends on its neighbours, and at inference there may be none. Hence two modes:
#
# | | normalises by | variance | running statistics |
# |---|---|---|---|
# | training | this batch | by $n$ | $(1-m)\,\text{running} + m\,\text{batch}$, variance by $n-1$ |
# | evaluation | running statistics | | untouched |
#
# Why $n$ in one place and $n-1$ in the other? The first *normalises these numbers*; the second
# *estimates the population* that evaluation will meet. With small batches the difference is
# visible:
#
# <!-- notes: Ask for the running variance with batches of two and division by n, when the truth is
# 4: it is half of it, 1.991. Then the trap of every code review: momentum 0.1 is the share of the
# new batch, not of the old value. Five minutes; exercise `BatchNorm` is for home. -->

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
population = torch.randn(4096, 256, generator=generator) * 2.0
rows = [("batch size", "running_var, n - 1", "with n instead", "truth")]
for n in (2, 4, 16, 64):
    norm = norms.BatchNorm(256, momentum=None)
    biased = []
    for chunk in population[: 32 * n].split(n):
        norm(chunk)
        biased.append(chunk.var(0, correction=0).mean().item())
    rows.append((n, norm.running_var.mean().item(), sum(biased) / len(biased), 4.0))
table(*rows)
one_step = norms.batch_norm(
    torch.tensor([[1.0], [3.0]]), torch.zeros(1), torch.ones(1), training=True, momentum=0.1
)
print(f"\nbatch mean 2, running mean 0, momentum 0.1: {one_step.running_mean.item():.1f}")
print("momentum is the share of the NEW batch")

# %% [markdown] slideshow={"slide_type": "subslide"}
# In evaluation BatchNorm is one multiplication and one addition a channel, with constants. It can
# disappear into the linear layer before it, which neither LayerNorm nor RMSNorm can:
#
# <!-- notes: Ask why not: their statistics come from the token itself, so there is no constant to
# fold. One minute. -->

# %% slideshow={"slide_type": "fragment"}
linear = nn.Linear(16, 8)
x = torch.randn(5, 16, generator=generator)
mean, var = torch.randn(8, generator=generator), torch.rand(8, generator=generator) + 0.5
scale = torch.rsqrt(var + 1e-5)
folded = F.linear(x, scale[:, None] * linear.weight, (linear.bias - mean) * scale)
unfolded = norms.batch_norm(linear(x), mean, var).y
print("folded equals unfolded:", torch.allclose(folded, unfolded, atol=1e-5))

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `BatchNorm`** (build, 20 minutes, difficulty 2 of 3). A class; the function
# `run_batch_norm` below it trains and evaluates it for the grader.

# %% slideshow={"slide_type": "skip"}
check("BatchNorm")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. When the batch cannot be trusted
#
# **Question.** Why do language models not use BatchNorm? Take one token of SmolLM2's stream and
# normalise it together with $n-1$ randomly chosen neighbours. How much does its output depend on
# who they are?
#
# <!-- notes: With n = 2 the answer can be found without a computer: two numbers, centred and
# scaled, are +1 and -1. Let somebody do it on the board. Then take up the question of section 2:
# one token for one user is n = 1, and there BatchNorm has no variance at all. Five minutes. -->

# %% slideshow={"slide_type": "fragment"}
pool = stream[9][1:]  # without the massive first token
generator = torch.Generator().manual_seed(0)
counts = [2, 4, 8, 16, 32, 64, 128, 256]
wobble = []
for n in counts:
    outputs = torch.stack([
        norms.batch_norm(
            torch.cat([pool[:1], pool[torch.randint(1, len(pool), (n - 1,), generator=generator)]]),
            training=True,
        ).y[0]
        for _ in range(60)
    ])  # fmt: skip
    wobble.append(outputs.std(0).mean().item())
figure, ax = plt.subplots(figsize=(11, 3.2))
ax.loglog(counts, wobble, "o-", color=style.COLOURS["vermilion"], label="BatchNorm")
ax.loglog(
    counts, [wobble[2] * math.sqrt(8 / n) for n in counts], ":", color="0.5", label="1 / sqrt(n)"
)
ax.set(xlabel="tokens in the batch", ylabel="std of one token's output", ylim=(0.03, 2))
ax.set_xticks(counts, [str(n) for n in counts], minor=False)
ax.minorticks_off()
style.label_lines(ax)
plt.show()
table(
    ("tokens in the batch", *counts),
    ("BatchNorm", *[round(w, 2) for w in wobble]),
    ("LayerNorm, RMSNorm", *[0] * len(counts)),
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The output has standard deviation 1 by construction: with two tokens almost all of it is noise
# from the neighbour, and it falls only as $1/\sqrt n$. A norm that never looks at neighbours has
# none.

# %% [markdown] slideshow={"slide_type": "subslide"}
# Two limits of BatchNorm are worth knowing by heart, a batch of two tokens and a batch of one:

# %% slideshow={"slide_type": "fragment"}
pair = norms.batch_norm(pool[:2], training=True, eps=1e-12).y
print(
    "two tokens: every output is +1 or -1, whatever the input:",
    sorted({round(v, 2) for v in pair.flatten().tolist()}),
)
try:
    norms.batch_norm(pool[:1], training=True)
except ValueError as error:
    print("one token:", error)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Padded text.** Sequences have different lengths; short ones are filled up. If padding counts,
# then what a sentence means depends on how long its neighbour is. Here the same 40 real tokens
# with more and more padding (zeros) beside them:

# %% slideshow={"slide_type": "fragment"}
real = pool[:40]
alone = norms.batch_norm(real, training=True).y
rows = [("share of padding", "change of the real tokens", "with a mask")]
for num_padded in (0, 10, 40, 160):
    padded = torch.cat([real, torch.zeros(num_padded, real.shape[1])])
    naive = norms.batch_norm(padded, training=True).y[:40]
    masked = norms.batch_norm(padded[:40], training=True).y
    change = [(out - alone).square().mean().sqrt().item() for out in (naive, masked)]
    rows.append((f"{100 * num_padded / (40 + num_padded):.0f} %", *[round(c, 3) for c in change]))
table(*rows)

# %% [markdown] slideshow={"slide_type": "skip"}
# The mask repairs training on padded text; it does not repair generation, where the batch is one
# token. So language models normalise each token by itself.
#
# **Exercise `masked_batch_norm`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("masked_batch_norm")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. The backward pass
#
# **Question.** "RMSNorm costs gradients", notes say. Which ones, and how many?
#
# <!-- notes: Take answers first: "those of the mean", "all of them a little". Then do the RMSNorm
# line on the board, and leave LayerNorm's to the room: the picture of section 3, sphere and circle,
# says which directions must go. Ten minutes with the bar chart; students who lose the algebra keep
# the picture. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Write $\hat x = x\,r$ with $r = 1/\sqrt{\frac1D\sum x_j^2+\varepsilon}$, and $g_i =
# w_i\,\partial L/\partial y_i$. $x_k$ enters twice, in the numerator and in $r$; and $\partial
# r/\partial x_k = -r^3x_k/D$. So
#
# $$\frac{\partial L}{\partial x_k}=r\,g_k+\sum_i g_ix_i\frac{\partial r}{\partial x_k}
# = r\Big(g_k-\hat x_k\,\frac1D\sum_i g_i\hat x_i\Big).$$
#

# %% [markdown] slideshow={"slide_type": "fragment"}
# The bracket removes from $g$ its component along $\hat x$. LayerNorm's mean is a second, equal
# step:
#
# $$\text{LayerNorm:}\quad
# \frac{\partial L}{\partial x}=r\Big(g-\overline{g}-\hat x\,\overline{g\hat x}\Big)
# \qquad \frac{\partial L}{\partial w}=\sum_{\text{tokens}}\frac{\partial L}{\partial y}\hat x
# \qquad \frac{\partial L}{\partial b}=\sum_{\text{tokens}}\frac{\partial L}{\partial y}$$

# %% slideshow={"slide_type": "subslide"}
x = hidden[20, :16].double().clone()
jacobian = {
    "RMSNorm": torch.autograd.functional.jacobian(lambda t: norms.rms_norm(t, eps=0.0), x),
    "LayerNorm": torch.autograd.functional.jacobian(lambda t: norms.layer_norm(t, eps=0.0), x),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True)
for ax, (name, J) in zip(axes, jacobian.items(), strict=True):
    values = torch.linalg.svdvals(J)
    ax.bar(range(1, 17), values, color=style.COLOURS["blue"])
    ax.set(title=name, xlabel="direction", xticks=(1, 4, 8, 12, 16))
    lost = int((values < 1e-9).sum())
    print(f"{name:9} {lost} of 16 directions lost; all others times {values[0]:.4f}")
axes[0].set_ylabel("factor of the gradient")
axes[1].set_ylabel("factor of the gradient")
plt.show()
print(f"1 / rms = {1 / x.square().mean().sqrt():.4f},  1 / std = {1 / x.std(correction=0):.4f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# That is all: RMSNorm loses **one** direction, the one along $x$, because the output does not
# depend on the length of $x$. LayerNorm loses two. Every other direction comes back with the same
# factor $1/\text{rms}$: no squashing, no vanishing. Of 576 directions in SmolLM2, 575 pass.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The factor has a second use. If the weights before the norm grow by 10, the gradient they get
# shrinks by 10: the effective step tunes itself (LayerNorm, sec. 5.2; RMSNorm, sec. 4.2).
#
# <!-- notes: Ask what weight decay on this matrix then does, if its size changes nothing in the
# output. That is a question for the discussion: leave it on the board. The table shows the factor
# exactly: 0.4618, 0.0462, 0.0046. -->

# %% slideshow={"slide_type": "fragment"}
generator = torch.Generator().manual_seed(0)
rows = [("weights scaled by", "gradient norm")]
start = torch.randn(32, 16, generator=generator, dtype=torch.float64)
data, target = (torch.randn(64, n, generator=generator, dtype=torch.float64) for n in (16, 32))
for factor in (0.1, 1.0, 10.0):
    w = (factor * start).requires_grad_()
    (norms.rms_norm(data @ w.T, eps=0.0) - target).square().mean().backward()
    rows.append((factor, round(w.grad.norm().item(), 4)))
table(*rows)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **What backward must keep.** Autograd through the formula keeps every intermediate. By hand, $x$
# and one number a token suffice. `reference/normalization/backward.py` does so as
# `torch.autograd.Function`; torch 2.13's own `rms_norm` on CPU does not:
#
# <!-- notes: Let them compute before the table: x is 576 bfloat16 numbers, 1152 bytes, plus one
# float32, 4 bytes. By hand it is 1159 with the weight's share. torch's rms_norm keeps 4615 here.
# The exercise `add_rms_norm_backward` starts from this; 25 minutes in the laboratory. -->


# %% slideshow={"slide_type": "fragment"}
def kept_bytes(call):
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(storages.values())


x = hidden.bfloat16().requires_grad_()
w = weight.bfloat16().requires_grad_()
b = torch.zeros_like(w).requires_grad_()
layer_norm_by_hand, rms_norm_by_hand = norms.LayerNormFunction.apply, norms.RMSNormFunction.apply
num_tokens = x.shape[0]
table(
    ("bytes kept a token, bfloat16", "LayerNorm", "RMSNorm"),
    ("formula under autograd", kept_bytes(lambda: norms.layer_norm(x, w, b)) // num_tokens,
     kept_bytes(lambda: norms.rms_norm(x, w)) // num_tokens),
    ("torch", kept_bytes(lambda: F.layer_norm(x, (576,), w, b)) // num_tokens,
     kept_bytes(lambda: F.rms_norm(x, (576,), w, 1e-6)) // num_tokens),
    ("gradient by hand", kept_bytes(lambda: layer_norm_by_hand(x, w, b, 1e-5)) // num_tokens,
     kept_bytes(lambda: rms_norm_by_hand(x, w, 1e-6)) // num_tokens),
)  # fmt: skip
print(f"\nx itself: {2 * 576} bytes a token")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `add_rms_norm_backward`** (derive, 25 minutes, difficulty 3 of 3). The residual
# addition and the norm after it as one step, as inference and training engines fuse them. Two
# gradients arrive.

# %% slideshow={"slide_type": "skip"}
check("add_rms_norm_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Where the norm stands
#
# Four placements, each one line:
#
# | | $x_{\text{next}}$ | for instance in |
# |---|---|---|
# | Post-LN | $\text{norm}(x+f(x))$ | the original transformer (arXiv 1706.03762, sec. 3.1) |
# | Pre-LN | $x+f(\text{norm}(x))$, one last norm | Llama (arXiv 2302.13971, sec. 2.2) |
# | Sandwich-LN | $x+\text{norm}(f(\text{norm}(x)))$ | CogView (arXiv 2105.13290, sec. 2.4) |
# | DeepNorm | $\text{norm}(\alpha x+f(x))$ | DeepNet (arXiv 2203.00555, fig. 2) |
#
# **Question.** At initialisation, before any training: how large is the gradient that each layer's
# feed-forward weight receives, in a network of 6, 12, 24, 48 layers?
#
# <!-- notes: Vote on which placement has the flattest curve, and let each voter draw it in the air.
# DeepNorm wins; few expect it, as it looks like Post-LN. Compare in the table the column 48 / 6:
# Post-LN 0.91, all others near a third. Ten minutes with the theorem. -->

# %% slideshow={"slide_type": "subslide"}
PLACEMENTS = ("Post-LN", "Pre-LN", "Sandwich-LN", "DeepNorm")
DEPTHS = (6, 12, 24, 48)


PROBE = batch_of_text(8, 32, torch.Generator().manual_seed(1))


def with_gradients(placement, num_layers, alpha=None):
    """A fresh model after one backward pass."""
    torch.manual_seed(0)
    model = Decoder(placement, num_layers, 64, len(alphabet), alpha)
    loss_of(model, *PROBE).backward()
    return model


models = {p: [with_gradients(p, n) for n in DEPTHS] for p in PLACEMENTS}
at_start = {
    p: {
        len(model.blocks): [b[1].sublayer[2].weight.grad.norm().item() for b in model.blocks]
        for model in some
    }
    for p, some in models.items()
}
figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True)
for ax, placement in zip(axes.flat, PLACEMENTS, strict=True):
    for i, n in enumerate(DEPTHS):
        where = [(j + 0.5) / n for j in range(n)]
        ax.semilogy(where, at_start[placement][n], color=COLOUR[placement], alpha=0.4 + 0.2 * i,
                    lw=1.2 + 0.6 * i, label=f"{n} layers")  # fmt: skip
    ax.set(title=placement, xlabel="first to last layer", xticks=(0, 0.5, 1), ylim=(0.05, 4))
axes[0].set_ylabel("norm of the gradient")
axes[3].text(0.04, 0.6, "thin to thick:\n6, 12, 24, 48 layers")
plt.show()
table(
    ("gradient norm, last layer", *[f"{n} layers" for n in DEPTHS], "48 / 6"),
    *[(p, *[round(at_start[p][n][-1], 2) for n in DEPTHS],
       round(at_start[p][48][-1] / at_start[p][6][-1], 2)) for p in PLACEMENTS],
)  # fmt: skip
spread = max(max(norms_) / min(norms_) for norms_ in at_start["DeepNorm"].values())
print(f"DeepNorm, largest layer over smallest, at any depth: at most {spread:.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Post-LN: large at every depth. Adding layers does not make the last one's gradient smaller, so
# the same learning rate makes 96 sublayers move as far, each, as 12 did. Pre-LN: the deeper, the
# smaller at the end. DeepNorm: small, and equal from first layer to last.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Theorem 1 of Xiong et al. (2020, arXiv 2002.04745), recomputed.** For the last feed-forward
# weight, with Xavier weights and zero query and key weights at the start,
#
# $$\Big\lVert\frac{\partial L}{\partial W^{2}_{\text{last}}}\Big\rVert \le
# O\big(d\sqrt{\ln d}\big)\ \text{for Post-LN},\qquad
# O\big(d\sqrt{\ln d / N}\big)\ \text{for Pre-LN.}$$
#
# So the first should not depend on the number of layers $N$, and the second should not after
# multiplication by $\sqrt N$. As in the theorem, the loss is that of one position.
#
# <!-- notes: Do not prove it. Ask what one would measure to refute it: a trend in the first and in
# the third row. There is none worth the name, within 6 % and 11 % of the means, while Pre-LN itself
# falls from 8.6 to 2.1. -->


# %% slideshow={"slide_type": "fragment"}
def last_gradient(placement, num_layers, dim=128):
    torch.manual_seed(0)
    model = Decoder(placement, num_layers, dim, len(alphabet))
    for block in model.blocks:
        nn.init.zeros_(block[0].sublayer.q.weight)
        nn.init.zeros_(block[0].sublayer.k.weight)
    tokens_, targets_ = batch_of_text(8, 32, torch.Generator().manual_seed(0))
    last = model.blocks[-1][1].sublayer[2].weight
    losses = F.cross_entropy(model(tokens_)[:, -1], targets_[:, -1], reduction="none")
    return sum(
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm().item() for loss in losses
    ) / len(losses)


depths = (2, 4, 8, 16, 32)
post = [last_gradient("Post-LN", n) for n in depths]
pre = [last_gradient("Pre-LN", n) for n in depths]
pre_scaled = [g * math.sqrt(n) for g, n in zip(pre, depths, strict=True)]
table(
    ("layers", *depths, "theorem"),
    ("Post-LN", *[round(g, 1) for g in post], "constant"),
    ("Pre-LN", *[round(g, 1) for g in pre], "falls as 1/sqrt(N)"),
    ("Pre-LN x sqrt(N)", *[round(g, 1) for g in pre_scaled], "constant"),
)
for name, values in (("Post-LN", post), ("Pre-LN x sqrt(N)", pre_scaled)):
    middle = sum(values) / len(values)
    spread = max(abs(v / middle - 1) for v in values)
    print(f"{name}: within {100 * spread:.0f} % of its mean")
    assert spread < 0.25

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. DeepNorm
#
# **Question.** Post-LN is known to need a warm-up, Pre-LN is not. Can one have Post-LN's place and
# Pre-LN's calm?
#
# <!-- notes: Take proposals before you go on: smaller weights, a smaller learning rate, a scale on
# f. All go in the right direction; DeepNorm does the first and puts a scale on the other branch.
# Most write alpha in front of f: leave that on the board, it is the fifth row of a table to come.
# Ten minutes. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# Wang et al. (2022, arXiv 2203.00555, sec. 4.2) bound how far the *output* of a Post-LN network
# moves in one step: $\sum (v^2+w^2)/\alpha^2$ over its sublayers, with $v,w$ the gains of their
# two matrices. Plain Post-LN has $v=w=\alpha=1$: the bound grows with depth. DeepNorm makes it 1
# with two **constants**:
#
# | | $\alpha$ (skip path) | $\beta$ (initial gain of value, output, feed-forward) |
# |---|---|---|
# | encoder-only, decoder-only, $N$ layers | $(2N)^{1/4}$ | $(8N)^{-1/4}$ |
# | encoder ($N$) of a model with decoder ($M$) | $0.81\,(N^4M)^{1/16}$ | $0.87\,(N^4M)^{-1/16}$ |
# | its decoder | $(3M)^{1/4}$ | $(12M)^{-1/4}$ |
#
# Neither is learned; $\alpha$ multiplies the **skip path**.

# %% slideshow={"slide_type": "fragment"}
rows = [("layers", "alpha", "beta", "bound, Post-LN", "bound, DeepNorm")]
for n in (6, 12, 48, 100, 500, 1000):
    alpha, beta = norms.deepnorm_constants(n)
    rows.append(
        (n, round(alpha, 3), round(beta, 4), 4 * n, round(2 * n * 2 * beta**2 / alpha**2, 3))
    )
table(*rows)
encoder, decoder = norms.deepnorm_encoder_decoder_constants(6, 6)
print(
    f"\n6 + 6 layers, computed: encoder {encoder.alpha:.3f} {encoder.beta:.3f}, "
    f"decoder {decoder.alpha:.3f} {decoder.beta:.3f}"
)
print("torchscale's code:      encoder 1.418 0.497, decoder 2.060 0.343 (with 1 / 1.15 for 0.87)")

# %% [markdown] slideshow={"slide_type": "subslide"}
# A bound is not yet a fact. The models of section 9 take one small Adam step: how far do their
# logits move? A fifth row has $\alpha$ on the *sublayer*, a slip that has been made.


# %% slideshow={"slide_type": "skip"}
@torch.no_grad()
def output_moves(model, learning_rate=1e-5):
    before = model(PROBE[0])
    torch.optim.Adam(model.blocks.parameters(), lr=learning_rate, fused=True).step()
    return (model(PROBE[0]) - before).square().mean().sqrt().item()


# LN(x + alpha f) is LN(x / alpha + f): alpha on the wrong branch is DeepNorm with 1 / alpha.
models["alpha on the sublayer"] = [
    with_gradients("DeepNorm", n, alpha=1 / norms.deepnorm_constants(n).alpha) for n in DEPTHS
]
moves = {p: [1000 * output_moves(model) for model in some] for p, some in models.items()}

# %% slideshow={"slide_type": "fragment"}
table(
    ("1000 x rms change of the logits", *[f"{n} layers" for n in DEPTHS], "48 / 6"),
    *[(p, *[round(m) for m in moves[p]], round(moves[p][-1] / moves[p][0])) for p in moves],
)
assert moves["Post-LN"][-1] > 20 * moves["DeepNorm"][-1]

# %% [markdown] slideshow={"slide_type": "fragment"}
# With 8 times the layers Post-LN moves more than 10 times as far, Pre-LN and Sandwich-LN 4 times,
# DeepNorm 3 times, and DeepNorm moves least at every depth. (Its bound says "constant"; that
# is for SGD and up to factors. With Adam, every sublayer takes a step of the same size, and
# $\sqrt8\approx3$ is what independent steps add up to.)
#
# <!-- notes: The last row is the one for programmers: at 6 and 12 layers, where everybody tests,
# alpha on the wrong branch is as calm as Pre-LN (7 and 16). At 48 it moves twice as far as Pre-LN.
# Exercise `deepnorm_residual`, five minutes in the laboratory, is this bug. -->

# %% [markdown] slideshow={"slide_type": "subslide"}
# And the proof of the pudding: 12 layers, the same seed and learning rate, 40 steps on the text.
# Post-LN gets a second try with a warm-up over the first 20 steps. **Which of the four will learn
# more than the frequencies of the letters?**

# %% slideshow={"slide_type": "skip"}
NUM_STEPS = 40


def spread_of_predictions(model):
    """How far the predictions at single positions lie from their mean (total variation, 0 to 1)."""
    with torch.no_grad():
        tokens_, _ = batch_of_text(8, 32, torch.Generator().manual_seed(9))
        p = model(tokens_).softmax(-1).flatten(0, 1)
    return (p - p.mean(0)).abs().sum(-1).mean().item() / 2


def train(placement, num_layers=12, dim=48, learning_rate=2e-3, warmup=1, alpha=None):
    torch.manual_seed(0)
    model = Decoder(placement, num_layers, dim, len(alphabet), alpha)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98),
                                 fused=True)  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / warmup)
        loss = loss_of(model, *batch_of_text(8, 32, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, spread_of_predictions(model)


runs = {p: train(p) for p in ("Post-LN", "Pre-LN", "DeepNorm")}
runs["Post-LN, warm-up"] = train("Post-LN", warmup=20)
curves = {name: losses for name, (losses, _) in runs.items()}
shares = torch.bincount(characters) / len(characters)
unigram = -(shares * shares.log()).sum().item()

# %% slideshow={"slide_type": "fragment"}
figure, ax = plt.subplots(figsize=(11, 3))
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, 5, 1).mean(-1)
    ax.plot(range(4, NUM_STEPS), smooth, label=name, color=COLOUR[name.split(",")[0]],
            ls="--" if "warm" in name else "-")  # fmt: skip
ax.axhline(unigram, color="0.5", lw=1, ls=":")
ax.text(21, unigram - 0.13, "letter frequencies alone", color="0.4", fontsize=11)
ax.set(xlabel="step", ylabel="loss (mean of 5 steps)", xlim=(0, NUM_STEPS), ylim=(2.1, 3.8))
style.label_lines(ax)
plt.show()
last_five = {name: sum(losses[-5:]) / 5 for name, losses in curves.items()}
table(
    ("", *runs),
    ("loss, last 5 steps", *[round(v, 1) for v in last_five.values()]),
    ("spread of the predictions", *[f"{spread:.1f}" for _, spread in runs.values()]),
)
print(f"entropy of the letter frequencies: {unigram:.2f}")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Post-LN learned how often each letter occurs, and nothing else: the loss rests on the dotted
# line, and the prediction is the same at every position, whatever was read. Nothing exploded; the
# input no longer reaches the output.
#
# <!-- notes: Students say "Post-LN explodes". Nothing explodes here: ask what the flat line means
# before you point at the spread of the predictions, 0.0. A loss of 3 that does not move is the
# entropy of the letters, 2.95. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# In this run a warm-up does not save it; with fewer layers it learns: try
# `train("Post-LN", num_layers=4)`. DeepNorm has its norm in the same place and trains best.
# *Post-LN is not stable by itself; alpha and beta are what makes it so.*

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `deepnorm_residual`** (repair, 5 minutes, difficulty 1 of 3). One thing in the
# program is wrong. It is a real bug, and a quiet one: it is the last row of the table of moves
# above. At 6 and 12 layers, the run that everybody does first, it is as calm as Pre-LN; from 6 to
# 48 layers it grows 12 times, where Pre-LN grows 4 times and Post-LN 15. (How does it train? Ten
# seconds for both depths:
# `train("DeepNorm", num_layers=n, alpha=1 / norms.deepnorm_constants(n).alpha)` with 12 and 48.)

# %% slideshow={"slide_type": "skip"}
check("deepnorm_residual")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `deepnorm_plan`** (estimate, 15 minutes, difficulty 2 of 3). Constants, trainable
# numbers and the bound, for any depth.

# %% slideshow={"slide_type": "skip"}
check("deepnorm_plan")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Statistics in one pass
#
# **Question.** Variance needs the mean, the mean needs all the data: two passes. But
# $\sigma^2=E[x^2]-E[x]^2$ needs one. Why does nobody who has tried it use it?
#
# <!-- notes: For home; if there is time, one question. float32 has 24 bits: ask for the distance of
# neighbouring numbers near 10^8 (it is 8). Then the variance of data with mean 10,000 is a
# difference of two such numbers, and it should be 1. `streamed_statistics` is this chapter's
# challenge. -->


# %% slideshow={"slide_type": "fragment"}
def one_pass(x):
    return x.square().mean() - x.mean().square()


def merged(x, block_size=64):
    """Chan, Golub and LeVeque: merge (count, mean, sum of squared deviations) block by block."""
    count, mean, deviations = 0, torch.zeros(()), torch.zeros(())
    for block in x.split(block_size):
        n, gap = len(block), block.mean() - mean
        deviations = deviations + (block - block.mean()).square().sum()
        deviations = deviations + gap.square() * (count * n / (count + n))
        mean, count = mean + gap * (n / (count + n)), count + n
    return deviations / count


offsets = [10.0**k for k in range(6)]
noise = torch.randn(4096, generator=torch.Generator().manual_seed(0))
errors = {"E[x²] − E[x]²": [], "two passes": [], "blocks, merged": []}
for offset in offsets:
    x = noise + offset
    truth = x.double().var(correction=0).item()
    two_passes = (x - x.mean()).square().mean()
    for name, value in zip(errors, (one_pass(x), two_passes, merged(x)), strict=True):
        errors[name].append(max(abs(value.item() / truth - 1), 1e-8))
figure, ax = plt.subplots()
for (name, values), colour in zip(errors.items(), ("vermilion", "blue", "green"), strict=True):
    ax.loglog(offsets, values, "o-", label=name, color=style.COLOURS[colour])
ax.set(xlabel="mean of the data (standard deviation 1)", ylabel="relative error of the variance")
style.label_lines(ax)
plt.show()
print("float32 numbers near 10,000² lie", torch.finfo(torch.float32).eps * 2**26, "apart")
print(
    "at a mean of 10,000 the one-pass variance is wrong by more than half:",
    errors["E[x²] − E[x]²"][4] > 0.5,
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The difference of two numbers near $10^8$ has an error of several units; the variance is 1.
# Merging *deviations* reads the data once and keeps the digits. The merge
#
# $$M_{AB}=M_A+M_B+\delta^2\,\frac{n_An_B}{n_A+n_B}\qquad
# \mu_{AB}=\mu_A+\delta\,\frac{n_B}{n_A+n_B}\qquad \delta=\mu_B-\mu_A$$
#
# ($M$ the sum of squared deviations; Chan, Golub and LeVeque 1979) works in any order, so also
# between processors: synchronised BatchNorm is this formula. FlashAttention's running softmax
# (chapter 07) is the same idea for another statistic.
#
# **Exercise `streamed_statistics`** (challenge, 30 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("streamed_statistics")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Proof against production
#
# The reference beside torch's kernels and transformers' `LlamaRMSNorm`, on SmolLM2's activations.
#
# <!-- notes: One minute, or home. Ask what "in tolerance" hides: a last bit, from another order of
# operations. Bit for bit is only claimed where the order is the same, which is Llama's. The one
# surprise is the float64 cell: production code that narrows its input without saying so. -->

# %% slideshow={"slide_type": "fragment"}
from transformers.models.llama.modeling_llama import LlamaRMSNorm

bias = torch.linspace(-1, 1, 576)
rows = [("", "float64", "float32", "bfloat16", "float16")]
comparisons = {
    "rms_norm = LlamaRMSNorm": lambda x, w, b: (
        norms.rms_norm(x, w, eps=1e-5),
        LlamaRMSNorm.forward(llama, x),
    ),
    "rms_norm, F.rms_norm": lambda x, w, b: (
        norms.rms_norm(x, w, eps=1e-5),
        F.rms_norm(x, (576,), w, 1e-5),
    ),
    "layer_norm, F.layer_norm": lambda x, w, b: (
        norms.layer_norm(x, w, b),
        F.layer_norm(x, (576,), w, b),
    ),
    "batch_norm, F.batch_norm": lambda x, w, b: (
        norms.batch_norm(x, weight=w, bias=b, training=True).y,
        F.batch_norm(x, None, None, w, b, True),
    ),
}
for name, compare in comparisons.items():
    row = [name]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x, w, b = (t.to(dtype) for t in (hidden[1:], weight, bias))
        llama = LlamaRMSNorm(576, eps=1e-5).to(dtype)
        llama.weight.data = w
        ours, theirs = compare(x, w, b)
        if torch.equal(ours, theirs):
            row.append("bit for bit")
        else:
            error = (ours.double() - theirs.double()).abs() / (1 + theirs.double().abs())
            unit = torch.finfo(dtype).eps
            row.append("in tolerance" if error.max() < 16 * unit else "rounds to float32")
    rows.append(row)
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The one stranger: `LlamaRMSNorm` computes in float32 *always*, so that float64 input loses half
# of its digits. The reference widens, and never narrows.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. Published figures, recomputed
#
# Recomputed above, beside the papers: the invariance table (section 5), Theorem 1 (section 9),
# DeepNorm's constants (section 10). One more, which is often quoted: RMSNorm "reduces the running
# time by 7 % to 64 %" (arXiv 1910.07467, abstract). From the times in the paper's own tables:
#
# <!-- notes: Ask who has read that RMSNorm is 64 % faster. Then let them find the 64 in the table:
# last column, another method, one model. A good minute on how a number loses its footnote. The
# timings that follow are this machine's; students' own will differ, and only the direction may be
# compared. -->

# %% slideshow={"slide_type": "skip"}
times = {  # seconds: LayerNorm, RMSNorm, pRMSNorm
    "table 4": (248, 231, None),
    "table 6": (392, 333, None),
    "table 8": (12.02, 7.12, 4.34),
    "table 10": (39, 31, None),
}

# %% slideshow={"slide_type": "fragment"}
rows = [("", "LayerNorm, s", "RMSNorm, s", "saved", "pRMSNorm, s", "saved")]
for name, (layer, rms, partial) in times.items():
    rows.append((name, layer, rms, f"{100 * (1 - rms / layer):.1f} %", partial or "",
                 f"{100 * (1 - partial / layer):.1f} %" if partial else ""))  # fmt: skip
table(*rows)

# %% [markdown] slideshow={"slide_type": "fragment"}
# The 64 % belongs to *pRMSNorm*, which estimates the rms from a part of the features, in one
# model, in Theano. RMSNorm itself saved 7 % to 41 %. "RMSNorm is 64 % faster" is a misquotation.

# %% [markdown] slideshow={"slide_type": "subslide"}
# And on this machine? Ours against ours, the norm alone (not a whole model), and torch's kernels:

# %% tags=["nbval-ignore-output"] slideshow={"slide_type": "fragment"}
from torch.utils.benchmark import Timer

x, w, b = torch.randn(512, 576), torch.ones(576), torch.zeros(576)


def median_us(call):
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.1).median * 1e6


table(
    ("forward, 512 x 576", "LayerNorm, us", "RMSNorm, us", "saved"),
    *[
        (name, round(layer), round(rms), f"{100 * (1 - rms / layer):.0f} %")
        for name, layer, rms in (
            (
                "ours",
                median_us(lambda: norms.layer_norm(x, w, b)),
                median_us(lambda: norms.rms_norm(x, w)),
            ),
            (
                "torch",
                median_us(lambda: F.layer_norm(x, (576,), w, b)),
                median_us(lambda: F.rms_norm(x, (576,), w, 1e-6)),
            ),
        )
    ],
)

# %% [markdown] slideshow={"slide_type": "fragment"}
# Only the direction carries over between machines, and only between equals: written as separate
# operations, RMSNorm saves a reduction and a pass. In torch 2.13 on CPU either may win from run to
# run: LayerNorm is one fused kernel there, RMSNorm several operations (section 8: count the
# bytes). `python -m benchmarks normalization` measures forward, backward and memory side by side.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. What breaks in practice
#
# **Question.** Every mistake of this chapter, made in a real trained model: SmolLM2's 61 norms
# are replaced, and we look at the loss on the page of Alice. Which mistakes are fatal, and which
# go unseen?
#
# Write down your ranking first: mean subtracted; variance by $D-1$; eps outside the root;
# statistics over the tokens; squares in float16; squares in bfloat16.
#
# <!-- notes: The surprise is usually bfloat16, which everybody ranks as fatal and which costs
# nothing here. Ask why float16 differs: range, not precision. Three piles on the board, fatal,
# felt, unseen; count the votes before you show the table. Fifteen minutes of discussion, the best
# of this chapter. -->


# %% slideshow={"slide_type": "subslide"}
page = tokens[:, :96]


def loss_with(formula):
    """SmolLM2's loss when every norm computes formula(x, weight, eps)."""
    handles = [
        module.register_forward_hook(
            lambda module, args, out: formula(args[0], module.weight, module.variance_epsilon)
        )
        for module in smollm2.modules()
        if isinstance(module, LlamaRMSNorm)
    ]
    with torch.no_grad():
        logits = smollm2(page).logits[0]
        loss = F.cross_entropy(logits[:-1], page[0, 1:]).item()
    for handle in handles:
        handle.remove()
    return loss, len(handles)


def rms_in(dtype):
    def formula(x, w, eps):
        x, w = x.to(dtype), w.to(dtype)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w).float()

    return formula


def widened_from_float16(x, w, eps):
    return norms.rms_norm(x.half(), w.half(), eps=eps).float()


mistakes = {
    "right": lambda x, w, eps: norms.rms_norm(x, w, eps=eps),
    "float16, upcast rule": widened_from_float16,
    "float16 throughout": rms_in(torch.float16),
    "bfloat16 throughout": rms_in(torch.bfloat16),
    "mean subtracted": lambda x, w, eps: norms.layer_norm(x, w, eps=eps),
    "divided by D - 1": lambda x, w, eps: norms.rms_norm(x, w * math.sqrt(575 / 576), eps=eps),
    "eps outside the root": lambda x, w, eps: (
        x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w
    ),
    "statistics over the tokens": lambda x, w, eps: (
        x * torch.rsqrt(x.square().mean(1, True) + eps) * w
    ),
}
results = {name: loss_with(formula) for name, formula in mistakes.items()}
right = results["right"][0]
table(
    ("", "loss", "perplexity"),
    *[(name, f"{loss:.2f}", round(math.exp(loss)) if loss < 6 else "> 10,000")
      for name, (loss, _) in results.items()],
)  # fmt: skip
assert abs(results["float16, upcast rule"][0] - right) < 0.01
print(
    f"\n{results['right'][1]} norms replaced; guessing among 49,152 tokens: {math.log(49152):.2f}"
)
overflowing = [int((x.abs().amax(-1) >= 256).sum()) for x in stream]
table(
    ("layer", *(0, 5, 15, 23, 24, 25, 27), "last norm"),
    ("tokens with |x| >= 256, of 307", *[overflowing[i] for i in (0, 5, 15, 23, 24, 25, 27, 30)]),
)
print(f"layers 0 to 23: at most {max(overflowing[:24])} of 307 tokens")

# %% [markdown] slideshow={"slide_type": "fragment"}
# - **Fatal:** squares in float16. Up to layer 23 at most six tokens are lost; in the last layers
#   nearly every token has a channel above 256, so the last norm returns zeros for it, its logits
#   are all equal, and the loss is that of guessing. Statistics shared between tokens: worse than
#   guessing.
# - **Felt:** subtracting the mean from a model that was trained without it. Some hundredths of a
#   nat: the model limps a little and nobody knows why.
# - **Unseen:** $D-1$, eps outside the root, bfloat16 throughout. The loss is the same to two
#   digits. They are wrong all the same: they break bit-for-bit parity, so every later comparison
#   with another implementation starts with an unexplained difference; and at small $D$ or small
#   $x$ they matter.
#
# A falling loss does not prove that a norm is right. Compare with production, in every dtype.

# %% slideshow={"slide_type": "subslide"}
channel_rms = torch.stack([x[1:].square().mean(0).sqrt() for x in stream])  # (layers, D)
after = torch.stack([
    norms.rms_norm(x[1:], smollm2.get_submodule(name).weight.detach()).square().mean(0).sqrt()
    for x, name in zip(stream, watched, strict=True)
])  # fmt: skip
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharex=True)
for ax, values, title in (
    (axes[0], channel_rms, "before the norm"),
    (axes[1], after, "after norm and weight"),
):
    middle = values.median(1).values
    for c, colour in ((507, "vermilion"), (247, "blue"), (17, "green")):
        ax.semilogy(values[:, c] / middle, color=style.COLOURS[colour], label=f"channel {c}")
    ax.axhline(1, color="0.5", lw=1)
    ax.set(
        title=title,
        xlabel="layer of SmolLM2",
        ylabel="rms relative to median channel",
        xlim=(0, 30),
        ylim=(0.05, 100),
    )
    style.label_lines(ax, size=11)
plt.show()
for c in (507, 247):
    before, behind = (
        (v[:, c] / v.median(1).values)[3:30].median().item() for v in (channel_rms, after)
    )
    print(f"channel {c}, layers 3 to 29: {before:.0f} times the median channel before the norm,"
          f" {behind:.1f} times after it")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# **Outlier channels.** A few channels are tens of times larger than the median in *every* token
# (the first token is left out here). One scale a token cannot mend that. What the learned weight
# does about it differs: channel 507 is turned down, channel 247 is switched off in the first
# layers and passes in full later. They stay a problem for whoever rounds activations with one
# scale a token (chapter 09).
#
# <!-- notes: Leave for home, or use it as a bridge to chapter 09: two channels, each 24 times the
# median before the norm; one leaves it at 8.5, the other at 31.2. Ask which of them an 8-bit scale
# for the whole token would suffer from. -->

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 15. Summary
#
# - Without a norm a residual stream grows by a factor a layer. A norm fixes the scale of each
#   token.
# - LayerNorm centres and scales; RMSNorm only scales. Variance by $D$; eps under the root.
# - Statistics in float32, always: a square leaves float16 at 256, and real models have
#   activations of 24,000.
# - BatchNorm needs a batch it can trust. Running variance by $n-1$; evaluation uses running
#   statistics only.
# - Backward removes one direction (RMSNorm) or two (LayerNorm) and multiplies the rest by
#   $1/\text{rms}$. Keep $x$ and one or two numbers a token.
# - Place: Pre-LN is calm, Post-LN is not; DeepNorm is Post-LN with a constant $\alpha$ on the
#   skip path and smaller initial weights.
# - A loss that falls proves little; parity proves much.
#
# **Further reading.** LayerNorm, arXiv 1607.06450. RMSNorm, 1910.07467. BatchNorm, 1502.03167.
# Placement and warm-up, 2002.04745. Sandwich-LN, 2105.13290. DeepNet, 2203.00555. Fixup (no norm
# at all), 1901.09321. Massive activations, 2402.17762. In code: `reference/normalization/`.
#
# <!-- notes: Students should be able to say, for each norm, what it divides by and over which axes,
# which directions its backward pass loses, and where they would put it in 48 layers. Laboratory:
# `rms_norm`, `layer_norm`, `deepnorm_residual`, `add_rms_norm_backward`. Chapter 02 asks the same
# of the curve between two matrices: what happens to the gradient? -->
