"""A real Prometheus on a free port that scrapes given targets, with our alerts loaded."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.prometheus.rules import RULES
from tests.fakes.free_port import free_port

START_TIMEOUT_S = 120.0
SCRAPE_INTERVAL = "2s"  # which is also how long a process may take to answer one


@dataclass(frozen=True)
class PrometheusServer:
    url: str
    log: Path

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query, now."""
        samples: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return samples

    def query_range(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        series: list[dict[str, Any]] = self._get("query_range", query=expr, start=start, end=end, step=step_s)["result"]
        return series

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"}

    def exemplars(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("query_exemplars", query=expr, start=start, end=end)
        return found

    def _get(self, path: str, **parameters: object) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as reply:
            return json.load(reply)["data"]


@contextmanager
def prometheus_server(folder: Path, targets: Mapping[str, list[str]]) -> Iterator[PrometheusServer]:
    """`targets` are host:port by job. Ready on entry, dead on exit."""
    binary = shutil.which("prometheus")
    if binary is None:
        raise RuntimeError("these tests need the real Prometheus: install Debian's prometheus so that `prometheus` is on the PATH")
    port, config, log = free_port(), folder / "prometheus.yml", folder / "prometheus.log"
    jobs = [{"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items()]
    every = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    config.write_text(yaml.safe_dump({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs}))
    flags = (
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    )
    with log.open("wb") as output:
        process = subprocess.Popen([binary, *flags], stdout=output, stderr=output)
    server = PrometheusServer(f"http://127.0.0.1:{port}", log)
    try:
        _wait_ready(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait_ready(server: PrometheusServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{server.url}/-/ready", timeout=START_TIMEOUT_S).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not start; its log:\n{server.log.read_text()}") from None
            time.sleep(0.05)
