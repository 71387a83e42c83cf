"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from fastapi import APIRouter

from edge.routing.catalogue import Catalogue
from protos.ossia.v1 import inference_pb2 as inference


def build_router(catalogue: Catalogue) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(card) for card in catalogue.list_models()]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return describe(catalogue.find_card(name))

    return router


def describe(card: inference.ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "max_model_len": card.max_model_len,
        "max_input_tokens": max(0, card.max_model_len - 1),  # at least one token is generated
        "architecture": card.architecture,
        "total_parameters": card.total_parameters,
        "active_parameters": card.active_parameters,
        "num_groups": card.num_groups,
    }
