"""The calls of etcd's v3 API that discovery makes, over several endpoints: the next one is asked where one does not answer.

Knows nothing of membership: keys, revisions and leases only. Every failure is an `OssiaError`: Unavailable where no endpoint answered in
time, and what etcd said otherwise (NotFound for a lease that is gone).
"""

import asyncio
import random
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from protos.etcd.v3 import rpc_pb2 as pb
from protos.etcd.v3 import rpc_pb2_grpc as rpc
from services import errors
from services.grpc_channel import RECONNECT_OPTIONS, SIZE_OPTIONS, secure_channel
from services.tls import Identity, Pem

RPC_TIMEOUT_S = 2.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 2.0
# etcd closes connections that ping more often than every 5 s, or without an open call.
PING_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# A member that lost the others ends the stream instead of going silent.
REQUIRE_LEADER = (("hasleader", "true"),)
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
Reply = TypeVar("Reply")


def backoff_s(num_failures: int) -> float:
    """Seconds to wait after the n-th failure in a row: doubling, capped, and jittered so that a fleet does not come back as one."""
    return float(min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(num_failures, 10)) * random.uniform(0.5, 1.0))


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`, whose last byte is below 0xff."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def get(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def put(key: bytes, value: bytes, lease: int = 0) -> pb.RequestOp:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))


def delete(key: bytes) -> pb.RequestOp:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def is_at(key: bytes, mod_revision: int) -> pb.Compare:
    """Holds while the key has not changed since that revision; 0: while there is no such key."""
    return pb.Compare(key=key, target=pb.Compare.MOD, mod_revision=mod_revision)


def is_under(key: bytes, lease: int) -> pb.Compare:
    """Holds while the key lives by this lease."""
    return pb.Compare(key=key, target=pb.Compare.LEASE, lease=lease)


class _Endpoint:
    """One etcd member's channel and stubs, renewed with the certificate. A user's token belongs here."""

    def __init__(self, address: str, identity: Identity | None) -> None:
        self.address = address
        self._identity = identity
        self._pem: Pem | None = None  # what the channel was made with
        self._closing: set[asyncio.Task[None]] = set()
        self._open()

    def _open(self) -> None:
        options = (*PING_OPTIONS, *SIZE_OPTIONS, *RECONNECT_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        if self._identity is None:
            self.channel = grpc.aio.insecure_channel(self.address, options=options)
        else:
            self._pem = self._identity.pem
            self.channel = secure_channel(self.address, self._identity, options)
        self.kv, self.lease, self.watch = rpc.KVStub(self.channel), rpc.LeaseStub(self.channel), rpc.WatchStub(self.channel)

    def renew(self) -> None:
        """The member did not answer: where the certificate has changed since, the next call is made with the new one."""
        if self._identity is not None and self._identity.pem is not self._pem:
            closing = asyncio.create_task(self.channel.close(RPC_TIMEOUT_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._open()

    async def aclose(self) -> None:
        await self.channel.close()
        await asyncio.gather(*self._closing)


class EtcdClient:
    """Made and used inside one running event loop. `endpoints` are `host:port`, all of one etcd cluster."""

    def __init__(self, endpoints: Sequence[str], identity: Identity | None = None) -> None:
        assert endpoints, "an etcd client needs an endpoint"
        self._endpoints = [_Endpoint(address, identity) for address in endpoints]
        self._current = random.choice(self._endpoints)  # whom to ask, so that a fleet spreads; moved on by _leave alone

    async def range(self, prefix: bytes) -> pb.RangeResponse:
        """Every key that begins with `prefix`, as of the revision in the header."""
        request = pb.RangeRequest(key=prefix, range_end=prefix_end(prefix))
        return await self._call(lambda endpoint: endpoint.kv.Range(request, timeout=RPC_TIMEOUT_S))

    async def txn(
        self, compare: Sequence[pb.Compare], success: Sequence[pb.RequestOp], failure: Sequence[pb.RequestOp] = ()
    ) -> pb.TxnResponse:
        """It may be applied twice where a reply was lost: the caller makes it safe to repeat."""
        request = pb.TxnRequest(compare=compare, success=success, failure=failure)
        return await self._call(lambda endpoint: endpoint.kv.Txn(request, timeout=RPC_TIMEOUT_S))

    async def history(self, key: bytes) -> tuple[bytes, int]:
        """What tells this store from one that was emptied in between, drawn by the first who asks, and the store's revision."""
        drawn = secrets.token_hex(8).encode()
        reply = await self.txn([is_at(key, 0)], [put(key, drawn)], [get(key)])
        found = drawn if reply.succeeded else reply.responses[0].response_range.kvs[0].value
        return found, reply.header.revision

    async def grant_lease(self, ttl_s: int) -> int:
        """The id of a new lease. etcd raises a time that is too short for it to a few seconds."""
        request = pb.LeaseGrantRequest(TTL=ttl_s)
        return (await self._call(lambda endpoint: endpoint.lease.LeaseGrant(request, timeout=RPC_TIMEOUT_S))).ID

    async def keep_lease(self, lease: int) -> bool:
        """Prolongs the lease by its whole time. False: it is gone."""

        async def beat(endpoint: _Endpoint) -> bool:
            call = endpoint.lease.LeaseKeepAlive(timeout=RPC_TIMEOUT_S)
            await call.write(pb.LeaseKeepAliveRequest(ID=lease))
            await call.done_writing()
            reply = await call.read()
            if not isinstance(reply, pb.LeaseKeepAliveResponse):
                raise errors.Unavailable(f"etcd at {endpoint.address} ended the call that prolongs a lease")
            return reply.TTL > 0

        return await self._call(beat)

    async def revoke_lease(self, lease: int) -> None:
        """Ends the lease and deletes its keys."""
        request = pb.LeaseRevokeRequest(ID=lease)
        await self._call(lambda endpoint: endpoint.lease.LeaseRevoke(request, timeout=RPC_TIMEOUT_S))

    async def watch(self, prefix: bytes, start_revision: int) -> AsyncGenerator[pb.WatchResponse]:
        """Changes of the keys that begin with `prefix`, from `start_revision` on. The first response, `created`, says that the watch
        stands.

        One with `canceled` is the last; with `compact_revision`, the start lies before what etcd still has. Close it with `aclosing`.
        """
        endpoint = self._current
        create = pb.WatchCreateRequest(key=prefix, range_end=prefix_end(prefix), start_revision=start_revision)
        call = endpoint.watch.Watch(metadata=REQUIRE_LEADER)
        try:
            async with asyncio.timeout(RPC_TIMEOUT_S):
                await call.write(pb.WatchRequest(create_request=create))
                response = await call.read()
            while isinstance(response, pb.WatchResponse):
                yield response
                response = await call.read()
            raise errors.Unavailable(f"etcd at {endpoint.address} ended the watch")
        except TimeoutError as error:
            self._leave(endpoint)
            raise errors.Unavailable(f"etcd at {endpoint.address} did not begin the watch in {RPC_TIMEOUT_S:g} s") from error
        except grpc.aio.AioRpcError as error:
            self._leave(endpoint)
            raise errors.from_rpc_error(error) from error
        finally:
            call.cancel()

    async def aclose(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.aclose()

    async def _call(self, attempt: Callable[[_Endpoint], Awaitable[Reply]]) -> Reply:
        for _ in self._endpoints:
            endpoint = self._current
            try:
                return await attempt(endpoint)
            except grpc.aio.AioRpcError as error:
                if error.code() not in AWAY:
                    raise errors.from_rpc_error(error) from error
                self._leave(endpoint)
        addresses = ", ".join(endpoint.address for endpoint in self._endpoints)
        raise errors.Unavailable(f"no etcd endpoint answered in {RPC_TIMEOUT_S:g} s ({addresses})")

    def _leave(self, endpoint: _Endpoint) -> None:
        """Asks the next endpoint from now on, unless another call has moved on already."""
        endpoint.renew()
        if endpoint is self._current:
            self._current = self._endpoints[(self._endpoints.index(endpoint) + 1) % len(self._endpoints)]
