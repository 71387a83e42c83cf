"""Which experts compute a token, and how much each of them counts."""

import torch
from torch import Tensor

from worker.kernels import cpu


def route(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """router_logits [rows, experts] → expert ids int64 and weights float32, both [rows, num_chosen], likeliest first.

    Of equal logits the lower id goes first. A row's weights add up to 1: softmax over the chosen.
    """
    assert router_logits.dim() == 2 and num_chosen <= router_logits.shape[1]
    if router_logits.is_cuda:
        from worker.kernels.routing_triton import route_triton  # a worker without a GPU needs no Triton

        return route_triton(router_logits, num_chosen)
    if cpu.is_compiled(router_logits.device):
        return cpu.route(router_logits, num_chosen)
    return route_reference(router_logits, num_chosen)


def route_reference(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.sort(router_logits.float(), dim=-1, descending=True, stable=True)  # topk says nothing about equal ones
    return ids[:, :num_chosen].contiguous(), values[:, :num_chosen].softmax(-1)
