"""What trained rows begin with where their ids have an order: numbers show their digits, and numbers and listed words where they stand.

So a sum begins with digits that are alike in "7" and "47", and sorting with items of which the neighbours are alike.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.nano.data.lists import WORDS
from models.nano.generated_rows import generated_rows
from services.vocabulary import load_vocabulary

_ONES, _TENS, _HUNDREDS, _PLACE = slice(0, 48), slice(48, 96), slice(96, 128), slice(128, 192)
_FIRST_MARK = 1 << 21  # marks have rows of their own, beyond all ids


def mark_order(rows: Tensor, row_ids: Sequence[int], seed: int, scale: float) -> Tensor:
    """[len(row_ids), hidden]: the rows with these marks written over some of their dimensions, +scale and -scale as the rest."""
    marks = generated_rows(range(_FIRST_MARK, _FIRST_MARK + 11), rows.shape[1], seed, scale).float()
    marked, at = rows.clone(), {token_id: place for place, token_id in enumerate(row_ids)}
    for number, token_id in _numbers():
        if token_id in at:
            row = marked[at[token_id]]
            for part, digit in ((_ONES, number % 10), (_TENS, number // 10 % 10), (_HUNDREDS, number // 100)):
                row[part] = marks[digit, part]
            row[_PLACE] = _place(marks[10, _PLACE], number % 100 / 100)
    for share, token_id in _words():
        if token_id in at:
            marked[at[token_id], _PLACE] = _place(marks[10, _PLACE], share)
    return marked


def _place(signs: Tensor, share: float) -> Tensor:
    """The first `share` of the signs turned, so that what stands near is alike."""
    return torch.where(torch.arange(len(signs)) < share * len(signs), -signs, signs)


def _numbers() -> Iterator[tuple[int, int]]:
    """(number, its id) of all that are one id."""
    vocabulary = load_vocabulary()
    for number in range(1000):
        token_ids = vocabulary.encode(str(number))
        assert len(token_ids) == 1
        yield number, token_ids[0]


def _words() -> Iterator[tuple[float, int]]:
    """(place in the alphabet among the listed words, first id), with and without a space before it."""
    vocabulary = load_vocabulary()
    for place, word in enumerate(sorted(WORDS)):
        for spelling in (word, f" {word}"):
            yield place / len(WORDS), vocabulary.encode(spelling)[0]
