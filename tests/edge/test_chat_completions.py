"""OpenAI's own client against the REST door."""

import asyncio
import json
from typing import Any

import openai
import pytest

from edge import inference
from protos.ossia.v1 import sampling_pb2 as sampling
from tests.edge.scripted_scheduler import MAX_MODEL_LEN, MODEL, PATIENCE_S, Script, stand, wait_until

ASK: Any = [{"role": "user", "content": "Hi"}]
CALL = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.get<|channel|>commentary json<|message|>" + (
    '{"city":"Rome"}<|call|>'
)
TOOLS: Any = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": ASK, **fields}


async def test_a_whole_completion_has_text_reasoning_usage_and_reason() -> None:
    async with stand() as it, client(it.url) as api:
        got = await api.chat.completions.create(**ask())
    choice = got.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello there.", "stop")
    assert choice.message.model_dump()["reasoning"] == choice.message.model_dump()["reasoning_content"] == "Think."
    assert got.usage is not None and got.usage.completion_tokens_details is not None and got.usage.prompt_tokens_details is not None
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.completion_tokens_details.reasoning_tokens == 6
    assert got.usage.prompt_tokens_details.cached_tokens == 16
    assert (got.system_fingerprint, got.model) == ("fp-1", MODEL)


async def test_the_synchronous_client_works_too() -> None:
    def create(url: str) -> Any:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=PATIENCE_S) as api:
            return api.chat.completions.create(**ask()).choices[0].message.content

    async with stand() as it:
        assert await asyncio.to_thread(create, it.url) == "Hello there."


async def test_a_stream_joins_to_the_whole_completion() -> None:
    async with stand() as it, client(it.url) as api:
        chunks = [chunk async for chunk in await api.chat.completions.create(**ask(stream=True))]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Hello there."
    assert "".join(delta.model_dump().get("reasoning") or "" for delta in deltas) == "Think."
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_comes_last_without_choices_and_only_when_asked_for() -> None:
    async with stand() as it, client(it.url) as api:
        stream = await api.chat.completions.create(**ask(stream=True, stream_options={"include_usage": True}))
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])


async def test_a_stream_is_events_of_json_and_ends_with_done() -> None:
    async with stand() as it, it.http() as http:
        got = await http.post("/v1/chat/completions", json=ask(stream=True))
    lines = got.text.split("\n\n")
    assert got.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-2])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_comes_with_id_name_and_arguments(stream: bool) -> None:
    async with stand(Script(CALL)) as it, client(it.url) as api:
        if stream:
            calls, reason = await _stream_calls(api)
        else:
            choice = (await api.chat.completions.create(**ask(tools=TOOLS))).choices[0]
            assert choice.message.content is None
            reason = choice.finish_reason
            calls = [
                (one.id, one.function.name, one.function.arguments) for one in choice.message.tool_calls or [] if one.type == "function"
            ]
    assert [(name, arguments) for _, name, arguments in calls] == [("get", '{"city":"Rome"}')]
    assert calls[0][0].startswith("call_") and reason == "tool_calls"


async def _stream_calls(api: openai.AsyncOpenAI) -> tuple[list[tuple[str, str, str]], str | None]:
    calls: list[tuple[str, str, str]] = []
    reason = None
    async for chunk in await api.chat.completions.create(**ask(tools=TOOLS, stream=True)):
        reason = chunk.choices[0].finish_reason or reason
        for one in chunk.choices[0].delta.tool_calls or []:
            assert one.function is not None
            if one.id:
                calls.append((one.id, one.function.name or "", ""))
            call_id, name, arguments = calls[one.index]
            calls[one.index] = (call_id, name, arguments + (one.function.arguments or ""))
    return calls, reason


async def test_a_tool_loop_goes_round_with_reasoning_under_either_name() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    for name in ("reasoning", "reasoning_content"):
        messages = [*ASK, {"role": "assistant", "content": None, name: "Look.", "tool_calls": [call]}]
        messages.append({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]})
        async with stand() as it, client(it.url) as api:
            await api.chat.completions.create(**ask(messages=messages, tools=TOOLS))
            prompt = it.edge.service._vocabulary.decode(it.scheduler.requests[0].prompt_token_ids)
        assert "analysis<|message|>Look.<|end|>" in prompt
        assert "<|start|>functions.get to=assistant<|channel|>commentary<|message|>sunny<|end|>" in prompt


async def test_several_choices_come_apart() -> None:
    async with stand() as it, client(it.url) as api:
        whole = await api.chat.completions.create(**ask(n=3))
        stream = await api.chat.completions.create(**ask(n=3, stream=True))
        chunks = [chunk.choices[0] async for chunk in stream]
    assert [(one.index, one.message.content) for one in whole.choices] == [(at, "Hello there.") for at in range(3)]
    assert ["".join(one.delta.content or "" for one in chunks if one.index == at) for at in range(3)] == ["Hello there."] * 3
    assert it.scheduler.requests[0].n == 3


async def test_logprobs_cover_the_visible_tokens() -> None:
    async with stand() as it, client(it.url) as api:
        got = await api.chat.completions.create(**ask(logprobs=True, top_logprobs=2))
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(one.token for one in logprobs.content) == "Hello there."
    assert all(len(one.top_logprobs) == 2 and one.logprob == -0.5 for one in logprobs.content)


async def test_a_stop_string_cuts_the_text_and_stops_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SETTLE_S", PATIENCE_S)  # or the scheduler's count may come too late on a busy machine
    async with stand(Script(pause_at=13)) as it, client(it.url) as api:
        got = await api.chat.completions.create(**ask(stop=" there"))
        assert got.choices[0].message.content == "Hello"
        assert got.choices[0].finish_reason == "stop"
        await wait_until(lambda: it.scheduler.cancelled == [1])
    assert got.usage is not None and got.usage.prompt_tokens_details is not None
    assert got.usage.prompt_tokens_details.cached_tokens == 16


async def test_length_is_said_to_be_length() -> None:
    async with stand(Script(reason=sampling.FINISH_REASON_LENGTH)) as it, client(it.url) as api:
        got = await api.chat.completions.create(**ask(max_completion_tokens=12))
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("Hello", "length")
    assert it.scheduler.requests[0].sampling.max_tokens == 12


async def test_defaults_fill_what_was_left_out_and_nothing_else() -> None:
    async with stand() as it, client(it.url) as api:
        await api.chat.completions.create(**ask())
        await api.chat.completions.create(**ask(temperature=0, top_p=0.5, seed=-1, reasoning_effort="high"))
    first, second = (request.sampling for request in it.scheduler.requests)
    assert (first.max_tokens, round(first.temperature, 4), round(first.top_p, 4)) == (2048, 0.7, 0.9)
    assert first.HasField("seed")
    assert (second.temperature, second.top_p, second.seed) == (0.0, 0.5, 2**64 - 1)
    prompts = [it.edge.service._vocabulary.decode(request.prompt_token_ids) for request in it.scheduler.requests]
    assert "Reasoning: medium" in prompts[0] and "Reasoning: high" in prompts[1]


async def test_a_constraint_travels_with_tools_and_formats() -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": {"type": "object"}}}
    async with stand() as it, client(it.url) as api:
        await api.chat.completions.create(**ask())
        await api.chat.completions.create(**ask(response_format=shape))
        await api.chat.completions.create(**ask(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get"}}))
    free, answer, call = (request.sampling for request in it.scheduler.requests)
    assert not free.HasField("constraint")
    assert answer.constraint.harmony.final_json_schema == '{"type":"object"}'
    assert call.constraint.harmony.call_required and [one.name for one in call.constraint.harmony.functions] == ["get"]


async def test_documented_and_unknown_fields_without_meaning_here_are_accepted() -> None:
    extra = {
        "store": True,
        "service_tier": "auto",
        "prediction": None,
        "user": "ann",
        "metadata": {"a": "b"},
        "top_k": 5,
        "unheard_of": {"x": 1},
    }
    tools = [*TOOLS, {"type": "web_search", "filters": {}}]
    async with stand() as it, it.http() as http:
        got = await http.post("/v1/chat/completions", json=ask(tools=tools, **extra))
    assert got.status_code == 200
    assert it.scheduler.requests[0].sampling.top_k == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_the_request_in_the_cluster(stream: bool) -> None:
    async with stand(Script(pause_at=8)) as it:
        async with it.http() as http:
            sending = asyncio.create_task(http.post("/v1/chat/completions", json=ask(stream=stream)))
            await asyncio.wait_for(it.scheduler.has_paused.wait(), PATIENCE_S)
            sending.cancel()
            await asyncio.wait((sending,))
        await asyncio.wait_for(it.scheduler.was_cancelled.wait(), PATIENCE_S)
        assert it.scheduler.cancelled == [1]
        await wait_until(lambda: it.edge.core.num_open == 0)


async def test_a_stream_that_breaks_says_so_and_ends() -> None:
    posted: Any = ("POST", "/v1/chat/completions")
    async with stand(Script(pause_at=12)) as it, it.http() as http, http.stream(*posted, json=ask(stream=True)) as got:
        lines = got.aiter_lines()
        await anext(lines)  # or it would be a refusal and no stream
        it.scheduler.break_streams()
        events = [line.removeprefix("data: ") async for line in lines if line]
    assert got.status_code == 200
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert "[DONE]" not in events


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_cluster_is_an_http_error_with_retry_after(stream: bool) -> None:
    refusal = sampling.Error(code=sampling.ERROR_CODE_OVERLOADED, message="the queue is full", retry_after_s=2.5)
    async with stand(Script(text="", error=refusal)) as it, it.http() as http:
        got = await http.post("/v1/chat/completions", json=ask(stream=stream))
    assert got.status_code == 429
    assert got.headers["retry-after"] == "3"
    assert got.json()["error"] == {"message": "the queue is full", "type": "rate_limit_error", "param": None, "code": "overloaded"}


async def test_a_context_that_is_too_long_is_refused_with_the_limit() -> None:
    async with stand() as it, client(it.url) as api:
        with pytest.raises(openai.BadRequestError, match=str(MAX_MODEL_LEN)) as refused:
            await api.chat.completions.create(**ask(messages=[{"role": "user", "content": "word " * 5000}]))
        assert refused.value.code == "context_length_exceeded"
        assert not it.scheduler.requests
