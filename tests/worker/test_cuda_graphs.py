"""Decode steps filled up to the shapes of graphs: the same logits bit for bit, and nothing written where a sequence keeps its keys."""

from collections.abc import Callable

import pytest
import torch

from tests.worker.greedy import GreedyDriver, make_prompts
from worker.cuda_graphs import BATCHES, MAX_TOKENS, DecodeGraphs, Shape, list_shapes, pad_decodes
from worker.input_batch import InputBatch, build_batch
from worker.runner import ModelBackend
from worker.sequences import SamplingParams, ScheduledSequence, Sequence

LoadBackend = Callable[[str], ModelBackend]
WINDOW, BLOCK_SIZE = 37, 16


class EagerCapture:
    """Computes again in the ordinary way."""

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        output = compute()

        def replay() -> None:
            output.copy_(compute())

        return output, replay


class CountingCapture(EagerCapture):
    num_replays = 0

    def __call__(self, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        output, replay = super().__call__(compute)

        def counted() -> None:
            self.num_replays += 1
            replay()

        return output, counted


def decode(seq_id: int, num_tokens: int, blocks: list[int]) -> ScheduledSequence:
    tokens = [(seq_id * 31 + 7 * i) % 500 for i in range(num_tokens)]
    return ScheduledSequence(Sequence(seq_id, "r", tokens, num_tokens, SamplingParams(temperature=0.0), num_tokens - 1, blocks, blocks), 1)


def batch_of(*scheduled: ScheduledSequence, window: int = WINDOW) -> InputBatch:
    return build_batch(scheduled, block_size=BLOCK_SIZE, sliding_window=window)


def test_shapes_cover_every_batch_and_every_context_within_their_bound() -> None:
    shapes = list_shapes(max_num_seqs=100, max_model_len=131_072, block_size=16, num_window_blocks=9)
    assert {shape.num_full_blocks * 16 for shape in shapes} == {2048, 8192, 32768, 131_072}
    assert [shape.num_sequences for shape in shapes if shape.num_full_blocks == 128] == [1, 2, 4, *range(8, 105, 8)]
    assert all(shape.num_sequences * shape.num_full_blocks * 16 <= MAX_TOKENS for shape in shapes)
    assert {shape.num_window_blocks for shape in shapes} == {9}
    few = list_shapes(max_num_seqs=3, max_model_len=1000, block_size=16, num_window_blocks=0)
    assert few == [Shape(1, 63, 0), Shape(2, 63, 0), Shape(4, 63, 0)]
    many = list_shapes(max_num_seqs=1000, max_model_len=1000, block_size=16, num_window_blocks=0)
    assert [shape.num_sequences for shape in many] == list(BATCHES)


def test_padding_adds_sequences_of_one_token_in_the_null_blocks() -> None:
    padded = pad_decodes(batch_of(decode(1, 50, [3, 4, 5, 6]), decode(2, 18, [7, 8])), 4, BLOCK_SIZE, null_blocks=(90, 91))
    assert padded.token_ids.tolist()[2:] == padded.positions.tolist()[2:] == [0, 0]
    for pool, null_block in ((padded.full, 90), (padded.window, 91)):
        assert pool.num_decodes == 4 and pool.query_lens == (1, 1, 1, 1)
        assert pool.context_lens.tolist() == [50, 18, 1, 1]
        assert pool.table_starts.tolist()[2:] == [0, 0]
        assert (pool.block_tables[2:] == null_block).all()
        assert pool.slot_mapping.tolist()[2:] == [null_block * BLOCK_SIZE] * 2
    assert padded.drawing_rows.tolist() == [0, 1]


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    graphs = DecodeGraphs(lambda batch: batch.positions.clone(), block_size=16, null_blocks=(9, 9), device=torch.device("cpu"))
    graphs.capture([Shape(4, 8, 4), Shape(1, 2, 4), Shape(4, 2, 4), Shape(1, 8, 4)], EagerCapture())
    short, long = decode(1, 20, [0, 1]), decode(2, 100, list(range(7)))
    assert graphs.find(batch_of(short)) == (1, 2, 4)
    assert graphs.find(batch_of(long)) == (1, 8, 4)
    assert graphs.find(batch_of(short, short)) == (4, 2, 4)
    assert graphs.find(batch_of(short, long)) == (4, 8, 4)
    assert graphs.find(batch_of(*[short] * 5)) is None
    assert graphs.find(batch_of(decode(3, 200, list(range(13))))) is None
    prefill = ScheduledSequence(Sequence(1, "r", [1, 2, 3], 3, SamplingParams(), 0, [0], [0]), 3)
    assert graphs.find(batch_of(short, prefill)) is None


def test_each_step_is_replayed_with_its_own_inputs() -> None:
    graphs = DecodeGraphs(lambda batch: batch.positions * 2, block_size=16, null_blocks=(9, 9), device=torch.device("cpu"))
    done: list[int] = []
    graphs.capture([Shape(2, 4, 4), Shape(1, 4, 4)], EagerCapture(), done.append)
    assert done == [1, 2] and len(graphs) == 2
    for lengths in ((20, 30), (50, 9)):
        batch = batch_of(*(decode(place, length, [0, 1, 2, 3]) for place, length in enumerate(lengths)))
        shape = graphs.find(batch)
        assert shape
        assert graphs.run(graphs.pad(batch, shape), shape).tolist() == [2 * (length - 1) for length in lengths]


@pytest.mark.parametrize("name", ["odd_window", "wide_heads"])
def test_a_model_draws_the_same_with_and_without_graphs(name: str, load_backend: LoadBackend) -> None:
    plain, graphed = load_backend(name), load_backend(name)
    num_window_blocks = (plain.facts.sliding_window - 2) // plain.facts.block_size + 2
    shapes = list_shapes(max_num_seqs=8, max_model_len=512, block_size=16, num_window_blocks=num_window_blocks)
    graphed.graphs.capture(shapes, capture := CountingCapture())
    prompts = make_prompts(7, plain.facts.vocab_size)
    assert GreedyDriver(graphed, num_tokens=9).run(prompts) == GreedyDriver(plain, num_tokens=9).run(prompts)
    assert capture.num_replays > 3


def test_padded_logits_equal_plain_ones_bit_for_bit(load_backend: LoadBackend) -> None:
    """And the padding writes to the null blocks only."""
    backend = load_backend("odd_window")
    cache, model = backend._kv_cache, backend._model
    cache.full.normal_()
    cache.window.normal_()
    batch = batch_of(decode(1, 50, [3, 4, 5, 6]), decode(2, 18, [7, 8]), decode(3, 129, list(range(10, 19))))
    with torch.inference_mode():
        alone = model.compute_logits(model.forward(batch, cache))
        after = cache.full.clone(), cache.window.clone()
        padded = model.compute_logits(model.forward(pad_decodes(batch, 8, BLOCK_SIZE, cache.null_blocks), cache))
    assert torch.equal(padded[:3], alone)
    for before, now in zip(after, (cache.full, cache.window), strict=True):
        assert torch.equal(before[:, :, :-1], now[:, :, :-1]) and not torch.equal(before, now)
