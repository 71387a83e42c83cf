"""MXFP4 matrices as the GPU reads them: re-laid out once, then unpacked with bit operations and one multiplication, without a table.

A matrix is cut into tiles of 64 rows by 128 columns, which are 4 groups of 32; a tile is 4 KiB in one piece, and the tiles of 64 rows
follow each other. A word of 32 bits holds two neighbouring columns of each of the 4 groups, in its halves. In a half, the bits of group 0
already lie where bfloat16 has its sign, the low two bits of its exponent and the high bit of its mantissa; those of groups 1 and 2 lie 3
and 6 places lower, and group 3 has what is left:

    bit    15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    group  0s  3s  3m  1s  3e  3e  2s  0e  0e  0m  1e  1e  1m  2e  2e  2m

Such bits alone are the value times 2^-126, zero and the subnormal 0.5 included, for bfloat16's bias is 127 and E2M1's is 1.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.mxfp4 import BLOCK, NAN_SCALE, SCALE_BIAS

TILE_ROWS, TILE_GROUPS = 64, 4
TILE_WORDS = BLOCK // 2  # of one row
LARGEST_PLAIN_SCALE = SCALE_BIAS + 1  # 2^126 times the scale is a bfloat16 up to here


@dataclass(frozen=True)
class PackedMatrices:
    """One matrix [num_rows, num_columns] per expert."""

    words: Tensor  # int32 [experts, rows / 64, columns / 128, 64, 16], both padded with zeros
    scales: Tensor  # int32 [experts, rows / 64, columns / 128, 64]: the 4 groups' bytes, the first one lowest
    num_rows: int
    num_columns: int
    is_wide: bool  # has scales over 2, which take a second multiplication

    @property
    def num_tiles(self) -> int:
        """Of one row."""
        return self.words.shape[2]


def pack_matrices(blocks: Tensor, scales: Tensor, row_order: Tensor | None = None) -> PackedMatrices:
    """blocks uint8 [experts, rows, groups, 16], scales uint8 [experts, rows, groups], as published, no NaN; `row_order` int64 [rows]."""
    num_experts, num_rows, num_groups = scales.shape
    assert blocks.shape == (*scales.shape, BLOCK // 2)
    largest = int(scales.max()) if scales.numel() else 0
    assert largest < NAN_SCALE, "the reader refuses such a checkpoint"
    stripes, tiles = triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(num_groups, TILE_GROUPS)
    words = torch.zeros(num_experts, stripes, tiles, TILE_ROWS, TILE_WORDS, dtype=torch.int32, device=blocks.device)
    packed_scales = torch.zeros(words.shape[:-1], dtype=torch.int32, device=blocks.device)
    for expert in range(num_experts):  # one at a time, to bound the scratch memory
        order = slice(None) if row_order is None else row_order
        words[expert] = _pack_words(_tile(blocks[expert, order], stripes, tiles))
        tiled = _tile(scales[expert, order].unsqueeze(-1), stripes, tiles).squeeze(-1).contiguous()
        packed_scales[expert] = tiled.view(torch.int32).squeeze(-1)
    return PackedMatrices(words, packed_scales, num_rows, num_groups * BLOCK, largest > LARGEST_PLAIN_SCALE)


def _tile(x: Tensor, stripes: int, tiles: int) -> Tensor:
    """[rows, groups, n] → [stripes, tiles, 64, 4, n], padded with zeros."""
    padded = x.new_zeros(stripes * TILE_ROWS, tiles * TILE_GROUPS, x.shape[2])
    padded[: x.shape[0], : x.shape[1]] = x
    return padded.view(stripes, TILE_ROWS, tiles, TILE_GROUPS, x.shape[2]).transpose(1, 2)


def _pack_words(tiles: Tensor) -> Tensor:
    """uint8 [..., 4, 16], each byte a group's values at columns 2j (low) and 2j + 1 → int32 [..., 16]."""
    low, high = _pack_half(tiles & 15), _pack_half(tiles >> 4)
    return low | (high << 16)


def _pack_half(codes: Tensor) -> Tensor:
    """E2M1 codes (seem) uint8 [..., 4, 16] → int32 [..., 16] under 2^16."""
    *plain, last = codes.to(torch.int32).unbind(-2)
    half = (last & 8) << 11 | (last & 6) << 9 | (last & 1) << 13
    for group, code in enumerate(plain):
        half |= ((code & 8) << 12 | (code & 7) << 6) >> (3 * group)
    return half


@triton.jit
def unpack_group(words: tl.tensor, scales: tl.tensor, GROUP: tl.constexpr, IS_WIDE: tl.constexpr) -> tl.tensor:
    """words int32 [rows, 16], scales int32 [rows] → the rows' 32 values in one of the tile's groups, exactly, as bfloat16 [rows, 32]."""
    # The masks are 0x81C081C0, 0x80008000, 0x01800180 and 0x00400040 as signed numbers: a bfloat16's bits in both halves.
    if GROUP < 3:  # noqa: SIM108
        pairs = (words << (3 * GROUP)) & -0x7E3F7E40
    else:
        pairs = ((words << 1) & -0x7FFF8000) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    bits = tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))
    tiny = tl.reshape(bits, (words.shape[0], 2 * words.shape[1])).to(tl.bfloat16, bitcast=True)  # the values times 2^-126
    scale = (scales >> (8 * GROUP)) & 0xFF
    if IS_WIDE:
        values = tiny * _power_of_two(tl.minimum(scale, 128) - 1)[:, None]
        return values * _power_of_two(tl.maximum(scale - 128, 0))[:, None]
    return tiny * _power_of_two(scale - 1)[:, None]  # 2^126 times 2^(scale - 127)


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    """int32 from -126 to 127 → bfloat16."""
    return ((exponent + 127) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def multiply_tiles(
    x: tl.tensor, x_starts: tl.tensor, is_x_row: tl.tensor, words: tl.tensor, scales: tl.tensor, matrix_rows: tl.tensor,
    num_columns: int, num_tiles: int, first: int, end: int, IS_WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tiles [first, end) of one matrix times rows of x, in steps of 32 columns → float32 [matrix rows, x rows].

    x_starts [x rows] says where in `x` each row begins; rows that are not `is_x_row` count as zeros. `words` and `scales` point to the
    matrix. The matrix stands on the left, since that is the factor that a tensor core takes from registers, where it was unpacked.
    """
    tile_rows = (matrix_rows // 64) * num_tiles * 64 + matrix_rows % 64
    word_columns, columns = tl.arange(0, 16), tl.arange(0, 32)
    total = tl.zeros((matrix_rows.shape[0], x_starts.shape[0]), tl.float32)
    for tile in range(first, end):
        tile_words = tl.load(words + (tile_rows + tile * 64)[:, None] * 16 + word_columns[None, :])
        tile_scales = tl.load(scales + tile_rows + tile * 64)
        for group in tl.static_range(4):
            begin = tl.minimum(tile * 128 + group * 32, num_columns - 32)  # the zeros beside the matrix meet any columns
            x_group = tl.load(x + x_starts[None, :] + begin + columns[:, None], mask=is_x_row[None, :], other=0.0)
            values = unpack_group(tile_words, tile_scales, group, IS_WIDE).to(x_group.dtype)
            total = tl.dot(values, x_group, total, input_precision="ieee")
    return total
