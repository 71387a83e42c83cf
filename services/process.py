"""The life of a process: start, announce, run until a signal, drain on the first one, exit on the second."""

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import uvloop
from prometheus_client import CollectorRegistry

from services.config import Config, ConfigError, ProcessConfig, load_config
from services.grpc_server import PortInUse
from services.metrics import ProcessMetrics
from services.metrics_endpoint import Probe, always, start_metrics_endpoint
from services.telemetry import Tracing, configure_logging, configure_tracing
from services.tls import Identity

EXIT_FAILED, EXIT_BAD_CONFIG = 1, 2


class StartError(Exception):
    """The process cannot start; the message is one line that names the cause and the cure."""


class Shutdown:
    """Tells when to drain. The first SIGTERM or SIGINT sets it; the second ends the process at once."""

    def __init__(self) -> None:
        self._requested = asyncio.Event()

    def request(self) -> None:
        if self._requested.is_set():
            os._exit(EXIT_FAILED)
        self._requested.set()

    async def wait(self) -> None:
        await self._requested.wait()

    @property
    def is_requested(self) -> bool:
        return self._requested.is_set()


def run_process(kind: type[Config], argv: Sequence[str], main: Callable[[Config, Shutdown], Awaitable[None]]) -> int:
    """Reads the configuration and runs `main` to its end; returns the exit code. What a user can cause ends in one line on stderr."""
    try:
        config = load_config(kind, argv)
        uvloop.run(_run(config, main))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    except (StartError, PortInUse) as error:
        print(f"{kind.model_config.get('cli_prog_name')}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


async def _run(config: Config, main: Callable[[Config, Shutdown], Awaitable[None]]) -> None:
    shutdown, loop = Shutdown(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.request)
    await main(config, shutdown)


@contextmanager
def observed(
    process: str,
    config: ProcessConfig,
    registry: CollectorRegistry,
    is_ready: Probe,
    certificates: Iterable[Identity | None] = (),
    is_live: Probe = always,
) -> Iterator[tuple[Tracing, str]]:
    """Logs, traces and the endpoint of metrics and probes for one process; gives the tracing and the endpoint's host:port.

    `certificates` are watched for their end.

    Raises PortInUse. Leaving sends the spans that wait.
    """
    configure_logging(process, config.log_level)
    metrics = ProcessMetrics(process, registry, is_ready)
    for identity in filter(None, certificates):
        metrics.certificate_expiry.labels(str(identity.certificate)).set_function(partial(Identity.expiry_s, identity))
    host, _, port = config.metrics_listen.rpartition(":")
    try:
        endpoint = start_metrics_endpoint(host.strip("[]"), int(port), registry, is_live=is_live, is_ready=is_ready)
    except OSError as error:
        raise PortInUse(f"cannot serve metrics on {config.metrics_listen} ({error.strerror}): choose another --metrics-listen") from None
    with endpoint, configure_tracing(process, config.otlp_endpoint) as tracing:
        yield tracing, endpoint.address


def die_with_parent() -> None:
    """Asks Linux to end the calling process when its parent does, however that ends. For use between fork and exec."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def announce(**fields: object) -> None:
    """Tells whoever started this process that it serves, and where: one line of JSON on stdout. What was made until now stays."""
    spare_collector()
    _tell({"event": "serving", **fields})


def spare_collector() -> None:
    """Takes what was made so far out of the garbage collector's walks, and lets it walk the rest rarely.

    Nearly all of that is freed by count, and a full walk among a thousand streams holds every one of them for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


def announce_progress(message: str) -> None:
    """Tells whoever started this process how far its start is: one line of JSON on stdout."""
    _tell({"event": "starting", "message": message})


def _tell(fields: dict[str, object]) -> None:
    """In one piece, or the lines of processes that share their stdout would mix."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()
