"""The dashboards' and alerts' queries, as a Prometheus is asked them outside Grafana."""

from collections.abc import Iterator

from deploy.grafana.dashboards import make_dashboards
from deploy.grafana.queries import INTERVAL, list_metrics
from deploy.prometheus.rules import make_rules

GPU_PREFIX = "ossia_worker_gpu_"  # has series only where there is a GPU


def fill(expr: str, interval: str) -> str:
    """With Grafana's variables replaced: every model, and rates over `interval`."""
    return expr.replace(INTERVAL, interval).replace("$model", ".*")


def panel_queries(interval: str) -> Iterator[tuple[str, str]]:
    """Every query by the dashboard and panel that asks it."""
    for dashboard in make_dashboards(list_metrics()):
        for panel in dashboard.panels:
            for query in panel.queries:
                yield f"{dashboard.name}: {panel.title} ({query.legend})", fill(query.expr, interval)


def alert_queries() -> Iterator[tuple[str, str]]:
    """What every alert compares with its threshold, by its name."""
    for alert in make_rules(list_metrics()).alerts:
        for condition in alert.conditions:
            yield f"{alert.name}: {condition.query}", condition.query
