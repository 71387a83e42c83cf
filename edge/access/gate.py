"""The one way in for both doors: address, identity, role, rate; and the audit line when a call is over. Whatever is not public is denied.

Knows nothing of HTTP and gRPC: a door brings what the caller showed, and refuses as its protocol does.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from edge.access.addresses import AddressRules
from edge.access.audit import AuditLog, open_audit_log
from edge.access.caller import ADMIN, INFERENCE, METRICS, Admission, Caller, Limits
from edge.access.config import AccessConfig
from edge.access.jwt import JwtSettings, JwtVerifier
from edge.access.keys import KeyFileError, KeyStore
from edge.access.rate_limit import REDIS_TIMEOUT_S, LimitMetrics, RateLimiter, RedisBuckets
from services.errors import OssiaError, PermissionDenied, Unauthenticated, row
from services.process import StartError

# Probes: they say nothing about anybody.
PUBLIC_PATHS = frozenset({"/livez", "/readyz"})
PUBLIC_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"})
_ROLES = {"/v1/metrics": METRICS, "/metrics": METRICS}
_MAX_CREDENTIAL_CHARS = 16_384


class Gate:
    """`keys` and `tokens` both None: nobody is asked who they are, and limits count for each address."""

    def __init__(
        self,
        addresses: AddressRules,
        keys: KeyStore | None,
        tokens: JwtVerifier | None,
        limiter: RateLimiter,
        metrics: LimitMetrics,
        audit: AuditLog | None = None,
    ) -> None:
        self.addresses = addresses
        self.limiter = limiter
        self._keys = keys
        self._tokens = tokens
        self._metrics = metrics
        self._audit = audit

    async def admit(self, address: str, credential: str, path: str) -> Admission:
        """Who calls and may; `charge` it next. Raises PermissionDenied, Unauthenticated or Unavailable."""
        try:
            if not self.addresses.admits(address):
                raise PermissionDenied("calls from this address are not allowed")
            caller = await self._identify(credential)
            if not caller.may(role := _ROLES.get(path, INFERENCE)):
                raise PermissionDenied(f"this needs the role {role!r}, which the caller does not have")
        except OssiaError as refusal:
            self._metrics.denied.labels(row(refusal).code).inc()
            raise
        return Admission(caller, address)

    async def charge(self, admission: Admission) -> None:
        """One call more. Raises RateLimited."""
        admission.note(await self.limiter.take(admission.owner, admission.caller.limits, requests=1))

    def note(
        self, door: str, path: str, status: str, duration_s: float, address: str, admission: Admission | None, request_id: str
    ) -> None:
        """A call has ended, or was refused: `admission` None."""
        if self._audit is None:
            return
        caller = admission.caller if admission else None
        self._audit.note(
            door=door,
            path=path,
            status=status,
            subject=caller.subject if caller else None,
            tenant=caller.tenant if caller else None,
            address=address,
            request_id=request_id,
            duration_s=round(duration_s, 4),
            prompt_tokens=admission.prompt_tokens if admission else 0,
            completion_tokens=admission.completion_tokens if admission else 0,
        )

    async def _identify(self, credential: str) -> Caller:
        if self._keys is None and self._tokens is None:
            return Caller("anonymous", "", frozenset({INFERENCE, METRICS}))
        if not credential:
            raise Unauthenticated("no API key was sent; send it as the header authorization: Bearer KEY")
        if len(credential) > _MAX_CREDENTIAL_CHARS:
            raise Unauthenticated(f"the API key is longer than {_MAX_CREDENTIAL_CHARS} characters")
        if self._tokens and credential.count(".") == 2 and credential.startswith("eyJ"):
            return await self._tokens.verify(credential)
        if self._keys and (caller := self._keys.find(credential)):
            return caller
        raise Unauthenticated("the API key is unknown, revoked or expired; get a new one")


def read_credential(authorization: str, api_key: str) -> str:
    """From `authorization: Bearer KEY` or `x-api-key: KEY`."""
    scheme, _, value = authorization.partition(" ")
    return value.strip() if scheme.lower() == "bearer" else api_key.strip()


def tenant_of(caller: Caller, named: str) -> str:
    """Whom a call counts for. Only an admin may name another tenant than its own, unless nobody is asked who they are."""
    may_name = not caller.tenant or caller.may(ADMIN)
    return named if named and may_name else caller.tenant


@asynccontextmanager
async def open_gate(
    config: AccessConfig, redis_url: str, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Gate | None]:
    """The gate that is configured, with limits shared at `redis_url` (empty: not shared); None where there is none. Raises StartError.

    `clock` is what limits that are not shared go by, in seconds.
    """
    if not config.limits_access:
        yield None
        return
    metrics = LimitMetrics(registry)
    async with AsyncExitStack() as stack:
        shared = None
        if redis_url:
            client = Redis.from_url(redis_url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S)
            stack.push_async_callback(client.aclose)
            shared = RedisBuckets(client, f"ossia:{config.cluster}")
        limits = Limits(config.requests_per_second, config.requests_per_minute, config.tokens_per_minute, config.tokens_per_day)
        try:
            audit = stack.enter_context(open_audit_log(config.audit_log)) if config.audit_log else None
            has_keys = bool(config.api_keys_file or config.open_api_key)
            keys = KeyStore(config.api_keys_file, config.open_api_key) if has_keys else None
        except KeyFileError as error:
            raise StartError(f"--api-keys-file: {error}") from None
        except OSError as error:
            raise StartError(f"--audit-log: {config.audit_log} cannot be written ({error.strerror}); choose another") from None
        addresses = AddressRules(config.allow_addresses, config.deny_addresses, config.trusted_proxies)
        yield Gate(addresses, keys, _open_tokens(config), RateLimiter(metrics, limits, shared, clock), metrics, audit)


def _open_tokens(config: AccessConfig) -> JwtVerifier | None:
    if not config.jwt_jwks:
        return None
    return JwtVerifier(
        JwtSettings(
            config.jwt_jwks,
            config.jwt_issuer,
            config.jwt_audience,
            config.jwt_algorithms,
            config.jwt_tenant_claim,
            config.jwt_roles_claim,
        )
    )
