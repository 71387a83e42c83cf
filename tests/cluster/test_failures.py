"""What a client sees when a process, or the client itself, dies in the middle."""

import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.cluster.conftest import FAR, HELLO_FAR, REPLY
from tests.cluster.local_cluster import ROOT, SETTLE_TIMEOUT_S, START_TIMEOUT_S, STOP_TIMEOUT_S, LocalCluster, wait_until

ANSWER = REPLY.rpartition("<|message|>")[2]
HELLO = [{"role": "user", "content": "Hello"}]
PATIENCE = 100  # retries, a second or more between them


def make_client(cluster: LocalCluster, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=max_retries, timeout=60)


def open_stream(client: openai.OpenAI) -> "openai.Stream[openai.types.chat.ChatCompletionChunk]":
    """A stream of which some of the answer has come, and most is to come."""
    stream = client.chat.completions.create(model="scripted", stream=True, **HELLO_FAR)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            return stream
    raise AssertionError("the stream ended before its answer began")


def test_a_client_that_disconnects_costs_no_step_after_the_next(scripted: LocalCluster) -> None:
    with make_client(scripted) as client:
        before = scripted.status().groups[0].num_steps
        stream = open_stream(client)
        stream.close()
        wait_until(scripted.is_idle, SETTLE_TIMEOUT_S, "the sequence is gone and its blocks are free")
        after = scripted.status().groups[0].num_steps
        assert 0 < after - before < len(FAR.split()), "it was ended, and did not run to its end"
        client.chat.completions.create(model="scripted", messages=HELLO, max_tokens=3)
    # The plan that releases the sequence, the steps under way, and one per token of the last request: none for the one that is gone.
    assert scripted.status().groups[0].num_steps <= after + 3 + 4


def test_kill_of_the_worker_ends_streams_with_an_error_and_the_next_request_works(scripted: LocalCluster) -> None:
    with make_client(scripted) as client, make_client(scripted, max_retries=PATIENCE) as patient:
        stream = open_stream(client)
        pid = scripted.kill("worker-0")
        with pytest.raises(openai.APIError, match="group") as failure:
            list(stream)
        assert failure.value.code == "group_lost"
        assert patient.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER
    scripted.wait_for_line("worker-0 serves again")
    assert int(scripted.state["worker-0"]["pid"]) != pid
    wait_until(scripted.is_idle, SETTLE_TIMEOUT_S)


def test_kill_of_one_of_two_workers_breaks_no_stream(tmp_path: Path, script: Path) -> None:
    flags = ("--backend", "scripted", "--script", str(script), "--step-ms", "12", "--groups", "2")  # answers take ten seconds
    with LocalCluster(tmp_path, *flags) as cluster, make_client(cluster) as client:
        begun = [client.chat.completions.create(model="scripted", messages=HELLO, stream=True) for _ in range(6)]
        first = [next(iter(stream)) for stream in begun]
        busiest = max(cluster.status().groups, key=lambda group: group.num_running)
        assert busiest.num_running
        cluster.kill(busiest.group_id.replace("group", "worker"))
        for chunk, stream in zip(first, begun, strict=True):
            assert "".join(one.choices[0].delta.content or "" for one in (chunk, *stream)) == ANSWER
        wait_until(lambda: len(cluster.status().groups) == 2 and cluster.is_idle(), SETTLE_TIMEOUT_S, cluster)


def test_kill_of_the_scheduler_ends_streams_with_an_error_and_the_next_request_works(scripted: LocalCluster) -> None:
    with make_client(scripted) as client, make_client(scripted, max_retries=PATIENCE) as patient:
        stream = open_stream(client)
        scripted.kill("scheduler")
        with pytest.raises(openai.APIError):
            list(stream)
        assert patient.chat.completions.create(model="scripted", messages=HELLO).choices[0].message.content == ANSWER


def test_a_port_in_use_is_one_line(scripted: LocalCluster, tmp_path: Path) -> None:
    port = scripted.url.rpartition(":")[2]
    said = run_command(tmp_path, "up", "--port", port, "--grpc-port", "0", "--backend", "scripted")
    assert said.returncode == 1
    lines = [line for line in said.stdout.splitlines() if line != "stopping"]
    assert len(lines) == 1 and f"127.0.0.1:{port}" in lines[0] and "in use" in lines[0]


@pytest.mark.parametrize(
    "flags",
    [("up", "--port", "http"), ("scheduler", "--pipeline-depth", "9"), ("edge", "--rest-listen", "8000"), ("worker", "--bakend", "model")],
    ids=lambda flags: flags[0],
)
def test_a_bad_flag_is_told_without_a_traceback(tmp_path: Path, flags: tuple[str, ...]) -> None:
    said = run_command(tmp_path, *flags)
    assert said.returncode == 2 and flags[1].strip("-") in said.stdout and "Traceback" not in said.stdout


def test_a_damaged_checkpoint_is_one_line_that_names_the_file(tmp_path: Path, checkpoint: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    said = run_command(tmp_path, "up", "--port", "0", "--grpc-port", "0", "--model", str(damaged))
    lines = [line for line in said.stdout.splitlines() if line != "stopping"]
    assert said.returncode == 1 and len(lines) == 1 and ".safetensors" in lines[0] and "Traceback" not in said.stdout


def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    with LocalCluster(tmp_path, "--backend", "scripted") as cluster:
        pids = [int(process["pid"]) for process in cluster.state.values()]
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(STOP_TIMEOUT_S) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def run_command(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`ossia ...`, to its end; stdout and stderr in one."""
    environment = {"OSSIA_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "300"}
    command = [sys.executable, "-m", "cli.main", *argv]
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=START_TIMEOUT_S
    )
