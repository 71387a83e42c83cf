"""Attention for training: over blocks of sequences, each with the prefix that they share, and a sink of 0 as a key of zeros."""

from collections.abc import Sequence

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

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> Tensor:
        """Of all rows, or of those `wanted`."""
        q, k, v = (linear(x).view(len(x), -1, HEAD_DIM) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        sizes = [block.rows.stop - block.rows.start for block in batch.blocks]
        queries, keys, values = (part.split(sizes) for part in (q, k, v))  # at once: a slice's gradient would be as long as the whole
        attended = []
        for at, block in enumerate(batch.blocks):
            around = [_with_prefix(block, part[at], self._prefix(block, part)) for part in (keys, values)]
            attended.append(self._attend(block, queries[at], *around))
        rows = torch.cat(attended).flatten(1)
        return self.o_proj.forward(rows if wanted is None else rows.index_select(0, wanted))

    def _prefix(self, block: Block, parts: Sequence[Tensor]) -> Tensor | None:
        """What the block's sequences begin with; only its end, where no more is within any window."""
        if block.prefix is None:
            return None
        return parts[block.prefix][1 - SPEC.sliding_window :] if self.is_window else parts[block.prefix]

    def _attend(self, block: Block, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[rows of the block, heads, 64]"""
        num_keys = keys.shape[2] - 1
        mask = block.mask(num_keys, SPEC.sliding_window if self.is_window else num_keys)
        out = functional.scaled_dot_product_attention(block.pad(q).transpose(1, 2), keys, values, attn_mask=mask)
        return block.unpad(out.transpose(1, 2))


def _with_prefix(block: Block, own: Tensor, prefix: Tensor | None) -> Tensor:
    """Keys or values [rows, heads, 64] → [sequences, heads, 1 + prefix + length, 64], with the sink's zeros first."""
    start = own.new_zeros(1, *own.shape[1:]) if prefix is None else functional.pad(prefix, (0, 0, 0, 0, 1, 0))
    before = start.transpose(0, 1).unsqueeze(0).expand(block.num_sequences, -1, -1, -1)
    return torch.cat((before, block.pad(own).transpose(1, 2)), 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
