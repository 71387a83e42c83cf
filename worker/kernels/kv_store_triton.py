"""Rotary embedding and KV store on a GPU in one launch: a program takes one key head of one row, and the query heads that share it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotate_and_store_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """As `rotate_and_store`."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert all(one.stride()[1:] == (head_dim, 1) for one in (q, k, v))
    assert all(one.is_contiguous() for one in (cos, sin, key_cache, value_cache))
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group, half = num_heads // num_kv_heads, head_dim // 2
    _rotate_and_store[rows, num_kv_heads](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), cos, sin, key_cache, value_cache, slot_mapping, turned,
        GROUP=group, GROUP_PAD=triton.next_power_of_2(group), HALF=half, HALF_PAD=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return turned


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])  # it lies anywhere in a packed buffer
def _rotate_and_store(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, q_stride: int, k_stride: int, v_stride: int, cos: tl.tensor, sin: tl.tensor,
    key_cache: tl.tensor, value_cache: tl.tensor, slot_mapping: tl.tensor, turned: tl.tensor,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
) -> None:  # fmt: skip
    row, kv_head, num_kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    members, pairs = tl.arange(0, GROUP_PAD), tl.arange(0, HALF_PAD)
    is_pair = pairs < HALF
    c = tl.load(cos + row * HALF + pairs, mask=is_pair).to(tl.float32)
    s = tl.load(sin + row * HALF + pairs, mask=is_pair).to(tl.float32)

    heads = kv_head * GROUP + members
    places = heads[:, None] * (2 * HALF) + pairs[None, :]
    mask = (members < GROUP)[:, None] & is_pair[None, :]
    first = tl.load(q + row * q_stride + places, mask=mask).to(tl.float32)
    second = tl.load(q + row * q_stride + places + HALF, mask=mask).to(tl.float32)
    target = turned + row * num_kv_heads * GROUP * (2 * HALF) + places
    tl.store(target, first * c[None, :] - second * s[None, :], mask=mask)
    tl.store(target + HALF, second * c[None, :] + first * s[None, :], mask=mask)

    source = kv_head * (2 * HALF) + pairs
    slot = (tl.load(slot_mapping + row) * num_kv_heads + kv_head) * (2 * HALF) + pairs
    first = tl.load(k + row * k_stride + source, mask=is_pair).to(tl.float32)
    second = tl.load(k + row * k_stride + source + HALF, mask=is_pair).to(tl.float32)
    tl.store(key_cache + slot, first * c - second * s, mask=is_pair)
    tl.store(key_cache + slot + HALF, second * c + first * s, mask=is_pair)
    tl.store(value_cache + slot, tl.load(v + row * v_stride + source, mask=is_pair), mask=is_pair)
    tl.store(value_cache + slot + HALF, tl.load(v + row * v_stride + source + HALF, mask=is_pair), mask=is_pair)
