"""Rotary position embedding: the two halves of each head turn as pairs; YaRN stretches the slow ones (https://arxiv.org/abs/2309.00071)."""

import math

import torch
from torch import Tensor


def yarn_frequencies(
    head_dim: int, *, theta: float, factor: float, beta_fast: float, beta_slow: float, truncate: bool, original_max_position_embeddings: int
) -> Tensor:
    """Angle per position for each of the head_dim / 2 pairs, float32.

    Pairs that turn more than beta_fast times within the original context keep their frequency, those under beta_slow turns are slowed by
    `factor`, and a linear ramp joins the two. With factor 1 this is plain rotary embedding.
    """

    def pair_that_turns(num_turns: float) -> float:
        return head_dim * math.log(original_max_position_embeddings / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)  # the ramp needs a width
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (1 / (factor * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept


def rotation(positions: Tensor, frequencies: Tensor, attention_factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [rows], frequencies [head_dim / 2] → cos and sin [rows, head_dim / 2], both times attention_factor."""
    angles = positions.float().unsqueeze(1) * frequencies
    return (angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [rows, heads, head_dim], cos and sin [rows, head_dim / 2] → x with each pair (i, i + head_dim / 2) turned by its angle.

    Computed in float32, in x's dtype.
    """
    assert x.shape[0] == cos.shape[0] == sin.shape[0] and x.shape[2] == 2 * cos.shape[1]
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
