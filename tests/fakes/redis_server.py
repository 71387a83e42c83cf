"""A real Redis on a port of its own, that can be killed and started again in the middle of a test."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.fakes.free_port import free_port

START_TIMEOUT_S = 120.0


class RedisServer:
    def __init__(self, port: int, directory: Path) -> None:
        self._port = port
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"RedisServer({self.url}, {'running' if self._process else 'stopped'})"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    async def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary, "redis-server is not installed; run tests/install_system_packages.sh"
        flags = ("--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._directory))
        self._process = await asyncio.create_subprocess_exec(binary, *flags, stdout=asyncio.subprocess.DEVNULL)
        async with asyncio.timeout(START_TIMEOUT_S), Redis.from_url(self.url) as client:
            while not await _answers(client):  # noqa: ASYNC110 - what is awaited is in another process
                await asyncio.sleep(0.02)

    async def kill(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
        self._process = None


async def _answers(client: Redis) -> bool:
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False


@asynccontextmanager
async def redis_server(directory: Path) -> AsyncIterator[RedisServer]:
    server = RedisServer(free_port(), directory)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
