"""Discovery over etcd v3: keys under /ossia/<cluster>/ that live as long as this process's lease.

/ossia/<cluster>/<kind>/<key>       a member, put by `register`
/ossia/<cluster>/owners/<group>     the owner's id, put by `claim`; the revision of that put makes the epoch
/ossia/<cluster>/epochs/<group>     added to that revision; written only after etcd lost its data, so that epochs go on growing
/ossia/<cluster>/history            a random marker that tells this store from one that was emptied
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from protos.etcd.v3 import rpc_pb2 as pb
from services import errors
from services.etcd_client import EtcdClient, get, is_at, put
from services.etcd_lease import EtcdLease
from services.etcd_view import EtcdView
from services.telemetry import get_logger
from services.tls import Identity

log = get_logger(__name__)


class EtcdDiscovery:
    """The contract is `services.discovery.Discovery`. Made and used inside one running event loop; `lease_ttl_s` is at least 2, etcd's own
    minimum.
    """

    def __init__(self, endpoints: Sequence[str], cluster: str, lease_ttl_s: int, identity: Identity | None = None) -> None:
        self._root = f"/ossia/{cluster}"
        self._client = EtcdClient(endpoints, identity)
        self._lease = EtcdLease(self._client, lease_ttl_s)
        self._views: dict[str, EtcdView] = {}  # by kind, from the first use on
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by name: one per view and the lease's, until `aclose`

    @asynccontextmanager
    async def register(self, kind: str, key: str, value: bytes) -> AsyncIterator[None]:
        path = self._path(kind, key)
        self._run("lease", self._lease.run)
        try:
            await self._lease.hold(path, value)
            yield
        finally:
            await self._lease.drop(path)

    def watch(self, kind: str) -> AsyncIterator[Mapping[str, bytes]]:
        return self._view(kind).states()

    async def claim(self, group: str, owner: str, above: int = 0) -> int | None:
        self._run("lease", self._lease.run)
        self._lease.keep(self._path("owners", group))
        while True:
            lease = await self._lease.current()
            try:
                return await self._claim(group, owner.encode(), above, lease)
            except errors.NotFound:  # etcd does not know the lease any more
                await self._lease.replace(lease)

    async def release(self, group: str, owner: str) -> None:
        await self._lease.drop(self._path("owners", group))

    async def aclose(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._lease.revoke()
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()

    async def _claim(self, group: str, owner: bytes, above: int, lease: int) -> int | None:
        """Reads the owner and, where that is nobody, puts this one, if nothing changed in between. Raises NotFound for the lease."""
        view, key, base_key = self._view("owners"), self._path("owners", group).encode(), self._path("epochs", group).encode()
        async with view.write_lock:
            while True:
                found = await self._client.txn([], [get(key), get(base_key)])
                current, base = (next(iter(reply.response_range.kvs), pb.KeyValue()) for reply in found.responses)
                epoch_base = int(base.value or 0)
                if current.key and (current.lease != lease or current.value != owner):
                    return None
                if epoch_base + current.mod_revision > above and current.key:
                    view.record(group, owner, current.mod_revision)
                    return epoch_base + current.mod_revision
                writes = [put(key, owner, lease)]
                if epoch_base + found.header.revision < above:
                    epoch_base = above
                    writes.append(put(base_key, str(above).encode()))
                done = await self._client.txn([is_at(key, current.mod_revision), is_at(base_key, base.mod_revision)], writes)
                if done.succeeded:
                    view.record(group, owner, done.header.revision)
                    return epoch_base + done.header.revision

    def _path(self, kind: str, key: str) -> str:
        return f"{self._root}/{kind}/{key}"

    def _view(self, kind: str) -> EtcdView:
        if kind not in self._views:
            self._views[kind] = EtcdView(self._client, self._path(kind, ""), f"{self._root}/history")
            self._run(kind, self._views[kind].follow)
        return self._views[kind]

    def _run(self, name: str, loop: Callable[[], Coroutine[None, None, None]]) -> None:
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(loop(), name=f"etcd-{name}")
            self._tasks[name].add_done_callback(_report)


def _report(task: asyncio.Task[None]) -> None:
    """These loops end by being cancelled; anything else is a defect that must be seen."""
    if not task.cancelled() and (error := task.exception()):
        log.error("etcd_loop_failed", task=task.get_name(), exc_info=error)
