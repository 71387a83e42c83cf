"""What became of a simulated workload's requests, and the figures that sum it up."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from scheduler.sequence import FinishReason, Request
from scheduler.simulation.workload import answer_of
from services.errors import OssiaError


@dataclass
class Record:
    """One request, from its arrival at the edge on. Times are on the simulation's clock."""

    request: Request
    at_s: float
    group_ids: list[str] = field(default_factory=list)  # more than one where a group was lost
    num_predicted_tokens: int = 0  # what placement thought to find in the cache, at the first group
    num_cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    ended_s: float | None = None
    reason: FinishReason | None = None
    error: OssiaError | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_token_s is not None
        return self.first_token_s - self.at_s

    @property
    def is_answered(self) -> bool:
        """Every token of the answer came, once and in order."""
        return self.reason is FinishReason.STOP and self.token_ids == list(answer_of(self.request).token_ids)


@dataclass(frozen=True)
class Outcome:
    records: Sequence[Record]
    busy_s: Sequence[float]  # of each group's device
    ended_s: float
    num_steps: int

    def of(self, keep: Callable[[Record], bool]) -> "Outcome":
        return Outcome([one for one in self.records if keep(one)], self.busy_s, self.ended_s, self.num_steps)

    @property
    def started(self) -> list[Record]:
        return [one for one in self.records if one.first_token_s is not None]

    @property
    def hit_ratio(self) -> float:
        """Prompt tokens found in a cache, of all prompt tokens that were computed or found."""
        num_tokens = sum(len(one.request.prompt_token_ids) for one in self.started)
        return sum(one.num_cached_tokens for one in self.started) / num_tokens if num_tokens else 0.0

    @property
    def ttfts_s(self) -> list[float]:
        return sorted(one.ttft_s for one in self.started)

    def ttft_s(self, share: float) -> float:
        return percentile(self.ttfts_s, share)

    @property
    def mean_ttft_s(self) -> float:
        return sum(self.ttfts_s) / len(self.ttfts_s)

    @property
    def num_mispredicted(self) -> int:
        """Started requests that found another number of cached tokens than placement had thought."""
        return sum(one.num_predicted_tokens != one.num_cached_tokens for one in self.started)

    @property
    def errors(self) -> Counter[str]:
        return Counter(type(one.error).__name__ for one in self.records if one.error is not None)


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def median(values: Iterable[float]) -> float:
    ascending = sorted(values)
    return ascending[len(ascending) // 2]
