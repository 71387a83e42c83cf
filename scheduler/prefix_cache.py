"""What a group's blocks hold of prompts seen before, and which groups hold it. Pure.

A prefix can be continued at a border, a multiple of the block size, where the full-attention pool holds every block before it and the
window pool holds those that the next token's window touches. Window blocks pass out of a sequence's window all the time; those before
borders worth coming back to stay, as checkpoints that can be evicted: the ends of messages, of the prompt, of the turn, and every
CHECKPOINT_TOKENS.
"""

import bisect
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import NamedTuple

from scheduler.block_pool import BlockPool
from scheduler.host_tier import HostTier, TierCopy
from scheduler.sequence import GroupLimits, Request, Sequence

CHECKPOINT_TOKENS = 512


class PrefixIndex:
    """Names to the groups that hold them, over a whole fleet: a look-up costs by the prompt's length, not by the number of groups.

    Groups are bits of an integer, so that one step of the walk serves them all.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._group_ids: dict[int, str] = {}  # by bit
        self._bits: dict[str, int] = {}

    def join(self, group_id: str) -> None:
        bit = next(bit for bit in range(len(self._group_ids) + 1) if bit not in self._group_ids)
        self._group_ids[bit], self._bits[group_id] = group_id, bit

    def leave(self, group_id: str, names: Iterable[bytes]) -> None:
        """The group is lost with all that it held."""
        for name in names:
            self.remove(group_id, name)
        del self._group_ids[self._bits.pop(group_id)]

    def add(self, group_id: str, name: bytes) -> None:
        self._holders[name] = self._holders.get(name, 0) | 1 << self._bits[group_id]

    def remove(self, group_id: str, name: bytes) -> None:
        holders = self._holders.get(name, 0) & ~(1 << self._bits[group_id])
        if holders:
            self._holders[name] = holders
        else:
            self._holders.pop(name, None)

    def names_of(self, group_id: str) -> set[bytes]:
        """Everything that the group holds; walks the whole index."""
        return {name for name, holders in self._holders.items() if holders >> self._bits[group_id] & 1}

    def holders(self, names: Ordered[bytes]) -> dict[str, int]:
        """Leading names that each group holds; groups that hold none are left out."""
        found: dict[str, int] = {}
        holding, holders_of = -1, self._holders.get
        for count, name in enumerate(names):
            still = holding & holders_of(name, 0)
            if still != holding:
                if count:
                    self._note(holding & ~still, count, found)
                if not still:
                    return found
                holding = still
        if names:
            self._note(holding, len(names), found)
        return found

    def _note(self, groups: int, count: int, found: dict[str, int]) -> None:
        while groups:
            bit = groups & -groups
            found[self._group_ids[bit.bit_length() - 1]] = count
            groups ^= bit


@dataclass(frozen=True)
class Hit:
    """What a sequence can continue from: `num_blocks` of its prompt, and of the window pool the last ones of them.

    Full blocks beyond `full_block_ids`, and window blocks that are None, are in host memory and have to be fetched.
    """

    num_blocks: int = 0
    full_block_ids: Ordered[int] = ()
    window_block_ids: Ordered[int | None] = ()

    @property
    def num_fetched(self) -> int:
        """Blocks of both pools that have to come from host memory."""
        return self.num_blocks - len(self.full_block_ids) + sum(block_id is None for block_id in self.window_block_ids)


class Expected(NamedTuple):
    """What a request would continue from if it were routed here now: blocks of its prompt, and fetches from host memory for them."""

    num_blocks: int
    num_fetched: int


class PrefixCache:
    """The two pools of one group, with host memory behind each. `index` hears what can be found here, promises included."""

    def __init__(self, limits: GroupLimits, index: PrefixIndex | None = None, group_id: str = "") -> None:
        self.full = BlockPool(limits.num_full_blocks, self._keep_full)
        self.window = BlockPool(limits.num_window_blocks, self._keep_window)
        self.host_full = HostTier(limits.num_host_blocks, is_window=False)
        self.host_window = HostTier(limits.num_host_blocks if limits.num_window_blocks else 0, is_window=True)
        self._limits = limits
        self._index = index
        self._group_id = group_id
        self._promised: Counter[bytes] = Counter()
        if index is not None:
            index.join(group_id)

    def close(self) -> None:
        """Takes the group out of the index."""
        if self._index is not None:
            self._index.leave(self._group_id, [*self.full.names(), *self.host_full.names(), *self._promised])

    # ---- looking up ----

    def find(self, names: Ordered[bytes], max_blocks: int, with_host: bool = True) -> Hit:
        """The longest continuation at a border of at most `max_blocks`, with or without what is in host memory. Changes nothing."""
        full: list[int] = []
        num_held = 0
        for name in names[:max_blocks]:
            if len(full) == num_held and (block_id := self.full.find(name)) is not None:
                full.append(block_id)
            elif not with_host or name not in self.host_full:
                break
            num_held += 1
        for border in range(num_held, 0, -1):
            window = self._find_window(names, border, with_host)
            if window is not None:
                return Hit(border, full[:border], window)
        return Hit()

    def _find_window(self, names: Ordered[bytes], border: int, with_host: bool) -> list[int | None] | None:
        """The window blocks that a token at the border needs; None where one is missing."""
        if not self._limits.num_window_blocks:
            return []
        found = []
        for name in names[self.first_window_block(border) : border]:
            block_id = self.window.find(name)
            if block_id is None and not (with_host and name in self.host_window):
                return None
            found.append(block_id)
        return found

    def first_window_block(self, border: int) -> int:
        """The first block that the token after `border` blocks attends to in a window layer."""
        return max(0, border * self._limits.block_size - self._limits.sliding_window + 1) // self._limits.block_size

    def num_needed(self, hit: Hit) -> tuple[int, int]:
        """Free blocks, full and window, that taking the hit uses up: idle ones that it finds, and room for those that it fetches."""
        full = sum(map(self.full.is_idle, hit.full_block_ids)) + hit.num_blocks - len(hit.full_block_ids)
        return full, sum(block_id is None or self.window.is_idle(block_id) for block_id in hit.window_block_ids)

    def expect(self, request: Request) -> Expected:
        """What the request would continue from, prompts counted that were routed here and still wait."""
        names, max_blocks = request.block_names, (len(request.prompt_token_ids) - 1) // self._limits.block_size
        hit = self.find(names, max_blocks)
        num_promised = next((at for at, name in enumerate(names[:max_blocks]) if not self._will_hold(name)), max_blocks)
        if num_promised <= hit.num_blocks or not self._limits.num_window_blocks:
            return Expected(max(hit.num_blocks, num_promised), hit.num_fetched)
        border = num_promised - num_promised % self._interval
        place = bisect.bisect_right(request.checkpoint_blocks, num_promised)
        return Expected(max(hit.num_blocks, border, request.checkpoint_blocks[place - 1] if place else 0), hit.num_fetched)

    def eviction_tokens(self, num_blocks: int) -> int:
        """Cached tokens that were of use before and would have to go to make room for so many blocks."""
        return max(0, num_blocks - self.full.num_unproven) * self._limits.block_size

    def _will_hold(self, name: bytes) -> bool:
        return name in self._promised or self.full.find(name) is not None or name in self.host_full

    # ---- promises: prompts that were routed here and are not computed yet ----

    def promise(self, names: Ordered[bytes]) -> None:
        self.full.touch([block_id for name in reversed(names) if (block_id := self.full.find(name)) is not None])
        for name in names:
            self._promised[name] += 1
            if self._index is not None:
                self._index.add(self._group_id, name)

    def redeem(self, names: Ordered[bytes]) -> None:
        """The promise is kept, or void: from here on what is held counts by itself."""
        for name in names:
            self._promised[name] -= 1
            if not self._promised[name]:
                del self._promised[name]
                self._note_lost(name)

    def _note_lost(self, name: bytes) -> None:
        if self._index is not None and not self._will_hold(name):
            self._index.remove(self._group_id, name)

    def _keep_full(self, name: bytes, block_id: int) -> None:
        if (lost := self.host_full.store(name, block_id)) is not None:
            self._note_lost(lost)

    def _keep_window(self, name: bytes, block_id: int) -> None:
        self.host_window.store(name, block_id)

    def take_copies(self) -> list[TierCopy]:
        """Copies that the next plan has to make before anything else."""
        return self.host_full.take_copies() + self.host_window.take_copies()

    # ---- a sequence's tables ----

    def take(self, sequence: Sequence, hit: Hit) -> None:
        """Begins the sequence's tables with what was found, fetched from host memory where it must be."""
        names = sequence.block_names(hit.num_blocks, self._limits.block_size)
        first = hit.num_blocks - len(hit.window_block_ids)
        self.full.share(hit.full_block_ids)
        self.window.share(block_id for block_id in hit.window_block_ids if block_id is not None)
        self.host_full.pin(set(names[len(hit.full_block_ids) : hit.num_blocks]))
        self.host_window.pin(set(names[first : hit.num_blocks]))
        sequence.full_block_ids = list(hit.full_block_ids)
        for name in names[len(hit.full_block_ids) : hit.num_blocks]:
            sequence.full_block_ids.append(self._fetch(self.full, self.host_full, name))
        sequence.window_block_ids = [
            self._fetch(self.window, self.host_window, name) if block_id is None else block_id
            for name, block_id in zip(names[first : hit.num_blocks], hit.window_block_ids, strict=True)
        ]
        sequence.num_passed_window_blocks = first if self._limits.num_window_blocks else 0
        sequence.num_named_blocks = hit.num_blocks
        sequence.num_scheduled_tokens = hit.num_blocks * self._limits.block_size

    @staticmethod
    def _fetch(pool: BlockPool, host: HostTier, name: bytes) -> int:
        (block_id,) = pool.allocate(1)
        host.fetch(name, block_id)
        pool.give_name(block_id, name)
        return block_id

    def num_tokens_with_blocks(self, sequence: Sequence) -> int:
        """Tokens beyond num_scheduled_tokens that the sequence's blocks and the free ones can hold, in both pools."""
        num_blocks = len(sequence.full_block_ids) + self.full.num_free
        if self._limits.num_window_blocks:
            held = sequence.num_passed_window_blocks + len(sequence.window_block_ids)
            num_blocks = min(num_blocks, held + self.window.num_free)
        return num_blocks * self._limits.block_size - sequence.num_scheduled_tokens

    def extend(self, sequence: Sequence, count: int) -> tuple[list[int], list[int]]:
        """Gives it the full and window blocks that positions up to num_scheduled_tokens + count need, and returns the new ones."""
        needed = self._limits.num_blocks(sequence.num_scheduled_tokens + count)
        full = self.full.allocate(max(0, needed - len(sequence.full_block_ids)))
        held = sequence.num_passed_window_blocks + len(sequence.window_block_ids)
        window = self.window.allocate(max(0, needed - held)) if self._limits.num_window_blocks else []
        sequence.full_block_ids += full
        sequence.window_block_ids += window
        return full, window

    def name_blocks(self, sequence: Sequence) -> None:
        """Makes findable what the plans so far compute of known tokens: a later plan's reads come after their writes."""
        num_known = min(sequence.num_known_tokens, sequence.num_scheduled_tokens) // self._limits.block_size
        if num_known <= sequence.num_named_blocks:
            return
        names = sequence.block_names(num_known, self._limits.block_size)
        if not names:
            return
        for at in range(sequence.num_named_blocks, num_known):
            if self.full.give_name(sequence.full_block_ids[at], names[at]) and self._index is not None:
                self._index.add(self._group_id, names[at])
            if (place := at - sequence.num_passed_window_blocks) >= 0 and self._limits.num_window_blocks:
                self.window.give_name(sequence.window_block_ids[place], names[at])
        sequence.num_named_blocks = num_known

    def free_passed_window(self, sequence: Sequence) -> None:
        """Lets go of window blocks that no later token of it attends to; only checkpoints can still be found then."""
        first_seen = sequence.num_scheduled_tokens - self._limits.sliding_window + 1
        num_passed = max(0, first_seen) // self._limits.block_size - sequence.num_passed_window_blocks
        if num_passed <= 0 or not self._limits.num_window_blocks:
            return
        passed = sequence.window_block_ids[:num_passed]
        del sequence.window_block_ids[:num_passed]
        self.window.release(reversed(passed))
        for at, block_id in enumerate(passed, sequence.num_passed_window_blocks):
            if self.window.is_idle(block_id) and not self._is_checkpoint(sequence, at):
                self.window.drop_name(block_id)
        sequence.num_passed_window_blocks += num_passed

    def _is_checkpoint(self, sequence: Sequence, at: int) -> bool:
        """Whether window block `at` is needed to continue at the next border worth coming back to."""
        borders, next_border = sequence.request.checkpoint_blocks, (at // self._interval + 1) * self._interval
        if (place := bisect.bisect_right(borders, at)) < len(borders):
            next_border = min(next_border, borders[place])
        return at >= self.first_window_block(next_border)

    @property
    def _interval(self) -> int:
        """Blocks from one regular checkpoint to the next."""
        return max(1, CHECKPOINT_TOKENS // self._limits.block_size)

    def disown(self, sequence: Sequence) -> None:
        """What the sequence computed is not to be trusted: nobody may find it any more."""
        for block_id in sequence.full_block_ids:
            if (name := self.full.drop_name(block_id)) is not None:
                self.host_full.drop(name)
                self._note_lost(name)
        for block_id in sequence.window_block_ids:
            if (name := self.window.drop_name(block_id)) is not None:
                self.host_window.drop(name)
        sequence.prefix, sequence.num_named_blocks = None, len(sequence.full_block_ids)  # so that none is named again

    def release(self, sequence: Sequence) -> None:
        """Gives back all blocks of a sequence that ended or is preempted; what has a name can be found until its room is needed."""
        self.name_blocks(sequence)
        self.full.release(reversed(sequence.full_block_ids))
        self.window.release(reversed(sequence.window_block_ids))
        sequence.full_block_ids, sequence.window_block_ids = [], []
        sequence.num_passed_window_blocks = sequence.num_named_blocks = 0

    def check_integrity(self, sequences: Ordered[Sequence]) -> None:
        self.full.check_integrity(one.full_block_ids for one in sequences)
        self.window.check_integrity(one.window_block_ids for one in sequences)
        self.host_full.check_integrity(self._limits.num_host_blocks)
        assert all(count > 0 for count in self._promised.values())
        if self._index is not None:
            held = {*self.full.names(), *self.host_full.names(), *self._promised}
            assert held == self._index.names_of(self._group_id), "the fleet's index and the group's blocks differ"
