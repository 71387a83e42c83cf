"""Two edges of one cluster, real processes before a real Redis: a revoked key is refused by both, limits are shared, and Redis may die."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from edge.access.keys import edit_keys, make_key, utc_now
from tests.cluster.local_cluster import LocalCluster
from tests.fakes.redis_server import redis_server

SHARED, ALONE = "ossia_edge_rate_limits_shared", "ossia_edge_rate_limit_local_takes_total"
PATIENCE_S = 120.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """The edge that it starts is asked by nobody."""
    (tmp_path / "script.yaml").write_text('default: "<|channel|>final<|message|>Hello.<|return|>"\n')
    with LocalCluster(tmp_path, "--backend", "scripted", "--script", str(tmp_path / "script.yaml"), tls=False) as started:
        yield started


def add_key(file: Path, tenant: str, **limits: int) -> str:
    text, record = make_key(tenant, limits=limits)
    with edit_keys(file) as keys:
        keys.append(record)
    return text


@asynccontextmanager
async def edge_process(*flags: str) -> AsyncIterator[dict[str, str]]:
    """What an edge announces of itself, once it is ready."""
    argv = [sys.executable, "-m", "edge", "--rest-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", *flags]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while (line := json.loads(await process.stdout.readline()))["event"] != "serving":
                pass
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
                while (await http.get(f"http://{line['metrics']}/readyz")).status_code != 200:  # noqa: ASYNC110 - a probe is asked
                    await asyncio.sleep(0.02)
        yield line
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Asker:
    """Asks two edges in turn."""

    def __init__(self, http: httpx.AsyncClient, edges: list[dict[str, str]]) -> None:
        self._http = http
        self._edges = edges

    async def ask(self, key: str, at: int) -> int:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
        url = f"http://{self._edges[at % 2]['rest']}/v1/chat/completions"
        return (await self._http.post(url, json=body, headers={"authorization": f"Bearer {key}"})).status_code

    async def ask_many(self, key: str, number: int) -> list[int]:
        return await asyncio.gather(*(self.ask(key, at) for at in range(number)))

    async def are_shared(self) -> list[bool]:
        return [value == 1 for value in await self._read(SHARED)]

    async def num_alone(self) -> float:
        """Takes that an edge counted by itself, because Redis did not answer in time."""
        return sum(await self._read(ALONE))

    async def _read(self, metric: str) -> list[float]:
        pages = [(await self._http.get(f"http://{edge['metrics']}/metrics")).text for edge in self._edges]
        return [float(line.partition(" ")[2]) for page in pages for line in page.splitlines() if line.startswith(f"{metric} ")]


async def test_two_edges_are_one_gate(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    few, many = add_key(file, "few", requests_per_minute=10), add_key(file, "many", requests_per_minute=100_000)
    async with redis_server(tmp_path) as redis:
        flags = ("--schedulers", cluster.state["scheduler"]["grpc"], "--api-keys-file", str(file), "--redis-url", redis.url)
        async with edge_process(*flags) as one, edge_process(*flags) as two, httpx.AsyncClient(timeout=PATIENCE_S) as http:
            asker = Asker(http, [one, two])
            began_at = time.monotonic()
            statuses = await asker.ask_many(few, 24)
            came_back = (time.monotonic() - began_at) / 6
            assert 10 <= statuses.count(200) <= 10 + came_back + await asker.num_alone(), "one limit for both"
            assert set(statuses) == {200, 429}

            load = asyncio.create_task(asker.ask_many(many, 60))
            await redis.kill()
            assert set(await load) == {200} and set(await asker.ask_many(many, 8)) == {200}
            assert await asker.are_shared() == [False, False]
            await redis.start()
            async with asyncio.timeout(PATIENCE_S):
                while not all(await asker.are_shared()):
                    assert set(await asker.ask_many(many, 2)) == {200}

            with edit_keys(file) as keys:
                keys[1] = keys[1].model_copy(update={"revoked_at": utc_now()})
            revoked_at = time.monotonic()
            async with asyncio.timeout(PATIENCE_S):  # it takes CHECK_INTERVAL_S and a request
                while await asker.ask_many(many, 2) != [401, 401]:
                    pass
            print(f"refused by both edges after {time.monotonic() - revoked_at:.2f} s")
