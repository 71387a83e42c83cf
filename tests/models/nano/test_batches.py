from collections import Counter

import pytest

from models.nano.batches import draw_batch
from models.nano.data.conversation import Example


def test_ranks_have_about_as_much_to_do_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.nano.batches.make_batch", lambda examples: examples)
    for step in range(10):
        shares: list[list[Example]] = [draw_batch(f"a/{step}", 2000, 0.1, 1.0, rank, 3) for rank in range(3)]  # type: ignore[misc]
        dealt = Counter(tuple(one.token_ids) for share in shares for one in share)
        drawn = Counter(tuple(one.token_ids) for one in draw_batch(f"a/{step}", 2000, 0.1, 1.0))  # type: ignore[attr-defined]
        assert not drawn - dealt, "what one rank alone would have is among it"
        work = [sum(len(one.token_ids) for one in share) for share in shares]
        assert min(work) > 0.8 * max(work) > 0
