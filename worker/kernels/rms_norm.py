"""Root-mean-square norm over the hidden dimension (https://arxiv.org/abs/1910.07467), and the sum that comes before it."""

import torch
from torch import Tensor

from worker.kernels import cpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, hidden], weight [hidden] → x / sqrt(mean(x^2) + eps) * weight, computed in float32, in x's dtype."""
    return add_rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself; all [rows, hidden] and of one dtype, which the sum is rounded to first. None adds 0."""
    assert x.shape[-1:] == weight.shape and (residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype))
    if x.is_cuda:
        from worker.kernels.rms_norm_triton import add_rms_norm_triton  # a worker without a GPU needs no Triton

        return add_rms_norm_triton(x, residual, weight, eps)
    if x.dtype == torch.float32 and cpu.is_compiled(x.device):
        return cpu.add_rms_norm(x, residual, weight, eps)
    total = x if residual is None else x + residual
    return rms_norm_reference(total, weight, eps), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)
