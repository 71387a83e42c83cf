"""Small random clusters under everything that can go wrong at once, checked at every step. One seed is one run, and can be run again.

    python -m scheduler.simulation.checked --seeds 10000

A simulated device here remembers what was written into each slot of each block, and every read is held against it; the batcher checks
itself after every plan and result. At the end each answer is whole, or the beginning of what it would have been.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

from scheduler.host_tier import TierCopy
from scheduler.sequence import FinishReason, GroupLimits, Sequence, StepPlan, StepResult
from scheduler.simulation.cluster import ClusterSpec, Faults, SimulatedCluster
from scheduler.simulation.group import SimulatedGroup
from scheduler.simulation.outcome import Outcome
from scheduler.simulation.step_time import StepShape
from scheduler.simulation.workload import Arrival, answer_of
from scheduler.simulation.workloads import END_TOKEN_ID, Writer

AMPLE_BLOCKS = 1000  # nothing is ever evicted
Slots = dict[tuple[int, int], int]  # (block, offset) → what stands for all tokens up to there


@dataclass
class Tables:
    """One sequence as the device has it."""

    prefixes: list[int]  # by position, of the prompt and of the whole answer
    num_computed: int
    full: list[int]
    window: list[int]


class CheckedGroup(SimulatedGroup):
    """Holds every plan against what its blocks contain."""

    def pump(self) -> None:
        super().pump()
        self._check()

    def _run(self, plan: StepPlan) -> None:
        memory = self.__dict__.setdefault("memory", Memory(self.batcher.limits))
        for one in plan.admitted:
            self._check_turn(one.sequence)
        memory.apply(plan)
        super()._run(plan)

    def _receive(self, result: StepResult) -> None:
        super()._receive(result)
        self._check()

    def _check(self) -> None:
        if not self.is_lost:
            self.batcher.check_integrity()

    def _check_turn(self, admitted: Sequence) -> None:
        """Nobody of the same tenant and priority who came earlier still waits."""
        for other in self.batcher.sequences:
            is_peer = (other.request.tenant, other.request.priority) == (admitted.request.tenant, admitted.request.priority)
            assert other.seq_id or not is_peer or other.arrival > admitted.arrival, "overtaken by a later one"


class Memory:
    """Both pools on the device and on the host."""

    def __init__(self, limits: GroupLimits) -> None:
        self._limits = limits
        self._device: dict[bool, Slots] = {False: {}, True: {}}  # by "is the window pool"
        self._host: dict[bool, Slots] = {False: {}, True: {}}
        self._tables: dict[int, Tables] = {}

    def apply(self, plan: StepPlan) -> None:
        for seq_id in plan.released:
            del self._tables[seq_id]
        for copy in plan.copies:
            self._copy(copy)
        for one in plan.admitted:
            window = [-1] * one.first_window_block + list(one.window_block_ids)
            self._tables[one.seq_id] = Tables(prefixes_of(one.sequence), one.num_computed_tokens, list(one.full_block_ids), window)
        for seq_id, full, window_ids in plan.appended:
            self._tables[seq_id].full += full
            self._tables[seq_id].window += window_ids
        assert sum(plan.scheduled.values()) <= self._limits.max_batch_tokens and len(self._tables) <= self._limits.max_num_seqs
        for seq_id, count in plan.scheduled.items():
            self._write(self._tables[seq_id], count)
        for seq_id, count in plan.scheduled.items():
            self._read(self._tables[seq_id], count)

    def _copy(self, copy: TierCopy) -> None:
        device, host, size = self._device[copy.is_window], self._host[copy.is_window], self._limits.block_size
        for offset in range(size):
            if copy.to_host:
                host[copy.host_block_id, offset] = device[copy.device_block_id, offset]
            else:
                device[copy.device_block_id, offset] = host[copy.host_block_id, offset]

    def _write(self, one: Tables, count: int) -> None:
        size = self._limits.block_size
        for position in range(one.num_computed, one.num_computed + count):
            prefix = one.prefixes[min(position, len(one.prefixes) - 1)]
            self._device[False][one.full[position // size], position % size] = prefix
            if self._limits.num_window_blocks:
                self._device[True][one.window[position // size], position % size] = prefix

    def _read(self, one: Tables, count: int) -> None:
        start, end = one.num_computed, one.num_computed + count
        self._check(self._device[False], one.full, one.prefixes, range(end))
        if self._limits.num_window_blocks:
            self._check(self._device[True], one.window, one.prefixes, range(max(0, start - self._limits.sliding_window + 1), end))
        one.num_computed = end

    def _check(self, slots: Slots, table: list[int], prefixes: list[int], positions: range) -> None:
        size = self._limits.block_size
        for position in positions:
            found = slots[table[position // size], position % size]
            assert found == prefixes[min(position, len(prefixes) - 1)], f"position {position} holds another prefix"


def prefixes_of(sequence: Sequence) -> list[int]:
    """What stands for the tokens up to each position, the answer included: it is known before it is drawn."""
    request, prefixes, last = sequence.request, list[int](), 0
    for token_id in (*request.prompt_token_ids[: request.num_prompt_tokens], *answer_of(request).token_ids):
        last = hash((last, token_id))
        prefixes.append(last)
    return prefixes


# ---- one seed ----


def step_s(shape: StepShape) -> float:
    return 0.01 + 0.0005 * shape.num_prefill_tokens


def draw_spec(draw: random.Random) -> ClusterSpec:
    has_window = draw.random() < 0.7
    limits = GroupLimits(
        block_size=4,
        num_full_blocks=draw.choice([draw.randint(30, 80), AMPLE_BLOCKS]),
        num_window_blocks=draw.randint(30, 60) if has_window else 0,
        sliding_window=10 if has_window else 0,
        max_model_len=96,
        max_batch_tokens=draw.choice([8, 16, 64]),
        max_num_seqs=draw.randint(2, 8),
        num_host_blocks=draw.choice([0, 0, 20, 60]),
        eos_token_ids=frozenset({END_TOKEN_ID}),
    )
    num_groups = draw.randint(1, 3)
    losses = [(draw.uniform(0.05, 1.0), "g0000")] if num_groups > 1 and draw.random() < 0.3 else []
    faults = Faults(losses, back_after_s=0.5, late_share=draw.choice([0.0, 0.3]), late_s=0.05)
    return ClusterSpec(num_groups, limits, step_s, num_schedulers=draw.randint(1, num_groups), faults=faults)


def draw_arrivals(draw: random.Random, is_plain: bool) -> Iterator[Arrival]:
    """Prompts that branch off each other's, so that blocks are shared at many places; unless plain, off answers too and with priorities."""
    writer, now = Writer(block_size=4), 0.0
    texts: list[list[int]] = [[]]
    for _ in range(draw.randint(3, 16)):
        now += draw.choice([0.0, 0.01, 0.1])
        start = draw.choice(texts)
        prompt = [*start[: draw.randint(0, min(40, len(start)))], *writer.fresh(draw.randint(1, 30))]
        answer = writer.answer(draw.randint(1, 20))
        texts.append(prompt if is_plain else [*prompt, *answer.token_ids])
        priority = 0 if is_plain else draw.choice([0, 0, 0, 1])
        yield Arrival(now, writer.request(draw.choice("ab"), prompt, answer, priority=priority))


def run(seed: int) -> Outcome:
    """Raises AssertionError where something that must hold does not."""
    draw = random.Random(seed)
    cluster = SimulatedCluster(draw_spec(draw), seed, make_group=CheckedGroup)
    is_plain = draw.random() < 0.3
    arrivals = list(draw_arrivals(draw, is_plain))
    cancelled = {one.request.request_id for one in arrivals if draw.random() < 0.15 and not is_plain}
    for one in arrivals:
        if one.request.request_id in cancelled:
            cluster.loop.at(one.at_s + draw.uniform(0.0, 0.5), lambda name=one.request.request_id: cluster.cancel(name))  # type: ignore[misc]
    outcome = cluster.run(arrivals)
    for record in outcome.records:
        whole = list(answer_of(record.request).token_ids)
        if record.reason is FinishReason.CANCELLED:
            assert record.request.request_id in cancelled and record.token_ids == whole[: len(record.token_ids)]
        else:
            assert record.is_answered, f"{record.request.request_id} got {record.token_ids} of {whole}: {record.error}"
    for batcher in cluster.batchers.values():
        assert batcher.is_idle, "something is left"
    limits = cluster.spec.limits
    if is_plain and limits.num_full_blocks == AMPLE_BLOCKS and not (limits.num_window_blocks or cluster.spec.faults.losses):
        assert not outcome.num_mispredicted, "placement promised other hits than were found"
    return outcome


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=10_000)
    flags.add_argument("--first", type=int, default=0)
    arguments = flags.parse_args()
    num_steps = num_moved = num_cached = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            outcome = run(seed)
        except (AssertionError, KeyError, IndexError) as error:
            raise AssertionError(f"seed {seed}") from error
        num_steps += outcome.num_steps
        num_moved += sum(len(one.group_ids) > 1 for one in outcome.records)
        num_cached += sum(one.num_cached_tokens for one in outcome.records)
    print(f"{arguments.seeds} runs, {num_steps} steps, {num_moved} requests moved, {num_cached} cached tokens: all hold")


if __name__ == "__main__":
    main()
