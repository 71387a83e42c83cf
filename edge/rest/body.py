"""The body of a request: read within a limit, parsed, checked against its schema. Errors name the field and the cure."""

from collections.abc import Iterable
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from edge.conversation.tools import measure_depth
from services.errors import Cancelled, InvalidArgument, MissingField, OssiaError, PayloadTooLarge

MAX_DEPTH = 64
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """Raises PayloadTooLarge, InvalidArgument or MissingField. A body without a length is counted as it comes; it may be read again."""
    value = parse_json(await _read_bytes(request, max_bytes))
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise explain(error) from None


def document(kind: type[BaseModel]) -> dict[str, Any]:
    """What the API's description says of a body that is read here; `document_bodies` adds its schema."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document_bodies(app: FastAPI, kinds: Iterable[type[BaseModel]]) -> None:
    """Bodies are read by hand, within a limit, so their schemas are added to the description by hand."""
    schemas = app.openapi().setdefault("components", {}).setdefault("schemas", {})
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    state = request.scope["state"]
    if "body" in state:
        return bytes(state["body"])
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise Cancelled("the client went away before its request was whole") from None
    state["body"] = b"".join(chunks)
    return bytes(state["body"])


def parse_json(body: bytes) -> dict[str, object]:
    """A JSON object, at most MAX_DEPTH deep. Raises InvalidArgument."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the body is not JSON ({error}); send a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidArgument("the body is JSON but no object; send a JSON object")
    if measure_depth(value) > MAX_DEPTH:
        raise InvalidArgument(f"the body is nested deeper than {MAX_DEPTH} levels; make it flatter")
    return value


def explain(error: ValidationError, within: str = "") -> OssiaError:
    """The first fault as one sentence; `within` is the param of what was checked, where that is a part of the body."""
    fault = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(filter(None, (within, dotted(fault["loc"]))))
    if fault["type"] == "missing":
        return MissingField(f"{param}: it is missing; give it", param)
    reason = fault["msg"].removeprefix("Value error, ")
    return InvalidArgument(f"{param}: {reason[:1].lower()}{reason[1:]}", param)


def dotted(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") → messages[0].content"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {max_bytes} bytes; send less")
