"""From logits to a token: greedy, or by lot from a distribution that is cut to its likely part.

    temperature   divide the logits: below 1 sharper, above 1 flatter
    top-k         only the k most likely tokens
    top-p         only the smallest set of most likely tokens whose probabilities reach p

in this order, and what is left is renormalised.

Shapes: B batch, T tokens, V vocabulary.
Papers: top-k, 1805.04833, sec. 5.4; top-p (nucleus), 1904.09751, sec. 3.1.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.transformer.stopping import Stop, has_ended
from reference.transformer.token_ids import has_values

Model = Callable[[Tensor], Tensor]


def filter_logits(
    logits: Float[Tensor, "*B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*B V"]:
    """Logits divided by the temperature, with -inf for all tokens that are cut off.

    At least one token is kept. Tokens as likely as the k-th are kept as well. A temperature of 0
    keeps the most likely token alone (of equals the first), and so does one that the dtype of the
    logits holds for 0. `top_k` 0 and `top_p` 1 cut nothing, as in transformers and vLLM; a `top_p`
    of 0 means one token to transformers and is refused by vLLM, and here.

    Raises: ValueError for a temperature that is negative or not finite, a negative top_k, a top_p
    outside (0, 1], and for rows that hold NaN or inf or nothing but -inf.
    """
    _check(temperature, top_k, top_p)
    top = _check_rows(logits)
    if temperature < torch.finfo(logits.dtype).tiny:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    hot = logits / temperature
    if temperature < 1:  # a quotient may overflow: then the row's maximum goes first, to 0
        is_over = (top / temperature).isinf()
        hot = torch.where(is_over, (logits - top) / temperature, hot)
    logits = hot
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1, dtype=torch.float32)
        # Over a large vocabulary a sum in float32 passes 1 before its end.
        before = probabilities.cumsum(-1, dtype=torch.float64).sub_(probabilities)
        is_cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(is_cut, -torch.inf)
    return logits


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature: expected at least 0 and finite, got {temperature}; 0 is greedy choice"
        )
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k: expected at least 1, or 0 to cut nothing, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p: expected a value in (0, 1], got {top_p}; 1 cuts nothing, top_k=1 leaves one"
        )


def _check_rows(logits: Tensor) -> Tensor:
    """The largest logit of each row, which NaN, inf and a row of -inf show in."""
    top = logits.amax(-1, keepdim=True)
    if has_values(top) and not bool(top.isfinite().all()):
        rows = (~top.isfinite()).flatten().nonzero().flatten().tolist()
        raise ValueError(
            "logits: expected in each row a finite largest one, got NaN, inf or -inf alone in rows "
            f"{rows[:8]}; look at the layer, or the rule for allowed tokens, that made them"
        )
    return top


def sample(
    logits: Float[Tensor, "B V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " B"]:
    """One token a row, drawn with the filtered probabilities.

    Raises: as `filter_logits`.
    """
    kept = filter_logits(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]


def greedy(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The most likely token of each row."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: Model,
    prompt: Int[Tensor, "B T"],
    num_tokens: int,
    *,
    choose: Callable[[Tensor], Tensor] = greedy,
    context: int | None = None,
    stop: Stop | None = None,
) -> Int[Tensor, "B S"]:
    """The prompt and up to `num_tokens` more, each chosen from the model's last logits.

    Everything is computed anew for each token, which chapter 06 mends. With `context` the model
    sees the last so many tokens. `stop` is a token or a question to a row's tokens so far
    (`stopping.stop_strings`): generation ends early when every row has come to it, and a row goes
    on with the token that it ended with.

    Raises: ValueError for an empty prompt; the model refuses more tokens than its context.
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"prompt: expected (B, T) with at least one token, got {tuple(prompt.shape)}"
        )
    tokens, is_done = prompt, torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    chosen: list[Tensor] = []
    for _ in range(num_tokens):
        seen = tokens if context is None else tokens[:, -context:]
        token = choose(model(seen)[:, -1])
        chosen.append(torch.where(is_done, chosen[-1], token) if chosen else token)
        tokens = torch.cat((tokens, chosen[-1][:, None]), 1)
        if stop is not None:
            is_done = is_done | has_ended(stop, chosen)
            if bool(is_done.all()):
                break
    return tokens
