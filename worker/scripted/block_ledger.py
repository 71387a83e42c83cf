"""Block pools without tensors: each slot remembers which prefix its token ended, so that a sequence can prove that its blocks are its own.

A token's content is the chain value of the prefix that it ends, which is the same for every sequence with that prefix: shared blocks
agree, any other mix-up does not. As in a real cache, writing over a slot destroys what stood there for all who count on it.
"""

from collections.abc import Iterable

from worker.backend import BlockCopy
from worker.sequences import Sequence

_ROOT = 0x05514  # the empty prefix
_TORN = -1  # a slot whose predecessor in the block was not this prefix's when it was written; no chain value is negative


def extend_chain(chain: list[int], token_ids: list[int]) -> None:
    """Appends the chain values of the tokens beyond `chain`'s end."""
    value = chain[-1] if chain else _ROOT
    for token_id in token_ids[len(chain) :]:
        value = hash((value, token_id)) & 0x7FFF_FFFF_FFFF_FFFF  # of integers only: the same in every process
        chain.append(value)


class BlockPool:
    """One pool of `num_blocks` blocks of `block_size` slots, and as many blocks behind it as host memory holds."""

    def __init__(self, name: str, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self._name = name
        self._block_size = block_size
        self._blocks: list[list[int]] = [[] for _ in range(num_blocks)]  # chain values from slot 0 on; changed by `write` and `copy`
        self._host_blocks: list[list[int]] = [[] for _ in range(num_host_blocks)]

    def copy(self, copy: BlockCopy) -> None:
        source = self._host_blocks if copy.source_on_host else self._blocks
        target = self._host_blocks if copy.target_on_host else self._blocks
        target[copy.target] = source[copy.source].copy()

    def write(self, table: list[int], chain: list[int], start: int, stop: int) -> None:
        """Writes positions [start, stop) of the sequence whose prefix values are `chain`.

        Slots after a changed one are dropped: they belonged to what was overwritten. So a slot that holds a prefix's value says that all
        slots before it in the block do.
        """
        for position in range(start, stop):
            index, slot = divmod(position, self._block_size)
            block, value = self._blocks[table[index]], chain[position]
            if slot < len(block) and block[slot] == value:
                continue
            follows = slot == 0 or (slot <= len(block) and block[slot - 1] == chain[position - 1])
            del block[slot:]
            block.extend([_TORN] * (slot - len(block)))
            block.append(value if follows else _TORN)

    def find_fault(self, table: list[int], chain: list[int], start: int, stop: int) -> str | None:
        """What is wrong with the blocks that hold positions [start, stop), in one sentence; None: all hold this prefix."""
        for index in range(start // self._block_size, -(-stop // self._block_size)):
            last = min((index + 1) * self._block_size, stop) - 1
            block, slot = self._blocks[table[index]], last % self._block_size
            if slot >= len(block) or block[slot] != chain[last]:
                first = max(index * self._block_size, start)
                return f"{self._name} block {table[index]}, entry {index}, does not hold the sequence's positions {first} to {last}"
        return None


class BlockLedger:
    """Both pools of a group, and the rule of what each step needs of them."""

    def __init__(
        self, num_full_blocks: int, num_window_blocks: int, block_size: int, sliding_window: int, num_host_blocks: int = 0
    ) -> None:
        self._full = BlockPool("full", num_full_blocks, block_size, num_host_blocks)
        self._window = BlockPool("window", num_window_blocks, block_size, num_host_blocks) if num_window_blocks else None
        self._sliding_window = sliding_window

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        for copy in copies:
            pool = self._window if copy.is_window else self._full
            assert pool is not None, "the table admits no copy into a pool without blocks"
            pool.copy(copy)

    def write(self, sequence: Sequence, chain: list[int], num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        self._full.write(sequence.full_block_ids, chain, start, start + num_tokens)
        if self._window:
            self._window.write(sequence.window_block_ids, chain, start, start + num_tokens)

    def find_fault(self, sequence: Sequence, chain: list[int], num_tokens: int) -> str | None:
        """After the step's writes: do the tables hold all that the step's tokens attend to?"""
        start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
        fault = self._full.find_fault(sequence.full_block_ids, chain, 0, stop)
        if fault is None and self._window:
            attended = max(0, start - self._sliding_window + 1)
            fault = self._window.find_fault(sequence.window_block_ids, chain, attended, stop)
        return fault
