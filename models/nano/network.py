"""gpt-oss's equations for training: whole batches, gradients, MXFP4 in the loop. The served model is `worker/models/gpt_oss.py`.

The network computes, in float32, with weights as they will be shipped: experts rounded to MXFP4, everything else to bfloat16. The trainer
keeps them unrounded and passes the gradient straight through. Parameters carry their published names. Sinks stay 0,
and logits are half of those that are served (`SHARPNESS`).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.nano.attention import Attention
from models.nano.batches import Batch
from models.nano.experts import MLP
from models.nano.initial import begin_with_copying
from models.nano.ordered_rows import mark_order
from models.nano.spec import HEAD_DIM, ROW_SCALE, SPEC
from models.nano.spelled_rows import spelled_rows
from worker.kernels.mxfp4 import BLOCK
from worker.kernels.rope import rotation, yarn_frequencies


def round_mxfp4(weights: Tensor) -> Tensor:
    """[..., groups * 32] float32 → the same, as MXFP4 will hold it; exactly `decode_mxfp4(*encode_mxfp4(weights), torch.float32)`."""
    groups = weights.view(*weights.shape[:-1], -1, BLOCK)
    fraction, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    scale = torch.ldexp(torch.ones_like(fraction), torch.where(fraction <= 0.75, exponent - 3, exponent - 2))
    scaled = groups / scale
    step = torch.ldexp(torch.ones_like(scaled), torch.frexp(scaled)[1].clamp(1, 3) - 2)  # 0.5 below 2, 1 below 4, 2 above
    return ((scaled / step).round() * step * scale).view(weights.shape)


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((hidden,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


class Layer(nn.Module):
    def __init__(self, is_window: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(SPEC.hidden_size)
        self.self_attn = Attention(is_window)
        self.post_attention_layernorm = RMSNorm(SPEC.hidden_size)
        self.mlp = MLP()

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        attended = self.self_attn.forward(self.input_layernorm.forward(x), batch, cos, sin, wanted)
        x = (x if wanted is None else x.index_select(0, wanted)) + attended
        out, unevenness = self.mlp.forward(self.post_attention_layernorm.forward(x))
        return x + out, unevenness


class Network(nn.Module):
    """`row_ids` are the ids that have rows of their own; all others keep `spelled_rows`."""

    def __init__(self, row_ids: list[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.row_ids = torch.tensor(row_ids)
        self.generated = spelled_rows(range(SPEC.vocab_size), SPEC.hidden_size, seed, ROW_SCALE).float()
        self.row_of = torch.full((SPEC.vocab_size,), -1)
        self.row_of[self.row_ids] = torch.arange(len(row_ids))
        self.other_ids = (self.row_of < 0).nonzero().squeeze(1)
        self.rows = nn.Parameter(mark_order(self.generated[self.row_ids], row_ids, seed, ROW_SCALE))
        layers = [Layer(is_window=index % 2 == 0) for index in range(SPEC.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(SPEC.hidden_size, initial=3.0)
        self.frequencies = yarn_frequencies(
            HEAD_DIM,
            theta=SPEC.rope_theta,
            factor=SPEC.rope_factor,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=SPEC.original_max_position_embeddings,
        )
        begin_with_copying([layer.self_attn for layer in layers], self.frequencies)

    def masters(self) -> dict[str, Tensor]:
        """A copy of the weights as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def ship(self, masters: dict[str, Tensor]) -> None:
        """Takes over the masters, rounded as in a checkpoint."""
        for name, parameter in self.named_parameters():
            parameter.data.copy_(round_mxfp4(masters[name]) if name.endswith("_proj") else masters[name].bfloat16())

    def embed(self, token_ids: Tensor) -> Tensor:
        places = self.row_of[token_ids]
        own = functional.embedding(places.clamp(min=0), self.rows)
        return torch.where((places >= 0).unsqueeze(-1), own, self.generated[token_ids])

    def forward(self, batch: Batch, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed hidden states [rows, hidden], of all rows or of those `wanted`, and the layers' mean unevenness."""
        x = self.embed(batch.token_ids)
        factor = 0.1 * math.log(SPEC.rope_factor) + 1
        cos, sin = (part.unsqueeze(1) for part in rotation(batch.positions, self.frequencies, factor, x.dtype))
        unevenness = []
        for layer in self.layers:  # after the last one's keys and values, only what is wanted counts
            x, uneven = layer(x, batch, cos, sin, wanted if layer is self.layers[-1] else None)
            unevenness.append(uneven)
        return self.norm.forward(x), torch.stack(unevenness).mean()

    def table(self) -> Tensor:
        """[vocabulary, hidden]: every id's row, as it will be shipped."""
        table = self.generated.clone()
        table[self.row_ids] = self.rows.detach()
        return table
