"""Which group takes a request. Pure; every term is in seconds, so that they add up and can be explained.

    cost = queue      until the group has computed what is under way and what goes first of what waits, by the tenants' shares
         + prefill    this prompt's tokens that its cache does not hold
         + host copy  bringing blocks back from host memory
         + step       what the others there lose: each decoding sequence waits for this prefill's share of its steps and then takes part in
                      longer steps, and whoever comes next waits behind this prefill
         + eviction   computing again what must go to make room, as far as it has been of use before

A copy of a prefix is worth its room in one place. That is why a prefill counts twice, for the request itself and for those behind it: with
once, a short queue elsewhere is enough to compute a long prefix a second time, and the time saved by one request is lost by others.

Rates come from the group's own step results; one that has measured nothing is taken to be as fast as the first that has.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scheduler.batching import Batcher
from scheduler.prefix_cache import Expected, PrefixIndex
from scheduler.sequence import Request

GUESSED_PREFILL_TOKENS_PER_S = 10_000.0
GUESSED_COMPLETION_TOKENS = 256.0
NUM_BEHIND = 1.0  # requests that wait for this one's prefill, beside the sequences that run


class Candidate(NamedTuple):
    """One group as a place for one request; terms in seconds, `excluded` says why it cannot take it ("": it can)."""

    group_id: str
    queue_s: float = 0.0
    prefill_s: float = 0.0
    host_copy_s: float = 0.0
    step_s: float = 0.0
    eviction_s: float = 0.0
    num_cached_tokens: int = 0
    excluded: str = ""

    @property
    def cost_s(self) -> float:
        return self.queue_s + self.prefill_s + self.host_copy_s + self.step_s + self.eviction_s


def rank(request: Request, groups: Mapping[str, Batcher], index: PrefixIndex, now: float) -> list[Candidate]:
    """All groups, cheapest first, those that cannot take the request last. Equal costs go by group id: the choice can be repeated."""
    holders = index.holders(request.block_names)
    guess = _guess(groups.values())
    return sorted((_score(request, name, batcher, name in holders, guess, now) for name, batcher in groups.items()), key=_order)


def choose(request: Request, groups: Mapping[str, Batcher], index: PrefixIndex, now: float) -> Candidate | None:
    """The first of `rank`, None where there is no group. A group whose steps and prefill alone cost more than the best is not scored."""
    holders = index.holders(request.block_names)
    guess = _guess(groups.values())
    num_tokens = len(request.prompt_token_ids) * (1.0 + NUM_BEHIND)
    best: Candidate | None = None
    for name in holders:
        if batcher := groups.get(name):
            candidate = _score(request, name, batcher, True, guess, now)
            best = min(best or candidate, candidate, key=_order)
    limit_s = best.cost_s if best and not best.excluded else float("inf")
    for name, batcher in groups.items():
        done_s, started_s = batcher.backlog
        at_least_s = started_s + num_tokens * batcher.rates.prefill.slope
        if at_least_s > limit_s or done_s - now + at_least_s > limit_s or name in holders:
            continue
        candidate = _score(request, name, batcher, False, guess, now)
        best = min(best or candidate, candidate, key=_order)
        limit_s = limit_s if best.excluded else best.cost_s
    return best


def _order(candidate: Candidate) -> tuple[bool, float, str]:
    return bool(candidate.excluded), candidate.cost_s, candidate.group_id


def _score(request: Request, group_id: str, batcher: Batcher, may_hold: bool, guess: float, now: float) -> Candidate:
    limits, num_tokens = batcher.limits, len(request.prompt_token_ids)
    if num_tokens >= limits.max_sequence_tokens:
        return Candidate(group_id, excluded=f"the prompt does not fit its {limits.max_sequence_tokens} tokens")
    if not batcher.has_room(request):
        return Candidate(group_id, excluded="its queue is full")
    expected = batcher.cache.expect(request) if may_hold else Expected(0, 0)
    num_cached_tokens = expected.num_blocks * limits.block_size
    prefill_s = _prefill_s(batcher, num_tokens - num_cached_tokens, guess)
    return Candidate(
        group_id,
        queue_s=_queue_s(batcher, batcher.queued_before(request, num_tokens - num_cached_tokens), guess, now),
        prefill_s=prefill_s,
        host_copy_s=batcher.rates.fetch_s(expected.num_fetched),
        step_s=NUM_BEHIND * prefill_s + _added_steps_s(request, batcher),
        eviction_s=_prefill_s(batcher, batcher.cache.eviction_tokens(limits.num_blocks(num_tokens - num_cached_tokens)), guess),
        num_cached_tokens=num_cached_tokens,
    )


def _guess(batchers: Iterable[Batcher]) -> float:
    """Prefill tokens per second of a group that has measured none."""
    for batcher in batchers:
        if batcher.rates.prefill_tokens_per_s:
            return batcher.rates.prefill_tokens_per_s
    return GUESSED_PREFILL_TOKENS_PER_S


def _queue_s(batcher: Batcher, num_before: int, guess: float, now: float) -> float:
    """Under way, started, and `num_before` waiting tokens that have their turn first."""
    if not batcher.rates.prefill_tokens_per_s:
        return (num_before + batcher.num_started_tokens + sum(step.num_prefill_tokens for step in batcher.in_flight)) / guess
    done_s, started_s = batcher.backlog
    return max(0.0, done_s - now) + started_s + (_prefill_s(batcher, num_before, guess) if num_before else 0.0)


def _prefill_s(batcher: Batcher, num_tokens: int, guess: float) -> float:
    if not batcher.rates.prefill_tokens_per_s:
        return num_tokens / guess
    return batcher.rates.prefill_s(num_tokens, batcher.limits.max_batch_tokens)


def _added_steps_s(request: Request, batcher: Batcher) -> float:
    """A new sequence makes every step longer by what the decode curve says at this batch size, for all that share those steps."""
    num_steps = batcher.rates.completion_tokens.mean or GUESSED_COMPLETION_TOKENS
    if request.max_tokens is not None:
        num_steps = min(num_steps, request.max_tokens)
    num_others, curve = batcher.num_running + batcher.num_waiting, batcher.rates.decode
    return num_steps * (num_others + request.n) * (curve.at(num_others + request.n) - curve.at(num_others))
