"""Every metric of the edge."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from protos.ossia.v1.sampling_pb2 import Usage
from services.errors import TABLE
from services.metrics import MetricSet, TenantNames

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (16, 64, 256, 1024, 4096, 16_384, 65_536, 131_072)


class EdgeMetrics(MetricSet):
    """`cost_usd` is the price of a model's usage; 0 where it has none."""

    def __init__(self, registry: CollectorRegistry, cost_usd: Callable[[str, Usage], float] = lambda _model, _usage: 0.0) -> None:
        super().__init__("edge", registry)
        self._cost_usd = cost_usd
        self._tenants = TenantNames()
        self.open_requests = self.gauge("open_requests", "Requests open now")
        self.schedulers = self.gauge("schedulers_connected", "Schedulers that this edge has a stream to")
        self.finished = self.counter("requests", "Requests ended, by outcome", "model", "tenant", "outcome")
        self.refused = self.counter("refused", "Requests refused before they were sent on, by error code", "code")
        for row in TABLE.values():
            self.refused.labels(row.code)  # from 0 on, so that an alert sees the first one
        self.prompt_tokens = self.counter("prompt_tokens", "Prompt tokens of ended requests", "model", "tenant")
        self.cached_tokens = self.counter("cached_tokens", "Prompt tokens found in a cache", "model", "tenant")
        self.completion_tokens = self.counter("completion_tokens", "Generated tokens, by channel", "model", "tenant", "channel")
        self.cost_usd = self.counter("cost_usd", "Price of ended requests, where the model has one", "model", "tenant")
        self.malformed = self.counter("malformed_output", "Breaks of the Harmony format in generated tokens", "model")
        self.ttft_s = self.histogram("time_to_first_token_seconds", "Arrival to first token", "model", buckets=SECONDS)
        self.inter_token_s = self.histogram("inter_token_seconds", "Between two deliveries of one request", "model", buckets=SECONDS)
        self.total_s = self.histogram("request_seconds", "Arrival to the end", "model", buckets=SECONDS)
        self.prompt_length = self.histogram("prompt_length_tokens", "Prompt length", "model", buckets=TOKENS)
        self.completion_length = self.histogram("completion_length_tokens", "Generated tokens of a request", "model", buckets=TOKENS)

    def record(
        self,
        model: str,
        tenant: str,
        outcome: str,
        total_s: float,
        usage: Usage,
        tokens: Mapping[str, int],
        num_malformed: int,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """One request has ended. `tokens` are the generated ones by channel."""
        tenant = self._tenants[tenant]
        self.finished.labels(model, tenant, outcome).inc()
        self.total_s.labels(model).observe(total_s, exemplar)
        self.prompt_length.labels(model).observe(usage.prompt_tokens)
        self.completion_length.labels(model).observe(usage.completion_tokens)
        self.prompt_tokens.labels(model, tenant).inc(usage.prompt_tokens)
        self.cached_tokens.labels(model, tenant).inc(usage.cached_tokens)
        self.malformed.labels(model).inc(num_malformed)
        for channel, number in tokens.items():
            self.completion_tokens.labels(model, tenant, channel).inc(number)
        self.cost_usd.labels(model, tenant).inc(self._cost_usd(model, usage))
