"""Any order of arrivals, cancellations, plans, results and a lost group: the batcher keeps its promises after every single step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.batching import Batcher
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import FinishReason, GroupLimits, Request, Sequence
from services.errors import GroupLost
from services.prefix_hash import PrefixHasher, prefix_key
from tests.scheduler.test_batching import Loop, ModelWorker, expected

STEM = tuple(range(300, 340))
TENANTS = st.sampled_from(["a", "b", "c"])


class BatcherMachine(RuleBasedStateMachine):
    """One group and the model of its worker, which checks every read; a lost group's sequences go on in a new one."""

    sequences = Bundle("sequences")

    @initialize(depth=st.integers(1, 3), num_host_blocks=st.sampled_from([0, 4, 50]), max_num_seqs=st.integers(1, 4))
    def start(self, depth: int, num_host_blocks: int, max_num_seqs: int) -> None:
        self.limits = GroupLimits(4, 26, 14, 10, 64, 16, max_num_seqs, num_host_blocks=num_host_blocks)
        self.index = PrefixIndex()
        self.loop = Loop(self.make_batcher(), depth)
        self.origin: dict[Sequence, Sequence] = {}  # a sequence that was moved → what it was at first

    def make_batcher(self) -> Batcher:
        return Batcher(self.limits, max_queued_tokens=100_000, index=self.index, group_id="g")

    @rule(
        target=sequences,
        num_shared=st.integers(0, 40),
        own=st.integers(0, 999),
        max_tokens=st.integers(1, 12),
        tenant=TENANTS,
        priority=st.integers(-1, 1),
    )
    def arrive(self, num_shared: int, own: int, max_tokens: int, tenant: str, priority: int) -> Sequence:
        prompt = (*STEM[:num_shared], own)
        prefix = PrefixHasher(prefix_key(tenant, b""), self.limits.block_size, prompt)
        ask = Request(
            "r", "m", prompt, max_tokens=max_tokens, tenant=tenant, priority=priority, prefix=prefix, checkpoint_blocks=(num_shared // 4,)
        )
        (sequence,) = self.loop.batcher.add(ask, self.loop.now)
        self.origin[sequence] = sequence
        return sequence

    @rule()
    def turn(self) -> None:
        self.loop.turn()

    @precondition(lambda self: self.loop.on_wire)
    @rule()
    def result(self) -> None:
        self.loop.take(self.loop.batcher.apply(self.loop.on_wire.popleft(), self.loop.now)[1])

    @rule(sequence=sequences)
    def cancel(self, sequence: Sequence) -> None:
        if sequence in self.loop.batcher.sequences:
            self.loop.take(self.loop.batcher.cancel(sequence, self.loop.now))

    @rule()
    def lose_group(self) -> None:
        """What was on its way is gone; every sequence goes on with the tokens that were delivered."""
        lost = self.loop.batcher
        self.loop.on_wire.clear()
        survivors = lost.sequences
        lost.abandon(GroupLost("gone"), self.loop.now)
        lost.close()
        self.loop.batcher, self.loop.worker = self.make_batcher(), ModelWorker(self.limits)
        for sequence in survivors:
            (moved,) = self.loop.batcher.add(sequence.continuation(), self.loop.now)
            self.origin[moved] = self.origin[sequence]

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "loop"):
            self.loop.batcher.check_integrity()

    @invariant()
    def delivers_solo_tokens_in_order(self) -> None:
        if hasattr(self, "loop"):
            for sequence, tokens in self.loop.tokens.items():
                first = self.origin[sequence]
                so_far = [*sequence.request.prompt_token_ids[len(first.request.prompt_token_ids) :], *tokens]
                assert so_far == expected(first)[: len(so_far)]

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.finish()
            for sequence, reason in self.loop.ends.items():
                num_tokens = sequence.request.num_resumed_tokens + len(sequence.output_token_ids)
                assert reason is FinishReason.CANCELLED or num_tokens == len(expected(self.origin[sequence]))
            assert self.loop.batcher.num_free_blocks == (self.limits.num_full_blocks, self.limits.num_window_blocks)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
