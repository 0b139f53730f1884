"""Continuous batching: decide anew before each iteration which sequences take part.

A static batch ends with its longest answer, and the rows that were done wait. Here a sequence
leaves when it is done, and one that waits takes its place in the next iteration:

    grow      each running sequence gets a slot for its last token; where no block is left, the
              sequence that was admitted last is preempted: its blocks are freed, it waits in front
    admit     waiting sequences enter in order, while blocks and places last
    compute   prefill those that entered, decode one token of each of the others

A preempted sequence keeps its tokens and not their keys: when it comes back, prompt and answer so
far are prefilled together (recomputation). Greedy answers do not depend on who else was there.

One request never touches another: what cannot be served is refused before the first step, one that
fails or is aborted gives its blocks back and leaves the others alone, and after an error in a step
no block is kept.

Sources: iteration-level scheduling, Orca (OSDI 2022), sec. 3; preemption by recomputation, vLLM,
arXiv 2309.06180, sec. 4.5.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from reference.kv_cache.blocks import BlockManager, OutOfBlocks
from reference.kv_cache.request import Iteration, Request, Running, Step
from reference.transformer.stopping import Stop

# A token for each sequence of prefill, then of decode; None for one that has failed.
Compute = Callable[[Step], Sequence[int | None]]


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
        """Put a request in the queue. Raises: as `check`."""
        self.check(request)
        self.waiting.append(Running(request))

    def check(self, request: Request) -> None:
        """Refuse what could never be served.

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

    def abort(self, name: str) -> list[int]:
        """Take a request back, waiting or running, at any time; returns what it has answered.

        Its blocks are free at once; a step under way may go on, and its token is dropped.

        Raises: KeyError for a name that is not under way.
        """
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.request.name == name:
                    queue.remove(sequence)
                    if queue is self.running:
                        self.blocks.free(name)
                    return sequence.generated
        raise KeyError(name)

    def abort_all(self) -> None:
        """Take back all requests under way."""
        for sequence in (*self.running, *self.waiting):
            self.abort(sequence.request.name)

    def step(
        self, compute: Compute, *, stop: Stop | None = None
    ) -> tuple[dict[str, list[int]], Iteration]:
        """Schedule, compute, record: the answers that this completes, and what it did.

        Raises: OutOfBlocks where requests wait for blocks that nobody under way will give back;
        whatever `compute` raises. After an error nothing is under way.
        """
        try:
            return self._step(compute, stop)
        except BaseException:
            self.abort_all()
            raise

    def _step(self, compute: Compute, stop: Stop | None) -> tuple[dict[str, list[int]], Iteration]:
        step = self.schedule()
        if self.waiting and not (self.running or step.preempted):
            raise OutOfBlocks(
                f"request {self.waiting[0].request.name!r} waits and nothing runs: "
                f"{self.blocks.num_free} of {self.blocks.num_blocks} blocks are free, and others "
                "hold the rest for good; free them first"
            )
        summary = _summary(step, self)
        done, failed = {}, []
        sequences = [s for s, _ in step.prefill] + step.decode
        for sequence, token in zip(sequences, compute(step) if sequences else (), strict=True):
            name = sequence.request.name
            if sequence not in self.running:
                continue  # aborted meanwhile
            if token is None:
                self.abort(name)
                failed.append(name)
            elif self.record(sequence, token, stop=stop):
                done[name] = sequence.generated
        return done, replace(summary, failed=tuple(failed))

    def schedule(self) -> Step:
        """Grow, preempt, admit; the blocks are taken when this returns."""
        decode, copies, preempted = self._grow()
        prefill = [] if preempted else self._admit()
        return Step(prefill, decode, copies, preempted)

    def record(self, sequence: Running, token: int, *, stop: Stop | None = None) -> bool:
        """Note a sequence's next token; True where it is done, and its blocks are free again."""
        if not sequence.is_published:
            self.blocks.publish(sequence.request.name, sequence.request.prompt)
            sequence.is_published = True
        sequence.generated.append(token)
        is_last = stop(sequence.generated) if callable(stop) else token == stop
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
    compute: Compute,
    *,
    stop: Stop | None = None,
) -> tuple[dict[str, list[int]], list[Iteration]]:
    """Serve all requests; `compute` gives a token for each sequence of prefill, then of decode.

    None instead of a token ends that request, without an answer; so does `scheduler.abort`, which
    `compute` may call. Returns the answers by name, and what each iteration did. Greedy or not is
    `compute`'s affair. After an error nothing is under way and all blocks are given back.

    Raises: ValueError as `Scheduler.check` and for two requests of one name, both before the first
    step; OutOfBlocks where requests wait for blocks that nobody under way will give back.
    """
    requests = sorted(requests, key=lambda r: r.arrival)
    if len({r.name for r in requests}) < len(requests):
        raise ValueError("requests: expected a name of its own for each")
    for request in requests:
        scheduler.check(request)
    coming = deque(requests)
    answers: dict[str, list[int]] = {}
    history: list[Iteration] = []
    clock = 0
    try:
        while coming or scheduler.waiting or scheduler.running:
            while coming and coming[0].arrival <= clock:
                scheduler.submit(coming.popleft())
            if not (scheduler.waiting or scheduler.running):
                clock = coming[0].arrival
                continue
            done, iteration = scheduler.step(compute, stop=stop)
            answers |= done
            history.append(iteration)
            clock += 1
        return answers, history
    finally:
        scheduler.abort_all()


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
