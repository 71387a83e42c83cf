"""The experts' kernels in Triton's interpreter, against the reference in float32 and against themselves."""

import pytest
import torch
from torch import Tensor

from tests.worker.sm90 import compile_kernels
from worker.kernels.experts import DenseExperts, ExpertsWeights, add_down_bias_reference
from worker.kernels.experts_triton import TritonExperts, add_down_bias_triton, choose_launch
from worker.kernels.mxfp4 import BLOCK, encode_mxfp4

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = {  # rows, hidden, intermediate, experts, chosen
    "one row": (1, 160, 96, 5, 2),
    "a few rows": (7, 64, 544, 3, 1),  # more tiles of columns than splits, and the last one begun
    "a decode batch": (37, 288, 32, 11, 3),
    "a small chunk": (70, 96, 64, 6, 4),
    "a chunk": (150, 32, 64, 4, 3),
}


def make_weights(hidden: int, intermediate: int, num_experts: int, dtype: torch.dtype = torch.float32) -> ExpertsWeights:
    """Wide enough for gates and ups that are clamped."""
    generator = torch.Generator().manual_seed(hidden)
    gate_up = encode_mxfp4(torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) * 4 / hidden**0.5)
    down = encode_mxfp4(torch.randn(num_experts, hidden, intermediate, generator=generator) / 8)
    bias = torch.randn(num_experts, 2 * intermediate, generator=generator).to(dtype)
    return ExpertsWeights(*gate_up, bias, *down, alpha=1.702, limit=7.0)


def take_columns(whole: ExpertsWeights, columns: range) -> ExpertsWeights:
    """One rank's share: a range of the intermediate columns at block borders."""
    gate_up, blocks = slice(2 * columns.start, 2 * columns.stop), slice(columns.start // BLOCK, columns.stop // BLOCK)
    return ExpertsWeights(
        whole.gate_up_blocks[:, gate_up],
        whole.gate_up_scales[:, gate_up],
        whole.gate_up_bias[:, gate_up],
        whole.down_blocks[:, :, blocks],
        whole.down_scales[:, :, blocks],
        whole.alpha,
        whole.limit,
    )


def make_rows(num_rows: int, hidden: int, num_experts: int, num_chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, expert ids and weights."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, hidden, generator=generator)
    weights, ids = torch.randn(num_rows, num_experts, generator=generator).topk(num_chosen)
    return x, ids, weights.softmax(-1)


def assert_equal(out: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value: long sums of values of either sign have no smaller unit."""
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(shape: str) -> None:
    num_rows, hidden, intermediate, num_experts, num_chosen = SHAPES[shape]
    weights = make_weights(hidden, intermediate, num_experts)
    step = make_rows(num_rows, hidden, num_experts, num_chosen)
    assert_equal(TritonExperts(weights)(*step), DenseExperts(weights)(*step))


@pytest.mark.parametrize("shape", ["one row", "a decode batch"])
def test_bfloat16_differs_by_its_rounding_alone(shape: str) -> None:
    """Of the activated values, of the bias and of the result; the reference computes in float32."""
    num_rows, hidden, intermediate, num_experts, num_chosen = SHAPES[shape]
    narrow, wide = (make_weights(hidden, intermediate, num_experts, dtype) for dtype in (torch.bfloat16, torch.float32))
    x, ids, shares = make_rows(num_rows, hidden, num_experts, num_chosen)
    x = x.to(torch.bfloat16)
    out, expected = TritonExperts(narrow)(x, ids, shares), DenseExperts(wide)(x.float(), ids, shares)
    assert out.dtype == torch.bfloat16
    assert_equal(out.float(), expected, tolerance=2**-7)


def test_the_shapes_take_every_kind_of_launch() -> None:
    launches = {shape: choose_launch(rows, chosen, experts) for shape, (rows, _, _, experts, chosen) in SHAPES.items()}
    assert [launches[shape].pairs for shape in SHAPES] == [16, 16, 16, 64, 128]
    assert [launches[shape].splits for shape in SHAPES] == [1, 1, 4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    hidden, num_experts = 32, 3
    experts = TritonExperts(make_weights(hidden, 320, num_experts, dtype))
    x, ids, shares = make_rows(70, hidden, num_experts, 2)
    x = x.to(dtype)
    alone = experts(x[:1], ids[:1], shares[:1])
    for size in (2, 7, 32, 70):
        rows = torch.arange(70).roll(-5)[-size:]  # the first row comes last but 4, or last
        rows[-2] = 0
        assert torch.equal(experts(x[rows], ids[rows], shares[rows])[-2], alone[0]), size


def test_uneven_and_empty_shares_of_the_columns_add_up() -> None:
    hidden, num_experts = 64, 5
    whole = make_weights(hidden, 160, num_experts)
    step = make_rows(6, hidden, num_experts, 2)
    shares = [take_columns(whole, columns) for columns in (range(64), range(64, 64), range(64, 160))]
    parts = [TritonExperts(share)(*step) for share in shares]
    assert not parts[1].any()
    assert_equal(parts[0] + parts[1] + parts[2], DenseExperts(whole)(*step))


def test_experts_without_a_row_and_one_that_has_all_of_them() -> None:
    hidden, num_experts = 32, 6
    weights = make_weights(hidden, 96, num_experts)
    x, _, shares = make_rows(40, hidden, num_experts, 2)
    ids = torch.tensor([[4, 1]]).repeat(40, 1)
    assert_equal(TritonExperts(weights)(x, ids, shares), DenseExperts(weights)(x, ids, shares))


@pytest.mark.parametrize("column", [6, 7])  # of a gate, of an up
def test_a_nan_reaches_the_rows_that_meet_it_alone(column: int) -> None:
    hidden, num_experts = 64, 3
    whole = make_weights(hidden, 32, num_experts)
    x, _, shares = make_rows(4, hidden, num_experts, 2)
    ids = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 0]])
    expected = TritonExperts(whole)(x, ids, shares)
    whole.gate_up_bias[1, column] = torch.nan
    out = TritonExperts(whole)(x, ids, shares)
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3]], expected[[0, 1, 3]])


def test_weights_with_scales_over_two_are_right_too() -> None:
    hidden, num_experts = 64, 2
    small = make_weights(hidden, 32, num_experts)
    large = ExpertsWeights(
        small.gate_up_blocks, small.gate_up_scales, small.gate_up_bias, small.down_blocks, small.down_scales + 10, small.alpha, small.limit
    )
    step = make_rows(3, hidden, num_experts, 1)
    experts = TritonExperts(large)
    assert experts.down.is_wide and not experts.gate_up.is_wide
    assert_equal(experts(*step), DenseExperts(large)(*step))


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 0, 1e-6), (torch.bfloat16, 2**-7, 2**-7)])
def test_the_down_bias_is_added_by_the_experts_weights(dtype: torch.dtype, rtol: float, atol: float) -> None:
    x, ids, shares = make_rows(5, 1184, 7, 3)
    bias = torch.randn(7, 1184, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = add_down_bias_triton(x.to(dtype), bias, ids, shares)
    torch.testing.assert_close(out, add_down_bias_reference(x.to(dtype), bias, ids, shares), rtol=rtol, atol=atol)


def test_kernels_compile_for_hopper_without_spills() -> None:
    compiled = compile_kernels("tests.worker.experts_launches")
    assert {one.name for one in compiled} == {"_route", "_group", "_gate_up_swiglu", "_down", "_sum_experts", "_add_down_bias"}
    assert all(one.stack_bytes == 0 and one.shared_bytes <= 160 * 1024 for one in compiled), compiled
