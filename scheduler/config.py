"""What a scheduler process is told."""

import os
import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

from services.config import Address, AddressList, NameList, ProcessConfig


class SchedulerConfig(ProcessConfig):
    model_config = SettingsConfigDict(env_prefix="OSSIA_SCHEDULER_", cli_prog_name="ossia scheduler")

    listen: Annotated[Address, Field(description="where gRPC is served; port 0 takes a free one")] = "127.0.0.1:0"
    advertise: Annotated[str, Field(description="host:port that others reach it at; empty: the listening one")] = ""
    scheduler_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$", description="unique name of this scheduler")] = (
        f"{socket.gethostname()}-{os.getpid()}"
    )
    groups: Annotated[AddressList, Field(description="worker groups' addresses, comma separated, where there is no etcd")] = ()
    pipeline_depth: Annotated[int, Field(ge=1, le=4, description="steps planned ahead of results; 2 keeps the device busy")] = 2
    max_queued_tokens: Annotated[int, Field(ge=1, le=2**40, description="prompt tokens that may wait for one group")] = 2_000_000
    tenant_weights: Annotated[
        NameList, Field(description="shares of the queue, as in team-a=2,team-b=1; 1 for tenants that are not named")
    ] = ()
    batch_timeout_ms: Annotated[float, Field(ge=0, le=10_000, description="how long an idle group waits for company")] = 0.0
    step_timeout_s: Annotated[float, Field(gt=0, le=3600, description="a step without a result after so long means a lost group")] = 120.0

    @field_validator("tenant_weights")
    @classmethod
    def _check_weights(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            tenant, _, weight = value.rpartition("=")
            if not tenant or not weight.replace(".", "", 1).isdigit() or float(weight) <= 0:
                raise ValueError(f"{value!r} is no tenant=weight with a weight over 0")
        return values

    @property
    def weights(self) -> dict[str, float]:
        return {value.rpartition("=")[0]: float(value.rpartition("=")[2]) for value in self.tenant_weights}
