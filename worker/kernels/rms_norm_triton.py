"""The residual's sum and its norm on a GPU in one launch. A program takes a row, whole, so that a row never depends on the others."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`."""
    assert all(one.is_contiguous() for one in (x, weight)) and (residual is None or residual.is_contiguous())
    hidden = x.shape[-1]
    normed, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    _add_rms_norm[(len(x),)](
        x,
        residual,
        weight,
        normed,
        total,
        eps,
        HIDDEN=hidden,
        HIDDEN_PAD=triton.next_power_of_2(hidden),
        ADDS=residual is not None,
        num_warps=8,
    )
    return normed, total


@triton.jit
def _add_rms_norm(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, normed: tl.tensor, total: tl.tensor, eps: float,
    HIDDEN: tl.constexpr, HIDDEN_PAD: tl.constexpr, ADDS: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.arange(0, HIDDEN_PAD)
    places, mask = tl.program_id(0).to(tl.int64) * HIDDEN + columns, columns < HIDDEN
    row = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        row += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
        row = row.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + places, row, mask=mask)
    scale = tl.rsqrt(tl.sum(row * row, 0) / HIDDEN + eps)
    tl.store(normed + places, tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32) * (row * scale), mask=mask)
