import torch

from models.nano.alike_rows import add_other_spellings, other_spellings, tell_apart
from models.nano.spec import ROW_SCALE, SPEC
from models.nano.spelled_rows import spelled_rows
from services.vocabulary import load_vocabulary

SEED = 4


def ids_of(*texts: str) -> list[int]:
    return [token_id for text in texts for token_id in load_vocabulary().encode(text)]


def test_a_word_has_all_the_spellings_that_it_is_copied_to() -> None:
    trained = ids_of(" digest", "Table")
    others = other_spellings(trained)
    assert others == dict(zip(ids_of("digest", ".digest", " Table", ".Table"), [trained[0]] * 2 + [trained[1]] * 2, strict=True))
    assert not other_spellings([*trained, *others])


def test_numbers_marks_and_joined_names_have_no_other_spelling() -> None:
    assert not other_spellings(ids_of("7", ",", "_name", "|"))


def test_an_added_row_is_as_far_from_the_trained_one_as_when_both_began() -> None:
    (spaced,), (plain,) = ids_of(" digest"), ids_of("digest")
    trained = torch.randn(2, SPEC.hidden_size, generator=torch.Generator().manual_seed(1))
    row_ids, rows = add_other_spellings([5, spaced], trained, SEED)
    assert torch.equal(rows[:2], trained) and row_ids[:2] == [5, spaced]
    began, beside = spelled_rows([plain, spaced], SPEC.hidden_size, SEED, ROW_SCALE).float()
    torch.testing.assert_close(rows[row_ids.index(plain)] - trained[1], began - beside)
    assert add_other_spellings(row_ids, rows, SEED)[0] == row_ids, "nothing is added twice"


def test_spellings_that_training_brought_together_are_told_apart_again() -> None:
    row_ids = ids_of(" digest", "digest", " Table", "Table", " goat", "7")
    began = spelled_rows(row_ids, SPEC.hidden_size, SEED, ROW_SCALE).float()
    mark = began[0] - began[1]
    word, other, alone = torch.randn(3, SPEC.hidden_size, generator=torch.Generator().manual_seed(2))
    rows = torch.stack([word + 0.2 * mark, word - 0.2 * mark, word, other, alone, alone])
    told = tell_apart(row_ids, rows, SEED)
    torch.testing.assert_close(told[0] - told[1], mark)
    torch.testing.assert_close(told[:2].mean(0), word)
    assert torch.equal(told[2:], rows[2:]), "spellings of their own meaning, and words with one spelling, stay"
    torch.testing.assert_close(tell_apart(row_ids, told, SEED), told)


def test_spellings_that_are_far_apart_stay_so() -> None:
    row_ids = ids_of(" digest", "digest")
    began = spelled_rows(row_ids, SPEC.hidden_size, SEED, ROW_SCALE).float()
    rows = torch.stack([3 * began[0], 3 * began[0] - 1.5 * (began[0] - began[1])])
    assert torch.equal(tell_apart(row_ids, rows, SEED), rows)
    assert torch.equal(tell_apart(row_ids[:1], rows[:1], SEED), rows[:1])
