"""The matrix product in Triton's interpreter: as the reference, and each row the same to the bit in whatever batch."""

import pytest
import torch
from torch import Tensor

from worker.kernels.linear_triton import FEW_ROWS, choose_tiles, linear_triton

pytestmark = pytest.mark.usefixtures("interpreter")

SHAPES = {  # inputs, outputs
    "a router: three parts": (700, 5),
    "a projection: two parts": (330, 140),
    "one part": (100, 150),
}


def make_tensors(num_rows: int, shape: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    num_inputs, num_outputs = SHAPES[shape]
    generator = torch.Generator().manual_seed(num_inputs)
    sizes = ((num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [1, 33, FEW_ROWS + 9])
def test_the_kernel_equals_the_reference(num_rows: int, shape: str) -> None:
    x, weight, bias = make_tensors(num_rows, shape)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear_triton(x, weight, None), expected.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(linear_triton(x, weight, bias), (expected + bias).float(), rtol=0, atol=1e-4)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    x, weight, bias = make_tensors(9, "a projection: two parts", torch.bfloat16)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(linear_triton(x, weight, bias).double(), expected, rtol=2**-8, atol=1e-4)


def test_rows_may_lie_apart() -> None:
    x, weight, bias = make_tensors(6, "one part")
    assert torch.equal(linear_triton(x[::2], weight, bias), linear_triton(x[::2].contiguous(), weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [2, 7, 32, FEW_ROWS + 9])
def test_a_row_is_the_same_to_the_bit_alone_and_in_any_batch(num_rows: int, shape: str) -> None:
    x, weight, bias = make_tensors(num_rows, shape)
    together = linear_triton(x, weight, bias)
    for row in {0, num_rows - 1}:
        assert torch.equal(linear_triton(x[row : row + 1], weight, bias)[0], together[row])


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(2880, 5120), (4096, 2880), (2880, 32), (2880, 128), (2880, 640), (2880, 201_088)])
def test_the_order_of_a_sum_follows_from_the_weight_alone(num_inputs: int, num_outputs: int) -> None:
    assert len({choose_tiles(num_rows, num_inputs, num_outputs).num_parts for num_rows in (1, 2, 64, 65, 4096)}) == 1
    few = choose_tiles(1, num_inputs, num_outputs)
    assert -(-num_outputs // few.columns) * few.num_parts >= 12
