"""Bearer tokens of an identity provider: signed, current, meant for us, with the tenant and the roles in their claims.

The algorithms are pinned, asymmetric ones only, and the keys come from a file or over https, never from the token.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt

from edge.access.caller import ROLES, Caller
from services.errors import Unauthenticated, Unavailable
from services.telemetry import get_logger

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
REFRESH_S = 300.0  # how long keys are used without asking again
RETRY_S = 10.0  # least time between two fetches: tokens with made-up key ids must not become traffic
FETCH_TIMEOUT_S = 5.0
LEEWAY_S = 30  # by how much clocks may differ
MAX_JWKS_BYTES = 1024 * 1024
log = get_logger(__name__)


@dataclass(frozen=True)
class JwtSettings:
    """`jwks` is a path or an https URL."""

    jwks: str
    issuer: str
    audience: str
    algorithms: tuple[str, ...]
    tenant_claim: str = "tenant"
    roles_claim: str = "roles"


class JwtVerifier:
    """Keeps the provider's keys, and keeps using them while the provider cannot be reached."""

    def __init__(
        self, settings: JwtSettings, fetch: Callable[[], Awaitable[bytes]] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._fetch = fetch or (lambda: fetch_jwks(settings.jwks))
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}  # by key id
        self._fetched_at: float | None = None
        self._lock = asyncio.Lock()

    async def verify(self, token: str) -> Caller:
        """Raises Unauthenticated, or Unavailable while no key could be had."""
        try:
            header = jwt.get_unverified_header(token)
            key = await self._find_key(str(header.get("kid", "")))
            claims = jwt.decode(
                token,
                key,
                algorithms=self._settings.algorithms,
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the token is not accepted ({type(error).__name__}); get a new one") from None
        return self._read_caller(claims)

    def _read_caller(self, claims: dict[str, Any]) -> Caller:
        tenant, roles = claims.get(self._settings.tenant_claim), claims.get(self._settings.roles_claim, [])
        if not isinstance(tenant, str) or not 0 < len(tenant) <= 128:
            raise Unauthenticated(f"the token names no tenant: its claim {self._settings.tenant_claim!r} must be a text")
        held = roles.split() if isinstance(roles, str) else roles if isinstance(roles, list) else []
        return Caller(f"jwt:{str(claims.get('sub', ''))[:128]}", tenant, frozenset(role for role in held if role in ROLES))

    async def _find_key(self, key_id: str) -> jwt.PyJWK:
        async with self._lock:
            age_s = float("inf") if self._fetched_at is None else self._clock() - self._fetched_at
            if age_s >= REFRESH_S or (key_id not in self._keys and age_s >= RETRY_S):
                await self._refresh()
        if not self._keys:
            raise Unavailable("the keys that tokens are checked with cannot be read at present; try again", retry_after_s=RETRY_S)
        if key_id not in self._keys:
            raise jwt.InvalidKeyError
        return self._keys[key_id]

    async def _refresh(self) -> None:
        self._fetched_at = self._clock()
        try:
            found = jwt.PyJWKSet.from_json((await self._fetch()).decode())
        except (httpx.HTTPError, OSError, ValueError, jwt.PyJWTError) as error:
            log.error("jwks_not_read", reason=f"{type(error).__name__}: {error}")
            return
        self._keys = {key.key_id or "": key for key in found.keys if key.key_type != "oct"}
        log.info("jwks_read", num_keys=len(self._keys))


async def fetch_jwks(place: str) -> bytes:
    """The key set's bytes. Raises OSError, ValueError or httpx.HTTPError."""
    if not place.startswith("https://"):
        return await asyncio.to_thread(Path(place).read_bytes)
    async with httpx.AsyncClient(timeout=FETCH_TIMEOUT_S) as client, client.stream("GET", place) as answer:
        answer.raise_for_status()
        content = b""
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > MAX_JWKS_BYTES:
                raise ValueError(f"more than {MAX_JWKS_BYTES} bytes")
        return content
