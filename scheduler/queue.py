"""The sequences that wait for a group: fair between tenants, by priority and arrival within one, bounded in tokens. Pure.

Fairness is by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", 2024): a tenant's counter grows with the
tokens that it was served, divided by its weight, and the next turn goes to the smallest one. A tenant that was idle comes back with at
least the counter that had its turn last, so that nobody saves up. A level of priority is worth AGING_S seconds of waiting, so that nothing
waits for ever.

Counters within `slack_tokens` of the smallest count as equal, and the earliest arrival among them goes first: strict turns between tenants
of about the same load would only make the longest waits longer.
"""

import bisect
from collections.abc import Iterator, Mapping

from scheduler.sequence import Sequence

AGING_S = 30.0
OUTPUT_WEIGHT = 2.0  # a generated token takes part in a step of its own; a prompt token shares one with thousands
DRAIN_HALF_LIFE_S, DRAIN_MIN_S = 5.0, 0.5
MAX_COUNTERS = 1024  # of tenants that do not wait; more are kept only where they still say something


class DrainRate:
    """Tokens per second that leave the queue while something waits in it, the latest seconds counting most."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._last: float | None = None  # when the queue was last seen to hold something

    def note(self, now: float, num_tokens: int, is_backlogged: bool) -> None:
        """So many tokens left now; `is_backlogged` tells whether something still waits."""
        if self._last is not None:
            passed_s = now - self._last
            fade = 0.5 ** (passed_s / DRAIN_HALF_LIFE_S)
            self._tokens, self._seconds = self._tokens * fade + num_tokens, self._seconds * fade + passed_s
        self._last = now if is_backlogged else None

    @property
    def tokens_per_s(self) -> float:
        """0 while too little was seen to tell."""
        return self._tokens / self._seconds if self._seconds > DRAIN_MIN_S else 0.0


class WaitingQueue:
    """One list per tenant in the order of `urgency`, and one counter. A preempted sequence comes back to the place of its arrival."""

    def __init__(self, max_tokens: int, weights: Mapping[str, float] | None = None, slack_tokens: int = 0) -> None:
        self.max_tokens = max_tokens
        self._slack_tokens = slack_tokens
        self._weights = weights or {}  # a tenant's share relative to others; 1 where none is given
        self.num_tokens = 0  # known tokens of all that wait
        self.num_uncached_tokens = 0  # those of them that are expected to be computed
        self._waiting: dict[str, list[Sequence]] = {}  # by tenant; no list is empty
        self._tokens_of: dict[str, int] = {}  # num_uncached_tokens by tenant
        self._served: dict[str, float] = {}  # the virtual counters
        self._clock = 0.0  # the counter that had its turn last; never falls
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return (waiting for own in self._waiting.values() for waiting in own)

    def has_room(self, num_tokens: int, tenant: str) -> bool:
        """An empty queue takes one request of any size, or a long prompt could never be served.

        A queue that others have filled still takes a tenant's equal share: nobody is shut out by somebody else's backlog.
        """
        if not self._num_waiting or self.num_tokens + num_tokens <= self.max_tokens:
            return True
        num_tenants = len(self._waiting) + (tenant not in self._waiting)
        return num_tenants > 1 and self._tokens_of.get(tenant, 0) + num_tokens <= self.max_tokens / num_tenants

    def push(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        if tenant not in self._waiting:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._clock - self._slack_tokens)
            self._waiting[tenant], self._tokens_of[tenant] = [], 0
            self._forget_idle()
        bisect.insort(self._waiting[tenant], sequence, key=urgency)
        self._num_waiting += 1
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        own = self._waiting[tenant]
        place = bisect.bisect_left(own, urgency(sequence), key=urgency)
        assert own[place] is sequence, "only a waiting sequence is removed"
        del own[place]
        self._num_waiting -= 1
        self._count(sequence, -1)
        if not own:
            del self._waiting[tenant], self._tokens_of[tenant]

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.num_known_tokens
        self.num_uncached_tokens += sign * sequence.num_uncached_tokens
        self._tokens_of[sequence.request.tenant] += sign * sequence.num_uncached_tokens

    def first(self, now: float) -> Sequence | None:
        """Whose turn it is: the most urgent level, in it the tenants that were served about the least, in these the earliest."""
        if not self._waiting:
            return None
        level = min(self._level(own[0], now) for own in self._waiting.values())
        heads = [(self._served[tenant], own[0]) for tenant, own in self._waiting.items() if self._level(own[0], now) == level]
        enough = min(served for served, _ in heads) + self._slack_tokens
        return min((head for served, head in heads if served <= enough), key=lambda head: head.arrival)

    @staticmethod
    def _level(sequence: Sequence, now: float) -> int:
        """Smaller is more urgent: one less for each level of priority and for each AGING_S of waiting."""
        return -sequence.request.priority - int((now - sequence.arrival_s) / AGING_S)

    def take_turn(self, sequence: Sequence, num_tokens: int) -> None:
        """Removes the sequence and charges its tenant for the prompt tokens that it is to compute."""
        self._clock = max(self._clock, min(self._served[tenant] for tenant in self._waiting))
        self.remove(sequence)
        self.charge(sequence.request.tenant, num_tokens)

    def charge(self, tenant: str, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """The tenant was served so many tokens."""
        cost = num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        self._served[tenant] = self._served.get(tenant, self._clock) + cost / self._weights.get(tenant, 1.0)

    def _forget_idle(self) -> None:
        """A counter at or under the clock says nothing: its tenant would come back with the clock anyway."""
        if len(self._served) > len(self._waiting) + MAX_COUNTERS:
            self._served = {who: count for who, count in self._served.items() if who in self._waiting or count > self._clock}

    def share_before(self, tenant: str, num_tokens: int) -> int:
        """The same for a quick guess, as if each of the others had as much waiting as they have on average."""
        own = self._tokens_of.get(tenant, 0)
        num_others = len(self._waiting) - (tenant in self._waiting)
        return own + min(self.num_uncached_tokens - own, num_others * (own + num_tokens))

    def tokens_before(self, tenant: str, num_tokens: int) -> int:
        """Tokens that are computed before a new sequence of so many is: of each other tenant about as many as this one's with it."""
        own = self._tokens_of.get(tenant, 0)
        equal = own + num_tokens + self._slack_tokens
        return own + sum(min(waiting, equal) for other, waiting in self._tokens_of.items() if other != tenant)

    def check_integrity(self) -> None:
        assert self._num_waiting == len(list(self))
        assert self.num_tokens == sum(waiting.num_known_tokens for waiting in self)
        assert self.num_uncached_tokens == sum(waiting.num_uncached_tokens for waiting in self) == sum(self._tokens_of.values())
        for tenant, own in self._waiting.items():
            assert own and self._tokens_of[tenant] == sum(waiting.num_uncached_tokens for waiting in own)
            assert [urgency(waiting) for waiting in own] == sorted(urgency(waiting) for waiting in own)
            assert tenant in self._served


def urgency(sequence: Sequence) -> tuple[float, int]:
    """The order within a tenant, which waiting does not change: arrival, earlier by AGING_S for each level of priority."""
    return (sequence.arrival_s - AGING_S * sequence.request.priority, sequence.arrival)
