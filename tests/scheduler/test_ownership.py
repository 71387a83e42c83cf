from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from scheduler.ownership import assign

NAMES = st.sets(st.text("abcdefgh0123456789", min_size=1, max_size=6), min_size=1, max_size=12)


@given(groups=NAMES, schedulers=NAMES)
def test_every_group_has_one_owner_and_every_owner_its_share(groups: set[str], schedulers: set[str]) -> None:
    owner_of = assign(groups, schedulers)
    assert owner_of.keys() == groups and set(owner_of.values()) <= schedulers
    load = Counter(owner_of.values())
    assert {load[scheduler] for scheduler in schedulers} <= {len(groups) // len(schedulers), -(-len(groups) // len(schedulers))}


@given(groups=NAMES, schedulers=NAMES)
def test_all_replicas_agree_whatever_order_they_heard_in(groups: set[str], schedulers: set[str]) -> None:
    assert assign(sorted(groups), sorted(schedulers)) == assign(sorted(groups, reverse=True), sorted(schedulers, reverse=True))


def test_a_replica_that_leaves_moves_little_beside_its_own_groups() -> None:
    groups, schedulers = [f"g{number}" for number in range(64)], [f"s{number}" for number in range(8)]
    before, after = assign(groups, schedulers), assign(groups, schedulers[1:])
    moved = [group for group in groups if before[group] != after[group]]
    assert len(moved) <= 16, "8 of the one that left, and few more"
