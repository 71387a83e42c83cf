"""PromQL over the metrics that the processes list. A name or a label that no process has is an error here, not an empty panel."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from edge.access.rate_limit import LimitMetrics
from edge.metrics import EdgeMetrics
from scheduler.metrics import SchedulerMetrics
from services.metrics import Metric, ProcessMetrics
from worker.metrics import WorkerMetrics

INTERVAL = "$__rate_interval"  # Grafana's: at least four scrapes
CHOSEN_MODELS = 'model=~"$model"'  # those that the viewer of a dashboard chose


def list_metrics() -> dict[str, list[Metric]]:
    """Every metric by the process that has it; "process" holds what all of them have."""
    return {
        "edge": [*EdgeMetrics(CollectorRegistry()).listed, *LimitMetrics(CollectorRegistry()).listed],
        "scheduler": SchedulerMetrics(CollectorRegistry()).listed,
        "worker": WorkerMetrics(CollectorRegistry()).listed,
        "process": ProcessMetrics("any", CollectorRegistry(), lambda: True).listed,
    }


class UnknownMetric(Exception):
    """No process has a metric of that name, kind or label."""


class Query(NamedTuple):
    """One line of a panel. `legend` is Grafana's: {{label}} stands for its value."""

    expr: str
    legend: str


class Queries:
    """Makes queries. Every method takes the full name, without the suffixes of a histogram's series.

    `narrow` is the selector of every metric that knows models, where the caller gives none.
    """

    def __init__(self, metrics: Mapping[str, Sequence[Metric]], narrow: str = "") -> None:
        self._narrow = narrow
        self._metrics = {metric.name: metric for listed in metrics.values() for metric in listed}

    def rate(self, name: str, *by: str, where: str = "", interval: str = INTERVAL) -> str:
        """A counter's increase per second, summed over all but the labels `by`."""
        self._check(name, "counter", by)
        return f"{_sum(by)}(rate({name}{self._selector(name, where)}[{interval}]))"

    def increase(self, name: str, *by: str, where: str = "", interval: str = INTERVAL) -> str:
        self._check(name, "counter", by)
        return f"{_sum(by)}(increase({name}{self._selector(name, where)}[{interval}]))"

    def ratio(self, part: str, whole: str, *by: str) -> str:
        """One counter's rate over another's."""
        return f"{self.rate(part, *by)} / {self.rate(whole, *by)}"

    def value(self, name: str, *by: str, how: str = "sum", where: str = "") -> str:
        """A gauge, with `how` over all but the labels `by`."""
        self._check(name, "gauge", by)
        return f"{how} by ({', '.join(by)}) ({name}{self._selector(name, where)})" if by else f"{how}({name}{self._selector(name, where)})"

    def quantile(self, share: float, name: str, *by: str) -> str:
        self._check(name, "histogram", by)
        return f"histogram_quantile({share:g}, {_sum(('le', *by))}(rate({name}_bucket{self._selector(name)}[{INTERVAL}])))"

    def buckets(self, name: str) -> str:
        """For a heatmap: observations per second in each bucket."""
        self._check(name, "histogram", ())
        return f"sum by (le) (rate({name}_bucket{self._selector(name)}[{INTERVAL}]))"

    def slow_ratio(self, name: str, limit_s: float, interval: str) -> str:
        """The share of observations above `limit_s`, which must be one of the buckets."""
        self._check(name, "histogram", ())
        fast, every = (f"sum(rate({name}{suffix}[{interval}]))" for suffix in (f'_bucket{{le="{float(limit_s)}"}}', "_count"))
        return f"1 - {fast} / {every}"

    def of_process(self, expr: str, process: str) -> str:
        """Series of the client library, which know no process, narrowed to those that a process of this name has."""
        self._check("ossia_process_ready", "gauge", ("process",))
        return f'{expr} and on (instance, job) ossia_process_ready{{process="{process}"}}'

    def labels_of(self, name: str) -> tuple[str, ...]:
        return self._find(name).labels

    def _find(self, name: str) -> Metric:
        if name not in self._metrics:
            raise UnknownMetric(f"no process has a metric {name}")
        return self._metrics[name]

    def _check(self, name: str, kind: str, by: Sequence[str]) -> None:
        metric = self._find(name)
        if metric.kind != kind:
            raise UnknownMetric(f"{name} is a {metric.kind}, and a {kind} was asked for")
        if missing := set(by) - set(metric.labels) - {"instance"}:
            raise UnknownMetric(f"{name} has no label {', '.join(sorted(missing))}")

    def _selector(self, name: str, where: str = "") -> str:
        selector = where or (self._narrow if "model" in self._find(name).labels else "")
        return f"{{{selector}}}" if selector else ""


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)}) " if by else "sum"
