"""What an edge says of itself and of its models."""

import pytest

from edge.rest.health import judge
from tests.edge.scripted_scheduler import MAX_MODEL_LEN, MODEL, stand, wait_until


async def test_models_are_those_that_the_schedulers_name() -> None:
    async with stand() as it, it.http() as http:
        listed = (await http.get("/v1/models")).json()
        one = (await http.get(f"/v1/models/{MODEL}")).json()
    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["max_model_len"], one["num_groups"]) == (MODEL, "model", MAX_MODEL_LEN, 1)
    assert one["created"] > 0


async def test_health_tells_the_state_and_follows_the_cluster() -> None:
    async with stand() as it, it.http() as http:
        well = await http.get("/v1/health")
        assert (well.status_code, well.json()["status"], well.json()["model"]) == (200, "healthy", MODEL)
        assert set(well.json()) >= {"version", "timestamp", "active_requests"}
        it.scheduler.model = ""  # a scheduler that comes back without a model
        it.scheduler.break_streams()
        await wait_until(lambda: not it.edge.catalogue.list_models() or it.edge.catalogue.list_models()[0].id != MODEL)
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.parametrize(
    ("serves_any", "num_absent", "num_lost", "expected"),
    [
        (True, 0, 0, "healthy"),
        (True, 1, 0, "degraded"),
        (True, 0, 1, "degraded"),
        (False, 0, 0, "unavailable"),
        (False, 1, 1, "unavailable"),
    ],
)
def test_the_state_is_judged_by_what_is_missing(serves_any: bool, num_absent: int, num_lost: int, expected: str) -> None:
    assert judge(serves_any, num_absent, num_lost) == expected


async def test_the_api_describes_its_body() -> None:
    async with stand() as it, it.http() as http:
        document = (await http.get("/openapi.json")).json()
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    assert {"model", "messages"} == set(schema["required"])
    assert schema["properties"]["messages"]["items"]["$ref"].removeprefix("#/components/schemas/") in document["components"]["schemas"]
