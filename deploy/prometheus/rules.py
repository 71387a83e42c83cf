"""The alerts: what each watches, from when on it speaks, and which part of docs/operate.md says what to do then.

Budgets burn in two windows at once: the long one says that it matters, the short one that it still happens. This is the multi-window
scheme of Google's SRE workbook; 14.4 times the budget over an hour spends 2 % of a month's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from deploy.grafana.queries import Queries
from services.metrics import Metric

RULES = Path(__file__).parent / "rules.yaml"
RUNBOOK = "docs/operate.md"  # in this repository; whoever serves it elsewhere puts an address before it
ERROR_BUDGET = 0.005  # of all requests may end with an error of ours
SLOW_BUDGET = 0.01  # of first tokens may take longer
SLOW_S = 5
OUR_FAULT = "unavailable|group_lost|deadline_exceeded|internal_error|invalid_logits|constraint_failed|unknown_sequence|invalid_plan"
DAY_S = 24 * 60 * 60


class Burn(NamedTuple):
    """A budget that is spent `factor` times as fast as it lasts for."""

    speed: str
    factor: float
    long: str
    short: str
    severity: str


BURNS = (Burn("Fast", 14.4, "1h", "5m", "page"), Burn("Steadily", 6.0, "6h", "30m", "page"), Burn("Slowly", 1.0, "3d", "2h", "ticket"))


@dataclass(frozen=True)
class Condition:
    """One query with its threshold; the query alone returns data whether or not the alert fires."""

    query: str
    threshold: str  # as in "> 10"

    def __str__(self) -> str:
        is_name = all(character.isalnum() or character in ":_" for character in self.query)
        return f"{self.query} {self.threshold}" if is_name else f"({self.query}) {self.threshold}"


@dataclass(frozen=True)
class Alert:
    """Fires when every condition has held for `lasts`."""

    name: str
    conditions: Sequence[Condition]
    lasts: str
    severity: str  # page: somebody gets up; ticket: somebody looks this week
    summary: str

    @property
    def expr(self) -> str:
        return " and ".join(map(str, self.conditions))

    @property
    def runbook(self) -> str:
        """The heading's anchor in docs/operate.md."""
        return f"{RUNBOOK}#{self.name.lower()}"


@dataclass(frozen=True)
class Rules:
    """`recorded` are queries by the name under which Prometheus keeps their results, for the alerts."""

    recorded: Mapping[str, str]
    alerts: Sequence[Alert]


def make_rules(metrics: Mapping[str, Sequence[Metric]]) -> Rules:
    """Raises UnknownMetric where an alert asks for what no process has."""
    q = Queries(metrics)
    windows = [window for burn in BURNS for window in (burn.long, burn.short)]
    recorded = {_failed(window): _error_ratio(q, window) for window in windows}
    recorded |= {_slow(window): q.slow_ratio("ossia_edge_time_to_first_token_seconds", SLOW_S, window) for window in windows}
    return Rules(recorded, [*_budgets(), *_capacity(q), *_health(q)])


def _failed(window: str) -> str:
    return f"ossia:failed_requests:ratio_rate{window}"


def _slow(window: str) -> str:
    return f"ossia:slow_first_tokens:ratio_rate{window}"


def _budgets() -> list[Alert]:
    made = []
    for burn in BURNS:
        windows = (burn.long, burn.short)
        failed = [Condition(_failed(window), f"> {burn.factor * ERROR_BUDGET:g}") for window in windows]
        slow = [Condition(_slow(window), f"> {burn.factor * SLOW_BUDGET:g}") for window in windows]
        times = f"at {burn.factor:g}x the rate that the budget allows"
        made += [
            Alert(f"OssiaErrorsBurn{burn.speed}", failed, "2m", burn.severity, f"Requests fail {times}"),
            Alert(f"OssiaFirstTokensBurn{burn.speed}", slow, "2m", burn.severity, f"First tokens take over {SLOW_S} s, {times}"),
        ]
    return made


def _capacity(q: Queries) -> list[Alert]:
    queue = q.value("ossia_scheduler_group_queue_seconds", "model", how="min")
    at_edge = q.rate("ossia_edge_refused_total", where='code="overloaded"', interval="5m")
    at_scheduler = q.rate("ossia_edge_requests_total", where='outcome="overloaded"', interval="5m")
    refused = f"{at_edge} + ({at_scheduler} or vector(0))"
    preempted = q.rate("ossia_scheduler_preemptions_total", "model", interval="10m")
    ended = q.rate("ossia_scheduler_sequences_finished_total", "model", interval="10m")
    hot = q.value("ossia_worker_gpu_temperature_celsius", "instance", "gpu", how="max")
    return [
        Alert(
            "OssiaQueueLong",
            [Condition(queue, "> 10")],
            "5m",
            "page",
            "Every group of {{ $labels.model }} has over 10 s of prompts waiting",
        ),
        Alert(
            "OssiaRefusing",
            [Condition(refused, "> 0.1")],
            "5m",
            "page",
            "Requests are refused because too many are open or every queue is full",
        ),
        Alert(
            "OssiaPreempting",
            [Condition(f"{preempted} / {ended}", "> 0.1")],
            "15m",
            "ticket",
            "KV blocks run out: one sequence in ten of {{ $labels.model }} is preempted",
        ),
        Alert("OssiaGpuHot", [Condition(hot, "> 87")], "10m", "ticket", "GPU {{ $labels.gpu }} of {{ $labels.instance }} is over 87 °C"),
    ]


def _health(q: Queries) -> list[Alert]:
    malformed = q.rate("ossia_edge_malformed_output_total", "model", interval="30m")
    requests = q.rate("ossia_edge_requests_total", "model", interval="30m")
    refused_plans = q.increase("ossia_worker_plans_refused_total", "instance", "code", interval="10m")
    expiry = q.value("ossia_process_certificate_expiry_timestamp_seconds", "instance", "file", how="min")
    alone = q.rate("ossia_edge_rate_limit_local_takes_total", interval="5m")
    lost = q.increase("ossia_scheduler_groups_lost_total", "group", interval="15m")
    return [
        Alert(
            "OssiaNoScheduler",
            [Condition(q.value("ossia_edge_schedulers_connected", "instance", how="max"), "== 0")],
            "1m",
            "page",
            "The edge {{ $labels.instance }} has no scheduler and serves nothing",
        ),
        Alert(
            "OssiaNotReady",
            [Condition(q.value("ossia_process_ready", "instance", "process", how="min"), "== 0")],
            "15m",
            "ticket",
            "The {{ $labels.process }} {{ $labels.instance }} runs and is not ready",
        ),
        Alert("OssiaLimitsAlone", [Condition(alone, "> 0")], "5m", "ticket", "Edges count limits each for itself: Redis does not answer"),
        Alert(
            "OssiaTargetDown", [Condition('up{job=~"(.*[-/])?ossia.*"}', "== 0")], "2m", "page", "{{ $labels.instance }} does not answer"
        ),
        Alert(
            "OssiaGroupFlapping",
            [Condition(lost, "> 2")],
            "0m",
            "page",
            "The group {{ $labels.group }} was lost more than twice in 15 minutes",
        ),
        Alert("OssiaPlansRefused", [Condition(refused_plans, "> 0")], "0m", "ticket", "A worker refused a plan: {{ $labels.code }}"),
        Alert(
            "OssiaMalformedOutput",
            [Condition(f"{malformed} / {requests}", "> 0.02")],
            "30m",
            "ticket",
            "{{ $labels.model }} breaks the Harmony format more often than once in 50 requests",
        ),
        Alert(
            "OssiaCertificateEnds",
            [Condition(f"{expiry} - time()", f"< {7 * DAY_S}")],
            "1h",
            "page",
            "The certificate {{ $labels.file }} of {{ $labels.instance }} ends in less than a week",
        ),
    ]


def _error_ratio(q: Queries, window: str) -> str:
    """Of all requests: those that ended with an error of ours, and those that were refused for one."""
    failed = q.rate("ossia_edge_requests_total", where=f'outcome=~"{OUR_FAULT}"', interval=window)
    refused = q.rate("ossia_edge_refused_total", where=f'code=~"{OUR_FAULT}"', interval=window)
    every = q.rate("ossia_edge_requests_total", interval=window)
    return f"(({failed} or vector(0)) + {refused}) / ({every} + {refused})"


def render_rules(rules: Rules) -> str:
    """Prometheus's rule file, which is also the `spec` of a PrometheusRule."""
    recorded = [{"record": name, "expr": query} for name, query in rules.recorded.items()]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook_url": alert.runbook},
        }
        for alert in rules.alerts
    ]
    groups = [{"name": "ossia-budgets", "rules": recorded}, {"name": "ossia-alerts", "rules": alerts}]
    head = "# Written by `python -m deploy.grafana.generate` from deploy/prometheus/rules.py.\n"
    return head + str(yaml.safe_dump({"groups": groups}, sort_keys=False, width=140))
