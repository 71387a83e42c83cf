"""What a workload is: requests with their times and the answers they will get. The generators are in `workloads.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.sequence import Request


@dataclass(frozen=True)
class Answer:
    """Carried as `Request.handle`: what the simulated model says. The core never reads it, so that it knows no length in advance."""

    token_ids: Sequence[int]
    follow_up: "FollowUp | None" = None


@dataclass(frozen=True)
class Arrival:
    at_s: float
    request: Request


FollowUp = Callable[[float], Arrival]  # the time at which the answer ended → the next turn


def answer_of(request: Request) -> Answer:
    assert isinstance(request.handle, Answer)
    return request.handle
