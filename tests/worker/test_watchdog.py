"""A worker whose step hangs is not alive, and one that waits for work is."""

import asyncio
import time
import urllib.error
import urllib.request

from tests.worker.owner import Owner, connect
from tests.worker.worker_process import worker_process
from worker.watchdog import StepWatchdog

TIMEOUT_S = 120.0
HANGS = ("--step-ms", "60000", "--prefill-token-ms", "60000")  # longer than TIMEOUT_S, with a prompt of three tokens


def test_only_work_that_takes_too_long_is_the_end() -> None:
    now = 0.0
    watchdog = StepWatchdog(10, clock=lambda: now)
    now = 1e6
    assert watchdog.is_live()
    with watchdog.working():
        now += 10
        assert watchdog.is_live()
        now += 0.1
        assert not watchdog.is_live()
    assert watchdog.is_live()


def probe(address: str) -> int:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{address}/livez", timeout=TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def wait_for(status: int, address: str) -> bool:
    """Whether the probe is answered so within TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while probe(address) != status:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


async def test_livez_turns_bad_while_a_step_hangs() -> None:
    async with worker_process("--backend", "scripted", *HANGS, "--step-timeout-s", "0.2") as worker:
        await worker.wait_serving()
        assert await asyncio.to_thread(probe, worker.serving["metrics"]) == 200
        async with connect(worker.address) as stub:
            hanging = asyncio.create_task(Owner(stub).generate(1, [1, 2, 3], 1))
            assert await asyncio.to_thread(wait_for, 503, worker.serving["metrics"])
            hanging.cancel()
            await asyncio.wait({hanging})
