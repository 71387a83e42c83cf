"""Draws on a GPU: a few launches over tiles of the vocabulary, and none of them sorts.

What top-k and top-p keep are the tokens from some score on, the floor. It is searched for bit by bit among all float32 numbers, by how many
tokens, or how much of the probability, lie above: 16 passes over the row, each of which settles two bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # tokens of one program
SEARCH_TILE = 4096  # tokens at a time where one program takes a row

LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST_STEP = tl.constexpr(2.0**-32)
LARGEST_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)
SIGN = tl.constexpr(-(2**31))
LOWEST_RANK = tl.constexpr(0xFF800000)  # of -inf
# Tensors of a few numbers lie anywhere in a packed buffer. Triton would compile once more for every way in which they are aligned.
ANYWHERE = [
    *("temperatures", "top_ps", "largest_costs", "top_ks", "seeds", "positions", "penalty_rows", "penalties", "mask_rows"),
    *("tops", "logit_tops", "score_tops", "floors", "best", "best_ids", "token_ids", "faults"),
]


@dataclass(frozen=True)
class SamplingInputs:
    """What n draws need beside their logits, on the same device. Rows of `counts` and `masks` are there for those who need them only."""

    temperatures: Tensor  # float32 [n], 0 is greedy
    top_ps: Tensor  # float32 [n]
    largest_costs: Tensor  # float32 [n], -log(min_p)
    top_ks: Tensor  # int64 [n], 0: all
    seeds: Tensor  # int64 [n], holding unsigned 64 bit
    positions: Tensor  # int64 [n], of the token to draw
    penalty_rows: Tensor  # int64 [n], the row of `penalties`, `known` and `counts`, or -1
    penalties: Tensor  # float32 [m, 3]: repetition, presence, frequency
    known: Tensor  # bool [m, vocab], tokens that prompt or output hold
    counts: Tensor  # int32 [m, vocab], how often the output holds a token
    mask_rows: Tensor  # int64 [n], the row of `masks`, or -1
    masks: Tensor  # int32 [k, words], one bit a token id that may be drawn, the lowest first
    bias_places: Tensor  # int64 [b], row * vocab + token id; a place comes once
    biases: Tensor  # float32 [b]
    ban_rows: Tensor  # int64 [c]
    ban_places: Tensor  # int64 [c]
    has_floors: bool  # some row has a top-k or top-p


def draw_triton(logits: Tensor, inputs: SamplingInputs, *, not_numbers: int, nothing_left: int) -> tuple[Tensor, Tensor]:
    """logits float32 [n, vocab], left as they are → token ids and faults (0: none), int64 [n]."""
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    num_rows, vocab_size = logits.shape
    assert not len(inputs.masks) or 32 * inputs.masks.shape[1] >= vocab_size
    num_tiles = triton.cdiv(vocab_size, TILE)
    scores = _adjust(logits, inputs)
    tops = logits.new_empty(2, num_rows, num_tiles)
    _find_tops[num_rows, num_tiles](logits, scores, *tops, VOCAB=vocab_size, TILE=TILE)
    pads = {"VOCAB": vocab_size, "NUM_TILES": num_tiles, "TILES_PAD": triton.next_power_of_2(num_tiles)}
    floors = logits.new_empty(num_rows)
    if inputs.has_floors:
        _find_floors[(num_rows,)](
            scores, tops[1], inputs.temperatures, inputs.top_ks, inputs.top_ps, floors, **pads, TILE=SEARCH_TILE, num_warps=16
        )
    best, best_ids = torch.empty_like(tops[0]), torch.empty_like(tops[0], dtype=torch.int32)
    _draw_tiles[num_rows, num_tiles](
        scores, tops[1], floors, inputs.temperatures, inputs.largest_costs, inputs.seeds, inputs.positions, best, best_ids,
        **pads, TILE=TILE, HAS_FLOORS=inputs.has_floors,
    )  # fmt: skip
    token_ids, faults = inputs.positions.new_empty(2, num_rows)
    _choose[(num_rows,)](best, best_ids, *tops, token_ids, faults, **pads, NOT_NUMBERS=not_numbers, NOTHING_LEFT=nothing_left, num_warps=1)
    return token_ids, faults


def _adjust(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    """Penalties, bias, mask and bans: `logits` themselves where there are none. Where mask and bans leave nothing, the mask counts."""
    if not any(map(len, (inputs.penalties, inputs.masks, inputs.bias_places, inputs.ban_places))):
        return logits
    (num_rows, vocab_size), scores = logits.shape, torch.empty_like(logits)
    _penalise_and_mask[num_rows, triton.cdiv(vocab_size, TILE)](
        logits, scores, inputs.penalty_rows, inputs.penalties, inputs.known, inputs.counts, inputs.mask_rows, inputs.masks,
        inputs.masks.shape[1], VOCAB=vocab_size, TILE=TILE,
    )  # fmt: skip
    places = scores.view(-1)
    places.index_add_(0, inputs.bias_places, inputs.biases)  # what is masked stays so: -inf takes any bias
    if len(inputs.ban_places):
        kept = places[inputs.ban_places]
        places.index_fill_(0, inputs.ban_places, -torch.inf)
        is_needed = scores.amax(-1).isneginf() & (inputs.mask_rows >= 0)
        places.index_copy_(0, inputs.ban_places, torch.where(is_needed[inputs.ban_rows], kept, -torch.inf))
    return scores


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=ANYWHERE)
def _penalise_and_mask(
    logits: tl.tensor, scores: tl.tensor, penalty_rows: tl.tensor, penalties: tl.tensor, known: tl.tensor, counts: tl.tensor,
    mask_rows: tl.tensor, masks: tl.tensor, num_words: int, VOCAB: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_token = tokens < VOCAB
    score = tl.load(logits + row * VOCAB + tokens, mask=is_token, other=float("-inf"))
    penalty_row = tl.load(penalty_rows + row)
    if penalty_row >= 0:
        repetition = tl.load(penalties + penalty_row * 3)
        presence = tl.load(penalties + penalty_row * 3 + 1)
        frequency = tl.load(penalties + penalty_row * 3 + 2)
        is_known = tl.load(known + penalty_row * VOCAB + tokens, mask=is_token, other=0) != 0
        count = tl.load(counts + penalty_row * VOCAB + tokens, mask=is_token, other=0)
        repeated = tl.where(score > 0, tl.div_rn(score, repetition), score * repetition)
        score = tl.where(is_known, repeated, score) - (presence * (count > 0).to(tl.float32) + frequency * count.to(tl.float32))
    mask_row = tl.load(mask_rows + row)
    if mask_row >= 0:
        words = tl.load(masks + mask_row * num_words + tokens // 32, mask=is_token, other=0)
        score = tl.where((words >> (tokens % 32)) & 1 != 0, score, float("-inf"))
    tl.store(scores + row * VOCAB + tokens, score, mask=is_token)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _find_tops(
    logits: tl.tensor, scores: tl.tensor, logit_tops: tl.tensor, score_tops: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr
) -> None:
    """The largest of each tile of a row; infinite where a logit is no number."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    place = row * tl.num_programs(1) + tile
    logit = tl.load(logits + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf"))
    tl.store(logit_tops + place, tl.max(tl.where(logit == logit, logit, float("inf")), 0))
    tl.store(score_tops + place, tl.max(tl.load(scores + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf")), 0))


@triton.jit
def _top(tops: tl.tensor, row: tl.tensor, NUM_TILES: tl.constexpr, TILES_PAD: tl.constexpr) -> tl.tensor:
    tiles = tl.arange(0, TILES_PAD)
    return tl.max(tl.load(tops + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf")), 0)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _find_floors(
    scores: tl.tensor, tops: tl.tensor, temperatures: tl.tensor, top_ks: tl.tensor, top_ps: tl.tensor, floors: tl.tensor,
    VOCAB: tl.constexpr, NUM_TILES: tl.constexpr, TILES_PAD: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """The lowest score of a row that both top-k and top-p keep."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    floor = float("-inf")
    if (temperature > 0) & (top_k > 0) & (top_k < VOCAB):
        floor = _search(scores + row * VOCAB, floor, 0.0, 0.0, top_k.to(tl.float32), VOCAB, TILE, True)
    if (temperature > 0) & (top_p < 1):
        top, scale = _top(tops, row, NUM_TILES, TILES_PAD), LOG2_E / temperature
        total = tl.zeros((TILE,), tl.float32)
        for begin in range(0, VOCAB, TILE):
            score = tl.load(scores + row * VOCAB + begin + tl.arange(0, TILE), mask=begin + tl.arange(0, TILE) < VOCAB, other=float("-inf"))
            total += tl.where(score >= floor, tl.exp2((score - top) * scale), 0.0)
        floor = _search(scores + row * VOCAB, floor, top, scale, top_p * tl.sum(total, 0), VOCAB, TILE, False)
    tl.store(floors + row, floor)


@triton.jit
def _search(
    scores: tl.tensor, lowest: float, top: float, scale: float, target: float, VOCAB: tl.constexpr, TILE: tl.constexpr, COUNTS: tl.constexpr
) -> tl.tensor:
    """The smallest s such that the tokens with scores over s weigh less than the target.

    A token weighs 1 where it COUNTS, else exp2((score - top) * scale), and nothing under `lowest`. A score's rank is its bits as an integer
    that grows as scores fall.
    """
    rank, digits = tl.full((), 0, tl.uint32), tl.arange(0, 4).to(tl.uint32)
    for pair in range(16):
        shift = 30 - 2 * pair
        ranks = rank + (digits << shift)
        weights = tl.zeros((TILE, 4), tl.float32)
        for begin in range(0, VOCAB, TILE):
            tokens = begin + tl.arange(0, TILE)
            score = tl.load(scores + tokens, mask=tokens < VOCAB, other=float("-inf"))
            bits = score.to(tl.int32, bitcast=True)
            own_rank = (~(bits ^ ((bits >> 31) | SIGN))).to(tl.uint32, bitcast=True)
            weight = tl.where(score >= lowest, 1.0 if COUNTS else tl.exp2((score - top) * scale), 0.0)
            weights += tl.where(own_rank[:, None] < ranks[None, :], weight[:, None], 0.0)
        fits = (tl.sum(weights, 0) < target) & (digits > 0)
        rank += tl.sum(fits.to(tl.uint32), 0) << shift
    ordered = ~tl.minimum(rank, LOWEST_RANK).to(tl.int32, bitcast=True)
    return (ordered ^ (~(ordered >> 31) | SIGN)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _draw_tiles(
    scores: tl.tensor, tops: tl.tensor, floors: tl.tensor, temperatures: tl.tensor, largest_costs: tl.tensor, seeds: tl.tensor,
    positions: tl.tensor, best: tl.tensor, best_ids: tl.tensor,
    VOCAB: tl.constexpr, NUM_TILES: tl.constexpr, TILES_PAD: tl.constexpr, TILE: tl.constexpr, HAS_FLOORS: tl.constexpr,
) -> None:  # fmt: skip
    """The winner of each tile of a row: the largest score, or noise - (top - score) / temperature."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    value = tl.load(scores + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf"))
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        cost = tl.div_rn(_top(tops, row, NUM_TILES, TILES_PAD) - value, temperature)
        is_kept = cost <= tl.load(largest_costs + row)
        if HAS_FLOORS:
            is_kept &= value >= tl.load(floors + row)
        groups = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        value = tl.where(is_kept, gumbel_noise(tl.load(seeds + row), tl.load(positions + row), groups) - cost, float("-inf"))
    top, place = tl.max(tl.where(value == value, value, float("-inf")), 0, return_indices=True)
    tl.store(best + row * NUM_TILES + tile, top)
    tl.store(best_ids + row * NUM_TILES + tile, tile * TILE + place)


@triton.jit
def gumbel_noise(seed: tl.tensor, position: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """As `worker.philox.gumbel_noise`, of the four tokens of each group [n], for one row: [4 * n].

    log(1 - u) is exact also near 0: what 1 - u rounds away is made up for by the quotient (W. Kahan's way to write log1p).
    """
    u = tl.minimum((philox_words(seed, position, groups).to(tl.float32) + 0.5) * SMALLEST_STEP, LARGEST_BELOW_ONE)
    rest = 1.0 - u
    is_tiny = rest == 1.0
    return -tl.log(tl.where(is_tiny, u, -tl.log(rest) * (u / tl.where(is_tiny, 1.0, 1.0 - rest))))


@triton.jit
def philox_words(seed: tl.tensor, position: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """uint32 [4 * n]: the words of counter (group, position, 0, 0) under the key that is the seed, group by group."""
    zero = tl.zeros_like(groups)
    w0, w1, w2, w3 = tl.philox(seed, groups, zero + position.to(tl.int32), zero, zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def _choose(
    best: tl.tensor, best_ids: tl.tensor, logit_tops: tl.tensor, score_tops: tl.tensor, token_ids: tl.tensor, faults: tl.tensor,
    VOCAB: tl.constexpr, NUM_TILES: tl.constexpr, TILES_PAD: tl.constexpr, NOT_NUMBERS: tl.constexpr, NOTHING_LEFT: tl.constexpr,
) -> None:  # fmt: skip
    """The first of the largest, and what is wrong with the row. A row's largest is finite where all logits are numbers and one is left."""
    row, tiles = tl.program_id(0).to(tl.int64), tl.arange(0, TILES_PAD)
    values = tl.load(best + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf"))
    tile = tl.argmax(values, 0)
    tl.store(token_ids + row, tl.minimum(tl.load(best_ids + row * NUM_TILES + tile), VOCAB - 1))
    are_numbers = tl.abs(_top(logit_tops, row, NUM_TILES, TILES_PAD)) < float("inf")
    can_draw = tl.abs(_top(score_tops, row, NUM_TILES, TILES_PAD)) < float("inf")
    tl.store(faults + row, tl.where(are_numbers, tl.where(can_draw, 0, NOTHING_LEFT), NOT_NUMBERS))
