"""GET /v1/metrics, and the small paths beside the create calls."""

import asyncio

import openai
import pytest

from edge.routing import scheduler_stream
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, stand

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


async def test_metrics_have_the_names_that_dashboards_of_the_field_read() -> None:
    async with stand() as it, it.http() as http:
        await http.post("/v1/chat/completions", json=ASK)
        await http.post("/v1/chat/completions", json={**ASK, "model": "gpt-9"})
        text = (await http.get("/v1/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['gpt_oss_request_count{status="success"}'] == "1.0" and values['gpt_oss_request_count{status="error"}'] == "1.0"
    assert float(values["gpt_oss_avg_latency_ms"]) > 0 and values["gpt_oss_active_requests"] == "0.0"
    assert values["gpt_oss_gpu_utilization_percent"] == "0.0" and values["oss_first_token_latency_count"] == "1.0"
    assert f'oss_token_cost_usd{{model="{MODEL}"}}' in values
    assert any(name.startswith("ossia_edge_time_to_first_token_seconds_bucket") for name in values)


async def test_utilization_is_what_steps_took_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_stream, "QUOTE_TIMEOUT_S", PATIENCE_S)  # a status that is late on a busy machine would not count
    async with stand() as it, it.http() as http:
        it.scheduler.num_steps, it.scheduler.step_s = 10, 100.0
        await http.get("/v1/metrics")
        it.scheduler.num_steps = 12
        text = (await http.get("/v1/metrics")).text
    assert "gpt_oss_gpu_utilization_percent 100.0" in text, "never above the whole"


async def test_health_tells_memory_and_open_requests() -> None:
    async with stand(Script(pause_at=3)) as it, it.http() as http:
        sending = asyncio.create_task(http.post("/v1/chat/completions", json=ASK))
        await asyncio.wait_for(it.scheduler.has_paused.wait(), PATIENCE_S)
        health = (await http.get("/v1/health")).json()
        it.scheduler.script.go.set()
        await sending
    assert health["active_requests"] == 1 and 0 < health["memory_usage_gb"] < 10
    assert set(health) >= {"status", "model", "version", "timestamp", "memory_usage_gb", "active_requests"}


async def test_tokenize_and_detokenize_are_inverse_and_text_stays_text() -> None:
    async with stand() as it, it.http() as http:
        got = (await http.post("/tokenize", json={"model": MODEL, "prompt": "Hi <|start|>", "return_token_strs": True})).json()
        back = (await http.post("/detokenize", json={"model": MODEL, "tokens": got["tokens"]})).json()
        chat = (await http.post("/tokenize", json={"model": MODEL, "messages": ASK["messages"]})).json()
        await http.post("/v1/chat/completions", json=ASK)
        missing = await http.post("/tokenize", json={"model": MODEL})
    assert back["prompt"] == "Hi <|start|>" == "".join(got["token_strs"]) and got["count"] == len(got["tokens"])
    assert chat["tokens"] == list(it.scheduler.requests[0].prompt_token_ids)
    assert missing.status_code == 400


async def test_legacy_functions_are_answered_under_their_old_names() -> None:
    call = '<|channel|>commentary to=functions.get json<|message|>{"city":"Rome"}<|call|>'
    functions = [{"name": "get", "parameters": {"type": "object"}}]
    asked = {**ASK, "functions": functions, "function_call": {"name": "get"}}
    async with stand(Script(call)) as it, openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="none", timeout=PATIENCE_S) as api:
        whole = await api.chat.completions.create(**asked)  # type: ignore[call-overload]
        chunks = [chunk.choices[0] async for chunk in await api.chat.completions.create(**asked, stream=True)]  # type: ignore[call-overload]
        back = [
            *ASK["messages"],
            whole.choices[0].message.model_dump(exclude_none=True),
            {"role": "function", "name": "get", "content": "sun"},
        ]
        await api.chat.completions.create(**{**asked, "messages": back, "function_call": "auto"})  # type: ignore[call-overload]
        prompt = it.edge.service._vocabulary.decode(it.scheduler.requests[-1].prompt_token_ids)
    called = whole.choices[0].message.function_call
    assert (whole.choices[0].finish_reason, called.name, called.arguments) == ("function_call", "get", '{"city":"Rome"}')
    assert whole.choices[0].message.tool_calls is None
    assert "".join(one.delta.function_call.arguments for one in chunks if one.delta.function_call) == '{"city":"Rome"}'
    assert chunks[-1].finish_reason == "function_call"
    assert "<|start|>functions.get to=assistant<|channel|>commentary<|message|>sun<|end|>" in prompt


@pytest.mark.parametrize(("mode", "expected"), [("auto", False), ("required", True)])
async def test_allowed_tools_limit_what_the_model_is_told_of(mode: str, expected: bool) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("get", "put")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "put"}}]}}
    async with stand() as it, it.http() as http:
        await http.post("/v1/chat/completions", json={**ASK, "tools": tools, "tool_choice": choice})
        prompt = it.edge.service._vocabulary.decode(it.scheduler.requests[0].prompt_token_ids)
    assert "type put" in prompt and "type get" not in prompt
    assert it.scheduler.requests[0].sampling.constraint.harmony.call_required is expected
