"""Words of which one spelling is trained have rows for the others too, so that what was learnt of one holds for all.

Training moves a row far from where it began. Where only " digest" has a row, "digest" stays behind, and the word is copied to the beginning
of a message in half of the cases only, while a word of which no spelling is trained is copied nearly always (`spelled_rows.py`).
Training also brings the two nearer to each other than they began, so that " digest" is said for "digest": `tell_apart` undoes that.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from models.nano.spec import ROW_SCALE
from models.nano.spelled_rows import Spelling, spelled_rows, spellings
from services.vocabulary import load_vocabulary

_COPIED_TO = b"", b" ", b"."  # as JSON, sentences and the name of a call have it
_LEAST_COSINE = 0.9  # of rows that spell one word; below it each spelling has a meaning of its own


def other_spellings(row_ids: Sequence[int]) -> dict[int, int]:
    """The ids that are not among `row_ids`, but spell a word that is, capitals and all: each with one of `row_ids` that spells it."""
    trained = {_word(spellings()[token_id]): token_id for token_id in reversed(row_ids) if _is_copied(token_id)}
    alike = defaultdict[tuple[int, bool], list[int]](list)
    for token_id, spelling in enumerate(spellings()):
        if _word(spelling) in trained and spelling.prefix in _COPIED_TO:
            alike[_word(spelling)].append(token_id)
    known = set(row_ids)
    return {other: token_id for word, token_id in trained.items() for other in alike[word] if other not in known}


def add_other_spellings(row_ids: Sequence[int], rows: Tensor, seed: int) -> tuple[list[int], Tensor]:
    """The ids and their rows [ids, hidden], with those of the other spellings after them: as far from the trained ones as they began."""
    others = other_spellings(row_ids)
    if not others:
        return list(row_ids), rows
    places = {token_id: place for place, token_id in enumerate(row_ids)}
    began, beside = (spelled_rows(list(ids), rows.shape[1], seed, ROW_SCALE).float() for ids in (others, others.values()))
    return [*row_ids, *others], torch.cat((rows, rows[[places[token_id] for token_id in others.values()]] + began - beside))


def tell_apart(row_ids: Sequence[int], rows: Tensor, seed: int) -> Tensor:
    """The rows [ids, hidden], where a word with and without a space differ by no less than in `spelled_rows`, in the same direction."""
    places = {spellings()[token_id]: place for place, token_id in enumerate(row_ids) if _is_copied(token_id)}
    plain = {spelling: spelling._replace(prefix=b"") for spelling in places if spelling.prefix == b" "}
    pairs = [(places[spelling], places[same]) for spelling, same in plain.items() if same in places]
    with_space, without = torch.tensor(pairs, dtype=torch.long).view(-1, 2).T
    began = spelled_rows(row_ids, rows.shape[1], seed, ROW_SCALE).float()
    mark = began[with_space] - began[without]
    share = ((rows[with_space] - rows[without]) * mark).sum(-1) / (mark * mark).sum(-1)
    is_alike = torch.cosine_similarity(rows[with_space], rows[without]) >= _LEAST_COSINE
    missing = ((1 - share).clamp(min=0) * is_alike).unsqueeze(-1) * mark / 2
    told = rows.clone()
    told[with_space] += missing
    told[without] -= missing
    return told


def _word(spelling: Spelling) -> tuple[int, bool]:
    return spelling.word, spelling.is_capital


def _is_copied(token_id: int) -> bool:
    """Whether the id spells a word with one of these prefixes."""
    prefix = spellings()[token_id].prefix
    return prefix in _COPIED_TO and load_vocabulary().token_bytes(token_id).removeprefix(prefix).isalpha()
