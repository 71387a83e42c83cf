"""One pool of KV blocks: who uses them, what they hold, and which goes first when room is needed. Pure bookkeeping of ids.

A block is in use (by one sequence, or by several that share a prefix), idle (nobody uses it, but its content has a name and can be found),
or clean.

Room is made by least recent use, and content that was found again after its first use has REUSE_WORTH times as long to be found once more:
most prompts end in something that nobody asks for twice, and would push out the beginnings that many share.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

REUSE_WORTH = 8


class BlockPool:
    """Blocks 0 to num_blocks - 1. `on_evicted` hears of a name that has lost its block, while the block still holds the content."""

    def __init__(self, num_blocks: int, on_evicted: Callable[[bytes, int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evicted = on_evicted
        self._num_users = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._clean = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._idle: OrderedDict[int, int] = OrderedDict()  # least recently used first, with the clock of that use; used once
        self._idle_reused: OrderedDict[int, int] = OrderedDict()  # the same for those that were found again
        self._is_reused = [False] * num_blocks
        self._clock = 0  # blocks handed out so far

    @property
    def num_free(self) -> int:
        """Blocks that can be had: clean ones, and idle ones whose content would go."""
        return len(self._clean) + len(self._idle) + len(self._idle_reused)

    @property
    def num_unproven(self) -> int:
        """Free blocks whose content nobody has asked for a second time."""
        return len(self._clean) + len(self._idle)

    def names(self) -> list[bytes]:
        """Everything that can be found here."""
        return list(self._block_of)

    def find(self, name: bytes) -> int | None:
        return self._block_of.get(name)

    def is_idle(self, block_id: int) -> bool:
        return not self._num_users[block_id]

    def allocate(self, count: int) -> list[int]:
        """Clean blocks first, then the idle ones that were used longest ago."""
        assert count <= self.num_free, "the caller checks num_free before it allocates"
        taken = [self._clean.pop() if self._clean else self._evict() for _ in range(count)]
        self._clock += count
        for block_id in taken:
            self._num_users[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more user for blocks that were found by name."""
        for block_id in block_ids:
            if not self._num_users[block_id]:
                del self._idle_of(block_id)[block_id]
            self._num_users[block_id] += 1
            self._is_reused[block_id] = True

    def touch(self, block_ids: Iterable[int]) -> None:
        """Found, and soon to be shared: as far from eviction as if released just now. In the order of eviction, as for `release`."""
        for block_id in block_ids:
            if not self._num_users[block_id]:
                del self._idle_of(block_id)[block_id]
                self._idle_reused[block_id] = self._clock
            self._is_reused[block_id] = True

    def _idle_of(self, block_id: int) -> OrderedDict[int, int]:
        return self._idle_reused if self._is_reused[block_id] else self._idle

    def release(self, block_ids: Iterable[int]) -> None:
        """One user less. In the order of eviction: a prefix's end must be given before its beginning, which is of use to more prompts."""
        for block_id in block_ids:
            self._num_users[block_id] -= 1
            assert self._num_users[block_id] >= 0, f"block {block_id} is released more often than it was taken"
            if self._num_users[block_id]:
                continue
            if self._name_of[block_id] is None:
                self._clean.append(block_id)
            else:
                self._idle_of(block_id)[block_id] = self._clock

    def give_name(self, block_id: int, name: bytes) -> bool:
        """From now on the block can be found. False where another holds the same content: that one is found, this one stays nameless."""
        if name in self._block_of or self._name_of[block_id] is not None:
            return False
        self._name_of[block_id] = name
        self._block_of[name] = block_id
        return True

    def drop_name(self, block_id: int) -> bytes | None:
        """The content is of no more use to others: the block cannot be found any more. Returns the name that it had."""
        name = self._name_of[block_id]
        if name is not None:
            self._name_of[block_id] = None
            del self._block_of[name]
            if not self._num_users[block_id]:
                del self._idle_of(block_id)[block_id]
                self._clean.append(block_id)
            self._is_reused[block_id] = False
        return name

    def _evict(self) -> int:
        block_id, _ = self._next_victims().popitem(last=False)
        name = self._name_of[block_id]
        assert name is not None
        self._name_of[block_id] = None
        self._is_reused[block_id] = False
        del self._block_of[name]
        self._on_evicted(name, block_id)
        return block_id

    def _next_victims(self) -> OrderedDict[int, int]:
        if not self._idle or not self._idle_reused:
            return self._idle or self._idle_reused
        used_once, reused = next(iter(self._idle.values())), next(iter(self._idle_reused.values()))
        return self._idle_reused if self._clock - reused > REUSE_WORTH * (self._clock - used_once) else self._idle

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless every block is clean, idle or in use, with as many users as `tables` name it."""
        num_users = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                num_users[block_id] += 1
        assert num_users == self._num_users, "users and tables differ"
        unused = {block_id for block_id, users in enumerate(num_users) if not users}
        idle = [*self._idle, *self._idle_reused]
        assert sorted([*self._clean, *idle]) == sorted(unused), "clean and idle blocks are not the unused ones"
        assert all(self._name_of[block_id] is not None and block_id in self._idle_of(block_id) for block_id in idle)
        assert all(self._name_of[block_id] is None for block_id in self._clean)
        assert {name: at for at, name in enumerate(self._name_of) if name is not None} == self._block_of
