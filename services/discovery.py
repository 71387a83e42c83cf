"""Who is alive, and who owns which worker group: one small interface, with a static form here and the etcd form in `services.etcd`.

Knows nothing of what the members are: keys and opaque values only.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Protocol, Self

from services.etcd import EtcdDiscovery
from services.tls import Identity

# Prolonged every third of it, so that a pause of 6 s, which connections survive (services.grpc_channel), costs no lease either.
LEASE_TTL_S = 10
Members = Mapping[str, bytes]


class Discovery(Protocol):
    """Membership and ownership of one cluster, for one process. Closing it withdraws all that the process registered and claimed.

    Kinds: "groups", "schedulers" and "edges" hold members by their id; "owners" holds the owner's id by group.

    Ownership, and how an owner never acts for one that took over:

    - `claim` gives the epoch. Epochs of a group grow with every new owner, and the worker refuses plans of an older one: that is the
      fence, and it holds even where a former owner has not heard yet.
    - An owner watches "owners". It never shows a state from before a claim that has returned. So a group that shows another id, or none,
      under an epoch held here is lost: stop driving it. It is not claimed again by itself; a new claim gives a new epoch.
    - While etcd is away nothing changes: owners go on, claims raise, and watches say nothing. An owner that alone is cut off hears of its
      successor from the worker, as a refusal with STALE_EPOCH.
    """

    def register(self, kind: str, key: str, value: bytes) -> AbstractAsyncContextManager[None]:
        """The member is present while inside. It is put again after a lost lease or lost data; where etcd is away, as soon as it is
        back.
        """

    def watch(self, kind: str) -> AsyncIterator[Members]:
        """The whole membership of a kind as soon as it is known, then again after changes; a slow reader sees the latest. Ends only with
        `aclose`.
        """

    async def claim(self, group: str, owner: str, above: int = 0) -> int | None:
        """The epoch under which `owner` owns the group now, greater than `above`; None while another holds it, an earlier life of `owner`
        included.

        `above` is the highest epoch that the worker has seen: it matters where etcd lost its data. Claiming what one holds gives the same
        epoch, if that is greater. 0 means that nobody fences here (static form): take the worker's epoch + 1. Raises OssiaError (mostly
        Unavailable) where etcd is away, which says nothing about who owns the group.
        """

    async def release(self, group: str, owner: str) -> None:
        """Gives the group up; where etcd is away, as soon as it is back. "owners" may show it a moment longer."""

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


def open_discovery(
    etcd_endpoints: Sequence[str],
    cluster: str,
    static: Mapping[str, Members],
    lease_ttl_s: int = LEASE_TTL_S,
    identity: Identity | None = None,
) -> Discovery:
    """The etcd form where there are endpoints (`host:port`), else the static form with these members by kind. Call it in a running event
    loop. `identity` is who we are to etcd; None: plaintext.
    """
    if etcd_endpoints:
        return EtcdDiscovery(etcd_endpoints, cluster, lease_ttl_s, identity)
    return StaticDiscovery(static)


class StaticDiscovery:
    """Addresses that were given at the start and stay. One scheduler owns everything, by agreement and not by a lease."""

    def __init__(self, members: Mapping[str, Members]) -> None:
        self._members = {kind: dict(of_kind) for kind, of_kind in members.items()}
        self._closed = asyncio.Event()

    @asynccontextmanager
    async def register(self, kind: str, key: str, value: bytes) -> AsyncIterator[None]:
        """Does nothing: whoever looks for this member was told its address."""
        yield

    async def watch(self, kind: str) -> AsyncIterator[Members]:
        yield dict(self._members.get(kind, {}))
        await self._closed.wait()

    async def claim(self, group: str, owner: str, above: int = 0) -> int | None:
        """0: there is no authority here that fences."""
        return 0

    async def release(self, group: str, owner: str) -> None:
        """Does nothing: there is nobody to give it to."""

    async def aclose(self) -> None:
        self._closed.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()
