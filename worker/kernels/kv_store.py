"""Turns a step's queries and keys by their positions and writes its keys and values to their slots in the paged cache."""

import torch
from torch import Tensor

from worker.kernels import cpu
from worker.kernels.rope import rotate


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """q [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], cos and sin [rows, head_dim / 2] → q turned, contiguous.

    k turned and v go into the caches [blocks, block_size, kv_heads, head_dim]; slot_mapping int64 [rows]: block id * block_size + offset in
    the block. The heads of a row lie side by side; rows may lie further apart.
    """
    assert k.shape == v.shape == (len(q), *key_cache.shape[2:]) and key_cache.shape == value_cache.shape and q.shape[2] == k.shape[2]
    assert cos.shape == sin.shape == (len(q), q.shape[2] // 2) and len(slot_mapping) == len(q)
    if q.is_cuda:
        from worker.kernels.kv_store_triton import rotate_and_store_triton  # a worker without a GPU needs no Triton

        return rotate_and_store_triton(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)
    if q.dtype == key_cache.dtype == torch.float32 and cpu.is_compiled(q.device):
        return cpu.rotate_and_store(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)
    store_kv(rotate(k, cos, sin), v, key_cache, value_cache, slot_mapping)
    return rotate(q, cos, sin)


def store_kv(keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """keys and values [rows, kv_heads, head_dim] to their slots."""
    key_cache.view(-1, *key_cache.shape[2:])[slot_mapping] = keys
    value_cache.view(-1, *value_cache.shape[2:])[slot_mapping] = values
