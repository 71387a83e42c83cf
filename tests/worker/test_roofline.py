"""The ceilings against values worked out by hand, and against plain counting."""

import pytest

from benchmarks.roofline import SHAPES, Device, Part, Shape, Step, Storage, decode_step, distinct_experts, prefill_step

TINY = Shape(
    3, 5, 64, 96, 6, 2, 16, 2, 4, 700
)  # layers, experts, hidden, intermediate, heads, KV heads, head_dim, chosen, window, vocabulary


def test_one_row_of_120b_reads_what_the_published_sizes_say() -> None:
    step = decode_step(SHAPES["gpt-oss-120b"], 1, 1024)
    assert step.experts.num_bytes == pytest.approx(36 * 4 * 13_219_200)  # 3 * 2880^2 weights at 4.25 bits
    projections = 2880 * (4096 + 512 + 512 + 4096) + 4096 + 512 + 512 + 2880
    assert step.attention.num_bytes == 36 * 2 * (projections + 128 * 2881)
    assert step.kv.num_bytes == (18 * (1024 + 128) + 36) * 2 * 8 * 64 * 2
    assert step.vocabulary.num_bytes == (201_088 + 1) * 2880 * 2
    assert step.experts.flop == 36 * 4 * 2 * 24_883_200


def test_distinct_experts_go_from_the_chosen_to_all() -> None:
    assert distinct_experts(128, 4, 1) == pytest.approx(4)
    assert distinct_experts(128, 4, 2) == pytest.approx(4 + 4 * 124 / 128)
    assert distinct_experts(32, 4, 8) == pytest.approx(32 * (1 - 0.875**8))
    assert distinct_experts(32, 4, 4096) == pytest.approx(32)
    assert distinct_experts(4, 4, 1) == 4


@pytest.mark.parametrize(("num_tokens", "context"), [(1, 1), (1, 9), (3, 3), (3, 4), (4, 11), (7, 9), (11, 11)])
def test_a_chunk_counts_each_pair_and_each_key_that_it_sees(num_tokens: int, context: int) -> None:
    window_pairs = [(q, k) for q in range(context - num_tokens, context) for k in range(q + 1) if k > q - TINY.sliding_window]
    full_pairs = [(q, k) for q in range(context - num_tokens, context) for k in range(q + 1)]
    step = prefill_step(TINY, num_tokens, context)
    assert step.kv.flop == 4 * (2 * len(window_pairs) + len(full_pairs)) * 6 * 16
    num_keys = 2 * len({key for _, key in window_pairs}) + len({key for _, key in full_pairs})
    assert step.kv.num_bytes == (num_keys + 3 * num_tokens) * 2 * 2 * 16 * 2


@pytest.mark.parametrize("context", [1, 3, 4, 5, 40])
def test_decoding_one_sequence_is_a_chunk_of_one(context: int) -> None:
    assert decode_step(TINY, 1, context) == prefill_step(TINY, 1, context)


def test_what_grows_with_the_batch_and_what_does_not() -> None:
    alone, many = decode_step(TINY, 1, 7), decode_step(TINY, 10, 7)
    assert many.attention.num_bytes == alone.attention.num_bytes and many.attention.flop == 10 * alone.attention.flop
    assert many.kv == Part(10 * alone.kv.num_bytes, 10 * alone.kv.flop)
    assert many.experts.flop == 10 * alone.experts.flop
    assert alone.experts.num_bytes < many.experts.num_bytes < 10 * alone.experts.num_bytes
    assert many.vocabulary.num_bytes - alone.vocabulary.num_bytes == 9 * 64 * 2


def test_stored_bytes_follow_the_storage() -> None:
    wide, narrow = decode_step(TINY, 3, 9, Storage(expert=4.0, dense=4.0, kv=4.0)), decode_step(TINY, 3, 9)
    assert wide.flop == narrow.flop
    assert wide.experts.num_bytes / narrow.experts.num_bytes == pytest.approx(4 / (4.25 / 8))
    assert wide.attention.num_bytes == 2 * narrow.attention.num_bytes and wide.kv.num_bytes == 2 * narrow.kv.num_bytes


def test_parts_take_the_slower_of_memory_and_arithmetic_and_add_up() -> None:
    step = Step(2, Part(30, 1), Part(0, 0), Part(10, 8), Part(5, 2))
    device = Device(bytes_per_s=10, flop_per_s=4)
    assert step.seconds(device) == 3 + 0 + 2 + 0.5
    assert step.tokens_per_s(device) == 2 / 5.5
    assert (step.num_bytes, step.flop) == (45, 11)
