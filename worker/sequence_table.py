"""The sequences of one rank and the plans that change them. A plan is judged whole before anything of it is done.

Knows nothing of tensors and nothing of the wire: plans come as values, and every rank that applies equal plans holds an equal table.
"""

from collections.abc import Iterable

from services.errors import InvalidPlan, StaleEpoch
from worker.backend import StepOutput
from worker.plan_draft import Limits, PlanDraft
from worker.sequences import UNKNOWN_TOKEN, ScheduledSequence, Sequence
from worker.step_plan import StepPlan


class SequenceTable:
    """What one rank holds.

    A sequence that failed stays known by its id until it is released, and computes nothing: plans that name it may already be under way
    when the owner learns of the failure.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Changed by `apply`, `advance`, `settle` and `forget` only.
        self._sequences: dict[int, Sequence] = {}
        self._failed: set[int] = set()
        self._epoch = 0
        self._step = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __repr__(self) -> str:
        held = ", ".join(f"{one.seq_id}: {one.num_computed_tokens}/{len(one.token_ids)}" for one in self._sequences.values())
        return f"SequenceTable(epoch={self._epoch}, step={self._step}, held={{{held}}}, failed={self._failed or '{}'})"

    def apply(self, plan: StepPlan) -> list[ScheduledSequence]:
        """Makes the plan's changes and returns what it computes, in its order.

        Raises StaleEpoch, UnknownSequence, BlockOutOfRange or InvalidPlan. Nothing has changed then: its step is still due.
        """
        self._check_turn(plan)
        draft = PlanDraft(self._limits, self._sequences, self._failed)
        draft.release(plan.released)
        draft.copy(plan.copies)
        draft.admit(plan.admitted)
        draft.append(plan.appended)
        draft.name(plan.cached)
        scheduled = draft.schedule(plan.scheduled)
        # From here on nothing is refused.
        self._epoch, self._step = plan.epoch, plan.step
        self._sequences, self._failed = draft.sequences, draft.failed
        for appended in plan.appended:
            if sequence := self._sequences.get(appended.seq_id):
                sequence.full_block_ids.extend(appended.full_block_ids)
                sequence.window_block_ids.extend(appended.window_block_ids)
        return scheduled

    def advance(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Records a step that draws: its tokens count as computed, and each drawn token as there, if yet unknown."""
        for one in scheduled:
            if one.draws_token:
                one.sequence.token_ids.append(UNKNOWN_TOKEN)
            one.sequence.num_computed_tokens += one.num_tokens

    def settle(self, scheduled: Iterable[ScheduledSequence], output: StepOutput) -> None:
        """Fills in what the step drew, before another one is recorded; failed sequences are gone."""
        sequences = {one.sequence.seq_id: one.sequence for one in scheduled}
        for token in output.drawn:
            sequences[token.seq_id].token_ids[-1] = token.token_id
        for failure in output.failed:
            if sequences[failure.seq_id].token_ids[-1] == UNKNOWN_TOKEN:
                del sequences[failure.seq_id].token_ids[-1]
            if self._sequences.pop(failure.seq_id, None):
                self._failed.add(failure.seq_id)

    def forget(self) -> None:
        """Drops every sequence: their stream has ended. The epoch stays, and the next stream counts its steps from 1."""
        self._sequences, self._failed, self._step = {}, set(), 0

    def check_integrity(self) -> None:
        """Asserts what must hold between steps."""
        facts = self._limits.facts
        assert len(self._sequences) <= self._limits.max_num_seqs
        assert not self._failed & self._sequences.keys()
        for seq_id, sequence in self._sequences.items():
            assert sequence.seq_id == seq_id
            assert 0 <= sequence.num_computed_tokens <= len(sequence.token_ids)
            assert 0 < sequence.num_prompt_tokens <= len(sequence.token_ids)
            assert all(0 <= block < facts.num_full_blocks for block in sequence.full_block_ids)
            assert all(0 <= block < facts.num_window_blocks for block in sequence.window_block_ids)
            assert sequence.num_computed_tokens <= len(sequence.full_block_ids) * facts.block_size
            assert len(sequence.full_block_ids) <= self._limits.max_blocks

    def _check_turn(self, plan: StepPlan) -> None:
        if plan.epoch < self._epoch:
            raise StaleEpoch(f"epoch {plan.epoch} is older than {self._epoch}, which this group has seen; claim the group again", "epoch")
        if plan.step != self._step + 1:
            raise InvalidPlan(f"step {plan.step} came where {self._step + 1} was due; count the plans of a stream from 1", "step")
