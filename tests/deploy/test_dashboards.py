"""Dashboards and alerts that cannot drift from the metrics."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.grafana.generate import FOLDER, find_stale, render_all
from deploy.grafana.queries import Queries, UnknownMetric, list_metrics
from deploy.prometheus.rules import RULES, make_rules

OPERATE = Path(__file__).parent.parent.parent / "docs" / "operate.md"
METRICS = list_metrics()
ALL_NAMES = sorted(metric.name for listed in METRICS.values() for metric in listed)


def test_what_is_written_is_current() -> None:
    assert not find_stale(render_all(METRICS)), "run python -m deploy.grafana.generate and commit what it writes"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_renamed_metric_is_noticed(name: str) -> None:
    """By a query that names it, or by its process's dashboard, which shows whatever there is and is then not current."""
    renamed = {
        process: [metric._replace(name=f"{name}_renamed") if metric.name == name else metric for metric in listed]
        for process, listed in METRICS.items()
    }
    try:
        stale = find_stale(render_all(renamed))
    except UnknownMetric as error:
        assert name in str(error)
    else:
        assert stale


@pytest.mark.parametrize(
    ("ask", "word"),
    [
        (lambda q: q.rate("ossia_edge_nothing_total"), "ossia_edge_nothing_total"),
        (lambda q: q.rate("ossia_edge_open_requests"), "is a gauge"),
        (lambda q: q.rate("ossia_edge_refused_total", "colour"), "no label colour"),
    ],
    ids=["name", "kind", "label"],
)
def test_a_query_for_what_no_process_has_is_an_error(ask: object, word: str) -> None:
    assert callable(ask)
    with pytest.raises(UnknownMetric, match=word):
        ask(Queries(METRICS))


def test_every_process_has_a_dashboard_with_all_of_its_metrics() -> None:
    for process in ("edge", "scheduler", "worker"):
        text = (FOLDER / f"{process}.json").read_text()
        assert [metric.name for metric in METRICS[process] if metric.name not in text] == []


def test_panels_have_titles_of_their_own_and_places_that_do_not_overlap() -> None:
    for path in FOLDER.glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len({panel["title"] for panel in panels}) == len(places) == len(panels)


def test_every_alert_links_to_a_part_of_the_guide_that_is_there() -> None:
    headings = {line.lstrip("# ").strip().lower() for line in OPERATE.read_text().splitlines() if line.startswith("#")}
    alerts = make_rules(METRICS).alerts
    assert [alert.name for alert in alerts if alert.runbook.partition("#")[2] not in headings] == []


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    binary = shutil.which("promtool")
    assert binary, "these tests need promtool: install Debian's prometheus so that it is on the PATH"
    return subprocess.run([binary, *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=300)


def test_rules_are_well_formed() -> None:
    checked = promtool("check", "rules", RULES.name)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_fires_when_its_cause_is_there_and_not_before() -> None:
    suites = sorted(RULES.parent.glob("*_test.yaml"))
    tested = promtool("test", "rules", *(path.name for path in suites))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    fired = set(re.findall(r'labels: \'\{alertname="(\w+)"', "".join(path.read_text() for path in suites)))
    assert fired == {alert.name for alert in make_rules(METRICS).alerts}


def test_the_rule_file_is_what_a_prometheus_rule_takes() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    assert all(set(group) == {"name", "rules"} for group in groups)
