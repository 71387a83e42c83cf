"""`ossia run` and `ossia chat`: a conversation with a running cluster, over its gRPC door. A key is taken from OPENAI_API_KEY."""

import os
from collections.abc import AsyncIterator, Callable

import grpc
from rich.console import Console
from rich.text import Text

from protos.ossia.v1 import inference_pb2 as pb
from protos.ossia.v1.inference_pb2_grpc import InferenceStub
from services.errors import OssiaError, from_proto, from_rpc_error
from services.grpc_channel import open_door

STYLES = {pb.CHANNEL_ANALYSIS: "dim italic", pb.CHANNEL_COMMENTARY: "cyan", pb.CHANNEL_FINAL: ""}


async def ask(address: str, model: str, messages: list[pb.Message], console: Console) -> pb.Message:
    """Streams one answer to the console and returns it as the next message of the conversation. Raises OssiaError.

    The generated ids go back with it, so that the next turn finds its prefix as it was.
    """
    answer, channel = pb.Message(role=pb.ROLE_ASSISTANT), pb.CHANNEL_UNSPECIFIED
    async for event in chat(address, pb.ChatRequest(model=model, messages=messages)):
        delta = event.channel_delta
        if event.HasField("channel_delta"):
            if channel not in (pb.CHANNEL_UNSPECIFIED, delta.channel):
                console.print("\n")
            channel = delta.channel
            console.print(Text(delta.text, style=STYLES[channel]), end="", soft_wrap=True)
            if channel == pb.CHANNEL_FINAL:
                answer.content.add(text=delta.text)
        elif event.HasField("choice_finished"):
            answer.token_ids.extend(event.choice_finished.token_ids)
    console.print()
    return answer


async def chat(address: str, request: pb.ChatRequest) -> AsyncIterator[pb.ChatEvent]:
    """The events of one turn; an error, of the call or in its stream, is raised."""
    async with open_door(address) as channel:
        try:
            async for event in InferenceStub(channel).Chat(request, metadata=credential()):
                if event.HasField("error"):
                    raise from_proto(event.error)
                yield event
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None


def credential() -> tuple[tuple[str, str], ...]:
    """The metadata by which the door knows who calls; none where no key is set."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return (("authorization", f"Bearer {key}"),) if key else ()


async def first_model(address: str) -> str:
    """The model to talk to where none is named. Raises OssiaError."""
    async with open_door(address) as channel:
        try:
            models = (await InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=5, metadata=credential())).models
        except grpc.aio.AioRpcError as failure:
            raise from_rpc_error(failure) from None
    return models[0].id if models else ""


async def converse(address: str, model: str, console: Console, read_line: Callable[[], str]) -> None:
    """Turn after turn until the input ends. A refused turn is told and taken back; the conversation goes on."""
    messages: list[pb.Message] = []
    while True:
        try:
            words = read_line()
        except EOFError:
            return
        if not words.strip():
            continue
        messages.append(pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=words)]))
        try:
            messages.append(await ask(address, model, messages, console))
        except OssiaError as error:
            messages.pop()
            console.print(error.message, style="red", highlight=False)
