"""A cluster under load, scraped by a real Prometheus: every panel and every alert has data, and an alert fires when its cause is there."""

import asyncio
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.streams import streaming_in_thread
from cli.certificates import open_identity
from deploy.grafana.live import GPU_PREFIX, alert_queries, panel_queries
from protos.ossia.v1 import worker_pb2, worker_pb2_grpc
from services.grpc_channel import open_channel
from tests.cluster.local_cluster import SETTLE_TIMEOUT_S, LocalCluster, wait_until
from tests.fakes.otlp_collector import otlp_collector
from tests.fakes.prometheus_server import PrometheusServer, prometheus_server

INTERVAL = "30s"
NUM_CLIENTS, NUM_STREAMS = 8, 40
PRICES = "models:\n  scripted:\n    price: {input: 1.0, output: 2.0}\n"
BODY: dict[str, object] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, script: Path) -> Iterator[tuple[LocalCluster, PrometheusServer]]:
    """Two groups that have served NUM_STREAMS streams while they were scraped."""
    home = tmp_path_factory.mktemp("home")
    (home / "models.yaml").write_text(PRICES)
    flags = ("--groups", "2", "--backend", "scripted", "--script", str(script), "--step-ms", "2")
    with pytest.MonkeyPatch.context() as patch, otlp_collector() as collector:
        patch.setenv("OSSIA_EDGE_MODELS_FILE", str(home / "models.yaml"))
        patch.setenv("OSSIA_EDGE_REQUESTS_PER_MINUTE", "1000000")  # a limit that nobody meets, so that limits are counted
        with LocalCluster(home, *flags, "--otlp-endpoint", collector.endpoint, tls=True) as cluster:
            jobs: dict[str, list[str]] = {}
            for name, facts in cluster.state.items():
                jobs.setdefault(f"ossia-{name.partition('-')[0]}", []).append(facts["metrics"])
            load = streaming_in_thread(lambda: cluster.url, [BODY], NUM_CLIENTS)
            with prometheus_server(home, jobs) as prometheus, load as tally:
                wait_until(lambda: tally.num_finished >= NUM_STREAMS and has_seen_requests_end(prometheus), 300, tally)
                assert not tally.broken
                yield cluster, prometheus


def has_seen_requests_end(prometheus: PrometheusServer) -> bool:
    """In two scrapes, so that every rate has something to show."""
    return bool(prometheus.query("sum(rate(ossia_edge_requests_total[15s])) > 0"))


def has_data(samples: list[dict[str, object]]) -> bool:
    return any(not math.isnan(float(value)) for sample in samples if isinstance(sample["value"], list) for value in sample["value"][1:])


def test_every_panel_and_every_alert_has_data_under_load(watched: tuple[LocalCluster, PrometheusServer]) -> None:
    _, prometheus = watched
    queries = dict([*panel_queries(INTERVAL), *alert_queries()])
    assert len(queries) > 80
    empty = {name: query for name, query in queries.items() if GPU_PREFIX not in query}

    def all_have_shown_data() -> bool:
        for name in [name for name, query in empty.items() if has_data(prometheus.query(query))]:
            del empty[name]
        return not empty

    wait_until(all_have_shown_data, SETTLE_TIMEOUT_S, empty)


@pytest.mark.parametrize("name", ["ossia_edge_time_to_first_token_seconds", "ossia_scheduler_queue_wait_seconds"])
def test_histograms_link_to_the_traces_of_requests(watched: tuple[LocalCluster, PrometheusServer], name: str) -> None:
    _, prometheus = watched

    def find_traces() -> list[str]:
        found = prometheus.exemplars(f"{name}_bucket", time.time() - 3600, time.time() + 60)
        return [exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]]

    wait_until(lambda: bool(find_traces()), SETTLE_TIMEOUT_S, name)
    assert all(len(trace) == 32 for trace in find_traces())


async def test_an_alert_fires_when_two_owners_drive_one_group(watched: tuple[LocalCluster, PrometheusServer]) -> None:
    cluster, prometheus = watched
    assert "OssiaPlansRefused" not in prometheus.firing()
    identity = open_identity(cluster.tls_dir, "scheduler")
    async with open_channel(cluster.state["worker-0"]["grpc"], identity=identity, role="worker") as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Run(timeout=60)
        await call.write(worker_pb2.StepPlan(epoch=0, step=1))
        answer = await call.read()
        assert isinstance(answer, worker_pb2.StepResult) and answer.HasField("refusal")
    await asyncio.to_thread(wait_until, lambda: "OssiaPlansRefused" in prometheus.firing(), SETTLE_TIMEOUT_S, prometheus.log)


def test_the_request_log_has_whom_and_how_long_and_no_text(watched: tuple[LocalCluster, PrometheusServer]) -> None:
    cluster, _ = watched
    ended = [line for line in cluster.log_lines("edge") if line["event"] == "chat_ended"]
    fields = {
        "request_id",
        "tenant",
        "model",
        "outcome",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "ttft_s",
        "total_s",
        "trace_id",
    }
    assert ended and all(fields <= line.keys() for line in ended)
    refused = {"model": "nope", "messages": BODY["messages"]}
    assert (
        httpx.post(f"{cluster.url}/v1/chat/completions", json=refused, headers={"X-Request-Id": "refused-here"}, timeout=60).status_code
        == 404
    )

    def refused_lines() -> list[dict[str, Any]]:
        return [line for line in cluster.log_lines("edge") if line.get("request_id") == "refused-here"]

    wait_until(lambda: bool(refused_lines()), SETTLE_TIMEOUT_S)
    assert refused_lines()[0]["outcome"] == "model_not_found"
    assert "Hello" not in json.dumps([*ended, *refused_lines()])
