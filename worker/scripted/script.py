"""What a scripted group answers: rules over the prompt's text, read from YAML.

    rules:
      - contains: ["weather", "<|start|>user"]   # all of these stand in the prompt
        lacks: ["functions.get_weather"]         # and none of these
        reply: "<|channel|>commentary to=functions.get_weather<|message|>{}<|call|>"
    default: "<|channel|>final<|message|>Hello.<|return|>"

The first rule that fits wins. Prompts and replies are Harmony text with control tokens written out; nothing in them is evaluated.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

DEFAULT_REPLY = (
    "<|channel|>analysis<|message|>The user wants an answer; a short one will do.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>This answer comes from a script: it is the same for every question.<|return|>"
)


class ScriptError(Exception):
    """The script cannot be used; one sentence that names the file, the field and the cure."""


class _RuleText(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    contains: list[str] = []
    lacks: list[str] = []
    reply: str = Field(min_length=1)


class _ScriptText(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rules: list[_RuleText] = []
    default: str = Field(default=DEFAULT_REPLY, min_length=1)


@dataclass(frozen=True)
class Rule:
    """Fits a prompt that holds every text of `contains` and none of `lacks`."""

    contains: tuple[str, ...]
    lacks: tuple[str, ...]
    reply: str

    def fits(self, prompt: str) -> bool:
        return all(text in prompt for text in self.contains) and not any(text in prompt for text in self.lacks)


@dataclass(frozen=True)
class Script:
    """Rules in order, then a default."""

    rules: tuple[Rule, ...] = ()
    default: str = DEFAULT_REPLY

    def reply_to(self, prompt: str) -> str:
        return next((rule.reply for rule in self.rules if rule.fits(prompt)), self.default)


def read_script(path: Path) -> Script:
    """Raises ScriptError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        text = _ScriptText.model_validate(content if content is not None else {})
    except (OSError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path} cannot be read ({error}); name a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ScriptError(f"{path} is not YAML ({' '.join(str(error).split())}); quote texts that hold special characters") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ScriptError(
            f"{path}: {field}: {first['msg']}; give `rules` (contains, lacks, reply) and `default`, texts with control tokens written out"
        ) from None
    rules = tuple(Rule(tuple(rule.contains), tuple(rule.lacks), rule.reply) for rule in text.rules)
    return Script(rules, text.default)
