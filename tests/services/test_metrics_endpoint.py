"""Metrics and probes over real HTTP."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from services.metrics_endpoint import MetricsEndpoint, start_metrics_endpoint
from tests.fakes.free_port import free_port


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("ossia_requests", "Requests.", ["model"], registry=registry).labels("nano").inc(2)
    return registry


@pytest.fixture
def endpoint(registry: CollectorRegistry) -> Iterator[MetricsEndpoint]:
    with start_metrics_endpoint("127.0.0.1", 0, registry) as endpoint:
        yield endpoint


def get(endpoint: MetricsEndpoint, path: str) -> httpx.Response:
    return httpx.get(f"http://{endpoint.address}{path}", timeout=60)


def test_metrics_shows_this_registry_and_no_other(endpoint: MetricsEndpoint) -> None:
    reply = get(endpoint, "/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    assert 'ossia_requests_total{model="nano"} 2.0' in reply.text
    assert "python_info" not in reply.text


@pytest.mark.parametrize(("path", "status"), [("/livez", 200), ("/readyz", 503), ("/readyz?verbose", 503), ("/other", 404), ("/", 404)])
def test_probes_answer_what_the_process_says(registry: CollectorRegistry, path: str, status: int) -> None:
    with start_metrics_endpoint("127.0.0.1", 0, registry, is_live=lambda: True, is_ready=lambda: False) as endpoint:
        assert get(endpoint, path).status_code == status


async def test_a_blocked_event_loop_starves_no_probe(endpoint: MetricsEndpoint) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(get, endpoint, "/livez").result(60).status_code == 200  # blocks the loop that this test runs on


def test_a_silent_connection_holds_up_nobody(endpoint: MetricsEndpoint) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port)):
        assert get(endpoint, "/livez").status_code == 200


def test_closing_frees_the_port(registry: CollectorRegistry) -> None:
    with start_metrics_endpoint("127.0.0.1", free_port(), registry) as first, pytest.raises(OSError, match="in use"):
        start_metrics_endpoint("127.0.0.1", first.port, registry)
    with start_metrics_endpoint("127.0.0.1", first.port, registry) as second:
        assert get(second, "/livez").status_code == 200


def test_an_ipv6_host_is_served(registry: CollectorRegistry) -> None:
    with start_metrics_endpoint("::1", 0, registry) as endpoint:
        assert endpoint.address == f"[::1]:{endpoint.port}"
        assert get(endpoint, "/livez").status_code == 200
