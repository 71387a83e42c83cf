"""Tokens of a chat against the caller's limits: what it may use is taken before it begins, what it did not use is given back at its end."""

from contextlib import aclosing
from typing import Any

from edge.access.caller import current_admission
from edge.access.rate_limit import RateLimiter
from edge.inference import ChatEvents, InferenceCore
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling

BYTES_PER_TOKEN = 4  # of ordinary text; the estimate only has to be near, because the end is exact
UNNAMED_MAX_TOKENS = 1024  # taken where the request names no limit of its own


class MeteredCore(InferenceCore):
    """A chat without an admission is not metered: nobody was asked who they are."""

    def __init__(self, limiter: RateLimiter, *parts: Any) -> None:
        """`parts` are those of InferenceCore."""
        super().__init__(*parts)
        self._limiter = limiter

    async def chat(self, request: inference.ChatRequest) -> ChatEvents:
        """As InferenceCore's; raises RateLimited too."""
        admission = current_admission.get()
        if admission is None:
            async with aclosing(super().chat(request)) as events:
                async for batch in events:
                    yield batch
            return
        limits, estimate = admission.caller.limits, estimate_tokens(request)
        owner = request.tenant if admission.caller.tenant and request.tenant else admission.owner
        admission.note(await self._limiter.take(owner, limits, tokens=estimate))
        used = sampling.Usage()
        try:
            async with aclosing(super().chat(request)) as events:
                async for batch in events:
                    for event in batch:
                        _count(event, used)
                    yield batch
        finally:
            admission.prompt_tokens += used.prompt_tokens
            admission.completion_tokens += used.completion_tokens
            await self._limiter.settle(owner, limits, taken=estimate, used=used.prompt_tokens + used.completion_tokens)


def estimate_tokens(request: inference.ChatRequest) -> int:
    """What the request may use: about its text, and all that it may be answered."""
    num_bytes = sum(part.ByteSize() for message in request.messages for part in message.content) + sum(
        tool.ByteSize() for tool in request.tools
    )
    max_tokens = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else UNNAMED_MAX_TOKENS
    return num_bytes // BYTES_PER_TOKEN + max_tokens * max(1, request.n)


def _count(event: inference.ChatEvent, used: sampling.Usage) -> None:
    """A turn that is cut off counts a token for each delta, one that ends has its own count."""
    match event.WhichOneof("event"):
        case "started":
            used.prompt_tokens = event.started.prompt_tokens
        case "channel_delta" | "tool_call_delta":
            used.completion_tokens += 1
        case "completed":
            used.completion_tokens = event.completed.usage.completion_tokens
