"""The residual's sum and its norm: the reference against float64, the kernel against the reference, and a row against its company."""

import pytest
import torch
from torch import Tensor

from worker.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from worker.kernels.rms_norm_triton import add_rms_norm_triton

EPS = 1e-5


def make_rows(rows: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(hidden)
    x, residual = torch.randn(2, rows, hidden, generator=generator).to(dtype)
    return x, residual, torch.rand(hidden, generator=generator).to(dtype)


@pytest.mark.parametrize("hidden", [7, 64, 2880])
def test_the_norm_is_its_formula(hidden: int) -> None:
    x, residual, weight = make_rows(3, hidden)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    wide = total.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(normed, expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(rms_norm(total, weight, EPS), normed)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden"), [(5, 7), (3, 96), (2, 2880)])
@pytest.mark.parametrize("has_residual", [True, False])
def test_the_kernel_equals_the_reference(rows: int, hidden: int, dtype: torch.dtype, has_residual: bool) -> None:
    x, residual, weight = make_rows(rows, hidden, dtype)
    normed, total = add_rms_norm_triton(x, residual if has_residual else None, weight, EPS)
    assert torch.equal(total, x + residual if has_residual else x)
    torch.testing.assert_close(normed, rms_norm_reference(total, weight, EPS), rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=0)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("rows", [2, 7, 32])
def test_a_row_is_the_same_to_the_bit_alone_and_in_a_batch(rows: int) -> None:
    x, residual, weight = make_rows(rows, 180)
    for op in (add_rms_norm, add_rms_norm_triton):
        together, _ = op(x, residual, weight, EPS)
        for row in range(rows):
            assert torch.equal(op(x[row : row + 1], residual[row : row + 1], weight, EPS)[0][0], together[row])
