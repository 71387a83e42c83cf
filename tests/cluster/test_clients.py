"""The clients that users bring, against a whole cluster: openai, curl, and a gRPC client that knows only reflection."""

import json
import subprocess
import urllib.request
from collections.abc import Iterator

import grpc
import openai
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.cluster.conftest import REPLY
from tests.cluster.local_cluster import LocalCluster

ANSWER = REPLY.rpartition("<|message|>")[2]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(scripted: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any") as made:
        yield made


def test_openai_sync_gets_answer_reasoning_and_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=HELLO)
    message = answer.choices[0].message
    assert message.content == ANSWER and answer.choices[0].finish_reason == "stop"
    assert message.model_extra and message.model_extra["reasoning"] == message.model_extra["reasoning_content"] == "Let me count."
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_stream_is_the_same_answer_and_usage_only_when_asked(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="scripted", messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True] and not chunks[-1].choices
    unasked = list(client.chat.completions.create(model="scripted", messages=HELLO, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in unasked)


async def test_openai_async_streams(scripted: LocalCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{scripted.url}/v1", api_key="any") as client:
        stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER


def test_openai_gets_a_tool_call(client: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    answer = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "weather?"}], tools=[tool])
    call = answer.choices[0].message.tool_calls[0]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Oslo"}


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]


@pytest.mark.parametrize(
    ("body", "error", "param", "word"),
    [
        ({"model": "nope", "messages": HELLO}, openai.NotFoundError, "model", "scripted"),
        ({"model": "scripted", "messages": []}, openai.BadRequestError, "messages", "messages"),
        ({"model": "scripted", "messages": [{"role": "user"}]}, openai.BadRequestError, "messages[0].content", "content"),
        ({"model": "scripted", "messages": HELLO, "temperature": 3}, openai.BadRequestError, "temperature", "2"),
        ({"model": "scripted", "messages": [{"role": "user", "content": "a b " * 70_000}]}, openai.BadRequestError, "messages", "131072"),
    ],
    ids=["unknown model", "no messages", "missing content", "temperature", "context"],
)
def test_bad_input_raises_the_typed_error_that_names_the_field(
    client: openai.OpenAI, body: dict[str, object], error: type[openai.APIStatusError], param: str, word: str
) -> None:
    with pytest.raises(error) as refusal:
        client.post("/chat/completions", body=body, cast_to=object)
    assert refusal.value.param == param and word in refusal.value.message


def test_curl_streams_events_as_they_come(scripted: LocalCluster) -> None:
    body = json.dumps({"model": "scripted", "messages": HELLO, "stream": True})
    argv = ["curl", "-sN", f"{scripted.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])


def test_a_client_that_knows_only_reflection_lists_and_chats(scripted: LocalCluster) -> None:
    with grpc.insecure_channel(scripted.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"ossia.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
        pool = DescriptorPool(database)
        chat = pool.FindServiceByName("ossia.v1.Inference").methods_by_name["Chat"]
        request_type, event_type = (message_factory.GetMessageClass(one) for one in (chat.input_type, chat.output_type))
        request = json_format.ParseDict(
            {"model": "scripted", "messages": [{"role": "ROLE_USER", "content": [{"text": "Hello"}]}]}, request_type(), descriptor_pool=pool
        )
        call = channel.unary_stream(
            "/ossia.v1.Inference/Chat", request_serializer=request_type.SerializeToString, response_deserializer=event_type.FromString
        )
        events = [json_format.MessageToDict(event, descriptor_pool=pool) for event in call(request, timeout=120)]
    finals = [event["channelDelta"] for event in events if event.get("channelDelta", {}).get("channel") == "CHANNEL_FINAL"]
    assert "".join(delta["text"] for delta in finals) == ANSWER
    assert "started" in events[0] and [event for event in events if "completed" in event or "error" in event] == events[-1:]


def test_every_process_serves_metrics_and_probes(scripted: LocalCluster) -> None:
    for process in scripted.state.values():
        for path, expected in (("metrics", "ossia_"), ("livez", ""), ("readyz", "")):
            with urllib.request.urlopen(f"http://{process['metrics']}/{path}", timeout=60) as answer:
                assert answer.status == 200 and expected in answer.read().decode()
