"""x W^T + b for a batch of rows, such that a row's result does not depend on how many rows share the batch."""

import torch
from torch import Tensor
from torch.nn import functional

from worker.kernels import cpu

# Below this many rows, CPU matrix libraries take other paths (a matrix-vector product for one row) that sum in another order.
MIN_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out] → [rows, out], in x's dtype; the weight's may be narrower where `reads_published`."""
    assert x.shape[1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if cpu.is_compiled(x.device):
        return cpu.linear(x, weight, bias)
    if x.is_cuda and x.dtype == torch.bfloat16:
        from worker.kernels.linear_triton import linear_triton  # a worker without a GPU needs no Triton

        return linear_triton(x, weight, bias)
    return linear_reference(x, weight, bias)


def reads_published(device: torch.device) -> bool:
    """Whether matrices may stay in the checkpoint's bfloat16 whatever the model's dtype: they are widened as they are read, exactly."""
    return cpu.is_compiled(device)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = len(x)
    if x.device.type != "cpu" or rows >= MIN_ROWS:
        return functional.linear(x, weight, bias)
    return functional.linear(functional.pad(x, (0, 0, 0, MIN_ROWS - rows)), weight, bias)[:rows]
