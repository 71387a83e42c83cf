"""A simulated cluster: edges, schedulers and groups on one virtual clock. The batchers and the choice between them are production code.

Schedulers of ours own disjoint groups and know what each holds; an edge asks them all and opens the request at the cheapest. Another
policy's routers each reach every group, know their own requests only, and share the requests at random.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scheduler.batching import Batcher
from scheduler.placement import Candidate, choose
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import Event, GroupLimits, Request
from scheduler.sequence import Sequence as RunningSequence
from scheduler.simulation.events import EventLoop
from scheduler.simulation.group import SimulatedGroup
from scheduler.simulation.outcome import Outcome, Record
from scheduler.simulation.policies import MakePolicy, Policy
from scheduler.simulation.step_time import StepTime
from scheduler.simulation.workload import Arrival, answer_of
from services.errors import GroupLost, OssiaError, Unavailable


@dataclass(frozen=True)
class Faults:
    """What goes wrong. A lost group comes back empty after `back_after_s`."""

    losses: Sequence[tuple[float, str]] = ()  # (when, group id)
    back_after_s: float = 5.0
    late_share: float = 0.0  # of results that come late
    late_s: float = 0.05


@dataclass(frozen=True)
class ClusterSpec:
    """All groups are alike. `hop_s` is one message between edge and scheduler."""

    num_groups: int
    limits: GroupLimits
    step_time: StepTime
    num_schedulers: int = 1
    make_policy: MakePolicy | None = None  # None: ours
    max_queued_tokens: int = 2_000_000
    hop_s: float = 0.0005
    faults: Faults = Faults()

    @property
    def group_ids(self) -> list[str]:
        return [f"g{number:04}" for number in range(self.num_groups)]


class OwnedGroups:
    """One scheduler of ours: what it owns, and the index over that."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.groups: dict[str, SimulatedGroup] = {}

    def quote(self, request: Request, now: float) -> Candidate | None:
        """The cheapest group here; None where there is none at all."""
        return choose(request, {name: group.batcher for name, group in self.groups.items()}, self.index, now)


class SimulatedCluster:
    """One run of one workload. The same spec, workload and seed give the same outcome."""

    def __init__(self, spec: ClusterSpec, seed: int, make_group: type[SimulatedGroup] = SimulatedGroup) -> None:
        self._make_group = make_group
        self.loop = EventLoop()
        self.spec = spec
        self.owners = [OwnedGroups() for _ in range(spec.num_schedulers)]
        self.records: dict[str, Record] = {}
        self._open: dict[RunningSequence, str] = {}  # → group id
        self._draw = random.Random(seed)
        self._fault_draw = random.Random(seed + 1)
        self._groups: dict[str, SimulatedGroup] = {}
        self._all_groups: list[SimulatedGroup] = []  # lost ones too
        self._routers: list[Policy] = []
        self._router_of: dict[str, Policy] = {}
        for group_id in spec.group_ids:
            self._start_group(group_id)
        if spec.make_policy:
            self._routers = [spec.make_policy(spec.group_ids, self._draw) for _ in range(spec.num_schedulers)]

    def run(self, arrivals: Iterable[Arrival], until_s: float = float("inf")) -> Outcome:
        self._expect_next(iter(arrivals))
        for at_s, group_id in self.spec.faults.losses:
            self.loop.at(at_s, partial(self._lose_group, group_id))
        self.loop.run(until_s)
        num_steps = sum(group.batcher.num_steps for group in self._all_groups)
        return Outcome(list(self.records.values()), [group.busy_s for group in self._all_groups], self.loop.now, num_steps)

    @property
    def batchers(self) -> Mapping[str, Batcher]:
        return {name: group.batcher for name, group in self._groups.items()}

    # ---- groups ----

    def _start_group(self, group_id: str) -> None:
        owner = self.owners[self.spec.group_ids.index(group_id) % len(self.owners)]
        batcher = Batcher(self.spec.limits, max_queued_tokens=self.spec.max_queued_tokens, index=owner.index, group_id=group_id)
        group = self._make_group(group_id, batcher, self.spec.step_time, self.loop, self._deliver, late_s=self._late_s)
        owner.groups[group_id] = self._groups[group_id] = group
        self._all_groups.append(group)

    def _late_s(self) -> float:
        faults = self.spec.faults
        return faults.late_s if faults.late_share and self._fault_draw.random() < faults.late_share else 0.0

    def _lose_group(self, group_id: str) -> None:
        """Its requests are placed again, with the tokens that they have."""
        group = self._groups.pop(group_id)
        for owner in self.owners:
            owner.groups.pop(group_id, None)
        group.lose()
        lost = GroupLost(f"group {group_id} was lost", retry_after_s=1.0)
        self._deliver(group.batcher.abandon(lost, self.loop.now))
        group.batcher.close()
        self.loop.after(self.spec.faults.back_after_s, partial(self._start_group, group_id))

    # ---- requests ----

    def _expect_next(self, arrivals: Iterator[Arrival]) -> None:
        if arrival := next(arrivals, None):
            self.loop.at(arrival.at_s, partial(self._arrive, arrival, arrivals))

    def _arrive(self, arrival: Arrival, rest: Iterator[Arrival] | None = None) -> None:
        request = arrival.request
        self.records[request.request_id] = Record(request, self.loop.now)
        self._send(request)
        if rest is not None:
            self._expect_next(rest)

    def _send(self, request: Request) -> None:
        if self.spec.make_policy:
            self.loop.after(self.spec.hop_s, partial(self._route, request))
        elif len(self.owners) == 1:
            self.loop.after(self.spec.hop_s, partial(self._place, request, self.owners[0]))
        else:
            self.loop.after(self.spec.hop_s, partial(self._ask_all, request))

    def _ask_all(self, request: Request) -> None:
        """Every owner quotes; the edge has the answers one hop later and opens at the cheapest, which hears of it after another."""
        quotes = [(quote, owner) for owner in self.owners if (quote := owner.quote(request, self.loop.now))]
        accepting = [(quote.cost_s, at, owner) for at, (quote, owner) in enumerate(quotes) if not quote.excluded]
        owner = min(accepting, key=lambda one: one[:2])[2] if accepting else quotes[0][1] if quotes else self.owners[0]
        self.loop.after(2 * self.spec.hop_s, partial(self._place, request, owner))

    def _place(self, request: Request, owner: OwnedGroups) -> None:
        best = owner.quote(request, self.loop.now)
        if best is None and any(one.groups for one in self.owners):
            self._send(request)  # its groups were lost since it quoted
        elif best is None:
            self._refuse(request, Unavailable("no group is there at present", retry_after_s=1.0))
        else:
            self._open_at(request, best.group_id, best.num_cached_tokens)

    def _route(self, request: Request) -> None:
        router = self._routers[self._draw.randrange(len(self._routers))]
        group_id = router.choose(request)
        if group_id not in self._groups:
            self._refuse(request, Unavailable(f"group {group_id} is not there", retry_after_s=1.0))
        elif self._open_at(request, group_id):
            self._router_of[request.request_id] = router
            router.opened(request, group_id)

    def _open_at(self, request: Request, group_id: str, num_predicted_tokens: int = 0) -> bool:
        record = self.records[request.request_id]
        try:
            sequences = self._groups[group_id].open(request)
        except OssiaError as error:
            self._refuse(request, error)
            return False
        if not record.group_ids:
            record.num_predicted_tokens = num_predicted_tokens
        record.group_ids.append(group_id)
        self._open.update(dict.fromkeys(sequences, group_id))
        return True

    def _refuse(self, request: Request, error: OssiaError) -> None:
        record = self.records[request.request_id]
        record.error, record.ended_s = error, self.loop.now

    def cancel(self, request_id: str) -> None:
        for sequence, group_id in list(self._open.items()):
            if sequence.request.request_id == request_id:
                self._groups[group_id].cancel(sequence)

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            record = self.records[event.sequence.request.request_id]
            if event.token_ids and event.sequence.index == 0:
                record.token_ids += event.token_ids
                if record.first_token_s is None:
                    record.first_token_s, record.num_cached_tokens = self.loop.now, event.sequence.num_cached_tokens
            if event.finish:
                self._end(event, record)

    def _end(self, event: Event, record: Record) -> None:
        assert event.finish is not None
        request, finish = event.sequence.request, event.finish
        del self._open[event.sequence]
        if router := self._router_of.pop(request.request_id, None):
            router.ended(request, record.group_ids[-1])
        if isinstance(finish.error, GroupLost):
            self.loop.after(self.spec.hop_s, partial(self._send, resumed(request, event.sequence.output_token_ids)))
            return
        record.reason, record.error, record.ended_s = finish.reason, finish.error, self.loop.now
        if follow_up := answer_of(request).follow_up:
            arrival = follow_up(self.loop.now)
            self.loop.at(arrival.at_s, partial(self._arrive, arrival))


def resumed(request: Request, output_token_ids: Sequence[int]) -> Request:
    """The request as it is asked again with the tokens that it has."""
    return replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *output_token_ids],
        num_resumed_tokens=request.num_resumed_tokens + len(output_token_ids),
    )
