"""A stream of random numbers for each rank, though torch, random and numpy keep one for all."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed torch (its GPUs too, where there are), random and numpy."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class RandomStream:
    """The global random state of one rank: put in place when it runs, kept while others do.

    numpy's generator is exchanged rather than copied, which is a hundred times faster; the second
    normal number that `np.random.randn` has in store is lost with it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._torch: torch.Tensor | None = None

    def enter(self) -> None:
        """Make the global state this rank's."""
        if self._torch is None:
            self._numpy = np.random.MT19937(0)
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]
            seed_everything(self._seed)
        else:
            torch.set_rng_state(self._torch)
            random.setstate(self._python)
            np.random.set_bit_generator(self._numpy)  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Keep the global state until the rank's next turn."""
        self._torch = torch.get_rng_state()
        self._python = random.getstate()


class CallersState:
    """The caller's random state and thread count, put back at the end."""

    def __enter__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self._numpy = np.random.get_state()
        self._num_threads = torch.get_num_threads()

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_bit_generator(self._generator)  # type: ignore[attr-defined]
        np.random.set_state(self._numpy)
        torch.set_num_threads(self._num_threads)
