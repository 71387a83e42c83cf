"""The worker process: one group of ranks behind one gRPC service.

Its life: check the configuration and the port, load, warm up, serve, announce, register; drain on the first signal, end on the second.
When a rank dies or a step fails, the whole group ends at once, with exit code 1.
"""

import asyncio
import os
import socket
import sys
import uuid
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import NoReturn, TypeVar

from google.protobuf import json_format

from protos.ossia.v1 import worker_pb2, worker_pb2_grpc
from services.discovery import open_discovery
from services.grpc_server import PortInUse, RunningServer, serve
from services.process import Shutdown, StartError, announce, observed, run_process
from services.telemetry import get_logger
from services.tls import Identities, load_identities
from worker.config import WorkerConfig
from worker.engine import Engine
from worker.gpus import watch_gpus
from worker.loading import Loaded, load_backend
from worker.metrics import WorkerMetrics
from worker.plan_draft import Limits
from worker.rank_group import RankGroup, open_rank_group
from worker.service import WorkerService
from worker.step_broadcast import Leader
from worker.watchdog import StepWatchdog

log = get_logger("worker")
Result = TypeVar("Result")

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
CALLERS = ("scheduler",)  # the role that may drive a group
TEARDOWN_S = 5.0  # what a failed group's server and registration get to go
SWITCH_INTERVAL_S = 0.0005  # the model's thread waits no longer for the event loop's to let it run; 5 ms, the default, is a whole step
BLAME_S = 10.0  # a dead rank may show as a failed step first: how long its end gets to be seen


class StepFailed(StartError):
    """A step ended with an exception: the state of the group is unknown, and it ends."""


async def run_worker(config: WorkerConfig, shutdown: Shutdown) -> None:
    config.check()
    check_port(config.listen)
    async with open_rank_group(config.tensor_parallel_size) as group:
        watch = asyncio.create_task(group.watch())
        try:
            await unless(asyncio.shield(watch), live(config, shutdown, group))
        except StepFailed:
            if config.tensor_parallel_size > 1:
                await asyncio.wait({watch}, timeout=BLAME_S)
            if watch.done():
                watch.result()
            raise
        finally:
            watch.cancel()


async def live(config: WorkerConfig, shutdown: Shutdown, group: RankGroup) -> None:
    """From loading to the end of the drain."""
    metrics, is_ready, watchdog = WorkerMetrics(), Event(), StepWatchdog(config.step_timeout_s)
    identities = load_identities(config)
    thread = ThreadPoolExecutor(1, thread_name_prefix="model")
    try:
        certificates = identities.to_peers, identities.to_etcd
        with (
            observed("worker", config, metrics.registry, is_ready.is_set, certificates, watchdog.is_live) as (tracing, metrics_address),
            watch_gpus(metrics, config.tensor_parallel_size if config.device == "cuda" else 0),
        ):
            loaded = await unless(_stop_early(shutdown), load_backend(config, group, thread, metrics))
            engine = make_engine(config, loaded, thread, watchdog)
            service = WorkerService(engine, describe(config, engine.limits), metrics, tracing.tracer)
            await unless(_watch_steps(engine), serve_group(config, shutdown, service, is_ready, metrics_address, identities))
            await stop_ranks(engine, loaded, group, thread)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


async def serve_group(
    config: WorkerConfig, shutdown: Shutdown, service: WorkerService, is_ready: Event, metrics_address: str, identities: Identities
) -> None:
    """Serves until a signal, then until no sequence is held or the drain's time is over."""
    add = partial(worker_pb2_grpc.add_WorkerServicer_to_server, service)
    discovery = open_discovery(config.etcd, config.cluster, {}, identity=identities.to_etcd)
    async with discovery, serve(config.listen, [(SERVICE_NAME, add)], identity=identities.to_peers, callers=CALLERS) as running:
        service.set_address(advertised_address(config.advertise_host, running.address))
        info = service.info
        await running.set_serving(True)
        is_ready.set()
        announce(process="worker", grpc=running.address, group_id=info.group_id, metrics=metrics_address, pid=os.getpid())
        async with discovery.register("groups", info.group_id, json_format.MessageToJson(info, indent=None).encode()):
            await shutdown.wait()
        is_ready.clear()
        await drain(running, service, config.drain_s)


async def drain(running: RunningServer, service: WorkerService, drain_s: float) -> None:
    """Health turns bad, so no owner comes; the sequences held get `drain_s` seconds to end."""
    log.info("draining", drain_s=drain_s)
    await running.set_serving(False)
    try:
        async with asyncio.timeout(drain_s):
            await service.drain()
    except TimeoutError:
        log.warning("drain_timed_out", drain_s=drain_s)
    await running.drain(0)


async def stop_ranks(engine: Engine, loaded: Loaded, group: RankGroup, thread: ThreadPoolExecutor) -> None:
    """Lets the other ranks end by themselves."""
    if loaded.ranks:
        group.expect_end()
        await engine.stop()
        await asyncio.get_running_loop().run_in_executor(thread, loaded.ranks.close)
        await group.join()


def make_engine(config: WorkerConfig, loaded: Loaded, thread: ThreadPoolExecutor, watchdog: StepWatchdog) -> Engine:
    limits = Limits(loaded.backend.facts, config.max_batch_tokens, config.max_num_seqs)
    return Engine(loaded.backend, limits, thread, watchdog, Leader(loaded.ranks) if loaded.ranks else None)


def describe(config: WorkerConfig, limits: Limits) -> worker_pb2.GroupInfo:
    """What the group is, its address aside."""
    facts, incarnation = limits.facts, uuid.uuid4().hex
    return worker_pb2.GroupInfo(
        group_id=config.group_id or f"{config.model.rpartition('/')[2]}-{incarnation[:8]}",
        incarnation=incarnation,
        model=config.model,
        architecture=facts.architecture,
        fingerprint=facts.fingerprint,
        total_parameters=facts.total_parameters,
        active_parameters=facts.active_parameters,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        block_size=facts.block_size,
        num_full_blocks=facts.num_full_blocks,
        num_window_blocks=facts.num_window_blocks,
        num_host_blocks=facts.num_host_blocks,
        sliding_window=facts.sliding_window,
        max_batch_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        device=facts.device,
        dtype=facts.dtype,
    )


def advertised_address(advertise_host: str, bound: str) -> str:
    """Where schedulers reach this worker: the bound address, unless it is of no use to others."""
    host, _, port = bound.rpartition(":")
    if advertise_host:
        return f"{advertise_host}:{port}"
    return f"{socket.gethostname()}:{port}" if host in ("0.0.0.0", "[::]") else bound


def check_port(listen: str) -> None:
    """Raises PortInUse before minutes are spent on loading; the server binds the port later, and may still fail to."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUse(f"cannot listen on {listen} ({error.strerror}); choose another --listen") from None


async def unless(interrupt: Awaitable[NoReturn], work: Awaitable[Result]) -> Result:
    """The result of `work`, or what `interrupt` raises where that comes first; then `work` is cancelled and gets TEARDOWN_S to go."""
    interrupting, working = asyncio.ensure_future(interrupt), asyncio.ensure_future(work)
    try:
        await asyncio.wait({interrupting, working}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else interrupting.result()
    finally:
        for task in (interrupting, working):
            task.cancel()
        await asyncio.wait({interrupting, working}, timeout=TEARDOWN_S)


async def _stop_early(shutdown: Shutdown) -> NoReturn:
    await shutdown.wait()
    raise StartError("stopped by a signal before it served")


async def _watch_steps(engine: Engine) -> NoReturn:
    error = await engine.crashed
    log.critical("step_failed", exc_info=error)
    raise StepFailed("a step failed (the log has the details), so the whole group ends; start it again")


def main(argv: Sequence[str]) -> int:
    """The exit code. It is not 0 where the model's thread may still be busy: leave with os._exit then, or the process would wait for it."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return run_process(WorkerConfig, argv, run_worker)


if __name__ == "__main__":
    if code := main(sys.argv[1:]):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
