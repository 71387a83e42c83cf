"""Draws: exact noise, exact filters, the same alone as in any batch, and the right frequencies."""

import math
from collections.abc import Sequence as Ordered

import pytest
import torch
from torch import Tensor

from worker.backend import DrawnToken
from worker.philox import gumbel_noise, philox
from worker.sampling import NUCLEUS_GUESS, ROWS_AT_ONCE, sample
from worker.sequences import SamplingParams, Sequence

CPU = torch.device("cpu")
# (counter, key, words) from the known-answer tests that Random123 publishes for philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


def sequence(seq_id: int = 0, token_ids: Ordered[int] = (1, 2, 3), num_prompt_tokens: int = 3, **params: object) -> Sequence:
    return Sequence(seq_id, "", list(token_ids), num_prompt_tokens, SamplingParams(**params))  # type: ignore[arg-type]  # as given


def draw_many(logits: list[float], num_draws: int, **params: object) -> Tensor:
    """How often each token is drawn, [vocab], with seeds 0 to num_draws - 1."""
    rows = torch.tensor(logits).expand(num_draws, -1).contiguous()
    drawn, failed = sample(rows, [sequence(seed, seed=seed, **params) for seed in range(num_draws)])
    assert not failed
    return torch.tensor([one.token_id for one in drawn]).bincount(minlength=len(logits))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    assert [int(word) for word in philox(words(counter), words(key))] == [int(word, 16) for word in expected.split()]


def test_noise_is_a_function_of_seed_position_and_token_alone() -> None:
    seeds, positions = [7, 2**64 - 1, 7, 1 << 40], [5, 5, 131_071, 0]
    together = gumbel_noise(seeds, positions, 1003, CPU)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert torch.equal(together[row], gumbel_noise([seed], [position], 1003, CPU)[0])
        assert torch.equal(together[row, :17], gumbel_noise([seed], [position], 17, CPU)[0])
    assert len({tuple(row.tolist()) for row in together}) == len(seeds)


def test_noise_is_finite_and_has_gumbels_moments() -> None:
    noise = gumbel_noise([1, 2], [3, 4], 201_088, CPU)
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_the_extreme_words_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = tuple(torch.full((1, 1), word, dtype=torch.int64) for word in (0, 1, 0xFFFFFFFE, 0xFFFFFFFF))
    monkeypatch.setattr("worker.philox.philox", lambda counter, key: extremes)
    noise = gumbel_noise([0], [0], 4, CPU)[0]
    assert torch.isfinite(noise).all()
    assert noise[0] > noise[1] > noise[2]


MIXED = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3, "top_p": 0.8},
    {"top_k": 5},
    {"min_p": 0.05, "top_logprobs": 3},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.5, "min_p": 0.01},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"logit_bias": ((5, 4.0), (6, -100.0)), "top_logprobs": 0},
    {"banned_token_ids": (0, 9), "min_tokens": 9, "top_p": 0.999},
]


@pytest.mark.parametrize("vocab_size", [1003, 20_000])
def test_a_row_draws_the_same_alone_and_in_any_batch(vocab_size: int) -> None:
    logits = torch.randn(4 * len(MIXED), vocab_size, generator=torch.Generator().manual_seed(3)) * 4
    sequences = [sequence(row, (row, 2, 3, 4), 2, seed=row, **MIXED[row % len(MIXED)]) for row in range(len(logits))]
    assert len(sequences) > 2 * ROWS_AT_ONCE
    together, _ = sample(logits, sequences)
    alone = [sample(logits[row : row + 1], sequences[row : row + 1])[0][0] for row in range(len(logits))]
    assert together == alone
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(4)).tolist()
    shuffled, _ = sample(logits[order], [sequences[row] for row in order])
    assert [shuffled[order.index(row)] for row in range(len(logits))] == alone


def test_a_sequence_that_moved_goes_on_with_the_same_tokens() -> None:
    """The noise follows the absolute position, however many of the tokens count as prompt."""
    logits = torch.zeros(1, 5000)
    stayed = sequence(1, (4, 5, 6, 7), 2, seed=9)
    moved = sequence(2, (4, 5, 6, 7), 3, seed=9)
    assert sample(logits, [stayed])[0][0].token_id == sample(logits, [moved])[0][0].token_id
    later = sequence(1, (4, 5, 6, 7, 8), 2, seed=9)
    assert sample(logits, [stayed])[0][0].token_id != sample(logits, [later])[0][0].token_id


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(3, 501, generator=torch.Generator().manual_seed(1))
    drawn, _ = sample(logits, [sequence(row, temperature=0.0, seed=row) for row in range(3)])
    assert [one.token_id for one in drawn] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = [2.0, 1.0, 0.0, -1.0, 1.5, 0.3]
    counts = draw_many(logits, 4000, temperature=temperature)
    assert chi_square(counts, (torch.tensor(logits) / temperature).softmax(0)) < 20.5  # 5 degrees of freedom, 0.1 %


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    assert draw_many([1000.0, 1001.0, -1000.0], 50, temperature=1e-30).tolist() == [0, 50, 0]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # tokens 2 and 3 tie for the last place
        ({"top_p": 0.6}, [1]),
        ({"top_p": 0.7}, [0, 1]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.2}, [0, 1]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "top_p": 0.72}, [1]),  # of what top-k left, the first has 0.75
    ],
)
def test_filters_keep_exactly_these(params: dict[str, float], kept: list[int]) -> None:
    probabilities = torch.tensor([0.2, 0.6, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
    counts = draw_many(probabilities.log().tolist(), 1500, **params)
    assert counts.nonzero()[:, 0].tolist() == kept
    if len(kept) > 1:
        assert chi_square(counts[kept], probabilities[kept] / probabilities[kept].sum()) < 16.3  # at most 3 degrees, 0.1 %


def test_a_wide_nucleus_is_found_beyond_the_first_guess() -> None:
    logits = [0.0] * (4 * NUCLEUS_GUESS)
    logits[:10] = [0.1] * 10
    wide = draw_many(logits, 400, top_p=0.9)
    assert wide[2 * NUCLEUS_GUESS :].sum() > 0
    descending = [-0.001 * rank for rank in range(4 * NUCLEUS_GUESS)]
    reach = int((torch.tensor(descending).softmax(0).cumsum(0) < 0.9).sum())
    assert int(draw_many(descending, 400, top_p=0.9).nonzero().max()) <= reach
    assert reach > NUCLEUS_GUESS


def test_penalties_and_bias_are_those_of_the_contract() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 1.0, 0.0]])
    for params, expected in [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 1.5, 1.0, 0.0]),  # tokens 0, 1 and 2 are in prompt or output
        ({"presence_penalty": 0.5}, [2.0, -2.5, 2.5, 1.0, 0.0]),  # output: 1 once, 2 twice
        ({"frequency_penalty": 0.5}, [2.0, -2.5, 2.0, 1.0, 0.0]),
        ({"logit_bias": ((4, 10.0), (0, -1.0))}, [1.0, -2.0, 3.0, 1.0, 10.0]),
    ]:
        adjusted = torch.tensor(expected)
        for seed in range(100):
            (drawn,), _ = sample(logits, [sequence(0, (0, 1, 2, 2), 1, seed=seed, **params)])
            noise = gumbel_noise([seed], [4], 5, CPU)[0]
            assert drawn.token_id == int((adjusted - adjusted.max() + noise).argmax())


def test_banned_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    for num_output, expected in [(0, 2), (1, 2), (2, 1)]:
        early = sequence(0, (0,) * (3 + num_output), 3, temperature=0.0, banned_token_ids=(1,), min_tokens=2)
        assert sample(logits, [early])[0][0].token_id == expected


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(5))
    bias = ((7, 50.0),)
    asked = sequence(0, temperature=0.1, logit_bias=bias, top_logprobs=4)
    (first, second), _ = sample(logits, [asked, sequence(1)])
    expected = logits[0].log_softmax(-1)
    assert second.logprobs is None
    assert first.token_id == 7
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(float(expected[7]), abs=1e-6)
    assert [token_id for token_id, _ in first.logprobs.top] == expected.topk(4).indices.tolist()
    assert [value for _, value in first.logprobs.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_numbers_fail_their_row_alone(poison: float) -> None:
    logits = torch.zeros(3, 9)
    logits[1, 4] = poison
    logits[2] = -math.inf
    sequences = [sequence(10 + row, seed=row) for row in range(3)]
    drawn, failed = sample(logits, sequences)
    assert [one.seq_id for one in failed] == [11, 12]
    assert drawn == [DrawnToken(10, sample(logits[:1], sequences[:1])[0][0].token_id)]


def test_a_sequence_without_a_token_left_fails() -> None:
    banned = sequence(4, banned_token_ids=(0, 1), min_tokens=9)
    drawn, failed = sample(torch.zeros(1, 2), [banned])
    assert not drawn
    assert "sampling parameters" in failed[0].message


def test_no_rows_draw_nothing() -> None:
    assert sample(torch.zeros(0, 7), []) == ([], [])


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(6))
    before = logits.clone()
    sample(logits, [sequence(0, top_p=0.5, logit_bias=((1, 5.0),)), sequence(1, temperature=0.0, repetition_penalty=1.5)])
    assert torch.equal(logits, before)
