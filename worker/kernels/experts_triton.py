"""The experts on a GPU: weights stay packed at 4.25 bits, and a step reads those of each expert that it uses once per tile of its rows.

Four launches: rows grouped by expert, gate and up with SwiGLU, down, and the weighted sum. Every sum runs in an order that depends on the
sizes of the model alone: columns 32 at a time, those of the down projection in SPLITS parts that are then added up, a row's experts by
rank. So a row's result does not depend on who shares its batch, though the shapes of the launches do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.experts import ExpertsWeights
from worker.kernels.mxfp4_triton import multiply_tiles, pack_matrices
from worker.kernels.routing_triton import group_by_expert

SPLITS = 4  # parts of the down projection's columns
PAIR_ROWS = 8  # gate rows, then as many up rows: a thread of the tensor core's output holds rows that lie 8 apart
SUM_COLUMNS = 1024


@dataclass(frozen=True)
class Launch:
    """One program's share: pairs of a row and an expert, times rows of a matrix. Tried by compiling: nothing spills."""

    pairs: int
    gate_up_rows: int
    down_rows: int
    splits: int  # how many of SPLITS it computes
    num_warps: int
    num_stages: int


FEW_ROWS = 16
FEW = Launch(16, gate_up_rows=64, down_rows=64, splits=1, num_warps=4, num_stages=5)  # many small programs, each a stream of weights


def choose_launch(num_rows: int, num_chosen: int, num_experts: int) -> Launch:
    if num_rows <= FEW_ROWS:
        return FEW
    pairs = triton.next_power_of_2(triton.cdiv(num_rows * num_chosen, num_experts))
    if pairs <= 32:
        return Launch(max(pairs, 16), gate_up_rows=128, down_rows=128, splits=SPLITS, num_warps=4, num_stages=4)
    return Launch(min(pairs, 128), gate_up_rows=256, down_rows=128, splits=SPLITS, num_warps=8, num_stages=3)


class TritonExperts:
    """An `ExpertsOp` for tensors on a GPU."""

    def __init__(self, weights: ExpertsWeights) -> None:
        rows = torch.arange(2 * weights.intermediate, device=weights.gate_up_bias.device)
        order = rows.view(-1, PAIR_ROWS, 2).transpose(1, 2).flatten()
        self.gate_up = pack_matrices(weights.gate_up_blocks, weights.gate_up_scales, order)
        self.gate_up_bias = weights.gate_up_bias[:, order].contiguous()
        self.down = pack_matrices(weights.down_blocks, weights.down_scales)
        self.num_experts, self.intermediate, self.hidden = weights.num_experts, weights.intermediate, weights.hidden
        self.alpha, self.limit = weights.alpha, weights.limit

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        assert x.shape[1] == self.hidden and expert_ids.shape == expert_weights.shape == (len(x), expert_ids.shape[1])
        assert x.is_contiguous() and expert_weights.is_contiguous() and x.dtype == self.gate_up_bias.dtype
        if not self.intermediate:
            return torch.zeros_like(x)
        (num_rows, num_chosen), num_pairs = expert_ids.shape, expert_ids.numel()
        launch = choose_launch(num_rows, num_chosen, self.num_experts)
        groups = group_by_expert(expert_ids, self.num_experts, launch.pairs)
        activated = x.new_empty(num_pairs, self.intermediate)  # in the order of the groups
        num_parts = SPLITS // launch.splits
        parts = torch.empty(num_parts, num_pairs, self.hidden, dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        common = {"PAIRS": launch.pairs, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
        _gate_up_swiglu[triton.cdiv(2 * self.intermediate, launch.gate_up_rows), groups.max_tiles](
            x, self.gate_up.words, self.gate_up.scales, self.gate_up_bias, activated, groups.order, groups.tiles, groups.num_tiles,
            self.gate_up.num_tiles, self.hidden, self.intermediate, self.alpha, self.limit,
            NUM_CHOSEN=num_chosen, IS_WIDE=self.gate_up.is_wide, MATRIX_ROWS=launch.gate_up_rows, **common,
        )  # fmt: skip
        _down[triton.cdiv(self.hidden, launch.down_rows), groups.max_tiles, num_parts](
            activated, self.down.words, self.down.scales, parts, groups.order, groups.tiles, groups.num_tiles,
            self.down.num_tiles, self.intermediate, self.hidden, num_pairs,
            SPLITS=SPLITS, SPLITS_HERE=launch.splits, IS_WIDE=self.down.is_wide, MATRIX_ROWS=launch.down_rows, **common,
        )  # fmt: skip
        _sum_experts[num_rows, triton.cdiv(self.hidden, SUM_COLUMNS)](
            parts, expert_weights, out, num_pairs, self.hidden,
            NUM_PARTS=num_parts, NUM_CHOSEN=num_chosen, COLUMNS=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
        return out


def add_down_bias_triton(x: Tensor, down_bias: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """As `add_down_bias`."""
    assert all(one.is_contiguous() for one in (x, down_bias, expert_ids, expert_weights))
    (num_rows, hidden), num_chosen, out = x.shape, expert_ids.shape[1], torch.empty_like(x)
    _add_down_bias[num_rows, triton.cdiv(hidden, SUM_COLUMNS)](
        x, down_bias, expert_ids, expert_weights, out, hidden, NUM_CHOSEN=num_chosen, COLUMNS=SUM_COLUMNS, num_warps=4
    )
    return out


@triton.jit
def _gate_up_swiglu(
    x: tl.tensor, words: tl.tensor, scales: tl.tensor, bias: tl.tensor, activated: tl.tensor,
    order: tl.tensor, tiles: tl.tensor, num_row_tiles: tl.tensor,
    num_tiles: int, hidden: int, intermediate: int, alpha: float, limit: float,
    NUM_CHOSEN: tl.constexpr, IS_WIDE: tl.constexpr, MATRIX_ROWS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """activated[i] = swiglu(gate_up_proj x + bias) for the pairs i of one tile, MATRIX_ROWS / 2 of its columns."""
    tile = tl.program_id(1)
    if tile < tl.load(num_row_tiles):
        expert = tl.load(tiles + tile * 3).to(tl.int64)
        places = tl.load(tiles + tile * 3 + 1) + tl.arange(0, PAIRS)
        is_pair = places < tl.load(tiles + tile * 3 + 2)
        rows = tl.load(order + places, mask=is_pair, other=0) // NUM_CHOSEN
        matrix_rows = tl.program_id(0) * MATRIX_ROWS + tl.arange(0, MATRIX_ROWS)
        stripes = tl.cdiv(2 * intermediate, 64)
        matrix = expert * stripes * num_tiles * 64
        gate_up = multiply_tiles(
            x, rows * hidden, is_pair, words + matrix * 16, scales + matrix, tl.minimum(matrix_rows, stripes * 64 - 1), hidden,
            num_tiles, 0, num_tiles, IS_WIDE,
        )  # fmt: skip
        biases = tl.load(bias + expert * 2 * intermediate + matrix_rows, mask=matrix_rows < 2 * intermediate, other=0.0)
        gate_up += biases.to(tl.float32)[:, None]
        gate_up = tl.permute(tl.reshape(gate_up, (MATRIX_ROWS // 16, 2, 8, PAIRS)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(gate_up, (MATRIX_ROWS // 2, PAIRS, 2)))
        gate = tl.minimum(gate, limit, tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, tl.PropagateNan.ALL)
        y = (up + 1) * gate * tl.sigmoid(alpha * gate)
        columns = tl.program_id(0) * (MATRIX_ROWS // 2) + tl.arange(0, MATRIX_ROWS // 2)
        mask = is_pair[None, :] & (columns < intermediate)[:, None]
        tl.store(activated + places[None, :] * intermediate + columns[:, None], y, mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def _down(
    activated: tl.tensor, words: tl.tensor, scales: tl.tensor, parts: tl.tensor,
    order: tl.tensor, tiles: tl.tensor, num_row_tiles: tl.tensor,
    num_tiles: int, intermediate: int, hidden: int, num_pairs: int,
    SPLITS: tl.constexpr, SPLITS_HERE: tl.constexpr, IS_WIDE: tl.constexpr, MATRIX_ROWS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """parts[p, i] = the p-th SPLITS_HERE splits of down_proj activated, for the pairs i of one tile, MATRIX_ROWS of its columns."""
    tile = tl.program_id(1)
    if tile < tl.load(num_row_tiles):
        expert = tl.load(tiles + tile * 3).to(tl.int64)
        places = tl.load(tiles + tile * 3 + 1) + tl.arange(0, PAIRS)
        is_pair = places < tl.load(tiles + tile * 3 + 2)
        pairs = tl.load(order + places, mask=is_pair, other=0)
        matrix_rows = tl.program_id(0) * MATRIX_ROWS + tl.arange(0, MATRIX_ROWS)
        stripes = tl.cdiv(hidden, 64)
        matrix = expert * stripes * num_tiles * 64
        total = tl.zeros((MATRIX_ROWS, PAIRS), tl.float32)
        for split in range(tl.program_id(2) * SPLITS_HERE, (tl.program_id(2) + 1) * SPLITS_HERE):
            total += multiply_tiles(
                activated, places * intermediate, is_pair, words + matrix * 16, scales + matrix, tl.minimum(matrix_rows, stripes * 64 - 1),
                intermediate, num_tiles, num_tiles * split // SPLITS, num_tiles * (split + 1) // SPLITS, IS_WIDE,
            )  # fmt: skip
        mask = is_pair[None, :] & (matrix_rows < hidden)[:, None]
        part = (tl.program_id(2).to(tl.int64) * num_pairs + pairs) * hidden
        tl.store(parts + part[None, :] + matrix_rows[:, None], total, mask=mask)


@triton.jit(do_not_specialize=["num_pairs"])
def _sum_experts(
    parts: tl.tensor, expert_weights: tl.tensor, out: tl.tensor, num_pairs: int, hidden: int,
    NUM_PARTS: tl.constexpr, NUM_CHOSEN: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[row] = the sum of its experts' parts, weighted, by rank."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < hidden
    total = tl.zeros((COLUMNS,), tl.float32)
    for rank in tl.static_range(NUM_CHOSEN):
        pair = row * NUM_CHOSEN + rank
        output = tl.zeros((COLUMNS,), tl.float32)
        for part in tl.static_range(NUM_PARTS):
            output += tl.load(parts + (part * num_pairs + pair) * hidden + columns, mask=mask, other=0.0)
        total += output * tl.load(expert_weights + pair)
    tl.store(out + row * hidden + columns, total, mask=mask)


@triton.jit
def _add_down_bias(
    x: tl.tensor, down_bias: tl.tensor, expert_ids: tl.tensor, expert_weights: tl.tensor, out: tl.tensor, hidden: int,
    NUM_CHOSEN: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[row] = x[row] + the sum of its experts' biases, weighted, by rank."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < hidden
    total = tl.zeros((COLUMNS,), tl.float32)
    for rank in tl.static_range(NUM_CHOSEN):
        pair = row * NUM_CHOSEN + rank
        bias = tl.load(down_bias + tl.load(expert_ids + pair) * hidden + columns, mask=mask, other=0.0)
        total += bias.to(tl.float32) * tl.load(expert_weights + pair)
    tl.store(out + row * hidden + columns, tl.load(x + row * hidden + columns, mask=mask, other=0.0).to(tl.float32) + total, mask=mask)
