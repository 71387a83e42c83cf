"""`/metrics`, `/livez` and `/readyz` of one process, on a thread of their own so that a busy event loop starves no probe."""

import socket
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from socketserver import BaseServer
from threading import Thread
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

Probe = Callable[[], bool]


def always() -> bool:
    """The probe of a process that is well as long as it answers."""
    return True


def start_metrics_endpoint(
    host: str, port: int, registry: CollectorRegistry, is_live: Probe = always, is_ready: Probe = always
) -> "MetricsEndpoint":
    """Serves `registry` and the probes from now on; port 0 takes a free one. Raises OSError where the address cannot be had.

    The probes are called from the endpoint's threads: they must only read. False answers 503.
    """
    return MetricsEndpoint(host, port, registry, {"/livez": is_live, "/readyz": is_ready})


class MetricsEndpoint:
    """A running endpoint; `port` is the one that was bound, and `close` frees it."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, probes: Mapping[str, Probe]) -> None:
        self._server = _server_class(host, port)((host, port), partial(_Handler, registry, probes))
        self.port: int = self._server.server_address[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="metrics-endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _server_class(host: str, port: int) -> type[ThreadingHTTPServer]:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return type("MetricsServer", (ThreadingHTTPServer,), {"address_family": family})


class _Handler(MetricsHandler):
    """Answers the probes; everything else is the metrics page."""

    timeout = 5  # seconds that a silent connection may hold its thread

    def __init__(
        self, registry: CollectorRegistry, probes: Mapping[str, Probe], connection: socket.socket, peer: object, server: BaseServer
    ) -> None:
        self.registry, self._probes = registry, probes  # before the base class, whose constructor answers the request
        super().__init__(connection, peer, server)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            super().do_GET()
        elif probe := self._probes.get(path):
            self._answer(HTTPStatus.OK if probe() else HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            self._answer(HTTPStatus.NOT_FOUND)

    def _answer(self, status: HTTPStatus) -> None:
        body = f"{status.phrase.lower()}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
