"""The Responses API: the event protocol, what is kept, the turns that follow, and the background."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from edge.rest.responses import running
from edge.rest.responses import store as store_module
from edge.rest.responses.store import MemoryStore, RedisStore
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import Unavailable
from services.vocabulary import load_vocabulary
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, Stand, stand, wait_until
from tests.fakes.redis_server import redis_server

TOOL: Any = {"type": "function", "name": "get", "parameters": {"type": "object"}, "strict": False}
CALL = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
    '<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{"city":"Rome"}<|call|>'
)
FINISHED = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


@asynccontextmanager
async def dialled(script: Script | None = None, **config: Any) -> AsyncIterator[tuple[Stand, openai.AsyncOpenAI]]:
    options: Any = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
    async with stand(script, **config) as it, openai.AsyncOpenAI(base_url=f"{it.url}/v1", **options) as api:
        yield it, api


def prompt_of(it: Stand, at: int = -1) -> str:
    return load_vocabulary().decode(it.scheduler.requests[at].prompt_token_ids)


async def test_a_response_has_reasoning_words_and_usage() -> None:
    async with dialled() as (_, api):
        got = await api.responses.create(model=MODEL, input="Hi", instructions="Be brief.")
    assert (got.output_text, got.status, [item.type for item in got.output]) == ("Hello there.", "completed", ["reasoning", "message"])
    assert got.usage is not None and got.usage.output_tokens_details.reasoning_tokens == 6
    assert got.usage.input_tokens_details.cached_tokens == 16


@pytest.mark.parametrize("chunk", [1, 5, 100])
async def test_the_event_protocol_is_kept_and_its_deltas_join_to_the_response(chunk: int) -> None:
    async with dialled(Script(CALL, chunk=chunk)) as (_, api):
        stream = await api.responses.create(model=MODEL, input="Hi", tools=[TOOL], stream=True)
        events: list[Any] = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert [kind for kind in kinds if kind in FINISHED] == ["response.completed"]
    response = events[-1].response
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    for at, item in enumerate(response.output):
        own = [event for event in events if getattr(event, "output_index", None) == at]
        assert own[0].type == "response.output_item.added" and own[-1].type == "response.output_item.done"
        assert own[-1].item.model_dump() == item.model_dump()
        deltas = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
    call = response.output[2]
    assert (call.name, call.arguments, call.status) == ("get", '{"city":"Rome"}', "completed") and call.call_id.startswith("call_")
    assert response.output[1].phase == "commentary"


async def test_a_tool_loop_goes_round_by_items_and_by_previous_response_id() -> None:
    result: Any = {"type": "function_call_output", "output": "sunny"}
    async with dialled(Script(CALL)) as (it, api):
        first = await api.responses.create(model=MODEL, input="Hi", tools=[TOOL])
        result["call_id"] = first.output[2].call_id  # type: ignore[union-attr]
        sent: Any = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output), result]
        await api.responses.create(model=MODEL, input=sent, tools=[TOOL])
        by_items = prompt_of(it)
        await api.responses.create(model=MODEL, input=[result], previous_response_id=first.id, tools=[TOOL])
        by_id = prompt_of(it)
    assert by_items == by_id
    assert "analysis<|message|>Look.<|end|>" in by_id and "commentary<|message|>One moment.<|end|>" in by_id
    assert "<|start|>functions.get to=assistant<|channel|>commentary<|message|>sunny<|end|>" in by_id


async def test_a_conversation_goes_on_by_its_name_and_instructions_do_not_carry_over() -> None:
    async with dialled() as (it, api):
        await api.responses.create(model=MODEL, input="First", conversation="conv_1", instructions="Rhyme.")
        await api.responses.create(model=MODEL, input="Second", conversation="conv_1")
    assert "First" in prompt_of(it) and "final<|message|>Hello there." in prompt_of(it) and "Rhyme" not in prompt_of(it)


async def test_what_is_kept_can_be_fetched_listed_and_deleted_and_what_is_not_cannot() -> None:
    async with dialled() as (_, api):
        kept = await api.responses.create(model=MODEL, input=[{"role": "user", "content": text} for text in "abc"])  # type: ignore[misc]
        assert (await api.responses.retrieve(kept.id)).model_dump() == kept.model_dump()
        page = await api.responses.input_items.list(kept.id, limit=2, order="asc")
        assert [item.content[0].text async for item in page] == ["a", "b", "c"]  # type: ignore[union-attr]
        await api.responses.delete(kept.id)
        loose = await api.responses.create(model=MODEL, input="Hi", store=False)
        for response_id in (kept.id, loose.id, "resp_0"):
            with pytest.raises(openai.NotFoundError):
                await api.responses.retrieve(response_id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.create(model=MODEL, input="Hi", previous_response_id=kept.id)


async def test_a_background_response_is_fetched_followed_and_cancelled() -> None:
    async with dialled(Script(pause_at=12)) as (it, api):
        queued = await api.responses.create(model=MODEL, input="Hi", background=True)
        assert queued.status == "queued"
        await asyncio.wait_for(it.scheduler.has_paused.wait(), PATIENCE_S)
        following = await api.responses.retrieve(queued.id, stream=True, starting_after=0)
        first = await anext(aiter(following))
        assert (first.type, first.sequence_number) == ("response.in_progress", 1)
        async for event in following:
            if event.type == "response.output_text.delta":  # until then there is nothing that the cancelled response could hold
                break
        cancelled = await api.responses.cancel(queued.id)
        assert cancelled.status == "cancelled" and "Hello" in cancelled.output_text
        assert [event.type async for event in following][-1] == "response.cancelled"
        await wait_until(lambda: it.scheduler.cancelled == [1] and it.edge.core.num_open == 0)
        plain = await api.responses.create(model=MODEL, input="Hi", max_output_tokens=3)
        with pytest.raises(openai.BadRequestError, match="background"):
            await api.responses.cancel(plain.id)


async def test_a_background_stream_outlives_its_reader() -> None:
    async with dialled(Script(pause_at=12)) as (it, api):
        stream = await api.responses.create(model=MODEL, input="Hi", background=True, stream=True)
        created: Any = await anext(aiter(stream))
        await stream.close()
        it.scheduler.script.go.set()
        async with asyncio.timeout(PATIENCE_S):
            while (got := await api.responses.retrieve(created.response.id)).status != "completed":  # noqa: ASYNC110 - a response is fetched, it does not tell
                await asyncio.sleep(0.02)
        assert got.output_text == "Hello there."


async def test_a_cut_and_a_failed_response_say_so() -> None:
    async with dialled(Script(reason=sampling.FINISH_REASON_LENGTH)) as (it, api):
        cut = await api.responses.create(model=MODEL, input="Hi", max_output_tokens=12)
        assert cut.status == "incomplete" and cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        it.scheduler.script = Script(error=sampling.Error(code=sampling.ERROR_CODE_GROUP_LOST, message="gone"))
        events: list[Any] = [event async for event in await api.responses.create(model=MODEL, input="Hi", stream=True)]
        assert events[-1].type == "response.failed" and events[-1].response.error.code == "group_lost"
        with pytest.raises(openai.InternalServerError, match="gone"):
            await api.responses.create(model=MODEL, input="Hi")


async def test_truncation_drops_the_oldest_until_it_fits() -> None:
    turns: Any = [{"role": "user", "content": f"{number} " + "word " * 300} for number in range(20)]
    async with dialled() as (it, api):
        with pytest.raises(openai.BadRequestError, match="context"):
            await api.responses.create(model=MODEL, input=turns)
        await api.responses.create(model=MODEL, input=turns, truncation="auto", instructions="Keep this.")
    assert "19 word" in prompt_of(it) and ">0 word" not in prompt_of(it) and "Keep this." in prompt_of(it)


IMAGE = {"type": "input_image", "image_url": "http://x/y.png"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "input", "missing_field"),
    ({"input": 5}, "input", "invalid_value"),
    (
        {"input": [{"role": "user", "content": [IMAGE]}]},
        "input[0].content[0]",
        "invalid_value",
    ),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing_field"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "invalid_value"),
    ({"input": "a", "background": True, "store": False}, "background", "invalid_value"),
    ({"input": "a", "conversation": "a b"}, "conversation.id", "invalid_value"),
    ({"input": "a", "temperature": 3}, "temperature", "invalid_value"),
]


async def test_every_wrong_field_of_a_response_is_named() -> None:
    async with dialled() as (it, _), it.http() as http:
        for fields, param, code in REFUSED:
            got = await http.post("/v1/responses", json={"model": MODEL, **fields})
            error = got.json()["error"]
            assert (got.status_code, error["code"]) == (400, code) and error["param"].startswith(param), (fields, error)
        assert not it.scheduler.requests


async def test_unknown_tools_and_items_are_left_out_not_refused() -> None:
    items: Any = [{"type": "web_search_call", "id": "ws_1", "status": "completed"}, {"role": "user", "content": "Hi"}]
    async with dialled() as (it, api):
        got = await api.responses.create(model=MODEL, input=items, tools=[{"type": "web_search"}, TOOL], tool_choice={"type": "web_search"})  # type: ignore[arg-type]
    assert got.output_text == "Hello there." and "web_search" not in prompt_of(it) and "get" in prompt_of(it)


async def test_the_memory_store_is_bounded_in_number_and_time() -> None:
    now = 0.0
    store = MemoryStore(2, 10.0, clock=lambda: now)
    for name in "abc":
        await store.put("t", name, name.encode())
    assert [await store.get("t", name) for name in "abc"] == [None, b"b", b"c"]
    assert await store.get("other", "b") is None
    now = 11.0
    assert await store.get("t", "c") is None


async def test_edges_share_responses_through_redis_and_their_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CANCEL_WAIT_S", PATIENCE_S)
    monkeypatch.setattr(store_module, "REDIS_TIMEOUT_S", PATIENCE_S)  # a busy machine is no store that went away
    async with redis_server(tmp_path) as server:
        url = server.url
        async with dialled(Script(pause_at=12), redis_url=url) as (it, one), dialled(redis_url=url) as (_, other):
            mine = await other.responses.create(model=MODEL, input="Hi")
            assert (await one.responses.retrieve(mine.id)).output_text == "Hello there."
            queued = await one.responses.create(model=MODEL, input="Hi", background=True)
            await asyncio.wait_for(it.scheduler.has_paused.wait(), PATIENCE_S)
            assert (await other.responses.cancel(queued.id)).status == "cancelled", "asked of the edge where it does not run"
            await wait_until(lambda: it.edge.core.num_open == 0)
        store = RedisStore(url, 2, 60)
        for name in "abc":
            await store.put("t", name, name.encode())
        assert [await store.get("t", name) for name in "abc"] == [None, b"b", b"c"]
        assert await store.delete("t", "b") and not await store.delete("t", "b")
        await store.aclose()


async def test_a_store_that_is_away_costs_the_record_not_the_answer() -> None:
    async with dialled(redis_url="redis://127.0.0.1:1") as (_, api):
        got = await api.responses.create(model=MODEL, input="Hi")
        assert got.output_text == "Hello there." and got.model_dump()["store"] is False
        with pytest.raises(openai.InternalServerError) as away:
            await api.responses.retrieve(got.id)
    assert away.value.status_code == 503 and away.value.code == "unavailable"


async def test_a_store_that_cannot_be_reached_is_told_as_such() -> None:
    store = RedisStore("redis://127.0.0.1:1", 2, 60)
    with pytest.raises(Unavailable, match="store"):
        await store.get("t", "a")
    await store.aclose()


async def test_a_response_whose_edge_is_gone_cannot_be_cancelled_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CANCEL_WAIT_S", 0.1)
    record = running.Record({"id": "resp_1", "status": "in_progress", "background": True, "output": []}, [], [])
    async with dialled() as (it, api):
        await it.edge.runner._store.put("", "resp_1", record.dump())
        with pytest.raises(openai.InternalServerError, match="does not answer") as away:
            await api.responses.cancel("resp_1")
    assert away.value.status_code == 503
