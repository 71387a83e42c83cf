"""gpt-oss as equations. One class a block, attributes named as in the checkpoint, collectives where they happen.

Every rank holds its heads, its part of the vocabulary and its columns of each expert; hidden states are whole on every rank.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from worker.input_batch import InputBatch
from worker.kernels.attention import PagedBatch, paged_attention
from worker.kernels.experts import ExpertsWeights, add_down_bias, prepare_experts
from worker.kernels.kv_store import rotate_and_store
from worker.kernels.linear import linear
from worker.kernels.rms_norm import add_rms_norm, rms_norm
from worker.kernels.rope import rotation, yarn_frequencies
from worker.kernels.routing import route
from worker.kv_cache import KVCache
from worker.model_config import SLIDING, ModelConfig
from worker.tensor_parallel import ShardPlan, TensorParallel

# Gives this rank's part of a tensor by its published name: packed bytes as they are, the others in the model's dtype; matrices and the
# embedding may come in fewer bits, where `linear` reads them so.
Weights = Callable[[str], Tensor]


class Linear:
    """One of the checkpoint's, or several that read the same input as one: their outputs side by side."""

    def __init__(self, weights: Weights, *names: str) -> None:
        self.weight = torch.cat([weights(f"{name}.weight") for name in names])
        self.bias = torch.cat([weights(f"{name}.bias") for name in names])

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm:
    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        self.weight = weights(f"{name}.weight")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Attention:
    """Grouped-query attention with a learned sink per head, over the whole context or over a sliding window."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, window: int, tensor_parallel: TensorParallel) -> None:
        self.qkv_proj = Linear(weights, f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        self.o_proj = Linear(weights, f"{name}.o_proj")
        self.o_proj_bias = self.o_proj.bias if tensor_parallel.rank == 0 else None  # once in the ranks' sum
        self.sinks = weights(f"{name}.sinks")
        self.head_dim = config.head_dim
        num_kv_heads = (len(self.qkv_proj.bias) // self.head_dim - len(self.sinks)) // 2
        self.num_heads = [len(self.sinks), num_kv_heads, num_kv_heads]  # of q, k and v
        self.window = window
        self.tensor_parallel = tensor_parallel

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: tuple[Tensor, Tensor], batch: PagedBatch) -> Tensor:
        q, k, v = torch.split(self.qkv_proj.forward(x).view(x.shape[0], -1, self.head_dim), self.num_heads, dim=1)
        q = rotate_and_store(q, k, v, cos, sin, *kv_cache, batch.slot_mapping)
        attended = paged_attention(q, *kv_cache, self.sinks, batch, scale=self.head_dim**-0.5, window=self.window)
        return self.tensor_parallel.all_reduce(linear(attended.flatten(1), self.o_proj.weight, self.o_proj_bias))


class Experts:
    """All experts, each with this rank's share of the intermediate columns."""

    def __init__(self, weights: Weights, name: str, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        self.compute = prepare_experts(
            ExpertsWeights(
                gate_up_blocks=weights(f"{name}.gate_up_proj_blocks"),
                gate_up_scales=weights(f"{name}.gate_up_proj_scales"),
                gate_up_bias=weights(f"{name}.gate_up_proj_bias"),
                down_blocks=weights(f"{name}.down_proj_blocks"),
                down_scales=weights(f"{name}.down_proj_scales"),
                alpha=config.swiglu_alpha,
                limit=config.swiglu_limit,
            )
        )
        self.down_proj_bias = weights(f"{name}.down_proj_bias")
        self.tensor_parallel = tensor_parallel

    def forward(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        partial = self.compute(x, expert_ids, expert_weights)
        return add_down_bias(self.tensor_parallel.all_reduce(partial), self.down_proj_bias, expert_ids, expert_weights)


class MLP:
    def __init__(self, weights: Weights, name: str, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        self.router = Linear(weights, f"{name}.router")
        self.experts = Experts(weights, f"{name}.experts", config, tensor_parallel)
        self.num_chosen = config.num_experts_per_tok

    def forward(self, x: Tensor) -> Tensor:
        return self.experts.forward(x, *route(self.router.forward(x), self.num_chosen))


class Layer:
    def __init__(self, weights: Weights, index: int, config: ModelConfig, tensor_parallel: TensorParallel) -> None:
        name = f"model.layers.{index}"
        self.is_window = config.layer_types[index] == SLIDING
        window = config.sliding_window if self.is_window else 0
        self.input_layernorm = RMSNorm(weights, f"{name}.input_layernorm", config.rms_norm_eps)
        self.self_attn = Attention(weights, f"{name}.self_attn", config, window, tensor_parallel)
        self.post_attention_layernorm = RMSNorm(weights, f"{name}.post_attention_layernorm", config.rms_norm_eps)
        self.mlp = MLP(weights, f"{name}.mlp", config, tensor_parallel)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, kv_cache: tuple[Tensor, Tensor], batch: PagedBatch
    ) -> tuple[Tensor, Tensor]:
        """Takes and gives the hidden states as two summands, so that each sum is computed in one launch with the norm that follows."""
        normed, residual = self.input_layernorm.add(x, residual)
        normed, residual = self.post_attention_layernorm.add(self.self_attn.forward(normed, cos, sin, kv_cache, batch), residual)
        return self.mlp.forward(normed), residual


class Embedding:
    """This rank's part of the vocabulary; other ranks' tokens are zero here until the sum."""

    def __init__(self, weights: Weights, vocabulary: range, dtype: torch.dtype, tensor_parallel: TensorParallel) -> None:
        self.weight = weights("model.embed_tokens.weight")
        self.dtype = dtype
        self.vocabulary = vocabulary
        self.tensor_parallel = tensor_parallel

    def forward(self, token_ids: Tensor) -> Tensor:
        is_here = (token_ids >= self.vocabulary.start) & (token_ids < self.vocabulary.stop)
        local_ids = torch.where(is_here, token_ids - self.vocabulary.start, 0)
        return self.tensor_parallel.all_reduce(self.weight[local_ids].to(self.dtype) * is_here.unsqueeze(-1))


class GptOss:
    def __init__(self, weights: Weights, config: ModelConfig, plan: ShardPlan, tensor_parallel: TensorParallel) -> None:
        self.norm = RMSNorm(weights, "model.norm", config.rms_norm_eps)
        self.embed_tokens = Embedding(weights, plan.vocabulary, self.norm.weight.dtype, tensor_parallel)
        self.layers = [Layer(weights, index, config, tensor_parallel) for index in range(config.num_hidden_layers)]
        self.lm_head = weights("lm_head.weight")
        self.tensor_parallel = tensor_parallel
        rope = asdict(config.rope)
        self.attention_factor = rope.pop("attention_factor")
        self.frequencies = yarn_frequencies(config.head_dim, **rope).to(self.lm_head.device)

    def forward(self, batch: InputBatch, kv_cache: KVCache) -> Tensor:
        """Writes the batch's KV and gives its hidden states [rows, hidden]."""
        x, residual = self.embed_tokens.forward(batch.token_ids), None
        cos, sin = rotation(batch.positions, self.frequencies, self.attention_factor, x.dtype)
        for index, layer in enumerate(self.layers):
            x, residual = layer.forward(x, residual, cos, sin, kv_cache.layer(index), batch.window if layer.is_window else batch.full)
        return x if residual is None else x + residual

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] of the rows that draw → float32 logits [rows, vocabulary], whole on every rank."""
        return self.tensor_parallel.all_gather(linear(self.norm.forward(hidden), self.lm_head)).float()
