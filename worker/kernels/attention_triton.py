"""Paged attention on a GPU. One program reads the keys of one key head once, for all the query heads that share it.

Decodes are split over their context and put together by a second kernel; prefill chunks go in tiles of queries. Splits and tiles have sizes
in tokens that are fixed, so that a row's sums run in the same order whoever shares its batch. The softmax is computed in powers of two,
which is what the hardware has: its logits are scaled by log2(e).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.attention import PagedBatch

SPLIT = 256  # keys of one program of a decode
SPLITS_AT_ONCE = 16  # when they are put together
KEY_TILE = 64  # keys at a time
QUERY_ROWS = 128  # of a prefill tile: query positions times heads that share a key head
MIN_DOT = 16  # the shortest side of a matrix product
LOG2_E = tl.constexpr(math.log2(math.e))
# What changes from step to step must not lead to another compilation: numbers, and where in a packed buffer an index tensor lies.
SIZES = ["table_width", "num_splits", "num_decodes"]
INDICES = ["context_lens", "table_starts", "block_tables", "query_starts"]


def paged_attention_triton(
    queries: Tensor, key_cache: Tensor, value_cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float, window: int
) -> Tensor:
    """As `paged_attention`: a launch for decodes, a second one where their ranges may be longer than a split, one for prefill chunks."""
    assert all(one.is_contiguous() for one in (queries, key_cache, value_cache, sinks, batch.block_tables))
    num_heads, head_dim = queries.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    group, table_width = num_heads // num_kv_heads, batch.block_tables.shape[1]
    num_decodes, num_chunks = batch.num_decodes, len(batch.query_lens) - batch.num_decodes
    out = torch.empty_like(queries)
    paged = (key_cache, value_cache, batch.context_lens, batch.table_starts, batch.block_tables, table_width, scale * LOG2_E.value)
    head_pad = max(triton.next_power_of_2(head_dim), MIN_DOT)
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "HEAD_PAD": head_pad, "BLOCK_SIZE": block_size, "WINDOW": window, "KEY_TILE": KEY_TILE}
    if num_decodes:
        fits = 0 < window <= SPLIT  # by the layer and not by the batch, so that a row always takes the same way
        num_splits = 1 if fits else triton.cdiv(table_width * block_size, SPLIT)
        parts = queries.new_empty(0 if fits else num_decodes, num_heads, num_splits, head_dim, dtype=torch.float32)
        masses = torch.empty_like(parts[..., 0], memory_format=torch.contiguous_format)
        group_pad = max(triton.next_power_of_2(group), MIN_DOT)
        _attend_split[num_decodes, num_kv_heads, num_splits](
            queries, sinks, *paged, out, parts, masses, **shape, GROUP_PAD=group_pad, SPLIT=SPLIT, FITS=fits, num_warps=4
        )
        if not fits:
            splits = {"WINDOW": window, "SPLIT": SPLIT, "SPLITS_AT_ONCE": SPLITS_AT_ONCE}
            _merge_splits[num_decodes, num_heads](
                parts, masses, sinks, batch.context_lens, num_splits, out, HEAD_DIM=head_dim, HEAD_PAD=head_pad, **splits, num_warps=2
            )
    if num_chunks:
        group_pad = triton.next_power_of_2(group)
        query_tile = triton.cdiv(QUERY_ROWS, group_pad)
        num_tiles = triton.cdiv(max(batch.query_lens[num_decodes:]), query_tile)
        _attend_chunk[num_tiles, num_kv_heads, num_chunks](
            queries, sinks, *paged, out, batch.query_starts, num_decodes, **shape, GROUP_PAD=group_pad, QUERY_TILE=query_tile, num_warps=8
        )
    return out


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def _attend_split(
    queries: tl.tensor, sinks: tl.tensor, key_cache: tl.tensor, value_cache: tl.tensor, context_lens: tl.tensor, table_starts: tl.tensor,
    block_tables: tl.tensor, table_width: int, scale_log2: float, out: tl.tensor, parts: tl.tensor, masses: tl.tensor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    KEY_TILE: tl.constexpr, GROUP_PAD: tl.constexpr, SPLIT: tl.constexpr, FITS: tl.constexpr,
) -> None:  # fmt: skip
    """One split of one decode for one key head: its average and the logarithm of its mass, or the output where it is the only one."""
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(1), tl.num_programs(2)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    begin = split * SPLIT
    if WINDOW:
        begin += tl.maximum(context_len - WINDOW, 0)
    if (begin < context_len) | FITS:
        members, dims = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD)
        heads = kv_head * GROUP + members
        rows = sequence * num_kv_heads * GROUP + heads
        mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        q = tl.load(queries + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        if FITS:
            top = tl.load(sinks + heads, mask=members < GROUP, other=0.0).to(tl.float32) * LOG2_E
            total = tl.full((GROUP_PAD,), 1.0, tl.float32)
        else:
            top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
            total = tl.zeros((GROUP_PAD,), tl.float32)
        positions = tl.zeros((GROUP_PAD,), tl.int32) + context_len - 1
        block_table, table_start = block_tables + sequence * table_width, tl.load(table_starts + sequence).to(tl.int32)
        top, total, average = _attend(
            q, positions, top, total, tl.zeros((GROUP_PAD, HEAD_PAD), tl.float32), key_cache, value_cache, block_table, table_start,
            kv_head, num_kv_heads, begin, begin, tl.minimum(begin + SPLIT, context_len), scale_log2,
            HEAD_DIM, HEAD_PAD, BLOCK_SIZE, WINDOW, KEY_TILE,
        )  # fmt: skip
        average /= total[:, None]
        if FITS:
            tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], average, mask=mask)
        else:
            places = rows.to(tl.int64) * num_splits + split
            tl.store(parts + places[:, None] * HEAD_DIM + dims[None, :], average, mask=mask)
            tl.store(masses + places, top + tl.log2(total), mask=members < GROUP)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def _merge_splits(
    parts: tl.tensor, masses: tl.tensor, sinks: tl.tensor, context_lens: tl.tensor, num_splits: int, out: tl.tensor,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, SPLITS_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """The splits of one head of one decode, in their order, after the sink."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = sequence * tl.num_programs(1) + head
    num_keys = tl.load(context_lens + sequence).to(tl.int32)
    if WINDOW:
        num_keys = tl.minimum(num_keys, WINDOW)
    num_used = tl.cdiv(num_keys, SPLIT)
    dims = tl.arange(0, HEAD_PAD)
    top, total = tl.load(sinks + head).to(tl.float32) * LOG2_E, 1.0
    merged = tl.zeros((HEAD_PAD,), tl.float32)
    for begin in range(0, num_used, SPLITS_AT_ONCE):
        splits = begin + tl.arange(0, SPLITS_AT_ONCE)
        is_used = splits < num_used
        places = row.to(tl.int64) * num_splits + splits
        mass = tl.load(masses + places, mask=is_used, other=float("-inf"))
        average = tl.load(parts + places[:, None] * HEAD_DIM + dims[None, :], mask=is_used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(mass, 0))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(mass - new_top)
        total = total * shrink + tl.sum(weights, 0)
        merged = merged * shrink + tl.sum(weights[:, None] * average, 0)
        top = new_top
    tl.store(out + row * HEAD_DIM + dims, merged / total, mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INDICES)
def _attend_chunk(
    queries: tl.tensor, sinks: tl.tensor, key_cache: tl.tensor, value_cache: tl.tensor, context_lens: tl.tensor, table_starts: tl.tensor,
    block_tables: tl.tensor, table_width: int, scale_log2: float, out: tl.tensor, query_starts: tl.tensor, num_decodes: int,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    KEY_TILE: tl.constexpr, GROUP_PAD: tl.constexpr, QUERY_TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of queries of one prefill chunk for one key head. Key tiles begin at multiples of KEY_TILE, wherever the chunk begins."""
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2) + num_decodes
    num_kv_heads = tl.num_programs(1)
    chunk_end = tl.load(query_starts + sequence + 1).to(tl.int32)
    first_row = tl.load(query_starts + sequence).to(tl.int32) + tile * QUERY_TILE
    if first_row < chunk_end:
        context_len = tl.load(context_lens + sequence).to(tl.int32)
        places, dims = tl.arange(0, QUERY_TILE * GROUP_PAD), tl.arange(0, HEAD_PAD)
        query_rows, members = first_row + places // GROUP_PAD, places % GROUP_PAD
        heads = kv_head * GROUP + members
        is_row = (query_rows < chunk_end) & (members < GROUP)
        mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
        rows = query_rows.to(tl.int64) * num_kv_heads * GROUP + heads
        q = tl.load(queries + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        top = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        total = tl.full((QUERY_TILE * GROUP_PAD,), 1.0, tl.float32)
        positions = context_len - chunk_end + query_rows
        first = 0
        if WINDOW:
            first = tl.maximum(context_len - chunk_end + first_row - WINDOW + 1, 0)
        end = tl.minimum(context_len - chunk_end + first_row + QUERY_TILE, context_len)
        block_table, table_start = block_tables + sequence * table_width, tl.load(table_starts + sequence).to(tl.int32)
        top, total, average = _attend(
            q, positions, top, total, tl.zeros((QUERY_TILE * GROUP_PAD, HEAD_PAD), tl.float32), key_cache, value_cache, block_table,
            table_start, kv_head, num_kv_heads, first // KEY_TILE * KEY_TILE, first, end, scale_log2,
            HEAD_DIM, HEAD_PAD, BLOCK_SIZE, WINDOW, KEY_TILE,
        )  # fmt: skip
        tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], average / total[:, None], mask=mask)


@triton.jit
def _attend(
    q: tl.tensor, positions: tl.tensor, top: tl.tensor, total: tl.tensor, out: tl.tensor,
    key_cache: tl.tensor, value_cache: tl.tensor, block_table: tl.tensor, table_start: int, kv_head: int, num_kv_heads: int,
    begin: int, first: int, end: int, scale_log2: float,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, KEY_TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Takes keys [first, end), in tiles that begin at `begin`, into the running softmax of q [m, HEAD_PAD] at positions [m].

    Its state is the largest logit so far and the sums [m] and [m, HEAD_PAD] of exp2(logit - top) without and with the value as factor.
    """
    dims = tl.arange(0, HEAD_PAD)
    for tile in range(begin, end, KEY_TILE):
        key_positions = tile + tl.arange(0, KEY_TILE)
        is_here = (key_positions >= first) & (key_positions < end)
        blocks = tl.load(block_table + (key_positions - table_start) // BLOCK_SIZE, mask=is_here, other=0)
        places = ((blocks * BLOCK_SIZE + key_positions % BLOCK_SIZE) * num_kv_heads + kv_head) * HEAD_DIM
        mask = is_here[:, None] & (dims < HEAD_DIM)[None, :]  # what lies elsewhere may be NaN, and a weight of 0 would not keep that out
        keys = tl.load(key_cache + places[:, None] + dims[None, :], mask=mask, other=0.0)
        values = tl.load(value_cache + places[:, None] + dims[None, :], mask=mask, other=0.0)
        visible = is_here[None, :] & (key_positions[None, :] <= positions[:, None])
        if WINDOW:
            visible &= key_positions[None, :] > positions[:, None] - WINDOW
        logits = tl.where(visible, tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    return top, total, out
