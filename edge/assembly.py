"""The parts of one edge, put together: what the process serves and what tests serve are the same."""

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from edge.access.gate import Gate
from edge.access.metering import MeteredCore
from edge.config import EdgeConfig
from edge.conversation.harmony_render import HarmonyRenderer
from edge.conversation.prepare import ChatPreparer
from edge.inference import InferenceCore
from edge.metrics import EdgeMetrics
from edge.rest.app import RestParts, build_app
from edge.rest.responses.running import ResponseRunner
from edge.rest.responses.store import open_store
from edge.routing.catalogue import Catalogue
from edge.routing.scheduler_pool import SchedulerPool
from edge.rpc.inference import InferenceService
from services.discovery import Discovery
from services.tls import Identity
from services.vocabulary import load_vocabulary


@dataclass(frozen=True)
class Edge:
    """`pool` must run for anything to be answered, and `runner` must be closed at the end."""

    core: InferenceCore
    catalogue: Catalogue
    pool: SchedulerPool
    runner: ResponseRunner
    app: FastAPI
    service: InferenceService


def assemble(
    config: EdgeConfig,
    catalogue: Catalogue,
    discovery: Discovery,
    registry: CollectorRegistry,
    tracer: Tracer,
    is_ready: Callable[[], bool],
    identity: Identity | None = None,
    gate: Gate | None = None,
) -> Edge:
    vocabulary = load_vocabulary()
    pool = SchedulerPool(discovery, config.edge_id, catalogue, identity)
    preparer = ChatPreparer(catalogue, HarmonyRenderer(vocabulary), vocabulary, config.request_timeout_s, config.sanitize_input)
    metrics = EdgeMetrics(registry, lambda model, usage: catalogue.settings_of(model).price.cost_usd(usage))
    metrics.schedulers.set_function(lambda: pool.num_connected)
    core_parts = (preparer, pool, vocabulary, metrics, tracer, config.max_open_requests)
    core = InferenceCore(*core_parts) if gate is None else MeteredCore(gate.limiter, *core_parts)
    runner = ResponseRunner(core, open_store(config.redis_url, config.max_stored_responses, config.stored_response_ttl_s))
    parts = RestParts(core, preparer, catalogue, pool, vocabulary, runner, registry, metrics, config.max_body_bytes, is_ready, gate)
    return Edge(core, catalogue, pool, runner, build_app(parts), InferenceService(core, preparer, catalogue, vocabulary))
