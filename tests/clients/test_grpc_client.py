"""The typed gRPC client: whole answers, typed errors, and retries only where they are safe."""

import time

import pytest

from clients.python import ChatError, InferenceClient
from clients.python.client import backoff_s
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import DeadlineExceeded, GroupLost, ModelNotFound, Overloaded, Unavailable
from services.vocabulary import load_vocabulary
from tests.clients.test_openai_python import heal_after
from tests.edge.scripted_scheduler import ANSWER, MODEL, Script, stand, wait_until

CALL = '<|channel|>commentary to=functions.get json<|message|>{"city":"Rome"}<|call|>'
HI = inference.Message(role=inference.ROLE_USER, content=[inference.ContentPart(text="Hi")])


async def test_an_answer_comes_whole_with_its_ids() -> None:
    async with stand() as it, InferenceClient(it.grpc) as client:
        answer = await client.ask(MODEL, "Hi")
        assert (answer.text, answer.reasoning, answer.finish_reason) == ("Hello there.", "Think.", sampling.FINISH_REASON_STOP)
        assert answer.token_ids == load_vocabulary().encode_harmony(ANSWER) and answer.usage.reasoning_tokens == 6
        assert [card.id for card in await client.list_models()] == [MODEL]
        assert await client.tokenize(MODEL, "Hi") == load_vocabulary().encode("Hi")


async def test_a_tool_call_comes_whole() -> None:
    async with stand(Script(CALL)) as it, InferenceClient(it.grpc) as client:
        request = inference.ChatRequest(model=MODEL, messages=[HI], tools=[inference.Tool(name="get")])
        answer = await client.complete(request)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("get", '{"city":"Rome"}')]


async def test_a_busy_edge_is_asked_again_after_the_time_it_named() -> None:
    busy = sampling.Error(code=sampling.ERROR_CODE_OVERLOADED, message="busy", retry_after_s=0.5)
    async with stand(Script(error=busy, text="")) as it, InferenceClient(it.grpc) as client:
        heal_after(it, 2)
        begun = time.monotonic()
        assert (await client.ask(MODEL, "Hi")).text == "Hello there."
    assert len(it.scheduler.requests) == 3 and time.monotonic() - begun >= 0.95


@pytest.mark.parametrize(("text", "num_requests"), [("", 3), (ANSWER, 1)])
async def test_nothing_is_sent_again_once_an_answer_has_begun(text: str, num_requests: int) -> None:
    lost = sampling.Error(code=sampling.ERROR_CODE_GROUP_LOST, message="gone", retry_after_s=0.01)
    async with stand(Script(text=text, error=lost, pause_at=12)) as it, InferenceClient(it.grpc) as client:
        with pytest.raises(GroupLost, match="gone"):
            async for event in client.chat(inference.ChatRequest(model=MODEL, messages=[HI])):
                if not event.HasField("started"):
                    it.scheduler.script.go.set()  # the error comes after an answer that was read
    assert len(it.scheduler.requests) == num_requests


async def test_errors_are_typed_and_the_callers_are_not_retried() -> None:
    async with stand() as it, InferenceClient(it.grpc, timeout_s=30) as client:
        with pytest.raises(ModelNotFound) as refused:
            await client.ask("gpt-9", "Hi")
        assert isinstance(refused.value, ChatError) and refused.value.param == "model" and not it.scheduler.requests
        it.scheduler.script = Script(pause_at=0)
        async with InferenceClient(it.grpc, timeout_s=0.3) as hasty:
            with pytest.raises(DeadlineExceeded):
                await hasty.ask(MODEL, "Hi")
        await wait_until(lambda: it.edge.core.num_open == 0)


async def test_leaving_the_iteration_cancels_the_request() -> None:
    async with stand(Script(pause_at=12)) as it, InferenceClient(it.grpc) as client:
        events = client.chat(inference.ChatRequest(model=MODEL, messages=[HI]))
        async for event in events:
            if event.channel_delta.channel == inference.CHANNEL_FINAL:
                break
        await events.aclose()  # type: ignore[attr-defined]
        await wait_until(lambda: it.scheduler.cancelled == [1] and it.edge.core.num_open == 0)


def test_the_wait_is_what_was_asked_for_or_doubles_with_jitter() -> None:
    assert backoff_s(Overloaded("busy", retry_after_s=3.0), 5) == 3.0
    assert 0.05 <= backoff_s(Unavailable("away"), 0) <= 0.1 and 2.5 <= backoff_s(Unavailable("away"), 20) <= 5.0
