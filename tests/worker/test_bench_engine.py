"""The measurement of whole steps, tried on models of a few kilobytes: what it compares is the same model, and its table is whole."""

import pytest
import torch

from benchmarks import kernels
from benchmarks.engine import COLUMNS, Measurement, add_row, measure_cpu, measure_gpu
from benchmarks.report import Report
from benchmarks.roofline import Device, Part, Shape, Step, Storage

TINY = Shape(2, 4, 64, 32, 4, 2, 16, 2, 16, 96)
BRIEF = Measurement((1, 3), context=9, chunk=20, storage=Storage(), rounds=2, steps=2, max_compared_batch=1)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has no bfloat16 of its own needs minutes for the large product."""
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "MATMUL_SIDES", {"cpu": 64})


def test_on_a_cpu_both_sides_compute_the_same_and_every_figure_is_there() -> None:
    report = Report("", COLUMNS)
    measure_cpu(report, TINY, BRIEF)
    assert [row[0] for row in report.rows] == ["cpu decode 1", "cpu decode 3", "cpu prefill 20"]
    assert report.figures["cpu_logit_difference"] < 1e-4
    assert {"cpu_decode_ratio_b1", "cpu_prefill_ratio", "cpu_decode_share_b3"} < report.figures.keys()
    assert "cpu_decode_ratio_b3" not in report.figures, "over max_compared_batch only the worker is measured"
    assert all(figure > 0 for figure in report.figures.values())


def test_the_measurement_for_a_gpu_runs_through() -> None:
    report = Report("", COLUMNS)
    measure_gpu(report, {"gpt-oss-20b": TINY, "gpt-oss-120b": TINY}, "gpt-oss-20b", torch.device("cpu"), BRIEF)
    steps = ("decode 1", "decode 3", "prefill 20", "experts 8", "experts 32", "experts 128")
    assert [row[0] for row in report.rows] == [f"gpu {name} {step}" for name in ("20b", "120b") for step in steps]
    assert "gpu_20b_prefill_ratio" in report.figures and "gpu_120b_prefill_ratio" not in report.figures


def test_a_ratio_is_over_the_fastest_setting_and_a_share_over_the_time_that_was_taken() -> None:
    report = Report("", COLUMNS)
    parts = (Part(6.0, 0.0), Part(0.0, 8.0), Part(0.0, 0.0), Part(0.0, 0.0))
    seconds = {"ossia": 10.0, "transformers slow": 40.0, "transformers fast": 25.0}
    add_row(report, "x_decode_{}_b2", Step(2, *parts), seconds, Device(bytes_per_s=3.0, flop_per_s=4.0))
    assert report.rows == [["x decode 2", "0.2", "0.1", "fast", "2.50", "40%"]]
    assert report.figures["x_decode_ratio_b2"] == pytest.approx(2.5)
    assert report.figures["x_decode_share_b2"] == pytest.approx(0.4)
    assert report.figures["x_decode_tokens_per_s_transformers_slow_b2"] == pytest.approx(0.05)
