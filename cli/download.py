"""Downloads a checkpoint so that a folder holds either the listed files, each with its digest, or nothing that could be served.

A file grows as `NAME.part` and gets its name when its SHA-256 is right. What breaks off goes on where it ended, in this process or in
the next; processes that share the folder wait for the one that downloads.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import httpx

from cli.object_store import Store
from services.file_digests import ListedFile, digest_of, hash_file
from services.process import StartError

LOCK, COMPLETE = ".ossia-lock", ".ossia-complete"
GIB = 2**30
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
MAX_MISMATCHES = 2  # a resumed file may be made of two versions; a whole one that is wrong stays wrong
LOCK_POLL_S = 0.5
Say = Callable[[str], None]
T = TypeVar("T")


class DownloadError(StartError):
    """The files cannot be had as they are listed; the message names the file and the cure."""


class _Broken(Exception):
    """One try ended before the file did; the next goes on."""


class _Part:
    """What is there of one file: it grows at its end, and gets the file's name when it is right."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def length(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    @contextmanager
    def writer(self, start: int) -> Iterator[BinaryIO]:
        """Goes on behind `start` bytes; what it was given is on disk afterwards."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as out:
            out.truncate(start)
            yield out
            out.flush()
            os.fsync(out.fileno())

    def digest(self) -> str:
        return hash_file(self._path).hexdigest() if self._path.exists() else hashlib.sha256().hexdigest()

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)

    def become(self, path: Path) -> None:
        self._path.replace(path)


@dataclass(frozen=True)
class Retries:
    """`attempts` tries in a row without a byte of progress end the download; the pause between them grows up to `max_pause_s`."""

    attempts: int = 10
    max_pause_s: float = 30.0

    def pause_s(self, failures: int) -> float:
        return random.uniform(0.5, 1.0) * min(self.max_pause_s, 2.0 ** (failures - 1))


class Download:
    """One checkpoint into one folder. `say` gets a line for people at each turn of events."""

    def __init__(
        self,
        store: Store,
        files: tuple[ListedFile, ...],
        directory: Path,
        client: httpx.AsyncClient,
        retries: Retries = Retries(),
        say: Say = print,
    ) -> None:
        self._store = store
        self._files = files
        self._directory = directory
        self._client = client
        self._retries = retries
        self._say = say

    async def run(self, num_at_once: int = 4) -> None:
        """Returns when every listed file is there and right. Raises DownloadError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        async with self._alone():
            if self._is_complete():
                self._say(f"{self._directory}: all {len(self._files)} files are there")
                return
            missing = [file for file in self._files if not await asyncio.to_thread(self._has, file)]
            sizes = await self._measure(missing, num_at_once)
            self._check_space(sizes)
            await _each([self._get(file, sizes[file.name]) for file in missing], num_at_once)
            self._mark_complete()
        self._say(f"{self._directory}: {len(missing)} files downloaded, {len(self._files)} right")

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Waits while another process downloads into the folder. The lock ends with its holder, however that ends."""
        with (self._directory / LOCK).open("w") as lock:
            is_waiting = False
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not is_waiting:
                        self._say(f"{self._directory}: another process downloads; waiting for it")
                    is_waiting = True
                    await asyncio.sleep(LOCK_POLL_S)
            yield

    def _is_complete(self) -> bool:
        """Whether this very list was downloaded before, and each file still has its size. Digests are not computed again: a start of a
        pod shall not read 60 GiB twice.
        """
        try:
            noted = json.loads((self._directory / COMPLETE).read_text())
            sizes = {file.name: (self._directory / file.name).stat().st_size for file in self._files}
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return bool(noted == {"manifest": digest_of(self._files), "sizes": sizes})

    def _mark_complete(self) -> None:
        sizes = {file.name: (self._directory / file.name).stat().st_size for file in self._files}
        written = self._directory / (COMPLETE + ".part")
        written.write_text(json.dumps({"manifest": digest_of(self._files), "sizes": sizes}))
        written.replace(self._directory / COMPLETE)

    def _has(self, file: ListedFile) -> bool:
        """Whether the file is there and right; a wrong one is removed."""
        path = self._directory / file.name
        if not path.exists():
            return False
        if hash_file(path).hexdigest() == file.sha256:
            return True
        self._say(f"{file.name}: is not as listed; downloading it anew")
        path.unlink()
        return False

    def _check_space(self, sizes: dict[str, int]) -> None:
        """Raises DownloadError before a byte is written that would not fit."""
        here = sum(self._part(name).length for name in sizes)
        needed, free = sum(sizes.values()) - here, shutil.disk_usage(self._directory).free
        if needed > free:
            raise DownloadError(f"{self._directory}: {needed / GIB:.2f} GiB are still to come and {free / GIB:.2f} GiB are free; make room")

    async def _measure(self, files: Sequence[ListedFile], num_at_once: int) -> dict[str, int]:
        """The size of each file, as the store says."""
        sizes = {}

        async def measure(file: ListedFile) -> None:
            sizes[file.name] = await self._retrying(file, lambda: self._ask_size(file), has_moved=lambda: False)

        await _each([measure(file) for file in files], num_at_once)
        return sizes

    async def _ask_size(self, file: ListedFile) -> int:
        url, headers = self._store.request(file.name, {"range": "bytes=0-0", "accept-encoding": "identity"})
        async with self._client.stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # an empty file has no first byte
                return 0
            _check_status(file, response)
            total = response.headers.get("content-range", "").rpartition("/")[2] or response.headers.get("content-length", "")
            if not total.isdigit():
                raise DownloadError(f"{file.name}: the store does not say how large it is; take a store that sends Content-Length")
            return int(total)

    async def _get(self, file: ListedFile, size: int) -> None:
        part = self._part(file.name)
        if part.length > size:
            part.discard()
        for mismatches in range(1, MAX_MISMATCHES + 1):
            await self._fill(file, part, size)
            digest = await asyncio.to_thread(part.digest)
            if digest == file.sha256:
                part.become(self._directory / file.name)
                self._say(f"{file.name}: {size / GIB:.2f} GiB, right")
                return
            part.discard()
            self._say(f"{file.name}: has SHA-256 {digest}, not {file.sha256} ({mismatches} of {MAX_MISMATCHES})")
        raise DownloadError(f"{file.name}: what the store has is not what is listed; correct the store or the list")

    async def _fill(self, file: ListedFile, part: _Part, size: int) -> None:
        """Completes the part, over as many tries as it takes."""
        length = part.length

        def has_moved() -> bool:
            nonlocal length
            before, length = length, part.length
            return length > before

        await self._retrying(file, lambda: self._append(file, part, size), has_moved)

    async def _append(self, file: ListedFile, part: _Part, size: int) -> None:
        """One request for what the part lacks. Raises _Broken where it ends early."""
        start = part.length
        if size and start == size:
            return
        wanted = {"range": f"bytes={start}-"} if start else {}
        url, headers = self._store.request(file.name, {**wanted, "accept-encoding": "identity"})
        async with self._client.stream("GET", url, headers=headers) as response:
            _check_status(file, response)
            goes_on = response.status_code == 206
            if start:
                self._say(
                    f"{file.name}: " + (f"going on at {start / GIB:.2f} GiB" if goes_on else "the store cannot go on; from the start")
                )
            with part.writer(start if goes_on else 0) as out:
                async for chunk in response.aiter_raw():  # as it comes: what a break leaves behind counts
                    out.write(chunk)
        if part.length < size:
            raise _Broken(f"ended after {part.length} of {size} bytes")

    async def _retrying(self, file: ListedFile, attempt: Callable[[], Awaitable[T]], has_moved: Callable[[], bool]) -> T:
        """What `attempt` gives, in the end. A try that moved the download on is no failure, so a bad line ends nothing."""
        failures = 0
        while True:
            try:
                return await attempt()
            except (httpx.TransportError, _Broken) as error:
                why = str(error) or type(error).__name__
                failures = 1 if has_moved() else failures + 1
                if failures >= self._retries.attempts:
                    raise DownloadError(f"{file.name}: {failures} tries in a row brought nothing ({why}); look at the store") from None
                pause_s = self._retries.pause_s(failures)
                self._say(f"{file.name}: broke off ({why}); again in {pause_s:.1f} s")
                await asyncio.sleep(pause_s)

    def _part(self, name: str) -> _Part:
        return _Part(self._directory / f"{name}.part")


def _check_status(file: ListedFile, response: httpx.Response) -> None:
    """Raises _Broken where a later try may do better, DownloadError where it will not."""
    if response.status_code in RETRYABLE:
        raise _Broken(f"the store answered {response.status_code}")
    if response.status_code not in (200, 206):
        raise DownloadError(f"{file.name}: the store answered {response.status_code}; look at the URL and at --credentials")


async def _each(work: Sequence[Coroutine[None, None, None]], num_at_once: int) -> None:
    """Runs all of it, so many at once; the first error ends the rest and is raised as it is."""
    gate = asyncio.Semaphore(num_at_once)

    async def pass_gate(one: Coroutine[None, None, None]) -> None:
        async with gate:
            await one

    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                tasks.create_task(pass_gate(one))
    except* DownloadError as failures:
        raise failures.exceptions[0] from None
