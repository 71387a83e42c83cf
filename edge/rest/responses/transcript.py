"""Chat events as the events of the Responses API, and the response that they add up to.

    response.created · response.in_progress
      response.output_item.added
        response.content_part.added · response.output_text.delta … · response.output_text.done · response.content_part.done
        response.function_call_arguments.delta … · response.function_call_arguments.done
      response.output_item.done
    response.completed | response.incomplete | response.failed

The events are numbered from 0. Every delta of one item joins to what its `done` event says.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

from edge.rest.chat_chunks import describe_logprobs
from edge.rest.responses.items import Item
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import OssiaError, from_proto, openai_body

PHASES = {inference.CHANNEL_COMMENTARY: "commentary", inference.CHANNEL_FINAL: "final_answer"}


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written. `key` tells whether the next delta belongs to it."""

    key: object
    item: Item
    delta_type: str  # of its deltas
    text: list[str] = field(default_factory=list)
    logprobs: list[Item] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return str(self.item["type"])


class Transcript:
    """One response. `start`, then `add` every batch: both give the bytes to stream. `response` is the response as it stands."""

    def __init__(self, response: Item) -> None:
        self.response = response
        self.error: OssiaError | None = None
        self._open: _OpenItem | None = None
        self._num_events = 0
        self._is_cut = False

    @property
    def is_finished(self) -> bool:
        return self.response["status"] not in ("queued", "in_progress")

    def start(self) -> bytes:
        self.response["status"] = "in_progress"
        return self._emit("response.created", response=self.response) + self._emit("response.in_progress", response=self.response)

    def add(self, events: Sequence[inference.ChatEvent]) -> bytes:
        return b"".join(map(self._add, events))

    def cancel(self) -> bytes:
        """Whoever may has asked to stop."""
        self._is_cut = True
        return self._close() + self._end("cancelled")

    def fail(self, error: OssiaError) -> bytes:
        self.error = error
        described = openai_body(error)["error"]
        self.response["error"] = {"code": described["code"], "message": described["message"]}
        self._is_cut = True
        return self._close() + self._end("failed")

    def _add(self, event: inference.ChatEvent) -> bytes:
        match event.WhichOneof("event"):
            case "channel_delta":
                return self._add_text(event.channel_delta)
            case "tool_call_delta":
                return self._add_call(event.tool_call_delta)
            case "choice_finished":
                self._is_cut = event.choice_finished.reason == sampling.FINISH_REASON_LENGTH
                return self._close()
            case "completed":
                self.response["usage"] = describe_usage(event.completed.usage)
                if self._is_cut:
                    self.response["incomplete_details"] = {"reason": "max_output_tokens"}
                return self._end("incomplete" if self._is_cut else "completed")
            case "error":
                return self.fail(from_proto(event.error))
        return b""

    def _add_text(self, delta: inference.ChannelDelta) -> bytes:
        begun = b"" if self._open is not None and self._open.key == delta.channel else self._begin_text(delta.channel)
        assert self._open is not None
        self._open.text.append(delta.text)
        if self._open.kind == "reasoning":
            return begun + self._emit_delta(delta.text, content_index=0)
        logprobs = describe_logprobs(delta.logprobs)["content"] if delta.logprobs else []
        self._open.logprobs += logprobs
        return begun + self._emit_delta(delta.text, content_index=0, logprobs=logprobs)

    def _add_call(self, delta: inference.ToolCallDelta) -> bytes:
        begun = self._begin_call(delta) if delta.id else b""
        assert self._open is not None
        if not delta.arguments:
            return begun
        self._open.text.append(delta.arguments)
        return begun + self._emit_delta(delta.arguments)

    def _begin_text(self, channel: inference.Channel.ValueType) -> bytes:
        if channel == inference.CHANNEL_ANALYSIS:
            item = _make_item("rs", type="reasoning", summary=[], content=[])
            return self._begin(_OpenItem(channel, item, "response.reasoning_text.delta"), {"type": "reasoning_text", "text": ""})
        item = _make_item("msg", type="message", role="assistant", phase=PHASES[channel], content=[])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._begin(_OpenItem(channel, item, "response.output_text.delta"), part)

    def _begin_call(self, delta: inference.ToolCallDelta) -> bytes:
        item = _make_item("fc", type="function_call", call_id=delta.id, name=delta.name, arguments="")
        return self._begin(_OpenItem(delta.id, item, "response.function_call_arguments.delta"), None)

    def _begin(self, opened: _OpenItem, part: Item | None) -> bytes:
        closed = self._close()
        self._open = opened
        self.response["output"].append(opened.item)
        added = self._emit("response.output_item.added", output_index=self._index, item=opened.item)
        if part is None:
            return closed + added
        return closed + added + self._emit_part("response.content_part.added", part)

    def _close(self) -> bytes:
        opened = self._open
        if opened is None:
            return b""
        text = "".join(opened.text)
        opened.item["status"] = "incomplete" if self._is_cut else "completed"
        place = {"item_id": opened.item["id"], "output_index": self._index}
        if opened.kind == "function_call":
            opened.item["arguments"] = text
            done = self._emit("response.function_call_arguments.done", **place, name=opened.item["name"], arguments=text)
        elif opened.kind == "reasoning":
            part: Item = {"type": "reasoning_text", "text": text}
            opened.item["content"] = [part]
            done = self._emit("response.reasoning_text.done", **place, content_index=0, text=text)
            done += self._emit_part("response.content_part.done", part)
        else:
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": opened.logprobs}
            opened.item["content"] = [part]
            done = self._emit("response.output_text.done", **place, content_index=0, text=text, logprobs=opened.logprobs)
            done += self._emit_part("response.content_part.done", part)
        done += self._emit("response.output_item.done", output_index=self._index, item=opened.item)
        self._open = None
        return done

    def _end(self, status: str) -> bytes:
        self.response["status"] = status
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        return self._emit(f"response.{status}", response=self.response)

    @property
    def _index(self) -> int:
        """Of the open item."""
        return len(self.response["output"]) - 1

    def _emit_part(self, kind: str, part: Item) -> bytes:
        assert self._open is not None
        return self._emit(kind, item_id=self._open.item["id"], output_index=self._index, content_index=0, part=part)

    def _emit_delta(self, delta: str, **more: object) -> bytes:
        assert self._open is not None
        return self._emit(self._open.delta_type, item_id=self._open.item["id"], output_index=self._index, delta=delta, **more)

    def _emit(self, kind: str, **fields: object) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def describe_usage(usage: sampling.Usage) -> Item:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _make_item(prefix: str, **fields: object) -> Item:
    return {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress", **fields}
