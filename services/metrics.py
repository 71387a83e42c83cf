"""How a process lists its metrics: each is made and described in one place, and dashboards are derived from the descriptions."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from opentelemetry.trace import Span, format_trace_id
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from services.metrics_endpoint import Probe

Kind = Literal["counter", "gauge", "histogram"]
MAX_TENANTS = 200
OTHER_TENANTS, NO_TENANT = "other", "default"


class Metric(NamedTuple):
    """What a query needs to know. `name` is as Prometheus stores it: a counter's ends in _total, a histogram's has _bucket and more."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]


class MetricSet:
    """The metrics of one process, named `ossia_<process>_...`, in a registry of their own or a given one."""

    def __init__(self, process: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.listed: list[Metric] = []
        self._prefix = f"ossia_{process}_"

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        self.listed.append(Metric(f"{self._prefix}{name}_total", "counter", meaning, labels))
        return Counter(self._prefix + name, meaning, labels, registry=self.registry)

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        self.listed.append(Metric(self._prefix + name, "gauge", meaning, labels))
        return Gauge(self._prefix + name, meaning, labels, registry=self.registry)

    def histogram(self, name: str, meaning: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        self.listed.append(Metric(self._prefix + name, "histogram", meaning, labels))
        return Histogram(self._prefix + name, meaning, labels, registry=self.registry, buckets=buckets)


class ProcessMetrics(MetricSet):
    """What every process tells of itself, beside `process_cpu_seconds_total` and its like."""

    def __init__(self, process: str, registry: CollectorRegistry, is_ready: Probe) -> None:
        super().__init__("process", registry)
        ProcessCollector(registry=registry)
        self.gauge("ready", "1 while /readyz says so", "process").labels(process).set_function(lambda: float(is_ready()))
        self.certificate_expiry = self.gauge("certificate_expiry_timestamp_seconds", "When a certificate in use ends", "file")


class TenantNames:
    """Tenants as label values: the first MAX_TENANTS that come keep their names, so that callers cannot make series without end."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __getitem__(self, tenant: str) -> str:
        if tenant not in self._known:
            if len(self._known) >= MAX_TENANTS:
                return OTHER_TENANTS
            self._known.add(tenant)
        return tenant or NO_TENANT


def exemplar_of(span: Span) -> dict[str, str] | None:
    """What links one observation to its trace; None where nobody records it."""
    context = span.get_span_context()
    return {"trace_id": format_trace_id(context.trace_id)} if context.is_valid and context.trace_flags.sampled else None
