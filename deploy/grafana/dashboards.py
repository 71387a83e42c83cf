"""What the dashboards show: titles, units and queries, in the order in which they are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deploy.grafana.queries import CHOSEN_MODELS, INTERVAL, Queries, Query
from services.metrics import Metric

QUANTILES = (0.5, 0.99)
UNITS = {"_seconds": "s", "_bytes": "bytes", "_ratio": "percentunit", "_celsius": "celsius", "_watts": "watt", "_usd_total": "currencyUSD"}


@dataclass(frozen=True)
class Panel:
    """`kind` is Grafana's panel type; `unit` its name of a unit."""

    title: str
    unit: str
    queries: Sequence[Query]
    kind: str = "timeseries"
    description: str = ""


@dataclass(frozen=True)
class Dashboard:
    name: str  # of the file, and part of the uid
    title: str
    panels: Sequence[Panel]


def make_dashboards(metrics: Mapping[str, Sequence[Metric]]) -> list[Dashboard]:
    """Raises UnknownMetric where a panel asks for what no process has."""
    q = Queries(metrics, narrow=CHOSEN_MODELS)
    made = [_overview(q), _kv(q), _cost(q), _latency(q), _gpu(q)]
    return [*made, *(_process(q, name, metrics[name]) for name in ("edge", "scheduler", "worker"))]


def _overview(q: Queries) -> Dashboard:
    panels = [
        Panel("Generated tokens", "suffix: tok/s", [Query(q.rate("ossia_edge_completion_tokens_total", "model"), "{{model}}")]),
        Panel("Requests by outcome", "reqps", [Query(q.rate("ossia_edge_requests_total", "outcome"), "{{outcome}}")]),
        Panel("Time to first token", "s", _quantiles(q, "ossia_edge_time_to_first_token_seconds")),
        Panel("Between tokens", "s", _quantiles(q, "ossia_edge_inter_token_seconds")),
        Panel(
            "Queue",
            "s",
            [Query(q.value("ossia_scheduler_group_queue_seconds", "model", how="max"), "{{model}}")],
            description="Tokens that wait over the measured prefill rate, at the group that is worst off. Groups scale on this.",
        ),
        Panel(
            "Sequences",
            "short",
            [
                Query(q.value("ossia_scheduler_group_running", "model"), "{{model}} running"),
                Query(q.value("ossia_scheduler_group_waiting", "model"), "{{model}} waiting"),
            ],
        ),
        Panel("Refused, by code", "reqps", [Query(q.rate("ossia_edge_refused_total", "code"), "{{code}}")]),
        Panel("Open requests", "short", [Query(q.value("ossia_edge_open_requests", "instance"), "{{instance}}")]),
        Panel("Groups lost", "short", [Query(q.increase("ossia_scheduler_groups_lost_total", "group", interval="1h"), "{{group}}")]),
        Panel(
            "Connected schedulers",
            "short",
            [Query(q.value("ossia_edge_schedulers_connected", "instance"), "{{instance}}")],
            description="Streams that each edge has. 0: it can serve nothing.",
        ),
        Panel("Ready processes", "short", [Query(q.value("ossia_process_ready", "process"), "{{process}}")]),
    ]
    return Dashboard("overview", "Ossia", panels)


def _kv(q: Queries) -> Dashboard:
    free, blocks = (q.value(f"ossia_scheduler_group_{name}", "group", "pool") for name in ("free_blocks", "blocks"))
    panels = [
        Panel(
            "Cache hits",
            "percentunit",
            [Query(q.ratio("ossia_scheduler_cached_tokens_total", "ossia_scheduler_prompt_tokens_total"), "hit")],
        ),
        Panel(
            "Hits, expected and found",
            "suffix: tok/s",
            [
                Query(q.rate("ossia_scheduler_predicted_cached_tokens_total", "model"), "{{model}} expected"),
                Query(q.rate("ossia_scheduler_cached_tokens_total", "model"), "{{model}} found"),
            ],
            description="Placement is exact: the two lines are one, unless blocks were evicted while a request waited.",
        ),
        Panel("Blocks in use", "percentunit", [Query(f"1 - {free} / {blocks}", "{{group}} {{pool}}")]),
        Panel("Where requests went", "reqps", [Query(q.rate("ossia_scheduler_placed_total", "group"), "{{group}}")]),
        Panel("Waiting prompt tokens", "suffix: tok", [Query(q.value("ossia_scheduler_group_queued_tokens", "group"), "{{group}}")]),
        Panel("Queue", "s", [Query(q.value("ossia_scheduler_group_queue_seconds", "group"), "{{group}}")]),
        Panel("Prefill rate", "suffix: tok/s", [Query(q.value("ossia_scheduler_group_prefill_tokens_per_second", "group"), "{{group}}")]),
        Panel("Preemptions", "ops", [Query(q.rate("ossia_scheduler_preemptions_total", "model"), "{{model}}")]),
        Panel(
            "Tokens computed", "suffix: tok/s", [Query(q.rate("ossia_scheduler_step_tokens_total", "group", "kind"), "{{group}} {{kind}}")]
        ),
        Panel("Surplus tokens", "suffix: tok/s", [Query(q.rate("ossia_scheduler_surplus_tokens_total", "group"), "{{group}}")]),
    ]
    return Dashboard("kv", "Ossia: KV cache and placement", panels)


def _cost(q: Queries) -> Dashboard:
    def per_day(name: str, *by: str) -> str:
        return q.increase(name, *by, interval="1d")

    spent, prompt, generated = (f"ossia_edge_{name}_total" for name in ("cost_usd", "prompt_tokens", "completion_tokens"))
    panels = [
        Panel("Cost per day, by model", "currencyUSD", [Query(per_day(spent, "model"), "{{model}}")]),
        Panel("Cost per day, by tenant", "currencyUSD", [Query(per_day(spent, "tenant"), "{{tenant}}")]),
        Panel("Cost of the last day", "currencyUSD", [Query(per_day(spent, "model", "tenant"), "{{model}} {{tenant}}")], kind="bargauge"),
        Panel("Prompt tokens per day", "short", [Query(per_day(prompt, "model", "tenant"), "{{model}} {{tenant}}")]),
        Panel("Generated tokens per day", "short", [Query(per_day(generated, "model", "tenant"), "{{model}} {{tenant}}")]),
        Panel(
            "Found in a cache per day",
            "short",
            [Query(per_day("ossia_edge_cached_tokens_total", "model", "tenant"), "{{model}} {{tenant}}")],
        ),
        Panel("Requests per day", "short", [Query(per_day("ossia_edge_requests_total", "model", "tenant"), "{{model}} {{tenant}}")]),
    ]
    return Dashboard("cost", "Ossia: cost", panels)


def _latency(q: Queries) -> Dashboard:
    shown = {
        "Time to first token": "ossia_edge_time_to_first_token_seconds",
        "Of it, in the queue": "ossia_scheduler_queue_wait_seconds",
        "Of it, in prefill": "ossia_scheduler_prefill_seconds",
        "Between tokens": "ossia_edge_inter_token_seconds",
        "Whole request": "ossia_edge_request_seconds",
    }
    panels = []
    for title, name in shown.items():
        panels.append(Panel(title, "s", _quantiles(q, name, (0.5, 0.9, 0.99))))
        panels.append(Panel(f"{title}: distribution", "s", [Query(q.buckets(name), "{{le}}")], kind="heatmap"))
    return Dashboard("latency", "Ossia: latency by model", panels)


def _gpu(q: Queries) -> Dashboard:
    def of_gpus(name: str) -> Query:
        return Query(q.value(f"ossia_worker_gpu_{name}", "instance", "gpu", how="max"), "{{instance}} GPU {{gpu}}")

    used, total = (of_gpus(name).expr for name in ("memory_used_bytes", "memory_total_bytes"))
    panels = [
        Panel("Utilisation", "percentunit", [of_gpus("utilization_ratio")]),
        Panel("Memory in use", "bytes", [of_gpus("memory_used_bytes")]),
        Panel("Memory in use, of all", "percentunit", [Query(f"{used} / {total}", "{{instance}} GPU {{gpu}}")]),
        Panel("Temperature", "celsius", [of_gpus("temperature_celsius")]),
        Panel("Power", "watt", [of_gpus("power_watts")]),
        Panel("Device time of a step", "s", _quantiles(q, "ossia_worker_step_seconds")),
    ]
    return Dashboard("gpu", "Ossia: GPUs", panels)


def _process(q: Queries, name: str, listed: Sequence[Metric]) -> Dashboard:
    """One panel for every metric that the process lists, then what all processes have."""
    panels = [_of_metric(q, metric) for metric in listed]
    of_library = {
        "CPU": ("short", f"rate(process_cpu_seconds_total[{INTERVAL}])"),
        "Memory": ("bytes", "process_resident_memory_bytes"),
        "Open files": ("short", "process_open_fds"),
    }
    panels += [Panel(title, unit, [Query(q.of_process(expr, name), "{{instance}}")]) for title, (unit, expr) in of_library.items()]
    return Dashboard(name, f"Ossia: {name}", panels)


def _of_metric(q: Queries, metric: Metric) -> Panel:
    title = metric.name.removeprefix("ossia_").removesuffix("_total").replace("_", " ")
    unit = next((unit for suffix, unit in UNITS.items() if metric.name.endswith(suffix)), "short")
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels) or metric.name
    if metric.kind == "histogram":
        queries = _quantiles(q, metric.name)
    else:
        make: Callable[..., str] = q.rate if metric.kind == "counter" else q.value
        queries = [Query(make(metric.name, *metric.labels), legend)]
    return Panel(title, unit if metric.kind != "counter" else "ops", queries, description=metric.help)


def _quantiles(q: Queries, name: str, shares: Sequence[float] = QUANTILES) -> list[Query]:
    """Per model where the metric knows models, else over all."""
    by = [label for label in ("model", "group") if label in q.labels_of(name)][:1]
    legend = "".join(f"{{{{{label}}}}} " for label in by)
    return [Query(q.quantile(share, name, *by), f"{legend}p{share * 100:g}") for share in shares]
