"""A cluster whose processes speak mutual TLS: it serves as any other, and lets in nobody without the right certificate."""

import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest

from benchmarks.streams import streaming_in_thread
from cli.certificates import open_identity, write_certificates
from protos.ossia.v1 import scheduler_pb2, scheduler_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.errors import from_rpc_error
from services.grpc_channel import open_channel
from tests.cluster.conftest import REPLY
from tests.cluster.local_cluster import ROOT, SETTLE_TIMEOUT_S, LocalCluster, wait_until

ANSWER = REPLY.rpartition("<|message|>")[2]
NUM_CLIENTS = 8
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, script: Path) -> Iterator[LocalCluster]:
    flags = ("--backend", "scripted", "--script", str(script), "--step-ms", "2")
    with LocalCluster(tmp_path_factory.mktemp("home"), *flags, tls=True) as cluster:
        yield cluster


@pytest.fixture
def client(secured: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{secured.url}/v1", api_key="any", max_retries=100) as made:
        yield made


@pytest.mark.parametrize("role", ["edge", "worker", "client"])
async def test_only_a_scheduler_may_drive_a_worker(secured: LocalCluster, role: str) -> None:
    async with open_channel(secured.state["worker-0"]["grpc"], identity=open_identity(secured.tls_dir, role), role="worker") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await worker_pb2_grpc.WorkerStub(channel).Run(timeout=60).read()  # nothing is written: that would race with the refusal
    assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert f"names {role}" in from_rpc_error(failure.value).message


@pytest.mark.parametrize("name", ["worker-0", "scheduler"])
async def test_plaintext_is_refused(secured: LocalCluster, name: str) -> None:
    async with open_channel(secured.state[name]["grpc"]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            if name == "scheduler":
                await scheduler_pb2_grpc.SchedulerStub(channel).Status(scheduler_pb2.StatusRequest(), timeout=60)
            else:
                await worker_pb2_grpc.WorkerStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=60)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


def test_doors_with_a_certificate_serve_rest_and_grpc_over_tls(tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_certificates(tmp_path / "door", days=1, hosts=("127.0.0.1",))
    monkeypatch.setenv("OSSIA_EDGE_DOOR_TLS_CERT", str(tmp_path / "door/edge/tls.crt"))
    monkeypatch.setenv("OSSIA_EDGE_DOOR_TLS_KEY", str(tmp_path / "door/edge/tls.key"))
    with LocalCluster(tmp_path, "--backend", "scripted", "--script", str(script)) as cluster:
        assert f"READY https://{cluster.state['edge']['rest']}" in cluster.said
        trust = ssl.create_default_context(cafile=tmp_path / "door/ca.crt")
        with urllib.request.urlopen(f"{cluster.url.replace('http', 'https')}/v1/models", context=trust, timeout=60) as answer:
            assert json.load(answer)["data"][0]["id"] == "scripted"
        ask = [sys.executable, "-m", "cli.main", "run", "scripted", "Hello", "--address", f"https://{cluster.grpc}"]
        environment = {**os.environ, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(tmp_path / "door/ca.crt")}
        said = subprocess.run(ask, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
        assert ANSWER[:40] in said
        plain = subprocess.run([*ask[:-1], cluster.grpc], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert plain.returncode == 1 and "Traceback" not in plain.stderr


def test_certificates_rotate_under_load_and_new_connections_use_the_new_ones(secured: LocalCluster, client: openai.OpenAI) -> None:
    assert secured.tls_dir is not None
    with streaming_in_thread(lambda: secured.url, [{"model": "scripted", "messages": HELLO}], NUM_CLIENTS) as tally:
        wait_until(lambda: len(tally.open_now) == NUM_CLIENTS, SETTLE_TIMEOUT_S, tally)
        at_rotation = set(tally.open_now)
        write_certificates(secured.tls_dir, days=1)
        wait_until(lambda: at_rotation <= tally.ended.keys(), SETTLE_TIMEOUT_S, tally)
    assert not tally.broken and not tally.refused
    for name in ("worker-0", "scheduler"):
        secured.kill(name)
        secured.wait_for_line(f"{name} serves again")
        assert client.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER
