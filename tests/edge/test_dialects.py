"""Other dialects over the same core: EventSource, text-generation-inference, Gradio, and the option to clean what was sent."""

import json
from typing import Any

import pytest

from edge.conversation.sanitize import sanitize
from services.vocabulary import CONTROL_NAMES, load_vocabulary
from tests.edge.scripted_scheduler import MODEL, stand


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data:").strip() for line in text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("messages", ["Hi", json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])])
async def test_a_browser_streams_a_chat_with_get(messages: str) -> None:
    query: dict[str, Any] = {"messages": messages, "stream": "true", "temperature": "0.5", "stop": "zzz", "reasoning_effort": "high"}
    async with stand() as it, it.http() as http:
        got = await http.get("/v1/chat/completions", params=query)
        whole = await http.get("/v1/chat/completions", params={"messages": messages, "stream": "false", "model": MODEL})
        for wrong in ({"messages": ""}, {"messages": "Hi", "temperature": "9"}, {"messages": "Hi", "n": "[" * 70 + "]" * 70}):
            assert (await http.get("/v1/chat/completions", params=wrong)).status_code == 400
    assert got.headers["content-type"].startswith("text/event-stream") and got.text.endswith("data: [DONE]\n\n")
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in events(got.text)) == "Hello there."
    assert whole.json()["choices"][0]["message"]["content"] == "Hello there."
    request = it.scheduler.requests[0]
    assert request.sampling.temperature == 0.5 and "Reasoning: high" in load_vocabulary().decode(request.prompt_token_ids)


async def test_tgi_generates_whole_and_streamed() -> None:
    parameters = {"max_new_tokens": 20, "temperature": 0.5, "seed": 3, "details": True, "watermark": True, "return_full_text": True}
    async with stand() as it, it.http() as http:
        whole = (await http.post("/generate", json={"inputs": "Hi ", "parameters": parameters})).json()
        streamed = events((await http.post("/generate_stream", json={"inputs": "Hi", "parameters": {"max_new_tokens": 20}})).text)
        refused = await http.post("/generate", json={"inputs": "Hi", "parameters": {"best_of": 2}})
    assert whole["generated_text"] == "Hi Hello there."
    assert [token["text"] for token in whole["details"]["tokens"]] == ["Hello", " there", "."]
    assert whole["details"]["finish_reason"] == "eos_token"
    assert [one["token"]["text"] for one in streamed] == ["Hello", " there", "."]
    assert [one["generated_text"] for one in streamed] == [None, None, "Hello there."] and streamed[-1]["details"]["generated_tokens"] == 15
    assert list(it.scheduler.requests[0].prompt_token_ids) == load_vocabulary().encode("Hi ")
    assert it.scheduler.requests[1].sampling.temperature == 0, "greedy unless sampling is asked for"
    assert refused.status_code == 400


async def test_gradio_predicts_by_position_and_shows_its_page() -> None:
    async with stand() as it, it.http(follow_redirects=False) as http:
        got = await http.post("/api/predict/", json={"data": ["Be brief.", "Hi", 0.5, 0.8, 50, 1.1, True]})
        wrong = await http.post("/api/predict/", json={"data": ["Be brief.", "Hi", "hot"]})
        page = await http.get("/api")
    assert got.json()["data"] == ["Hello there."] and got.json()["duration"] > 0
    params = it.scheduler.requests[0].sampling
    assert (params.temperature, round(params.top_p, 3), params.max_tokens, round(params.repetition_penalty, 3)) == (0.5, 0.8, 50, 1.1)
    assert "Be brief." in load_vocabulary().decode(it.scheduler.requests[0].prompt_token_ids)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "data.temperature"
    assert page.status_code == 200 and all(name in page.text for name in ("system_prompt", "use_streaming", "/api/predict/"))


def test_cleaning_takes_what_cannot_be_seen_and_leaves_words() -> None:
    hidden = "a\u0000\u200bb\u202e\r\nc\td" + "".join(CONTROL_NAMES.values()) + "e\u0301"
    assert sanitize(hidden) == "ab\nc\td\u00e9"
    assert sanitize("Grüße, 你好 👩\u200d🚀") == "Grüße, 你好 👩\u200d🚀"


ASKED = {"sanitize_input": True}


@pytest.mark.parametrize(("config", "fields", "is_clean"), [({}, {}, False), ({}, ASKED, True), (ASKED, {}, True)])
async def test_cleaning_happens_only_where_it_is_asked_for(config: dict[str, Any], fields: dict[str, Any], is_clean: bool) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a\u200bb"}], **fields}
    async with stand(**config) as it, it.http() as http:
        await http.post("/v1/chat/completions", json=body)
    assert ("ab" in load_vocabulary().decode(it.scheduler.requests[0].prompt_token_ids)) is is_clean
