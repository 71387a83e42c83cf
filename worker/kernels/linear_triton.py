"""x W^T + b on a GPU, such that a row's result does not depend on how many rows share the batch.

Matrix libraries choose their tiles, and with them the order of a sum, by the number of rows. Here the inputs are taken in an order that the
weight's shape alone decides: 64 at a time, in parts that are summed one after the other. A weight with few outputs has more parts, so that
the few rows of a decode keep the whole device busy; there each part is a program of its own, and a second launch adds them up.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DEPTH = 64  # inputs at a time
MIN_PROGRAMS = 64  # that read a weight, for a decode
MIN_PART = 256  # inputs of a part
FEW_ROWS = 64  # one tile of rows


class Tiles(NamedTuple):
    rows: int
    columns: int
    num_parts: int
    is_spread: bool  # a part is a program
    num_warps: int


def choose_tiles(num_rows: int, num_inputs: int, num_outputs: int) -> Tiles:
    num_parts = min(triton.cdiv(MIN_PROGRAMS, triton.cdiv(num_outputs, 32)), triton.cdiv(num_inputs, MIN_PART))
    if num_rows > FEW_ROWS:
        return Tiles(128, 128, num_parts, is_spread=False, num_warps=8)
    is_wide = num_outputs >= 32 * 1024  # the vocabulary: enough programs with wide tiles, which read x less often
    return Tiles(FEW_ROWS, 128 if is_wide else 32, num_parts, is_spread=num_parts > 1, num_warps=4)


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out], all of one dtype → [rows, out]."""
    assert x.stride(1) == 1 and weight.is_contiguous() and x.dtype == weight.dtype
    (num_rows, num_inputs), num_outputs = x.shape, len(weight)
    tiles = choose_tiles(num_rows, num_inputs, num_outputs)
    shape = {"INPUTS": num_inputs, "OUTPUTS": num_outputs, "COLUMNS": tiles.columns, "NUM_PARTS": tiles.num_parts}
    num_programs = tiles.num_parts if tiles.is_spread else 1
    out = x.new_empty(num_rows, num_outputs)
    parts = x.new_empty(num_programs, num_rows, num_outputs, dtype=torch.float32) if tiles.is_spread else out
    num_column_tiles = triton.cdiv(num_outputs, tiles.columns)
    _multiply[triton.cdiv(num_rows, tiles.rows), num_column_tiles, num_programs](
        x, x.stride(0), weight, None if tiles.is_spread else bias, parts, num_rows,
        **shape, ROWS=tiles.rows, DEPTH=DEPTH, IS_SPREAD=tiles.is_spread, num_warps=tiles.num_warps, num_stages=4,
    )  # fmt: skip
    if tiles.is_spread:
        _add_parts[num_rows, num_column_tiles](parts, bias, out, num_rows, **shape, num_warps=1)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x: tl.tensor, x_stride: int, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, num_rows: int,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, NUM_PARTS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    IS_SPREAD: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the output, or of one part of its sums."""
    part_inputs: tl.constexpr = (INPUTS + NUM_PARTS * DEPTH - 1) // (NUM_PARTS * DEPTH) * DEPTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inputs = tl.arange(0, DEPTH)
    x_places = rows[:, None].to(tl.int64) * x_stride + inputs[None, :]
    weight_places = columns[None, :].to(tl.int64) * INPUTS + inputs[:, None]
    is_row, is_column = rows[:, None] < num_rows, columns[None, :] < OUTPUTS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for part in range(1 if IS_SPREAD else NUM_PARTS):
        begin = (tl.program_id(2) + part) * part_inputs
        partial = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(begin, min(begin + part_inputs, INPUTS), DEPTH):
            is_input = depth + inputs < INPUTS
            a = tl.load(x + x_places + depth, mask=is_row & is_input[None, :], other=0.0)
            b = tl.load(weight + weight_places + depth, mask=is_column & is_input[:, None], other=0.0)
            partial = tl.dot(a, b, partial, input_precision="ieee")
        total += partial
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    places = (tl.program_id(2) * num_rows + rows)[:, None].to(tl.int64) * OUTPUTS + columns[None, :]
    tl.store(out + places, total, mask=is_row & is_column)


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts(
    parts: tl.tensor, bias: tl.tensor, out: tl.tensor, num_rows: int,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr, NUM_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """One after the other, as a program that takes all of them would."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(NUM_PARTS):
        total += tl.load(parts + (part * num_rows + row) * OUTPUTS + columns, mask=columns < OUTPUTS, other=0.0)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < OUTPUTS, other=0.0).to(tl.float32)
    tl.store(out + row * OUTPUTS + columns, total, mask=columns < OUTPUTS)
