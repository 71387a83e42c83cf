"""gRPC interceptors that carry the current span from caller to callee as W3C metadata.

The long-lived streams between our processes are left out on purpose: one such call serves many requests, so their contexts travel inside
its messages.
"""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from grpc.aio import ClientCallDetails, UnaryStreamCall, UnaryUnaryCall
from opentelemetry import context as otel_context

from services.telemetry import extract_context, inject_context

Request = TypeVar("Request")
Reply = TypeVar("Reply")


def client_interceptors() -> tuple[grpc.aio.ClientInterceptor, ...]:
    """For `open_channel`: calls with one request send the span they are made in."""
    return _UnaryUnary(), _UnaryStream()


def _with_span(details: ClientCallDetails) -> ClientCallDetails:
    """The same call with the current span in its metadata."""
    if not (carrier := inject_context()):
        return details
    metadata = grpc.aio.Metadata(*(details.metadata or ()), *carrier.items())
    return ClientCallDetails(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready)


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[[ClientCallDetails, Request], Awaitable[UnaryUnaryCall[Request, Reply]]],
        client_call_details: ClientCallDetails,
        request: Request,
    ) -> UnaryUnaryCall[Request, Reply]:
        return await continuation(_with_span(client_call_details), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self,
        continuation: Callable[[ClientCallDetails, Request], Awaitable[UnaryStreamCall[Request, Reply]]],
        client_call_details: ClientCallDetails,
        request: Request,
    ) -> UnaryStreamCall[Request, Reply]:
        return await continuation(_with_span(client_call_details), request)


class ServerTraceInterceptor(grpc.aio.ServerInterceptor):
    """Makes the caller's span the current one of the handler. Every call runs in a task of its own, so there is nothing to undo after
    it.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Reply] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Reply] | None:
        carrier = {key: value for key, value in handler_call_details.invocation_metadata or () if isinstance(value, str)}
        if "traceparent" in carrier:
            otel_context.attach(extract_context(carrier))
        return await continuation(handler_call_details)
