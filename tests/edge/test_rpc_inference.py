"""The gRPC door keeps its contract: `started` first, one terminal event last, statuses for refusals, deadlines and cancellation."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1 import inference_pb2_grpc
from protos.ossia.v1 import sampling_pb2 as sampling
from services.errors import ModelNotFound, from_rpc_error
from services.grpc_channel import open_channel
from services.vocabulary import load_vocabulary
from tests.edge.scripted_scheduler import ANSWER, MAX_MODEL_LEN, MODEL, PATIENCE_S, Script, Stand, stand, wait_until

HI = pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text="Hi <|start|>")])


@asynccontextmanager
async def dialled(script: Script | None = None) -> AsyncIterator[tuple[Stand, "inference_pb2_grpc.InferenceAsyncStub"]]:
    async with stand(script) as it, open_channel(it.grpc) as channel:
        yield it, inference_pb2_grpc.InferenceStub(channel)


async def test_a_chat_is_started_deltas_finished_and_completed() -> None:
    async with dialled() as (_, stub):
        events = [event async for event in stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI], request_id="mine"))]
    kinds = [str(event.WhichOneof("event")) for event in events]
    assert kinds[0] == "started" and kinds[-2:] == ["choice_finished", "completed"] and set(kinds[1:-2]) == {"channel_delta"}
    assert events[0].started.request_id == "mine" and events[0].started.prompt_tokens > 0
    assert events[-2].choice_finished.token_ids == load_vocabulary().encode_harmony(ANSWER)
    completed = events[-1].completed
    assert (completed.usage.reasoning_tokens, completed.usage.cached_tokens, completed.timings.queue_s) == (6, 16, 0.25)
    assert completed.usage.completion_tokens == len(events[-2].choice_finished.token_ids)
    assert 0 < completed.timings.ttft_s <= completed.timings.total_s


async def test_the_next_turn_begins_with_the_tokens_of_the_last() -> None:
    async with dialled() as (it, stub):
        events = [event async for event in stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI]))]
        answer = pb.Message(role=pb.ROLE_ASSISTANT, token_ids=events[-2].choice_finished.token_ids)
        async for _ in stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI, answer, HI])):
            pass
        first, second = (list(request.prompt_token_ids) for request in it.scheduler.requests)
    generated = list(answer.token_ids)
    assert second[: len(first) + len(generated) - 1] == first + generated[:-1]  # the last is <|return|>, stored as <|end|>


async def test_a_refusal_is_a_status_with_its_code() -> None:
    async with dialled() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Chat(pb.ChatRequest(model="gpt-9", messages=[HI])):
                pass
    error = from_rpc_error(refused.value)
    assert isinstance(error, ModelNotFound) and error.param == "model" and MODEL in error.message
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_an_error_of_the_cluster_is_the_last_event() -> None:
    script = Script(error=sampling.Error(code=sampling.ERROR_CODE_GROUP_LOST, message="gone"))
    async with dialled(script) as (_, stub):
        events = [event async for event in stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI]))]
    assert events[-1].error.code == sampling.ERROR_CODE_GROUP_LOST
    assert [event.HasField("error") or event.HasField("completed") for event in events].count(True) == 1


async def test_a_cancelled_call_cancels_the_request_in_the_cluster() -> None:
    async with dialled(Script(pause_at=3)) as (it, stub):
        call = stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI]))
        reading = asyncio.create_task(_drain(call))
        await asyncio.wait_for(it.scheduler.has_paused.wait(), PATIENCE_S)
        call.cancel()
        await asyncio.wait((reading,))
        await asyncio.wait_for(it.scheduler.was_cancelled.wait(), PATIENCE_S)
        await wait_until(lambda: it.edge.core.num_open == 0)


async def test_a_deadline_ends_a_request_that_hangs() -> None:
    async with dialled(Script(pause_at=0)) as (it, stub):
        events = [event async for event in stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI], timeout_s=0.2))]
        assert events[-1].error.code == sampling.ERROR_CODE_DEADLINE_EXCEEDED
        await asyncio.wait_for(it.scheduler.was_cancelled.wait(), PATIENCE_S)


async def test_the_calls_deadline_reaches_the_scheduler() -> None:
    async with dialled() as (it, stub):
        await _drain(stub.Chat(pb.ChatRequest(model=MODEL, messages=[HI]), timeout=30))
    assert 0 < it.scheduler.requests[0].timeout_s < 60  # the deadline, which gRPC rounds up


async def test_models_are_listed() -> None:
    async with dialled() as (_, stub):
        listed = await stub.ListModels(pb.ListModelsRequest())
    assert [(card.id, card.max_model_len) for card in listed.models] == [(MODEL, MAX_MODEL_LEN)]


async def test_tokenize_reads_text_as_text_and_a_chat_as_its_prompt() -> None:
    async with dialled() as (it, stub):
        text = await stub.Tokenize(pb.TokenizeRequest(model=MODEL, text="<|start|>"))
        chat = pb.ChatRequest(model=MODEL, messages=[HI])
        prompt = await stub.Tokenize(pb.TokenizeRequest(model=MODEL, chat=chat))
        await _drain(stub.Chat(chat))
        with pytest.raises(grpc.aio.AioRpcError, match="input"):
            await stub.Tokenize(pb.TokenizeRequest(model=MODEL))
        assert prompt.token_ids == it.scheduler.requests[0].prompt_token_ids
    assert text.token_ids == load_vocabulary().encode("<|start|>")


async def _drain(call: AsyncIterator[pb.ChatEvent]) -> None:
    async for _ in call:
        pass
