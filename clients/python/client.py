"""A small typed client of `ossia.v1.Inference`, with retries.

    async with InferenceClient("127.0.0.1:9000") as client:
        answer = await client.ask("gpt-oss-20b", "Hello")
        async for event in client.chat(request): ...

A request is sent again only where that is safe and may help: the edge answered that it is busy or away, and nothing of the answer has come
yet. The wait is what the edge asked for, else a back-off with jitter. The deadline holds for all attempts together, and leaving the
iteration cancels the request in the cluster.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import grpc

from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import inference_pb2_grpc
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import GroupLost, OssiaError, Overloaded, RateLimited, Unavailable, from_proto, from_rpc_error
from services.grpc_channel import open_channel

ChatError = OssiaError
RETRIED = (Unavailable, Overloaded, RateLimited, GroupLost)
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0


@dataclass
class Answer:
    """One choice, whole. `token_ids` go back in `Message.token_ids` with the next turn, so that its prefix is found in the cache."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[inference.ToolCall] = field(default_factory=list)
    finish_reason: sampling.FinishReason.ValueType = sampling.FINISH_REASON_UNSPECIFIED
    token_ids: list[int] = field(default_factory=list)
    usage: sampling.Usage = field(default_factory=sampling.Usage)

    def add(self, event: inference.ChatEvent) -> None:
        if event.HasField("channel_delta"):
            delta = event.channel_delta
            if delta.channel == inference.CHANNEL_ANALYSIS:
                self.reasoning += delta.text
            else:
                self.text += delta.text
        elif event.HasField("tool_call_delta"):
            self._add_call(event.tool_call_delta)
        elif event.HasField("choice_finished"):
            self.finish_reason, self.token_ids = event.choice_finished.reason, list(event.choice_finished.token_ids)
        elif event.HasField("completed"):
            self.usage = event.completed.usage

    def _add_call(self, delta: inference.ToolCallDelta) -> None:
        if delta.call == len(self.tool_calls):
            self.tool_calls.append(inference.ToolCall(id=delta.id, name=delta.name))
        self.tool_calls[delta.call].arguments += delta.arguments


class InferenceClient:
    """Open while inside. `metadata` goes with every call, as in (("authorization", "Bearer KEY"),)."""

    def __init__(
        self,
        address: str,
        *,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        self._address = address
        self._metadata = tuple(metadata)
        self._credentials = credentials
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._channel = self._open()
        self._stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._channel.close()

    async def chat(self, request: inference.ChatRequest) -> AsyncIterator[inference.ChatEvent]:
        """The events to `completed`. Raises the OssiaError that ended the request, whether a status or an event told it."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        for attempt in range(self._max_retries + 1):
            has_begun = False
            try:
                async for event in self._call(request, deadline):
                    has_begun = has_begun or not event.HasField("started")
                    yield event
                return
            except OssiaError as error:
                wait_s = backoff_s(error, attempt)
                is_late = asyncio.get_running_loop().time() + wait_s >= deadline
                if has_begun or attempt == self._max_retries or not isinstance(error, RETRIED) or is_late:
                    raise
                await asyncio.sleep(wait_s)

    async def complete(self, request: inference.ChatRequest) -> Answer:
        """The first choice, whole."""
        answer = Answer()
        async for event in self.chat(request):
            answer.add(event)
        return answer

    async def ask(self, model: str, text: str) -> Answer:
        """One question without a conversation."""
        message = inference.Message(role=inference.ROLE_USER, content=[inference.ContentPart(text=text)])
        return await self.complete(inference.ChatRequest(model=model, messages=[message]))

    async def list_models(self) -> list[inference.ModelCard]:
        try:
            return list((await self._stub.ListModels(inference.ListModelsRequest(), metadata=self._metadata)).models)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None

    async def tokenize(self, model: str, text: str) -> list[int]:
        try:
            asked = inference.TokenizeRequest(model=model, text=text)
            return list((await self._stub.Tokenize(asked, metadata=self._metadata)).token_ids)
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None

    async def _call(self, request: inference.ChatRequest, deadline: float) -> AsyncIterator[inference.ChatEvent]:
        remaining_s = max(0.001, deadline - asyncio.get_running_loop().time())
        call = self._stub.Chat(request, timeout=remaining_s, metadata=self._metadata)
        try:
            async for event in call:
                if event.HasField("error"):
                    raise from_proto(event.error)
                yield event
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
        finally:
            call.cancel()

    def _open(self) -> grpc.aio.Channel:
        return open_channel(self._address) if self._credentials is None else grpc.aio.secure_channel(self._address, self._credentials)


def backoff_s(error: OssiaError, attempt: int) -> float:
    """What the edge asked for, or a share of a limit that doubles."""
    if error.retry_after_s is not None:
        return error.retry_after_s
    return random.uniform(0.5, 1.0) * min(FIRST_BACKOFF_S * 2.0**attempt, LAST_BACKOFF_S)
