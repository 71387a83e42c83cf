"""The worker as a process: how it starts, what it says, how it ends."""

import asyncio
import json
import signal
import socket
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.ossia.v1 import worker_pb2
from services.discovery import open_discovery
from services.grpc_channel import open_channel
from services.vocabulary import load_vocabulary
from tests.fakes.etcd_server import etcd_cluster
from tests.worker.owner import Owner, admit, connect, make_plan
from tests.worker.worker_process import START_TIMEOUT_S, worker_process
from worker.__main__ import advertised_address
from worker.config import WorkerConfig
from worker.scripted.script import DEFAULT_REPLY

SCRIPTED = ("--backend", "scripted")
PROMPT = [1, 2, 3]
FORBID_TORCH = """
import sys
class Forbid:
    def find_spec(self, name, *_):
        assert name.partition(".")[0] != "torch", name
sys.meta_path.insert(0, Forbid())
from worker.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
FAIL_A_STEP = """
import os, sys
from worker.__main__ import main
from worker.scripted.backend import ScriptedBackend
ScriptedBackend.step = lambda self, scheduled, copies: 1 / 0
os._exit(main(sys.argv[1:]))
"""


async def test_a_scripted_worker_answers_without_torch(tmp_path: Path) -> None:
    (tmp_path / "script.yaml").write_text('default: "<|channel|>final<|message|>Yes, it does.<|return|>"')
    flags = (*SCRIPTED, "--script", str(tmp_path / "script.yaml"), "--model", "scripted-20b", "--group-id", "g1")
    async with worker_process(*flags, start=("-c", FORBID_TORCH)) as worker:
        await worker.wait_serving()
        assert (worker.serving["process"], worker.serving["group_id"]) == ("worker", "g1")
        async with connect(worker.address) as stub:
            info = await stub.Describe(worker_pb2.DescribeRequest())
            assert (info.model, info.device, info.address, info.vocab_size) == ("scripted-20b", "scripted", worker.address, 201088)
            drawn = await Owner(stub).generate(1, PROMPT, 9)
        assert load_vocabulary().decode(drawn) == "<|channel|>final<|message|>Yes, it does.<|return|>"


async def test_health_and_readiness_follow_the_worker() -> None:
    async with worker_process(*SCRIPTED) as worker:
        await worker.wait_serving()
        async with open_channel(worker.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reader, writer = await asyncio.open_connection(*worker.serving["metrics"].split(":"))
        writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert b"200" in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_an_idle_worker_drains_at_once_with_its_owners_stream_open() -> None:
    async with worker_process(*SCRIPTED, "--drain-s", "600") as worker:
        await worker.wait_serving()
        async with connect(worker.address) as stub:
            owner = Owner(stub)
            await owner.step(make_plan(1))
            worker.process.send_signal(signal.SIGTERM)
            assert await owner.status() != grpc.StatusCode.OK
        assert await worker.wait_end() == (0, [])


async def test_a_drain_waits_for_the_sequences_held() -> None:
    async with worker_process(*SCRIPTED, "--drain-s", "600") as worker:
        await worker.wait_serving()
        async with connect(worker.address) as stub:
            owner = Owner(stub)
            await owner.step(make_plan(1, {1: 3}, admitted=[admit(1, PROMPT, [0], [0])]))
            worker.process.send_signal(signal.SIGTERM)
            for step in range(2, 8):
                assert (await owner.step(make_plan(step, {1: 1}))).token_ids
            await owner.send(make_plan(8, released=[1]))  # the worker may be gone before its result is read
        assert await worker.wait_end() == (0, [])


async def test_a_second_signal_ends_the_drain() -> None:
    async with worker_process(*SCRIPTED, "--drain-s", "600") as worker:
        await worker.wait_serving()
        async with connect(worker.address) as stub:
            owner = Owner(stub)
            await owner.step(make_plan(1, {1: 3}, admitted=[admit(1, PROMPT, [0], [0])]))
            worker.process.send_signal(signal.SIGTERM)
            while "draining" not in worker.log_events():
                await owner.step(make_plan(0))  # refused; gives the signal time to arrive
            worker.process.send_signal(signal.SIGTERM)
            assert (await worker.wait_end())[0] == 1


async def test_a_failed_step_ends_the_process_with_its_stack_in_the_log() -> None:
    async with worker_process(*SCRIPTED, start=("-c", FAIL_A_STEP)) as worker:
        await worker.wait_serving()
        async with connect(worker.address) as stub:
            owner = Owner(stub)
            await owner.send(make_plan(1, {1: 3}, admitted=[admit(1, PROMPT, [0], [0])]))
            assert await owner.status() != grpc.StatusCode.OK
        code, lines = await worker.wait_end()
        assert code == 1
        assert len(lines) == 1
        assert "a step failed" in lines[0]
        assert "step_failed" in worker.log_events()


async def test_a_taken_port_is_told_in_one_line_before_loading() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with worker_process("--model-dir", "/nowhere", "--listen", address) as worker:
            code, lines = await worker.wait_end()
    assert code == 1
    assert len(lines) == 1
    assert address in lines[0]


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        ((), 2, "--model-dir"),
        (("--block-size", "0"), 2, "--block-size"),
        (("--no-such-flag",), 2, "--no-such-flag"),
        ((*SCRIPTED, "--tensor-parallel-size", "2"), 2, "--tensor-parallel-size"),
        ((*SCRIPTED, "--script", "absent.yaml"), 1, "absent.yaml"),
        (("--model-dir", "absent-dir"), 1, "absent-dir"),
    ],
)
async def test_what_cannot_start_says_so_in_one_line(flags: tuple[str, ...], code: int, named: str) -> None:
    async with worker_process(*flags) as worker:
        ended, lines = await worker.wait_end()
        assert worker.process.stdout is not None
        assert await worker.process.stdout.read() == b""
    assert ended == code
    assert len(lines) == 1, lines
    assert named in lines[0]


async def test_a_live_worker_is_registered_and_a_drained_one_is_not(tmp_path: Path) -> None:
    with etcd_cluster(tmp_path, 1) as (etcd,):
        async with worker_process(*SCRIPTED, "--etcd", etcd.endpoint, "--group-id", "g1") as worker:
            await worker.wait_serving()
            async with open_discovery((etcd.endpoint,), "default", {}) as discovery, asyncio.timeout(START_TIMEOUT_S):
                members = discovery.watch("groups")
                async for groups in members:
                    if "g1" in groups:
                        break
                info = json_format.Parse(groups["g1"], worker_pb2.GroupInfo())
                assert (info.group_id, info.address) == ("g1", worker.address)
                worker.process.send_signal(signal.SIGTERM)
                async for groups in members:
                    if "g1" not in groups:
                        break
            assert (await worker.wait_end())[0] == 0


def test_an_address_that_others_can_use_is_advertised() -> None:
    assert advertised_address("", "127.0.0.1:5000") == "127.0.0.1:5000"
    assert advertised_address("10.0.0.7", "0.0.0.0:5000") == "10.0.0.7:5000"
    assert advertised_address("", "0.0.0.0:5000") == f"{socket.gethostname()}:5000"


def test_the_configuration_travels_to_other_ranks_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WorkerConfig.from_flags(["--model-dir", "here", "--tensor-parallel-size", "4", "--kv-cache-gib", "0.5"])
    monkeypatch.setenv("OSSIA_WORKER_KV_CACHE_GIB", "9")
    assert WorkerConfig.model_validate_json(config.model_dump_json()) == config
    assert json.loads(config.model_dump_json())["tensor_parallel_size"] == 4


def test_the_default_answer_is_harmony() -> None:
    assert DEFAULT_REPLY.startswith("<|channel|>analysis<|message|>")
    assert DEFAULT_REPLY.endswith("<|return|>")
