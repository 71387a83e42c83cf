"""What lies under one etcd prefix, now: a snapshot that a watch keeps current and that outlives etcd.

The watch resumes after the last revision seen. A fresh snapshot is taken where that cannot be: the revision was compacted, or the store is
another than before (its history marker differs, or its revision went back).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from protos.etcd.v3 import rpc_pb2 as pb
from services.errors import OssiaError, Unavailable
from services.etcd_client import EtcdClient, backoff_s
from services.telemetry import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class _Entry:
    value: bytes
    revision: int  # of the put


class EtcdView:
    """The keys under `prefix`, without it. `follow` keeps them current; `states` tells of every change."""

    def __init__(self, client: EtcdClient, prefix: str, history_key: str) -> None:
        self._client = client
        self._prefix, self._history_key = prefix.encode(), history_key.encode()
        self.write_lock = asyncio.Lock()  # held by a snapshot, and by whoever writes under the prefix until it has called `record`
        self._entries: dict[str, _Entry] = {}
        self._history = b""  # the store that _entries came from; empty: a snapshot is due
        self._revision = 0  # everything up to here is in _entries
        self._version = 0  # counts what watchers can see; 0: no snapshot yet
        self._changed = asyncio.Event()  # of this version; replaced by the next
        self._num_failures = 0  # in a row, without a watch that stood
        self._is_closed = False

    async def follow(self) -> None:
        """Runs until cancelled, through every failure of etcd."""
        try:
            while True:
                try:
                    await self._follow_once()
                except OssiaError as error:
                    self._num_failures += 1
                    if self._num_failures == 1:
                        log.warning("etcd_watch_lost", prefix=self._prefix.decode(), error=error.message)
                    await asyncio.sleep(backoff_s(self._num_failures))
        finally:
            self._is_closed = True
            self._publish()

    async def states(self) -> AsyncIterator[Mapping[str, bytes]]:
        """All keys and their values as soon as they are known, then again whenever they changed. Ends when `follow` ends."""
        seen = 0
        while True:
            while self._version == seen:
                await self._changed.wait()
            if self._is_closed:
                return
            seen = self._version
            yield {key: entry.value for key, entry in self._entries.items()}

    def record(self, key: str, value: bytes, revision: int) -> None:
        """Shows what this process has put, without waiting for the watch to tell of it; what the watch still says of older times is passed
        over.
        """
        if self._put(key, value, revision) and self._version > 0:
            self._publish()

    async def _follow_once(self) -> None:
        """One watch, begun with a snapshot where one is due. Returns where the next one has to begin so; else ends with the failure."""
        if not self._history:
            await self._take_snapshot()
        async with aclosing(self._client.watch(self._prefix, self._revision + 1)) as responses:
            async for response in responses:
                if response.compact_revision or (response.created and not await self._is_same_store()):
                    log.info("etcd_snapshot_due", prefix=self._prefix.decode(), compact_revision=response.compact_revision)
                    self._history = b""
                    return
                if response.canceled:
                    raise Unavailable(f"etcd cancelled the watch: {response.cancel_reason or 'no reason given'}")
                if self._num_failures:
                    log.info("etcd_watch_resumed", prefix=self._prefix.decode(), num_failures=self._num_failures)
                    self._num_failures = 0
                self._apply(response.events)

    async def _take_snapshot(self) -> None:
        async with self.write_lock:
            # The marker is read first: if the store is replaced in between, the check when the watch stands tells.
            history, _ = await self._client.history(self._history_key)
            reply = await self._client.range(self._prefix)
            self._history, self._revision = history, reply.header.revision
            self._entries = {self._name(kv): _Entry(kv.value, kv.mod_revision) for kv in reply.kvs}
            self._publish()

    async def _is_same_store(self) -> bool:
        """Whether etcd still holds the store that _entries came from, at their revision or later."""
        history, revision = await self._client.history(self._history_key)
        return history == self._history and revision >= self._revision

    def _apply(self, events: Iterable[pb.Event]) -> None:
        has_changed = False
        for event in events:
            key, revision = self._name(event.kv), event.kv.mod_revision
            self._revision = max(self._revision, revision)
            if event.type == pb.Event.PUT:
                has_changed |= self._put(key, event.kv.value, revision)
            elif key in self._entries and self._entries[key].revision < revision:
                del self._entries[key]
                has_changed = True
        if has_changed:
            self._publish()

    def _put(self, key: str, value: bytes, revision: int) -> bool:
        """Takes a put unless a later one is known. True: the membership differs now."""
        known = self._entries.get(key)
        if known is not None and known.revision >= revision:
            return False
        self._entries[key] = _Entry(value, revision)
        return known is None or known.value != value

    def _name(self, kv: pb.KeyValue) -> str:
        return kv.key.removeprefix(self._prefix).decode(errors="replace")

    def _publish(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
