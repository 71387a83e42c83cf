"""A published gpt-oss checkpoint: which tensors it must hold, in which shapes, and the check that it does, before a weight is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from worker.model_config import MXFP4_BLOCK, ModelConfig, read_config
from worker.safetensors_files import INDEX_FILE, CheckpointError, SafetensorsFiles

__all__ = ["Checkpoint", "CheckpointError", "TensorSpec", "count_parameters", "expected_tensors"]

PACKED_BYTES = MXFP4_BLOCK // 2  # two values a byte
DENSE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class TensorSpec:
    """`is_packed`: MXFP4 blocks or scales, which are bytes; the others are floating point, bfloat16 as published."""

    shape: tuple[int, ...]
    is_packed: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint by its published name, in the order of the forward pass."""
    embedding = TensorSpec((config.vocab_size, config.hidden_size))
    tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": spec for name, spec in _layer_tensors(config).items()}
    return tensors | {"model.norm.weight": TensorSpec((config.hidden_size,)), "lm_head.weight": embedding}


def _layer_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    hidden, experts, intermediate = config.hidden_size, config.num_local_experts, config.intermediate_size
    query_width, key_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm.weight": TensorSpec((hidden,)),
        "self_attn.q_proj.weight": TensorSpec((query_width, hidden)),
        "self_attn.q_proj.bias": TensorSpec((query_width,)),
        "self_attn.k_proj.weight": TensorSpec((key_width, hidden)),
        "self_attn.k_proj.bias": TensorSpec((key_width,)),
        "self_attn.v_proj.weight": TensorSpec((key_width, hidden)),
        "self_attn.v_proj.bias": TensorSpec((key_width,)),
        "self_attn.sinks": TensorSpec((config.num_attention_heads,)),
        "self_attn.o_proj.weight": TensorSpec((hidden, query_width)),
        "self_attn.o_proj.bias": TensorSpec((hidden,)),
        "post_attention_layernorm.weight": TensorSpec((hidden,)),
        "mlp.router.weight": TensorSpec((experts, hidden)),
        "mlp.router.bias": TensorSpec((experts,)),
        "mlp.experts.gate_up_proj_blocks": TensorSpec((experts, 2 * intermediate, hidden // MXFP4_BLOCK, PACKED_BYTES), is_packed=True),
        "mlp.experts.gate_up_proj_scales": TensorSpec((experts, 2 * intermediate, hidden // MXFP4_BLOCK), is_packed=True),
        "mlp.experts.gate_up_proj_bias": TensorSpec((experts, 2 * intermediate)),
        "mlp.experts.down_proj_blocks": TensorSpec((experts, hidden, intermediate // MXFP4_BLOCK, PACKED_BYTES), is_packed=True),
        "mlp.experts.down_proj_scales": TensorSpec((experts, hidden, intermediate // MXFP4_BLOCK), is_packed=True),
        "mlp.experts.down_proj_bias": TensorSpec((experts, hidden)),
    }


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(total, active): active leaves out the experts that a token is not routed to and the embedding, of which it reads one row."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    dense = sum(spec.num_elements for name, spec in expected_tensors(config).items() if ".experts." not in name)
    expert = config.num_hidden_layers * (3 * hidden * intermediate + 2 * intermediate + hidden)
    total = dense + config.num_local_experts * expert
    active = dense + config.num_experts_per_tok * expert - config.vocab_size * hidden
    return total, active


class Checkpoint:
    """An opened checkpoint whose config, tensor names, shapes, dtypes and file sizes have been checked. Close it by leaving `with`."""

    def __init__(self, model_dir: Path) -> None:
        self.config = read_config(model_dir)
        self._files = SafetensorsFiles(model_dir)
        try:
            self._check(model_dir)
        except CheckpointError:
            self._files.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def _check(self, model_dir: Path) -> None:
        for name, spec in expected_tensors(self.config).items():
            entry = self._files.entries.get(name)
            if entry is None:
                raise CheckpointError(f"{model_dir} holds no tensor {name}: it needs a whole gpt-oss checkpoint as published.")
            if entry.shape != spec.shape:
                raise CheckpointError(
                    f"{entry.file}: {name} has shape {list(entry.shape)} where config.json asks for {list(spec.shape)}: "
                    "take both from the same model."
                )
            allowed = ("U8",) if spec.is_packed else tuple(DENSE_BYTES)
            if entry.dtype not in allowed:
                raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}, must be {' or '.join(allowed)}: convert it.")
        num_bytes = sum(math.prod(entry.shape) * DENSE_BYTES.get(entry.dtype, 1) for entry in self._files.entries.values())
        if self._files.promised_bytes not in (None, num_bytes):
            raise CheckpointError(
                f"{model_dir / INDEX_FILE} promises {self._files.promised_bytes} bytes of tensors, the files hold {num_bytes}: "
                "download the checkpoint again."
            )

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The slice of a tensor, in the file's dtype on the CPU; reads those bytes only."""
        return self._files.read(name, slices)

    def count_bytes(self, name: str, slices: tuple[slice, ...]) -> int:
        """How many bytes `read` would read."""
        entry = self._files.entries[name]
        lengths = (len(range(*part.indices(length))) for part, length in zip(slices, entry.shape, strict=True))
        return math.prod(lengths) * DENSE_BYTES.get(entry.dtype, 1)

    def digest(self) -> str:
        return self._files.digest()
