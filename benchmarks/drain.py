"""SIGTERM under load, one process after the other, as a rolling update sends it: streams broken, and seconds until the process ended.

Two of each process find each other through etcd. An edge leaves the clients' list before its signal, as a Service drops a pod that is not
ready; nothing is retried, so that every stream that breaks is counted. The clients do retry requests that were refused with a status.
"""

import asyncio
import itertools
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Report, finish, parser
from benchmarks.streams import streaming
from cli.supervisor import Child
from tests.fakes.etcd_server import etcd_cluster

# In this order, and by which gauge a process tells how many requests or sequences it holds.
HELD_BY = {"edge": "ossia_edge_open_requests", "scheduler": "ossia_scheduler_group_running", "worker": "ossia_worker_sequences_held"}
DRAIN_S, EXIT_TIMEOUT_S, READY_TIMEOUT_S = 30.0, 120.0, 120.0
SETTLE_S = 1.5  # between one process's return and the next one's signal
BODY: dict[str, object] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}]}


@dataclass(frozen=True)
class Drained:
    """What one SIGTERM did. `num_open` streams were open at that moment, `num_held` of them in that process as of its last second."""

    name: str
    num_open: int
    num_held: int
    num_broken: int
    num_refused: int  # requests that were answered with a status other than 200 until the process was back
    exit_code: int
    exit_s: float


class Processes:
    """Two of each, under etcd. `edges` are those that clients may use."""

    def __init__(self, folder: Path, etcd: str, script: Path, step_ms: float) -> None:
        self.edges: list[Child] = []
        self._turn = itertools.count()
        common = ("--etcd", etcd, "--drain-s", str(DRAIN_S))
        flags = {
            "worker": ("--backend", "scripted", "--script", str(script), "--step-ms", str(step_ms), "--model", "scripted"),
            "scheduler": (),
            "edge": ("--rest-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"),
        }
        self.children = {
            f"{kind}-{i}": Child(f"{kind}-{i}", [kind, *flags[kind], *common, *_name(kind, i)], folder / f"{kind}-{i}.log")
            for kind in ("worker", "scheduler", "edge")
            for i in range(2)
        }

    def choose_url(self) -> str:
        return f"http://{self.edges[next(self._turn) % len(self.edges)].announced['rest']}"

    async def start(self, name: str) -> None:
        child = self.children[name]
        await child.start(lambda _: None)
        await _wait_ready(child)
        if name.startswith("edge"):
            self.edges.append(child)

    async def busiest(self, kind: str) -> tuple[str, int]:
        """Which of a kind holds most, and how much."""
        held = {name: await _num_held(child, HELD_BY[kind]) for name, child in self.children.items() if name.startswith(kind)}
        return max(held.items(), key=lambda one: one[1])

    async def stop(self) -> None:
        for child in reversed(self.children.values()):
            await child.stop(EXIT_TIMEOUT_S)


def _name(kind: str, index: int) -> tuple[str, str]:
    return {"worker": "--group-id", "scheduler": "--scheduler-id", "edge": "--edge-id"}[kind], f"{kind}-{index}"


async def _num_held(child: Child, gauge: str) -> int:
    async with httpx.AsyncClient(timeout=READY_TIMEOUT_S) as client:
        page = (await client.get(f"http://{child.announced['metrics']}/metrics")).text
    return int(sum(sample.value for family in text_string_to_metric_families(page) for sample in family.samples if sample.name == gauge))


async def _wait_ready(child: Child) -> None:
    async with httpx.AsyncClient(timeout=READY_TIMEOUT_S) as client, asyncio.timeout(READY_TIMEOUT_S):
        while (await client.get(f"http://{child.announced['metrics']}/readyz")).status_code != httpx.codes.OK:  # noqa: ASYNC110 - a probe
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(script: Path, step_ms: float) -> AsyncIterator[Processes]:
    with tempfile.TemporaryDirectory() as name, etcd_cluster(Path(name), 1) as (etcd,):
        processes = Processes(Path(name), etcd.endpoint, script, step_ms)
        try:
            for child in processes.children:
                await processes.start(child)
            yield processes
        finally:
            await processes.stop()


async def drain_in_turn(script: Path, step_ms: float, num_clients: int) -> list[Drained]:
    """One process of each kind, the one that holds most, while the other of its kind and `num_clients` streams go on."""
    async with running(script, step_ms) as processes, streaming(processes.choose_url, [BODY], num_clients) as tally:
        results = []
        for kind in HELD_BY:
            await asyncio.sleep(SETTLE_S)
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not (busiest := await processes.busiest(kind))[1]:  # noqa: ASYNC110 - between two streams none holds any
                    await asyncio.sleep(0.02)
                while len(tally.open_now) < num_clients:  # noqa: ASYNC110 - what is awaited is under way elsewhere
                    await asyncio.sleep(0.02)
            name, num_held = busiest
            child = processes.children[name]
            if child in processes.edges:
                processes.edges.remove(child)
            at_signal, num_refused, started = set(tally.open_now), len(tally.refused), time.monotonic()
            assert child.process is not None
            child.process.send_signal(signal.SIGTERM)
            exit_code = await asyncio.wait_for(child.process.wait(), EXIT_TIMEOUT_S)
            exit_s = time.monotonic() - started
            await processes.start(child.name)
            async with asyncio.timeout(EXIT_TIMEOUT_S):
                while at_signal & tally.open_now:  # noqa: ASYNC110 - likewise
                    await asyncio.sleep(0.02)
            num_broken = sum(not tally.ended[number] for number in at_signal)
            results.append(Drained(child.name, len(at_signal), num_held, num_broken, len(tally.refused) - num_refused, exit_code, exit_s))
    return results


def write_script(path: Path, num_words: int) -> None:
    """One answer of `num_words` for every question."""
    words = " ".join(str(number) for number in range(num_words))
    path.write_text(f'default: "<|channel|>final<|message|>{words}"\n')


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--clients", type=int, default=32)
    made.add_argument("--step-ms", type=float, default=10.0)
    made.add_argument("--words", type=int, default=200, help="length of each answer")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_script(script := Path(folder) / "script.yaml", arguments.words)
        results = asyncio.run(drain_in_turn(script, arguments.step_ms, arguments.clients))
    report = Report(
        f"SIGTERM under {arguments.clients} streams",
        ("process", "open", "held by it", "broken", "refused meanwhile", "exit code", "seconds"),
    )
    for one in results:
        kind = one.name.partition("-")[0]
        figures = {f"drain_broken_{kind}": one.num_broken, f"drain_refused_{kind}": one.num_refused, f"drain_s_{kind}": one.exit_s}
        report.add(one.name, one.num_open, one.num_held, one.num_broken, one.num_refused, one.exit_code, f"{one.exit_s:.2f}", **figures)
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
