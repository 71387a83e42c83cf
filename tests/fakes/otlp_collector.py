"""A small OTLP collector: a real gRPC server that keeps the spans it is sent."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


@dataclass(frozen=True)
class CollectedSpan:
    """Ids are lower-case hex; `parent_span_id` is empty at the root."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    attributes: dict[str, object]
    events: tuple[tuple[str, dict[str, object]], ...]  # name and attributes, in order


class OtlpCollector(rpc.TraceServiceServicer):
    """`endpoint` is what a process is configured with."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._spans: list[CollectedSpan] = []
        self.endpoint = ""

    def __repr__(self) -> str:
        return f"<collector at {self.endpoint}: {[f'{span.service}/{span.name}' for span in self.spans]}>"

    @property
    def spans(self) -> list[CollectedSpan]:
        with self._arrived:
            return list(self._spans)

    def wait_for(self, find: Callable[[list[CollectedSpan]], list[CollectedSpan]], timeout_s: float = 120.0) -> list[CollectedSpan]:
        """Blocks until `find` finds something among the spans that have come; gives what it found."""
        with self._arrived:
            found = self._arrived.wait_for(lambda: find(self._spans), timeout_s)
            assert found, f"only {self._spans} in {timeout_s} s"
            return found

    def Export(self, request: pb.ExportTraceServiceRequest, context: object) -> pb.ExportTraceServiceResponse:
        with self._arrived:
            for of_resource in request.resource_spans:
                service = str(_plain(of_resource.resource.attributes).get("service.name", ""))
                for of_scope in of_resource.scope_spans:
                    self._spans += [
                        CollectedSpan(
                            service,
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            _plain(span.attributes),
                            tuple((event.name, _plain(event.attributes)) for event in span.events),
                        )
                        for span in of_scope.spans
                    ]
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()


def _plain(attributes: Iterable[KeyValue]) -> dict[str, object]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: AnyValue) -> object:
    if value.WhichOneof("value") == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, value.WhichOneof("value") or "string_value")


@contextmanager
def otlp_collector() -> Iterator[OtlpCollector]:
    """A collector on a free port, until the end of the block."""
    collector, server = OtlpCollector(), grpc.server(ThreadPoolExecutor(max_workers=2))
    rpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated code without types
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
