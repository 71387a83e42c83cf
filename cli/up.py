"""`ossia up`: a whole cluster on this machine, one process per part, supervised until Ctrl-C."""

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from cli.certificates import tls_flags
from cli.home import cluster_dir, home
from cli.nano import title
from cli.supervisor import Child, keep_alive
from services.process import StartError

READY_TIMEOUT_S = 60.0
STOP_GRACE_S = 35.0


@dataclass(frozen=True)
class UpOptions:
    host: str
    port: int
    grpc_port: int
    model: Path
    model_name: str
    backend: str
    script: Path | None
    num_groups: int
    tensor_parallel_size: int
    etcd: str
    otlp_endpoint: str
    tls_dir: Path | None
    worker_flags: tuple[str, ...]  # passed on as they are


class Place:
    """Where one cluster keeps its logs, and what `ossia status` reads of it."""

    def __init__(self, port: int) -> None:
        self.logs = cluster_dir(port or os.getpid())
        self.logs.mkdir(parents=True, exist_ok=True)
        self.state_path = self.logs / "state.json"

    def write_state(self, children: list[Child]) -> None:
        """Every process with its id and its addresses, as of now."""
        state = {child.name: {**child.announced, "pid": child.process.pid if child.process else 0} for child in children}
        unfinished = self.state_path.with_suffix(".new")
        unfinished.write_text(json.dumps(state, indent=2) + "\n")
        unfinished.rename(self.state_path)


async def run_cluster(options: UpOptions, console: Console) -> None:
    """Starts everything, prints READY, and returns after Ctrl-C or SIGTERM when all has ended. Raises StartError."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    place = Place(options.port)
    children: list[Child] = []
    starting = asyncio.create_task(_start(options, place, children, console))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            async with asyncio.TaskGroup() as keepers:

                def report(line: str) -> None:
                    place.write_state(children)  # first: whoever has read the line finds what it tells of
                    console.print(line, highlight=False, soft_wrap=True)

                keeping = [keepers.create_task(keep_alive(child, report)) for child in children]
                await stopping
                for task in keeping:
                    task.cancel()
    finally:
        starting.cancel()
        stopping.cancel()
        place.state_path.unlink(missing_ok=True)
        console.print("stopping")
        for child in reversed(children):  # the edge first, so that open streams end before what feeds them
            await child.stop(STOP_GRACE_S)


async def _start(options: UpOptions, place: Place, children: list[Child], console: Console) -> None:
    with console.status("starting") as status:

        async def start(name: str, *argv: str) -> Child:
            everywhere = ["--etcd", options.etcd, "--otlp-endpoint", options.otlp_endpoint]
            identity = tls_flags(options.tls_dir, argv[0]) if options.tls_dir else []
            child = Child(name, [*argv, *everywhere, *identity], place.logs / f"{name}.log")
            children.append(child)
            status.update(f"starting {name}")
            await child.start(status.update)
            return child

        workers = [await start(f"worker-{i}", *_worker_argv(options, i)) for i in range(options.num_groups)]
        scheduler = await start("scheduler", "scheduler", *_groups_flag(options, workers))
        for child in (*workers, scheduler):
            child.argv += ["--listen", child.announced["grpc"]]  # the same port in its next life: others hold the address
        edge = await start("edge", *_edge_argv(options, scheduler.announced["grpc"]))
        status.update("waiting for the model")
        await _wait_ready(f"http://{edge.announced['metrics']}/readyz")
    place.write_state(children)
    _greet(options, edge, place.logs, console)


def _worker_argv(options: UpOptions, index: int) -> list[str]:
    argv = ["worker", "--group-id", f"group-{index}", "--backend", options.backend, "--model", options.model_name]
    if options.backend == "scripted":
        return [*argv, *(["--script", str(options.script)] if options.script else []), *options.worker_flags]
    return [*argv, "--model-dir", str(options.model), "--tensor-parallel-size", str(options.tensor_parallel_size), *options.worker_flags]


def _groups_flag(options: UpOptions, workers: list[Child]) -> list[str]:
    return [] if options.etcd else ["--groups", ",".join(worker.announced["grpc"] for worker in workers)]


def _edge_argv(options: UpOptions, scheduler: str) -> list[str]:
    listen = ["--rest-listen", f"{options.host}:{options.port}", "--grpc-listen", f"{options.host}:{options.grpc_port}"]
    return ["edge", *listen, *([] if options.etcd else ["--schedulers", scheduler])]


async def _wait_ready(url: str) -> None:
    """Until the edge says that a model can be asked."""
    async with httpx.AsyncClient(timeout=READY_TIMEOUT_S) as client:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while (await client.get(url)).status_code != httpx.codes.OK:  # noqa: ASYNC110 - what is awaited is in another process
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise StartError(f"no model could be asked within {READY_TIMEOUT_S:g} s; the logs are under {home()}") from None


def _greet(options: UpOptions, edge: Child, log_dir: Path, console: Console) -> None:
    url = f"{edge.announced['scheme']}://{edge.announced['rest']}"
    body = f'{{"model": "{options.model_name}", "messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'
    console.print(
        f"READY {url} (model {title(options.model_name)}, gRPC {edge.announced['grpc']}, logs {log_dir})", soft_wrap=True, highlight=False
    )
    console.print(f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", soft_wrap=True, highlight=False)
