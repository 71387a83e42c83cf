"""The gate before the gRPC door: every method that is not public passes it. The credential comes as metadata, named as in HTTP."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import grpc

from edge.access.addresses import peer_address
from edge.access.caller import Admission, current_admission
from edge.access.gate import PUBLIC_METHODS, Gate, read_credential, tenant_of
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import OssiaError, row
from services.grpc_handlers import rewrap
from services.grpc_server import abort_call

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """A caller's tenant goes into its ChatRequest, whatever stood there; an admin's word is taken."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Reply] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Reply] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method in PUBLIC_METHODS:
            return handler
        return rewrap(handler, partial(self._guard_unary, method=method), partial(self._guard_stream, method=method))

    def _guard_unary(self, handle: Any, method: str) -> Any:
        async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> Reply:
            async with self._pass(context, method) as admission:
                _claim(request, admission)
                return await handle(request, context)  # type: ignore[no-any-return]

        return guarded

    def _guard_stream(self, handle: Any, method: str) -> Any:
        async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> AsyncIterator[Reply]:
            async with self._pass(context, method) as admission:
                _claim(request, admission)
                async for reply in handle(request, context):
                    yield reply

        return guarded

    @asynccontextmanager
    async def _pass(self, context: grpc.aio.ServicerContext[Any, Any], method: str) -> AsyncIterator[Admission]:
        """Ends a call that may not pass with its status, and writes the audit line of every one."""
        shown = {key: str(value) for key, value in context.invocation_metadata() or ()}
        began, address, admission = time.monotonic(), peer_address(context.peer()), None
        status = "CANCELLED"
        try:
            try:
                admission = await self._gate.admit(
                    address, read_credential(shown.get("authorization", ""), shown.get("x-api-key", "")), method
                )
                await self._gate.charge(admission)
            except OssiaError as refusal:
                status = row(refusal).grpc.name
                await abort_call(context, refusal, method)
            current_admission.set(admission)  # the call has a task of its own: nothing to undo
            assert admission is not None  # or the call was aborted
            try:
                yield admission
            except grpc.aio.AbortError:
                status = str(grpc.StatusCode(context.code()).name) if isinstance(context.code(), grpc.StatusCode) else "UNKNOWN"
                raise
            status = "OK"
        finally:
            self._gate.note("grpc", method, status, time.monotonic() - began, address, admission, shown.get("x-request-id", ""))


def _claim(request: object, admission: Admission) -> None:
    if isinstance(request, inference.ChatRequest):
        request.tenant = tenant_of(admission.caller, request.tenant)
