"""Metrics that are listed as Prometheus stores them, tenants that cannot make series without end, and links to traces."""

from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import INVALID_SPAN
from prometheus_client import CollectorRegistry

from cli.certificates import open_identity, write_certificates
from services.config import ProcessConfig
from services.metrics import MAX_TENANTS, NO_TENANT, OTHER_TENANTS, Metric, MetricSet, TenantNames, exemplar_of
from services.process import observed


def test_a_metric_is_listed_under_the_name_that_prometheus_stores() -> None:
    metrics = MetricSet("toy")
    metrics.counter("things", "Things done", "kind").labels("a").inc(2)
    metrics.gauge("depth", "How deep").set(3)
    metrics.histogram("wait_seconds", "How long", buckets=(1, 2)).observe(1.5)
    assert metrics.listed == [
        Metric("ossia_toy_things_total", "counter", "Things done", ("kind",)),
        Metric("ossia_toy_depth", "gauge", "How deep", ()),
        Metric("ossia_toy_wait_seconds", "histogram", "How long", ()),
    ]
    assert metrics.registry.get_sample_value("ossia_toy_things_total", {"kind": "a"}) == 2
    assert metrics.registry.get_sample_value("ossia_toy_depth") == 3
    assert metrics.registry.get_sample_value("ossia_toy_wait_seconds_bucket", {"le": "2.0"}) == 1


def test_tenants_beyond_the_limit_share_one_name() -> None:
    names = TenantNames()
    assert names[""] == NO_TENANT
    known = [f"tenant-{number}" for number in range(MAX_TENANTS - 1)]
    assert [names[tenant] for tenant in known] == known
    assert names["one-too-many"] == OTHER_TENANTS
    assert names[known[0]] == known[0], "those that came first keep theirs"


def test_only_a_span_that_is_recorded_gives_an_exemplar() -> None:
    assert exemplar_of(INVALID_SPAN) is None
    span = TracerProvider().get_tracer("test").start_span("chat")
    assert exemplar_of(span) == {"trace_id": f"{span.get_span_context().trace_id:032x}"}
    span.end()


def test_every_process_tells_whether_it_is_ready_and_when_its_certificate_ends(tmp_path: Path) -> None:
    write_certificates(tmp_path, days=2)
    identity, is_ready = open_identity(tmp_path, "edge"), [False]
    with observed("toy", ProcessConfig(), CollectorRegistry(), lambda: is_ready[0], (identity, None)) as (_, address):
        before = httpx.get(f"http://{address}/metrics", timeout=60).text
        is_ready[0] = True
        after = httpx.get(f"http://{address}/metrics", timeout=60).text
    assert 'ossia_process_ready{process="toy"} 0.0' in before and 'ossia_process_ready{process="toy"} 1.0' in after
    assert "process_resident_memory_bytes" in after
    assert identity is not None
    line = next(line for line in after.splitlines() if line.startswith("ossia_process_certificate_expiry_timestamp_seconds{"))
    assert str(identity.certificate) in line and float(line.rpartition(" ")[2]) == pytest.approx(identity.expiry_s())
