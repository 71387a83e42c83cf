"""Real worker processes for tests."""

import asyncio
import json
import os
import select
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 240.0
WORKER = ("-m", "worker")


class WorkerProcess:
    """One started worker; `serving` is what it announced."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.serving: dict[str, str] = {}
        self._rank_pids: dict[int, asyncio.Future[int]] = defaultdict(asyncio.get_running_loop().create_future)
        self._log: list[str] = []
        self._reader = asyncio.create_task(self._read_log())

    @property
    def address(self) -> str:
        return self.serving["grpc"]

    async def wait_rank(self, rank: int) -> int:
        """The process id of a rank, as soon as it is started."""
        async with asyncio.timeout(START_TIMEOUT_S):
            return await self._rank_pids[rank]

    async def wait_serving(self) -> None:
        assert self.process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            async for line in self.process.stdout:
                if (said := json.loads(line))["event"] == "serving":
                    self.serving = said
                    return
        raise AssertionError("\n".join(self._log))

    async def wait_end(self) -> tuple[int, list[str]]:
        """The exit code, and the lines on stderr that are no JSON log."""
        async with asyncio.timeout(END_TIMEOUT_S):
            code = await self.process.wait()
            await self._reader
        return code, [line for line in self._log if not line.startswith("{")]

    def log_events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self._log if line.startswith("{")]

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            line = raw.decode().rstrip()
            self._log.append(line)
            if line.startswith("{") and (event := json.loads(line))["event"] == "rank_started":
                self._rank_pids[event["rank"]].set_result(event["pid"])


@asynccontextmanager
async def worker_process(*flags: str, start: tuple[str, ...] = WORKER) -> AsyncIterator[WorkerProcess]:
    """A worker that is started and, at the end, killed."""
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *start,
        *flags,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    worker = WorkerProcess(process)
    try:
        yield worker
    finally:
        if process.returncode is None:
            process.kill()
        await worker.wait_end()


def wait_dead(pid: int) -> None:
    """Returns when a process that need not be our child has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], END_TIMEOUT_S)
    os.close(handle)
    assert ended, f"process {pid} lives on"
