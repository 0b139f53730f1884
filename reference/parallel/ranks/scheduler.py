"""The baton: of all rank threads, one runs at a time, until it must wait for others.

Each thread sleeps on a lock of its own. Handing over is releasing the next rank's lock and
acquiring one's own: no polling, no races, the same order each time. Threads rather than coroutines,
because a rank must be able to wait anywhere, even in a hook in the middle of backward.

Nobody left to run while some still wait is a deadlock, known at once and with all that each waits
for: each of them raises it. When a rank raises anything else, the others are released: their wait
raises `Released`, which only unwinds.
"""

import contextvars
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence

from reference.parallel.ranks.random_streams import RandomStream

Describe = Callable[[], str]
INTERRUPT_ATTEMPTS = 100


class Deadlock(RuntimeError):
    """Each rank that has not finished waits for another one."""


class Released(BaseException):
    """Unwinds a rank after another one has failed. No Exception: no program should catch it."""


def own_copy(error: Exception) -> Exception:
    """The same error for one more rank, with a traceback and notes of its own."""
    try:
        copy = type(error)(*error.args)
    except Exception:  # its class asks for other arguments
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.__cause__ = error.__cause__
    return copy.with_traceback(error.__traceback__)


def deadlock(waits: list[tuple[int, str]], others: dict[int, str], report: str) -> Deadlock:
    """What each rank does, and what is odd about it."""
    at_work = [rank for rank, what in others.items() if what == "is at work"]
    stuck = "some ranks can never go on" if at_work else "no rank can go on"
    lines = [f"rank {rank} waits in {where}" for rank, where in waits]
    lines += [f"rank {rank} {what}" for rank, what in sorted(others.items())]
    return Deadlock("\n  ".join([stuck, *lines]) + (f"\n{report}" if report else ""))


class Baton:
    """Runs `body(rank)` in one thread a rank, one at a time.

    `report` adds to the message of a deadlock.
    """

    def __init__(self, streams: Sequence[RandomStream], report: Describe) -> None:
        self._streams, self._report = streams, report
        self._turns = [threading.Lock() for _ in streams]
        for turn in self._turns:
            turn.acquire()
        self._ready = deque(range(len(streams)))
        self._waiting: dict[int, Describe] = {}
        self._finished: set[int] = set()
        self._deadlocked: set[int] = set()
        self._running = -1
        self._failure: BaseException | None = None

    def run(self, body: Callable[[int], None]) -> None:
        """Until all ranks have finished. Raises: what the first failing rank raised."""
        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(self._live, body, rank),
                name=f"rank {rank}",
                daemon=True,
            )
            for rank in range(len(self._turns))
        ]
        for thread in threads:
            thread.start()
        try:
            self._pass_on()
            for thread in threads:
                thread.join()
        except BaseException as interrupt:
            self._interrupt(threads, interrupt)
            raise
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self, rank: int, describe: Describe) -> None:
        """Hand over until another rank calls `release` for this one.

        Raises: Deadlock where nobody is left to do so.
        """
        self.check()
        self._waiting[rank] = describe
        self._hand_over(rank)
        if rank in self._deadlocked:
            self._deadlocked.remove(rank)
            assert isinstance(self._failure, Deadlock)
            raise own_copy(self._failure)
        self.check()

    def release(self, ranks: Sequence[int]) -> None:
        """Let waiting ranks run when their turn comes."""
        for rank in ranks:
            del self._waiting[rank]
            self._ready.append(rank)

    def let_others_run(self, rank: int) -> None:
        """Go to the end of the queue."""
        self.check()
        self._ready.append(rank)
        self._hand_over(rank)
        self.check()

    def check(self) -> None:
        """Raises: Released after another rank has failed."""
        if self._failure is not None:
            raise Released

    def _hand_over(self, rank: int) -> None:
        self._streams[rank].leave()
        self._pass_on()
        self._turns[rank].acquire()
        self._running = rank
        self._streams[rank].enter()

    def _live(self, body: Callable[[int], None], rank: int) -> None:
        self._turns[rank].acquire()
        self._running = rank
        try:
            self._streams[rank].enter()
            self.check()
            body(rank)
        except Released:
            pass
        except BaseException as error:
            self._fail(rank, error)
        finally:
            self._finished.add(rank)
            self._pass_on()

    def _pass_on(self) -> None:
        if not self._ready and self._waiting and self._failure is None:
            self._failure = self._deadlock()
            self._deadlocked = set(self._waiting)
        if self._failure is not None:
            self.release(sorted(self._waiting))
        if self._ready:
            self._turns[self._ready.popleft()].release()

    def _fail(self, rank: int, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            others = "".join(f"\n  rank {r} waited in {d()}" for r, d in self._waits())
            error.add_note(f"raised in rank {rank} of {len(self._turns)}{others}")

    def _deadlock(self) -> Deadlock:
        waits = [(rank, describe()) for rank, describe in self._waits()]
        return deadlock(waits, dict.fromkeys(self._finished, "has finished"), self._report())

    def _waits(self) -> list[tuple[int, Describe]]:
        return sorted(self._waiting.items(), key=lambda item: item[0])

    def _interrupt(self, threads: Sequence[threading.Thread], interrupt: BaseException) -> None:
        """After Ctrl-C or a time limit: stop the running rank at its next line, then the others."""
        self._failure = interrupt
        for _ in range(INTERRUPT_ATTEMPTS):
            if not any(thread.is_alive() for thread in threads):
                return
            running = threads[self._running]
            if running.is_alive() and running.ident is not None:
                ident = ctypes.c_ulong(running.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Released))
            running.join(timeout=0.05)
