"""API keys: a file of hashed ones that the command writes and every edge reads, and single keys from the configuration.

A key is 256 random bits behind a public id, so one SHA-256 keeps it as well as a slow hash would: there is nothing to guess. The id finds
the record, and the comparison takes the same time whether or not there is one.

    sk-ossia-0123456789ab-<43 characters>
             the id, which lists and logs show
"""

import datetime
import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.access.caller import INFERENCE, Caller, Limits
from services.telemetry import get_logger

CHECK_INTERVAL_S = 0.5  # how old what is known of the file may be; a revoked key is refused this much later
_PREFIX = "sk-ossia-"
_ID_CHARS = 12
_NOBODY = "0" * 64  # no digest is it
log = get_logger(__name__)
Role = Literal["inference", "metrics", "admin"]


class KeyFileError(Exception):
    """The file of keys cannot be used; one sentence with the cure."""


class KeyLimits(BaseModel):
    """As in `caller.Limits`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_day: int | None = Field(default=None, ge=0)


class KeyRecord(BaseModel):
    """What the file says of one key. Times are UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=rf"^[0-9a-f]{{{_ID_CHARS}}}$")
    digest: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    name: str = Field(default="", max_length=128)
    tenant: str = Field(min_length=1, max_length=128)
    roles: tuple[Role, ...] = ("inference",)
    limits: KeyLimits = KeyLimits()
    created_at: datetime.datetime
    expires_at: datetime.datetime | None = None
    revoked_at: datetime.datetime | None = None

    def is_valid(self, now: datetime.datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def to_caller(self) -> Caller:
        return Caller(f"key:{self.id}", self.tenant, frozenset(self.roles), Limits(**self.limits.model_dump()))


class _KeyFileText(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[KeyRecord] = []


def read_keys(path: Path) -> list[KeyRecord]:
    """The file's records; a file that is not there has none. Raises KeyFileError."""
    try:
        return _KeyFileText.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}); give the edge's user access to it") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise KeyFileError(f"{path}: {where}: {first['msg']}; let `ossia keys` write it") from None


@contextmanager
def edit_keys(path: Path) -> Iterator[list[KeyRecord]]:
    """The file's records to change in place; written whole when the block ends well, readable by the owner only. Raises KeyFileError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_keys(path)
        yield keys
        unfinished = path.with_name(path.name + ".new")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(_KeyFileText(keys=keys).model_dump_json(indent=2, exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def make_key(tenant: str, **fields: object) -> tuple[str, KeyRecord]:
    """A new key's text, which nothing keeps, and its record."""
    key_id = secrets.token_hex(_ID_CHARS // 2)
    text = f"{_PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
    record = {"id": key_id, "digest": digest_of(text), "tenant": tenant, "created_at": utc_now(), **fields}
    return text, KeyRecord.model_validate(record)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


class KeyStore:
    """The keys that count now. The file is looked at again while keys are asked for, at most every CHECK_INTERVAL_S.

    A file that cannot be read is logged, and what it said before counts until it can.
    """

    def __init__(self, path: Path | None, single_key: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Raises KeyFileError where the file is wrong from the start."""
        self._path = path
        self._single_digest = digest_of(single_key) if single_key else _NOBODY
        self._single_caller = Caller("key:configured", "default", frozenset({INFERENCE}))
        self._clock = clock
        self._checked_at = clock()
        self._version = self._look()
        self._keys = {} if path is None else {key.id: key for key in read_keys(path)}

    def find(self, text: str) -> Caller | None:
        """The key's owner; None for a key that is unknown, revoked or expired."""
        self._refresh()
        digest = digest_of(text)
        record = self._keys.get(text[len(_PREFIX) :][:_ID_CHARS]) if text.startswith(_PREFIX) else None
        is_single = hmac.compare_digest(digest, self._single_digest)
        is_known = hmac.compare_digest(digest, record.digest if record else _NOBODY)
        if is_known and record is not None and record.is_valid(datetime.datetime.now(datetime.UTC)):
            return record.to_caller()
        return self._single_caller if is_single else None

    def _refresh(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = now
        if (version := self._look()) == self._version:
            return
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
            self._version = version
            log.info("api_keys_read", num_keys=len(self._keys))
        except KeyFileError as error:
            log.error("api_keys_not_read", reason=str(error))

    def _look(self) -> tuple[int, ...]:
        """What changes whenever the file does."""
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            found = None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found else ()
