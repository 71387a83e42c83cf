"""The gauges of owned groups: as the groups stand, and gone with them."""

from prometheus_client import CollectorRegistry

from protos.ossia.v1.scheduler_pb2 import GroupStatus
from scheduler.metrics import SchedulerMetrics

GROUP = {"group": "g", "model": "m"}


def value(metrics: SchedulerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"ossia_scheduler_{name}", labels)


def status(**fields: float) -> GroupStatus:
    given = {"num_full_blocks": 10, "num_free_full_blocks": 4, "num_window_blocks": 6, "num_free_window_blocks": 6, **fields}
    return GroupStatus(group_id="g", model="m", **given)  # type: ignore[arg-type]  # counts are whole numbers


def test_queue_seconds_are_waiting_tokens_over_the_measured_rate() -> None:
    metrics = SchedulerMetrics(CollectorRegistry())
    metrics.observe_groups([status(num_queued_tokens=3000, prefill_tokens_per_s=1500.0)])
    assert value(metrics, "group_queue_seconds", **GROUP) == 2.0
    metrics.observe_groups([status(num_queued_tokens=3000)])
    assert value(metrics, "group_queue_seconds", **GROUP) == 0.0, "nothing is measured yet"


def test_blocks_are_told_by_pool() -> None:
    metrics = SchedulerMetrics(CollectorRegistry())
    metrics.observe_groups([status()])
    assert value(metrics, "group_blocks", pool="full", **GROUP) == 10 and value(metrics, "group_free_blocks", pool="full", **GROUP) == 4
    assert value(metrics, "group_free_blocks", pool="window", **GROUP) == 6


def test_a_group_that_left_has_no_gauges_and_keeps_its_counters() -> None:
    metrics = SchedulerMetrics(CollectorRegistry())
    metrics.observe_groups([status(num_surplus_tokens=5)])
    metrics.observe_groups([status(num_surplus_tokens=7)])
    metrics.count_loss("g")
    metrics.observe_groups([])
    assert value(metrics, "group_running", **GROUP) is None and value(metrics, "group_blocks", pool="full", **GROUP) is None
    assert value(metrics, "surplus_tokens_total", group="g") == 7 and value(metrics, "groups_lost_total", group="g") == 1
    metrics.observe_groups([status(num_surplus_tokens=2)])
    assert value(metrics, "surplus_tokens_total", group="g") == 9, "a new life of the group counts from 0"
