"""The kernels that draw, in Triton's interpreter: the same tokens as the reference, and the same alone as in any batch."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tests.worker.test_sampling import MIXED, sequence
from worker.gpu_sampling import draw_on_gpu, gather_inputs
from worker.kernels.sampling_triton import _find_floors, gumbel_noise, philox_words
from worker.philox import gumbel_noise as reference_noise
from worker.philox import philox
from worker.sampling import NOT_NUMBERS, NOTHING_LEFT, draw
from worker.sampling import _find_floors as reference_floors
from worker.sequences import Sequence

VOCAB = 2600  # two tiles, the second of them in part
CPU = torch.device("cpu")
KEYS = [(7, 5), (2**64 - 1, 131_071), (1 << 40, 0), (0, 0)]  # (seed, position)


@triton.jit
def _store_words(seeds: tl.tensor, positions: tl.tensor, words: tl.tensor, noise: tl.tensor, size: tl.constexpr) -> None:
    row, groups = tl.program_id(0), tl.arange(0, size // 4)
    seed, position, places = tl.load(seeds + row), tl.load(positions + row), row * size + tl.arange(0, size)
    tl.store(words + places, philox_words(seed, position, groups).to(tl.int64))
    tl.store(noise + places, gumbel_noise(seed, position, groups))


def random_masks(rows: range) -> dict[int, NDArray[np.uint32]]:
    return {row: np.random.default_rng(row).integers(0, 2**32, -(-VOCAB // 32), dtype=np.uint32) for row in rows}


def mixed_rows(num_rows: int) -> tuple[Tensor, list[Sequence], Mapping[int, NDArray[np.uint32]]]:
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    sequences = [sequence(row, (row, 2, 3, 3), 2, seed=row + 2**63, **MIXED[row % len(MIXED)]) for row in range(num_rows)]
    return logits, sequences, random_masks(range(0, num_rows, 5))


def test_words_are_the_references_to_the_bit_and_noise_is_within_rounding() -> None:
    size = 4096
    words, noise = torch.empty(len(KEYS), size, dtype=torch.int64), torch.empty(len(KEYS), size)
    seeds = torch.from_numpy(np.array([seed for seed, _ in KEYS], dtype=np.uint64).view(np.int64))
    _store_words[(len(KEYS),)](seeds, torch.tensor([position for _, position in KEYS]), words, noise, size=size)
    groups, zero = torch.arange(size // 4), torch.zeros(1, dtype=torch.int64)
    for row, (seed, position) in enumerate(KEYS):
        key = [torch.tensor([(seed >> shift) & 0xFFFFFFFF]) for shift in (0, 32)]
        expected = torch.stack(philox((groups, torch.tensor([position]), zero, zero), key), -1).flatten()
        assert torch.equal(words[row], expected)
    expected = reference_noise([seed for seed, _ in KEYS], [position for _, position in KEYS], size, CPU)
    torch.testing.assert_close(noise, expected, rtol=3e-7, atol=3e-7)


def test_tokens_are_the_references_under_all_parameters_and_masks() -> None:
    logits, sequences, masks = mixed_rows(3 * len(MIXED))
    before = logits.clone()
    token_ids, faults = draw_on_gpu(logits, sequences, masks)
    assert torch.equal(token_ids, draw(logits, sequences, masks).token_ids)
    assert not faults.any()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_a_row_draws_the_same_alone_and_in_any_batch(size: int) -> None:
    logits, sequences, masks = mixed_rows(size)
    together, _ = draw_on_gpu(logits, sequences, masks)
    for row in {1, size // 2, size - 1}:
        alone, _ = draw_on_gpu(logits[row : row + 1], sequences[row : row + 1], {0: masks[row]} if row in masks else {})
        assert alone[0] == together[row]


def test_a_row_draws_the_same_in_whatever_place() -> None:
    logits, sequences, masks = mixed_rows(9)
    in_order, _ = draw_on_gpu(logits, sequences, masks)
    backwards, _ = draw_on_gpu(logits.flip(0), sequences[::-1], {8 - row: mask for row, mask in masks.items()})
    assert torch.equal(backwards.flip(0), in_order)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_k": 400}, {"top_p": 0.7}, {"top_p": 0.999}, {"top_k": 40, "top_p": 0.5}, {"top_p": 1e-9}]
)
def test_floors_are_the_references_also_where_scores_tie(params: dict[str, float]) -> None:
    """Half of the scores are whole numbers, so that every floor has equals; some are masked."""
    scores = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(7)) * 3
    scores[:, ::2] = scores[:, ::2].round()
    scores[1] *= -1
    scores[2, ::3] = -torch.inf
    temperatures = [1.0, 0.7, 1.9, 0.3]
    sequences = [sequence(row, temperature=one, **params) for row, one in enumerate(temperatures)]
    inputs = gather_inputs(sequences, {}, VOCAB, CPU)
    floors, tops = torch.empty(4), scores.amax(-1)
    _find_floors[(4,)](
        scores, tops, inputs.temperatures, inputs.top_ks, inputs.top_ps, floors, VOCAB=VOCAB, NUM_TILES=1, TILES_PAD=1, TILE=1024
    )
    costs = (tops[:, None] - scores) / torch.tensor(temperatures)[:, None]
    assert torch.equal(floors, reference_floors(scores, costs, [one.sampling for one in sequences])[:, 0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy speaks of the NaN that the test puts in
@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 9}])
def test_faults_are_the_references_and_their_rows_alone(params: dict[str, float]) -> None:
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(2))
    logits[1, 4], logits[2, 69], logits[3] = math.nan, math.inf, -math.inf
    everything = tuple(range(70))
    sequences = [sequence(row, seed=row, **params) for row in range(4)] + [sequence(4, banned_token_ids=everything, min_tokens=9, **params)]
    token_ids, faults = draw_on_gpu(logits, sequences, {})
    assert faults.tolist() == [0, NOT_NUMBERS, NOT_NUMBERS, NOT_NUMBERS, NOTHING_LEFT]
    assert ((token_ids >= 0) & (token_ids < 70)).all()
    assert token_ids[0] == draw(logits[:1], sequences[:1]).token_ids[0]


def test_bans_give_way_to_a_mask_that_allows_nothing_else() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    mask = np.array([0b10100, 0], dtype=np.uint32)  # tokens 2 and 4
    banned = [(2, 4), (4,), (2,)]
    sequences = [sequence(row, banned_token_ids=ids, min_tokens=5, temperature=0.0) for row, ids in enumerate(banned)]
    masks = dict.fromkeys(range(3), mask)
    token_ids, faults = draw_on_gpu(logits, sequences, masks)
    assert not faults.any()
    assert token_ids.tolist() == [int(logits[0, [2, 4]].argmax()) * 2 + 2, 2, 4]
    assert torch.equal(token_ids, draw(logits, sequences, masks).token_ids)
