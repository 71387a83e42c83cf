"""Draws a dashboard's data as a picture, without Grafana: python -m deploy.grafana.plot --url http://127.0.0.1:9090 --out docs/images"""

import argparse
import json
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.grafana.dashboards import Dashboard, Panel, make_dashboards
from deploy.grafana.live import fill
from deploy.grafana.queries import list_metrics

NUM_POINTS = 120
COLUMNS = 3
PANEL_INCHES = (5.2, 2.6)


class Prometheus:
    def __init__(self, url: str, start: float, end: float, interval: str) -> None:
        self.start, self.seconds = start, end - start
        self._url, self._interval = url, interval

    def series(self, expr: str) -> list[dict[str, Any]]:
        """Each with its labels and its points over the time shown."""
        step_s = max(1.0, self.seconds / NUM_POINTS)
        query = {"query": fill(expr, self._interval), "start": self.start, "end": self.start + self.seconds, "step": step_s}
        with urllib.request.urlopen(f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(query)}", timeout=30) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return found


def draw(dashboard: Dashboard, source: Prometheus, path: Path) -> None:
    rows = math.ceil(len(dashboard.panels) / COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]))
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis, panel in zip(axes.flat, dashboard.panels, strict=False):
        _draw_panel(axis, panel, source)
    for axis in axes.flat[len(dashboard.panels) :]:
        axis.remove()
    figure.suptitle(dashboard.title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _draw_panel(axis: Axes, panel: Panel, source: Prometheus) -> None:
    axis.set_title(f"{panel.title} [{panel.unit.removeprefix('suffix: ')}]", fontsize=9)
    if panel.kind == "heatmap":
        _draw_heatmap(axis, source.series(panel.queries[0].expr), source.start)
    else:
        for query in panel.queries:
            for series in source.series(query.expr):
                times, values = _points(series, source.start)
                axis.plot(times, values, label=_legend(query.legend, series["metric"]), linewidth=1.2)
        if axis.lines and len(axis.lines) <= 8:
            axis.legend(fontsize=6, loc="best")
    if not axis.lines and not axis.collections:
        axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes, color="grey")
    axis.tick_params(labelsize=7)
    axis.set_xlim(0, source.seconds)
    axis.grid(alpha=0.3)


def _draw_heatmap(axis: Axes, found: Sequence[dict[str, Any]], start: float) -> None:
    """Buckets are cumulative in Prometheus; what is drawn is what fell into each."""
    rows = sorted((one for one in found if one["metric"]["le"] != "+Inf"), key=lambda one: float(one["metric"]["le"]))
    if not rows:
        return
    times, _ = _points(rows[0], start)
    upto = [_points(row, start)[1] for row in rows]
    counts = [upto[0], *([max(0.0, here - below) for here, below in zip(*pair, strict=True)] for pair in zip(upto[1:], upto, strict=False))]
    axis.pcolormesh(times, range(len(rows)), counts, shading="nearest", cmap="viridis")
    axis.set_yticks(range(len(rows)), [row["metric"]["le"] for row in rows], fontsize=5)


def _points(series: dict[str, Any], start: float) -> tuple[list[float], list[float]]:
    """Seconds since `start`, and values."""
    return [at - start for at, _ in series["values"]], [float(value) for _, value in series["values"]]


def _legend(template: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        template = template.replace(f"{{{{{label}}}}}", value)
    return template


def plot(url: str, out: Path, seconds: float, interval: str, names: Sequence[str] = ()) -> list[Path]:
    """One PNG for each dashboard (or each of `names`), of the last `seconds`; rates are over `interval`."""
    out.mkdir(parents=True, exist_ok=True)
    now = time.time()
    source, written = Prometheus(url, now - seconds, now, interval), []
    for dashboard in make_dashboards(list_metrics()):
        if not names or dashboard.name in names:
            written.append(out / f"dashboard-{dashboard.name}.png")
            draw(dashboard, source, written[-1])
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of a Prometheus")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder for the pictures")
    parser.add_argument("--seconds", type=float, default=3600, help="how far back")
    parser.add_argument("--interval", default="5m", help="over which rates are taken, at least four scrapes")
    parser.add_argument("dashboards", nargs="*", help="names; none: all")
    arguments = parser.parse_args()
    for path in plot(arguments.url, arguments.out, arguments.seconds, arguments.interval, arguments.dashboards):
        print(path)


if __name__ == "__main__":
    main()
