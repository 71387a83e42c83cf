"""A download ends with exactly the listed bytes, or with an error and nothing to serve."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.download import COMPLETE, Download, DownloadError, Retries
from cli.object_store import WebFolder
from services.file_digests import ListedFile, make_manifest
from tests.fakes.breaking_store import BreakingStore, serve_files

CONTENT = {"config.json": b'{"model_type": "gpt_oss"}', "weights/a.safetensors": bytes(range(256)) * 1000, "empty.txt": b""}
BIG = "weights/a.safetensors"


@pytest.fixture
async def store() -> AsyncIterator[BreakingStore]:
    async with serve_files(CONTENT) as running:
        yield running


def listed(content: Mapping[str, bytes] = CONTENT) -> tuple[ListedFile, ...]:
    return tuple(ListedFile(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(content.items()))


async def fetch(store: BreakingStore, folder: Path, attempts: int = 3, files: tuple[ListedFile, ...] = listed()) -> list[str]:
    """Downloads; gives what was said."""
    said: list[str] = []
    async with httpx.AsyncClient(timeout=60) as client:
        await Download(WebFolder(store.url), files, folder, client, Retries(attempts, max_pause_s=0.01), said.append).run()
    return said


def is_whole(folder: Path) -> bool:
    return all((folder / name).read_bytes() == data for name, data in CONTENT.items()) and not list(folder.rglob("*.part"))


async def test_every_file_arrives_as_listed(store: BreakingStore, tmp_path: Path) -> None:
    await fetch(store, tmp_path)
    assert is_whole(tmp_path) and make_manifest(tmp_path) == listed()


async def test_what_breaks_off_goes_on_where_it_ended(store: BreakingStore, tmp_path: Path) -> None:
    store.files = {BIG: CONTENT[BIG]}
    store.breaks_after = [100_000, 50_000, 1]
    await fetch(store, tmp_path, files=listed(store.files))
    assert (tmp_path / BIG).read_bytes() == CONTENT[BIG]
    assert store.ranges == ["all", "bytes=100000-", "bytes=150000-", "bytes=150001-"]


async def test_the_next_process_goes_on_too(store: BreakingStore, tmp_path: Path) -> None:
    store.breaks_after = [100_000, 0, 0, 0]
    files = listed({BIG: CONTENT[BIG]})
    with pytest.raises(DownloadError, match=r"a\.safetensors: 3 tries in a row brought nothing .*; look at the store"):
        await fetch(store, tmp_path, files=files)
    assert not (tmp_path / BIG).exists() and not (tmp_path / COMPLETE).exists()
    store.breaks_after.clear()
    await fetch(store, tmp_path, files=files)
    assert (tmp_path / BIG).read_bytes() == CONTENT[BIG] and store.ranges[-1] == "bytes=100000-"


async def test_a_store_without_ranges_starts_anew(store: BreakingStore, tmp_path: Path) -> None:
    store.has_ranges, store.breaks_after = False, [200_000, 200_000]
    await fetch(store, tmp_path, attempts=4)
    assert is_whole(tmp_path)


async def test_a_busy_store_is_asked_again(store: BreakingStore, tmp_path: Path) -> None:
    store.statuses = [503, 429]
    await fetch(store, tmp_path)
    assert is_whole(tmp_path)


async def test_a_wrong_digest_never_becomes_a_file(store: BreakingStore, tmp_path: Path) -> None:
    store.files[BIG] = b"x" + CONTENT[BIG][1:]
    with pytest.raises(DownloadError, match=r"a\.safetensors: what the store has is not what is listed; correct the store or the list"):
        await fetch(store, tmp_path)
    assert not (tmp_path / BIG).exists() and not (tmp_path / COMPLETE).exists()


async def test_a_part_of_something_else_is_downloaded_anew(store: BreakingStore, tmp_path: Path) -> None:
    part = tmp_path / f"{BIG}.part"
    for other in (b"z" * 1000, b"z" * 10_000_000):
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(other)
        (tmp_path / BIG).unlink(missing_ok=True)
        (tmp_path / COMPLETE).unlink(missing_ok=True)
        await fetch(store, tmp_path)
        assert is_whole(tmp_path)


async def test_a_file_that_changed_on_disk_is_downloaded_anew(store: BreakingStore, tmp_path: Path) -> None:
    await fetch(store, tmp_path)
    (tmp_path / BIG).write_bytes(b"short")
    assert f"{BIG}: is not as listed; downloading it anew" in await fetch(store, tmp_path)
    assert is_whole(tmp_path)


async def test_a_complete_folder_asks_nothing_of_the_store(store: BreakingStore, tmp_path: Path) -> None:
    await fetch(store, tmp_path)
    store.requests.clear()
    await fetch(store, tmp_path)
    assert store.requests == []


async def test_another_list_is_another_checkpoint(store: BreakingStore, tmp_path: Path) -> None:
    await fetch(store, tmp_path)
    noted = json.loads((tmp_path / COMPLETE).read_text())
    store.files["config.json"] = b"{}"
    await fetch(store, tmp_path, files=listed(store.files))
    assert (tmp_path / "config.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / COMPLETE).read_text()) != noted


async def test_what_does_not_fit_is_refused_before_it_is_downloaded(
    store: BreakingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 100_000, 100_000)  # the type of its answer

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DownloadError, match=r"0\.00 GiB are still to come and 0\.00 GiB are free; make room"):
        await fetch(store, tmp_path)
    assert store.ranges == [] and not (tmp_path / COMPLETE).exists()


async def test_a_missing_file_is_told_at_once(store: BreakingStore, tmp_path: Path) -> None:
    del store.files[BIG]
    with pytest.raises(DownloadError, match=r"a\.safetensors: the store answered 404; look at the URL and at --credentials"):
        await fetch(store, tmp_path, attempts=100)


async def test_two_that_share_a_folder_download_once(store: BreakingStore, tmp_path: Path) -> None:
    said = await asyncio.gather(fetch(store, tmp_path), fetch(store, tmp_path))
    assert is_whole(tmp_path)
    assert store.ranges.count("all") == len(CONTENT)
    assert sum(f"{tmp_path}: all 3 files are there" in lines for lines in said) == 1
