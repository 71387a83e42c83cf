"""GET /v1/metrics: every metric of this edge, and beside them the few under the names that dashboards of the field read.

Those are derived from ours when they are asked for, so they cost a request nothing and cannot disagree. Counts among them are typed as
gauges: a counter's name would have to end in `_total`, and the names are what they are for.
"""

import time
from collections.abc import Iterable

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response

from edge.inference import InferenceCore
from edge.metrics import EdgeMetrics
from edge.routing.scheduler_pool import SchedulerPool
from protos.ossia.v1 import scheduler_pb2 as scheduler

STATUSES = {"completed": "success", "client_gone": "cancelled", "cancelled": "cancelled"}  # other outcomes are errors


def build_router(registry: CollectorRegistry, utilization: "Utilization") -> APIRouter:
    router = APIRouter()

    @router.get("/v1/metrics")
    async def get_metrics() -> Response:
        await utilization.refresh()
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_1_0_0)

    return router


class Utilization:
    """The share of time that the groups spend in steps, between two looks, in percent; 0 until there are two."""

    def __init__(self, pool: SchedulerPool) -> None:
        self.percent = 0.0
        self._pool = pool
        self._seen: dict[str, tuple[float, int]] = {}  # by group: when it was looked at, and its steps by then

    async def refresh(self) -> None:
        """Asks the schedulers. One that cannot be asked leaves the groups that it owns out."""
        groups: list[scheduler.GroupStatus] = []
        for stream in self._pool.streams:
            if status := await stream.ask_status():
                groups += status.groups
        now = time.monotonic()
        shares = [self._share(group, now) for group in groups if group.group_id in self._seen]
        self._seen = {group.group_id: (now, group.num_steps) for group in groups}
        if shares:
            self.percent = 100 * sum(shares) / len(shares)

    def _share(self, group: scheduler.GroupStatus, now: float) -> float:
        before, num_steps = self._seen[group.group_id]
        return min(1.0, max(0, group.num_steps - num_steps) * group.step_s / max(now - before, 1e-3))


class FieldMetrics(Collector):
    def __init__(self, metrics: EdgeMetrics, core: InferenceCore, utilization: Utilization) -> None:
        self._metrics = metrics
        self._core = core
        self._utilization = utilization

    def describe(self) -> Iterable[Metric]:
        """Asked when this is registered, before there is anything to count."""
        return ()

    def collect(self) -> Iterable[Metric]:
        yield self._count_requests()
        count = sum(value for _, value in _samples(self._metrics.total_s, "_count"))
        total_s = sum(value for _, value in _samples(self._metrics.total_s, "_sum"))
        average_ms = 1e3 * total_s / count if count else 0.0
        yield GaugeMetricFamily("gpt_oss_avg_latency_ms", "Arrival to the end, mean over all ended requests", average_ms)
        yield GaugeMetricFamily("gpt_oss_active_requests", "Requests open now", self._core.num_open)
        busy = self._utilization.percent
        yield GaugeMetricFamily("gpt_oss_gpu_utilization_percent", "Share of time that groups spend in steps, between two scrapes", busy)
        yield self._price_tokens()
        yield self._describe_first_tokens()

    def _count_requests(self) -> Metric:
        family = GaugeMetricFamily("gpt_oss_request_count", "Requests ended, by status", labels=["status"])
        counts = dict.fromkeys(("success", "error", "cancelled"), 0.0)
        for sample in _samples(self._metrics.finished, "_total"):
            counts[STATUSES.get(sample[0]["outcome"], "error")] += sample[1]
        counts["error"] += sum(value for _, value in _samples(self._metrics.refused, "_total"))
        for status, count in counts.items():
            family.add_metric([status], count)
        return family

    def _price_tokens(self) -> Metric:
        family = GaugeMetricFamily("oss_token_cost_usd", "Price of all tokens, as the models file sets it", labels=["model"])
        costs: dict[str, float] = {}
        for labels, value in _samples(self._metrics.cost_usd, "_total"):
            costs[labels["model"]] = costs.get(labels["model"], 0) + value
        for model, cost_usd in costs.items():
            family.add_metric([model], cost_usd)
        return family

    def _describe_first_tokens(self) -> Metric:
        buckets: dict[str, float] = {}
        for labels, value in _samples(self._metrics.ttft_s, "_bucket"):
            buckets[labels["le"]] = buckets.get(labels["le"], 0) + value
        total_s = sum(value for _, value in _samples(self._metrics.ttft_s, "_sum"))
        family = HistogramMetricFamily("oss_first_token_latency", "Arrival to first token, in seconds")
        family.add_metric([], sorted(buckets.items(), key=lambda bucket: float(bucket[0])) or [("+Inf", 0)], total_s)
        return family


def _samples(metric: Collector, suffix: str) -> Iterable[tuple[dict[str, str], float]]:
    return [(one.labels, one.value) for family in metric.collect() for one in family.samples if one.name.endswith(suffix)]
