"""POST /v1/chat/completions, streamed or whole."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from edge.inference import InferenceCore
from edge.rest.body import document, read_body
from edge.rest.chat_chunks import ChunkWriter, CompletionBuilder
from edge.rest.chat_schema import ChatCompletionRequest
from edge.rest.disconnect import while_connected
from edge.rest.event_stream import collect, open_stream
from edge.rest.request_id import address

PATH = "/v1/chat/completions"


def build_router(core: InferenceCore, max_body_bytes: int) -> APIRouter:
    """The path twice: a plain route answers, and FastAPI's describes it, whose work on every request nothing here needs."""

    async def create_chat_completion(request: Request) -> Response:
        return await answer_chat(request, core, await read_body(request, ChatCompletionRequest, max_body_bytes))

    router = APIRouter()
    router.add_route(PATH, create_chat_completion, methods=["POST"], include_in_schema=False)
    router.add_api_route(PATH, create_chat_completion, methods=["POST"], openapi_extra=document(ChatCompletionRequest), response_model=None)
    return router


async def answer_chat(request: Request, core: InferenceCore, body: ChatCompletionRequest) -> Response:
    batches = core.chat(address(body.to_proto(request.state.request_id), request))
    if body.stream:
        return await open_stream(request, batches, lambda started: ChunkWriter(started, body.include_usage, body.is_legacy).write)
    with while_connected(request.receive):
        whole = await collect(batches, lambda started: CompletionBuilder(started, body.is_legacy))
    return Response(whole.build(), media_type="application/json")
