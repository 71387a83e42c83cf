"""Embedding rows for ids that no text trained, such that spellings of one word are alike.

" Brunle", "Brunle" and ".brunle" begin with different ids. Their rows share the signs of the word and differ in the last dimensions, which
say what stands before the word and whether it begins with a capital. So a word that was never trained can be copied out of a sentence into
JSON, where the space before it is gone.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from models.nano.generated_rows import generated_rows
from services.vocabulary import FIRST_CONTROL_ID, VOCAB_SIZE, load_vocabulary

_PREFIXES = b' ._-/"'
_PREFIX_DIMS, _CAPITAL_DIMS = 32, 16
_FIRST_MARK = 1 << 20  # marks have rows of their own, beyond all ids


def spelled_rows(ids: Sequence[int], hidden: int, seed: int, scale: float) -> Tensor:
    """[len(ids), hidden] bfloat16 of +scale and -scale, a function of seed and id. Raises ValueError as `generated_rows` does."""
    spellings = _spellings()
    words, prefixes, capitals = zip(*(spellings[token_id] for token_id in ids), strict=True)
    rows = generated_rows(words, hidden, seed, scale)
    marks = generated_rows(range(_FIRST_MARK, _FIRST_MARK + len(_PREFIXES) + 3), hidden, seed, scale)
    rows[:, -_PREFIX_DIMS - _CAPITAL_DIMS : -_CAPITAL_DIMS] = marks[torch.tensor(prefixes), :_PREFIX_DIMS]
    rows[:, -_CAPITAL_DIMS:] = marks[len(_PREFIXES) + 1 + torch.tensor(capitals), :_CAPITAL_DIMS]
    return rows


@lru_cache(maxsize=1)
def _spellings() -> list[tuple[int, int, int]]:
    """For each id: the least id with the same word, which prefix (0: none), and whether the word begins with a capital."""
    vocabulary = load_vocabulary()
    first_id: dict[bytes, int] = {}
    spellings: list[tuple[int, int, int]] = []
    for token_id in range(VOCAB_SIZE):
        text = vocabulary.token_bytes(token_id)
        prefix = _PREFIXES.find(text[:1]) + 1 if len(text) > 1 and token_id < FIRST_CONTROL_ID else 0
        word = text[1:] if prefix else text
        lowered = word[:1].lower() + word[1:]
        spellings.append((first_id.setdefault(lowered, token_id), prefix, int(lowered != word)))
    return spellings
