"""What routing and experts launch at the published width for a token, a decode batch and a prefill chunk, to be compiled without a GPU."""

import torch

from worker.kernels.experts import ExpertsWeights
from worker.kernels.experts_triton import TritonExperts, add_down_bias_triton
from worker.kernels.routing_triton import route_triton

HIDDEN, INTERMEDIATE, NUM_EXPERTS, NUM_CHOSEN = 2880, 2880, 2, 2


def launch_kernels() -> None:
    route_triton(torch.zeros(3, 128, dtype=torch.bfloat16), 4)
    gate_up, down = (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32), (NUM_EXPERTS, HIDDEN, INTERMEDIATE // 32)
    packed = [torch.zeros(*shape, dtype=torch.uint8) for shape in ((*gate_up, 16), gate_up, (*down, 16), down)]
    bias = torch.zeros(NUM_EXPERTS, 2 * INTERMEDIATE, dtype=torch.bfloat16)
    experts = TritonExperts(ExpertsWeights(packed[0], packed[1], bias, packed[2], packed[3], 1.702, 7.0))
    for num_rows in (1, 17, 128):
        chosen = torch.zeros(num_rows, NUM_CHOSEN, dtype=torch.int64)
        shares = torch.zeros(num_rows, NUM_CHOSEN)
        out = experts(torch.zeros(num_rows, HIDDEN, dtype=torch.bfloat16), chosen, shares)
        add_down_bias_triton(out, torch.zeros(NUM_EXPERTS, HIDDEN, dtype=torch.bfloat16), chosen, shares)
