"""Where weights are downloaded from: a folder behind http(s), or an S3-style bucket. Makes requests, and knows nothing of files on disk."""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

from services.process import StartError

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
Headers = dict[str, str]


class Store(Protocol):
    """What one GET of a file needs."""

    def request(self, name: str, headers: Mapping[str, str]) -> tuple[str, Headers]:
        """The URL and all headers of a GET."""
        ...


@dataclass(frozen=True)
class WebFolder:
    """Files under one URL. `authorization` is the value of that header, "" for none."""

    url: str
    authorization: str = field(default="", repr=False)

    def request(self, name: str, headers: Mapping[str, str]) -> tuple[str, Headers]:
        access = {"authorization": self.authorization} if self.authorization else {}
        return f"{self.url.rstrip('/')}/{quote(name)}", {**headers, **access}


@dataclass(frozen=True)
class Bucket:
    """Objects of an S3-style store, addressed by path, under a prefix. Without an access key requests are not signed."""

    endpoint: str
    bucket: str
    prefix: str
    region: str
    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC), repr=False)

    def request(self, name: str, headers: Mapping[str, str]) -> tuple[str, Headers]:
        path = "/" + "/".join(quote(part, safe="") for part in f"{self.bucket}/{self.prefix}/{name}".split("/") if part)
        url = self.endpoint.rstrip("/") + path
        if not self.access_key:
            return url, dict(headers)
        token = {"x-amz-security-token": self.session_token} if self.session_token else {}
        return url, sign(url, {**headers, **token}, self.region, self.access_key, self.secret_key, self.clock())


def sign(url: str, headers: Mapping[str, str], region: str, access_key: str, secret_key: str, now: datetime) -> Headers:
    """The headers of a GET without a body, with AWS's Signature Version 4 over all of them.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    parts = urlsplit(url)
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    signed = {**headers, "host": parts.netloc, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": stamp}
    names = ";".join(sorted(signed))
    canonical = "\n".join(["GET", parts.path, "", *(f"{name}:{signed[name].strip()}" for name in sorted(signed)), "", names, EMPTY_SHA256])
    scope = f"{day}/{region}/s3/aws4_request"
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"AWS4-HMAC-SHA256 Credential={access_key}/{scope},SignedHeaders={names},Signature={signature}"
    return {**signed, "authorization": credential}


def open_store(url: str, s3_endpoint: str, s3_region: str, credentials: Path | None) -> Store:
    """The store that a URL names. `credentials` is a folder with files named authorization, or access-key and secret-key (and, where
    there is one, session-token). Raises StartError.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not parts.netloc:
            raise StartError(f"{url}: name the bucket, as in s3://bucket/prefix")
        endpoint = s3_endpoint or f"https://s3.{s3_region}.amazonaws.com"
        access_key, secret_key = _read(credentials, "access-key"), _read(credentials, "secret-key")
        if bool(access_key) != bool(secret_key):
            raise StartError(f"--credentials: {credentials} needs both access-key and secret-key")
        return Bucket(endpoint, parts.netloc, parts.path, s3_region, access_key, secret_key, _read(credentials, "session-token"))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise StartError(f"{url}: give a folder as https://host/path, http://host/path or s3://bucket/prefix")
    authorization = _read(credentials, "authorization")
    if authorization and parts.scheme == "http":
        raise StartError(f"{url}: an authorization would be readable on its way; take https")
    return WebFolder(url, authorization)


def _read(folder: Path | None, name: str) -> str:
    if folder is None or not (folder / name).exists():
        return ""
    return (folder / name).read_text().strip()
