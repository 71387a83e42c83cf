"""Every failure of the REST door in OpenAI's shape; nothing of the inside gets out."""

import math

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge.rest.request_id import HEADER
from services.errors import Internal, OssiaError, http_status, openai_body


def error_response(error: OssiaError) -> Response:
    headers = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    return Response(orjson.dumps(openai_body(error)), http_status(error), headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(OssiaError, _answer_ours)
    app.add_exception_handler(HTTPException, _answer_routing)
    app.add_exception_handler(Exception, _answer_unexpected)


async def _answer_ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, OssiaError)
    return error_response(error)


async def _answer_routing(request: Request, error: Exception) -> Response:
    """404 for an unknown path and 405 for a wrong method, as the router raises them."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        code, message = "method_not_allowed", f"{request.method} is not allowed on {request.url.path}; see /openapi.json"
    else:
        code, message = "unknown_url", f"there is nothing at {request.method} {request.url.path}; see /openapi.json"
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Response(orjson.dumps(body), error.status_code, error.headers, media_type="application/json")


async def _answer_unexpected(request: Request, _error: Exception) -> Response:
    """A defect of ours. The server logs the trace-back; the client gets none of it. This answer is made outside of the middleware."""
    response = error_response(Internal("an internal error ended the request; the server's log has the details"))
    response.headers[HEADER] = request.state.request_id
    return response
