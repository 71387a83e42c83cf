"""POST /generate and /generate_stream as text-generation-inference has them: a text that the model goes on from.

Of its parameters those that mean something here are honoured; the others are accepted and ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from edge.inference import InferenceCore
from edge.rest.body import document, read_body
from edge.rest.disconnect import while_connected
from edge.rest.event_stream import collect, open_stream
from edge.rest.request_id import address
from edge.rest.sampling_schema import Count, Int, Loose
from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import Unsupported, from_proto, row

DEFAULT_NEW_TOKENS = 100
REASONS = {sampling.FINISH_REASON_LENGTH: "length", sampling.FINISH_REASON_STOP: "eos_token"}
Json = dict[str, Any]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class GenerateParameters(Loose):
    best_of: Count | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    max_new_tokens: Count | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: Int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    temperature: float | None = None
    top_k: Count | None = None
    top_n_tokens: Count | None = None
    top_p: float | None = None


class GenerateRequest(Loose):
    inputs: str
    parameters: GenerateParameters = Field(default=GenerateParameters())
    stream: bool | None = None
    model: str | None = None

    def to_proto(self, request_id: str, model: str) -> inference.ChatRequest:
        """Raises Unsupported for `best_of`. Every token is asked for its log-probability: this dialect delivers tokens."""
        given = self.parameters
        if (given.best_of or 1) != 1:
            raise Unsupported("parameters.best_of: one text is generated; leave it out", "parameters.best_of")
        is_sampled = given.do_sample or given.temperature is not None or given.top_p is not None or given.top_k is not None
        params = sampling.SamplingParams(
            max_tokens=DEFAULT_NEW_TOKENS if given.max_new_tokens is None else given.max_new_tokens,
            temperature=given.temperature if is_sampled else 0.0,
            top_p=given.top_p,
            top_k=given.top_k or 0,
            frequency_penalty=given.frequency_penalty or 0,
            repetition_penalty=given.repetition_penalty,
            seed=None if given.seed is None else given.seed % 2**64,
            top_logprobs=given.top_n_tokens or 0,
        )
        prompt = inference.RawPrompt(text=self.inputs)
        return inference.ChatRequest(request_id=request_id, model=self.model or model, prompt=prompt, sampling=params, stop=given.stop)


def build_router(core: InferenceCore, catalogue: Catalogue, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post("/generate", openapi_extra=document(GenerateRequest))
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateRequest, max_body_bytes)
        return await answer(request, body, is_streamed=bool(body.stream))

    @router.post("/generate_stream", openapi_extra=document(GenerateRequest))
    async def generate_stream(request: Request) -> Response:
        return await answer(request, await read_body(request, GenerateRequest, max_body_bytes), is_streamed=True)

    async def answer(request: Request, body: GenerateRequest, is_streamed: bool) -> Response:
        asked = address(body.to_proto(request.state.request_id, catalogue.first_model), request)
        if is_streamed:
            return await open_stream(request, core.chat(asked), lambda _: TokenWriter(body).write)
        with while_connected(request.receive):
            whole = await collect(core.chat(asked), lambda _: Generated(body))
        answered: Json = {"generated_text": whole.text}
        if body.parameters.details:
            answered["details"] = {**whole.details, "tokens": whole.tokens, "prefill": []}
        return Response(orjson.dumps(answered), media_type="application/json")

    return router


class Generated:
    """What was generated so far."""

    def __init__(self, body: GenerateRequest) -> None:
        self.tokens: list[Json] = []
        self.details: Json = {}
        self._texts = [body.inputs] if body.parameters.return_full_text else []
        self._seed = body.parameters.seed

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, event: inference.ChatEvent) -> None:
        """Raises the OssiaError of a terminal error."""
        match event.WhichOneof("event"):
            case "channel_delta" if event.channel_delta.channel != inference.CHANNEL_ANALYSIS:
                self._texts.append(event.channel_delta.text)
                self.tokens += describe_tokens(event.channel_delta)
            case "choice_finished":
                finished = event.choice_finished
                reason = "stop_sequence" if finished.matched_stop else REASONS.get(finished.reason, "eos_token")
                self.details = {"finish_reason": reason, "generated_tokens": len(finished.token_ids), "seed": self._seed}
            case "error":
                raise from_proto(event.error)


class TokenWriter:
    """One event for every token; the last one has the whole text."""

    def __init__(self, body: GenerateRequest) -> None:
        self._generated = Generated(body)
        self._num_written = 0
        self._held: Json | None = None  # the latest token: it may turn out to be the last

    def write(self, events: Sequence[inference.ChatEvent]) -> bytes:
        return b"".join(map(self._write_event, events))

    def _write_event(self, event: inference.ChatEvent) -> bytes:
        if event.HasField("error"):
            error = from_proto(event.error)
            return _frame({"error": error.message, "error_type": row(error).code})
        num_before = len(self._generated.tokens)
        self._generated.add(event)
        if event.HasField("completed"):
            token = self._held or {"id": 0, "text": "", "logprob": 0.0, "special": True}
            return self._write_token(token, generated_text=self._generated.text, details=self._generated.details)
        written = b""
        for token in self._generated.tokens[num_before:]:
            if self._held is not None:
                written += self._write_token(self._held)
            self._held = token
        return written

    def _write_token(self, token: Json, generated_text: str | None = None, details: Json | None = None) -> bytes:
        self._num_written += 1
        return _frame({"index": self._num_written, "token": token, "generated_text": generated_text, "details": details})


def describe_tokens(delta: inference.ChannelDelta) -> list[Json]:
    chosen = [one.chosen for one in delta.logprobs]
    return [{"id": one.token_id, "text": one.token.decode("utf-8", "replace"), "logprob": one.logprob, "special": False} for one in chosen]


def _frame(data: Json) -> bytes:
    return b"data:%s\n\n" % orjson.dumps(data)
