"""The gRPC door: the contract `Inference` over the one core. The caller's deadline and its cancellation reach the cluster."""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

from edge.conversation.prepare import ChatPreparer
from edge.inference import InferenceCore
from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import inference_pb2_grpc
from services.errors import DeadlineExceeded, MissingField
from services.vocabulary import Vocabulary

SERVICE_NAME = "ossia.v1.Inference"


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, core: InferenceCore, preparer: ChatPreparer, catalogue: Catalogue, vocabulary: Vocabulary) -> None:
        self._core = core
        self._preparer = preparer
        self._catalogue = catalogue
        self._vocabulary = vocabulary

    async def Chat(
        self, request: inference.ChatRequest, context: grpc.aio.ServicerContext[inference.ChatRequest, inference.ChatEvent]
    ) -> AsyncIterator[inference.ChatEvent]:
        """A refusal is the call's status; what fails later is the last event."""
        _adopt_deadline(request, context.time_remaining())
        async with aclosing(self._core.chat(request)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def ListModels(
        self,
        request: inference.ListModelsRequest,
        context: grpc.aio.ServicerContext[inference.ListModelsRequest, inference.ListModelsResponse],
    ) -> inference.ListModelsResponse:
        return inference.ListModelsResponse(models=self._catalogue.list_models())

    async def Tokenize(
        self, request: inference.TokenizeRequest, context: grpc.aio.ServicerContext[inference.TokenizeRequest, inference.TokenizeResponse]
    ) -> inference.TokenizeResponse:
        model = self._catalogue.find(request.model)
        match request.WhichOneof("input"):
            case "text":
                token_ids = self._vocabulary.encode(request.text)
            case "chat":
                token_ids = (await self._preparer.render(request.chat)).token_ids
            case _:
                raise MissingField("input: give text or chat", "input")
        return inference.TokenizeResponse(token_ids=token_ids, max_model_len=model.max_model_len)


def _adopt_deadline(request: inference.ChatRequest, remaining_s: float | None) -> None:
    """The call's deadline also ends the request; the sooner one counts."""
    if remaining_s is None:
        return
    if remaining_s <= 0:
        raise DeadlineExceeded("the call's deadline had passed when it arrived; allow more time")
    if not request.HasField("timeout_s") or remaining_s < request.timeout_s:
        request.timeout_s = remaining_s
