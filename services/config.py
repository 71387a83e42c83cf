"""How every process is configured: flags over environment over defaults, into one frozen typed value that is read once.

A process declares its fields, each with a description, unit and range; `load_config` fills them and, where any is wrong, raises one error
that lists every bad field.
"""

import contextlib
import io
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class ConfigError(Exception):
    """The flags or the environment do not make a configuration; the message has one line per bad field."""


def _check_address(value: str) -> str:
    """`host:port`, with [brackets] around an IPv6 host and a port from 0 to 65535."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("give it as host:port, as in 127.0.0.1:9000, with a port from 0 to 65535")
    if host.startswith("["):
        ipaddress.IPv6Address(host.strip("[]"))
    elif ":" in host:
        raise ValueError("put an IPv6 host into brackets, as in [::1]:9000")
    return value


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        return tuple(part.strip() for item in value for part in str(item).split(",") if part.strip())
    return value


Address = Annotated[str, AfterValidator(_check_address)]
AddressList = Annotated[tuple[Address, ...], NoDecode, BeforeValidator(_split)]
NameList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Config = TypeVar("Config", bound="ProcessConfig")


class ProcessConfig(BaseSettings):
    """What every process is told. Subclasses set `env_prefix` and `cli_prog_name`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True, cli_avoid_json=True, env_ignore_empty=True
    )

    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$", description="least severe log line to write")] = "info"
    otlp_endpoint: Annotated[str, Field(description="OTLP gRPC collector for traces, as in http://127.0.0.1:4317; empty: no traces")] = ""
    metrics_listen: Annotated[Address, Field(description="where /metrics, /livez and /readyz are; port 0 takes a free one")] = "127.0.0.1:0"
    cluster: Annotated[str, Field(pattern="^[a-z0-9-]{1,63}$", description="name of the cluster in etcd")] = "default"
    etcd: Annotated[AddressList, Field(description="etcd endpoints, comma separated; empty: static addresses")] = ()
    drain_s: Annotated[float, Field(ge=0, le=3600, description="seconds that open requests get to end after the first SIGTERM")] = 30.0
    tls_cert: Annotated[Path | None, Field(description="PEM file of this process's certificate, for mutual TLS; none: plaintext")] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of its key")] = None
    tls_ca: Annotated[Path | None, Field(description="PEM file of the authority that signs the cluster's certificates")] = None
    etcd_tls_cert: Annotated[Path | None, Field(description="PEM file of the certificate that etcd is shown; none: plaintext")] = None
    etcd_tls_key: Annotated[Path | None, Field(description="PEM file of its key")] = None
    etcd_tls_ca: Annotated[Path | None, Field(description="PEM file of the authority that signs etcd's certificates")] = None

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for prefix in ("tls", "etcd_tls"):
            require_all_or_none(self, f"{prefix}_cert", f"{prefix}_key", f"{prefix}_ca")
        return self

    @classmethod
    def from_flags(cls, argv: Sequence[str]) -> Self:
        """Flags, over the environment, over files named like its variables in $OSSIA_SECRETS_DIR, which keep secrets out of both."""
        return cls(_cli_parse_args=list(argv), _secrets_dir=os.environ.get("OSSIA_SECRETS_DIR"))


def require_all_or_none(config: BaseSettings, *names: str) -> None:
    """Raises ValueError, which becomes the config's error, where some of the fields are set and some are not."""
    flags = {"--" + name.replace("_", "-"): getattr(config, name) for name in names}
    missing = [flag for flag, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
        raise ValueError(f"{', '.join(flags)}: give all of them or none; missing: {', '.join(missing)}")


def load_config(kind: type[Config], argv: Sequence[str]) -> Config:
    """Reads flags and environment. Raises ConfigError naming every bad field; `--help` prints the fields and exits."""
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return kind.from_flags(argv)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, one["loc"], one["msg"], one["input"]) for one in error.errors())) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(refusal.getvalue().strip().splitlines()[-1] + "; --help lists the flags") from None


def _explain(kind: type[ProcessConfig], loc: tuple[int | str, ...], message: str, value: object) -> str:
    if not loc:  # a rule over several fields names them itself
        return message.removeprefix("Value error, ")
    name = str(loc[0])
    flag, variable = "--" + name.replace("_", "-"), str(kind.model_config.get("env_prefix", "")) + name.upper()
    field = kind.model_fields.get(name)
    meaning = f" ({field.description})" if field and field.description else ""
    return f"{flag} or {variable.upper()}: {message.removeprefix('Value error, ')}, got {value!r}{meaning}"
