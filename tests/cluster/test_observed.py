"""One request gives one trace over all three processes, through either door."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1.inference_pb2_grpc import InferenceStub
from tests.cluster.local_cluster import SETTLE_TIMEOUT_S, LocalCluster, wait_until
from tests.fakes.otlp_collector import CollectedSpan, OtlpCollector, otlp_collector

CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
SERVICES = ["ossia-edge", "ossia-scheduler", "ossia-worker"]
SECRET = "the-owl-flies-at-nine"


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, script: Path) -> Iterator[tuple[LocalCluster, OtlpCollector]]:
    with otlp_collector() as collector:
        home = tmp_path_factory.mktemp("home")
        with LocalCluster(home, "--backend", "scripted", "--script", str(script), "--otlp-endpoint", collector.endpoint) as cluster:
            yield cluster, collector


def chain(collector: OtlpCollector, request_id: str) -> list[CollectedSpan]:
    """The spans of the request's trace from the edge's down, each the parent of the next, once the worker's has come."""

    def find(spans: list[CollectedSpan]) -> list[CollectedSpan]:
        found = [span for span in spans if span.attributes.get("ossia.request_id") == request_id and span.service == "ossia-edge"]
        while found and (below := [span for span in spans if span.parent_span_id == found[-1].span_id]):
            found += below
        return found if "ossia-worker" in {span.service for span in found} else []

    return collector.wait_for(find)


def ask_by_rest(cluster: LocalCluster, request_id: str) -> None:
    body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": f"weather {SECRET}"}]}).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": request_id, "traceparent": TRACEPARENT}
    with urllib.request.urlopen(urllib.request.Request(f"{cluster.url}/v1/chat/completions", body, headers), timeout=60) as answer:
        assert answer.headers["X-Request-Id"] == request_id


def test_a_rest_request_gives_one_trace_from_edge_to_worker(observed: tuple[LocalCluster, OtlpCollector]) -> None:
    cluster, collector = observed
    ask_by_rest(cluster, "traced-by-rest")
    spans = chain(collector, "traced-by-rest")
    assert [span.service for span in spans] == SERVICES
    assert {span.trace_id for span in spans} == {CALLER_TRACE} and spans[0].parent_span_id == CALLER_SPAN
    assert spans[0].attributes["gen_ai.request.model"] == "scripted"


def test_a_grpc_request_gives_one_trace_under_its_callers_span(observed: tuple[LocalCluster, OtlpCollector]) -> None:
    cluster, collector = observed
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=f"weather {SECRET}")])
    with grpc.insecure_channel(cluster.grpc) as channel:
        request = pb.ChatRequest(model="scripted", messages=[message], request_id="traced-by-grpc")
        assert list(InferenceStub(channel).Chat(request, timeout=60, metadata=(("traceparent", TRACEPARENT),)))
    spans = chain(collector, "traced-by-grpc")
    assert [span.service for span in spans] == SERVICES and spans[0].parent_span_id == CALLER_SPAN


def test_the_spans_tell_where_the_request_was_placed_and_how_it_went(observed: tuple[LocalCluster, OtlpCollector]) -> None:
    cluster, collector = observed
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=f"weather {SECRET}")])
    with grpc.insecure_channel(cluster.grpc) as channel:
        request = pb.ChatRequest(model="scripted", messages=[message], request_id="explained", tenant="acme")
        assert list(InferenceStub(channel).Chat(request, timeout=60))
    edge, scheduler, worker = chain(collector, "explained")
    events = dict(scheduler.events)
    assert [name for name, _ in scheduler.events] == ["placed", "queued", "first_token", "finished"]
    placed = events["placed"]
    assert placed["ossia.group"] == "group-0" and placed["ossia.candidates"] == ["group-0"]
    costs = placed["ossia.costs_s"]
    assert isinstance(costs, list) and len(costs) == 1 and costs[0] >= 0
    assert events["finished"]["ossia.reason"] == "stop" and "ossia.queued_tokens" in events["queued"]
    asked = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "ossia", "gen_ai.response.id": "explained"}
    assert asked.items() <= edge.attributes.items()
    used = edge.attributes["gen_ai.usage.output_tokens"]
    assert isinstance(used, int) and used > 0 and used == scheduler.attributes["gen_ai.usage.output_tokens"]
    assert ("finished", {"ossia.outcome": "completed"}) in edge.events and worker.service == "ossia-worker"


def test_logs_are_json_lines_with_the_request_id_and_never_the_prompt(observed: tuple[LocalCluster, OtlpCollector]) -> None:
    cluster, collector = observed
    ask_by_rest(cluster, "logged")
    assert chain(collector, "logged")
    wait_until(lambda: "logged" in {line.get("request_id") for line in cluster.log_lines("edge")}, SETTLE_TIMEOUT_S, cluster)
    lines = {name: cluster.log_lines(name) for name in cluster.state}
    assert lines.keys() >= {"edge", "scheduler", "worker-0"}
    assert not [name for name, of_process in lines.items() if SECRET in repr(of_process)]
    assert SECRET not in repr(collector.spans)
