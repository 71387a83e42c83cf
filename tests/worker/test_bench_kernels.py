"""The benchmark of kernels on a tiny model: every kernel is there, right, and honest about what was not measured."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import Bench, Case, add_row, error_of
from benchmarks.report import Report
from benchmarks.roofline import Device, Part, Shape

TINY = Shape(
    2, 6, 64, 96, 6, 2, 16, 2, 20, 300
)  # layers, experts, hidden, intermediate, heads, KV heads, head_dim, chosen, window, vocabulary


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "CPU_SHAPES", {"tiny": TINY})


def make_bench() -> Bench:
    torch.manual_seed(1)
    return Bench(torch.device("cpu"), torch.float32, TINY, context=50)


def test_every_kernel_is_measured_at_every_size_and_right() -> None:
    cases = list(make_bench().cases((1, 3), chunk=24))
    assert {(case.kernel, case.num_rows) for case in cases} == {
        *((name, rows) for name in ("norm", "projections", "turn and store", "routing", "experts") for rows in (1, 3, 24)),
        *((f"attention, {kind}", rows) for kind in ("full", "window") for rows in (1, 3, 24)),
        *((name, rows) for name in ("unembedding", "sampling", "sampling, top-p") for rows in (1, 3)),
    }
    for case in cases:
        assert error_of(case) < 2e-6, case.kernel


def test_attention_counts_the_keys_that_are_seen() -> None:
    bench, row_bytes = make_bench(), 2 * 2 * 16 * 4
    assert bench.attention([1, 1, 1], 0).part == Part(3 * 50 * row_bytes, 4 * 3 * 50 * 6 * 16)
    assert bench.attention([1, 1, 1], 20).part == Part(3 * 20 * row_bytes, 4 * 3 * 20 * 6 * 16)
    assert bench.attention([24], 20).part == Part(24 * row_bytes, 4 * (sum(range(1, 21)) + 4 * 20) * 6 * 16)


def test_experts_count_those_that_were_chosen() -> None:
    alone, chunk = make_bench().experts((1, 500))
    expert_bytes = 3 * 64 * 96 * 4.25 / 8
    assert alone.part.flop == 2 * 2 * 3 * 64 * 96
    assert alone.part.num_bytes in (2 * expert_bytes, 2 * 3 * 64 * 96 * 4)  # packed, or decoded where nothing is compiled
    assert math.isclose(chunk.part.num_bytes, 3 * alone.part.num_bytes)


def test_a_wrong_kernel_shows() -> None:
    right = torch.tensor([1.0, -4.0])
    case = Case("k", 1, Part(1, 1), [lambda: right + torch.tensor([0.0, 0.5])], lambda: right)
    assert error_of(case) == 0.125


def test_a_share_is_of_what_came_from_memory() -> None:
    report, device = Report("", ("",) * 8), Device(bytes_per_s=1000, flop_per_s=10)

    def call() -> torch.Tensor:
        return torch.ones(1)

    add_row(report, "a-b", Case("warm k", 1, Part(100, 0), [call], call), 0.2, device)
    add_row(report, "a-b", Case("cold, k", 8, Part(100, 4), [call, call], call), 0.8, device)
    assert report.rows[0][6] == "cached" and report.rows[1][6] == "50%"
    assert report.figures["a_b_cold_k_8_share"] == 0.5 and "a_b_warm_k_1_share" not in report.figures


def test_the_command_prints_a_table_writes_json_and_says_what_it_could_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtype: Device(1e9, 1e9))
    monkeypatch.setattr(kernels, "measure_s", lambda calls, device: 1e-3)
    monkeypatch.setattr(sys, "argv", ["kernels", "--rows", "1", "2", "--chunk", "4", "--context", "30", "--json", str(tmp_path / "k.json")])
    kernels.main()
    assert "Not measured for want of a GPU: the Triton kernels" in capsys.readouterr().out
    figures = json.loads((tmp_path / "k.json").read_text())["figures"]
    assert figures["tiny_experts_same_bits"] == 1 and figures["tiny_experts_4_us"] == 1000
