"""A virtual clock: what happens is a heap of actions by time, and time jumps from one to the next."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventLoop:
    """`now` is in seconds. Actions may add further ones, at `now` at the earliest; those of one time go in the order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Action]] = []
        self._num_asked = 0

    def at(self, time_s: float, action: Action) -> None:
        assert time_s >= self.now, "nothing happens in the past"
        self._num_asked += 1
        heapq.heappush(self._events, (time_s, self._num_asked, action))

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now + delay_s, action)

    def run(self, until_s: float = float("inf")) -> None:
        """Until nothing is left to happen, or the next thing would be after `until_s`."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, action = heapq.heappop(self._events)
            action()
