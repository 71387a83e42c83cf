"""/v1/health for people and dashboards, /livez and /readyz for orchestrators."""

import datetime
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse

from edge.inference import InferenceCore
from edge.routing.catalogue import Catalogue
from edge.routing.scheduler_pool import SchedulerPool

VERSION = importlib.metadata.version("ossia")


def build_router(core: InferenceCore, catalogue: Catalogue, pool: SchedulerPool, is_ready: Callable[[], bool]) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/health")
    async def get_health() -> JSONResponse:
        served = [card.id for card in catalogue.list_models() if card.num_groups]
        status = judge(bool(served), catalogue.num_absent, pool.num_disconnected)
        body: dict[str, Any] = {
            "status": status,
            "model": served[0] if served else None,
            "models": served,
            "version": VERSION,
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "memory_usage_gb": round(resident_bytes() / 1e9, 3),
            "active_requests": core.num_open,
        }
        return JSONResponse(body, 503 if status == "unavailable" else 200)

    @router.get("/livez")
    async def get_liveness() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @router.get("/readyz")
    async def get_readiness() -> PlainTextResponse:
        return PlainTextResponse("ok\n") if is_ready() else PlainTextResponse("service unavailable\n", 503)

    return router


def judge(serves_any: bool, num_absent_models: int, num_lost_schedulers: int) -> str:
    if not serves_any:
        return "unavailable"
    return "degraded" if num_absent_models or num_lost_schedulers else "healthy"


def resident_bytes() -> int:
    """Memory that this process holds now. The models' memory is the workers'; they tell it in their own metrics."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
