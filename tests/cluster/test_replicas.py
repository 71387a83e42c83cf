"""Two scheduler replicas share four groups through a real etcd; a third joins under load. Every stream is right, none is dropped."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import scheduler_pb2, scheduler_pb2_grpc
from protos.ossia.v1.inference_pb2_grpc import InferenceStub
from tests.cluster.local_cluster import ROOT, wait_until
from tests.fakes.etcd_server import etcd_cluster

NUM_STREAMS = 200
START_TIMEOUT_S, END_TIMEOUT_S = 180.0, 120.0


class Process:
    """One part of the cluster by itself, and what it announced."""

    def __init__(self, argv: list[str], log: Path) -> None:
        with log.open("wb") as stderr:
            self._process = subprocess.Popen([sys.executable, "-m", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            self.said = json.loads(line)
            if self.said["event"] == "serving":
                return
        raise AssertionError(log.read_text())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(END_TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def running(folder: Path, name: str, *argv: str) -> Iterator[Process]:
    process = Process(list(argv), folder / f"{name}.log")
    try:
        yield process
    finally:
        process.stop()


def groups_of(process: Process) -> dict[str, int]:
    """Steps by group, for the groups that this scheduler owns."""
    with grpc.insecure_channel(process.said["grpc"]) as channel:
        status = scheduler_pb2_grpc.SchedulerStub(channel).Status(scheduler_pb2.StatusRequest(), timeout=60)
    return {group.group_id: group.num_steps for group in status.groups}


def num_groups_at(edge: Process) -> int:
    """As the schedulers that it is connected to have told it."""
    with grpc.insecure_channel(edge.said["grpc"]) as channel:
        return sum(model.num_groups for model in InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=60).models)


async def chat(stub: InferenceStub, number: int) -> str:
    """One stream; the script's reply, which any token lost, doubled or out of order would change."""
    request = pb.ChatRequest(
        model="scripted", messages=[pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=f"Question {number}")])]
    )
    await asyncio.sleep(number * 0.02)
    events = [event async for event in stub.Chat(request, timeout=300)]
    assert events[-1].HasField("completed"), events[-1]
    return "".join(event.channel_delta.text for event in events if event.channel_delta.channel == pb.CHANNEL_FINAL)


async def test_replicas_share_groups_and_a_third_one_joins_without_a_dropped_stream(tmp_path: Path) -> None:
    answer = " ".join(str(number) for number in range(60))
    script = tmp_path / "script.yaml"
    script.write_text(f'default: "<|channel|>final<|message|>{answer}"')
    with etcd_cluster(tmp_path, 1) as (etcd,), ExitStack() as stack:
        shared = ("--etcd", etcd.endpoint, "--drain-s", "20")

        def start(name: str, *argv: str) -> Process:
            return stack.enter_context(running(tmp_path, name, *argv, *shared))

        for number in range(4):
            flags = ("--backend", "scripted", "--script", str(script), "--model", "scripted", "--group-id", f"g{number}", "--step-ms", "5")
            start(f"worker{number}", "worker", *flags)
        schedulers = [start(f"scheduler{number}", "scheduler", "--scheduler-id", f"s{number}") for number in range(2)]
        edge = start("edge", "edge", "--rest-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0")
        wait_until(lambda: sorted(len(groups_of(one)) for one in schedulers) == [2, 2], START_TIMEOUT_S)
        wait_until(lambda: num_groups_at(edge) == 4, START_TIMEOUT_S)
        async with grpc.aio.insecure_channel(edge.said["grpc"]) as channel:
            stub = InferenceStub(channel)
            streams = [asyncio.create_task(chat(stub, number)) for number in range(NUM_STREAMS)]
            await asyncio.sleep(1)
            schedulers.append(await asyncio.to_thread(start, "scheduler2", "scheduler", "--scheduler-id", "s2"))
            assert await asyncio.gather(*streams) == [answer] * NUM_STREAMS
            await asyncio.to_thread(wait_until, lambda: sorted(len(groups_of(one)) for one in schedulers) == [1, 1, 2], START_TIMEOUT_S)
            assert await asyncio.gather(*(chat(stub, number) for number in range(20))) == [answer] * 20
        owned = [groups_of(one) for one in schedulers]
        assert sorted(group for groups in owned for group in groups) == ["g0", "g1", "g2", "g3"], "each group has one owner"
