"""What a scheduler speaks of: requests, those under way, and what a step does with them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens to answer with at most, and the iteration it arrives in.

    Raises: ValueError for an empty prompt or fewer than one token.
    """

    name: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"prompt: expected at least one token, got none in {self.name!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")


@dataclass(eq=False)
class Running:
    """A request under way; the last token has no keys yet. `is_published`: others may share."""

    request: Request
    generated: list[int] = field(default_factory=list)
    is_published: bool = False

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *self.generated]


@dataclass(frozen=True)
class Step:
    """What to compute now. `prefill`: sequences, each with how many tokens the cache has already.

    `copies` are blocks to copy before anything is written.
    """

    prefill: list[tuple[Running, int]]
    decode: list[Running]
    copies: list[tuple[int, int]]
    preempted: list[Running]


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: tokens through the model, sequences, slots of the cache.

    `failed` names requests that the model had no token for; they have no answer.
    """

    prefill_tokens: int
    decoded: int
    num_running: int
    held_tokens: int
    used_slots: int
    num_preempted: int = 0
    failed: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prefill_tokens + self.decoded
