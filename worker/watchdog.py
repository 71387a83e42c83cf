"""Whether the model's thread goes on: the liveness of a worker. It knows when a piece of work began, and nothing of what it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident


class StepWatchdog:
    """`limit_s` is the longest that one piece of work may take. A worker without work is alive for ever; so is one that still loads, for
    which the start has a budget of its own.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._began: dict[int, float] = {}  # when the work under way began, by thread; written by that thread, read by any

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around each piece of work of the model's thread, and each wait for the device."""
        self._began[get_ident()] = self._clock()
        try:
            yield
        finally:
            del self._began[get_ident()]

    def is_live(self) -> bool:
        """From any thread."""
        return all(self._clock() - began <= self._limit_s for began in list(self._began.values()))
