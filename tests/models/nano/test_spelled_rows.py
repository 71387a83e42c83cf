import torch

from models.nano.spelled_rows import spelled_rows
from services.vocabulary import load_vocabulary

HIDDEN, SEED, SCALE = 256, 20, 1 / 16


def rows_of(*words: str) -> list[torch.Tensor]:
    encoded = [load_vocabulary().encode(word) for word in words]
    assert all(len(ids) == 1 for ids in encoded)
    return list(spelled_rows([ids[0] for ids in encoded], HIDDEN, SEED, SCALE).float())


def test_spellings_of_a_word_differ_in_their_marks_alone() -> None:
    spaced, plain, small = rows_of(" Test", "Test", "test")
    differ = (spaced != plain).nonzero().flatten().tolist()
    assert differ and min(differ) >= HIDDEN - 48 and max(differ) < HIDDEN - 16
    differ = (plain != small).nonzero().flatten().tolist()
    assert differ and min(differ) >= HIDDEN - 16


def test_a_prefix_is_marked_alike_on_every_word() -> None:
    one, other = rows_of(" Test", " garden")
    assert torch.equal(one[-48:-16], other[-48:-16])
    assert abs(float(torch.cosine_similarity(one[:-48], other[:-48], dim=0))) < 0.3


def test_no_two_ids_share_a_row() -> None:
    rows = spelled_rows(range(0, 201088, 7), HIDDEN, SEED, SCALE)
    packed = {row.numpy().tobytes() for row in (rows > 0)}
    assert len(packed) == len(rows)


def test_a_row_is_a_function_of_seed_and_id() -> None:
    assert torch.equal(spelled_rows([5, 70000], 64, 1, 0.5), spelled_rows([70000, 5], 64, 1, 0.5).flip(0))
    assert not torch.equal(spelled_rows([5], 64, 1, 0.5), spelled_rows([5], 64, 2, 0.5))
