"""The processes of ranks 1 and up: started, watched and ended together with rank 0. Knows nothing of what a rank computes.

A dead rank whose group lives on would hang every collective, so the death of one is the death of all: `watch` tells rank 0, and the
kernel tells the others when rank 0 has gone.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from services.process import StartError
from services.telemetry import get_logger
from worker.config import WorkerConfig

log = get_logger(__name__)

STOP_TIMEOUT_S = 10.0


class RankDied(StartError):
    """A rank of the group ended by itself; the message is one line."""


class RankGroup:
    """Ranks 1 and up. `rendezvous` is the private directory through which all ranks meet, None for a group of one."""

    def __init__(self, rendezvous: Path | None) -> None:
        self.rendezvous = rendezvous
        # Changed by `start` and `expect_end` only.
        self._processes: list[asyncio.subprocess.Process] = []  # of rank 1 and up
        self._deaths: asyncio.Queue[RankDied] = asyncio.Queue()
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self, config: WorkerConfig) -> None:
        """Must run on the main thread: a parent-death signal is sent when the *thread* that started the child ends."""
        for rank in range(1, config.tensor_parallel_size):
            assert self.rendezvous is not None
            arguments = (str(rank), str(self.rendezvous), str(os.getpid()), config.model_dump_json())
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "worker.rank", *arguments, stdin=asyncio.subprocess.DEVNULL
            )
            log.info("rank_started", rank=rank, pid=process.pid)
            self._processes.append(process)
            self._watchers.append(asyncio.create_task(self._await_death(rank, process)))

    async def watch(self) -> NoReturn:
        """Raises RankDied when a rank has ended."""
        raise await self._deaths.get()

    def expect_end(self) -> None:
        """From now on the ranks may end."""
        for watcher in self._watchers:
            watcher.cancel()

    async def _await_death(self, rank: int, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        end = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._deaths.put_nowait(RankDied(f"rank {rank} ended {end}, so the whole group ends; start it again"))

    async def join(self) -> None:
        """Waits for ranks that were told to stop; those that do not are killed with the group."""
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for process in self._processes:
                    await process.wait()
        except TimeoutError:
            log.warning("ranks_did_not_stop", timeout_s=STOP_TIMEOUT_S)

    def kill(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()


@asynccontextmanager
async def open_rank_group(size: int) -> AsyncIterator[RankGroup]:
    """A group of `size` ranks without processes yet. Whatever was started is dead afterwards."""
    with TemporaryDirectory(prefix="ossia-ranks-") if size > 1 else nullcontext() as directory:  # mode 0700
        group = RankGroup(Path(directory) if directory else None)
        try:
            yield group
        finally:
            group.expect_end()
            group.kill()
