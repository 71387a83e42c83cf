"""`x-request-id` on every answer: the client's own where it is well formed, else a drawn one; and the trace that it brings."""

import secrets

from opentelemetry import context as otel_context
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.conversation.validation import REQUEST_ID
from protos.ossia.v1 import inference_pb2 as inference
from services.telemetry import bind_request_id, extract_context

HEADER = "x-request-id"


class RequestIdMiddleware:
    """Puts the id into `request.state.request_id`, into the answer's headers and into the log lines between."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if "traceparent" in headers:
            otel_context.attach(extract_context(headers))  # every request runs in a task of its own: nothing to undo
        given = headers.get(HEADER, "")
        request_id = given if given and REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bind_request_id(request_id):
            await self._app(scope, receive, send_with_id)
        return None


def tenant_of(request: Request) -> str:
    """Whom the request counts for, as the access layer found it: it comes from the key, never from the body."""
    return str(request.scope["state"].get("tenant", ""))


def address(asked: inference.ChatRequest, request: Request) -> inference.ChatRequest:
    """`asked` with its tenant, and returned."""
    asked.tenant = tenant_of(request)
    return asked
