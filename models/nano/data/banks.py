"""The phrases of the training text, from `phrases/*.yaml`."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

PHRASES = Path(__file__).parent / "phrases"


@lru_cache
def read_bank(name: str) -> dict[str, Any]:
    """Not to be changed. Of a list of phrases every sixth is held out, so their order matters."""
    content: dict[str, Any] = yaml.safe_load((PHRASES / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


@lru_cache
def phrase_words() -> frozenset[str]:
    """All words in small letters that stand in the files of phrases, keys and topics too; `names` aside, whose items are values."""
    banks = [path.read_text(encoding="utf-8") for path in PHRASES.glob("*.yaml") if path.stem != "names"]
    return frozenset(word for bank in banks for word in re.findall(r"[a-z]+", bank.lower()))
