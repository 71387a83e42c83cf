"""`ossia edge`: one edge replica, from its flags to the end of its last stream."""

import asyncio
import sys

from prometheus_client import CollectorRegistry

from edge.access.gate import open_gate
from edge.access.rpc import AccessInterceptor
from edge.assembly import assemble
from edge.config import EdgeConfig
from edge.rest.server import serve_rest
from edge.routing.catalogue import Catalogue
from edge.routing.model_settings import read_settings
from edge.routing.scheduler_pool import KIND
from edge.rpc.inference import SERVICE_NAME
from protos.ossia.v1 import inference_pb2_grpc
from services.discovery import open_discovery
from services.grpc_server import serve
from services.process import Shutdown, announce, observed, run_process
from services.tls import load_identities, read_identity
from services.trace_propagation import ServerTraceInterceptor


async def run(config: EdgeConfig, shutdown: Shutdown) -> None:
    registry = CollectorRegistry()
    static = {address: address.encode() for address in config.schedulers}
    catalogue = Catalogue(read_settings(config))

    def is_ready() -> bool:
        return catalogue.has_seen_models and not shutdown.is_requested

    identities = load_identities(config)
    door = read_identity("--door-tls-cert, --door-tls-key", config.door_tls_cert, config.door_tls_key)

    with observed("edge", config, registry, is_ready, (identities.to_peers, identities.to_etcd, door)) as (tracing, metrics_address):
        async with (
            open_discovery(config.etcd, config.cluster, {KIND: static}, identity=identities.to_etcd) as discovery,
            open_gate(config, config.redis_url, registry) as gate,
        ):
            edge = assemble(config, catalogue, discovery, registry, tracing.tracer, is_ready, identities.to_peers, gate)
            contract = (SERVICE_NAME, lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(edge.service, server))
            interceptors = [ServerTraceInterceptor(), *([AccessInterceptor(gate)] if gate else [])]
            async with (
                serve(config.grpc_listen, [contract], interceptors, door) as rpc,
                serve_rest(edge.app, config.rest_listen, config.drain_s, door) as rest,
                asyncio.TaskGroup() as tasks,
            ):
                following = tasks.create_task(edge.pool.run())
                await rpc.set_serving(True)
                async with discovery.register("edges", config.edge_id, (config.advertise or rpc.address).encode()):
                    scheme = "https" if door else "http"
                    announce(
                        process="edge", scheme=scheme, rest=rest.address, grpc=rpc.address, metrics=metrics_address, edge_id=config.edge_id
                    )
                    await shutdown.wait()
                await asyncio.gather(rpc.drain(config.drain_s), rest.drain())
                await edge.runner.aclose()
                following.cancel()


def main(argv: list[str]) -> int:
    return run_process(EdgeConfig, argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
