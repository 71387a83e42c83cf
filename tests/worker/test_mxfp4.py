"""The number format at its exact values, with zero tolerance."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.mxfp4 import VALUES, decode_mxfp4, encode_mxfp4
from worker.kernels.mxfp4_triton import PackedMatrices, pack_matrices, unpack_group

ALL_BYTES = torch.arange(256, dtype=torch.uint8).view(16, 16)


def _scales(byte: int) -> torch.Tensor:
    return torch.full((16,), byte, dtype=torch.uint8)


@pytest.mark.parametrize("scale", [0, 1, 2, 120, 126, 127, 128, 250, 252])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_decodes_exactly_low_half_first(scale: int, dtype: torch.dtype) -> None:
    expected = [math.ldexp(VALUES[half], scale - 127) for byte in range(256) for half in (byte & 15, byte >> 4)]
    assert decode_mxfp4(ALL_BYTES, _scales(scale), dtype).flatten().tolist() == expected


def test_the_largest_scale_keeps_what_float32_can_hold_and_the_reserved_one_is_nan() -> None:
    decoded = decode_mxfp4(ALL_BYTES, _scales(254), torch.float32).flatten()
    assert decoded[:6].tolist() == [0, 0, math.ldexp(0.5, 127), 0, math.ldexp(1.0, 127), 0]
    assert decoded[2 * 7].item() == math.inf
    assert decode_mxfp4(ALL_BYTES, _scales(255), torch.float32).isnan().all()


@pytest.mark.parametrize("scale", [0, 1, 2, 126, 127, 128, 252])
def test_encoding_gives_back_every_value_that_the_format_has(scale: int) -> None:
    values = decode_mxfp4(ALL_BYTES, _scales(scale), torch.float32)
    assert torch.equal(decode_mxfp4(*encode_mxfp4(values), torch.float32), values)


def test_encoding_rounds_to_the_nearest_value_and_ties_to_the_even_code() -> None:
    weights = torch.zeros(32)
    weights[:15] = torch.tensor([6.0, 0.25, 0.26, 0.74, 0.75, 1.25, 1.26, 1.75, 2.5, 2.6, 3.5, 4.9, 5.0, -5.1, -0.75])
    decoded = decode_mxfp4(*encode_mxfp4(weights), torch.float32)
    assert decoded[:15].tolist() == [6.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0, -6.0, -1.0]


def test_the_error_of_an_encoded_weight_is_bounded_by_its_groups_largest() -> None:
    weights = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    blocks, scales = encode_mxfp4(weights)
    assert (blocks.shape, scales.shape) == ((3, 5, 2, 16), (3, 5, 2))
    largest = weights.view(3, 5, 2, 32).abs().amax(-1, keepdim=True)
    error = (decode_mxfp4(blocks, scales, torch.float32) - weights).view(3, 5, 2, 32).abs()
    assert (error <= largest / 3).all()  # the widest gap, 4 to 6, against a largest value over 3


def test_zeros_encode_to_zeros_and_what_is_not_finite_is_refused() -> None:
    assert not decode_mxfp4(*encode_mxfp4(torch.zeros(64)), torch.float32).any()
    with pytest.raises(ValueError, match="finite"):
        encode_mxfp4(torch.full((32,), math.nan))


def test_blocks_and_scales_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        decode_mxfp4(ALL_BYTES, _scales(127)[:8], torch.float32)


@triton.jit
def _unpack(words: tl.tensor, scales: tl.tensor, out: tl.tensor, is_wide: tl.constexpr) -> None:
    """One program unpacks one tile of 64 rows by 128 columns."""
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    for group in tl.static_range(4):
        tile_words = tl.load(words + rows[:, None] * 16 + tl.arange(0, 16)[None, :])
        values = unpack_group(tile_words, tl.load(scales + rows), group, is_wide)
        tl.store(out + rows[:, None] * 128 + group * 32 + tl.arange(0, 32)[None, :], values)


def _unpack_all(packed: PackedMatrices) -> Tensor:
    """bfloat16 [experts, rows, columns], padding included."""
    num_experts, stripes, tiles = packed.words.shape[:3]
    out = torch.empty(num_experts, stripes, tiles, 64, 128, dtype=torch.bfloat16)
    _unpack[num_experts * stripes * tiles,](packed.words, packed.scales, out, is_wide=packed.is_wide)
    return out.transpose(2, 3).reshape(num_experts, stripes * 64, tiles * 128)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("scale", [0, 1, 2, 126, 127, 128, 129, 252, 253, 254])
def test_the_kernels_unpack_every_byte_in_every_group_exactly(scale: int) -> None:
    blocks = torch.stack([ALL_BYTES.roll(shift, 0) for shift in range(4)], 1).unsqueeze(0)  # [1, 16 rows, 4 groups, 16]
    scales = torch.full(blocks.shape[:-1], scale, dtype=torch.uint8)
    packed = pack_matrices(blocks, scales)
    assert packed.is_wide == (scale > 128)
    expected = decode_mxfp4(blocks, scales, torch.bfloat16)
    assert torch.equal(_unpack_all(packed)[:, :16].view(torch.int16), expected.view(torch.int16))  # zeros have signs, too


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("largest", [128, 254])
def test_packed_matrices_keep_every_value_in_its_place_and_are_zero_beside_them(largest: int) -> None:
    shape = (2, 70, 5)  # two rows of tiles and two tiles a row, both begun only
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(largest + 1, shape, dtype=torch.uint8, generator=generator)
    scales[0, 0, 0] = largest
    order = torch.randperm(70, generator=generator)
    packed = pack_matrices(blocks, scales, order)
    assert (packed.num_rows, packed.num_columns, packed.is_wide) == (70, 160, largest > 128)
    unpacked = _unpack_all(packed)
    assert torch.equal(unpacked[:, :70, :160], decode_mxfp4(blocks, scales, torch.bfloat16)[:, order])
    assert not unpacked[:, 70:].any() and not unpacked[:, :, 160:].any()
