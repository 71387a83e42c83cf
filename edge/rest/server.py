"""uvicorn as a lifetime: bound before anything runs, silent about signals, drained like the gRPC server beside it."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from services.grpc_server import PortInUse
from services.tls import Identity

# Longer than clients and load balancers keep a connection (60 s), so that it is they who close it: a request on a connection that the
# server closes at that moment is lost.
KEEP_ALIVE_S = 75


class RestServer(uvicorn.Server):
    """Signals are the process's, not ours."""

    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self.address = address
        self.is_up = asyncio.Event()
        self.has_stopped = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    async def run_until_stopped(self, listener: socket.socket) -> None:
        try:
            await self.serve(sockets=[listener])
        finally:
            self.has_stopped.set()

    async def drain(self) -> None:
        """Takes no new connection, ends idle ones, gives open requests the configured grace; then they are cancelled."""
        self.should_exit = True
        await self.has_stopped.wait()


@asynccontextmanager
async def serve_rest(app: FastAPI, listen: str, drain_s: float, identity: Identity | None = None) -> AsyncIterator[RestServer]:
    """Serves `app` on host:port; port 0 takes a free one. Raises PortInUse. Leaving without a drain stops at once.

    With an identity it speaks https only.
    """
    listener = bind(listen)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s),
        ssl_context_factory=(lambda _config, _default: identity.server_context()) if identity else None,
    )
    server = RestServer(config, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    # A body that raises cancels uvicorn before it closes what it listens on.
    with listener:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run_until_stopped(listener))
            await server.is_up.wait()
            try:
                yield server
            finally:
                server.should_exit = server.force_exit = True


def bind(listen: str) -> socket.socket:
    """A bound socket. Raises PortInUse."""
    host, _, port = listen.rpartition(":")
    try:
        family = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host.strip("[]"), int(port)))
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise PortInUse(f"cannot listen on {listen} ({error.strerror}): choose another --rest-listen") from None
    return listener
