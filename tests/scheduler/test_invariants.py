"""Some hundreds of the seeded runs that `python -m scheduler.simulation.checked` makes by the thousand; and that they can fail."""

import pytest

from scheduler.block_pool import BlockPool
from scheduler.simulation import checked


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_no_token_is_lost_doubled_or_out_of_order_whatever_happens(first: int) -> None:
    num_moved = sum(len(one.group_ids) > 1 for seed in range(first, first + 50) for one in checked.run(seed).records)
    assert num_moved, "some of fifty runs lose a group while it has requests"


def test_a_block_that_is_handed_out_while_it_is_in_use_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = BlockPool.allocate

    def allocate_wrongly(pool: BlockPool, count: int) -> list[int]:
        taken = allocate(pool, count)
        return [0 for _ in taken]

    monkeypatch.setattr(BlockPool, "allocate", allocate_wrongly)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(20):
            checked.run(seed)


def test_the_same_seed_is_the_same_run() -> None:
    first, again = (checked.run(7) for _ in range(2))
    assert [(one.token_ids, one.ended_s, one.group_ids) for one in first.records] == [
        (one.token_ids, one.ended_s, one.group_ids) for one in again.records
    ]
