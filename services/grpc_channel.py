"""Channels to other processes: keepalive that notices a stopped peer in seconds, sizes, and nothing else.

`keepalive_timeout_ms` alone lets a stopped peer go unnoticed for over a minute: the HTTP/2 ping has a time-out of its own, and both must
be set.
"""

import grpc

from services.tls import Identity, name_of

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
PING_INTERVAL_MS = 3_000
PING_TIMEOUT_MS = 3_000
CONNECT_TIMEOUT_MS = 10_000

KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)
SIZE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
RECONNECT_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),  # in spite of its name: how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    *KEEPALIVE_OPTIONS,
    *SIZE_OPTIONS,
    *RECONNECT_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)
HTTPS = "https://"


def open_channel(
    address: str, interceptors: tuple[grpc.aio.ClientInterceptor, ...] = (), identity: Identity | None = None, role: str = ""
) -> grpc.aio.Channel:
    """A channel to `host:port`. A peer that stops answering fails its calls with UNAVAILABLE within PING_INTERVAL_MS + PING_TIMEOUT_MS.

    With an identity it shows its certificate and takes no peer whose certificate does not name `role`; without one it is plaintext.

    Every channel has connections of its own, so that a reconnect never inherits another channel's back-off.
    """
    if identity is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)
    return secure_channel(address, identity, (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name_of(role))), interceptors)


def open_door(address: str) -> grpc.aio.Channel:
    """A channel to an edge's public door: `host:port` in plaintext, `https://host:port` by TLS.

    The authorities that are trusted are gRPC's own; the environment's GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names others.
    """
    if address.startswith(HTTPS):
        return grpc.aio.secure_channel(address.removeprefix(HTTPS), grpc.ssl_channel_credentials(), options=CHANNEL_OPTIONS)
    return open_channel(address)


def secure_channel(
    address: str,
    identity: Identity,
    options: tuple[tuple[str, int | str], ...],
    interceptors: tuple[grpc.aio.ClientInterceptor, ...] = (),
) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, identity.channel_credentials(), options=options, interceptors=interceptors)
