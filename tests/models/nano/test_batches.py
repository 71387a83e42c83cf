import random
from collections import Counter

import pytest

from models.nano.batches import deal_families, draw_batch
from models.nano.data.conversation import Example


def test_families_are_dealt_evenly_and_each_once() -> None:
    rng = random.Random(3)
    families = [[Example("", (), [number] * rng.randint(30, 300), [])] for number in range(60)]
    dealt = deal_families(families, 3)
    assert sorted(family[0].token_ids for share in dealt for family in share) == sorted(family[0].token_ids for family in families)
    work = [sum(len(family[0].token_ids) for family in share) for share in dealt]
    assert min(work) > 0.9 * max(work)


def test_ranks_share_one_drawing_with_about_as_much_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.nano.batches.make_batch", list)
    for step in range(10):
        shares: list[list[Example]] = [draw_batch(f"a/{step}", 2000, 0.1, 1.0, rank, 3) for rank in range(3)]  # type: ignore[misc]
        alone: list[Example] = draw_batch(f"a/{step}", 2000, 0.1, 1.0, 0, 1)  # type: ignore[assignment]
        dealt = Counter(tuple(one.token_ids) for share in shares for one in share)
        assert not Counter(tuple(one.token_ids) for one in alone) - dealt, "what one rank alone would have is among it"
        work = [sum(len(one.token_ids) for one in share) for share in shares]
        assert min(work) > 0.8 * max(work) > 0
