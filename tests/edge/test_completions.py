"""POST /v1/completions: a raw prompt goes to the model as it is, and several come back in their places."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from services.vocabulary import END_OF_TEXT, FIRST_CONTROL_ID, load_vocabulary
from tests.edge.scripted_scheduler import MODEL, PATIENCE_S, Script, Stand, stand, wait_until

V = load_vocabulary()


@asynccontextmanager
async def dialled(script: Script | None = None) -> AsyncIterator[tuple[Stand, openai.AsyncOpenAI]]:
    async with stand(script) as it, openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as api:
        yield it, api


async def test_a_text_goes_to_the_model_without_a_conversation_around_it() -> None:
    async with dialled(Script(text=" upon a time<|return|>")) as (it, api):
        got = await api.completions.create(model=MODEL, prompt="Once <|start|>")
    assert list(it.scheduler.requests[0].prompt_token_ids) == V.encode("Once <|start|>")
    assert max(it.scheduler.requests[0].prompt_token_ids) < FIRST_CONTROL_ID
    assert (got.choices[0].text, got.choices[0].finish_reason, got.object) == (" upon a time", "stop", "text_completion")
    assert it.scheduler.requests[0].sampling.max_tokens == 16


async def test_harmony_that_the_model_speaks_anyway_shows_its_answer_only() -> None:
    async with dialled() as (_, api):
        got = await api.completions.create(model=MODEL, prompt="Hi")
    assert got.choices[0].text == "Hello there."


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(["a", "b c"], [V.encode("a"), V.encode("b c")]), ([1, 2, 3], [[1, 2, 3]]), ([[1, 2], [3]], [[1, 2], [3]]), ("", [[END_OF_TEXT]])],
)
async def test_prompts_come_as_text_texts_ids_or_lists_of_ids(prompt: Any, expected: list[list[int]]) -> None:
    async with dialled() as (it, api):
        got = await api.completions.create(model=MODEL, prompt=prompt, n=2)
    assert sorted(list(request.prompt_token_ids) for request in it.scheduler.requests) == sorted(expected)
    assert [one.index for one in got.choices] == list(range(2 * len(expected)))
    assert got.usage is not None and got.usage.prompt_tokens == sum(map(len, expected))


async def test_a_stream_joins_to_the_whole_with_echoes_first_and_usage_when_asked() -> None:
    fields: Any = {"model": MODEL, "prompt": ["a", "b"], "echo": True, "logprobs": 1}
    async with dialled() as (_, api):
        whole = await api.completions.create(**fields)
        chunks = [one async for one in await api.completions.create(**fields, stream=True, stream_options={"include_usage": True})]
    assert chunks[-1].usage is not None and not chunks[-1].choices
    for index, prompt in enumerate("ab"):
        pieces = [one.choices[0] for one in chunks if one.choices and one.choices[0].index == index]
        assert "".join(piece.text for piece in pieces) == whole.choices[index].text == f"{prompt}Hello there."
        streamed = [piece.logprobs for piece in pieces if piece.logprobs]
        logprobs = whole.choices[index].logprobs
        assert logprobs is not None and logprobs.text_offset is not None and logprobs.tokens is not None
        assert [token for one in streamed for token in one.tokens or ()] == logprobs.tokens == [prompt, "Hello", " there", "."]
        assert [at for one in streamed for at in one.text_offset or ()] == logprobs.text_offset == [0, 1, 6, 12]
        assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_value"),
    ({"prompt": "a", "best_of": 2}, "best_of", "unsupported_value"),
    ({"prompt": [FIRST_CONTROL_ID]}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 17}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"prompt": "a", "logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"prompt": "a", "n": 9}, "n", "invalid_value"),
]


async def test_what_cannot_be_done_is_refused_by_name() -> None:
    async with dialled() as (it, _), it.http() as http:
        for fields, param, code in REFUSED:
            got = await http.post("/v1/completions", json={"model": MODEL, **fields})
            error = got.json()["error"]
            assert (got.status_code, error["param"], error["code"]) == (400, param, code), (fields, error)
        assert not it.scheduler.requests


async def test_a_client_that_leaves_one_of_many_prompts_cancels_all() -> None:
    async with dialled(Script(pause_at=12)) as (it, api):
        stream = await api.completions.create(model=MODEL, prompt=["a", "b"], stream=True, echo=True)
        await anext(aiter(stream))
        await wait_until(lambda: len(it.scheduler.requests) == 2)
        await stream.close()
        await wait_until(lambda: it.edge.core.num_open == 0 and len(it.scheduler.cancelled) == 2)


async def test_prompts_that_are_all_refused_are_one_refusal() -> None:
    async with dialled() as (it, api):
        with pytest.raises(openai.NotFoundError):
            await api.completions.create(model="gpt-9", prompt=["a", "b", "c"])
        await wait_until(lambda: it.edge.core.num_open == 0)
