"""Certificates: who a process is, whom it trusts, and which roles may call which service.

A certificate names its role as a DNS name, `<role>.ossia`. A caller checks that the server it reached has the role it was looking for, and
a server that its caller has a role it lets in. Files are read again when they change: handshakes from then on use the new ones, and streams
that are open go on.
"""

from __future__ import annotations  # gRPC's generics exist in its type stubs only

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import grpc
from cryptography.x509 import load_pem_x509_certificate

from services.config import ConfigError, ProcessConfig
from services.errors import PermissionDenied
from services.grpc_handlers import rewrap
from services.telemetry import get_logger

ROLE_SUFFIX = ".ossia"
SAN_KEY = "x509_subject_alternative_name"
log = get_logger(__name__)
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Stamp = tuple[tuple[int, int, int], ...]  # inode, size and time of change of each file


class BadCertificate(Exception):
    """Files that make no identity; the message is one sentence that names the file."""


@dataclass(frozen=True)
class Pem:
    """What the files held when they were last read whole."""

    certificate: bytes
    key: bytes
    authority: bytes | None


class Identity:
    """A certificate with its key and, for mutual TLS, the authority that signs its peers. `pem` is what holds now; any thread may ask."""

    def __init__(self, certificate: Path, key: Path, authority: Path | None = None) -> None:
        """Raises BadCertificate."""
        self.certificate, self.key, self.authority = certificate, key, authority
        self._lock = Lock()
        self._stamp = self._look()
        self._pem = self._read()

    def __repr__(self) -> str:
        return f"Identity({self.certificate})"

    @property
    def pem(self) -> Pem:
        """As the files are now; where they are not whole (a rotation half done), as they were last."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    pem = self._read()
                    if stamp == self._look():
                        self._stamp, self._pem = stamp, pem
                        log.info("certificate_read_again", certificate=str(self.certificate))
            except BadCertificate as error:
                log.warning("certificate_not_read", reason=str(error))
            return self._pem

    def expiry_s(self) -> float:
        """When the certificate ends, in seconds since the epoch."""
        return load_pem_x509_certificate(self.pem.certificate).not_valid_after_utc.timestamp()

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a listening port. Callers must show a certificate where there is an authority."""
        used = self.pem

        def renew() -> grpc.ServerCertificateConfiguration | None:
            """Asked at each handshake; None: as before."""
            nonlocal used
            if (now := self.pem) is used:
                return None
            used = now
            return _server_configuration(now)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(used),
            renew,  # type: ignore[arg-type]  # None is allowed: nothing new
            self.authority is not None,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For one channel: it keeps what it was made with, so make a new one to connect with new files."""
        pem = self.pem
        return grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)

    def server_context(self) -> ssl.SSLContext:
        """For a server of the standard library's TLS. Each handshake uses the files as they are then."""
        used, context = self.pem, self._make_context()

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            nonlocal used, context
            if (now := self.pem) is not used:
                used, context = now, self._make_context()
            connection.context = context

        front = self._make_context()
        front.sni_callback = renew  # asked whether or not the client names a server
        return front

    def _make_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def _look(self) -> Stamp:
        return tuple((facts.st_ino, facts.st_size, facts.st_mtime_ns) for facts in map(_stat, self._paths))

    @property
    def _paths(self) -> tuple[Path, ...]:
        return (self.certificate, self.key, *([self.authority] if self.authority else []))

    def _read(self) -> Pem:
        authority = _read_authority(self.authority) if self.authority else None
        try:
            self._make_context()  # which reads the pair, and says where it is none
            return Pem(self.certificate.read_bytes(), self.key.read_bytes(), authority)
        except (ssl.SSLError, OSError) as error:
            raise BadCertificate(f"{self.certificate} and {self.key} are no certificate with its key ({_describe(error)})") from None


@dataclass(frozen=True)
class Identities:
    """Who a process is to the others of its cluster, and to etcd; None: plaintext."""

    to_peers: Identity | None
    to_etcd: Identity | None


def load_identities(config: ProcessConfig) -> Identities:
    """Raises ConfigError."""
    return Identities(
        read_identity("--tls-cert, --tls-key, --tls-ca", config.tls_cert, config.tls_key, config.tls_ca),
        read_identity("--etcd-tls-cert, --etcd-tls-key, --etcd-tls-ca", config.etcd_tls_cert, config.etcd_tls_key, config.etcd_tls_ca),
    )


def read_identity(flags: str, certificate: Path | None, key: Path | None, authority: Path | None = None) -> Identity | None:
    """None where no files are given. Raises ConfigError with one sentence that begins with `flags`."""
    if certificate is None or key is None:
        return None
    try:
        return Identity(certificate, key, authority)
    except BadCertificate as error:
        raise ConfigError(f"{flags}: {error}; give PEM files") from None


def name_of(role: str) -> str:
    """The DNS name by which a certificate claims a role."""
    return role + ROLE_SUFFIX


class RoleInterceptor(grpc.aio.ServerInterceptor):
    """Lets a caller in whose certificate names one of `roles`; `services` are the ones that are guarded, by their full names."""

    def __init__(self, services: frozenset[str], roles: frozenset[str]) -> None:
        self._services = services
        self._roles = roles

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Request, Reply] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Request, Reply] | None:
        handler = await continuation(handler_call_details)
        service = str(handler_call_details.method).split("/")[1]
        if handler is None or service not in self._services:
            return handler
        return rewrap(handler, self._guard_unary, self._guard_stream)

    def _guard_unary(self, handle: Any) -> Any:
        async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> Reply:
            self._check(context)
            return await handle(request, context)  # type: ignore[no-any-return]

        return guarded

    def _guard_stream(self, handle: Any) -> Any:
        async def guarded(request: Request, context: grpc.aio.ServicerContext[Request, Reply]) -> AsyncIterator[Reply]:
            self._check(context)
            async for reply in handle(request, context):
                yield reply

        return guarded

    def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not self._roles & (found := peer_roles(context)):
            held, wanted = ", ".join(sorted(found)) or "no role", " or ".join(sorted(self._roles))
            raise PermissionDenied(f"the caller's certificate names {held}, and this service is called by {wanted}")


def peer_roles(context: grpc.aio.ServicerContext[Any, Any]) -> frozenset[str]:
    """The roles that the caller's certificate names; it was checked against the authority in the handshake."""
    names = [name.decode(errors="replace") for name in context.auth_context().get(SAN_KEY, ())]
    return frozenset(name.removesuffix(ROLE_SUFFIX) for name in names if name.endswith(ROLE_SUFFIX))


def _server_configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.authority)


def _read_authority(path: Path) -> bytes:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        return path.read_bytes()
    except (ssl.SSLError, OSError) as error:
        raise BadCertificate(f"{path} holds no certificate of an authority ({_describe(error)})") from None


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except OSError as error:
        raise BadCertificate(f"{path} cannot be read ({error.strerror})") from None


def _describe(error: OSError) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else None) or error.strerror or "not PEM"
