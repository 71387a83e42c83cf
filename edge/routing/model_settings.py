"""What the operator says of each model: other names, the defaults of its requests, its price. Read once, from a YAML file.

models:
  gpt-oss-120b:
    aliases: [gpt-oss, openai/gpt-oss-120b]
    defaults: {max_tokens: 4096, temperature: 1.0, top_p: 1.0, reasoning_effort: high}
    price: {input: 0.10, cached_input: 0.02, output: 0.50}    # US dollars for a million tokens

The demonstration model has defaults of its own, which the file may change.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.config import EdgeConfig
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1.sampling_pb2 import Usage
from services.config import ConfigError

# It is small: the likeliest token is the one it learnt, and what goes on for longer has lost its way.
DEMONSTRATION: Mapping[str, Mapping[str, object]] = {"ossia-nano": {"max_tokens": 1024, "temperature": 0.0}}

Dollars = Annotated[float, Field(ge=0, le=1e6)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Defaults(_Strict):
    """What a request gets where it names nothing else."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31)] = 2048
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    reasoning_effort: Literal["low", "medium", "high"] = "medium"

    @property
    def effort(self) -> inference.ReasoningEffort.ValueType:
        return inference.ReasoningEffort.Value(f"REASONING_EFFORT_{self.reasoning_effort.upper()}")


class Price(_Strict):
    """US dollars for a million tokens. What is found in a cache costs `cached_input`, where that is given."""

    input: Dollars = 0.0
    cached_input: Dollars | None = None
    output: Dollars = 0.0

    def cost_usd(self, usage: Usage) -> float:
        cached = self.input if self.cached_input is None else self.cached_input
        uncached_tokens = usage.prompt_tokens - usage.cached_tokens
        return (uncached_tokens * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6


class ModelSettings(_Strict):
    aliases: tuple[str, ...] = ()
    defaults: Defaults = Defaults()
    price: Price = Price()


class _File(_Strict):
    models: dict[str, dict[str, object]]


def read_settings(config: EdgeConfig) -> Mapping[str, ModelSettings]:
    """The settings by model; "" holds those of a model that the file does not name. Raises ConfigError naming the file and the field."""
    shipped = {
        "max_tokens": config.default_max_tokens,
        "temperature": config.default_temperature,
        "top_p": config.default_top_p,
        "reasoning_effort": config.default_effort,
    }
    settings = {
        name: ModelSettings(defaults=Defaults.model_validate({**shipped, **own})) for name, own in {"": {}, **DEMONSTRATION}.items()
    }
    if config.models_file is None:
        return settings
    try:
        asked = _File.model_validate(yaml.safe_load(config.models_file.read_text()))
        for name, entry in asked.models.items():
            defaults = entry.get("defaults", {})
            own = {**shipped, **DEMONSTRATION.get(name, {}), **_as_object(defaults)}
            settings[name] = ModelSettings.model_validate({**entry, "defaults": own})
        _check_names(settings)
    except (OSError, yaml.YAMLError, ValueError) as error:
        reason = error.errors()[0]["msg"] + f" at {error.errors()[0]['loc']}" if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"--models-file {config.models_file}: {reason}") from None
    return settings


def _as_object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError("defaults must be an object")
    return value


def _check_names(settings: Mapping[str, ModelSettings]) -> None:
    names = [name for model, entry in settings.items() for name in (model, *entry.aliases)]
    if len(set(names)) < len(names):
        raise ValueError("a name stands for two models; give each model and alias a name of its own")
