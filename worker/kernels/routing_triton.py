"""Routing on a GPU in two launches: which experts compute a token, and which tokens each expert computes. Without atomics: runs agree."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS_AT_ONCE = 1024


@dataclass(frozen=True)
class RowTiles:
    """The pairs of a row and one of its experts, grouped by expert and cut into tiles that share an expert.

    Only the device knows how many tiles there are: the array has room for the most that there can be.
    """

    order: Tensor  # int32 [pairs]: row * chosen + rank, by expert, then by row
    tiles: Tensor  # int32 [most tiles, 3]: expert, and the tile's half-open range in `order`
    num_tiles: Tensor  # int32 [1]
    size: int  # pairs of a tile at most

    @property
    def max_tiles(self) -> int:
        return len(self.tiles)


def route_triton(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As `route`."""
    num_rows, num_experts = router_logits.shape
    expert_ids = torch.empty(num_rows, num_chosen, dtype=torch.int64, device=router_logits.device)
    expert_weights = torch.empty(num_rows, num_chosen, dtype=torch.float32, device=router_logits.device)
    assert router_logits.is_contiguous()
    pads = {"CHOSEN_PAD": triton.next_power_of_2(num_chosen), "EXPERTS_PAD": triton.next_power_of_2(num_experts)}
    _route[num_rows,](router_logits, expert_ids, expert_weights, num_experts, NUM_CHOSEN=num_chosen, **pads, num_warps=1)
    return expert_ids, expert_weights


def group_by_expert(expert_ids: Tensor, num_experts: int, tile_size: int) -> RowTiles:
    """expert_ids int64 [rows, chosen], each under num_experts."""
    assert expert_ids.is_contiguous()
    num_pairs = expert_ids.numel()
    max_tiles = (num_pairs + min(num_experts, num_pairs) * (tile_size - 1)) // tile_size
    order, tiles, num_tiles = (
        torch.empty(shape, dtype=torch.int32, device=expert_ids.device) for shape in ((num_pairs,), (max_tiles, 3), (1,))
    )
    sizes = {"TILE_SIZE": tile_size, "EXPERTS_PAD": triton.next_power_of_2(num_experts + 1), "PAIRS_AT_ONCE": PAIRS_AT_ONCE}
    _group[num_experts,](expert_ids, order, tiles, num_tiles, num_pairs, num_experts, **sizes, num_warps=4)
    return RowTiles(order, tiles, num_tiles, tile_size)


@triton.jit
def _route(
    logits: tl.tensor, expert_ids: tl.tensor, expert_weights: tl.tensor, num_experts: int,
    NUM_CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, EXPERTS_PAD: tl.constexpr,
) -> None:  # fmt: skip
    """One row. NaN and infinity count as the largest, as in torch's sort, and make the row's weights NaN."""
    row = tl.program_id(0).to(tl.int64)
    experts, ranks = tl.arange(0, EXPERTS_PAD), tl.arange(0, CHOSEN_PAD)
    values = tl.load(logits + row * num_experts + experts, mask=experts < num_experts, other=0.0).to(tl.float32)
    is_bad = ~(values < float("inf"))
    values = tl.where(is_bad, 3.4e38, tl.maximum(values, -3.4e38))
    values = tl.where(experts < num_experts, values, float("-inf"))  # which is kept for those that cannot be chosen
    chosen = tl.full((CHOSEN_PAD,), float("-inf"), tl.float32)
    ids = tl.zeros((CHOSEN_PAD,), tl.int32)
    for rank in tl.static_range(NUM_CHOSEN):
        value, best = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen, ids = tl.where(ranks == rank, value, chosen), tl.where(ranks == rank, best, ids)
        values = tl.where(experts == best, float("-inf"), values)
    shares = tl.exp(chosen - tl.max(chosen, 0))
    shares = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, float("nan"), shares / tl.sum(shares, 0))
    places = row * NUM_CHOSEN + ranks
    tl.store(expert_ids + places, ids.to(tl.int64), mask=ranks < NUM_CHOSEN)
    tl.store(expert_weights + places, shares, mask=ranks < NUM_CHOSEN)


@triton.jit(do_not_specialize=["num_pairs"])
def _group(
    expert_ids: tl.tensor, order: tl.tensor, tiles: tl.tensor, num_tiles: tl.tensor, num_pairs: int, num_experts: int,
    TILE_SIZE: tl.constexpr, EXPERTS_PAD: tl.constexpr, PAIRS_AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    """One expert's part of the order and of the tiles. Each program counts all pairs itself: they are few, and then nobody waits."""
    expert = tl.program_id(0)
    experts, steps = tl.arange(0, EXPERTS_PAD), tl.arange(0, PAIRS_AT_ONCE)
    counts = tl.zeros((EXPERTS_PAD,), tl.int32)
    for begin in range(0, num_pairs, PAIRS_AT_ONCE):
        ids = tl.load(expert_ids + begin + steps, mask=begin + steps < num_pairs, other=num_experts).to(tl.int32)
        counts += tl.histogram(ids, EXPERTS_PAD)
    first = tl.sum(tl.where(experts < expert, counts, 0), 0)
    end = first + tl.sum(tl.where(experts == expert, counts, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tl.cdiv(counts, TILE_SIZE), 0), 0)
    end_tile = first_tile + tl.cdiv(end - first, TILE_SIZE)
    for tile in range(first_tile, end_tile):
        begin = first + (tile - first_tile) * TILE_SIZE
        tl.store(tiles + tile * 3, expert)
        tl.store(tiles + tile * 3 + 1, begin)
        tl.store(tiles + tile * 3 + 2, tl.minimum(begin + TILE_SIZE, end))
    if expert == num_experts - 1:
        tl.store(num_tiles, end_tile)
    place = first
    for begin in range(0, num_pairs, PAIRS_AT_ONCE):
        is_ours = tl.load(expert_ids + begin + steps, mask=begin + steps < num_pairs, other=num_experts) == expert
        tl.store(order + place + tl.cumsum(is_ours.to(tl.int32), 0) - 1, begin + steps, mask=is_ours)
        place += tl.sum(is_ours.to(tl.int32), 0)
