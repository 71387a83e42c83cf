"""Whatever our own OpenAPI allows, and what it does not, no request ends in a server error."""

import pytest

from tests.edge.fuzz_openapi import fuzz


@pytest.mark.timeout(300)
async def test_random_requests_end_in_no_server_error() -> None:
    num_cases, faults = await fuzz(300, seed=7)
    assert num_cases >= 200 and not faults, faults
