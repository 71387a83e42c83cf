"""Spans cross a real gRPC call."""

from collections.abc import AsyncIterator

import grpc
import pytest

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import inference_pb2_grpc as rpc
from services.grpc_channel import open_channel
from services.telemetry import configure_tracing, extract_context, inject_context
from services.trace_propagation import ServerTraceInterceptor, client_interceptors

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Echo(rpc.InferenceServicer):
    """Answers with the trace context that its handlers run in."""

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.ModelCard(id=inject_context().get("traceparent", "none"))])

    async def Chat(self, request: pb.ChatRequest, context: object) -> AsyncIterator[pb.ChatEvent]:
        for _ in range(2):
            yield pb.ChatEvent(started=pb.ChatStarted(request_id=inject_context().get("traceparent", "none")))

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:
        return pb.TokenizeResponse()


@pytest.fixture
async def stub() -> "AsyncIterator[rpc.InferenceAsyncStub]":
    server = grpc.aio.server(interceptors=[ServerTraceInterceptor()])
    rpc.add_InferenceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}", client_interceptors()) as channel:
        yield rpc.InferenceStub(channel)
    await server.stop(None)


async def test_a_handler_runs_in_its_callers_span(stub: "rpc.InferenceAsyncStub") -> None:
    tracer = configure_tracing("edge", None).tracer
    with tracer.start_as_current_span("chat", extract_context({"traceparent": TRACEPARENT})):
        reply = await stub.ListModels(pb.ListModelsRequest(), metadata=(("x-other", "kept"),))
        events = [event.started.request_id async for event in stub.Chat(pb.ChatRequest())]
    assert reply.models[0].id == TRACEPARENT
    assert events == [TRACEPARENT, TRACEPARENT]


async def test_a_call_without_a_span_carries_none_and_calls_do_not_leak_into_each_other(stub: "rpc.InferenceAsyncStub") -> None:
    tracer = configure_tracing("edge", None).tracer
    with tracer.start_as_current_span("chat", extract_context({"traceparent": TRACEPARENT})):
        await stub.ListModels(pb.ListModelsRequest())
    assert (await stub.ListModels(pb.ListModelsRequest())).models[0].id == "none"
