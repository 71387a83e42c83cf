"""The gate before both doors: whatever is not public is denied, tenants come from keys, limits are told, and every call leaves a line."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi.routing import APIRoute
from google.protobuf import descriptor_pool, message_factory
from pydantic import ValidationError
from starlette.routing import Route

from edge.access import gate, rate_limit
from edge.access.addresses import AddressRules, peer_address
from edge.access.caller import ADMIN, INFERENCE, METRICS
from edge.access.config import AccessConfig
from edge.access.gate import PUBLIC_METHODS, PUBLIC_PATHS
from edge.access.keys import CHECK_INTERVAL_S, edit_keys, make_key, utc_now
from edge.config import EdgeConfig
from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import inference_pb2_grpc
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, Stand, stand, wait_until
from tests.fakes.redis_server import redis_server

KEY = "a key of this test"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi, the secret word is marzipan"}]}
BEARER = {"authorization": f"Bearer {KEY}"}
CHAT = pb.ChatRequest(model=MODEL, messages=[pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text="Hi")])])


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add_key(file: Path, tenant: str, **fields: Any) -> str:
    text, record = make_key(tenant, **fields)
    with edit_keys(file) as keys:
        keys.append(record)
    return text


def every_route(edge: Stand) -> Iterator[tuple[str, str]]:
    """Every path and method that the REST door knows, parameters filled in."""
    waiting: list[Any] = list(edge.edge.app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, Route | APIRoute):
            path = route.path.replace("{name:path}", "any").replace("{", "").replace("}", "")
            yield from ((method, path) for method in sorted(route.methods or ()))
        else:
            waiting += route.original_router.routes  # fails for a kind that this walk must learn


async def ask(url: str, key: str = KEY, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        shown = {"authorization": f"Bearer {key}"} if key else {}
        return await http.post(f"{url}/v1/chat/completions", json=ASK, headers={**shown, **headers})


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_every_rest_route_and_method_is_denied_without_a_key() -> None:
    async with stand(api_key=KEY) as it, it.http() as http:
        walked = list(every_route(it))
        assert {"/v1/chat/completions", "/v1/models", "/v1/health", "/openapi.json"} <= {path for _, path in walked}
        for method, path in walked:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": KEY},
                {"authorization": "Basic YTpi"},
                {"x-api-key": ""},
            ):
                answer = await http.request(method, path, headers=headers)
                if path in PUBLIC_PATHS:
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]
                assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
        for method in ("OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "PROPFIND"):
            for path in (
                "/v1/chat/completions",
                "/",
                "/nowhere",
                "//v1/models",
                "/v1/models/%2e%2e",
                "/livez/",
                "/livez/../v1/models",
                "/LIVEZ",
            ):
                assert (await http.request(method, path)).status_code == 401, (method, path)
        assert {"/livez", "/readyz"} == PUBLIC_PATHS
        assert it.scheduler.requests == []


async def test_every_grpc_method_is_denied_without_a_key() -> None:
    async with stand(api_key=KEY) as it, grpc.aio.insecure_channel(it.grpc) as channel:
        pool = descriptor_pool.Default()
        services = ("ossia.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
        methods = [method for name in services for method in pool.FindServiceByName(name).methods]
        assert len(methods) >= 6
        for method in methods:
            path = f"/{method.containing_service.full_name}/{method.name}"
            for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", KEY),)):
                assert (path in PUBLIC_METHODS) == (await call_any(channel, path, method, metadata) is not grpc.StatusCode.UNAUTHENTICATED)
        assert it.scheduler.requests == []


async def call_any(channel: grpc.aio.Channel, path: str, method: Any, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    request = message_factory.GetMessageClass(method.input_type)()
    reply = message_factory.GetMessageClass(method.output_type)
    wire = {"request_serializer": type(request).SerializeToString, "response_deserializer": reply.FromString}
    try:
        if method.client_streaming:
            call = channel.stream_stream(path, **wire)(iter([request]), metadata=metadata, timeout=PATIENCE_S)
            await call.read()
            return await call.code()
        if method.server_streaming:
            stream = channel.unary_stream(path, **wire)(request, metadata=metadata, timeout=PATIENCE_S)
            await stream.read()
            stream.cancel()
            return grpc.StatusCode.OK
        await channel.unary_unary(path, **wire)(request, metadata=metadata, timeout=PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_the_tenant_comes_from_the_key_whatever_the_body_says(keys_file: Path) -> None:
    key, admin = add_key(keys_file, "acme"), add_key(keys_file, "ops", roles=(ADMIN,))
    async with stand(api_keys_file=keys_file) as it, grpc.aio.insecure_channel(it.grpc) as channel:
        async with it.http(headers={"x-api-key": key}) as http:
            assert (await http.post("/v1/chat/completions", json={**ASK, "tenant": "umbrella"})).status_code == 200
        stub = inference_pb2_grpc.InferenceStub(channel)
        asked = pb.ChatRequest(tenant="umbrella")
        asked.MergeFrom(CHAT)
        for bearer in (key, admin):
            assert [event async for event in stub.Chat(asked, metadata=(("authorization", f"Bearer {bearer}"),))]  # type: ignore[attr-defined]
        assert [request.tenant for request in it.scheduler.requests] == ["acme", "acme", "umbrella"]


async def test_a_role_opens_what_it_is_for_and_nothing_else(keys_file: Path) -> None:
    inference, metrics = add_key(keys_file, "a"), add_key(keys_file, "b", roles=(METRICS,))
    both = add_key(keys_file, "c", roles=(INFERENCE, METRICS))
    async with stand(api_keys_file=keys_file) as it, it.http() as http:
        for key, models, scraped in ((inference, 200, 403), (metrics, 403, 200), (both, 200, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await http.get("/v1/models", headers=headers)).status_code == models
            assert (await http.get("/v1/metrics", headers=headers)).status_code == scraped
        assert error_of(await ask(it.url, metrics)) == (403, "permission_denied")


async def test_a_revoked_key_is_refused_on_every_edge_while_others_go_on(keys_file: Path) -> None:
    revoked, kept = add_key(keys_file, "acme"), add_key(keys_file, "acme")
    async with stand(api_keys_file=keys_file) as one, stand(api_keys_file=keys_file) as two:
        assert [(await ask(it.url, revoked)).status_code for it in (one, two)] == [200, 200]
        with edit_keys(keys_file) as keys:
            keys[0] = keys[0].model_copy(update={"revoked_at": utc_now()})
        await asyncio.sleep(CHECK_INTERVAL_S)
        assert [error_of(await ask(it.url, revoked)) for it in (one, two)] == [(401, "invalid_api_key")] * 2
        assert [(await ask(it.url, kept)).status_code for it in (one, two)] == [200, 200]
    assert CHECK_INTERVAL_S < 2


async def test_limits_are_told_and_refusals_say_when_to_come_back(keys_file: Path) -> None:
    key = add_key(keys_file, "acme", limits={"requests_per_minute": 2, "tokens_per_minute": 100_000})
    async with stand(api_keys_file=keys_file, requests_per_minute=1000, clock=lambda: 0.0) as it:
        first, second, third = [await ask(it.url, key) for _ in range(3)]
        assert [first.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")] == ["2", "1"]
        assert first.headers["x-ratelimit-limit-tokens"] == "100000" and first.headers["x-ratelimit-reset-tokens"].endswith("s")
        assert second.status_code == 200 and error_of(third) == (429, "rate_limit_exceeded")
        assert 1 <= int(third.headers["retry-after"]) <= 30
        assert len(it.scheduler.requests) == 2
        async with grpc.aio.insecure_channel(it.grpc) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListModels(pb.ListModelsRequest(), metadata=(("authorization", f"Bearer {key}"),))  # type: ignore[misc]
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "2 requests per minute" in str(refused.value.details())


async def test_tokens_are_taken_before_a_chat_and_settled_after_it() -> None:
    async with stand(api_key=KEY, tokens_per_day=1000) as it, it.http(headers=BEARER) as http:
        whole, again, small = [await http.post("/v1/chat/completions", json={**ASK, "max_tokens": size}) for size in (990, 990, 20)]
    used = whole.json()["usage"]["total_tokens"]
    assert int(whole.headers["x-ratelimit-remaining-tokens"]) <= 10  # all that it might have used was taken
    assert error_of(again) == (429, "rate_limit_exceeded") and "1000 tokens per day" in again.json()["error"]["message"]
    left = int(small.headers["x-ratelimit-remaining-tokens"])
    assert small.status_code == 200 and 1000 - used - 50 < left < 1000 - used  # and all that it did not use came back


async def test_limits_hold_for_each_address_where_nobody_is_asked_who_they_are() -> None:
    async with stand(requests_per_minute=2, trusted_proxies="127.0.0.0/8", clock=lambda: 0.0) as it:
        answers = [(await ask(it.url, "", **{"x-forwarded-for": client})).status_code for client in ("192.0.2.1",) * 3 + ("192.0.2.2",)]
        assert answers == [200, 200, 429, 200]
        assert {request.tenant for request in it.scheduler.requests} == {""}


async def test_lists_of_addresses_come_before_keys() -> None:
    for lists in ({"deny_addresses": "127.0.0.0/8"}, {"allow_addresses": "192.0.2.0/24"}):
        async with stand(api_key=KEY, **lists) as it, grpc.aio.insecure_channel(it.grpc) as channel:
            assert error_of(await ask(it.url)) == (403, "permission_denied")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await inference_pb2_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())  # type: ignore[misc]
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_only_a_trusted_proxy_is_believed() -> None:
    rules = AddressRules(["192.0.2.0/24", "2001:db8::/32"], ["192.0.2.66"], ["10.0.0.0/8"])
    assert rules.find_client("203.0.113.9", "192.0.2.1") == "203.0.113.9"
    assert rules.find_client("10.0.0.1", "192.0.2.1") == "192.0.2.1"
    assert rules.find_client("10.0.0.1", "192.0.2.1, 203.0.113.9, 10.0.0.2") == "203.0.113.9"
    assert rules.find_client("10.0.0.1", "") == "10.0.0.1"
    found = [rules.admits(one) for one in ("192.0.2.1", "192.0.2.66", "::ffff:192.0.2.66", "2001:db8::1", "203.0.113.9", "", "nonsense")]
    assert found == [True, False, False, True, False, False, False]
    assert [peer_address(one) for one in ("ipv4:127.0.0.1:5", "ipv6:%5B::1%5D:5", "unix:/x")] == ["127.0.0.1", "::1", ""]


async def test_every_call_leaves_a_line_without_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with stand(Script(), api_key=KEY, audit_log=path) as it, grpc.aio.insecure_channel(it.grpc) as channel:
        await ask(it.url, **{"x-request-id": "mine"})
        await ask(it.url, "wrong-marzipan")
        stub = inference_pb2_grpc.InferenceStub(channel)
        async for _ in stub.Chat(CHAT, metadata=(("authorization", f"Bearer {KEY}"),)):  # type: ignore[attr-defined]
            pass
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Tokenize(pb.TokenizeRequest(model="nowhere"), metadata=(("authorization", f"Bearer {KEY}"),))  # type: ignore[misc]
        await wait_until(lambda: path.read_text().count("\n") == 4)  # a call's line follows its answer
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["door"], one["path"], one["status"], one["subject"]) for one in lines] == [
        ("rest", "POST /v1/chat/completions", "200", "key:configured"),
        ("rest", "POST /v1/chat/completions", "401", None),
        ("grpc", "/ossia.v1.Inference/Chat", "OK", "key:configured"),
        ("grpc", "/ossia.v1.Inference/Tokenize", "NOT_FOUND", "key:configured"),
    ]
    assert lines[0]["request_id"] == "mine" and lines[0]["prompt_tokens"] > 0 and lines[0]["completion_tokens"] > 0
    assert lines[0]["address"] == lines[2]["address"] == "127.0.0.1"
    said = path.read_text()
    assert "marzipan" not in said and KEY not in said and "Hello" not in said


async def test_redis_may_go_in_the_middle_of_the_load_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gate, rate_limit):
        monkeypatch.setattr(module, "REDIS_TIMEOUT_S", PATIENCE_S)  # a busy machine is no Redis that went away
    async with redis_server(tmp_path) as redis, stand(api_key=KEY, redis_url=redis.url, requests_per_minute=10**6) as it:

        def is_shared() -> float:
            return it.registry.get_sample_value("ossia_edge_rate_limits_shared") or 0.0

        async def load(num_requests: int) -> set[int]:
            return {answer.status_code for answer in await asyncio.gather(*(ask(it.url) for _ in range(num_requests)))}

        assert await load(8) == {200} and is_shared() == 1
        running = asyncio.create_task(load(24))
        await redis.kill()
        assert await running == {200}
        assert await load(8) == {200}
        async with asyncio.timeout(PATIENCE_S):
            while is_shared():
                assert await load(1) == {200}
            await redis.start()
            while not is_shared():
                assert await load(1) == {200}


@pytest.mark.parametrize(
    "wrong",
    [
        {"jwt_jwks": "https://issuer.example/keys"},
        {"jwt_jwks": "http://issuer.example/keys", "jwt_issuer": "i", "jwt_audience": "a"},
        {"jwt_algorithms": "HS256"},
        {"jwt_algorithms": "none"},
        {"allow_addresses": "not a network"},
        {"requests_per_minute": -1},
    ],
)
def test_a_configuration_that_would_let_others_in_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EdgeConfig(**wrong)


def test_the_fields_own_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not AccessConfig().limits_access
    monkeypatch.setenv("OPENAI_API_KEY", "from outside")
    monkeypatch.setenv("API_RATE_LIMIT_RPS", "2.5")
    config = AccessConfig()
    assert config.open_api_key == "from outside" and config.requests_per_second == 2.5 and config.asks_who_calls
    monkeypatch.setenv("API_RATE_LIMIT_RPS", "many")
    with pytest.raises(ValidationError, match="requests_per_second"):
        AccessConfig()
    monkeypatch.delenv("API_RATE_LIMIT_RPS")
    assert AccessConfig(api_key="first").open_api_key == "first"  # type: ignore[arg-type]  # as a flag gives it
    assert "first" not in repr(AccessConfig(api_key="first"))  # type: ignore[arg-type]
