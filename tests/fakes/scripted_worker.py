"""A worker group without a process: the real service and engine over the scripted backend, on a free port."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from opentelemetry.trace import NoOpTracerProvider

from protos.ossia.v1 import worker_pb2, worker_pb2_grpc
from services.grpc_server import RunningServer, serve
from worker.__main__ import SERVICE_NAME, describe, make_engine
from worker.config import WorkerConfig
from worker.loading import Loaded
from worker.metrics import WorkerMetrics
from worker.scripted.backend import ScriptedBackend, StepTimes
from worker.scripted.script import Script
from worker.service import WorkerService
from worker.watchdog import StepWatchdog

REPLY = "<|channel|>final<|message|>one two three four five six seven eight nine ten eleven twelve<|return|>"


class ScriptedWorker:
    """`running.address` is where it is served; `service` and its engine are real."""

    def __init__(self, service: WorkerService, running: RunningServer) -> None:
        self.service = service
        self.running = running

    @property
    def info(self) -> worker_pb2.GroupInfo:
        return self.service.info


@asynccontextmanager
async def scripted_worker(
    group_id: str = "g", reply: str = REPLY, listen: str = "127.0.0.1:0", *, step_ms: float = 0.0, num_blocks: int = 64, **limits: int
) -> AsyncIterator[ScriptedWorker]:
    config = WorkerConfig(backend="scripted", model="scripted", group_id=group_id, **limits)
    backend = ScriptedBackend(
        Script(default=reply),
        StepTimes(step_ms),
        block_size=4,
        num_full_blocks=num_blocks,
        num_window_blocks=num_blocks,
        sliding_window=10,
        max_model_len=200,
    )
    with ThreadPoolExecutor(1) as thread:
        engine = make_engine(config, Loaded(backend), thread, StepWatchdog(config.step_timeout_s))
        service = WorkerService(engine, describe(config, engine.limits), WorkerMetrics(), NoOpTracerProvider().get_tracer("test"))
        add = partial(worker_pb2_grpc.add_WorkerServicer_to_server, service)
        async with serve(listen, [(SERVICE_NAME, add)]) as running:
            service.set_address(running.address)
            yield ScriptedWorker(service, running)
