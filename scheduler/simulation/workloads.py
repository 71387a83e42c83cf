"""Seeded traffic. Token ids stand for nothing: what counts is which prompts begin alike, how long they are, and when they come.

Each generator gives arrivals in the order of their times; a request whose answer leads to another carries that as its follow-up.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scheduler.sequence import Request
from scheduler.simulation.workload import Answer, Arrival, FollowUp
from services.prefix_hash import PrefixHasher, prefix_key

END_TOKEN_ID = 0  # what simulated groups take for the end of an answer
MODEL = "simulated"


class Writer:
    """Makes requests whose tokens nobody else has, unless they are handed from one to the next."""

    def __init__(self, block_size: int = 16) -> None:
        self._block_size = block_size
        self._next_token_id = END_TOKEN_ID + 1
        self._num_requests = 0

    def fresh(self, num_tokens: int) -> range:
        start, self._next_token_id = self._next_token_id, self._next_token_id + num_tokens
        return range(start, self._next_token_id)

    def answer(self, num_tokens: int, follow_up: FollowUp | None = None) -> Answer:
        return Answer([*self.fresh(num_tokens - 1), END_TOKEN_ID], follow_up)

    def request(self, tenant: str, prompt: Sequence[int], answer: Answer, **fields: object) -> Request:
        self._num_requests += 1
        return Request(
            request_id=f"r{self._num_requests}",
            model=MODEL,
            prompt_token_ids=prompt,
            tenant=tenant,
            prefix=PrefixHasher(prefix_key(tenant, b""), self._block_size, prompt),
            handle=answer,
            **fields,  # type: ignore[arg-type]
        )


def poisson(rate_per_s: float, draw: random.Random) -> Iterator[float]:
    """Arrival times without end."""
    now = 0.0
    while True:
        now += draw.expovariate(rate_per_s)
        yield now


def bursts(rate_per_s: float, burst_size: int, draw: random.Random) -> Iterator[float]:
    """The same mean rate, in bursts of equal times."""
    for at_s in poisson(rate_per_s / burst_size, draw):
        yield from itertools.repeat(at_s, burst_size)


@dataclass(frozen=True)
class SharedPrefixes:
    """Tenants with a long prefix of their own (instructions, a document) and a short question each time."""

    rate_per_s: float
    num_tenants: int
    num_requests: int = 1500
    prefix_tokens: int = 6000
    question_tokens: int = 1200
    answer_tokens: int = 1
    burst_size: int = 1

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        draw, writer = random.Random(seed), Writer()
        prefixes = [writer.fresh(self.prefix_tokens) for _ in range(self.num_tenants)]
        for at_s in itertools.islice(bursts(self.rate_per_s, self.burst_size, draw), self.num_requests):
            tenant = draw.randrange(self.num_tenants)
            prompt = [*prefixes[tenant], *writer.fresh(self.question_tokens)]
            yield Arrival(at_s, writer.request(f"t{tenant}", prompt, writer.answer(self.answer_tokens)))


@dataclass(frozen=True)
class Chats:
    """Conversations of several turns: each turn's prompt is everything before it, and its answer becomes part of the next."""

    rate_per_s: float  # conversations that begin
    num_chats: int
    num_tenants: int = 20
    system_tokens: int = 800  # shared by a tenant's conversations
    question_tokens: tuple[int, int] = (30, 400)
    answer_tokens: tuple[int, int] = (60, 600)
    num_turns: tuple[int, int] = (2, 8)
    pause_s: tuple[float, float] = (2.0, 30.0)

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        draw, writer = random.Random(seed), Writer()
        systems = [writer.fresh(self.system_tokens) for _ in range(self.num_tenants)]
        for at_s in itertools.islice(poisson(self.rate_per_s, draw), self.num_chats):
            tenant = draw.randrange(self.num_tenants)
            own = random.Random(draw.getrandbits(64))  # turns come in an order that depends on the groups: each chat draws by itself
            yield self._turn(at_s, f"t{tenant}", list(systems[tenant]), own.randint(*self.num_turns), own, writer)

    def _turn(self, at_s: float, tenant: str, history: list[int], num_left: int, draw: random.Random, writer: Writer) -> Arrival:
        prompt = [*history, *writer.fresh(draw.randint(*self.question_tokens))]
        answer = writer.answer(draw.randint(*self.answer_tokens))

        def next_turn(ended_s: float) -> Arrival:
            return self._turn(ended_s + draw.uniform(*self.pause_s), tenant, [*prompt, *answer.token_ids], num_left - 1, draw, writer)

        follow_up = next_turn if num_left > 1 else None
        return Arrival(at_s, writer.request(tenant, prompt, Answer(answer.token_ids, follow_up)))


def agents(rate_per_s: float, num_agents: int) -> Chats:
    """Tool loops: many short calls on one growing prompt, a tool's output of some length between them, and next to no pause."""
    return Chats(
        rate_per_s=rate_per_s,
        num_chats=num_agents,
        num_tenants=4,
        system_tokens=3000,
        question_tokens=(100, 2000),
        answer_tokens=(30, 150),
        num_turns=(5, 20),
        pause_s=(0.05, 1.5),
    )


def long_documents(rate_per_s: float, num_documents: int) -> Chats:
    """A document of tens of thousands of tokens, then a few questions about it."""
    return Chats(
        rate_per_s=rate_per_s,
        num_chats=num_documents,
        num_tenants=num_documents,
        system_tokens=40_000,
        question_tokens=(20, 200),
        answer_tokens=(100, 800),
        num_turns=(1, 4),
        pause_s=(5.0, 40.0),
    )


def hot_prefix(rate_per_s: float, num_requests: int) -> SharedPrefixes:
    """Everybody asks about the same thing: one group holds the prefix, and one group is not enough."""
    return SharedPrefixes(rate_per_s, num_tenants=1, num_requests=num_requests, prefix_tokens=6000, question_tokens=200)


def sudden_bursts(rate_per_s: float, num_requests: int) -> SharedPrefixes:
    """Ten requests at the same moment, again and again."""
    return SharedPrefixes(rate_per_s, num_tenants=20, num_requests=num_requests, burst_size=10)
