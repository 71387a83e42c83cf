"""What an edge process is told."""

import os
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from edge.access.config import AccessConfig
from services.config import Address, AddressList, require_all_or_none


class EdgeConfig(AccessConfig):
    model_config = SettingsConfigDict(env_prefix="OSSIA_EDGE_", cli_prog_name="ossia edge")

    rest_listen: Annotated[Address, Field(description="where REST is served; port 0 takes a free one")] = "127.0.0.1:8000"
    grpc_listen: Annotated[Address, Field(description="where gRPC is served; port 0 takes a free one")] = "127.0.0.1:9000"
    door_tls_cert: Annotated[Path | None, Field(description="PEM file of the certificate of both doors; none: plaintext doors")] = None
    door_tls_key: Annotated[Path | None, Field(description="PEM file of its key")] = None
    advertise: Annotated[str, Field(description="gRPC host:port that others reach it at; empty: the listening one")] = ""
    edge_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$", description="unique name of this edge")] = (
        f"{socket.gethostname()}-{os.getpid()}"
    )
    schedulers: Annotated[AddressList, Field(description="schedulers' addresses, comma separated, where there is no etcd")] = ()
    max_body_bytes: Annotated[int, Field(ge=1024, le=2**30, description="largest REST body, in bytes")] = 8 * 1024 * 1024
    max_open_requests: Annotated[int, Field(ge=1, le=2**20, description="requests open at once; more are refused")] = 4096
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400, description="longest a request may take, in seconds")] = 600.0
    redis_url: Annotated[str, Field(description="Redis that edges share, as in redis://127.0.0.1:6379; empty: this edge's own memory")] = ""
    models_file: Annotated[Path | None, Field(description="YAML of aliases, defaults and prices per model")] = None
    sanitize_input: Annotated[bool, Field(description="strip invisible characters and control tokens from input")] = False
    max_stored_responses: Annotated[int, Field(ge=1, le=2**24, description="answers kept for /v1/responses, the newest")] = 4096
    stored_response_ttl_s: Annotated[float, Field(gt=0, le=31_536_000, description="seconds that such an answer is kept")] = 86_400.0
    default_max_tokens: Annotated[int, Field(ge=1, le=2**31, description="completion tokens where the request names no limit")] = 2048
    default_temperature: Annotated[float, Field(ge=0, le=2, description="where the request names none")] = 0.7
    default_top_p: Annotated[float, Field(gt=0, le=1, description="where the request names none")] = 0.9
    default_effort: Annotated[Literal["low", "medium", "high"], Field(description="reasoning effort where the request names none")] = (
        "medium"
    )

    @model_validator(mode="after")
    def _check_door_files(self) -> Self:
        require_all_or_none(self, "door_tls_cert", "door_tls_key")
        return self
