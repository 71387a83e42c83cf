"""Which cached prefix stands in which block, by the owner's hashes: what a new owner is told, so that the cache outlives an owner.

A name goes as soon as its block is written again, so that names are right even where an owner forgot to withdraw one.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ordered

from worker.backend import BlockCopy
from worker.sequences import ScheduledSequence, Sequence
from worker.step_plan import CachedBlock


class BlockNames:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._names: dict[tuple[bool, int], bytes] = {}  # (is_window, block id) -> hash; changed by the methods only

    def __iter__(self) -> Iterator[CachedBlock]:
        return iter([CachedBlock(is_window, block_id, name) for (is_window, block_id), name in self._names.items()])

    def note_step(self, copies: Iterable[BlockCopy], scheduled: Iterable[ScheduledSequence], named: Ordered[CachedBlock]) -> None:
        """Forgets the names of the blocks that this step writes, then takes the plan's own."""
        if not self._names and not named:
            return
        for copy in copies:
            if not copy.target_on_host:
                self._names.pop((copy.is_window, copy.target), None)
        for one in scheduled:
            first = one.sequence.num_computed_tokens
            self._forget(one.sequence, slice(first // self._block_size, -(-(first + one.num_tokens) // self._block_size)))
        for block in named:
            if block.name:
                self._names[block.is_window, block.block_id] = block.name
            else:
                self._names.pop((block.is_window, block.block_id), None)

    def note_failure(self, sequence: Sequence) -> None:
        """What a failed sequence wrote is not to be trusted."""
        self._forget(sequence, slice(None))

    def _forget(self, sequence: Sequence, entries: slice) -> None:
        for is_window, table in ((False, sequence.full_block_ids), (True, sequence.window_block_ids)):
            for block_id in table[entries]:
                self._names.pop((is_window, block_id), None)
