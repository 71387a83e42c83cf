import torch

from models.nano.generated_rows import generated_rows
from models.nano.ordered_rows import mark_order
from services.vocabulary import load_vocabulary

HIDDEN, SEED, SCALE = 320, 20, 1 / 16


def rows_of(*texts: str) -> torch.Tensor:
    ids = [load_vocabulary().encode(text)[0] for text in texts]
    return mark_order(generated_rows(ids, HIDDEN, SEED, SCALE).float(), ids, SEED, SCALE)


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


def test_numbers_that_share_a_digit_are_alike() -> None:
    rows = rows_of("47", "42", "17", "85")
    assert min(likeness(rows[0], rows[1]), likeness(rows[0], rows[2])) > likeness(rows[0], rows[3]) + 0.1


def test_numbers_and_words_that_stand_near_are_alike() -> None:
    for near, nearer, far in (("30", "41", "95"), ("apple", "banana", "zucchini"), (" ant", " bear", " zebra")):
        place = rows_of(near, nearer, far)[:, 128:192]
        assert likeness(place[0], place[1]) > likeness(place[0], place[2])


def test_other_rows_stay_as_they_are_and_every_element_keeps_its_size() -> None:
    ids = load_vocabulary().encode(" Brunle 42")
    rows = generated_rows(ids, HIDDEN, SEED, SCALE).float()
    marked = mark_order(rows, ids, SEED, SCALE)
    assert torch.equal(marked[0], rows[0]) and not torch.equal(marked[-1], rows[-1])
    assert torch.equal(marked.abs(), rows.abs())
