"""Responses from their request to their end: asked of the core, written down as they come, kept when they are whole.

One that runs in the background belongs to this edge until it ends; whoever follows it reads its journal. Another edge asks for its end by
a mark in the store.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from edge.inference import ChatEvents, InferenceCore
from edge.rest.responses.items import Item, as_items, resolve_references, to_messages
from edge.rest.responses.schema import ResponsesRequest, describe
from edge.rest.responses.store import MAX_RECORD_BYTES, Record, ResponseStore
from edge.rest.responses.transcript import Transcript
from protos.ossia.v1 import inference_pb2 as inference
from services.errors import ContextLengthExceeded, InvalidArgument, MissingField, NotFound, OssiaError, Unavailable, from_proto
from services.telemetry import get_logger

MAX_JOURNALS = 256  # of background responses, running or ended, that can still be followed
CANCEL_POLL_S, CANCEL_WAIT_S = 0.25, 10.0
RUNNING = ("queued", "in_progress")
log = get_logger(__name__)
Chunks = AsyncGenerator[bytes, None]  # of server-sent events


@dataclass(frozen=True, slots=True)
class Job:
    """One response to make. `is_kept`: it goes into the store."""

    tenant: str
    body: ResponsesRequest
    request: inference.ChatRequest
    record: Record
    transcript: Transcript
    is_kept: bool

    @property
    def response_id(self) -> str:
        return str(self.record.response["id"])


@dataclass
class Journal:
    """The events of a background response so far, for whoever follows it."""

    tenant: str
    events: list[bytes] = field(default_factory=list)
    has_ended: bool = False
    task: "asyncio.Task[None] | None" = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def append(self, chunk: bytes) -> None:
        self.events += [event + b"\n\n" for event in chunk.split(b"\n\n") if event]
        self._notify()

    def end(self) -> None:
        self.has_ended = True
        self._notify()

    async def follow(self, starting_after: int = -1) -> Chunks:
        """The events numbered above `starting_after`, as they come, to the last."""
        at = starting_after + 1
        while True:
            changed = self.changed
            if at < len(self.events):
                chunk, at = b"".join(self.events[at:]), len(self.events)
                yield chunk
            elif self.has_ended:
                return
            else:
                await changed.wait()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class ResponseRunner:
    def __init__(self, core: InferenceCore, store: ResponseStore) -> None:
        self._core = core
        self._store = store
        self._journals: dict[str, Journal] = {}  # by response id, oldest first

    async def prepare(self, body: ResponsesRequest, given: Item, tenant: str, request_id: str, created: int) -> Job:
        """Raises the OssiaError that refuses the request."""
        is_kept = body.store is not False
        if body.background and not is_kept:
            raise InvalidArgument("background: a response that is not stored cannot be fetched later; leave store out", "background")
        before = await self._find_before(body, tenant)
        earlier = before.conversation if before else []
        items = [_identify(item) for item in resolve_references(as_items(body.input), earlier)]
        if not items and not earlier:
            raise MissingField("input: it is empty; give a text or items", "input")
        response = describe(body, given, f"resp_{secrets.token_hex(24)}", created, is_kept)
        request = body.to_proto(request_id, to_messages([*earlier, *items]))
        request.tenant = tenant
        return Job(tenant, body, request, Record(response, items, earlier), Transcript(response), is_kept)

    async def stream(self, job: Job) -> Chunks:
        """The events of a response. It is kept before its last event goes out, so that a next turn finds it. Raises a refusal first."""
        async with aclosing(await self._open(job)) as batches:
            transcript, begun = job.transcript, b""
            async for events in batches:
                if not begun:
                    if events[0].HasField("error"):
                        raise from_proto(events[0].error)
                    begun = transcript.start()
                    yield begun
                chunk = transcript.add(events)
                if transcript.is_finished:
                    await self._keep(job)
                if chunk:
                    yield chunk

    async def start(self, job: Job) -> Journal:
        """Runs a response in the background; its record can be fetched from now on."""
        job.record.response["status"] = "queued"
        await self._put(job)
        journal = self._journals[job.response_id] = Journal(job.tenant)
        journal.task = asyncio.create_task(self._run(job, journal))
        for old in [name for name, one in self._journals.items() if one.has_ended][: max(0, len(self._journals) - MAX_JOURNALS)]:
            del self._journals[old]
        return journal

    def find_journal(self, tenant: str, response_id: str) -> Journal:
        """Raises NotFound."""
        journal = self._journals.get(response_id)
        if journal is None or journal.tenant != tenant:
            raise NotFound("stream: the events of this response are no longer held here; fetch it without stream", "stream")
        return journal

    async def find(self, tenant: str, response_id: str) -> Record:
        """Raises NotFound."""
        if (dumped := await self._store.get(tenant, response_id)) is None:
            raise NotFound(f"response_id: there is no response {response_id[:128]!r}; it may not have been stored, or is past its time")
        return Record.load(dumped)

    async def delete(self, tenant: str, response_id: str) -> None:
        """Raises NotFound. What runs is cancelled."""
        await self.find(tenant, response_id)
        await self._stop_here(tenant, response_id)
        await self._store.delete(tenant, response_id)

    async def cancel(self, tenant: str, response_id: str) -> Item:
        """The response after its end, which may have come before. Raises NotFound, or InvalidArgument where it is not in the background."""
        record = await self.find(tenant, response_id)
        if not record.response["background"]:
            raise InvalidArgument("response_id: only a response with background: true can be cancelled; close the stream of another")
        if not await self._stop_here(tenant, response_id):
            await self._store.put(tenant, _mark(response_id), b"1")
        try:
            async with asyncio.timeout(CANCEL_WAIT_S):
                while (record := await self.find(tenant, response_id)).response["status"] in RUNNING:  # noqa: ASYNC110 - another edge ends it
                    await asyncio.sleep(CANCEL_POLL_S)
        except TimeoutError:
            raise Unavailable("the edge that runs this response does not answer; fetch it to see how it stands") from None
        return record.response

    async def aclose(self) -> None:
        """Ends what runs in the background."""
        for response_id, journal in list(self._journals.items()):
            await self._stop_here(journal.tenant, response_id)
        await self._store.aclose()

    async def _find_before(self, body: ResponsesRequest, tenant: str) -> Record | None:
        """The turn that this one follows."""
        if body.previous_response_id:
            return await self.find(tenant, body.previous_response_id)
        if body.conversation is None or (last := await self._store.get(tenant, body.conversation.id)) is None:
            return None
        dumped = await self._store.get(tenant, last.decode())
        return Record.load(dumped) if dumped else None

    async def _open(self, job: Job) -> ChatEvents:
        """The batches after `started`. With `truncation: auto` the oldest quarter goes until the rest fits."""
        request = job.request
        while True:
            batches = self._core.chat(request)
            try:
                job.record.response["model"] = (await anext(batches))[0].started.model
            except ContextLengthExceeded:
                kept = _cut_oldest(list(request.messages))
                if job.body.truncation != "auto" or len(kept) == len(request.messages):
                    raise
                del request.messages[:]
                request.messages.extend(kept)
            else:
                return batches

    async def _run(self, job: Job, journal: Journal) -> None:
        watching = asyncio.create_task(self._watch_mark(job, journal))
        try:
            async with aclosing(self.stream(job)) as chunks:
                async for chunk in chunks:
                    journal.append(chunk)
        except OssiaError as error:
            journal.append(job.transcript.start() + job.transcript.fail(error))
            await self._keep(job)
        except asyncio.CancelledError:
            journal.append(job.transcript.cancel())
            await self._keep(job)
            raise
        finally:
            watching.cancel()
            journal.end()

    async def _watch_mark(self, job: Job, journal: Journal) -> None:
        """Another edge was asked to cancel."""
        while True:
            await asyncio.sleep(CANCEL_POLL_S)
            with suppress(OssiaError):
                if journal.task is not None and await self._store.get(job.tenant, _mark(job.response_id)):
                    journal.task.cancel()
                    return

    async def _stop_here(self, tenant: str, response_id: str) -> bool:
        """Whether it ran here; it has ended then."""
        journal = self._journals.get(response_id)
        if journal is None or journal.tenant != tenant or journal.task is None:
            return False
        if not journal.task.done():
            journal.task.cancel()
            await asyncio.wait((journal.task,))
        return True

    async def _keep(self, job: Job) -> None:
        """Where the store is away the answer still goes out, and says that it was not stored."""
        if not job.is_kept:
            return
        try:
            await self._put(job)
            if job.body.conversation is not None:
                await self._store.put(job.tenant, job.body.conversation.id, job.response_id.encode())
        except OssiaError as error:
            job.record.response["store"] = False
            log.warning("response_not_stored", response_id=job.response_id, reason=error.message)

    async def _put(self, job: Job) -> None:
        dumped = job.record.dump()
        if len(dumped) > MAX_RECORD_BYTES:
            raise InvalidArgument(f"store: the conversation is larger than {MAX_RECORD_BYTES} bytes; send store: false", "store")
        await self._store.put(job.tenant, job.response_id, dumped)


def _identify(item: Item) -> Item:
    """As the list of a response's input items shows it: with an id, its content in parts."""
    item = {"type": "message" if "role" in item else "unknown", **item}
    if isinstance(item.get("content"), str):
        kind = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": kind, "text": item["content"]}]
    return {**item, "id": item.get("id") or f"item_{secrets.token_hex(16)}"}


def _cut_oldest(messages: list[inference.Message]) -> list[inference.Message]:
    """Without the oldest quarter after the instructions, and without results whose calls went with it."""
    num_leading = next((at for at, one in enumerate(messages) if one.role not in (inference.ROLE_SYSTEM, inference.ROLE_DEVELOPER)), 0)
    leading, rest = messages[:num_leading], messages[num_leading:]
    rest = rest[max(1, len(rest) // 4) :] if len(rest) > 1 else rest
    while len(rest) > 1 and rest[0].role == inference.ROLE_TOOL:
        del rest[0]
    return leading + rest


def _mark(response_id: str) -> str:
    return f"cancel:{response_id}"
