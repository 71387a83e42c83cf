"""Whatever a client does wrong, it hears in OpenAI's shape, with the field and the cure."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.edge.scripted_scheduler import MODEL, stand

ASK = [{"role": "user", "content": "Hi"}]
URL = "/v1/chat/completions"
DEEP = '{"model":' + "[" * 100 + "]" * 100 + "}"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": ASK, **fields}


CASES: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": ASK}, 400, "model", "missing_field"),
    ({"model": MODEL}, 400, "messages", "missing_field"),
    (ask(messages=[]), 400, "messages", "missing_field"),
    (ask(messages=[{"content": "Hi"}]), 400, "messages[0].role", "missing_field"),
    (ask(messages=[{"role": "user"}]), 400, "messages[0].content", "missing_field"),
    (ask(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", "missing_field"),
    (ask(messages=[{"role": "wizard", "content": "Hi"}]), 400, "messages[0].role", "invalid_value"),
    (ask(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "invalid_value"),
    (ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400, "messages[0].content[0]", "invalid_value"),
    (ask(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "messages[0].content[0]", "invalid_value"),
    (ask(messages=[{"role": "user", "content": "a", "name": "a b"}]), 400, "messages[0].name", "invalid_value"),
    (ask(messages=[*ASK, {"role": "tool", "content": "r"}]), 400, "messages[1].tool_call_id", "missing_field"),
    (ask(messages=[*ASK, {"role": "tool", "content": "r", "tool_call_id": "x"}]), 400, "messages[1].tool_call_id", "invalid_value"),
    (ask(messages="Hi"), 400, "messages", "invalid_value"),
    (ask(model="gpt-9"), 404, "model", "model_not_found"),
    (ask(model=""), 400, "model", "missing_field"),
    (ask(temperature=2.5), 400, "temperature", "invalid_value"),
    (ask(temperature="hot"), 400, "temperature", "invalid_value"),
    (ask(top_p=0), 400, "top_p", "invalid_value"),
    (ask(n=9), 400, "n", "invalid_value"),
    (ask(n=-1), 400, "n", "invalid_value"),
    (ask(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (ask(max_tokens=5000), 400, "max_tokens", "context_length_exceeded"),
    (ask(stop=["a", "b", "c", "d", "e"]), 400, "stop", "invalid_value"),
    (ask(stop=[""]), 400, "stop[0]", "invalid_value"),
    (ask(stream="yes"), 400, "stream", "invalid_value"),
    (ask(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value"),
    (ask(logit_bias={"5": 101}), 400, "logit_bias.5", "invalid_value"),
    (ask(logit_bias={"300000": 1}), 400, "logit_bias", "invalid_value"),
    (ask(tools=[{"type": "function"}]), 400, "tools[0]", "invalid_value"),
    (ask(tools=[{"type": "function", "function": {"name": "a b"}}]), 400, "tools[0].function.name", "invalid_value"),
    (ask(tool_choice="required"), 400, "tool_choice", "invalid_value"),
    (ask(tool_choice="sometimes"), 400, "tool_choice", "unsupported_value"),
    (ask(response_format={"type": "json_schema"}), 400, "response_format", "invalid_value"),
    (ask(functions=[{"name": "f"}], function_call={"name": "g"}), 400, "tool_choice", "invalid_value"),
    (ask(functions=[{"name": "f f"}]), 400, "tools[0].function.name", "invalid_value"),
    (ask(logit_bias={"200006": 1}), 400, "logit_bias", "invalid_value"),
    (ask(reasoning_level="extreme"), 400, "reasoning_level", "invalid_value"),
    (ask(conversation_date="yesterday"), 400, "conversation_date", "invalid_value"),
]


async def test_every_wrong_field_is_named_with_its_cure() -> None:
    async with stand() as it, it.http() as http:
        for body, status, param, code in CASES:
            got = await http.post(URL, json=body)
            error = got.json()["error"]
            assert (got.status_code, error["param"], error["code"]) == (status, param, code), (body, error)
            assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
            assert (param or "") in error["message"] and "\n" not in error["message"]
            assert got.headers["x-request-id"].startswith("req-")
        assert not it.scheduler.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", DEEP.encode(), b'{"model":"\\ud800"}', b"[" * 5000])
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    async with stand() as it, it.http() as http:
        got = await http.post(URL, content=body, headers={"content-type": "application/json"})
    assert (got.status_code, got.json()["error"]["code"]) == (400, "invalid_value")


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(8):
        yield b"x" * 1024


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_over_the_limit_is_refused_with_and_without_a_length(is_chunked: bool) -> None:
    async with stand(max_body_bytes=4096) as it, it.http() as http:
        got = await http.post(URL, content=_chunks() if is_chunked else b"x" * 8192)
    assert (got.status_code, got.json()["error"]["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "unknown_url"), ("PUT", URL, 405, "method_not_allowed"), ("GET", "/v1/models/gpt-9", 404, "model_not_found")],
)
async def test_a_wrong_address_is_an_error_of_the_same_shape(method: str, path: str, status: int, code: str) -> None:
    async with stand() as it, it.http() as http:
        got = await http.request(method, path)
    assert (got.status_code, got.json()["error"]["code"]) == (status, code)


async def test_the_clients_request_id_comes_back_when_it_is_well_formed() -> None:
    async with stand() as it, it.http() as http:
        good = await http.get("/v1/models", headers={"x-request-id": "my-id.1"})
        bad = await http.get("/v1/models", headers={"x-request-id": "my id"})
    assert good.headers["x-request-id"] == "my-id.1"
    assert bad.headers["x-request-id"].startswith("req-")


async def test_a_defect_of_ours_shows_nothing_of_the_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    async with stand() as it, it.http() as http:
        monkeypatch.setattr(it.edge.core, "_preparer", fail)
        got = await http.post(URL, json=ask())
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in got.text and "preparer" not in got.text
    assert "x-request-id" in got.headers


async def test_too_many_open_requests_are_refused_with_a_time_to_come_back() -> None:
    async with stand(max_open_requests=1) as it, it.http() as http:
        it.edge.core.num_open = 1
        got = await http.post(URL, json=ask())
        it.edge.core.num_open = 0
    assert (got.status_code, got.headers["retry-after"]) == (429, "1")
