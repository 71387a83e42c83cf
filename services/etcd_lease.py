"""One etcd lease of this process, and the keys that live as long as it does.

What should be there is written down here; `_reconcile` makes etcd agree, and is run again until it does. So a lease that expired while the
process was stopped, or that etcd forgot, is replaced and its keys are put again.
"""

import asyncio

from services import errors
from services.etcd_client import EtcdClient, backoff_s, delete, is_under, put
from services.telemetry import get_logger

log = get_logger(__name__)


class EtcdLease:
    """Keys to hold and keys to drop, under one lease of `ttl_s` seconds. `run` keeps it alive."""

    def __init__(self, client: EtcdClient, ttl_s: int) -> None:
        self._client = client
        self._ttl_s = ttl_s
        self._lock = asyncio.Lock()  # one at a time brings etcd into agreement
        self._id = 0  # 0: none yet, or lost
        self._wanted: dict[str, bytes] = {}  # keys that must lie under the lease, and their values
        self._placed: set[str] = set()  # those that do
        self._unwanted: set[str] = set()  # keys to delete, if they still lie under the lease
        self._is_revoked = False  # for good: nothing is held or dropped any more
        self._work = asyncio.Event()  # set: do not wait for the next beat

    async def run(self) -> None:
        """Keeps the lease and the keys until cancelled, through every failure of etcd."""
        num_failures = 0
        while True:
            try:
                await self._reconcile()
                num_failures = 0
            except errors.OssiaError as error:
                num_failures += 1
                if num_failures == 1:
                    log.warning("etcd_lease_not_kept", error=error.message)
            await self._pause(backoff_s(num_failures) if num_failures else self._ttl_s / 3)

    async def current(self) -> int:
        """The lease's id, granted now if there is none. Whether it still lives shows when it is used. Raises OssiaError where etcd is
        away.
        """
        async with self._lock:
            return await self._ensure()

    async def replace(self, lost: int) -> None:
        """Told that etcd does not know lease `lost`: the next one is granted, and the keys are put again, without waiting for a beat."""
        async with self._lock:
            if self._id == lost:
                self._forget()
        self._work.set()

    async def hold(self, key: str, value: bytes) -> None:
        """Puts the key and keeps it. Returns when it is there or, where etcd is away, after the first attempt."""
        self._wanted[key] = value
        self._placed.discard(key)
        self._unwanted.discard(key)
        await self._attempt()

    async def drop(self, key: str) -> None:
        """Deletes the key, unless another has put it since; where etcd is away, as soon as it is back."""
        self._wanted.pop(key, None)
        self._unwanted.add(key)
        await self._attempt()

    def keep(self, key: str) -> None:
        """Takes back a `drop` that may not have been carried out."""
        self._unwanted.discard(key)

    async def revoke(self) -> None:
        """Ends the lease and with it every key, at once where etcd answers, else when its time is over. Call it once, last."""
        async with self._lock:
            self._is_revoked = True
            if self._id:
                try:
                    await self._client.revoke_lease(self._id)
                except errors.OssiaError as error:
                    log.warning("etcd_lease_not_revoked", error=error.message)

    async def _attempt(self) -> None:
        try:
            await self._reconcile()
        except errors.OssiaError:
            self._work.set()  # `run` goes on with it, and tells

    async def _reconcile(self) -> None:
        async with self._lock:
            if self._is_revoked:
                return
            if self._id and not await self._client.keep_lease(self._id):
                log.warning("etcd_lease_lost", lease=self._id)
                self._forget()
            await self._place(await self._ensure())

    async def _place(self, lease: int) -> None:
        for key in tuple(self._unwanted):
            await self._client.txn([is_under(key.encode(), lease)], [delete(key.encode())])
            self._unwanted.discard(key)
            self._placed.discard(key)
        for key, value in tuple(self._wanted.items()):
            if key not in self._placed:
                await self._client.txn([], [put(key.encode(), value, lease)])
                if self._wanted.get(key) == value:  # else it was changed meanwhile, and has to be put again
                    self._placed.add(key)

    async def _ensure(self) -> int:
        if not self._id:
            self._id = await self._client.grant_lease(self._ttl_s)
            log.info("etcd_lease_granted", lease=self._id, ttl_s=self._ttl_s)
        return self._id

    def _forget(self) -> None:
        self._id = 0
        self._placed.clear()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._work.wait()
        except TimeoutError:
            pass
        self._work.clear()
