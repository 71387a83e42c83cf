"""The edge as a process: it announces itself, refuses a taken port in one line, and drains on the first signal."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from edge.rest.server import serve_rest
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, ScriptedScheduler, serve_scheduler, wait_until
from tests.fakes.free_port import free_port

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@contextlib.asynccontextmanager
async def started(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "edge", "--grpc-listen", "127.0.0.1:0", *flags, **pipes)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def announced(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    line: dict[str, str] = json.loads(await asyncio.wait_for(process.stdout.readline(), PATIENCE_S))
    return line


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


async def test_a_drain_lets_the_open_stream_finish_and_then_ends_the_process() -> None:
    scripted = ScriptedScheduler(Script(pause_at=12))
    async with serve_scheduler(scripted) as address, started("--rest-listen", "127.0.0.1:0", "--schedulers", address) as process:
        line = await announced(process)
        assert (line["event"], line["process"]) == ("serving", "edge") and line["grpc"].startswith("127.0.0.1:")
        async with httpx.AsyncClient(base_url=f"http://{line['rest']}", timeout=PATIENCE_S) as http:
            while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - a probe is asked, it does not tell
                await asyncio.sleep(0.02)
            sending = asyncio.create_task(http.post("/v1/chat/completions", json={**ASK, "stream": True}))
            await asyncio.wait_for(scripted.has_paused.wait(), PATIENCE_S)
            process.send_signal(signal.SIGTERM)
            await wait_until(lambda: not _accepts(line["rest"]))
            scripted.script.go.set()
            got = await sending
        assert "there" in got.text and got.text.endswith("data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0


async def test_a_taken_port_is_one_line_and_an_exit_code() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with started("--rest-listen", listen) as process:
            _, stderr = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 1
    lines = [line for line in stderr.decode().splitlines() if not line.startswith("{")]
    assert len(lines) == 1 and listen in lines[0] and "Traceback" not in stderr.decode()


async def test_a_server_whose_body_fails_gives_its_port_back() -> None:
    with pytest.raises(ExceptionGroup) as failed:
        async with serve_rest(FastAPI(), f"127.0.0.1:{free_port()}", 1.0) as server:
            raise RuntimeError("the body failed")
    assert failed.group_contains(RuntimeError, match="the body failed")
    assert not _accepts(server.address)
