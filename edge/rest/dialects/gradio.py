"""POST /api/predict/ as a Gradio page's clients call it, with positional `data`, and /api, the page that says so.

    [system_prompt, user_input, temperature, top_p, max_new_tokens, repetition_penalty, use_streaming]

This API answers once: `use_streaming` is accepted, and the whole text comes either way.
"""

import html
import time
from typing import Annotated, Any

import orjson
from fastapi import APIRouter
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from edge.inference import InferenceCore
from edge.rest.body import document, explain, read_body
from edge.rest.chat_chunks import CompletionBuilder
from edge.rest.disconnect import while_connected
from edge.rest.event_stream import collect
from edge.rest.request_id import address
from edge.rest.sampling_schema import Count, Loose
from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling

PATHS = ("/api/predict/", "/api/predict")


class PredictRequest(Loose):
    data: Annotated[list[Any], Field(min_length=1, max_length=32)]


class PredictFields(Loose):
    """The positions of `data` by name; what is left out at the end takes the model's defaults."""

    system_prompt: str | None = ""
    user_input: str
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: Count | None = None
    repetition_penalty: float | None = None
    use_streaming: bool | None = False

    def to_proto(self, request_id: str, model: str) -> inference.ChatRequest:
        said = ((inference.ROLE_SYSTEM, self.system_prompt), (inference.ROLE_USER, self.user_input))
        return inference.ChatRequest(
            request_id=request_id,
            model=model,
            messages=[inference.Message(role=role, content=[inference.ContentPart(text=text)]) for role, text in said if text],
            sampling=sampling.SamplingParams(
                temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_new_tokens, repetition_penalty=self.repetition_penalty
            ),
        )


def build_router(core: InferenceCore, catalogue: Catalogue, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    async def predict(request: Request) -> Response:
        begun = time.monotonic()
        fields = read_positions((await read_body(request, PredictRequest, max_body_bytes)).data)
        asked = address(fields.to_proto(request.state.request_id, catalogue.first_model), request)
        with while_connected(request.receive):
            whole = await collect(core.chat(asked), CompletionBuilder)
        duration_s = time.monotonic() - begun
        answer = {"data": [whole.text], "is_generating": False, "duration": duration_s, "average_duration": duration_s}
        return Response(orjson.dumps(answer), media_type="application/json")

    for path in PATHS:
        router.add_api_route(path, predict, methods=["POST"], openapi_extra=document(PredictRequest))

    @router.get("/api")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(write_page(catalogue.first_model))

    return router


def read_positions(data: list[Any]) -> PredictFields:
    """Raises the OssiaError of the first position that is wrong."""
    try:
        return PredictFields.model_validate(dict(zip(PredictFields.model_fields, data, strict=False)))
    except ValidationError as error:
        raise explain(error, "data") from None


def write_page(model: str) -> str:
    rows = "".join(
        f"<tr><td>{at}</td><td><code>{name}</code></td><td>{html.escape(_name_type(field.annotation))}</td></tr>"
        for at, (name, field) in enumerate(PredictFields.model_fields.items())
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>API</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:46rem;margin:3rem auto;padding:0 1rem}"
        "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #ddd}</style>"
        f"<h1>API</h1><p><code>POST /api/predict/</code> with <code>{{&quot;data&quot;: [&hellip;]}}</code>; the answer's "
        f"<code>data[0]</code> is the text of {html.escape(model or 'the model')}.</p>"
        f"<table><tr><th>position<th>name<th>type</tr>{rows}</table>"
        "<p>OpenAI's API is under <code>/v1</code>; <a href=/docs>/docs</a> lists every path.</p></html>"
    )


def _name_type(annotation: object) -> str:
    text = str(annotation)
    return next(name for name in ("float", "bool", "int", "str") if name in text)
