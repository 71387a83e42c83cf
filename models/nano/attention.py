"""Attention for training: over blocks of sequences, each with the prefix that they share, and a sink of 0 as a key of zeros."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.nano.batches import Batch, Block
from models.nano.experts import Linear
from models.nano.spec import HEAD_DIM, SPEC


class Attention(nn.Module):
    def __init__(self, is_window: bool) -> None:
        super().__init__()
        hidden, heads, key_heads = SPEC.hidden_size, SPEC.num_attention_heads, SPEC.num_key_value_heads
        self.q_proj = Linear(hidden, heads * HEAD_DIM)
        self.k_proj = Linear(hidden, key_heads * HEAD_DIM)
        self.v_proj = Linear(hidden, key_heads * HEAD_DIM)
        self.o_proj = Linear(heads * HEAD_DIM, hidden)
        self.o_proj.weight.data *= 0.1
        self.is_window = is_window

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (linear(x).view(len(x), -1, HEAD_DIM) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = [self._attend(q, k, v, block) for block in batch.blocks]
        return self.o_proj.forward(torch.cat(attended).flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        """[rows of the block, heads, 64]"""
        sink = k.new_zeros(1, 1, 1, HEAD_DIM).expand(1, k.shape[1], -1, -1)
        before = [torch.cat((sink, part[block.prefix].transpose(0, 1).unsqueeze(0)), 2) for part in (k, v)]
        keys, values = (
            torch.cat((start.expand(block.num_sequences, -1, -1, -1), block.pad(part).transpose(1, 2)), 2)
            for start, part in zip(before, (k, v), strict=True)
        )
        mask = block.mask(SPEC.sliding_window if self.is_window else block.length + len(before[0][0, 0]))
        out = functional.scaled_dot_product_attention(block.pad(q).transpose(1, 2), keys, values, attn_mask=mask)
        return block.unpad(out.transpose(1, 2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
