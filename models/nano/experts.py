"""Linear layers and the mixture of experts, for training: rows are sorted by expert, so that each computes its own at once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.nano.spec import SPEC, SWIGLU_ALPHA, SWIGLU_LIMIT
from worker.kernels.experts import swiglu


class Linear(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) * num_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class _Spread(torch.autograd.Function):
    """x [rows, hidden] → [rows * copies, hidden]: place p of the result is copy order[p] of all rows' copies."""

    @staticmethod
    def forward(context: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        context.save_for_backward(places)
        return x.index_select(0, torch.div(order, len(order) // len(x), rounding_mode="floor"))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = context.saved_tensors
        return gradient.index_select(0, places.flatten()).view(*places.shape, -1).sum(1), None, None


class _Gather(torch.autograd.Function):
    """y [rows * copies, hidden], in the order of `_Spread` → [rows, copies, hidden]."""

    @staticmethod
    def forward(context: Any, y: Tensor, order: Tensor, places: Tensor) -> Tensor:
        context.save_for_backward(order)
        return y.index_select(0, places.flatten()).view(*places.shape, -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (order,) = context.saved_tensors
        return gradient.flatten(0, 1).index_select(0, order), None, None


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, inner, experts = SPEC.hidden_size, SPEC.intermediate_size, SPEC.num_local_experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.1 * inner**-0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        order = expert_ids.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        places = places.view(expert_ids.shape)
        counts = expert_ids.flatten().bincount(minlength=len(self.gate_up_proj)).tolist()
        outputs = []
        spread: Tensor = _Spread.apply(x, order, places)  # type: ignore[no-untyped-call]  # torch types it so
        for expert, rows in enumerate(torch.split(spread, counts)):
            inner = swiglu(functional.linear(rows, self.gate_up_proj[expert], self.gate_up_proj_bias[expert]), SWIGLU_ALPHA, SWIGLU_LIMIT)
            outputs.append(functional.linear(inner, self.down_proj[expert], self.down_proj_bias[expert]))
        by_row: Tensor = _Gather.apply(torch.cat(outputs), order, places)  # type: ignore[no-untyped-call]
        return (by_row * expert_weights.to(x.dtype).unsqueeze(-1)).sum(1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Linear(SPEC.hidden_size, SPEC.num_local_experts)
        self.experts = Experts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and how unevenly the experts are used: 1 where all are used alike."""
        logits = self.router.forward(x).float()
        top = logits.topk(SPEC.num_experts_per_tok, dim=-1)
        shares = top.indices.flatten().bincount(minlength=SPEC.num_local_experts).float() / top.indices.numel()
        unevenness = SPEC.num_local_experts * (shares * logits.softmax(-1).mean(0)).sum()
        return self.experts.forward(x, top.indices, top.values.softmax(-1)), unevenness
