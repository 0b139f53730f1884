"""Continuous batching: decide anew before each iteration which sequences take part.

A static batch ends with its longest answer, and the rows that were done wait. Here a sequence
leaves when it is done, and one that waits takes its place in the next iteration:

    grow      each running sequence gets a slot for its last token; where no block is left, the
              sequence that was admitted last is preempted: its blocks are freed, it waits in front
    admit     waiting sequences enter in order, while blocks and places last
    compute   prefill those that entered, decode one token of each of the others

A preempted sequence keeps its tokens and not their keys: when it comes back, prompt and answer so
far are prefilled together (recomputation). Greedy answers do not depend on who else was there.

Sources: iteration-level scheduling, Orca (OSDI 2022), sec. 3; preemption by recomputation, vLLM,
arXiv 2309.06180, sec. 4.5.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from reference.kv_cache.blocks import BlockManager, OutOfBlocks


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
    """What one iteration did: tokens through the model, sequences, slots of the cache."""

    prefill_tokens: int
    decoded: int
    num_running: int
    held_tokens: int
    used_slots: int
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prefill_tokens + self.decoded


class Scheduler:
    """Admission, growth and preemption over the blocks of one cache.

    `reserve` blocks stay free at admission, so that who runs can grow for a while.

    Raises: ValueError for max_batch below 1 or a negative reserve.
    """

    def __init__(self, blocks: BlockManager, *, max_batch: int, reserve: int = 0) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
        if reserve < 0:
            raise ValueError(f"reserve: expected at least 0, got {reserve}")
        self.blocks, self.max_batch, self.reserve = blocks, max_batch, reserve
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []

    def submit(self, request: Request) -> None:
        """Put a request in the queue.

        Raises: ValueError for one that the whole cache could not hold, or a name under way.
        """
        longest = len(request.prompt) + request.max_new_tokens - 1  # the last needs no keys
        if self.blocks.blocks_for(longest) > self.blocks.num_blocks:
            raise ValueError(
                f"request {request.name!r}: expected at most "
                f"{self.blocks.num_blocks * self.blocks.block_size} tokens, got {longest}; "
                "enlarge the cache or cut the prompt"
            )
        if any(s.request.name == request.name for s in (*self.waiting, *self.running)):
            raise ValueError(f"request {request.name!r}: the name is under way; choose another")
        self.waiting.append(Running(request))

    def schedule(self) -> Step:
        """Grow, preempt, admit; the blocks are taken when this returns."""
        decode, copies, preempted = self._grow()
        prefill = [] if preempted else self._admit()
        return Step(prefill, decode, copies, preempted)

    def record(self, sequence: Running, token: int, *, is_last: bool = False) -> bool:
        """Note a sequence's next token; True where it is done, and its blocks are free again."""
        if not sequence.is_published:
            self.blocks.publish(sequence.request.name, sequence.request.prompt)
            sequence.is_published = True
        sequence.generated.append(token)
        if is_last or len(sequence.generated) == sequence.request.max_new_tokens:
            self.blocks.free(sequence.request.name)
            self.running.remove(sequence)
            return True
        return False

    def _grow(self) -> tuple[list[Running], list[tuple[int, int]], list[Running]]:
        grown: list[Running] = []
        copies: list[tuple[int, int]] = []
        preempted: list[Running] = []
        for sequence in list(self.running):
            while sequence in self.running:
                try:
                    copies += self.blocks.append(sequence.request.name)
                    grown.append(sequence)
                    break
                except OutOfBlocks:
                    preempted.append(self._preempt())
        return grown, copies, preempted

    def _preempt(self) -> Running:
        last = self.running.pop()
        self.blocks.free(last.request.name)
        last.is_published = False
        self.waiting.appendleft(last)
        return last

    def _admit(self) -> list[tuple[Running, int]]:
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            shared = len(self.blocks.shared_prefix(sequence.tokens))
            needed = self.blocks.blocks_for(len(sequence.tokens)) - shared
            if needed + (self.reserve if self.running else 0) > self.blocks.num_free:
                break
            cached = self.blocks.allocate(sequence.request.name, sequence.tokens)
            self.running.append(self.waiting.popleft())
            admitted.append((sequence, cached))
        return admitted


def run(
    requests: Iterable[Request],
    scheduler: Scheduler,
    compute: Callable[[Step], Sequence[int]],
    *,
    stop: int | None = None,
) -> tuple[dict[str, list[int]], list[Iteration]]:
    """Serve all requests; `compute` gives a token for each sequence of prefill, then of decode.

    Returns the answers by name, and what each iteration did. Greedy or not is `compute`'s affair.

    Raises: ValueError as `Scheduler.submit`, and for two requests of one name.
    """
    requests = sorted(requests, key=lambda r: r.arrival)
    if len({r.name for r in requests}) < len(requests):
        raise ValueError("requests: expected a name of its own for each")
    coming = deque(requests)
    answers: dict[str, list[int]] = {}
    history: list[Iteration] = []
    clock = 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and coming[0].arrival <= clock:
            scheduler.submit(coming.popleft())
        if not (scheduler.waiting or scheduler.running):
            clock = coming[0].arrival
            continue
        step = scheduler.schedule()
        history.append(_summary(step, scheduler))
        sequences = [s for s, _ in step.prefill] + step.decode
        for sequence, token in zip(sequences, compute(step), strict=True):
            if scheduler.record(sequence, token, is_last=token == stop):
                answers[sequence.request.name] = sequence.generated
        clock += 1
    return answers, history


def _summary(step: Step, scheduler: Scheduler) -> Iteration:
    blocks = scheduler.blocks
    return Iteration(
        prefill_tokens=sum(len(s.tokens) - cached for s, cached in step.prefill),
        decoded=len(step.decode),
        num_running=len(scheduler.running),
        held_tokens=sum(blocks.lengths.values()),
        used_slots=(blocks.num_blocks - blocks.num_free) * blocks.block_size,
        num_preempted=len(step.preempted),
    )
