"""Writes the dashboards and the alerts' rules, and says whether those that are written are current.

python -m deploy.grafana.generate          writes deploy/grafana/*.json, deploy/prometheus/rules.yaml and docs/metrics.md
python -m deploy.grafana.generate --check  exits 1 where one is not what the metrics, panels and alerts give
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.grafana.dashboards import Dashboard, Panel, make_dashboards
from deploy.grafana.queries import list_metrics
from deploy.prometheus.rules import RULES, make_rules, render_rules
from services.metrics import Metric

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "metrics.md"
WIDTH, HEIGHT = 12, 8  # of 24 columns; two panels a row
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def render(dashboard: Dashboard) -> str:
    """Grafana's JSON, equal for equal input."""
    content = {
        "uid": f"ossia-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["ossia"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "links": [{"type": "dashboards", "tags": ["ossia"], "asDropdown": True, "title": "Ossia"}],
        "panels": [_render_panel(panel, index) for index, panel in enumerate(dashboard.panels)],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _variables() -> list[dict[str, object]]:
    models = "label_values(ossia_edge_requests_total, model)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "model",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": models, "refId": "model"},
            "definition": models,
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _render_panel(panel: Panel, index: int) -> dict[str, object]:
    is_heatmap = panel.kind == "heatmap"
    return {
        "id": index + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": index % 2 * WIDTH, "y": index // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {} if is_heatmap else {"showPoints": "never"}}, "overrides": []},
        "options": {"yAxis": {"unit": panel.unit}} if is_heatmap else {},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend,
                "exemplar": "histogram_quantile" in query.expr,
                "format": "heatmap" if is_heatmap else "time_series",
            }
            for number, query in enumerate(panel.queries)
        ],
    }


def render_all(metrics: Mapping[str, Sequence[Metric]]) -> Mapping[Path, str]:
    """What every generated file is to hold."""
    files = {FOLDER / f"{dashboard.name}.json": render(dashboard) for dashboard in make_dashboards(metrics)}
    return {**files, RULES: render_rules(make_rules(metrics)), PAGE: render_page(metrics)}


def render_page(metrics: Mapping[str, Sequence[Metric]]) -> str:
    """The list of metrics as a page of the docs."""
    source = "Written by `python -m deploy.grafana.generate` from the lists that the processes keep; each serves its own at `/metrics`."
    return f"# Metrics\n\n{source}\n" + "".join(_render_table(process, listed) for process, listed in metrics.items())


def _render_table(process: str, listed: Sequence[Metric]) -> str:
    title = "Every process" if process == "process" else process.capitalize()
    rows = (f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.help} |\n" for one in listed)
    return f"\n## {title}\n\n| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n{''.join(rows)}"


def find_stale(rendered: Mapping[Path, str]) -> list[Path]:
    """Files that are missing, that hold something else, or that nothing generates any more."""
    differing = [path for path, text in rendered.items() if not path.exists() or path.read_text() != text]
    return differing + [path for path in FOLDER.glob("*.json") if path not in rendered]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    rendered = render_all(list_metrics())
    stale = find_stale(rendered)
    if parser.parse_args().check:
        for path in stale:
            print(f"{path} is not current: run python -m deploy.grafana.generate", file=sys.stderr)
        return bool(stale)
    for path in stale:
        if path in rendered:
            path.write_text(rendered[path])
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
