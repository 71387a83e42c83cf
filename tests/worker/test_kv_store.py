"""Rotary embedding and KV store: the reference against complex numbers, the kernel against the reference, to the bit."""

import math

import pytest
import torch
from torch import Tensor

from worker.kernels.kv_store import store_kv
from worker.kernels.kv_store_triton import rotate_and_store_triton
from worker.kernels.rope import rotate

SHAPES = [(5, 6, 2, 10, 4), (3, 8, 1, 64, 16), (7, 3, 3, 24, 32), (1, 20, 5, 6, 1)]  # rows, heads, key heads, head_dim, block_size


def test_each_pair_turns_by_its_angle() -> None:
    generator = torch.Generator().manual_seed(1)
    x, angles = torch.randn(4, 3, 10, generator=generator), torch.randn(4, 5, generator=generator)
    turned = torch.view_as_complex(torch.stack((x[..., :5], x[..., 5:]), -1)) * torch.polar(torch.ones(4, 5), angles).unsqueeze(1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_the_kernel_equals_the_reference_to_the_bit(
    rows: int, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    q, k, v = (one.view(rows, -1, head_dim) for one in torch.randn(rows, sum(widths)).to(dtype).split(widths, dim=1))
    cos, sin = torch.randn(2, rows, head_dim // 2).to(dtype)
    slots = torch.randperm(9 * block_size)[:rows]
    caches: list[Tensor] = [torch.full((2, 9, block_size, kv_heads, head_dim), math.nan, dtype=dtype) for _ in range(2)]
    store_kv(rotate(k, cos, sin), v, *caches[0], slots)
    turned = rotate_and_store_triton(q, k, v, cos, sin, *caches[1], slots)
    assert turned.is_contiguous()
    assert torch.equal(turned, rotate(q, cos, sin))
    assert torch.equal(*(torch.nan_to_num(cache, nan=1e9) for cache in caches))
    assert int((~caches[1].isnan()).sum()) == 2 * k.numel()
