"""The worker groups that this scheduler owns: joining, being lost, coming back; and which of them takes a request."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping

import grpc
from google.protobuf import json_format

from protos.ossia.v1 import scheduler_pb2, worker_pb2, worker_pb2_grpc
from scheduler.batching import Batcher
from scheduler.config import SchedulerConfig
from scheduler.group import Group, HandedOver
from scheduler.metrics import SchedulerMetrics
from scheduler.open_request import OpenRequest, handle_of
from scheduler.ownership import Ownership
from scheduler.placement import Candidate, choose, rank
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import Request, Sequence
from services.discovery import Discovery
from services.errors import ContextLengthExceeded, GroupLost, ModelNotFound, OssiaError, Overloaded, Unavailable, from_rpc_error
from services.grpc_channel import open_channel
from services.telemetry import get_logger
from services.tls import Identity

log = get_logger(__name__)

DESCRIBE_TIMEOUT_S = 5.0
MEASURE_S = 1.0
MAX_MOVES = 2
RECONNECT_S = (0.1, 2.0)  # first and longest wait before a group is tried again


class Fleet:
    """`run` follows discovery and keeps one task per group that is or was announced. Everything else may be called at any time."""

    def __init__(
        self,
        config: SchedulerConfig,
        discovery: Discovery,
        metrics: SchedulerMetrics,
        on_change: Callable[[], None] = lambda: None,
        identity: Identity | None = None,
    ) -> None:
        self.groups: dict[str, Group] = {}  # live ones, by group id
        self.on_change = on_change
        self._config = config
        self._discovery = discovery
        self._metrics = metrics
        self._identity = identity
        self._index = PrefixIndex()  # what the live groups' caches hold; they write it
        self._models: dict[str, scheduler_pb2.ModelStatus] = {}  # every model seen, so that a lost one is "unavailable" and not "unknown"
        self._members: Mapping[str, bytes] = {}
        self._ownership = Ownership(config.scheduler_id, discovery)
        self._keepers: dict[str, asyncio.Task[None]] = {}  # by key in discovery: the group id, or an address where that is static

    async def run(self) -> None:
        """Until cancelled. A group whose announcement vanishes stays while its stream lives: only its end is proof that it is gone."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ownership.run())
            tasks.create_task(self._watch_owners())
            tasks.create_task(self._measure())
            tasks.create_task(self._rebalance())
            async for members in self._discovery.watch("groups"):
                self._members = members
                self._ownership.set_groups(members.keys())
                for key in members.keys() - self._keepers.keys():
                    self._keepers[key] = tasks.create_task(self._keep(key))

    async def _measure(self) -> None:
        """Keeps the groups' gauges up to date, whether or not steps are computed."""
        while True:
            self._metrics.observe_groups([group.status() for group in self.groups.values()])
            await asyncio.sleep(MEASURE_S)

    async def _keep(self, key: str) -> None:
        """Owns the group while it is announced and ours to own, over as many lives of its process as it has."""
        wait_s = RECONNECT_S[0]
        while announcement := self._members.get(key):
            try:
                if self._ownership.is_ours(key):
                    await self._drive(json_format.Parse(announcement, worker_pb2.GroupInfo(), ignore_unknown_fields=True).address)
            except HandedOver:  # it has left `groups`: nobody here claims it again while it is released
                await self._discovery.release(key, self._config.scheduler_id)
                log.info("group_handed_over", group=key, to=self._ownership.rightful_owner(key))
            except GroupLost as error:
                log.warning("group_lost", group=key, cause=error.message)
                wait_s = RECONNECT_S[0]
            except (OssiaError, json_format.ParseError) as error:
                log.info("group_not_reached", group=key, cause=str(error))
            await self._ownership.wait_changed(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, RECONNECT_S[1])
        del self._keepers[key]

    async def _drive(self, address: str) -> None:
        """One life of the group: describe, claim, run. Raises what ended it."""
        async with open_channel(address, identity=self._identity, role="worker") as channel:
            stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(channel)
            try:
                info = await stub.Describe(worker_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S)
            except grpc.aio.AioRpcError as failure:
                raise from_rpc_error(failure) from None
            if info.group_id in self.groups:
                raise Unavailable(f"two workers call themselves {info.group_id}: give each its own --group-id")
            epoch = await self._discovery.claim(info.group_id, self._config.scheduler_id, above=info.epoch)
            if epoch is None:
                raise Unavailable(f"group {info.group_id} is owned by another scheduler")
            group = Group(info, epoch or info.epoch + 1, self._config, self._metrics, self._index)
            self._join(group)
            error: OssiaError = GroupLost("the scheduler let the group go: send the request again", retry_after_s=1.0)
            try:
                await group.run(stub)
            except GroupLost as lost:
                error = lost
                self._metrics.count_loss(group.group_id)
                raise
            finally:
                self._leave(group, error)

    def _join(self, group: Group) -> None:
        info = group.info
        self.groups[group.group_id] = group
        self._models[info.model] = scheduler_pb2.ModelStatus(
            model=info.model,
            max_model_len=group.batcher.limits.max_sequence_tokens,
            vocab_size=info.vocab_size,
            architecture=info.architecture,
            total_parameters=info.total_parameters,
            active_parameters=info.active_parameters,
            fingerprint=info.fingerprint,
            block_size=info.block_size,
        )
        log.info("group_joined", group=group.group_id, model=info.model, address=info.address, epoch=group.epoch)
        self.on_change()

    def _leave(self, group: Group, error: OssiaError) -> None:
        del self.groups[group.group_id]
        group.abandon(error, self._move)
        group.batcher.close()
        self.on_change()

    def _move(self, sequence: Sequence) -> bool:
        """Lets a lost group's sequence go on in another one, with the tokens that it has; its stream goes on. False: nobody takes it.

        One that has lost MAX_MOVES groups may be what kills them, and is not given another.
        """
        request = sequence.continuation()
        if request.num_moves > MAX_MOVES:
            return False
        try:
            group, _ = self.place(request)
            group.open(request)
        except OssiaError as error:
            log.info("sequence_not_moved", request_id=request.request_id, cause=error.message)
            return False
        _, moved = handle_of(sequence).placed[sequence.index]
        moved.inherit(sequence)
        log.info("sequence_moved", request_id=request.request_id, group=group.group_id, num_tokens=sequence.num_known_tokens)
        return True

    async def _rebalance(self) -> None:
        """Lets groups go that are another's by now, each when its last request has ended; and keeps those that come back before."""
        while True:
            for group in self.groups.values():
                is_leaving = not self._ownership.is_ours(group.group_id)
                if is_leaving != group.is_leaving:
                    group.hand_over(is_leaving)
                    self.on_change()
            await self._ownership.wait_changed(RECONNECT_S[1])

    async def _watch_owners(self) -> None:
        """Lets go of a group that another scheduler owns by now, and claims again what a lost lease set free."""
        own = self._config.scheduler_id
        async for owners in self._discovery.watch("owners"):
            for group in list(self.groups.values()):
                owner = owners.get(group.group_id, b"").decode()
                if owner not in ("", own) or (not owner and not await self._claim_again(group)):
                    log.warning("group_owned_by_another", group=group.group_id, owner=owner)
                    group.fence()

    async def _claim_again(self, group: Group) -> bool:
        """While etcd is away nobody can say who owns the group: it is driven on, and the worker's fence decides."""
        while True:
            try:
                epoch = await self._discovery.claim(group.group_id, self._config.scheduler_id, above=group.epoch)
            except OssiaError as error:
                log.warning("group_not_claimed", group=group.group_id, cause=error.message)
                await asyncio.sleep(RECONNECT_S[1])
                continue
            if epoch:
                group.epoch = epoch
            return epoch is not None

    def cancel(self, handle: OpenRequest) -> None:
        """Ends what is left of the request."""
        for group_id, sequence in list(handle.placed.values()):
            if group := self.groups.get(group_id):
                group.cancel(sequence)

    # ---- placing ----

    def candidates(self, request: Request) -> list[Candidate]:
        """Every live group of the request's model, cheapest first."""
        return rank(request, self._batchers(request.model), self._index, time.monotonic())

    def cheapest(self, request: Request) -> Candidate | None:
        """The first of `candidates`, in less time."""
        return choose(request, self._batchers(request.model), self._index, time.monotonic())

    def _batchers(self, model: str) -> dict[str, Batcher]:
        """Groups that are leaving count only where there is no other: a hand-over waits for a quiet moment, and no request waits for it."""
        usable = {name: group for name, group in self.groups.items() if group.info.model == model and group.is_usable}
        staying = {name: group.batcher for name, group in usable.items() if not group.is_leaving}
        return staying or {name: group.batcher for name, group in usable.items()}

    def place(self, request: Request) -> tuple[Group, Candidate]:
        """The cheapest group that can take the request. Raises the reason where there is none."""
        best = self.cheapest(request)
        if best is None:
            raise Unavailable(f"no worker group serves {request.model} at present: try again shortly", retry_after_s=1.0)
        if best.excluded:
            raise self._refusal(request)
        return self.groups[best.group_id], best

    def _refusal(self, request: Request) -> OssiaError:
        """Why no group of the model can take it: it fits none, or all queues are full."""
        groups = [group for group in self.groups.values() if group.info.model == request.model]
        longest = max(group.batcher.limits.max_sequence_tokens for group in groups)
        if len(request.prompt_token_ids) >= longest:
            return ContextLengthExceeded(
                f"the prompt has {len(request.prompt_token_ids)} tokens and {request.model} holds {longest}, at least one of them to "
                "generate: shorten the messages",
                param="messages",
            )
        return Overloaded(
            "every queue for this model is full: try again later", retry_after_s=min(group.batcher.drain_s for group in groups)
        )

    def model(self, name: str) -> scheduler_pb2.ModelStatus:
        """Raises ModelNotFound for one that no group ever served here."""
        if status := self._models.get(name):
            return status
        known = ", ".join(sorted(self._models)) or "none yet"
        raise ModelNotFound(f"the model {name!r} is not served here: choose one of {known}", param="model")

    def models(self) -> list[scheduler_pb2.ModelStatus]:
        """Every model seen, with the number of groups that serve it now."""
        for name, status in self._models.items():
            status.num_groups = sum(group.info.model == name and group.is_usable for group in self.groups.values())
        return [self._models[name] for name in sorted(self._models)]
