"""POST /v1/completions, streamed or whole: several prompts are several chats of the core, each with its place among the choices."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from edge.inference import ChatEvents, InferenceCore
from edge.rest.body import document, read_body
from edge.rest.chat_chunks import DONE, FINISH_REASONS, describe_usage
from edge.rest.completion_schema import CompletionRequest
from edge.rest.disconnect import while_connected
from edge.rest.event_stream import collect, open_stream
from edge.rest.request_id import address
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import from_proto, openai_body
from services.vocabulary import Vocabulary

PATH = "/v1/completions"
Json = dict[str, Any]


def build_router(core: InferenceCore, vocabulary: Vocabulary, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post(PATH, openapi_extra=document(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        body = await read_body(request, CompletionRequest, max_body_bytes)
        asked = [address(one, request) for one in body.to_protos(request.state.request_id)]
        echoes = [read_echo(one.prompt, vocabulary) if body.echo else Echo() for one in asked]
        batches = merge([core.chat(one) for one in asked], body.num_choices)
        shape = Shape(echoes, body.num_choices, body.logprobs is not None)
        if body.stream:
            return await open_stream(request, batches, lambda started: TextWriter(started, shape, body.include_usage).write)
        with while_connected(request.receive):
            whole = await collect(batches, lambda started: TextBuilder(started, shape))
        return Response(whole.build(), media_type="application/json")

    return router


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as its completion repeats it. The log-probabilities of its tokens are not computed."""

    text: str = ""
    tokens: tuple[str, ...] = ()

    def describe(self) -> Json:
        offsets = [len("".join(self.tokens[:at])) for at in range(len(self.tokens))]
        nothing = [None] * len(self.tokens)
        return {"tokens": list(self.tokens), "token_logprobs": nothing, "top_logprobs": list(nothing), "text_offset": offsets}


def read_echo(prompt: inference.RawPrompt, vocabulary: Vocabulary) -> Echo:
    token_ids = [*vocabulary.encode(prompt.text), *prompt.token_ids]
    return Echo(vocabulary.decode(token_ids), tuple(vocabulary.decode([one]) for one in token_ids))


@dataclass(frozen=True, slots=True)
class Shape:
    """What the caller asked its choices to hold: one echo for each prompt."""

    echoes: Sequence[Echo]
    num_choices: int  # of one prompt
    has_logprobs: bool

    @property
    def total_choices(self) -> int:
        return len(self.echoes) * self.num_choices

    def echo_of(self, choice: int) -> Echo:
        return self.echoes[choice // self.num_choices]


async def merge(chats: Sequence[ChatEvents], num_choices: int) -> ChatEvents:
    """Several chats at once as one: choices are numbered through, `started` is the first's, `completed` sums up what all used."""
    usage, has_started = sampling.Usage(), False
    waiting = {asyncio.ensure_future(anext(chat)): at for at, chat in enumerate(chats)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                at, events = waiting.pop(task), task.result()
                if events[-1].HasField("completed"):
                    _add_usage(usage, events.pop().completed.usage)
                else:
                    waiting[asyncio.ensure_future(anext(chats[at]))] = at
                if events and events[0].HasField("started") and has_started:
                    del events[0]
                if events:
                    has_started = True
                    yield [_renumber(event, at * num_choices) for event in events]
                if events and events[-1].HasField("error"):
                    return
        yield [inference.ChatEvent(completed=inference.ChatCompleted(usage=usage))]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)  # what failed beside the first failure is seen, and told by it
        for chat in chats:
            await chat.aclose()


def _renumber(event: inference.ChatEvent, first: int) -> inference.ChatEvent:
    match event.WhichOneof("event"):
        case "channel_delta":
            event.channel_delta.choice += first
        case "choice_finished":
            event.choice_finished.choice += first
    return event


def _add_usage(total: sampling.Usage, usage: sampling.Usage) -> None:
    total.prompt_tokens += usage.prompt_tokens
    total.completion_tokens += usage.completion_tokens
    total.cached_tokens += usage.cached_tokens
    total.reasoning_tokens += usage.reasoning_tokens


def describe_logprobs(entries: Sequence[inference.TextLogprobs], offset: int) -> Json:
    """The lists that this endpoint's clients read; `offset` is where the first token stands in its choice's text."""
    tokens = [_text(one.chosen) for one in entries]
    offsets = [offset + len("".join(tokens[:at])) for at in range(len(tokens))]
    top = [{_text(candidate): candidate.logprob for candidate in one.top} for one in entries]
    return {"tokens": tokens, "token_logprobs": [one.chosen.logprob for one in entries], "top_logprobs": top, "text_offset": offsets}


def _text(candidate: inference.TextLogprobs.Candidate) -> str:
    return candidate.token.decode("utf-8", errors="replace")


def _head(started: inference.ChatStarted) -> Json:
    return {
        "id": f"cmpl-{started.request_id}",
        "object": "text_completion",
        "created": started.created,
        "model": started.model,
        "system_fingerprint": started.system_fingerprint or None,
    }


class TextWriter:
    """One streamed completion as server-sent events; an echo is its choice's first one. Reasoning is no part of the text."""

    def __init__(self, started: inference.ChatStarted, shape: Shape, include_usage: bool) -> None:
        self._shape = shape
        self._include_usage = include_usage
        self._num_chars = [0] * shape.total_choices  # delivered, by choice
        self._has_begun = False
        self._prefix = b"data: " + orjson.dumps(_head(started))[:-1]
        self._suffix = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def write(self, events: Sequence[inference.ChatEvent]) -> bytes:
        echoes = b"" if self._has_begun else self._begin()
        return echoes + b"".join(map(self._write_event, events))

    def _begin(self) -> bytes:
        self._has_begun = True
        echoes = [(choice, self._shape.echo_of(choice)) for choice in range(self._shape.total_choices)]
        return b"".join(self._write_text(choice, echo.text, echo.describe()) for choice, echo in echoes if echo.text)

    def _write_event(self, event: inference.ChatEvent) -> bytes:
        match event.WhichOneof("event"):
            case "channel_delta":
                delta = event.channel_delta
                if delta.channel == inference.CHANNEL_ANALYSIS:
                    return b""
                return self._write_text(delta.choice, delta.text, describe_logprobs(delta.logprobs, self._num_chars[delta.choice]))
            case "choice_finished":
                finished = event.choice_finished
                return self._write_choice(finished.choice, "", None, FINISH_REASONS.get(finished.reason, "stop"))
            case "completed":
                usage = orjson.dumps(describe_usage(event.completed.usage))
                return (b'%s,"choices":[],"usage":%s}\n\n' % (self._prefix, usage) if self._include_usage else b"") + DONE
            case "error":
                return b"data: " + orjson.dumps(openai_body(from_proto(event.error))) + b"\n\n"
        return b""

    def _write_text(self, choice: int, text: str, logprobs: Json) -> bytes:
        self._num_chars[choice] += len(text)
        return self._write_choice(choice, text, logprobs if self._shape.has_logprobs else None, None)

    def _write_choice(self, choice: int, text: str, logprobs: Json | None, reason: str | None) -> bytes:
        described = orjson.dumps({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return b'%s,"choices":[%s]%s' % (self._prefix, described, self._suffix)


@dataclass(slots=True)
class _WholeText:
    text: str
    logprobs: Json
    reason: str = "stop"
    pieces: list[str] = field(default_factory=list)

    def add(self, delta: inference.ChannelDelta, num_chars: int) -> None:
        self.pieces.append(delta.text)
        for name, values in describe_logprobs(delta.logprobs, num_chars).items():
            self.logprobs[name] += values


class TextBuilder:
    """One completion that is not streamed: add every event, then `build`."""

    def __init__(self, started: inference.ChatStarted, shape: Shape) -> None:
        self._started = started
        self._shape = shape
        self._usage = sampling.Usage()
        echoes = map(shape.echo_of, range(shape.total_choices))
        self._choices = [_WholeText(echo.text, echo.describe()) for echo in echoes]
        self._num_chars = [len(choice.text) for choice in self._choices]

    def add(self, event: inference.ChatEvent) -> None:
        match event.WhichOneof("event"):
            case "channel_delta" if event.channel_delta.channel != inference.CHANNEL_ANALYSIS:
                delta = event.channel_delta
                self._choices[delta.choice].add(delta, self._num_chars[delta.choice])
                self._num_chars[delta.choice] += len(delta.text)
            case "choice_finished":
                self._choices[event.choice_finished.choice].reason = FINISH_REASONS.get(event.choice_finished.reason, "stop")
            case "completed":
                self._usage = event.completed.usage
            case "error":
                raise from_proto(event.error)

    @property
    def texts(self) -> list[str]:
        return [choice.text + "".join(choice.pieces) for choice in self._choices]

    def build(self) -> bytes:
        has_logprobs = self._shape.has_logprobs
        choices = [
            {"index": at, "text": text, "logprobs": one.logprobs if has_logprobs else None, "finish_reason": one.reason}
            for at, (one, text) in enumerate(zip(self._choices, self.texts, strict=True))
        ]
        return orjson.dumps({**_head(self._started), "choices": choices, "usage": describe_usage(self._usage)})
