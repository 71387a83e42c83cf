"""Tables and slots of a step, by hand."""

import pytest

from worker.input_batch import build_batch
from worker.sequences import SamplingParams, ScheduledSequence, Sequence


def _scheduled(seq_id: int, num_tokens: int, num_computed: int, now: int, full: list[int], window: list[int]) -> ScheduledSequence:
    token_ids = [100 * seq_id + position for position in range(num_tokens)]
    return ScheduledSequence(Sequence(seq_id, "r", token_ids, num_tokens, SamplingParams(), num_computed, full, window), now)


def test_decodes_come_first_and_drawing_rows_keep_the_scheduled_order() -> None:
    prefill = _scheduled(1, 7, 2, 5, [3, 9], [5, 0])
    partial = _scheduled(2, 9, 0, 3, [4], [1])
    decode = _scheduled(3, 6, 5, 1, [8, 2], [6, 7])
    batch = build_batch([prefill, partial, decode], block_size=4, sliding_window=3)
    assert batch.token_ids.tolist() == [305, 102, 103, 104, 105, 106, 200, 201, 202]
    assert batch.positions.tolist() == [5, 2, 3, 4, 5, 6, 0, 1, 2]
    assert batch.full.num_decodes == 1
    assert batch.full.query_lens == (1, 5, 3)
    assert batch.full.context_lens.tolist() == [6, 7, 3]
    assert batch.drawing_rows.tolist() == [5, 0]
    assert [sequence.seq_id for sequence in batch.drawing] == [1, 3]


def test_slots_follow_each_pools_own_blocks() -> None:
    batch = build_batch([_scheduled(1, 7, 2, 5, [3, 9], [5, 0])], block_size=4, sliding_window=3)
    assert batch.full.slot_mapping.tolist() == [14, 15, 36, 37, 38]
    assert batch.window.slot_mapping.tolist() == [22, 23, 0, 1, 2]


def test_window_tables_begin_with_the_first_block_that_is_still_seen() -> None:
    stale = 999
    batch = build_batch(
        [_scheduled(1, 14, 13, 1, [0, 1, 2, 3], [stale, stale, 7, 8]), _scheduled(2, 6, 5, 1, [4, 5], [stale, 6])],
        block_size=4,
        sliding_window=5,
    )
    assert batch.window.block_tables.tolist() == [[7, 8], [stale, 6]]  # position 1 of the second is still in its window
    assert batch.window.table_starts.tolist() == [8, 0]
    assert batch.full.block_tables.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]
    assert batch.full.table_starts.tolist() == [0, 0]


def test_blocks_beyond_the_scheduled_tokens_are_left_out() -> None:
    batch = build_batch([_scheduled(1, 9, 0, 4, [5, 6, 7], [1, 2, 3])], block_size=4, sliding_window=8)
    assert batch.full.block_tables.tolist() == [[5]]


def test_without_window_layers_there_is_one_table() -> None:
    batch = build_batch([_scheduled(1, 3, 0, 3, [5], [])], block_size=4, sliding_window=0)
    assert batch.window is batch.full


def test_missing_blocks_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="lacks blocks"):
        build_batch([_scheduled(1, 9, 0, 9, [5, 6], [5, 6, 7])], block_size=4, sliding_window=8)
