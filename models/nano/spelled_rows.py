"""Embedding rows for ids that no text trained, such that spellings of one word are alike.

" Piogri", "Piogri" and ".piogri" begin with different ids. Their rows share the signs of the word and differ in the last dimensions, which
say what stands before the word and whether it begins with a capital. So a word that was never trained can be copied out of a sentence into
JSON, where the space before it is gone.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.nano.generated_rows import generated_rows
from services.vocabulary import FIRST_CONTROL_ID, VOCAB_SIZE, load_vocabulary

_PREFIXES = b"", b" ", b".", b"_", b"-", b"/", b'"'
_PREFIX_DIMS, _CAPITAL_DIMS = 32, 16
_FIRST_MARK = 1 << 20  # marks have rows of their own, beyond all ids


class Spelling(NamedTuple):
    """How an id spells a word."""

    word: int  # the least id with the same word
    prefix: bytes
    is_capital: bool


def spelled_rows(ids: Sequence[int], hidden: int, seed: int, scale: float) -> Tensor:
    """[len(ids), hidden] bfloat16 of +scale and -scale, a function of seed and id. Raises ValueError as `generated_rows` does."""
    words, prefixes, capitals = zip(*(spellings()[token_id] for token_id in ids), strict=True)
    rows = generated_rows(words, hidden, seed, scale)
    marks = generated_rows(range(_FIRST_MARK, _FIRST_MARK + len(_PREFIXES) + 2), hidden, seed, scale)
    places = [_PREFIXES.index(prefix) for prefix in prefixes]
    rows[:, -_PREFIX_DIMS - _CAPITAL_DIMS : -_CAPITAL_DIMS] = marks[torch.tensor(places), :_PREFIX_DIMS]
    rows[:, -_CAPITAL_DIMS:] = marks[len(_PREFIXES) + torch.tensor(capitals).int(), :_CAPITAL_DIMS]
    return rows


@lru_cache(maxsize=1)
def spellings() -> list[Spelling]:
    """That of each id."""
    vocabulary = load_vocabulary()
    first_id: dict[bytes, int] = {}
    found: list[Spelling] = []
    for token_id in range(VOCAB_SIZE):
        text = vocabulary.token_bytes(token_id)
        prefix = text[:1] if text[:1] in _PREFIXES and len(text) > 1 and token_id < FIRST_CONTROL_ID else b""
        word = text.removeprefix(prefix)
        lowered = word[:1].lower() + word[1:]
        found.append(Spelling(first_id.setdefault(lowered, token_id), prefix, lowered != word))
    return found
