"""The sizes and constants of one gpt-oss model, read from the published `config.json` and `generation_config.json`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from worker.safetensors_files import CheckpointError, read_json

ARCHITECTURE = "GptOssForCausalLM"
MXFP4_BLOCK = 32  # values that share one scale
T = TypeVar("T")
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; YaRN where `factor` is over 1 (https://arxiv.org/abs/2309.00071)."""

    theta: float
    factor: float
    attention_factor: float  # multiplies cos and sin
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the ramp's ends to whole dimensions
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Field names as published, `rope` aside."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int  # a token attends to itself and the sliding_window - 1 before it; 0: no window layers
    layer_types: tuple[str, ...]
    rope: RopeConfig
    rms_norm_eps: float
    swiglu_alpha: float
    swiglu_limit: float
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    @property
    def num_window_layers(self) -> int:
        return self.layer_types.count(SLIDING)

    @property
    def num_full_layers(self) -> int:
        return self.layer_types.count(FULL)


class _Fields:
    """Reads typed fields and gathers what is wrong, so that one error can list all of it. A bad field reads as its fallback."""

    def __init__(self, source: Mapping[str, object], prefix: str = "") -> None:
        self._source = source
        self._prefix = prefix
        self.problems: list[str] = []

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        value = self._source.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
            return value
        return self._report(name, f"an integer of at least {minimum}", minimum)

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._source.get(name, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            return float(value)
        return self._report(name, "a number over 0", 1.0)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._source.get(name, default)
        return value if isinstance(value, bool) else self._report(name, "true or false", default)

    def fixed(self, name: str, only: object) -> None:
        """The one value that the model code computes; absent counts as that value."""
        if self._source.get(name, only) != only:
            self._report(name, f"{only!r}, nothing else is supported", only)

    def table(self, name: str) -> Mapping[str, object]:
        value = self._source.get(name)
        return value if isinstance(value, dict) else self._report(name, "an object", {})

    def _report(self, name: str, wanted: str, fallback: T) -> T:
        found = repr(self._source[name]) if name in self._source else "missing"
        self.problems.append(f"{self._prefix}{name} is {found}, must be {wanted}")
        return fallback


def read_config(model_dir: Path) -> ModelConfig:
    """Raises `CheckpointError` with everything that is wrong in the two files."""
    config = read_json(model_dir / "config.json")
    generation_file = model_dir / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    return parse_config(config, generation, source=str(model_dir / "config.json"))


def parse_config(config: Mapping[str, object], generation: Mapping[str, object], *, source: str = "config.json") -> ModelConfig:
    fields = _Fields(config)
    _check_architecture(fields, config)
    num_layers = fields.integer("num_hidden_layers")
    layer_types = _read_layer_types(fields, config, num_layers)
    max_positions = fields.integer("max_position_embeddings")
    chosen_name = "num_experts_per_tok" if "num_experts_per_tok" in config else "experts_per_token"
    parsed = ModelConfig(
        num_hidden_layers=num_layers,
        hidden_size=fields.integer("hidden_size"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        intermediate_size=fields.integer("intermediate_size"),
        num_local_experts=fields.integer("num_local_experts"),
        num_experts_per_tok=fields.integer(chosen_name),
        sliding_window=fields.integer("sliding_window") if SLIDING in layer_types else 0,
        layer_types=layer_types,
        rope=_read_rope(fields, config, max_positions),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-5),
        swiglu_alpha=fields.number("swiglu_alpha", default=1.702),
        swiglu_limit=fields.number("swiglu_limit", default=7.0),
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=max_positions,
        eos_token_ids=_read_eos(fields, config, generation),
    )
    problems = fields.problems or _check_sizes(parsed)
    if problems:
        raise CheckpointError(f"{source} is not a gpt-oss model that can be served: {'; '.join(problems)}.")
    return parsed


def _check_architecture(fields: _Fields, config: Mapping[str, object]) -> None:
    fields.fixed("architectures", [ARCHITECTURE])
    fields.fixed("model_type", "gpt_oss")
    fields.fixed("attention_bias", True)
    fields.fixed("hidden_act", "silu")
    fields.fixed("tie_word_embeddings", False)
    quantization = fields.table("quantization_config")
    if quantization and quantization.get("quant_method") != "mxfp4":
        fields.problems.append(
            f"quantization_config.quant_method is {quantization.get('quant_method')!r}, must be 'mxfp4': convert the experts to MXFP4"
        )


def _read_layer_types(fields: _Fields, config: Mapping[str, object], num_layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types is None:
        return tuple((SLIDING, FULL)[layer % 2] for layer in range(num_layers))
    if isinstance(types, list) and len(types) == num_layers and all(kind in (SLIDING, FULL) for kind in types):
        return tuple(types)
    fields.problems.append(f"layer_types must list {SLIDING!r} or {FULL!r} for each of the {num_layers} layers")
    return ()


def _read_rope(fields: _Fields, config: Mapping[str, object], max_positions: int) -> RopeConfig:
    """`rope_scaling` beside `rope_theta` as published, or `rope_parameters` that holds both."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    table = fields.table(name)
    rope = _Fields({"rope_theta": config.get("rope_theta"), **table}, f"{name}.")
    kind = table.get("rope_type", table.get("type", "default"))
    factor = rope.number("factor") if kind == "yarn" else 1.0
    parsed = RopeConfig(
        theta=rope.number("rope_theta"),
        factor=factor,
        attention_factor=rope.number("attention_factor", default=0.1 * math.log(max(factor, 1.0)) + 1.0),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", default=max_positions),
    )
    if kind not in ("yarn", "default"):
        rope.problems.append(f"{name}.rope_type is {kind!r}, must be 'yarn' or 'default'")
    rope.problems += [f"{name}.{key} is not supported" for key in ("mscale", "mscale_all_dim", "partial_rotary_factor") if key in table]
    fields.problems += rope.problems
    return parsed


def _read_eos(fields: _Fields, config: Mapping[str, object], generation: Mapping[str, object]) -> tuple[int, ...]:
    """The ids that end a turn; `generation_config.json` knows more of them than `config.json`."""
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [eos] if isinstance(eos, int) else eos
    if isinstance(ids, list) and ids and all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        return tuple(ids)
    fields.problems.append("eos_token_id must be a token id or a list of them, here or in generation_config.json")
    return ()


def _check_sizes(config: ModelConfig) -> list[str]:
    problems = [
        f"{name} is {size}, must be a multiple of {multiple}"
        for name, size, multiple in (
            ("hidden_size", config.hidden_size, MXFP4_BLOCK),
            ("intermediate_size", config.intermediate_size, MXFP4_BLOCK),
            ("head_dim", config.head_dim, 2),
            ("num_attention_heads", config.num_attention_heads, config.num_key_value_heads),
        )
        if size % multiple
    ]
    if config.num_experts_per_tok > config.num_local_experts:
        problems.append(
            f"num_experts_per_tok is {config.num_experts_per_tok}, must be at most num_local_experts {config.num_local_experts}"
        )
    if not config.num_full_layers:
        problems.append(f"layer_types must have a layer of {FULL!r}")
    if max(config.eos_token_ids) >= config.vocab_size:
        problems.append(f"eos_token_id {list(config.eos_token_ids)} must lie under vocab_size {config.vocab_size}")
    return problems
