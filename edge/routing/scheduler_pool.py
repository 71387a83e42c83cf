"""The schedulers that are alive, one stream to each, and the choice among them."""

import asyncio
from collections.abc import Mapping

from edge.routing.catalogue import RETRY_AFTER_S, Catalogue
from edge.routing.scheduler_stream import SchedulerStream
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.discovery import Discovery
from services.errors import Unavailable
from services.prefix_hash import PrefixHasher, prefix_key
from services.telemetry import get_logger
from services.tls import Identity

KIND = "schedulers"
log = get_logger(__name__)


class SchedulerPool:
    """`run` follows the membership; the rest only reads what it keeps."""

    def __init__(self, discovery: Discovery, edge_id: str, catalogue: Catalogue, identity: Identity | None = None) -> None:
        self._discovery = discovery
        self._edge_id = edge_id
        self._catalogue = catalogue
        self._identity = identity
        self._streams: dict[tuple[str, str], SchedulerStream] = {}  # present members by id and address; changed by `run` alone

    @property
    def streams(self) -> tuple[SchedulerStream, ...]:
        return tuple(self._streams.values())

    @property
    def num_connected(self) -> int:
        """May be asked from another thread."""
        return sum(stream.status is not None for stream in tuple(self._streams.values()))

    @property
    def num_disconnected(self) -> int:
        return sum(stream.status is None for stream in self._streams.values())

    async def choose(self, request: scheduler.GenerateRequest) -> SchedulerStream:
        """The scheduler that gives the first token soonest, by their own quotes. Raises Unavailable where none serves the model.

        One that does not quote in time costs no more than that time; where none does, the one with the fewest open requests is taken.
        """
        serving = [stream for stream in self._streams.values() if stream.takes_requests and _serves(stream.status, request.model)]
        if not serving:
            raise Unavailable(f"no scheduler takes requests for the model {request.model!r} now; try again", retry_after_s=RETRY_AFTER_S)
        if len(serving) == 1:
            return serving[0]
        asked = quote_request(request, self._catalogue.find(request.model).block_size)
        quotes = await asyncio.gather(*(stream.quote(asked) for stream in serving))
        offers = [
            (quote.cost_s, stream.address, stream) for quote, stream in zip(quotes, serving, strict=True) if quote and quote.accepting
        ]
        return min(offers)[2] if offers else min(serving, key=lambda stream: stream.num_open)

    async def run(self) -> None:
        """Follows the membership until cancelled; then every stream is closed and every open request failed."""
        async with asyncio.TaskGroup() as tasks:
            async for members in self._discovery.watch(KIND):
                self._follow(members, tasks)

    def _follow(self, members: Mapping[str, bytes], tasks: asyncio.TaskGroup) -> None:
        present = {(scheduler_id, value.decode()) for scheduler_id, value in members.items()}
        for key in self._streams.keys() - present:
            self._streams.pop(key).retire()
            log.info("scheduler_left", address=key[1])
        for key in present - self._streams.keys():
            stream = self._streams[key] = SchedulerStream(key[1], self._edge_id, self._catalogue, self._identity)
            tasks.create_task(stream.run())
            log.info("scheduler_joined", address=key[1])


def quote_request(request: scheduler.GenerateRequest, block_size: int) -> scheduler.QuoteRequest:
    """What a scheduler has to know of a request to price it: its blocks by name, and not its tokens."""
    hasher = PrefixHasher(prefix_key(request.tenant, request.cache_salt), block_size, request.prompt_token_ids)
    return scheduler.QuoteRequest(
        model=request.model,
        num_prompt_tokens=len(request.prompt_token_ids),
        block_hashes=hasher.hashes,
        checkpoint_positions=request.checkpoint_positions,
        tenant=request.tenant,
        priority=request.priority,
        n=request.n,
        max_tokens=request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None,
    )


def _serves(status: scheduler.SchedulerStatus | None, model: str) -> bool:
    return status is not None and any(one.model == model and one.num_groups for one in status.models)
