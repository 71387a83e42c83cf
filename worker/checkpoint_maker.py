"""Writes checkpoints as published: random ones of any size from a seed, or tensors that the caller brings.

A random tensor is a pure function of (seed, name, element): integer arithmetic only, so every device and every slice gives the same bytes.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from worker.checkpoint import TensorSpec, expected_tensors
from worker.kernels.mxfp4 import MAGNITUDES, SCALE_BIAS
from worker.model_config import ARCHITECTURE, FULL, SLIDING, ModelConfig, parse_config
from worker.safetensors_files import INDEX_FILE, CheckpointError

PUBLISHED_EOS = (200002, 200012, 199999)  # <|return|>, <|call|>, <|endoftext|>, which also pads
MAX_SHARD_BYTES = 5 * 1000**3
CHUNK_ELEMENTS = 1 << 18  # generated at a time: the scratch stays in the processor's cache
_RMS_OF_CODES = math.sqrt(sum(value**2 for value in MAGNITUDES) / len(MAGNITUDES))
# Multipliers of splitmix64's finaliser (https://doi.org/10.1145/2714064.2660195), as signed 64-bit integers
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class CheckpointSpec:
    """Sizes as in `config.json`; hidden_size and intermediate_size are multiples of 32."""

    num_hidden_layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 256
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_local_experts: int = 8
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    vocab_size: int = 201088
    max_position_embeddings: int = 131072
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    original_max_position_embeddings: int = 4096
    eos_token_ids: tuple[int, ...] = ()  # empty: the published ones, or the vocabulary's last id where it is smaller than they are
    max_shard_bytes: int = MAX_SHARD_BYTES

    def config_json(self) -> dict[str, object]:
        eos = self._eos()
        return {
            "architectures": [ARCHITECTURE],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": eos[0],
            "experts_per_token": self.num_experts_per_tok,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.original_max_position_embeddings,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": [(SLIDING, FULL)[layer % 2] for layer in range(self.num_hidden_layers)],
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.num_local_experts,
            "output_router_logits": False,
            "pad_token_id": eos[-1],
            "quantization_config": {
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": self.rope_factor,
                "original_max_position_embeddings": self.original_max_position_embeddings,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def generation_config_json(self) -> dict[str, object]:
        eos = self._eos()
        return {"do_sample": True, "eos_token_id": list(eos), "pad_token_id": eos[-1]}

    def _eos(self) -> tuple[int, ...]:
        fits = max(PUBLISHED_EOS) < self.vocab_size
        return self.eos_token_ids or (PUBLISHED_EOS if fits else (self.vocab_size - 1,))


def make_checkpoint(directory: Path, spec: CheckpointSpec, seed: int) -> None:
    """Writes a random checkpoint to `directory`, which must not exist yet. Holds one tensor at a time; the seed decides every byte."""
    config = parse_config(spec.config_json(), spec.generation_config_json(), source="the checkpoint's spec")
    write_checkpoint(directory, spec, lambda name: random_tensor(name, config, seed))


def write_checkpoint(directory: Path, spec: CheckpointSpec, tensor: Callable[[str], Tensor]) -> None:
    """Writes the tensors that `tensor` gives by published name, bfloat16 or packed bytes, shard by shard. Whole or not at all.

    Raises `CheckpointError` where the directory exists or the sizes in `spec` are no model.
    """
    write_published(directory, spec.config_json(), spec.generation_config_json(), tensor, spec.max_shard_bytes)


def write_published(
    directory: Path,
    config_json: dict[str, object],
    generation_config_json: dict[str, object],
    tensor: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """The same for a configuration that is at hand in its published form."""
    config = parse_config(config_json, generation_config_json, source="the checkpoint's configuration")
    if directory.exists():
        raise CheckpointError(f"{directory} exists: name a directory that does not.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_json(unfinished / "config.json", config_json)
        _write_json(unfinished / "generation_config.json", generation_config_json)
        _write_shards(unfinished, expected_tensors(config), max_shard_bytes, tensor)
        unfinished.chmod(0o755)  # mkdtemp's own mode keeps others out
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _write_shards(directory: Path, tensors: Mapping[str, TensorSpec], max_shard_bytes: int, tensor: Callable[[str], Tensor]) -> None:
    shards = list(_divide(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as stream:
            _write_shard(stream, shard, tensor)
            stream.flush()
            os.fsync(stream.fileno())
    total_size = sum(_num_bytes(spec) for spec in tensors.values())
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def _divide(tensors: Mapping[str, TensorSpec], max_shard_bytes: int) -> Iterator[dict[str, TensorSpec]]:
    """In order, each shard as full as it gets; a tensor is never divided, however large."""
    shard: dict[str, TensorSpec] = {}
    shard_bytes = 0
    for name, spec in tensors.items():
        if shard and shard_bytes + _num_bytes(spec) > max_shard_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        shard[name] = spec
        shard_bytes += _num_bytes(spec)
    yield shard


def _write_shard(stream: BinaryIO, shard: Mapping[str, TensorSpec], tensor: Callable[[str], Tensor]) -> None:
    """The safetensors format: header length, JSON header, then every tensor's bytes in the header's order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in shard.items():
        begin, end = end, end + _num_bytes(spec)
        header[name] = {"dtype": "U8" if spec.is_packed else "BF16", "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, spec in shard.items():
        written = tensor(name)
        assert written.shape == spec.shape and written.dtype == (torch.uint8 if spec.is_packed else torch.bfloat16), name
        stream.write(written.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)


def _num_bytes(spec: TensorSpec) -> int:
    return spec.num_elements * (1 if spec.is_packed else 2)


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def random_tensor(name: str, config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """One tensor of a random checkpoint, straight on the device: bfloat16, or uint8 for MXFP4 blocks and scales.

    Weights are scaled by their fan-in so that every layer's output is about as large as its input; norms lie around 1.
    """
    shape = expected_tensors(config)[name].shape
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)
    if name.endswith("_blocks"):
        return _fill(shape, torch.uint8, device, key, lambda bits: bits & 255)
    if name.endswith("_scales"):
        fan_in = config.intermediate_size if "down_proj" in name else config.hidden_size
        exponent = SCALE_BIAS + round(-math.log2(_RMS_OF_CODES * math.sqrt(fan_in)))
        return _fill(shape, torch.uint8, device, key, lambda bits: exponent - (bits & 1))  # blocks of two loudnesses
    mean, deviation = _distribution(name, shape)
    return _fill(shape, torch.bfloat16, device, key, lambda bits: mean + deviation * _normal(bits))


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith("sinks") or "embed_tokens" in name:
        return 0.0, 1.0
    return 0.0, shape[-1] ** -0.5


def _fill(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, key: int, draw: Callable[[Tensor], Tensor]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    flat = tensor.view(-1)
    for begin in range(0, len(flat), CHUNK_ELEMENTS):
        chunk = flat[begin : begin + CHUNK_ELEMENTS]
        chunk.copy_(draw(_hash(torch.arange(begin, begin + len(chunk), device=device) + key)))
    return tensor


def _hash(x: Tensor) -> Tensor:
    """int64 → int64 with every bit mixed: splitmix64's finaliser, modulo 2^64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _normal(bits: Tensor) -> Tensor:
    """About a normal variable of mean 0 and deviation 1: the sum of four 16-bit uniform ones, exact in float32."""
    total = sum(((bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)), start=torch.zeros_like(bits))
    return (total - 131070).float() / (65536 / math.sqrt(3))  # four uniforms on [0, 65535] have the deviation 65536 * sqrt(4 / 12)
