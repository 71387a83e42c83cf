"""The paths of the Responses API: create, fetch, cancel, delete, and list a response's input."""

import time
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from edge.rest.body import document, read_body
from edge.rest.disconnect import while_connected
from edge.rest.event_stream import EventStream
from edge.rest.request_id import tenant_of
from edge.rest.responses.running import Chunks, Job, ResponseRunner
from edge.rest.responses.schema import ResponsesRequest
from services.errors import InvalidArgument

PATH = "/v1/responses"
MAX_LISTED = 100


def build_router(runner: ResponseRunner, max_body_bytes: int) -> APIRouter:
    router = APIRouter()

    @router.post(PATH, openapi_extra=document(ResponsesRequest))
    async def create_response(request: Request) -> Response:
        body = await read_body(request, ResponsesRequest, max_body_bytes)
        given = orjson.loads(request.state.body)
        job = await runner.prepare(body, given, tenant_of(request), request.state.request_id, int(time.time()))
        if body.background:
            journal = await runner.start(job)
            return await _open(request, journal.follow()) if body.stream else _answer(job.record.response)
        chunks = runner.stream(job)
        if body.stream:
            return await _open(request, chunks)
        with while_connected(request.receive):
            return _answer(await _finish(chunks, job))

    @router.get(PATH + "/{response_id}")
    async def get_response(request: Request, response_id: str, stream: bool = False, starting_after: int = -1) -> Response:
        tenant = tenant_of(request)
        record = await runner.find(tenant, response_id)
        if stream:
            return await _open(request, runner.find_journal(tenant, response_id).follow(max(-1, starting_after)))
        return _answer(record.response)

    @router.delete(PATH + "/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        await runner.delete(tenant_of(request), response_id)
        return _answer({"id": response_id, "object": "response", "deleted": True})

    @router.post(PATH + "/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        return _answer(await runner.cancel(tenant_of(request), response_id))

    @router.get(PATH + "/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        items = (await runner.find(tenant_of(request), response_id)).input
        return _answer(list_page(items if order == "asc" else items[::-1], limit, after))

    return router


def list_page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """Raises InvalidArgument where `after` names none of them."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise InvalidArgument("after: none of the items has that id; give the last_id of the page before", "after")
    begin = 0 if after is None else ids.index(after) + 1
    page = items[begin : begin + limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": begin + limit < len(items)}


async def _finish(chunks: Chunks, job: Job) -> dict[str, Any]:
    async for _ in chunks:
        pass
    if job.transcript.error is not None:
        raise job.transcript.error
    return job.record.response


async def _open(request: Request, chunks: Chunks) -> Response:
    """A refusal comes before the first chunk, and is an HTTP status."""
    with while_connected(request.receive):
        first = await anext(chunks)
    return EventStream(chunks, bytes, first)


def _answer(body: dict[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
