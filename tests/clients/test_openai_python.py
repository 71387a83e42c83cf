"""OpenAI's own Python client: chat, stream, tools, parse, responses, typed errors, retries."""

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from protos.ossia.v1 import sampling_pb2 as sampling
from tests.clients.conftest import ANSWER, MODEL, PLACE, SUNNY
from tests.cluster.local_cluster import LocalCluster
from tests.edge import scripted_scheduler as fake

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOOL: Any = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class Place(BaseModel):
    city: str
    degrees: float


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", timeout=fake.PATIENCE_S) as made:
        yield made


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == ANSWER
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER and {"content.delta", "content.done"} <= set(kinds)


def test_a_tool_loop_goes_round(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    tools: Any = [{"type": "function", "function": TOOL}]
    turn = client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0]
    call: Any = (turn.message.tool_calls or [])[0]
    assert (turn.finish_reason, call.function.name, call.function.arguments) == ("tool_calls", "get_weather", '{"city": "Oslo"}')
    messages += [turn.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0].message.content == SUNNY


def test_parse_gives_the_type_that_was_asked_for(client: openai.OpenAI) -> None:
    chat = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Place)
    assert chat.choices[0].message.parsed == Place.model_validate(PLACE)
    assert client.responses.parse(model=MODEL, input="Hello", text_format=Place).output_parsed == Place.model_validate(PLACE)


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Hello")
    assert first.output_text == ANSWER
    with client.responses.stream(model=MODEL, input="Hello", previous_response_id=first.id) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert deltas == final.output_text == ANSWER and final.previous_response_id == first.id


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, "missing_field"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
    ],
)
def test_errors_are_typed(client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str) -> None:
    with pytest.raises(kind) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})
    assert refused.value.code == code and refused.value.request_id


async def test_a_refused_request_is_sent_again_after_the_time_that_was_asked_for() -> None:
    busy = sampling.Error(code=sampling.ERROR_CODE_OVERLOADED, message="busy", retry_after_s=1.0)
    async with (
        fake.stand(fake.Script(error=busy, text="")) as it,
        openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="any", timeout=fake.PATIENCE_S) as api,
    ):
        heal_after(it, 1)
        begun = time.monotonic()
        got = await api.chat.completions.create(model=fake.MODEL, messages=HELLO)
    assert got.choices[0].message.content == "Hello there." and len(it.scheduler.requests) == 2
    assert time.monotonic() - begun >= 0.95, "Retry-After: 1"


def heal_after(it: fake.Stand, num_failures: int) -> None:
    """The scheduler is busy for so many requests."""
    reply, broken = it.scheduler._reply, it.scheduler.script

    async def choose(*arguments: Any) -> None:
        it.scheduler.script = broken if len(it.scheduler.requests) <= num_failures else fake.Script()
        await reply(*arguments)

    it.scheduler._reply = choose  # type: ignore[method-assign]
