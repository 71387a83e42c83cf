"""GET /v1/chat/completions for a browser's EventSource, which can only get: the body's fields as query parameters.

`messages` is JSON or a plain text, which is then what the user says; every other field is JSON or a plain text. `stream` is true unless
it is given.
"""

import orjson
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from edge.conversation.tools import measure_depth
from edge.inference import InferenceCore
from edge.rest.body import MAX_DEPTH, explain
from edge.rest.chat_completions import PATH, answer_chat
from edge.rest.chat_schema import ChatCompletionRequest
from edge.routing.catalogue import Catalogue
from services.errors import InvalidArgument, MissingField

TEXTS = frozenset(("model", "user", "cache_salt", "reasoning_effort", "reasoning_level", "conversation_date", "stop"))


def build_router(core: InferenceCore, catalogue: Catalogue) -> APIRouter:
    router = APIRouter()

    @router.get(PATH)
    async def stream_chat(request: Request, messages: str, model: str = "", stream: bool = True) -> Response:
        if not messages:
            raise MissingField("messages: it is empty; give a text, or messages as JSON", "messages")
        fields = {name: read_field(name, value) for name, value in request.query_params.items()}
        fields |= {"model": model or catalogue.first_model, "stream": stream, "messages": read_messages(messages)}
        try:
            body = ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise explain(error) from None
        return await answer_chat(request, core, body)

    return router


def read_messages(text: str) -> object:
    """JSON where it is a list, else one message of the user."""
    value = read_field("messages", text)
    return value if isinstance(value, list) else [{"role": "user", "content": text}]


def read_field(name: str, text: str) -> object:
    """Raises InvalidArgument for JSON that is nested too deep."""
    if name in TEXTS:
        return text
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    if measure_depth(value) > MAX_DEPTH:
        raise InvalidArgument(f"{name}: it is nested deeper than {MAX_DEPTH} levels; make it flatter", name)
    return value
