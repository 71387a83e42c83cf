"""Continuous batching for one worker group: which tokens the next step computes, and what its result means.

Pure: no I/O and no clock, time comes in as `now` (seconds, any origin). One ragged batch a step: decodes first, then prefill chunks, then
newcomers, within max_batch_tokens. Plans may run ahead of results: a draw counts as a token from the moment it is planned, and a sequence
that turns out to have ended has its surplus draws dropped. Blocks that a sequence gives back may be handed out in the very next plan,
because the worker runs plans in order.
"""

import bisect
import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.prefix_cache import Hit, PrefixCache, PrefixIndex
from scheduler.queue import DrainRate, WaitingQueue
from scheduler.rates import GroupRates
from scheduler.sequence import (
    Admission,
    Event,
    FinishReason,
    GroupLimits,
    Request,
    Sequence,
    StepPlan,
    StepResult,
)
from services.errors import ContextLengthExceeded, DeadlineExceeded, OssiaError, Overloaded

CAUTION = 1.15  # a wait is judged so much longer than it is expected: what is accepted has to start in time
FAIR_WITHIN_STEPS = 2  # a tenant that is ahead by no more than these steps compute counts as equal


class Backlog(NamedTuple):
    """What a group has before it, by the measured rates."""

    done_s: float  # when the steps under way are done
    started_s: float  # seconds for what the running sequences have left of their prompts


class ProtocolViolation(Exception):
    """The worker answered something that no plan asked for. Its group is not to be trusted any more."""


@dataclass(frozen=True)
class InFlightStep:
    """A plan whose result is not back."""

    step: int
    drawing: tuple[int, ...]  # sequence ids that draw a token, in batch order
    num_prefill_tokens: int
    num_decodes: int
    num_fetched: int  # blocks that come from host memory first
    planned_s: float


@dataclass
class Draft:
    """The plan in the making."""

    num_tokens_left: int
    admitted: list[Admission] = field(default_factory=list)
    appended: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    scheduled: dict[int, int] = field(default_factory=dict)
    drawing: list[int] = field(default_factory=list)
    num_decodes: int = 0
    has_preempted: bool = False


class Batcher:
    """The state of one group. Only its owner calls it: `add`, `cancel` and `expire` at any time, `plan` and `apply` in turn."""

    def __init__(
        self,
        limits: GroupLimits,
        *,
        max_queued_tokens: int,
        batch_timeout_s: float = 0.0,
        tenant_weights: Mapping[str, float] | None = None,
        index: PrefixIndex | None = None,
        group_id: str = "",
    ) -> None:
        self.limits = limits
        self.cache = PrefixCache(limits, index, group_id)
        self.rates = GroupRates()
        self.num_surplus_tokens = 0
        self.num_steps = 0  # results that came back
        self.in_flight: deque[InFlightStep] = deque()
        self._batch_timeout_s = batch_timeout_s
        self._queue = WaitingQueue(max_queued_tokens, tenant_weights, FAIR_WITHIN_STEPS * limits.max_batch_tokens)
        self._running: dict[int, Sequence] = {}  # by seq_id
        self._in_order: list[Sequence] = []  # the running ones, by `Sequence.order`
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; entries of ended sequences stay until their time
        self._prefilling: list[Sequence] = []  # the running ones that the last plan left with prompt tokens to compute
        self._drain = DrainRate()
        self._last_result_s = 0.0
        self._backlog: Backlog | None = None  # None: to be reckoned anew
        self._released: list[int] = []  # sequence ids that the worker may forget with the next plan
        self._num_steps_planned = 0
        self._num_arrivals = 0
        self._last_seq_id = 0

    # ---- requests come and go ----

    def add(self, request: Request, now: float) -> list[Sequence]:
        """Queues the request's n sequences.

        Raises ContextLengthExceeded where it can never fit, Overloaded where the queue is full or it cannot start by its deadline.
        """
        room = self.limits.max_sequence_tokens - len(request.prompt_token_ids)
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {len(request.prompt_token_ids)} tokens and the model holds "
                f"{self.limits.max_sequence_tokens}, at least one of them to generate: shorten the messages",
                param="messages",
            )
        if not self.has_room(request):
            raise Overloaded("the queue is full: try again later", retry_after_s=self.drain_s)
        num_uncached = len(request.prompt_token_ids) - self.cache.expect(request).num_blocks * self.limits.block_size
        late_s = (
            now + CAUTION * self.wait_s(request, num_uncached, now) - request.start_deadline_s
            if request.start_deadline_s is not None
            else 0.0
        )
        if late_s > 0:
            raise Overloaded("the request cannot start within its start_timeout_s: try again later", "start_timeout_s", late_s)
        if request.max_tokens is not None:
            room = min(room, request.max_tokens - request.num_resumed_tokens)
        return [self._enqueue(request, request.first_index + at, room, num_uncached, now) for at in range(request.n)]

    def _enqueue(self, request: Request, index: int, max_new_tokens: int, num_uncached: int, now: float) -> Sequence:
        self._num_arrivals += 1
        arrived_s = now if request.arrived_s is None else request.arrived_s
        self._backlog = None
        sequence = Sequence(request, index, self._num_arrivals, arrived_s, max_new_tokens, len(request.prompt_token_ids), num_uncached)
        self._queue.push(sequence)
        sequence.is_promised = True
        self.cache.promise(request.block_names)
        for deadline_s in (request.start_deadline_s, request.deadline_s):
            if deadline_s is not None:
                heapq.heappush(self._deadlines, (deadline_s, sequence.arrival, sequence))
        return sequence

    def cancel(self, sequence: Sequence, now: float) -> list[Event]:
        """Ends it now; its blocks are free at once, and no plan after this call computes anything for it."""
        if sequence.is_finished:
            return []
        return [self._end(sequence, FinishReason.CANCELLED, now)]

    def expire(self, now: float) -> list[Event]:
        """Ends what is past its deadline."""
        events = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if not sequence.is_finished and (error := _lateness(sequence, now)):
                events.append(self._end(sequence, FinishReason.ERROR, now, error=error))
        return events

    def close(self) -> None:
        """The group is gone: what it held is not found any more."""
        self.cache.close()

    @property
    def sequences(self) -> list[Sequence]:
        """Everything that runs or waits."""
        return [*self._running.values(), *self._queue]

    def abandon(self, error: OssiaError, now: float) -> list[Event]:
        """Ends everything with `error`: the group is lost."""
        return [self._end(one, FinishReason.ERROR, now, error=error) for one in self.sequences]

    # ---- the next step ----

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None while there is nothing to compute and nothing to release."""
        draft = Draft(self.limits.max_batch_tokens)
        block_size, prefills = self.limits.block_size, []
        for sequence in self._in_order.copy():
            if not sequence.is_decoding:
                prefills.append(sequence)
            elif sequence.num_scheduled_tokens % block_size and sequence.may_draw and draft.num_tokens_left:
                self._take(sequence, 1, draft)  # its last block has room: the common case, kept short
                draft.num_decodes += 1
            else:
                self._schedule(sequence, draft)
        for sequence in prefills:
            self._schedule(sequence, draft)
        if self._queue and (self._running or now >= self._company_until()):
            num_before = self._queue.num_uncached_tokens
            self._admit(draft, now)
            self._drain.note(now, num_before - self._queue.num_uncached_tokens, bool(self._queue))
        if not draft.scheduled and not self._released:
            return None
        self._prefilling = [one for one in (*prefills, *(admission.sequence for admission in draft.admitted)) if not one.is_decoding]
        return self._seal(draft, now)

    def wake_at(self) -> float | None:
        """When time alone gives something to do: an idle group has waited for company, or a deadline passes. None: never."""
        times = [self._deadlines[0][0]] if self._deadlines else []
        if self._queue and not self._running:
            times.append(self._company_until())
        return min(times, default=None)

    def _company_until(self) -> float:
        """When an idle group stops waiting for company."""
        return min(one.arrival_s for one in self._queue) + self._batch_timeout_s if self._batch_timeout_s else float("-inf")

    def _schedule(self, sequence: Sequence, draft: Draft) -> None:
        """Puts as many of the sequence's tokens into the step as budget and blocks allow; may preempt, the sequence itself last of all."""
        if sequence.seq_id == 0:
            return  # preempted by one before it in this plan
        wanted = min(sequence.num_unscheduled_tokens, draft.num_tokens_left)
        if wanted == 0:
            return
        self.cache.free_passed_window(sequence)
        while (count := min(wanted, self.cache.num_tokens_with_blocks(sequence))) == 0:
            victim = max((one for one in self._running.values() if one.seq_id not in draft.scheduled), key=lambda one: one.order)
            self._preempt(victim, draft)
            if victim is sequence:
                return
        full, window = self.cache.extend(sequence, count)
        if full or window:
            draft.appended.append((sequence.seq_id, full, window))
        if sequence.is_decoding:
            draft.num_decodes += 1
            self._queue.charge(sequence.request.tenant, num_output_tokens=self.limits.block_size)  # once per block, for all its tokens
        self._take(sequence, count, draft)
        self.cache.name_blocks(sequence)
        if sequence.is_promised and sequence.num_scheduled_tokens >= len(sequence.request.prompt_token_ids):
            self._redeem(sequence)

    def _take(self, sequence: Sequence, count: int, draft: Draft) -> None:
        draft.num_tokens_left -= count
        draft.scheduled[sequence.seq_id] = count
        sequence.num_scheduled_tokens += count
        if sequence.num_scheduled_tokens == sequence.num_tokens:
            draft.drawing.append(sequence.seq_id)
            sequence.num_in_flight += 1
            sequence.num_tokens += 1

    def _seal(self, draft: Draft, now: float) -> StepPlan:
        self._num_steps_planned += 1
        self._backlog = None
        num_prefill_tokens = sum(draft.scheduled.values()) - draft.num_decodes
        copies = self.cache.take_copies()
        num_fetched = sum(not copy.to_host for copy in copies)
        step = InFlightStep(self._num_steps_planned, tuple(draft.drawing), num_prefill_tokens, draft.num_decodes, num_fetched, now)
        self.in_flight.append(step)
        released, self._released = self._released, []
        return StepPlan(self._num_steps_planned, released, copies, draft.admitted, draft.appended, draft.scheduled)

    # ---- joining and leaving the running set ----

    def _admit(self, draft: Draft, now: float) -> None:
        """Newcomers in turn, while each finds blocks for all of its tokens; none in a step that had to preempt."""
        promised = sum(self._num_missing_blocks(one) for one in self._running.values() if not one.is_decoding)
        while not draft.has_preempted and draft.num_tokens_left and len(self._running) < self.limits.max_num_seqs:
            if (sequence := self._queue.first(now)) is None:
                return
            hit = self._find_hit(sequence)
            num_full, num_window = self.cache.num_needed(hit)
            num_full += self.limits.num_blocks(sequence.num_known_tokens) - hit.num_blocks
            has_window = not self.limits.num_window_blocks or num_window < self.cache.window.num_free
            if promised + num_full > self.cache.full.num_free or not has_window:
                return
            self._start(sequence, hit, draft, now)
            promised += self._num_missing_blocks(sequence)

    def _find_hit(self, sequence: Sequence) -> Hit:
        """What it can continue from; its last known token is always computed, to draw from.

        Blocks in host memory are left there where computing them again is faster by the measured rates.
        """
        max_blocks = (sequence.num_known_tokens - 1) // self.limits.block_size
        names = sequence.block_names(max_blocks, self.limits.block_size)
        hit = self.cache.find(names, max_blocks)
        if not hit.num_fetched:
            return hit
        on_device = self.cache.find(names, max_blocks, with_host=False)
        num_tokens = (hit.num_blocks - on_device.num_blocks) * self.limits.block_size
        computing_s = self.rates.prefill_s(num_tokens, self.limits.max_batch_tokens)
        return hit if self.rates.fetch_s(hit.num_fetched) <= computing_s or not computing_s else on_device

    def _num_missing_blocks(self, sequence: Sequence) -> int:
        """Full-attention blocks that its known tokens still need."""
        return max(0, self.limits.num_blocks(sequence.num_known_tokens) - len(sequence.full_block_ids))

    def _start(self, sequence: Sequence, hit: Hit, draft: Draft, now: float) -> None:
        num_cached = hit.num_blocks * self.limits.block_size
        self._queue.take_turn(sequence, sequence.num_known_tokens - num_cached)
        self._last_seq_id += 1
        sequence.seq_id = self._last_seq_id
        self._running[sequence.seq_id] = sequence
        bisect.insort(self._in_order, sequence, key=_order)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s, sequence.num_cached_tokens = now, num_cached
        self.cache.take(sequence, hit)
        first_window_block = sequence.num_passed_window_blocks
        count = min(sequence.num_unscheduled_tokens, draft.num_tokens_left, self.cache.num_tokens_with_blocks(sequence))
        self.cache.extend(sequence, count)
        blocks = sequence.full_block_ids.copy(), sequence.window_block_ids.copy(), first_window_block
        draft.admitted.append(Admission(sequence, sequence.seq_id, sequence.token_ids, num_cached, *blocks))
        self._take(sequence, count, draft)
        self.cache.name_blocks(sequence)
        if sequence.num_scheduled_tokens >= len(sequence.request.prompt_token_ids):
            self._redeem(sequence)

    def _redeem(self, sequence: Sequence) -> None:
        """Its prompt's blocks are all named, or it will not compute them now: they count by themselves."""
        if sequence.is_promised:
            sequence.is_promised = False
            self.cache.redeem(sequence.request.block_names)

    def _preempt(self, victim: Sequence, draft: Draft) -> None:
        """Back to the queue, to be computed again. Draws in flight are dropped: the same seed and position draw them again."""
        self._forget(victim)
        victim.num_preemptions += 1
        victim.num_tokens = victim.num_known_tokens
        victim.num_scheduled_tokens = victim.num_in_flight = 0
        victim.num_uncached_tokens = victim.num_known_tokens - self._find_hit(victim).num_blocks * self.limits.block_size
        self._queue.push(victim)
        draft.has_preempted = True

    def _forget(self, sequence: Sequence) -> None:
        del self._running[sequence.seq_id]
        del self._in_order[bisect.bisect_left(self._in_order, sequence.order, key=_order)]
        self._released.append(sequence.seq_id)
        self.cache.release(sequence)
        self._redeem(sequence)
        sequence.seq_id = 0

    def _end(
        self, sequence: Sequence, reason: FinishReason, now: float, stop_token_id: int | None = None, error: OssiaError | None = None
    ) -> Event:
        self._backlog = None
        if sequence.seq_id:
            self._forget(sequence)
        else:
            self._queue.remove(sequence)
            self._redeem(sequence)
        return Event(sequence, finish=sequence.finish(reason, now, stop_token_id=stop_token_id, error=error))

    # ---- results ----

    def apply(self, result: StepResult, now: float) -> tuple[InFlightStep, list[Event]]:
        """The oldest step in flight and what it gave. Raises ProtocolViolation where the result is not that step's."""
        if not self.in_flight or result.step != self.in_flight[0].step:
            expected = self.in_flight[0].step if self.in_flight else "none"
            raise ProtocolViolation(f"a result for step {result.step} came while {expected} was awaited")
        step = self.in_flight.popleft()
        self._last_result_s = now
        self._backlog = None
        self._check_draws(step, result)
        self.num_steps += 1
        self._learn(step, result.device_time_s)
        events = [self._fail(seq_id, error, now) for seq_id, error in result.errors.items() if seq_id in self._running]
        for seq_id, token_id in zip(result.seq_ids, result.token_ids, strict=True):
            if sequence := self._running.get(seq_id):
                events.append(self._append(sequence, token_id, result, now))
            else:
                self.num_surplus_tokens += 1
        return step, events

    def _learn(self, step: InFlightStep, device_time_s: float) -> None:
        if step.num_fetched:
            explained_s = self.rates.step_s(step.num_prefill_tokens, step.num_decodes)
            self.rates.learn_fetch(step.num_fetched, device_time_s - explained_s)
        else:
            self.rates.learn_step(step.num_prefill_tokens, step.num_decodes, device_time_s)

    def _check_draws(self, step: InFlightStep, result: StepResult) -> None:
        """Every planned draw is there, in order, or its sequence has ended or failed; nothing else is."""
        if tuple(result.seq_ids) == step.drawing and len(result.token_ids) == len(step.drawing):
            return
        drawn = set(result.seq_ids)
        excused = [seq_id for seq_id in step.drawing if seq_id in drawn or (seq_id in self._running and seq_id not in result.errors)]
        if tuple(result.seq_ids) != tuple(excused) or len(result.token_ids) != len(excused):
            raise ProtocolViolation(f"step {step.step} drew for {list(result.seq_ids)} where {list(step.drawing)} was planned")

    def _append(self, sequence: Sequence, token_id: int, result: StepResult, now: float) -> Event:
        seq_id = sequence.seq_id
        sequence.num_in_flight -= 1
        sequence.output_token_ids.append(token_id)
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        ended = self._ending(sequence, token_id)
        finish = None
        if ended is not None:
            stop_token_id = token_id if ended is FinishReason.STOP else None
            finish = self._end(sequence, ended, now, stop_token_id=stop_token_id).finish
            self.rates.learn_completion(len(sequence.output_token_ids))
        return Event(sequence, (token_id,), result.logprobs.get(seq_id), finish)

    def _ending(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        request, count = sequence.request, len(sequence.output_token_ids)
        is_stop = token_id in request.stop_token_ids or (token_id in self.limits.eos_token_ids and not request.ignore_eos)
        if is_stop and request.num_resumed_tokens + count > request.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= sequence.max_new_tokens else None

    def _fail(self, seq_id: int, error: OssiaError, now: float) -> Event:
        self.cache.disown(self._running[seq_id])
        return self._end(self._running[seq_id], FinishReason.ERROR, now, error=error)

    # ---- what others may know ----

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or is under way, and the worker has been told of every end."""
        return not (self._running or self._queue or self.in_flight or self._released)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens to compute before every waiting and running sequence has its next draw; decodes and what the cache holds count nothing."""
        return self._queue.num_uncached_tokens + self.num_started_tokens

    def wait_s(self, request: Request, num_uncached_tokens: int, now: float) -> float:
        """Seconds until the request would have its first token if it were queued now, behind what is under way and what goes first."""
        num_before = self._queue.tokens_before(request.tenant, num_uncached_tokens)
        computing_s = self.rates.prefill_s(self.num_started_tokens + num_before + num_uncached_tokens, self.limits.max_batch_tokens)
        draining_s = num_before / rate if (rate := self._drain.tokens_per_s) else 0.0
        return max(0.0, self.backlog.done_s - now) + max(computing_s, draining_s)

    @property
    def num_free_blocks(self) -> tuple[int, int]:
        """Full-attention and window blocks."""
        return self.cache.full.num_free, self.cache.window.num_free

    @property
    def backlog(self) -> Backlog:
        """Kept until something changes, because placement asks every group."""
        if self._backlog is None:
            done_s = 0.0
            if self.in_flight:
                expected_s = sum(self.rates.step_s(step.num_prefill_tokens, step.num_decodes) for step in self.in_flight)
                done_s = max(self.in_flight[0].planned_s, self._last_result_s) + expected_s
            self._backlog = Backlog(done_s, self.rates.prefill_s(self.num_started_tokens, self.limits.max_batch_tokens))
        return self._backlog

    @property
    def num_started_tokens(self) -> int:
        """Prompt tokens that the running sequences still have to compute."""
        return sum(map(_num_prefill_tokens, self._prefilling))

    def queued_before(self, request: Request, num_uncached_tokens: int) -> int:
        """Waiting tokens that go before the request, were it queued now, in about: its tenant's own and an equal share for each other."""
        return self._queue.share_before(request.tenant, num_uncached_tokens)

    @property
    def drain_s(self) -> float:
        """Seconds until what is queued now is computed, at the measured rate; at least one second, the guess while nothing was measured."""
        rate = self.rates.prefill_tokens_per_s
        return max(1.0, self.num_queued_tokens / rate) if rate else 1.0

    def has_room(self, request: Request) -> bool:
        return self._queue.has_room(request.n * len(request.prompt_token_ids), request.tenant)

    def check_integrity(self) -> None:
        """Raises AssertionError where a block is lost or in two tables, or a table does not fit its sequence."""
        running = self._running.values()
        self.cache.check_integrity(list(running))
        self._queue.check_integrity()
        assert len(self._running) <= self.limits.max_num_seqs
        assert self._in_order == sorted(running, key=_order)
        for seq_id, one in self._running.items():
            assert one.seq_id == seq_id and not one.is_finished and one.num_in_flight >= 0
            needed = self.limits.num_blocks(one.num_scheduled_tokens)
            assert len(one.full_block_ids) == needed
            assert one.num_named_blocks * self.limits.block_size <= one.num_scheduled_tokens
            if self.limits.num_window_blocks:
                assert one.num_passed_window_blocks + len(one.window_block_ids) == needed
            assert one.num_known_tokens == len(one.request.prompt_token_ids) + len(one.output_token_ids)
            assert one.num_scheduled_tokens <= one.num_tokens <= self.limits.max_sequence_tokens
        for one in self._queue:
            assert one.seq_id == 0 and not one.full_block_ids and not one.window_block_ids and one.num_in_flight == 0


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _num_prefill_tokens(sequence: Sequence) -> int:
    return sequence.num_unscheduled_tokens if sequence.seq_id and not sequence.is_decoding else 0


def _lateness(sequence: Sequence, now: float) -> DeadlineExceeded | None:
    """The error of a sequence that is past one of its deadlines."""
    request = sequence.request
    if request.deadline_s is not None and now >= request.deadline_s:
        return DeadlineExceeded("the request took longer than its timeout_s: allow more time", param="timeout_s")
    if request.start_deadline_s is not None and now >= request.start_deadline_s and sequence.first_token_s is None:
        return DeadlineExceeded("no token came within start_timeout_s: allow more time or try again later", param="start_timeout_s")
    return None
