"""The REST door: OpenAI's paths, and those of other dialects, over the one core."""

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from edge.access.gate import Gate
from edge.access.rest import AccessMiddleware
from edge.conversation.prepare import ChatPreparer
from edge.inference import InferenceCore
from edge.metrics import EdgeMetrics
from edge.rest import chat_completions, completions, health, metrics, models, tokenize
from edge.rest.body import document_bodies
from edge.rest.chat_schema import ChatCompletionRequest
from edge.rest.completion_schema import CompletionRequest
from edge.rest.dialects import browser, gradio, tgi
from edge.rest.errors import add_error_handlers
from edge.rest.request_id import RequestIdMiddleware
from edge.rest.responses import routes as responses
from edge.rest.responses.running import ResponseRunner
from edge.rest.responses.schema import ResponsesRequest
from edge.routing.catalogue import Catalogue
from edge.routing.scheduler_pool import SchedulerPool
from services.vocabulary import Vocabulary

BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    tokenize.TokenizeRequest,
    tokenize.DetokenizeRequest,
    tgi.GenerateRequest,
    gradio.PredictRequest,
)


@dataclass(frozen=True)
class RestParts:
    """What the paths are answered with."""

    core: InferenceCore
    preparer: ChatPreparer
    catalogue: Catalogue
    pool: SchedulerPool
    vocabulary: Vocabulary
    runner: ResponseRunner
    registry: CollectorRegistry
    metrics: EdgeMetrics
    max_body_bytes: int
    is_ready: Callable[[], bool]
    gate: Gate | None = None  # None: anybody may call


def build_app(parts: RestParts) -> FastAPI:
    app = FastAPI(title="Ossia", version=health.VERSION, description="gpt-oss models behind OpenAI's API")
    if parts.gate is not None:
        app.add_middleware(AccessMiddleware, gate=parts.gate)
    app.add_middleware(RequestIdMiddleware)
    add_error_handlers(app)
    core, catalogue, limit = parts.core, parts.catalogue, parts.max_body_bytes
    utilization = metrics.Utilization(parts.pool)
    parts.registry.register(metrics.FieldMetrics(parts.metrics, core, utilization))
    for router in (
        chat_completions.build_router(core, limit),
        completions.build_router(core, parts.vocabulary, limit),
        responses.build_router(parts.runner, limit),
        models.build_router(catalogue),
        tokenize.build_router(catalogue, parts.preparer, parts.vocabulary, limit),
        health.build_router(core, catalogue, parts.pool, parts.is_ready),
        metrics.build_router(parts.registry, utilization),
        browser.build_router(core, catalogue),
        tgi.build_router(core, catalogue, limit),
        gradio.build_router(core, catalogue, limit),
    ):
        app.include_router(router)
    document_bodies(app, BODIES)
    return app
