"""The gRPC server that every process runs: health, reflection, typed errors, keepalive, sizes and a drain in two stages."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services import errors
from services.grpc_channel import MAX_MESSAGE_BYTES, PING_INTERVAL_MS
from services.grpc_handlers import rewrap
from services.telemetry import get_logger
from services.tls import Identity, RoleInterceptor

log = get_logger(__name__)
Request = TypeVar("Request")
Reply = TypeVar("Reply")

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # or a second process would share the port in silence
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # At or under the clients' interval, or the server answers their keepalive with "too many pings".
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS // 2),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_INTERVAL_MS),
    ("grpc.http2.ping_timeout_ms", PING_INTERVAL_MS),
)


class PortInUse(Exception):
    """The address to listen on is taken or not ours; the message is one line."""


@dataclass(frozen=True)
class RunningServer:
    """A server that listens. `address` holds the port that was bound."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    address: str

    async def set_serving(self, serving: bool) -> None:
        """What health checks hear, for the whole server."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set("", state)

    async def drain(self, grace_s: float) -> None:
        """Takes no new call and gives the open ones `grace_s` seconds; then they are cancelled."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


@asynccontextmanager
async def serve(
    listen: str,
    services: Sequence[tuple[str, Callable[[grpc.aio.Server], None]]],
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    identity: Identity | None = None,
    callers: Collection[str] = (),
) -> AsyncIterator[RunningServer]:
    """Serves `services`, pairs of a full service name and what adds it to a server, with health and reflection beside them.

    `listen` is host:port; port 0 takes a free one. Raises PortInUse. Health is NOT_SERVING until `set_serving`. Leaving stops at once.
    With an identity it speaks TLS only; with one that has an authority callers must show a certificate, and `callers` are the roles whose
    holders may call `services`.
    """
    guards = [RoleInterceptor(frozenset(name for name, _ in services), frozenset(callers))] if identity and identity.authority else []
    server = grpc.aio.server(interceptors=(*interceptors, ErrorInterceptor(), *guards), options=SERVER_OPTIONS)
    for _, add in services:
        add(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*(name for name, _ in services), health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    running = RunningServer(server, health_servicer, bind(server, listen, identity))
    await running.set_serving(False)
    await server.start()
    try:
        yield running
    finally:
        await server.stop(None)


def bind(server: grpc.aio.Server, listen: str, identity: Identity | None = None) -> str:
    """Binds host:port and returns it with the port that was taken. Raises PortInUse."""
    try:
        port = server.add_secure_port(listen, identity.server_credentials()) if identity else server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise PortInUse(f"cannot listen on {listen}: the port is in use or the address is not this machine's; choose another")
    return f"{listen.rpartition(':')[0]}:{port}"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Gives an OssiaError its status and details, and hides everything else behind INTERNAL while logging it here."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Reply] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Reply] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        return rewrap(handler, partial(_guard_unary, method=method), partial(_guard_stream, method=method))


def _guard_unary(handle: Any, method: str) -> Any:
    async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> Reply:
        try:
            return await handle(request, context)  # type: ignore[no-any-return]
        except Exception as error:
            await abort_call(context, error, method)
            raise

    return guarded


def _guard_stream(handle: Any, method: str) -> Any:
    async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> AsyncIterator[Reply]:
        try:
            async for reply in handle(request, context):
                yield reply
        except Exception as error:
            await abort_call(context, error, method)

    return guarded


async def abort_call(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    """Ends the call with the error's status. A call that was aborted already keeps the status it has."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, errors.OssiaError):
        log.error("call_failed", method=method, exc_info=error)
        error = errors.Internal("an internal error ended the call; the server's log has the details")
    status = errors.to_status(error)
    context.set_trailing_metadata(((errors.STATUS_DETAILS_KEY, status.SerializeToString()),))
    await context.abort(errors.row(error).grpc, error.message)
