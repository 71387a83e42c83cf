"""Structure by construction, through a whole cluster with a model of random weights: a sample of what random_demands.py asks."""

import asyncio

import pytest

from cli.checkpoint import write
from protos.ossia.v1 import inference_pb2 as inference
from tests.cluster.local_cluster import LocalCluster
from tests.cluster.random_demands import MODEL, SIZES, Tally, ask_all, check_json, find_faults, make_request, read_events

NUM_REQUESTS = 10


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def tally(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tally:
    directory = tmp_path_factory.mktemp("structure")
    write(directory / MODEL, 3, head_dim=32, num_key_value_heads=2, **SIZES)
    flags = ("--model", str(directory / MODEL), "--tp", str(request.param), "--kv-cache-gib", "0.1", "--num-threads", "1")
    with LocalCluster(directory, *flags, tls=False) as cluster:
        return asyncio.run(ask_all(cluster.state["scheduler"]["grpc"], range(NUM_REQUESTS // request.param)))


def test_every_output_is_as_demanded(tally: Tally) -> None:
    assert tally.faults == []
    assert tally.counts["requests"] >= NUM_REQUESTS // 2 and tally.counts["calls"] > 0


def test_the_check_itself_can_fail() -> None:
    named = make_request(2)
    assert named.tool_choice.mode == inference.ToolChoice.MODE_NAMED
    assert "a call was required and none was made" in find_faults(named, "", [], 1)
    assert any("never offered" in fault for fault in find_faults(named, "", [("other", "{}")], 3))
    assert check_json('{"a": 1}', {"required": ["b"]}) == ["'b' is a required property"]
    assert read_events([inference.ChatEvent(tool_call_delta=inference.ToolCallDelta(id="1", name="f", arguments="{}"))]) == (
        "",
        [("f", "{}")],
        0,
    )
