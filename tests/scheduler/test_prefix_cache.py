import pytest

from scheduler.batching import Batcher
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import GroupLimits, Request, Sequence
from services.prefix_hash import PrefixHasher, prefix_key
from tests.scheduler.test_batching import Loop

LIMITS = GroupLimits(
    block_size=4, num_full_blocks=60, num_window_blocks=60, sliding_window=10, max_model_len=200, max_batch_tokens=64, max_num_seqs=4
)
STEM = list(range(500, 541))


def make_request(token_ids: list[int], tenant: str = "", max_tokens: int = 4, checkpoints: tuple[int, ...] = ()) -> Request:
    prefix = PrefixHasher(prefix_key(tenant, b""), LIMITS.block_size, token_ids)
    return Request("r", "m", token_ids, max_tokens=max_tokens, tenant=tenant, prefix=prefix, checkpoint_blocks=checkpoints)


def make_loop(limits: GroupLimits = LIMITS, index: PrefixIndex | None = None, group_id: str = "g") -> Loop:
    return Loop(Batcher(limits, max_queued_tokens=10_000, index=index, group_id=group_id))


def run(loop: Loop, request: Request) -> Sequence:
    (sequence,) = loop.batcher.add(request, loop.now)
    loop.finish()
    return sequence


def test_a_prompt_seen_before_is_continued_at_its_last_border() -> None:
    loop = make_loop()
    run(loop, make_request(STEM))
    assert run(loop, make_request(STEM)).num_cached_tokens == 40, "10 of the prompt's 10 full blocks; its last token is computed"


def test_a_longer_prompt_is_continued_at_a_checkpoint_that_the_shorter_left() -> None:
    loop = make_loop()
    run(loop, make_request(STEM, max_tokens=40, checkpoints=(10,)))
    assert run(loop, make_request([*STEM[:40], 1, 2, 3])).num_cached_tokens == 40


def test_without_a_checkpoint_the_window_has_passed_and_the_border_cannot_be_used() -> None:
    loop = make_loop()
    run(loop, make_request(STEM, max_tokens=40))
    assert run(loop, make_request([*STEM[:40], 1, 2, 3])).num_cached_tokens == 0


def test_what_one_request_generated_is_found_by_the_next_turn() -> None:
    loop = make_loop()
    first = run(loop, make_request(STEM, max_tokens=20))
    conversation = [*STEM, *first.output_token_ids]
    assert run(loop, make_request([*conversation, 7, 8, 9])).num_cached_tokens == 60, "61 tokens, all but the last of them with KV"


def test_tenants_and_salts_share_nothing() -> None:
    loop = make_loop()
    run(loop, make_request(STEM, tenant="a"))
    assert run(loop, make_request(STEM, tenant="b")).num_cached_tokens == 0
    assert prefix_key("a", b"x") != prefix_key("ax", b"") != prefix_key("a", b"")


def test_a_burst_with_one_prefix_computes_it_once_even_in_one_step() -> None:
    loop = make_loop()
    burst = [loop.batcher.add(make_request([*STEM, number], checkpoints=(10,)), 0.0)[0] for number in range(3)]
    loop.finish()
    assert [one.num_cached_tokens for one in burst] == [0, 40, 40]


def test_the_ends_of_prompts_are_evicted_before_their_beginnings() -> None:
    loop = make_loop(GroupLimits(4, 20, 0, 0, 80, 64, 4))
    run(loop, make_request(STEM))
    run(loop, make_request(list(range(900, 948)), max_tokens=1))  # takes 12 of 20 blocks: 3 of the 11 have to go
    assert 0 < run(loop, make_request(STEM)).num_cached_tokens < 40


def test_host_memory_gives_back_what_the_device_had_to_let_go() -> None:
    loop = make_loop(GroupLimits(4, 20, 0, 0, 80, 64, 4, num_host_blocks=40))
    run(loop, make_request(STEM))
    run(loop, make_request(list(range(900, 976)), max_tokens=1))
    assert run(loop, make_request(STEM)).num_cached_tokens == 40


def test_the_index_knows_who_holds_how_much_and_counts_promises() -> None:
    index = PrefixIndex()
    loops = {name: make_loop(index=index, group_id=name) for name in ("a", "b", "c")}
    run(loops["a"], make_request(STEM))
    run(loops["b"], make_request([*STEM[:20], 1, 2, 3, 4]))
    names = make_request(STEM).block_names
    assert index.holders(names) == {"a": 10, "b": 5}
    loops["c"].batcher.add(make_request(STEM), 0.0)
    assert index.holders(names) == {"a": 10, "b": 5, "c": 10}, "just routed, not computed yet"
    loops["a"].batcher.close()
    assert index.holders(names) == {"b": 5, "c": 10}


def test_a_cancelled_promise_is_void() -> None:
    index = PrefixIndex()
    loop = make_loop(index=index)
    (one,) = loop.batcher.add(make_request(STEM), 0.0)
    loop.batcher.cancel(one, 0.0)
    assert index.holders(make_request(STEM).block_names) == {}
    loop.batcher.check_integrity()


@pytest.mark.parametrize("num_tokens", [0, 3, 4, 17])
def test_names_grow_as_the_sequence_does(num_tokens: int) -> None:
    key, token_ids = prefix_key("t", b"s"), list(range(num_tokens))
    whole = PrefixHasher(key, 4, [*token_ids, *range(100, 120)]).hashes
    grown = PrefixHasher(key, 4, token_ids)
    full = len(grown.hashes) * 4
    twin = grown.fork()
    twin.extend([*token_ids[full:], *range(100, 120)])
    assert twin.hashes == whole and grown.hashes == whole[: len(grown.hashes)]


def test_blocks_stay_in_host_memory_where_computing_them_again_is_faster() -> None:
    loop = make_loop(GroupLimits(4, 20, 0, 0, 80, 64, 4, num_host_blocks=40))
    run(loop, make_request(STEM))
    run(loop, make_request(list(range(900, 976)), max_tokens=1))
    loop.batcher.rates.learn_fetch(1, 10.0)
    slow = run(loop, make_request(STEM))
    assert slow.num_cached_tokens < 40, "only what was left on the device"
