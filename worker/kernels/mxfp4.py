"""MXFP4: 32 values of 4 bits (E2M1) under one 8-bit power of two (E8M0), as in the OCP Microscaling Formats specification v1.0.

A byte holds two values, the first in its low four bits.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the sign is the fourth bit
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))
BLOCK = 32
SCALE_BIAS, NAN_SCALE = 127, 255
CHUNK_GROUPS = 1 << 19  # groups decoded at a time, to bound the scratch memory

_PAIRS = torch.tensor([(VALUES[byte & 15], VALUES[byte >> 4]) for byte in range(256)])
_SCALES = torch.tensor([*(math.ldexp(1.0, byte - SCALE_BIAS) for byte in range(255)), math.nan])
# Upper ends of the intervals that round to each magnitude. A tie goes to the even code: every second border belongs to the code above it.
_BORDERS = torch.tensor([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
_BORDERS[1::2] = torch.nextafter(_BORDERS[1::2], torch.zeros(()))


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks uint8 [..., groups, 16], scales uint8 [..., groups] → [..., groups * 32]. Exact in float32 and bfloat16, up to overflow."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(f"blocks {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)} do not belong together")
    pairs, powers = _PAIRS.to(blocks.device), _SCALES.to(blocks.device)
    decoded = torch.empty(scales.numel(), BLOCK, dtype=dtype, device=blocks.device)
    flat_blocks, flat_scales = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1, 1)
    for begin in range(0, len(decoded), CHUNK_GROUPS):
        chunk = slice(begin, begin + CHUNK_GROUPS)
        decoded[chunk] = pairs[flat_blocks[chunk].int()].flatten(1) * powers[flat_scales[chunk].int()]
    return decoded.view(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def encode_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor]:
    """weights [..., groups * 32] → blocks uint8 [..., groups, 16], scales uint8 [..., groups], in float32.

    Each group takes the smallest power of two under which its largest value still fits; values round to the nearest, ties to the even code.
    """
    if not weights.isfinite().all():
        raise ValueError("MXFP4 has no infinity and no NaN: encode finite weights only")
    groups = weights.float().view(*weights.shape[:-1], -1, BLOCK)
    fraction, exponent = torch.frexp(groups.abs().amax(-1))  # largest = fraction * 2^exponent, and 6 = 0.75 * 2^3
    exponent = torch.where(fraction <= 0.75, exponent - 3, exponent - 2).clamp(-SCALE_BIAS, 254 - SCALE_BIAS)
    scales = torch.where(fraction == 0, 0, exponent + SCALE_BIAS).to(torch.uint8)
    scaled = torch.ldexp(groups, (SCALE_BIAS - scales.int()).unsqueeze(-1))
    codes = torch.bucketize(scaled.abs(), _BORDERS.to(weights.device)) + 8 * scaled.signbit()
    low, high = codes.to(torch.uint8).view(*scales.shape, BLOCK // 2, 2).unbind(-1)
    return low | (high << 4), scales
