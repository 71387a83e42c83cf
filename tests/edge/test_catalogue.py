"""A model is served, away, or unknown, and each says so."""

import pytest

from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.errors import MissingField, ModelNotFound, Unavailable


def status(model: str, num_groups: int = 1, max_model_len: int = 100) -> scheduler.SchedulerStatus:
    return scheduler.SchedulerStatus(models=[scheduler.ModelStatus(model=model, num_groups=num_groups, max_model_len=max_model_len)])


def test_schedulers_that_serve_one_model_are_added_up() -> None:
    catalogue = Catalogue(clock=lambda: 7.9)
    catalogue.observe("one", status("a", 2, 100))
    catalogue.observe("two", status("a", 3, 50))
    (card,) = catalogue.list_models()
    assert (card.num_groups, card.max_model_len, card.created) == (5, 50, 7)
    assert catalogue.find("a").num_groups == 5


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    catalogue = Catalogue()
    catalogue.observe("one", status("a"))
    with pytest.raises(ModelNotFound, match="choose one of: a"):
        catalogue.find("b")
    with pytest.raises(MissingField, match="model"):
        catalogue.find("")


@pytest.mark.parametrize("last", [None, status("a", 0)])
def test_a_model_that_was_there_is_away_and_not_unknown(last: scheduler.SchedulerStatus | None) -> None:
    catalogue = Catalogue()
    catalogue.observe("one", status("a"))
    catalogue.observe("one", last)
    with pytest.raises(Unavailable) as away:
        catalogue.find("a")
    assert away.value.retry_after_s and catalogue.num_absent == 1 and catalogue.has_seen_models


def test_without_any_scheduler_nothing_is_known_yet() -> None:
    with pytest.raises(Unavailable):
        Catalogue().find("a")
