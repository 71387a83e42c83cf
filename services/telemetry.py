"""Logs and traces, the same in every process.

Logs are JSON lines on stderr (plain text on a terminal), from structlog and from the standard `logging` alike. They carry request ids and
trace ids and never a prompt: callers pass none, and a last processor withholds whatever bears such a name. Traces are OpenTelemetry spans
with W3C propagation, exported by OTLP where an endpoint is set and free of cost where none is.
"""

import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self, TextIO

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

EXPORT_TIMEOUT_S = 5.0
WITHHELD = "<withheld>"
WITHHELD_KEYS = frozenset(
    {"arguments", "completion", "content", "delta", "input", "messages", "output", "prompt", "prompt_token_ids", "text", "token_ids"}
)
_PROPAGATOR = TraceContextTextMapPropagator()


def configure_logging(process: str, level: str, stream: TextIO | None = None) -> None:
    """Sends every log line of this process, from `level` up, to `stream` (default: stderr). Calling it again replaces what was set."""
    stream = stream or sys.stderr
    severity = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace_id,
        structlog.processors.format_exc_info,  # the plain traceback: richer ones print local variables, and prompts with them
        _withhold_content,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _add_process(process), _renderer(stream)],
        )
    )
    logging.basicConfig(level=severity, handlers=[handler], force=True)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(severity),
    )


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of one module. It may be made at import: it reads the settings when it is first written to."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def bind_request_id(request_id: str) -> AbstractContextManager[None]:
    """Every log line written inside, by this task and by those it starts there, carries the request id."""
    return structlog.contextvars.bound_contextvars(request_id=request_id)


def _renderer(stream: TextIO) -> Processor:
    if stream.isatty():
        return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.JSONRenderer(default=str)


def _add_process(process: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    return add


def _add_trace_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"] = trace.format_trace_id(span.trace_id)
    return event


def _withhold_content(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: WITHHELD if key in WITHHELD_KEYS else _withhold_inside(value) for key, value in event.items()}


def _withhold_inside(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: WITHHELD if key in WITHHELD_KEYS else _withhold_inside(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_withhold_inside(inner) for inner in value]
    return value


class Tracing:
    """The spans of one process. `tracer` starts them; leaving the context, or `shutdown`, exports those that wait."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self.tracer: trace.Tracer = (provider or trace.NoOpTracerProvider()).get_tracer("ossia")

    def shutdown(self) -> None:
        """Blocks until the open batch is exported, or EXPORT_TIMEOUT_S passed without the collector."""
        if self._provider is not None:
            self._provider.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.shutdown()


def configure_tracing(process: str, otlp_endpoint: str | None) -> Tracing:
    """Traces of the service `ossia-<process>`, sent in batches to an OTLP gRPC collector (`http://host:4317`); None or "" sends nothing.

    Nothing global is set: whoever starts spans is given the tracer.
    """
    if not otlp_endpoint:
        return Tracing(None)
    instance = f"{socket.gethostname()}:{os.getpid()}"
    resource = Resource.create({"service.name": f"ossia-{process}", "service.instance.id": instance})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint, timeout=EXPORT_TIMEOUT_S)))
    return Tracing(provider)


def inject_context(span: trace.Span | None = None) -> dict[str, str]:
    """The span (None: the current one) as W3C headers, for gRPC metadata or a protobuf map; empty where there is none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, None if span is None else trace.set_span_in_context(span))
    return carrier


def extract_context(carrier: Mapping[str, str]) -> Context:
    """The context that `inject_context` wrote, to start spans under; what is absent or malformed gives one without a span."""
    return _PROPAGATOR.extract(dict(carrier), Context())
