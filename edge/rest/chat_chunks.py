"""Chat events as OpenAI's objects: chunks of a stream, or one whole completion.

A chunk is a head that is made once per request and the piece that is new, so that a token costs one small `orjson.dumps`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import from_proto, openai_body

FINISH_REASONS = {
    sampling.FINISH_REASON_STOP: "stop",
    sampling.FINISH_REASON_LENGTH: "length",
    sampling.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
DONE = b"data: [DONE]\n\n"
Json = dict[str, Any]  # an object on its way to orjson


class ChunkWriter:
    """One streamed completion as server-sent events."""

    def __init__(self, started: inference.ChatStarted, include_usage: bool, is_legacy: bool = False) -> None:
        self._include_usage = include_usage
        self._is_legacy = is_legacy
        self._begun: set[int] = set()  # choices whose role was sent
        head = orjson.dumps(
            {
                "id": completion_id(started),
                "object": "chat.completion.chunk",
                "created": started.created,
                "model": started.model,
                "system_fingerprint": started.system_fingerprint or None,
            }
        )
        self._head = b"data: " + head[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._text_tail = b'},"logprobs":null,"finish_reason":null}]' + self._tail

    def write(self, events: Sequence[inference.ChatEvent]) -> bytes:
        """The bytes of a batch; the terminal event's end the stream."""
        if len(events) == 1:
            return self._write_event(events[0])
        return b"".join(map(self._write_event, events))

    def _write_event(self, event: inference.ChatEvent) -> bytes:
        match event.WhichOneof("event"):
            case "channel_delta":
                return self._write_text(event.channel_delta)
            case "tool_call_delta":
                return self._write_call(event.tool_call_delta)
            case "choice_finished":
                finished = event.choice_finished
                return self._write_delta(finished.choice, {}, reason=name_reason(finished.reason, self._is_legacy))
            case "completed":
                return self._write_usage(event.completed.usage) + DONE
            case "error":
                return b"data: " + orjson.dumps(openai_body(from_proto(event.error))) + b"\n\n"
        return b""

    def _write_text(self, delta: inference.ChannelDelta) -> bytes:
        """By far the most frequent event: between two prepared ends only the text is encoded."""
        if delta.logprobs:
            logprobs = orjson.dumps(describe_logprobs(delta.logprobs))
            return self._write_delta(delta.choice, describe_text(delta.channel, delta.text), logprobs)
        if delta.choice not in self._begun:
            return self._begin(delta.choice) + self._write_text(delta)
        text = orjson.dumps(delta.text)
        if delta.channel != inference.CHANNEL_ANALYSIS:
            return b'%s,"choices":[{"index":%d,"delta":{"content":%s%s' % (self._head, delta.choice, text, self._text_tail)
        body = (self._head, delta.choice, text, text, self._text_tail)
        return b'%s,"choices":[{"index":%d,"delta":{"reasoning":%s,"reasoning_content":%s%s' % body

    def _write_call(self, delta: inference.ToolCallDelta) -> bytes:
        if not self._is_legacy:
            return self._write_delta(delta.choice, {"tool_calls": [describe_call_delta(delta)]})
        name = {"name": delta.name} if delta.name else {}
        return self._write_delta(delta.choice, {"function_call": {**name, "arguments": delta.arguments}}) if delta.call == 0 else b""

    def _begin(self, choice: int) -> bytes:
        self._begun.add(choice)
        return self._write_delta(choice, {"role": "assistant", "content": ""})

    def _write_delta(self, choice: int, delta: Json, logprobs: bytes = b"null", reason: str | None = None) -> bytes:
        role = b"" if choice in self._begun else self._begin(choice)
        ending = b"null" if reason is None else orjson.dumps(reason)
        body = (role, self._head, choice, orjson.dumps(delta), logprobs, ending, self._tail)
        return b'%s%s,"choices":[{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}]%s' % body

    def _write_usage(self, usage: sampling.Usage) -> bytes:
        if not self._include_usage:
            return b""
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._head, orjson.dumps(describe_usage(usage)))


@dataclass(slots=True)
class _WholeChoice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    reason: str = "stop"


class CompletionBuilder:
    """One completion that is not streamed: add every event, then `build`."""

    def __init__(self, started: inference.ChatStarted, is_legacy: bool = False) -> None:
        self._started = started
        self._is_legacy = is_legacy
        self._choices: dict[int, _WholeChoice] = {}
        self._usage = sampling.Usage()

    def add(self, event: inference.ChatEvent) -> None:
        """Raises the OssiaError of a terminal error."""
        match event.WhichOneof("event"):
            case "channel_delta":
                delta, choice = event.channel_delta, self._choice(event.channel_delta.choice)
                (choice.reasoning if delta.channel == inference.CHANNEL_ANALYSIS else choice.text).append(delta.text)
                choice.logprobs += describe_logprobs(delta.logprobs)["content"]
            case "tool_call_delta":
                self._add_call(event.tool_call_delta)
            case "choice_finished":
                finished = event.choice_finished
                self._choice(finished.choice).reason = name_reason(finished.reason, self._is_legacy)
            case "completed":
                self._usage = event.completed.usage
            case "error":
                raise from_proto(event.error)

    @property
    def text(self) -> str:
        """Of the first choice."""
        return "".join(self._choice(0).text)

    def build(self) -> bytes:
        return orjson.dumps(
            {
                "id": completion_id(self._started),
                "object": "chat.completion",
                "created": self._started.created,
                "model": self._started.model,
                "system_fingerprint": self._started.system_fingerprint or None,
                "choices": [self._describe_choice(index, choice) for index, choice in sorted(self._choices.items())],
                "usage": describe_usage(self._usage),
            }
        )

    def _choice(self, index: int) -> _WholeChoice:
        return self._choices.setdefault(index, _WholeChoice())

    def _add_call(self, delta: inference.ToolCallDelta) -> None:
        calls = self._choice(delta.choice).calls
        if delta.call == len(calls):
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        calls[delta.call]["function"]["arguments"] += delta.arguments

    def _describe_choice(self, index: int, choice: _WholeChoice) -> Json:
        text, reasoning = "".join(choice.text), "".join(choice.reasoning) or None
        message: Json = {"role": "assistant", "content": text if text or not choice.calls else None, "refusal": None}
        if reasoning:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if choice.calls and self._is_legacy:
            message["function_call"] = choice.calls[0]["function"]
        elif choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = {"content": choice.logprobs, "refusal": None} if choice.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}


def name_reason(reason: sampling.FinishReason.ValueType, is_legacy: bool) -> str:
    name = FINISH_REASONS.get(reason, "stop")
    return "function_call" if is_legacy and name == "tool_calls" else name


def completion_id(started: inference.ChatStarted) -> str:
    return f"chatcmpl-{started.request_id}"


def describe_text(channel: inference.Channel.ValueType, text: str) -> Json:
    """Clients differ in the name under which they read reasoning: it goes out under both."""
    return {"reasoning": text, "reasoning_content": text} if channel == inference.CHANNEL_ANALYSIS else {"content": text}


def describe_call_delta(delta: inference.ToolCallDelta) -> Json:
    if not delta.id:
        return {"index": delta.call, "function": {"arguments": delta.arguments}}
    return {"index": delta.call, "id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}


def describe_usage(usage: sampling.Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def describe_logprobs(entries: Iterable[inference.TextLogprobs]) -> Json:
    content = [{**_describe_candidate(one.chosen), "top_logprobs": [_describe_candidate(top) for top in one.top]} for one in entries]
    return {"content": content, "refusal": None}


def _describe_candidate(candidate: inference.TextLogprobs.Candidate) -> Json:
    text = candidate.token.decode("utf-8", errors="replace")
    return {"token": text, "logprob": candidate.logprob, "bytes": list(candidate.token)}
