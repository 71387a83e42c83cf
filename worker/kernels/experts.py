"""The chosen experts' feed-forward networks: for each of a token's experts, down(swiglu(gate_up(x))), weighted and summed.

An `ExpertsOp` is made once from the packed weights of a layer and then called step by step. There is a form for each kind of device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from worker.kernels import cpu
from worker.kernels.linear import linear_reference
from worker.kernels.mxfp4 import BLOCK, decode_mxfp4


@dataclass(frozen=True)
class ExpertsWeights:
    """One rank's experts of one layer as published; `intermediate` is this rank's share of the columns and may be 0.

    Gate and up rows take turns. The down bias is not here: it is added once, after the ranks' sum.
    """

    gate_up_blocks: Tensor  # uint8 [experts, 2 * intermediate, hidden / 32, 16]
    gate_up_scales: Tensor  # uint8 [experts, 2 * intermediate, hidden / 32]
    gate_up_bias: Tensor  # [experts, 2 * intermediate], in the model's dtype
    down_blocks: Tensor  # uint8 [experts, hidden, intermediate / 32, 16]
    down_scales: Tensor  # uint8 [experts, hidden, intermediate / 32]
    alpha: float
    limit: float

    def __post_init__(self) -> None:
        num_experts, double_intermediate, hidden = self.num_experts, 2 * self.intermediate, self.hidden
        assert self.gate_up_blocks.shape == (num_experts, double_intermediate, hidden // BLOCK, BLOCK // 2)
        assert self.gate_up_scales.shape == self.gate_up_blocks.shape[:-1]
        assert self.gate_up_bias.shape == (num_experts, double_intermediate)
        assert self.down_blocks.shape == (num_experts, hidden, self.intermediate // BLOCK, BLOCK // 2)
        assert self.down_scales.shape == self.down_blocks.shape[:-1]

    @property
    def num_experts(self) -> int:
        return len(self.gate_up_bias)

    @property
    def intermediate(self) -> int:
        return self.gate_up_bias.shape[1] // 2

    @property
    def hidden(self) -> int:
        return self.down_scales.shape[1]


class ExpertsOp(Protocol):
    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """One rank's part of the experts' output, in x's dtype: the ranks' parts and the weighted down bias are yet to be added up.

        x [rows, hidden], expert_ids int64 and expert_weights float32 [rows, chosen].
        """
        ...


def prepare_experts(weights: ExpertsWeights) -> ExpertsOp:
    """The form that suits the weights' device and dtype. May keep the tensors of `weights`, or what it makes of them instead."""
    if weights.gate_up_blocks.is_cuda:
        from worker.kernels.experts_triton import TritonExperts  # a worker without a GPU needs no Triton

        return TritonExperts(weights)
    if cpu.is_compiled(weights.gate_up_blocks.device):
        gate_up = weights.gate_up_blocks.contiguous(), weights.gate_up_scales.contiguous()
        down = weights.down_blocks.contiguous(), weights.down_scales.contiguous()
        return cpu.Experts(gate_up, weights.gate_up_bias.float().contiguous(), down, weights.alpha, weights.limit)
    return DenseExperts(weights)


def add_down_bias(x: Tensor, down_bias: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """x [rows, hidden], the ranks' sum, plus the chosen experts' weighted rows of down_bias [experts, hidden], in x's dtype."""
    assert x.shape[1] == down_bias.shape[1] and expert_ids.shape == expert_weights.shape == (len(x), expert_ids.shape[1])
    if x.is_cuda:
        from worker.kernels.experts_triton import add_down_bias_triton  # a worker without a GPU needs no Triton

        return add_down_bias_triton(x, down_bias, expert_ids, expert_weights)
    if x.dtype == torch.float32 and cpu.is_compiled(x.device):
        return cpu.add_down_bias(x, down_bias, expert_ids, expert_weights)
    return add_down_bias_reference(x, down_bias, expert_ids, expert_weights)


def add_down_bias_reference(x: Tensor, down_bias: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    return x + (down_bias[expert_ids] * expert_weights.unsqueeze(-1)).sum(1).to(x.dtype)


class DenseExperts:
    """The reference: decoded once, then grouped by expert, so that a step reads each expert's weights once."""

    def __init__(self, weights: ExpertsWeights) -> None:
        dtype = weights.gate_up_bias.dtype
        self.gate_up_proj = decode_mxfp4(weights.gate_up_blocks, weights.gate_up_scales, dtype)
        self.gate_up_proj_bias = weights.gate_up_bias
        self.down_proj = decode_mxfp4(weights.down_blocks, weights.down_scales, dtype)
        self.alpha, self.limit = weights.alpha, weights.limit

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        assert x.shape[1] == self.down_proj.shape[1] and expert_ids.shape == expert_weights.shape == (len(x), expert_ids.shape[1])
        return experts_reference(
            x, expert_ids, expert_weights, self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.alpha, self.limit
        )


def experts_reference(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_bias: Tensor,
    down_proj: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """x [rows, hidden], gate_up_proj [experts, 2 * intermediate, hidden], down_proj [experts, hidden, intermediate] → [rows, hidden].

    A row's sum runs over its experts in the order of their ranks.
    """
    num_chosen = expert_ids.shape[1]
    by_expert = expert_ids.flatten().argsort(stable=True)  # positions in [rows * chosen], grouped by expert
    counts = expert_ids.flatten().bincount(minlength=len(gate_up_proj)).tolist()
    outputs = x.new_empty(len(by_expert), x.shape[1])
    for expert, places in enumerate(torch.split(by_expert, counts)):
        if len(places):
            gate_up = linear_reference(x[places // num_chosen], gate_up_proj[expert], gate_up_proj_bias[expert])
            outputs[places] = linear_reference(swiglu(gate_up, alpha, limit), down_proj[expert])
    weighted = outputs.view(*expert_ids.shape, -1).float() * expert_weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate_up [rows, 2 * n] with gate and up columns taking turns → (up + 1) * gate * sigmoid(alpha * gate), both clamped to the limit."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)
