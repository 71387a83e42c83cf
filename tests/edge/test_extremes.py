"""The shortest users and the longest at once, on an edge in a process of its own: memory stays flat, and every answer is in order."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from services.vocabulary import load_vocabulary
from tests.edge.scripted_scheduler import MODEL, Script, ScriptedScheduler, serve_scheduler
from tests.edge.test_edge_process import announced, started

LIMIT_S = 600.0  # the work of minutes on a slow machine
ROUNDS, LONG_TOKENS = (64, 64), 128_000  # so many of each at once; the first round is what memory is held against
COUNT = " ".join(map(str, range(200)))
SHORT = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 43}], "stream": True}
# One request of the longest kind holds some 10 MB while it is read, and a leak would keep 64 of them. How many of them are read at the same
# moment differs from round to round, and the allocator keeps the most that it ever held: that alone has made 80 MB of difference.
GROWTH_BYTES = 160 * 1024 * 1024


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def read_answer(http: httpx.AsyncClient, body: bytes) -> str:
    got = await http.post("/v1/chat/completions", content=body)
    chunks = [json.loads(line.removeprefix("data: ")) for line in got.text.split("\n\n")[:-2]]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.timeout(LIMIT_S)
async def test_64_short_and_64_long_users_at_once_keep_memory_flat_and_order() -> None:
    text = "the quick brown fox jumps over a lazy dog " * (LONG_TOKENS // 9)
    long = json.dumps({**SHORT, "messages": [{"role": "user", "content": text}]}).encode()
    scripted = ScriptedScheduler(Script(f"<|channel|>final<|message|>{COUNT}<|return|>", chunk=7), max_model_len=140_000)
    async with serve_scheduler(scripted) as address, started("--rest-listen", "127.0.0.1:0", "--schedulers", address) as process:
        said = await announced(process)
        assert process.stderr is not None
        logging = asyncio.create_task(process.stderr.read())  # or it would stop at a full pipe
        async with httpx.AsyncClient(base_url=f"http://{said['rest']}", timeout=LIMIT_S, limits=httpx.Limits(max_connections=200)) as http:
            while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - a probe is asked, it does not tell
                await asyncio.sleep(0.02)
            sizes = []
            for num_each in ROUNDS:
                bodies = [body for _ in range(num_each) for body in (json.dumps(SHORT).encode(), long)]
                assert await asyncio.gather(*(read_answer(http, body) for body in bodies)) == [COUNT] * len(bodies)
                sizes.append(resident_bytes(process.pid))
        process.terminate()
        log = await logging
    assert b"Traceback" not in log
    num_long = sum(len(request.prompt_token_ids) > LONG_TOKENS * 0.95 for request in scripted.requests)
    assert num_long == sum(ROUNDS)
    assert load_vocabulary().decode(scripted.requests[0].prompt_token_ids).endswith("<|start|>assistant")
    assert sizes[-1] - sizes[0] < GROWTH_BYTES, sizes
