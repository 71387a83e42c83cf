"""POST /tokenize and /detokenize: what a text or a conversation is in tokens, and back."""

from typing import Annotated

import orjson
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edge.conversation.prepare import ChatPreparer
from edge.rest.body import document, read_body
from edge.rest.chat_schema import ChatCompletionRequest
from edge.rest.sampling_schema import Loose
from edge.routing.catalogue import Catalogue
from services.errors import MissingField
from services.vocabulary import Vocabulary


class TokenizeRequest(Loose):
    """A text in `prompt`, or what a chat completion takes: `messages`, `tools`, `reasoning_effort` and their kin."""

    model: str
    prompt: str | None = None
    messages: list[object] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Loose):
    model: str
    tokens: list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]]


def build_router(catalogue: Catalogue, preparer: ChatPreparer, vocabulary: Vocabulary, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=document(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest, max_body_bytes)
        model = catalogue.find(body.model)
        if body.prompt is not None:
            token_ids = vocabulary.encode(body.prompt)
        elif body.messages is not None:
            chat = await read_body(request, ChatCompletionRequest, max_body_bytes)
            token_ids = (await preparer.render(chat.to_proto(request.state.request_id))).token_ids
        else:
            raise MissingField("prompt: give a text, or messages", "prompt")
        strings = [vocabulary.decode([one]) for one in token_ids] if body.return_token_strs else None
        answer = {"count": len(token_ids), "max_model_len": model.max_model_len, "tokens": token_ids, "token_strs": strings}
        return Response(orjson.dumps(answer), media_type="application/json")

    @router.post("/detokenize", openapi_extra=document(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest, max_body_bytes)
        catalogue.find(body.model)
        return Response(orjson.dumps({"prompt": vocabulary.decode(body.tokens)}), media_type="application/json")

    return router
