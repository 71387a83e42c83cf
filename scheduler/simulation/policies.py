"""How other routers choose a group, to compare with. A router sees its own requests only: what it sent, and what ended.

Two routers side by side know nothing of each other, as in the field.
"""

import random
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from scheduler.sequence import Request


class Policy(Protocol):
    """One router's choice; `opened` and `ended` tell it what became of its requests."""

    def choose(self, request: Request) -> str: ...

    def opened(self, request: Request, group_id: str) -> None: ...

    def ended(self, request: Request, group_id: str) -> None: ...


class Counting:
    """Knows which groups there are, and how many of its own requests each has open."""

    def __init__(self, group_ids: Sequence[str], draw: random.Random) -> None:
        self.group_ids = list(group_ids)
        self.draw = draw
        self.num_open: Counter[str] = Counter()

    def opened(self, request: Request, group_id: str) -> None:
        self.num_open[group_id] += 1

    def ended(self, request: Request, group_id: str) -> None:
        self.num_open[group_id] -= 1


class RoundRobin(Counting):
    def choose(self, request: Request) -> str:
        self.group_ids.append(self.group_ids.pop(0))
        return self.group_ids[-1]


class Random(Counting):
    def choose(self, request: Request) -> str:
        return self.draw.choice(self.group_ids)


class PowerOfTwo(Counting):
    """Two at random, of which the one with fewer requests."""

    def choose(self, request: Request) -> str:
        return min(self.draw.sample(self.group_ids, 2), key=self.num_open.__getitem__)


class LeastLoaded(Counting):
    def choose(self, request: Request) -> str:
        return min(self.group_ids, key=lambda one: (self.num_open[one], self.draw.random()))


class StickyTenants(Counting):
    """A tenant's requests always go to the same group; tenants are dealt out by number, the best that a hash can do."""

    def choose(self, request: Request) -> str:
        number = request.tenant.removeprefix("t")
        return self.group_ids[(int(number) if number.isdigit() else zlib.crc32(number.encode())) % len(self.group_ids)]


class ApproximateTree(Counting):
    """The field's cache-aware router: it remembers the prompts that it sent to each group, up to what it believes a group can hold.

    Where loads are far apart the least loaded group gets the request. Else the group whose memory matches best, if that is more than
    `match_share` of the prompt; else the group that is remembered to hold least. It hears of no eviction, and of no other router.
    """

    def __init__(
        self,
        group_ids: Sequence[str],
        draw: random.Random,
        *,
        blocks_per_group: int,
        match_share: float = 0.5,
        load_difference: int = 32,
        load_ratio: float = 1.1,
    ) -> None:
        super().__init__(group_ids, draw)
        self._blocks_per_group = blocks_per_group
        self._match_share = match_share
        self._load_difference = load_difference
        self._load_ratio = load_ratio
        self._remembered: dict[str, OrderedDict[bytes, None]] = {one: OrderedDict() for one in group_ids}  # least recently sent first

    def choose(self, request: Request) -> str:
        loads = [self.num_open[one] for one in self.group_ids]
        if max(loads) - min(loads) > self._load_difference and max(loads) > self._load_ratio * min(loads):
            return min(self.group_ids, key=self.num_open.__getitem__)
        matches = {one: self._num_matching(request, one) for one in self.group_ids}
        best = max(self.group_ids, key=matches.__getitem__)
        if matches[best] > self._match_share * len(request.block_names):
            return best
        return min(self.group_ids, key=lambda one: (len(self._remembered[one]), self.num_open[one]))

    def _num_matching(self, request: Request, group_id: str) -> int:
        remembered, names = self._remembered[group_id], request.block_names
        return next((at for at, name in enumerate(names) if name not in remembered), len(names))

    def opened(self, request: Request, group_id: str) -> None:
        super().opened(request, group_id)
        remembered = self._remembered[group_id]
        for name in reversed(request.block_names):  # a prefix's end is forgotten before its beginning
            remembered[name] = None
            remembered.move_to_end(name)
        while len(remembered) > self._blocks_per_group:
            remembered.popitem(last=False)


MakePolicy = Callable[[Sequence[str], random.Random], Policy]
