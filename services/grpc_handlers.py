"""What an interceptor puts around a gRPC method, whatever its arity."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

Request = TypeVar("Request")
Reply = TypeVar("Reply")


def rewrap(
    handler: grpc.RpcMethodHandler[Request, Reply], unary: Callable[[Any], Any], stream: Callable[[Any], Any]
) -> grpc.RpcMethodHandler[Request, Reply]:
    """The handler with its behaviour inside another: `unary` where it answers once, `stream` where it answers with a stream."""
    wire: dict[str, Any] = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), **wire)
    if handler.unary_stream:
        # One that writes its replies itself, as health's Watch does, is awaited like one that answers once.
        wrap = stream if inspect.isasyncgenfunction(handler.unary_stream) else unary
        return grpc.unary_stream_rpc_method_handler(wrap(handler.unary_stream), **wire)
    if handler.stream_stream:
        return grpc.stream_stream_rpc_method_handler(stream(handler.stream_stream), **wire)
    return handler
