"""Whether a plan can be done: the table as it would be after it, or a typed refusal. Changes nothing of the real table."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from services.errors import BlockOutOfRange, InvalidPlan, UnknownSequence
from worker.backend import BlockCopy, ModelFacts
from worker.sequences import ScheduledSequence, Sequence
from worker.step_plan import Admission, Appended, CachedBlock

STALE_BLOCK = 0  # fills window entries before the first that is held; a block of the pool, so that kernels may load it and mask it


@dataclass(frozen=True)
class Limits:
    """What a group can hold and compute at once."""

    facts: ModelFacts
    max_batch_tokens: int
    max_num_seqs: int

    @property
    def max_blocks(self) -> int:
        """Blocks of one sequence, in either pool."""
        return -(-self.facts.max_model_len // self.facts.block_size)


class PlanDraft:
    """A copy of the table's maps; the methods are called in the plan's order, and each raises at the first thing that cannot be.

    `sequences` and `failed` are then what the table becomes, apart from appended blocks.
    """

    def __init__(self, limits: Limits, sequences: Mapping[int, Sequence], failed: AbstractSet[int]) -> None:
        self._limits, self._facts = limits, limits.facts
        self._growth: dict[int, tuple[int, int]] = {}  # seq_id -> (full, window) blocks to append
        self.sequences = dict(sequences)
        self.failed = set(failed)

    def release(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self.sequences:
                del self.sequences[seq_id]
            elif seq_id in self.failed:
                self.failed.remove(seq_id)
            else:
                raise UnknownSequence(f"released names sequence {seq_id}, which is not held; release what was admitted, once", "released")

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        for copy in copies:
            self._check_blocks((copy.source,), copy.is_window, "copies", copy.source_on_host)
            self._check_blocks((copy.target,), copy.is_window, "copies", copy.target_on_host)

    def admit(self, admissions: Iterable[Admission]) -> None:
        for admission in admissions:
            if admission.seq_id in self.sequences or admission.seq_id in self.failed:
                raise UnknownSequence(f"admitted names sequence {admission.seq_id}, which is held already; give each a new id", "admitted")
            self._check_tokens(admission)
            self._check_tables(admission)
            if admission.rejection is None:
                self.sequences[admission.seq_id] = _new_sequence(admission)
            else:
                self.failed.add(admission.seq_id)
        if len(self.sequences) > self._limits.max_num_seqs:
            raise InvalidPlan(
                f"{len(self.sequences)} sequences would be held, max_num_seqs is {self._limits.max_num_seqs}; release some", "admitted"
            )

    def append(self, appended: Iterable[Appended]) -> None:
        for one in appended:
            if one.seq_id in self.failed:
                continue
            if one.seq_id not in self.sequences:
                raise UnknownSequence(f"appended names sequence {one.seq_id}, which is not held; admit it first", "appended")
            self._check_blocks(one.full_block_ids, False, "appended.full_block_ids")
            self._check_blocks(one.window_block_ids, True, "appended.window_block_ids")
            num_full, num_window = self._growth.get(one.seq_id, (0, 0))
            self._growth[one.seq_id] = num_full + len(one.full_block_ids), num_window + len(one.window_block_ids)
            self._check_lengths(one.seq_id, *self._table_lengths(self.sequences[one.seq_id]), "appended")

    def name(self, blocks: Iterable[CachedBlock]) -> None:
        for block in blocks:
            self._check_blocks((block.block_id,), block.is_window, "cached")

    def schedule(self, scheduled: Iterable[tuple[int, int]]) -> list[ScheduledSequence]:
        """What the step computes. A failed sequence is passed over."""
        counts = dict(pairs := list(scheduled))
        if len(counts) != len(pairs):
            raise InvalidPlan("a sequence is scheduled twice; name each once", "scheduled_seq_ids")
        if (num_tokens := sum(counts.values())) > self._limits.max_batch_tokens:
            raise InvalidPlan(
                f"{num_tokens} tokens are scheduled, max_batch_tokens is {self._limits.max_batch_tokens}; schedule fewer",
                "num_scheduled_tokens",
            )
        return [self._schedule_one(seq_id, count) for seq_id, count in pairs if seq_id not in self.failed]

    def _schedule_one(self, seq_id: int, count: int) -> ScheduledSequence:
        sequence = self.sequences.get(seq_id)
        if count == 1 and sequence and self._has_room_for_one(sequence):
            return ScheduledSequence(sequence, 1)
        if sequence is None:
            raise UnknownSequence(f"sequence {seq_id} is scheduled but not held; admit it first", "scheduled_seq_ids")
        num_left = len(sequence.token_ids) - sequence.num_computed_tokens
        if not 1 <= count <= num_left:
            raise InvalidPlan(
                f"sequence {seq_id} is scheduled with {count} tokens; schedule 1 to {num_left}, those known and not computed",
                "num_scheduled_tokens",
            )
        end = sequence.num_computed_tokens + count
        if end > self._facts.max_model_len:
            raise InvalidPlan(
                f"sequence {seq_id} would pass max_model_len, {self._facts.max_model_len} tokens; end it", "num_scheduled_tokens"
            )
        self._check_cover(seq_id, *self._table_lengths(sequence), end)
        return ScheduledSequence(sequence, count)

    def _has_room_for_one(self, sequence: Sequence) -> bool:
        """The common case, a decode within its blocks, told in one glance: between two steps the device waits for this."""
        end = sequence.num_computed_tokens + 1
        if end > len(sequence.token_ids) or end > self._facts.max_model_len or end > len(sequence.full_block_ids) * self._facts.block_size:
            return False
        return not self._facts.num_window_blocks or end <= len(sequence.window_block_ids) * self._facts.block_size

    def _check_tokens(self, admission: Admission) -> None:
        name, num_tokens, facts = f"admitted sequence {admission.seq_id}", len(admission.token_ids), self._facts
        if not 0 < num_tokens <= facts.max_model_len:
            raise InvalidPlan(f"{name} has {num_tokens} tokens; give it 1 to {facts.max_model_len} (max_model_len)", "admitted.token_ids")
        if (highest := max(admission.token_ids)) >= facts.vocab_size:
            raise InvalidPlan(f"{name} has token {highest}, but ids end at {facts.vocab_size - 1}; send known ids", "admitted.token_ids")
        if not 0 < admission.num_prompt_tokens <= num_tokens:
            raise InvalidPlan(
                f"{name} has {admission.num_prompt_tokens} prompt tokens; give it 1 to {num_tokens}", "admitted.num_prompt_tokens"
            )
        if admission.num_computed_tokens >= num_tokens:
            raise InvalidPlan(f"{name} has no token left to compute; leave at least its last", "admitted.num_computed_tokens")

    def _check_tables(self, admission: Admission) -> None:
        self._check_blocks(admission.full_block_ids, False, "admitted.full_block_ids")
        self._check_blocks(admission.window_block_ids, True, "admitted.window_block_ids")
        num_full, num_window = len(admission.full_block_ids), admission.first_window_block + len(admission.window_block_ids)
        self._check_lengths(admission.seq_id, num_full, num_window, "admitted")
        self._check_cover(admission.seq_id, num_full, num_window, admission.num_computed_tokens)
        # The first token to compute attends to sliding_window - 1 tokens before it; later ones need later blocks only.
        needed = max(0, admission.num_computed_tokens - self._facts.sliding_window + 1) // self._facts.block_size
        if self._facts.num_window_blocks and admission.first_window_block > needed:
            raise BlockOutOfRange(
                f"admitted sequence {admission.seq_id} has window blocks from entry {admission.first_window_block} on, "
                f"but its next token attends from entry {needed} on; keep the blocks of the window",
                "admitted.first_window_block",
            )

    def _check_blocks(self, block_ids: Iterable[int], is_window: bool, param: str, on_host: bool = False) -> None:
        pool, size = ("window", self._facts.num_window_blocks) if is_window else ("full", self._facts.num_full_blocks)
        if on_host:
            pool, size = "host", self._facts.num_host_blocks
        highest = max(block_ids, default=-1)
        if highest >= size:
            raise BlockOutOfRange(f"{param} names block {highest}, but the {pool} pool has only {size}; use ids below that", param)

    def _check_lengths(self, seq_id: int, num_full: int, num_window: int, param: str) -> None:
        if max(num_full, num_window) > self._limits.max_blocks:
            raise BlockOutOfRange(
                f"sequence {seq_id} would have {num_full} full and {num_window} window blocks; "
                f"max_model_len needs {self._limits.max_blocks}",
                param,
            )

    def _check_cover(self, seq_id: int, num_full: int, num_window: int, end: int) -> None:
        """The tables must reach position `end`."""
        shortest = min(num_full, num_window) if self._facts.num_window_blocks else num_full
        if shortest * self._facts.block_size < end:
            raise BlockOutOfRange(
                f"sequence {seq_id} has {num_full} full and {num_window} window blocks, too few for {end} tokens; append blocks", "appended"
            )

    def _table_lengths(self, sequence: Sequence) -> tuple[int, int]:
        num_full, num_window = self._growth.get(sequence.seq_id, (0, 0))
        return len(sequence.full_block_ids) + num_full, len(sequence.window_block_ids) + num_window


def _new_sequence(admission: Admission) -> Sequence:
    return Sequence(
        seq_id=admission.seq_id,
        request_id=admission.request_id,
        token_ids=admission.token_ids.copy(),
        num_prompt_tokens=admission.num_prompt_tokens,
        sampling=admission.sampling,
        num_computed_tokens=admission.num_computed_tokens,
        full_block_ids=admission.full_block_ids.copy(),
        window_block_ids=[STALE_BLOCK] * admission.first_window_block + admission.window_block_ids,
    )
