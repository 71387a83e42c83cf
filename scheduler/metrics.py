"""All metrics of the scheduler process."""

from collections.abc import Collection

from opentelemetry.trace import Span
from prometheus_client import CollectorRegistry, Counter, Gauge

from protos.ossia.v1.scheduler_pb2 import GroupStatus
from scheduler.batching import InFlightStep
from scheduler.sequence import Finish, Sequence, StepPlan, StepResult
from services.errors import TABLE
from services.metrics import MetricSet, exemplar_of

STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
HOST_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
REQUEST_BUCKETS_S = (0.005, *STEP_BUCKETS_S[3:], 120, 300)
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class SchedulerMetrics(MetricSet):
    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("scheduler", registry)
        self._device_time = self.histogram("step_device_seconds", "Time of a step on the device", "group", buckets=STEP_BUCKETS_S)
        self._round_trip = self.histogram("step_round_trip_seconds", "Plan sent to result applied", "group", buckets=STEP_BUCKETS_S)
        self._host_time = self.histogram(
            "step_host_seconds", "Scheduler work per step: plan, encode, apply, frames", "group", buckets=HOST_BUCKETS_S
        )
        self._batch = self.histogram("step_batch_size", "Sequences in a step", "group", buckets=COUNT_BUCKETS)
        self._tokens = self.counter("step_tokens", "Tokens computed: prefill, decode", "group", "kind")
        self._queue_time = self.histogram("queue_wait_seconds", "Arrival to first scheduled chunk", "model", buckets=REQUEST_BUCKETS_S)
        self._prefill_time = self.histogram("prefill_seconds", "First scheduled chunk to first token", "model", buckets=REQUEST_BUCKETS_S)
        self._ttft = self.histogram("time_to_first_token_seconds", "Arrival to first token", "model", buckets=REQUEST_BUCKETS_S)
        self._finished = self.counter("sequences_finished", "Sequences ended, by reason", "model", "reason")
        self._preemptions = self.counter("preemptions", "Preemptions of ended sequences", "model")
        self._refused = self.counter("refused", "Requests refused before a group took them, by error code", "code")
        for row in TABLE.values():
            self._refused.labels(row.code)  # from 0 on, so that an alert sees the first one
        self._placed = self.counter("placed", "Requests placed, by group", "group", "model")
        self._predicted = self.counter("predicted_cached_tokens", "Prompt tokens that placement expected in the cache", "model")
        self._cached = self.counter("cached_tokens", "Prompt tokens that were found in the cache", "model")
        self._prompt = self.counter("prompt_tokens", "Prompt tokens of ended requests", "model")
        self._surplus = self.counter("surplus_tokens", "Tokens drawn for sequences that had ended", "group")
        self._lost = self.counter("groups_lost", "Times a group was lost", "group")
        self._gauges = GroupGauges(self)

    def observe_plan(self, group: str, plan: StepPlan) -> None:
        self._batch.labels(group).observe(len(plan.scheduled))

    def observe_step(self, group: str, step: InFlightStep, result: StepResult, round_trip_s: float, host_s: float) -> None:
        """`host_s` is the scheduler's own work on the step, from planning to the frames."""
        self._device_time.labels(group).observe(result.device_time_s)
        self._round_trip.labels(group).observe(round_trip_s)
        self._host_time.labels(group).observe(host_s)
        self._tokens.labels(group, "prefill").inc(step.num_prefill_tokens)
        self._tokens.labels(group, "decode").inc(step.num_decodes)

    def observe_placement(self, group: str, model: str, num_cached_tokens: int) -> None:
        self._placed.labels(group, model).inc()
        self._predicted.labels(model).inc(num_cached_tokens)

    def observe_finish(self, model: str, sequence: Sequence, finish: Finish, span: Span) -> None:
        self._finished.labels(model, finish.reason.value).inc()
        self._preemptions.labels(model).inc(finish.num_preemptions)
        if sequence.index:
            return
        self._prompt.labels(model).inc(sequence.request.num_prompt_tokens)
        self._cached.labels(model).inc(finish.num_cached_tokens)
        if finish.queue_s is not None and finish.ttft_s is not None:
            exemplar = exemplar_of(span)
            self._queue_time.labels(model).observe(finish.queue_s, exemplar)
            self._prefill_time.labels(model).observe(finish.ttft_s - finish.queue_s, exemplar)
            self._ttft.labels(model).observe(finish.ttft_s, exemplar)

    def count_refusal(self, code: str) -> None:
        self._refused.labels(code).inc()

    def count_loss(self, group: str) -> None:
        self._lost.labels(group).inc()

    def observe_groups(self, groups: Collection[GroupStatus]) -> None:
        """The groups that are owned now, as they stand now."""
        for group in groups:
            self._lost.labels(group.group_id)
        self._gauges.observe(groups, self._surplus)


class GroupGauges:
    """What stands in each owned group. A group that left has no series."""

    def __init__(self, metrics: MetricSet) -> None:
        by_group = ("group", "model")
        self._num_running = metrics.gauge("group_running", "Sequences running", *by_group)
        self._num_waiting = metrics.gauge("group_waiting", "Sequences waiting", *by_group)
        self._queued_tokens = metrics.gauge("group_queued_tokens", "Prompt tokens not yet computed", *by_group)
        self._queue_s = metrics.gauge(
            "group_queue_seconds", "Tokens that wait over the measured prefill rate; 0 until it is measured", *by_group
        )
        self._prefill_rate = metrics.gauge("group_prefill_tokens_per_second", "Measured prefill rate; 0 until the first", *by_group)
        self._step_s = metrics.gauge("group_decode_step_seconds", "Duration of the last decode-only step", *by_group)
        self._blocks = metrics.gauge("group_blocks", "KV blocks that the group has", *by_group, "pool")
        self._free_blocks = metrics.gauge("group_free_blocks", "KV blocks that hold nothing anyone needs", *by_group, "pool")
        self._present: dict[tuple[str, str], int] = {}  # group and model → surplus tokens told so far; changed by `observe` alone

    def observe(self, groups: Collection[GroupStatus], surplus: Counter) -> None:
        statuses = {(one.group_id, one.model): one for one in groups}
        for gone in self._present.keys() - statuses.keys():
            self._remove(gone)
        for key, status in statuses.items():
            self._set(key, status)
            before = self._present.get(key, 0)
            surplus.labels(status.group_id).inc(max(0, status.num_surplus_tokens - before))
            self._present[key] = status.num_surplus_tokens

    def _set(self, key: tuple[str, str], status: GroupStatus) -> None:
        rate = status.prefill_tokens_per_s
        self._num_running.labels(*key).set(status.num_running)
        self._num_waiting.labels(*key).set(status.num_waiting)
        self._queued_tokens.labels(*key).set(status.num_queued_tokens)
        self._queue_s.labels(*key).set(status.num_queued_tokens / rate if rate else 0.0)
        self._prefill_rate.labels(*key).set(rate)
        self._step_s.labels(*key).set(status.step_s)
        for pool, num_blocks, num_free in (
            ("full", status.num_full_blocks, status.num_free_full_blocks),
            ("window", status.num_window_blocks, status.num_free_window_blocks),
        ):
            self._blocks.labels(*key, pool).set(num_blocks)
            self._free_blocks.labels(*key, pool).set(num_free)

    def _remove(self, key: tuple[str, str]) -> None:
        del self._present[key]
        by_group: tuple[Gauge, ...] = (
            self._num_running,
            self._num_waiting,
            self._queued_tokens,
            self._queue_s,
            self._prefill_rate,
            self._step_s,
        )
        for gauge in by_group:
            gauge.remove(*key)
        for gauge in (self._blocks, self._free_blocks):
            for pool in ("full", "window"):
                gauge.remove(*key, pool)
