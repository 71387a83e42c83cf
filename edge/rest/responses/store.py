"""Where responses are kept for the turns that follow: in Redis, which edges share, or in memory where there is one edge.

Bounded in number, in bytes and in time. What is kept is JSON that only its tenant finds again.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import orjson
import redis.asyncio
from redis.exceptions import RedisError

from edge.rest.responses.items import Item
from services.errors import Unavailable
from services.telemetry import get_logger

MAX_RECORD_BYTES = 4 * 1024 * 1024
MAX_MEMORY_BYTES = 256 * 1024 * 1024
REDIS_TIMEOUT_S = 2.0
PREFIX = "ossia:responses"
log = get_logger(__name__)
# Puts one record, and takes the oldest out beyond the limit. KEYS: record, index. ARGV: bytes, ttl, now, limit.
_PUT = """
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], KEYS[1])
local surplus = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[4])
if surplus > 0 then
  for _, old in ipairs(redis.call('ZRANGE', KEYS[2], 0, surplus - 1)) do redis.call('DEL', old) end
  redis.call('ZREMRANGEBYRANK', KEYS[2], 0, surplus - 1)
end
redis.call('EXPIRE', KEYS[2], ARGV[2])
"""


@dataclass(frozen=True, slots=True)
class Record:
    """A response, the items that it was asked with, and those of the turns before it."""

    response: Item
    input: list[Item]
    earlier: list[Item]

    @property
    def conversation(self) -> list[Item]:
        return [*self.earlier, *self.input, *self.response["output"]]

    def dump(self) -> bytes:
        return orjson.dumps({"response": self.response, "input": self.input, "earlier": self.earlier})

    @classmethod
    def load(cls, dumped: bytes) -> "Record":
        return cls(**orjson.loads(dumped))


class ResponseStore(Protocol):
    """Names are unique within a tenant. Every call may raise Unavailable."""

    async def put(self, tenant: str, name: str, value: bytes) -> None: ...
    async def get(self, tenant: str, name: str) -> bytes | None: ...
    async def delete(self, tenant: str, name: str) -> bool: ...
    async def aclose(self) -> None: ...


class MemoryStore:
    """The newest `max_entries`, for `ttl_s` seconds. `clock` is monotonic, in seconds."""

    def __init__(self, max_entries: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_entries = max_entries
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()  # when each ends, and what it is; oldest first
        self._num_bytes = 0

    async def put(self, tenant: str, name: str, value: bytes) -> None:
        await self.delete(tenant, name)
        self._entries[tenant, name] = (self._clock() + self._ttl_s, value)
        self._num_bytes += len(value)
        while self._entries and (len(self._entries) > self._max_entries or self._num_bytes > MAX_MEMORY_BYTES or self._is_oldest_over()):
            await self.delete(*next(iter(self._entries)))

    async def get(self, tenant: str, name: str) -> bytes | None:
        ends, value = self._entries.get((tenant, name), (0.0, None))
        return value if ends > self._clock() else None

    async def delete(self, tenant: str, name: str) -> bool:
        _, value = self._entries.pop((tenant, name), (0.0, None))
        self._num_bytes -= len(value or b"")
        return value is not None

    async def aclose(self) -> None:
        self._entries.clear()

    def _is_oldest_over(self) -> bool:
        return next(iter(self._entries.values()))[0] <= self._clock()


class RedisStore:
    def __init__(self, url: str, max_entries: int, ttl_s: float) -> None:
        options = {"socket_timeout": REDIS_TIMEOUT_S, "socket_connect_timeout": REDIS_TIMEOUT_S}
        self._redis = redis.asyncio.from_url(url, **options)
        self._put = self._redis.register_script(_PUT)
        self._max_entries = max_entries
        self._ttl_s = max(1, int(ttl_s))

    async def put(self, tenant: str, name: str, value: bytes) -> None:
        with _unavailable():
            await self._put(keys=[_key(tenant, name), f"{PREFIX}:index"], args=[value, self._ttl_s, time.time(), self._max_entries])

    async def get(self, tenant: str, name: str) -> bytes | None:
        with _unavailable():
            found = await self._redis.get(_key(tenant, name))
            return found.encode() if isinstance(found, str) else found

    async def delete(self, tenant: str, name: str) -> bool:
        key = _key(tenant, name)
        with _unavailable():
            await self._redis.zrem(f"{PREFIX}:index", key)
            return bool(await self._redis.delete(key))

    async def aclose(self) -> None:
        await self._redis.aclose()


def open_store(redis_url: str, max_entries: int, ttl_s: float) -> ResponseStore:
    return RedisStore(redis_url, max_entries, ttl_s) if redis_url else MemoryStore(max_entries, ttl_s)


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        log.warning("response_store_failed", reason=type(error).__name__)
        raise Unavailable("the store of responses cannot be reached now; try again, or send store: false", retry_after_s=1.0) from None


def _key(tenant: str, name: str) -> str:
    return f"{PREFIX}:{len(tenant)}:{tenant}:{name}"  # the length keeps one tenant's names apart from another's
