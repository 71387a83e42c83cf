"""`ossia scheduler`: one scheduler replica, from its flags to the end of its last stream."""

import asyncio
import sys

from google.protobuf import json_format
from prometheus_client import CollectorRegistry

from protos.ossia.v1 import scheduler_pb2_grpc, worker_pb2
from scheduler.config import SchedulerConfig
from scheduler.fleet import Fleet
from scheduler.metrics import SchedulerMetrics
from scheduler.service import SchedulerService
from services.discovery import open_discovery
from services.grpc_server import serve
from services.process import Shutdown, announce, observed, run_process
from services.tls import load_identities
from services.trace_propagation import ServerTraceInterceptor

SERVICE_NAME = "ossia.v1.Scheduler"
CALLERS = ("edge", "client")  # roles that may call it: `client` is an internal service that brings tokens, or an operator


async def run(config: SchedulerConfig, shutdown: Shutdown) -> None:
    registry = CollectorRegistry()
    identities = load_identities(config)
    metrics = SchedulerMetrics(registry)
    static = {address: json_format.MessageToJson(worker_pb2.GroupInfo(address=address)).encode() for address in config.groups}

    def is_ready() -> bool:
        return not shutdown.is_requested

    with observed("scheduler", config, registry, is_ready, (identities.to_peers, identities.to_etcd)) as (tracing, metrics_address):
        async with open_discovery(config.etcd, config.cluster, {"groups": static}, identity=identities.to_etcd) as discovery:
            fleet = Fleet(config, discovery, metrics, identity=identities.to_peers)
            service = SchedulerService(config.scheduler_id, fleet, metrics, tracing.tracer)
            contract = (SERVICE_NAME, lambda server: scheduler_pb2_grpc.add_SchedulerServicer_to_server(service, server))
            async with (
                serve(config.listen, [contract], [ServerTraceInterceptor()], identities.to_peers, CALLERS) as server,
                asyncio.TaskGroup() as tasks,
            ):
                following = tasks.create_task(fleet.run())
                await server.set_serving(True)
                async with discovery.register("schedulers", config.scheduler_id, (config.advertise or server.address).encode()):
                    announce(process="scheduler", grpc=server.address, metrics=metrics_address, scheduler_id=config.scheduler_id)
                    await shutdown.wait()
                await _drain(service, config.drain_s)
                following.cancel()


async def _drain(service: SchedulerService, grace_s: float) -> None:
    try:
        async with asyncio.timeout(grace_s):
            await service.drain()
    except TimeoutError:
        return  # what is still open ends with the process, and its callers ask again


def main(argv: list[str]) -> int:
    return run_process(SchedulerConfig, argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
