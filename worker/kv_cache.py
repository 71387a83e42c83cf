"""The paged keys and values of one rank: one pool for full-attention layers, one for sliding-window layers, and how large they can be."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from worker.backend import BlockCopy
from worker.model_config import SLIDING, ModelConfig

# A cached prefix keeps one window's worth of blocks every few hundred tokens, so one window block serves about this many full ones.
FULL_BLOCKS_PER_WINDOW_BLOCK = 4


class KVCacheTooSmall(Exception):
    """The bytes or blocks given cannot hold what was asked for. One sentence with the cure."""


@dataclass(frozen=True)
class KVCacheLayout:
    block_size: int  # tokens
    num_full_blocks: int
    num_window_blocks: int  # 0: no window layers
    num_host_blocks: int = 0  # of each pool, in host memory


class KVCache:
    """`full` and `window`: [layers, 2, blocks, block_size, kv_heads, head_dim], keys then values. Written by the model's forward pass;
    what was not written may be anything, so that a CPU's memory is taken only as it fills.

    `host_full` and `host_window` [blocks, layers, 2, block_size, kv_heads, head_dim] stand in host memory, page-locked where the device is
    a GPU, and are written by copies only. A block of theirs lies in one piece: a GPU's copy of scattered host memory would be waited for.

    Each pool has one block more than the layout says, `null_blocks`: what no sequence needs is written there.
    """

    def __init__(self, config: ModelConfig, layout: KVCacheLayout, *, num_kv_heads: int, dtype: torch.dtype, device: torch.device) -> None:
        block_shape = (layout.block_size, num_kv_heads, config.head_dim)
        self.layout = layout
        self.null_blocks = layout.num_full_blocks, layout.num_window_blocks
        self.full = torch.empty(config.num_full_layers, 2, layout.num_full_blocks + 1, *block_shape, dtype=dtype, device=device)
        self.window = torch.empty(config.num_window_layers, 2, layout.num_window_blocks + 1, *block_shape, dtype=dtype, device=device)
        num_host_blocks, pin = layout.num_host_blocks, device.type == "cuda"
        self.host_full = torch.empty(num_host_blocks, config.num_full_layers, 2, *block_shape, dtype=dtype, pin_memory=pin)
        self.host_window = torch.empty(num_host_blocks, config.num_window_layers, 2, *block_shape, dtype=dtype, pin_memory=pin)
        pools = {kind: iter(pool) for kind, pool in (("full", self.full), ("window", self.window))}
        self._layers = [next(pools["window" if kind == SLIDING else "full"]) for kind in config.layer_types]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key and value cache of a layer of the model, each [blocks, block_size, kv_heads, head_dim]."""
        keys, values = self._layers[index]
        return keys, values

    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """In the order given: a copy reads what those before it wrote. On a GPU they run on its stream, and the host waits for none."""
        for copy in copies:
            device, host = (self.window, self.host_window) if copy.is_window else (self.full, self.host_full)
            source = host[copy.source] if copy.source_on_host else device[:, :, copy.source]
            target = host[copy.target] if copy.target_on_host else device[:, :, copy.target]
            target.copy_(source, non_blocking=True)


def block_bytes(config: ModelConfig, *, block_size: int, num_kv_heads: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one full block and of one window block on one rank, over all layers of the pool."""
    layer_bytes = 2 * block_size * num_kv_heads * config.head_dim * dtype.itemsize
    return config.num_full_layers * layer_bytes, config.num_window_layers * layer_bytes


def size_kv_cache(
    config: ModelConfig,
    *,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    budget_bytes: int,
    max_batch_tokens: int,
    max_num_seqs: int,
    num_full_blocks: int | None = None,
    num_window_blocks: int | None = None,
    host_bytes: int = 0,
) -> KVCacheLayout:
    """Divides one rank's byte budget between the pools; a number of blocks that is given stays as it is. Raises `KVCacheTooSmall`.

    `host_bytes` of host memory hold as many blocks of either pool.

    The window pool gets what max_num_seqs running sequences and one step's new tokens hold, at most half of the budget, or the share that
    cached prefixes of the full pool's size can use, whichever is more.
    """
    full_bytes, window_bytes = block_bytes(config, block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype)
    if not window_bytes:
        num_window_blocks = 0
    elif num_window_blocks is None and num_full_blocks is not None:
        num_window_blocks = max(budget_bytes - num_full_blocks * full_bytes, 0) // window_bytes
    elif num_window_blocks is None:
        running = max_num_seqs * blocks_per_window(config, block_size) + ceil(max_batch_tokens / block_size)
        cached = budget_bytes // (FULL_BLOCKS_PER_WINDOW_BLOCK * full_bytes + window_bytes)
        num_window_blocks = max(min(running, budget_bytes // 2 // window_bytes), cached)
    if num_full_blocks is None:
        num_full_blocks = max(budget_bytes - num_window_blocks * window_bytes, 0) // full_bytes
    layout = KVCacheLayout(block_size, num_full_blocks, num_window_blocks, host_bytes // (full_bytes + window_bytes))
    _check_layout(config, layout)
    return layout


def blocks_per_window(config: ModelConfig, block_size: int) -> int:
    """Blocks that one decoding sequence's window can touch; 0 without window layers."""
    return (config.sliding_window - 2) // block_size + 2 if config.sliding_window else 0


def _check_layout(config: ModelConfig, layout: KVCacheLayout) -> None:
    needed = blocks_per_window(config, layout.block_size)
    if layout.num_full_blocks < 1 or layout.num_window_blocks < needed:
        raise KVCacheTooSmall(
            f"The KV cache holds {layout.num_full_blocks} full and {layout.num_window_blocks} window blocks of {layout.block_size} tokens, "
            f"one sequence needs at least 1 and {needed}: raise kv_cache_bytes or the numbers of blocks."
        )
