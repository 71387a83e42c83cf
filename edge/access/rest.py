"""The gate before the REST door: every path that is not public passes it before its body is read."""

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.access.caller import Admission, current_admission
from edge.access.gate import PUBLIC_PATHS, Gate, read_credential
from edge.rest.errors import error_response
from services.errors import OssiaError, Unauthenticated


class AccessMiddleware:
    """Puts the tenant into `request.state.tenant`, the limits into the answer's headers and the call into the audit log."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            return await self._app(scope, receive, send)
        call = _Call(scope, self._gate)
        try:
            await self._serve(call, scope, receive, send)
        finally:
            call.note()
        return None

    async def _serve(self, call: "_Call", scope: Scope, receive: Receive, send: Send) -> None:
        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.complete(message)
            await send(message)

        try:
            call.admission = await self._gate.admit(call.address, call.credential, scope["path"])
            await self._gate.charge(call.admission)
        except OssiaError as refusal:
            answer = error_response(refusal)
            if isinstance(refusal, Unauthenticated):
                answer.headers["www-authenticate"] = "Bearer"
            return await answer(scope, receive, send_noting)
        scope.setdefault("state", {})["tenant"] = call.admission.caller.tenant
        known = current_admission.set(call.admission)
        try:
            await self._app(scope, receive, send_noting)
        finally:
            current_admission.reset(known)
        return None


class _Call:
    """One request on its way through."""

    def __init__(self, scope: Scope, gate: Gate) -> None:
        headers = Headers(scope=scope)
        peer = scope["client"][0] if scope.get("client") else ""
        self.address = gate.addresses.find_client(peer, headers.get("x-forwarded-for", ""))
        self.credential = read_credential(headers.get("authorization", ""), headers.get("x-api-key", ""))
        self.admission: Admission | None = None
        self._gate = gate
        self._scope = scope
        self._began = time.monotonic()
        self._status = "client_gone"

    def complete(self, message: Message) -> None:
        """The answer begins: its status is known, and what is left of the limits goes with it."""
        self._status = str(message["status"])
        for name, value in self.admission.headers() if self.admission else ():
            MutableHeaders(scope=message)[name] = value

    def note(self) -> None:
        path, request_id = f"{self._scope['method']} {self._scope['path']}", self._scope.get("state", {}).get("request_id", "")
        self._gate.note("rest", path, self._status, time.monotonic() - self._began, self.address, self.admission, request_id)
