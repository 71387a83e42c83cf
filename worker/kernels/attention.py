"""Attention over the paged KV cache with learned sinks, for a ragged batch of decodes and prefill chunks.

A sink is one more logit per head that takes its share of the softmax and adds nothing to the output.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from worker.host_copy import send
from worker.kernels import cpu

QUERY_TILE = 128  # query positions of one prefill chunk at a time
KEY_TILE = 256  # key positions at a time; fixed, so that a row's sums run in the same order whoever shares its batch


@dataclass(frozen=True)
class PagedBatch:
    """Where the sequences of one step keep their keys and values in one pool. Decodes (one query row each) come first.

    Entry j of a sequence's block table holds positions [table_starts + j * block_size, table_starts + (j + 1) * block_size).
    """

    num_decodes: int
    query_lens: tuple[int, ...]  # rows of each sequence; its last row is its newest token
    context_lens: Tensor  # int64 [sequences], tokens with KV once this step's are stored
    table_starts: Tensor  # int64 [sequences], position that entry 0 begins with, a multiple of block_size
    block_tables: Tensor  # int64 [sequences, max_blocks], filled up with 0
    slot_mapping: Tensor  # int64 [rows]

    @cached_property
    def query_starts(self) -> Tensor:
        """int64 [sequences + 1], the row that each sequence begins with, and the number of rows. Made when a kernel first asks for it."""
        return send([torch.tensor([0, *accumulate(self.query_lens)])], self.context_lens.device)[0]


def paged_attention(
    queries: Tensor, key_cache: Tensor, value_cache: Tensor, sinks: Tensor, batch: PagedBatch, *, scale: float, window: int
) -> Tensor:
    """queries [rows, heads, head_dim], caches [blocks, block_size, kv_heads, head_dim], sinks [heads] → [rows, heads, head_dim].

    A query at position p attends to positions up to p, with `window` > 0 to the last `window` of them. Slots outside of that range may hold
    anything, NaN included.
    """
    assert key_cache.shape == value_cache.shape and queries.shape[2] == key_cache.shape[3]
    assert queries.shape[1] == len(sinks) and queries.shape[1] % key_cache.shape[2] == 0
    assert len(queries) == sum(batch.query_lens) == len(batch.slot_mapping)
    if queries.is_cuda:
        from worker.kernels.attention_triton import paged_attention_triton  # a worker without a GPU needs no Triton

        return paged_attention_triton(queries, key_cache, value_cache, sinks, batch, scale, window)
    if cpu.is_compiled(queries.device):
        where = (batch.query_starts, batch.context_lens, batch.table_starts, batch.block_tables)
        return cpu.attention(queries, key_cache, value_cache, sinks, *where, scale, window)
    return paged_attention_reference(queries, key_cache, value_cache, sinks, batch, scale, window)


def paged_attention_reference(
    queries: Tensor, key_cache: Tensor, value_cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float, window: int
) -> Tensor:
    """Decodes run as one padded batch, prefill chunks one by one in tiles of queries."""
    outputs = torch.empty_like(queries)
    for rows, sequences, positions in _query_tiles(batch):
        tile = queries[rows].view(*positions.shape, *queries.shape[1:])
        key_tiles = _key_tiles(positions, key_cache, value_cache, batch, sequences, window)
        outputs[rows] = _attend(tile, key_tiles, sinks, scale, key_cache.shape[2]).view_as(queries[rows])
    return outputs


def _query_tiles(batch: PagedBatch) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, sequences, positions [sequences, rows of each]) of tiles that are computed together."""
    last_positions = batch.context_lens - 1
    decodes = slice(0, batch.num_decodes)
    if batch.num_decodes:
        yield decodes, decodes, last_positions[decodes].unsqueeze(1)
    row = batch.num_decodes
    for sequence in range(batch.num_decodes, len(batch.query_lens)):
        end = row + batch.query_lens[sequence]
        for begin in range(row, end, QUERY_TILE):
            rows = slice(begin, min(begin + QUERY_TILE, end))
            offsets = torch.arange(rows.start - end + 1, rows.stop - end + 1, device=last_positions.device)
            yield rows, slice(sequence, sequence + 1), (last_positions[sequence] + offsets).unsqueeze(0)
        row = end


def _key_tiles(
    positions: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch, sequences: slice, window: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For queries at positions [n, m], tile by tile: keys and values [n, kv_heads, keys, head_dim] and who sees them [n, m, keys]."""
    block_size = key_cache.shape[1]
    tables, starts = batch.block_tables[sequences], batch.table_starts[sequences].unsqueeze(1)
    lowest = positions[:, :1] - (window - 1) if window else torch.zeros_like(starts)
    first_blocks = (lowest - starts).clamp(min=0) // block_size
    num_blocks = int(((positions[:, -1:] - starts) // block_size + 1 - first_blocks).max())
    tile_blocks = max(KEY_TILE // block_size, 1)
    if window:  # no more than such a range can touch
        tile_blocks = min(tile_blocks, (window + positions.shape[1] - 3) // block_size + 2)
    for tile_begin in range(0, num_blocks, tile_blocks):
        entries = first_blocks + torch.arange(tile_begin, tile_begin + tile_blocks, device=tables.device)
        blocks = tables.gather(1, entries.clamp(max=tables.shape[1] - 1))
        offsets = torch.arange(block_size, device=tables.device)
        key_positions = (starts.unsqueeze(1) + (entries * block_size).unsqueeze(2) + offsets).flatten(1).unsqueeze(1)
        visible = key_positions <= positions.unsqueeze(2)
        if window:
            visible &= key_positions > positions.unsqueeze(2) - window
        # contiguous: for strided factors the CPU's batched matrix product sums in an order that depends on the batch
        keys, values = (cache[blocks].flatten(1, 2).transpose(1, 2).contiguous().float() for cache in (key_cache, value_cache))
        unseen = ~visible.any(1)[:, None, :, None]
        yield keys, values.masked_fill(unseen, 0), visible  # a weight of 0 would not keep a NaN out


def _attend(queries: Tensor, key_tiles: Iterator[tuple[Tensor, Tensor, Tensor]], sinks: Tensor, scale: float, num_kv_heads: int) -> Tensor:
    """queries [n, m, heads, head_dim] → the same shape: a softmax that runs over the tiles and begins with the sink.

    For each head, with s_j = scale * q . k_j and c = max(sink, max_j s_j):
    out = sum_j exp(s_j - c) v_j / (exp(sink - c) + sum_j exp(s_j - c)).
    """
    n, m, num_heads, head_dim = queries.shape
    group = num_heads // num_kv_heads  # query heads that share a key head, stacked as rows: [n, kv_heads, group * m, head_dim]
    q = queries.float().view(n, m, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).reshape(n, num_kv_heads, group * m, head_dim)
    top = sinks.float().view(1, num_kv_heads, group, 1).expand(n, -1, -1, m).reshape(n, num_kv_heads, group * m, 1)
    total, out = torch.ones_like(top), torch.zeros_like(q)
    for keys, values, visible in key_tiles:
        hidden = ~visible.repeat(1, group, 1).unsqueeze(1)
        scores = (q @ keys.transpose(2, 3) * scale).masked_fill(hidden, -math.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink, weights = torch.exp(top - new_top), torch.exp(scores - new_top)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ values
        top = new_top
    out = (out / total).view(n, num_kv_heads, group, m, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n, m, num_heads, head_dim).to(queries.dtype)
