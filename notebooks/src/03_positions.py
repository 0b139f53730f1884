# %% [markdown] slideshow={"slide_type": "slide"}
# # 03 Positions
#
# Attention is a weighted average, and an average has no order. *Dog bites man* and *man bites dog*
# are the same bag of tokens to it. Positions have to be put in by hand, and the way in which they
# are put in decides how long a text a model can read.
#
# In this chapter you build sinusoids and RoPE in both layouts in which the world stores it, prove
# that RoPE's scores depend on distance alone, watch a model fail beyond the length that it was
# trained on, and stretch it: position interpolation, NTK, YaRN, Llama 3.1.
#
# You need: attention as a closed box (chapter 04 opens it), rotations in the plane.
#
# <!-- notes: 75 minutes: 40 for sections 1 to 6, how positions are put in, 35 for 7 to 10, how far
# they reach. Sections 11 to 13 are for home. Bring a clock with hands, or draw one: sinusoids, RoPE
# and the stretching of contexts are all said with hands of clocks in this chapter. -->

# %% [markdown] slideshow={"slide_type": "skip"}
# > **Low-resource box.** One CPU core and 1.5 GB of memory are enough. The slow cells: training
# > three small models on characters (section 9; shrink `NUM_STEPS`), and SmolLM2-135M on a page of
# > text (sections 1 and 5; fetched once by `make model`).

# %% slideshow={"slide_type": "skip"}
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import reference.positions as pos
from autograder.notebook import check
from figures import style
from figures.tables import table
from reference.attention import Attention, causal_mask, scaled_dot_product_attention
from reference.normalization import RMSNorm
from reference.pretrained import capture_attention, corpus, load_smollm2, passage

torch.set_num_threads(1)
style.use()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 1. What attention does not see
#
# **Question.** We take queries, keys and values of a trained model, undo its positions, shuffle
# the keys together with their values, and attend. How much does the output change?
#
# <!-- notes: Take guesses in per cent: a little, half, all? Without positions it is 0 %, with RoPE
# 86 %. If somebody objects that word order surely matters, ask which term of the sum would know it.
# The causal mask is the honest exception; section 9 comes back to it. Six minutes. -->

# %% slideshow={"slide_type": "skip"}
smollm2, tokenizer = load_smollm2()
tokens = tokenizer(passage(), return_tensors="pt").input_ids[:, :96]
layer = capture_attention(smollm2, tokens, layer=9)
base, d = smollm2.config.rope_parameters["rope_theta"], layer.q.shape[-1]
frequencies = pos.rope_frequencies(d, base)
cos, sin = pos.rope_table(torch.arange(tokens.shape[1]), frequencies)
q, k = (pos.apply_rope(x, cos, -sin) for x in (layer.q, layer.k))  # turned back
num_words = tokens.shape[1]
print(f"{num_words} tokens, {q.shape[1]} query heads of width {d}")

# %% slideshow={"slide_type": "fragment"}
shuffle = torch.randperm(num_words, generator=torch.Generator().manual_seed(0))
for name, turn in (
    ("with RoPE", lambda x: pos.apply_rope(x, cos, sin)),
    ("without", lambda x: x),
):
    before = scaled_dot_product_attention(turn(q), turn(k), layer.v)
    after = scaled_dot_product_attention(turn(q), turn(k[:, :, shuffle]), layer.v[:, :, shuffle])
    change = (after - before).norm() / before.norm()
    print(f"{name:10} shuffled words change the output by {100 * change:.0f} %")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Without positions, by nothing: a sum does not know the order of its terms. Whatever order the
# model knows comes from what we add to, or do to, its vectors.
#
# (The causal mask lets a little order in, since a token sees only those before it. A model can
# learn from that alone, but slowly; section 9 trains one.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 2. Sinusoids
#
# The first transformer *added* a vector to each embedding (Vaswani et al. 2017, arXiv 1706.03762,
# sec. 3.5): $D/2$ clocks, the first turning one radian a token, each next one slower.
#
# $$PE(m,2i)=\sin\frac{m}{10000^{2i/D}}\qquad PE(m,2i+1)=\cos\frac{m}{10000^{2i/D}}$$
#
# <!-- notes: Draw three clocks of different speed before the picture. In the picture, columns are
# positions: ask which rows a neighbour changes (the upper ones) and which tell page from page. The
# lower half hardly moves within 200 tokens. Six minutes; exercise `sinusoidal_encoding`, ten, in
# the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
sinusoids = pos.sinusoidal_positions(torch.arange(200), 64)
figure, ax = plt.subplots(figsize=(9, 3.6))
image = ax.imshow(sinusoids.T, aspect="auto", cmap="coolwarm", vmin=-1, vmax=1)
ax.set(xlabel="position", ylabel="feature")
ax.grid(False)
figure.colorbar(image, label="value")
plt.show()
print("row 0:", [round(v, 2) for v in sinusoids[0, :6].tolist()])

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** 64 features: is the table at most 64 rows long? (Study notes say so.)
#
# <!-- notes: Wait for a yes and for its reason: 64 columns, so at most 64 different rows. Numbers
# are not bits: one real number could already tell all positions apart. Then the second question,
# why sines and cosines, which the linear map answers. -->

# %% [markdown] slideshow={"slide_type": "fragment"}
# No: $D$ limits how many clocks there are. A clock does not stop.

# %% slideshow={"slide_type": "fragment"}
far = pos.sinusoidal_positions(torch.tensor([63, 64, 1_000_000]), 64)
print("position 1,000,000:", [round(v, 2) for v in far[2, :4].tolist()], "...")

# %% [markdown] slideshow={"slide_type": "fragment"}
# Why sines *and* cosines? Two readings of one clock fix its hand, and moving on by $s$ tokens is
# one rotation of the hand, the same for every $m$. "Three tokens back" is a linear map.

# %% slideshow={"slide_type": "fragment"}
hands = sinusoids.unflatten(-1, (-1, 2))
hands = torch.complex(hands[..., 1], hands[..., 0])
turns = hands[3:] / hands[:-3]
print("rotation by 3 tokens, clock 4, read at positions 0, 50, 150:",
      [f"{t:.3f}" for t in turns[[0, 50, 150], 4].angle().tolist()])  # fmt: skip

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `sinusoidal_encoding`** (build, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("sinusoidal_encoding")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 3. Learned tables
#
# BERT and GPT-2 simply learn one vector a position. It works as well within the table. At its end
# it ends:
#
# <!-- notes: One minute. Ask what the better failure is: an error at position 1024, or a number
# that nobody has trained. A table fails loudly; section 9 shows methods that go on and are wrong.
# Keep that sentence for later. -->

# %% slideshow={"slide_type": "fragment"} tags=["raises-exception"]
learned = pos.LearnedPositions(max_positions=1024, dim=64)
learned(torch.tensor([1023, 1024]))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 4. RoPE: turn, do not add
#
# Added positions mix with content: $(x+p)W_Q$ has to be taken apart again by the weights. Su et
# al. (2021, arXiv 2104.09864) leave the embedding alone and *turn* queries and keys. A pair of
# features is a hand of a clock; at position $m$ it is turned by $m\theta_i$.
#
# $$\begin{pmatrix}a'\\b'\end{pmatrix}=\begin{pmatrix}\cos m\theta_i&-\sin m\theta_i\\
# \sin m\theta_i&\cos m\theta_i\end{pmatrix}\begin{pmatrix}a\\b\end{pmatrix}\qquad
# \theta_i=\text{base}^{-2i/d}$$
#
# <!-- notes: Turn your arm at three speeds while you count tokens; silly, and remembered. Ask
# before the figure where the hand of pair 0 stands at position 6: just short of a full turn. Common
# question: why are values not turned? They are what is averaged. Ten minutes; `rotate_pairs` and
# `rope_attention` in the laboratory. -->

# %% slideshow={"slide_type": "fragment"}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
vector = torch.tensor([1.0, 0.0])
for ax, pair in zip(axes, (0, 2, 5), strict=True):
    theta = pos.rope_frequencies(16)[pair].item()
    for m in range(8):
        x, y = math.cos(m * theta), math.sin(m * theta)
        ax.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "lw": 1.8,
                    "color": plt.cm.viridis(m / 8)})  # fmt: skip
        if pair == 0 or (pair == 2 and m in (0, 7)):
            ax.text(1.17 * x, 1.17 * y, str(m), ha="center", va="center")
        elif pair == 5 and m == 0:
            ax.text(1, 0.15, "0 to 7", ha="center")
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title=f"pair {pair} of 8")
    ax.set(xlabel="first feature", ylabel="second feature")
plt.show()
print("radians a token, pairs 0, 2, 5:",
      [round(pos.rope_frequencies(16)[i].item(), 4) for i in (0, 2, 5)])  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The numbers at the arrows are positions. Fast pairs tell neighbours apart; slow pairs tell this
# page from the next. Values are *not* turned: they are what is averaged, and need no order.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `rotate_pairs`** (build, 15 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("rotate_pairs")

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `rope_attention`** (build, 20 minutes, difficulty 2 of 3). What is turned, when, and
# what is not.

# %% slideshow={"slide_type": "skip"}
check("rope_attention")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 5. Two layouts
#
# Which two features are a pair? Meta's code takes neighbours, $(2i, 2i+1)$, as complex numbers.
# transformers takes $(i, i+d/2)$, which needs no strided access:
#
# $$\text{RoPE}(x)=x\odot\cos+\text{rotate}\_\text{half}(x)\odot\sin,\qquad
# \text{rotate}\_\text{half}(x_1,x_2)=(-x_2,x_1)$$
#
# **Question.** SmolLM2's weights are stored for halves. We run them with neighbours instead. Does
# the model notice?
#
# <!-- notes: Write 0 1 2 3 4 5 6 7 on the board and draw both pairings with arcs. Votes split
# between "error" and "no difference". Neither: 38 % of the attention goes to another token, and
# nothing crashes. This is the first question of the discussion, the checkpoint that speaks
# nonsense. `convert_weights` is for home. Eight minutes. -->


# %% slideshow={"slide_type": "fragment"}
def weights(queries, keys):
    return (queries @ keys.repeat_interleave(3, 1).mT / d**0.5).masked_fill(
        ~causal_mask(num_words), -math.inf
    ).softmax(-1)  # fmt: skip


complex_cos = pos.complex_table(torch.arange(num_words), frequencies)
right = weights(pos.apply_rope(q, cos, sin), pos.apply_rope(k, cos, sin))
wrong = weights(*(pos.apply_rope_complex(x, complex_cos) for x in (q, k)))
print(
    f"equal to the model's own attention: {torch.allclose(right, layer.probabilities, atol=1e-4)}"
)
print(f"with the other layout, attention that moves to another token: "
      f"{100 * (right - wrong).abs().sum(-1).mean() / 2:.0f} %")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "fragment"}
# The shapes agree, nothing crashes, and the model is broken.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The cure is a permutation of the rows of $W_Q$ and $W_K$, head by head; $W_V$ stays. It is what
# every converter of Llama weights does.

# %% slideshow={"slide_type": "fragment"}
weight = smollm2.model.layers[9].self_attn.q_proj.weight.detach()
there = pos.half_to_interleaved(weight, 9)
back = pos.interleaved_to_half(there, 9)
print("rows 0 to 5 of head 0 for neighbours come from rows",
      [int((weight == row).all(1).nonzero()) for row in there[:6]])  # fmt: skip
print("and back again:", torch.equal(back, weight))

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `convert_weights`** (repair, 15 minutes, difficulty 2 of 3). A converter that somebody
# wrote.

# %% slideshow={"slide_type": "skip"}
check("convert_weights")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 6. Only the distance matters
#
# Turn the query by $m\theta$ and the key by $n\theta$: in their product one turn takes the other
# back, and $(m-n)\theta$ is left.
#
# $$\langle R_m q, R_n k\rangle=\text{Re}\sum_i q_i\bar k_i\,e^{j(m-n)\theta_i}$$
#
# **Question.** Does that survive float32? Here is one score, measured at distance 7 from many
# starting points.
#
# <!-- notes: Do the one line on the board with complex numbers: conjugate, and m - n stands there.
# Ask what could still go wrong in a computer; a large angle has few digits left after the point. In
# float32 the score stays at 18 up to position 100,000. In bfloat16 token 257 would sit on 256.
# Eight minutes, end of the first half. -->

# %% slideshow={"slide_type": "fragment"}
starts = torch.tensor([0, 10, 100, 1000, 10_000, 100_000])
one_q, one_k = q[:, :1, 40:41], k[:, :1, 33:34]
scores = [
    (pos.apply_rope(one_q, *pos.rope_table(start + torch.tensor([7]), frequencies))
     * pos.apply_rope(one_k, *pos.rope_table(start[None], frequencies))).sum().item()
    for start in starts
]  # fmt: skip
table(("key at position", *starts.tolist()), ("score", *[round(s, 1) for s in scores]))
assert max(scores) - min(scores) < 0.2

# %% [markdown] slideshow={"slide_type": "fragment"}
# The same, up to the rounding of large angles. In bfloat16 it would not survive: there, position
# 257 is 256. So the tables are computed in float32 and rounded last.
#
# Nothing here needed $W_Q$ and $W_K$: relative position comes from the turning. The projections
# decide *what* is compared.

# %% slideshow={"slide_type": "fragment"}
print("257 in bfloat16:", int(torch.tensor(257).bfloat16()))

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `relative_scores`** (derive, 15 minutes, difficulty 3 of 3).

# %% slideshow={"slide_type": "skip"}
check("relative_scores")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 7. The backward pass
#
# A rotation is linear, and its transpose is the rotation back. So the gradient of RoPE is RoPE with
# the sine's sign changed: no activation is kept for it, only the tables.
#
# <!-- notes: Three minutes. Ask for the transpose of a rotation before you say anything, and what
# forward has to keep: nothing but the tables, which do not depend on the input. `rope_backward`,
# ten minutes, in the laboratory. The usual slip there is to turn the gradient forwards. -->

# %% slideshow={"slide_type": "fragment"}
x = torch.randn(1, 2, 5, 8, requires_grad=True)
c, s = pos.rope_table(torch.arange(5), pos.rope_frequencies(8))
grad = torch.randn(1, 2, 5, 8)
first, second = x.chunk(2, -1)
y = x * c + torch.cat((-second, first), -1) * s
(by_autograd,) = torch.autograd.grad(y, x, grad)
print(
    "autograd's gradient equals the turn back:",
    torch.equal(by_autograd, pos.apply_rope(grad, c, -s)),
)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `rope_backward`** (derive, 10 minutes, difficulty 2 of 3).

# %% slideshow={"slide_type": "skip"}
check("rope_backward")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 8. How scores decay with distance
#
# Take a query and a key that agree in every pair ($q_i\bar k_i=1$). Near by, all hands point the
# same way; far away they point everywhere and cancel. RoFormer's figure 2 draws a bound on the
# score, $\frac{2}{d}\sum_i|S_i|$ with $S_i$ the partial sums of $e^{js\theta}$.
#
# **Question.** Does the bound fall *monotonically*?
#
# <!-- notes: Let them draw the curve. Almost everybody draws a smooth fall. It rises at 113 of 249
# steps. Ask why: many hands with different speeds come together again now and then. Say clearly
# that it is a bound for vectors which agree, no rule for trained heads. Eight minutes. -->

# %% slideshow={"slide_type": "fragment"}
distances = torch.arange(0.0, 250)
figure, ax = plt.subplots()
for rope_base, colour in ((10_000.0, "blue"), (500_000.0, "vermilion")):
    bound = pos.mean_partial_sum(distances, pos.rope_frequencies(128, rope_base))
    ax.plot(distances, bound, color=style.COLOURS[colour], label=f"base {rope_base:,.0f}")
ax.set(xlabel="distance in tokens", ylabel="bound on the score", xlim=(0, 250), ylim=(0, None))
style.label_lines(ax)
plt.show()
bound = pos.mean_partial_sum(distances, pos.rope_frequencies(128))
print("rises from one distance to the next at", int((bound.diff() > 0).sum()), "of 249 steps")

# %% [markdown] slideshow={"slide_type": "fragment"}
# A trend, with ripples; and a larger base makes it slower. It is a bound for agreeing vectors, not
# a rule that forbids looking far: trained heads look wherever they like.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 9. Beyond the training length
#
# **Question.** We train small models on 64 characters and let them read 512. Whose loss explodes?
#
# Three readers, two layers each, alike but for their positions: **RoPE**, **sinusoids** added to
# the embedding, and **none** at all, with nothing but the causal mask.
#
# <!-- notes: Vote among the three; RoPE is expected to win, since it is relative. Within the
# trained length it does, 1.9. Beyond it RoPE and sinusoids both stand at 2.7, and the model without
# positions, worst at home with 2.4, is best abroad with 2.3. Nothing explodes; it gets quietly
# worse. Twelve minutes with the slow pairs. -->

# %% slideshow={"slide_type": "skip"}
text = corpus()[:200_000]
alphabet = sorted(set(text))
characters = torch.tensor([alphabet.index(c) for c in text])
TRAINED, DIM, HEADS, NUM_STEPS = 64, 64, 2, 220


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(DIM) for _ in range(2))
        self.attention = Attention(DIM, num_heads=HEADS)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x, mask, rotate):
        x = x + self.attention(self.norms[0](x), mask, rotate=rotate)
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class Reader(nn.Module):
    """Predicts the next character; `kind` is rope, sinusoids or none."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(len(alphabet), DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = RMSNorm(DIM), nn.Linear(DIM, len(alphabet))

    def forward(self, tokens, scaling=None):
        length = tokens.shape[1]
        x, rotate, mask = self.embed(tokens), None, causal_mask(length)
        if self.kind == "sinusoids":
            x = x + pos.sinusoidal_positions(torch.arange(length), DIM)
        if self.kind == "rope":
            cos, sin = pos.rope_table(
                torch.arange(length),
                pos.rope_frequencies(DIM // HEADS, scaling=scaling),
                attention_factor=pos.attention_factor(scaling),
            )

            def rotate(y):
                return pos.apply_rope(y, cos, sin)

        for block in self.blocks:
            x = block(x, mask, rotate)
        return self.head(self.norm(x))


def windows(count, length, seed, source):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - length - 1, (count,), generator=generator)
    rows = source[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def train(kind):
    torch.manual_seed(0)
    model = Reader(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(NUM_STEPS):
        tokens, targets = windows(24, TRAINED, step, characters[:180_000])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_by_position(model, scaling=None, length=512):
    tokens, targets = windows(12, length, 0, characters[180_000:])
    losses = F.cross_entropy(model(tokens, scaling).mT, targets, reduction="none")
    return losses.mean(0)


readers = {kind: train(kind) for kind in ("rope", "sinusoids", "none")}

# %% slideshow={"slide_type": "fragment"}
figure, ax = plt.subplots(figsize=(11, 3.3))
for kind, colour in (("none", "black"), ("sinusoids", "vermilion"), ("rope", "blue")):
    losses = loss_by_position(readers[kind])
    smooth = losses.unfold(0, 16, 8).mean(1)
    ax.plot(torch.arange(len(smooth)) * 8 + 8, smooth, color=style.COLOURS[colour], label=kind)
    print(
        f"{kind:10} loss within {losses[16:64].mean():.1f}, at 128 to 512 {losses[128:].mean():.1f}"
    )
ax.axvspan(0, TRAINED, color="0.9", lw=0)
ax.text(4, ax.get_ylim()[1], "trained", va="top", color="0.35")
ax.set(xlabel="position", ylabel="loss, nats a character", xlim=(0, 512))
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Every way of telling positions fails beyond the length that it was trained on; what was never
# seen is not learned. RoPE is *defined* for every position, and that is all. (The model without
# positions does not fail: it never learned much that depends on order.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The reason lies in the slow pairs. A pair that completed no full turn in training meets angles
# beyond that are new. How many are those?

# %% slideshow={"slide_type": "fragment"}
rows = [("", "head width", "base", "trained on", "pairs with a full turn", "without")]
for name, width, rope_base, length in (
    ("our reader", DIM // HEADS, 10_000.0, TRAINED),
    ("Llama 2", 128, 10_000.0, 4096),
    ("Llama 3", 128, 500_000.0, 8192),
    ("SmolLM2", 64, 100_000.0, 8192),
):
    wavelengths = 2 * math.pi / pos.rope_frequencies(width, rope_base)
    full = int((wavelengths <= length).sum())
    rows.append((name, width, int(rope_base), length, full, width // 2 - full))
table(*rows)

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `pairs_in_context`** (estimate, 10 minutes, difficulty 1 of 3).

# %% slideshow={"slide_type": "skip"}
check("pairs_in_context")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 10. Stretching the context
#
# The slow pairs must stay within angles that they know. Divide them by $s$; but the fast pairs,
# which tell neighbours apart, had better stay. Four answers:
#
# - **Position interpolation** (Chen et al. 2023, arXiv 2306.15595): all pairs divided by $s$.
# - **NTK-aware**: base $\cdot s^{d/(d-2)}$, so that only the slowest pair is divided by all of $s$.
# - **YaRN** (Peng et al. 2023, arXiv 2309.00071): by turns, with a ramp between, and scores scaled
#   by $(0.1\ln s+1)^2$.
# - **Llama 3.1**: by wavelength, the same idea in other numbers.
#
# <!-- notes: Keep the four names for later; first ask what should happen to a fast pair and to a
# slow one. Whoever says "leave the first, divide the second" has invented the last two. In the
# figure, each curve is one answer: orange flat at 8, green bent, the others a step. Twelve minutes,
# the end of the lecture. -->

# %% slideshow={"slide_type": "fragment"}
plain = pos.rope_frequencies(128, 500_000.0)
figure, ax = plt.subplots(figsize=(8, 4.4))
for name, kind, colour in (
    ("interpolation", "linear", "orange"),
    ("NTK", "ntk", "green"),
    ("YaRN", "yarn", "purple"),
    ("Llama 3.1", "llama3", "blue"),
):
    scaling = pos.RopeScaling(kind, 8.0, 8192)
    ax.plot(plain / pos.rope_frequencies(128, 500_000.0, scaling), color=style.COLOURS[colour])
    at = {"linear": (2, 7.4), "ntk": (22, 2.6), "yarn": (26, 3.9), "llama3": (37, 6.9)}[kind]
    ax.text(*at, name, color=style.COLOURS[colour], ha="left")
ax.set(xlabel="pair, fast to slow", ylabel="divided by", xlim=(0, 63), ylim=(0, 8.6))
plt.show()
scaling = pos.RopeScaling("llama3", 8.0, 8192)
ratio = plain / pos.rope_frequencies(128, 500_000.0, scaling)
unchanged, divided = int((ratio == 1).sum()), int((ratio > 7.999).sum())
print(f"Llama 3.1: {unchanged} pairs unchanged, {divided} divided by 8, "
      f"{64 - unchanged - divided} blended")  # fmt: skip

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Question.** Without any further training, which of them lets our reader, trained on 64
# characters, read 512?
#
# <!-- notes: Expect votes for interpolation, the simplest. It is the only one that spoils what the
# model could do, 3.1 instead of 1.9 within 64. YaRN holds 2.0 in both places. What to say about
# short texts is the third question of the discussion. -->

# %% slideshow={"slide_type": "fragment"}
figure, ax = plt.subplots(figsize=(11, 2.4))
for name, kind, colour in (
    ("as trained", "default", "black"),
    ("interpolation", "linear", "orange"),
    ("NTK", "ntk", "green"),
    ("YaRN", "yarn", "purple"),
):
    scaling = pos.RopeScaling(kind, 8.0 if kind != "default" else 1.0, TRAINED)
    losses = loss_by_position(readers["rope"], scaling)
    smooth = losses.unfold(0, 16, 8).mean(1)
    ax.plot(torch.arange(len(smooth)) * 8 + 8, smooth, color=style.COLOURS[colour], label=name)
    print(
        f"{name:14} loss within {losses[16:64].mean():.1f}, at 128 to 512 {losses[128:].mean():.1f}"
    )
ax.axvspan(0, TRAINED, color="0.9", lw=0)
ax.text(4, ax.get_ylim()[1], "trained", va="top", color="0.35")
ax.set(xlabel="position", ylabel="loss, nats\na character", xlim=(0, 512))
style.label_lines(ax)
plt.show()

# %% [markdown] slideshow={"slide_type": "fragment"}
# Interpolation spoils what the model could do: neighbours are now an eighth of a token apart. The
# selective methods keep short range and gain long range. All papers then train on a little long
# text; without that, the gain is in not breaking, not in using what is far.

# %% [markdown] slideshow={"slide_type": "skip"}
# **Exercise `stretched_frequencies`** (challenge, 25 minutes, difficulty 3 of 3). Llama 3.1's rule.

# %% slideshow={"slide_type": "skip"}
check("stretched_frequencies")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 11. Proof against production
#
# The same tables and rotations as transformers', bit for bit, for four kinds of scaling:
#
# <!-- notes: For home, or half a minute. Bit for bit is possible here because the order of
# operations is the same as in transformers. Ask which of the four somebody's favourite model uses,
# and where one reads that: `rope_parameters` in its configuration. -->

# %% slideshow={"slide_type": "fragment"}
from transformers import LlamaConfig  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

positions = torch.tensor([[0, 1, 5, 4095]])
x = torch.randn(1, 2, 4, 64)
for parameters in (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
):  # fmt: skip
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 1e4, **parameters},
    )
    theirs = LlamaRotaryEmbedding(config)(x, positions)
    scaling = pos.RopeScaling.from_dict(parameters)
    ours = pos.rope_table(
        positions,
        pos.rope_frequencies(64, 1e4, scaling),
        attention_factor=pos.attention_factor(scaling),
    )
    same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    turned = torch.equal(pos.apply_rope(x, *ours), apply_rotary_pos_emb(x, x, *theirs)[0])
    print(f"{parameters['rope_type']:8} tables equal: {same}   rotated equal: {turned}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 12. Published figures, recomputed
#
# RoFormer's bound, the constants of position interpolation, YaRN and NTK, and Llama 3.1's context:
#
# <!-- notes: For home. Worth a minute if the class likes misprints: ask how many tokens "128k" is.
# It is 131,072, a power of two; another number circulates. And the paper says "about 600" where we
# find 589: rounding, and a reason to recompute. -->

# %% slideshow={"slide_type": "skip"}
at = torch.tensor([1.0, 10, 50, 100, 500, 1000, 4000])
bound = pos.mean_partial_sum(at, pos.rope_frequencies(128))
extrapolation = (
    pos.extrapolation_bound(torch.arange(1.0, 4096), pos.rope_frequencies(128)).min() / 256
)
constant = 128 / pos.interpolation_bound(128)
yarn = [pos.attention_factor(pos.RopeScaling("yarn", s, 2048)) for s in (2.0, 4.0, 8.0, 16.0)]
curve = (
    ("RoFormer fig. 2, d = 128: distance", *[int(s) for s in at]),
    ("bound (the paper prints a curve)", *[round(b, 1) for b in bound.tolist()]),
)
recomputed = (
    ("", "published", "here"),
    ("interpolation's constant, 32 ln 10000", "294.73", f"{constant:.2f}"),
    ("how much below extrapolation's", "about 600", f"{2 * constant:.0f}"),
    ("B(s) / d over 4,095 distances, at least", "1", f"{extrapolation:.3f}"),
    ("YaRN: 0.1 ln s + 1, s = 2, 4", "1.0693, 1.1386", ", ".join(f"{t:.4f}" for t in yarn[:2])),
    ("YaRN: 0.1 ln s + 1, s = 8, 16", "1.2079, 1.2773", ", ".join(f"{t:.4f}" for t in yarn[2:])),
    ("NTK base for s = 2, 4, 8 (d = 128)", "20221, 40890, 82685",
     ", ".join(f"{pos.ntk_base(10000.0, 128, float(s)):.0f}" for s in (2, 4, 8))),
    ("Llama 3.1: context, 128k", "131,072", f"{2**17:,}"),
)  # fmt: skip

# %% slideshow={"slide_type": "fragment"}
table(*curve)
print()
table(*recomputed)

# %% [markdown] slideshow={"slide_type": "fragment"}
# "128k" is $2^{17}$. (148k, which circulates, is a misprint.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 13. What breaks in practice
#
# - **A cache and positions from 0.** With 10 cached tokens the next one is at position 10. Started
#   from 0 again, it believes that it stands at the beginning.
# - **Padding at the left** shifts positions: count real tokens, not columns. (RoPE forgives a shift
#   of all positions, a learned table does not.)
# - **Tables in half precision**, as in section 6: a model that gets worse the longer the text.
# - **The wrong base in a config.** Nothing crashes, and on a short text the loss hardly shows it:
#
# <!-- notes: For home, or the last five minutes of the laboratory. Ask for each of the four: would
# a test on one short sentence find it? The base is the worst, 3.7 instead of 3.6 with a base ten
# times too small or too large. Ask what test would find it: a long text. -->


# %% slideshow={"slide_type": "skip"}
@torch.no_grad()
def smollm2_loss(rope_base):
    rotary = smollm2.model.rotary_emb
    kept = rotary.inv_freq.clone()
    rotary.inv_freq.copy_(pos.rope_frequencies(d, rope_base))
    loss = smollm2(tokens, labels=tokens).loss.item()
    rotary.inv_freq.copy_(kept)
    return loss


# %% slideshow={"slide_type": "fragment"}
for rope_base in (100_000.0, 10_000.0, 1_000_000.0):
    print(f"SmolLM2 with base {rope_base:9,.0f}: loss {smollm2_loss(rope_base):.1f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# **This went wrong in production.** gpt-oss says `"truncate": false`: YaRN's ramp is not rounded to
# whole pairs. Readers that did not know the key passed over it (vLLM #27722; transformers #42189,
# SGLang #14270), and nothing failed. How far off is a reader who does that, after 4,000 tokens?
#
# <!-- notes: Let them guess first: a rounded ramp, is that worth an error? The worst pair ends up
# almost a radian away. The remedy is not to know every key, which nobody does, but to refuse those
# that one does not know: the last line. -->

# %% slideshow={"slide_type": "fragment"}
written = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
           "truncate": False}  # fmt: skip
meant = pos.rope_frequencies(64, 150_000.0, pos.RopeScaling.from_dict(written))
passed_over = {key: value for key, value in written.items() if key != "truncate"}
read = pos.rope_frequencies(64, 150_000.0, pos.RopeScaling.from_dict(passed_over))
print(f"largest angle between the two at position 4,000: {((meant - read) * 4000).abs().max():.2f}")
try:
    pos.RopeScaling.from_dict({**written, "a_key_of_next_year": 1})
except ValueError as error:
    print(error)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## 14. Summary
#
# - Attention sees a set. Order comes from positions alone.
# - Sinusoids and tables are added to the embedding; RoPE turns queries and keys, never values.
# - RoPE's scores depend on $m-n$; compute its angles in float32.
# - Two layouts, one permutation of $W_Q$ and $W_K$ between them.
# - Defined for every position is not trained for every position. Stretch slow pairs, keep fast
#   ones.
#
# **Further reading.** Su et al. 2021, *RoFormer* (arXiv 2104.09864); Chen et al. 2023, *Extending
# context window by positional interpolation* (arXiv 2306.15595); Peng et al. 2023, *YaRN* (arXiv
# 2309.00071); Press et al. 2021, *Train short, test long* (ALiBi, arXiv 2108.12409).
#
# <!-- notes: Students should be able to show that attention sees no order, to derive m - n in one
# line, and to say which pairs of a head know no angle beyond the training length. Laboratory:
# `sinusoidal_encoding`, `rotate_pairs`, `rope_backward`, `rope_attention`. Chapter 04 opens the box
# that this one kept closed. -->
