"""Who may call, as an edge is told it. Nothing configured: anybody may, which suits one machine."""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from edge.access.addresses import read_network
from edge.access.jwt import ALGORITHMS
from services.config import NameList, ProcessConfig


def _check_networks(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        read_network(value)
    return values


def _check_algorithms(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values or not ALGORITHMS.issuperset(values):
        raise ValueError(f"choose from {', '.join(sorted(ALGORITHMS))}")
    return values


def _read_rate() -> Any:
    """As text, so that a wrong one is refused like any other field."""
    return os.environ.get("API_RATE_LIMIT_RPS") or 0


Networks = Annotated[NameList, AfterValidator(_check_networks)]


class AccessConfig(ProcessConfig):
    api_key: Annotated[SecretStr, Field(description="one key that may call; better by OPENAI_API_KEY than by flag, which others see")] = (
        SecretStr("")
    )
    api_keys_file: Annotated[Path | None, Field(description="file of API keys, written by `ossia keys`; read again when it changes")] = None
    jwt_jwks: Annotated[str, Field(description="keys of bearer tokens: a JWKS file or an https URL; empty: no tokens")] = ""
    jwt_issuer: Annotated[str, Field(description="issuer that tokens must name")] = ""
    jwt_audience: Annotated[str, Field(description="audience that tokens must name")] = ""
    jwt_algorithms: Annotated[NameList, AfterValidator(_check_algorithms), Field(description="algorithms that are accepted")] = (
        "RS256",
        "ES256",
        "EdDSA",
    )
    jwt_tenant_claim: Annotated[str, Field(min_length=1, description="claim that names the tenant")] = "tenant"
    jwt_roles_claim: Annotated[str, Field(min_length=1, description="claim that lists roles: inference, metrics, admin")] = "roles"
    allow_addresses: Annotated[Networks, Field(description="networks that may call, comma separated; empty: all")] = ()
    deny_addresses: Annotated[Networks, Field(description="networks that may not")] = ()
    trusted_proxies: Annotated[Networks, Field(description="networks whose x-forwarded-for is believed")] = ()
    requests_per_second: Annotated[
        float,
        Field(
            default_factory=_read_rate,
            validate_default=True,
            ge=0,
            le=1e9,
            description="of each tenant; also API_RATE_LIMIT_RPS; 0: no limit",
        ),
    ]
    requests_per_minute: Annotated[int, Field(ge=0, le=10**9, description="of each tenant; 0: no limit")] = 0
    tokens_per_minute: Annotated[int, Field(ge=0, le=10**12, description="of each tenant, prompt and completion; 0: no limit")] = 0
    tokens_per_day: Annotated[int, Field(ge=0, le=10**15, description="of each tenant; 0: no limit")] = 0
    audit_log: Annotated[Path | None, Field(description="file for one JSON line a call; none: no audit log")] = None

    @model_validator(mode="after")
    def _check_jwt(self) -> Self:
        if self.jwt_jwks and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError("--jwt-jwks needs --jwt-issuer and --jwt-audience: a token for somebody else must not count here")
        if self.jwt_jwks.startswith("http://"):
            raise ValueError("--jwt-jwks must be a file or an https URL")
        return self

    @property
    def open_api_key(self) -> str:
        return self.api_key.get_secret_value() or os.environ.get("OPENAI_API_KEY", "")

    @property
    def asks_who_calls(self) -> bool:
        return bool(self.open_api_key or self.api_keys_file or self.jwt_jwks)

    @property
    def limits_access(self) -> bool:
        """Whether there is anything to look at."""
        limits = (self.requests_per_second, self.requests_per_minute, self.tokens_per_minute, self.tokens_per_day)
        return self.asks_who_calls or bool(self.allow_addresses or self.deny_addresses or self.audit_log) or any(limits)
