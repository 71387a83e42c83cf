"""The expanded model in its cache: made once, whatever goes on beside it, and never used damaged."""

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.nano import cache
from models.nano.cache import cache_dir, expanded_model, is_whole
from models.nano.manifest import digest_files, read_manifest
from services.process import StartError
from tests.models.nano.small_model import write_small

ROOT = Path(__file__).parent.parent.parent.parent
SHARD = "model-00001-of-00001.safetensors"
ASK = "import sys; from pathlib import Path; from models.nano.cache import *; print(expanded_model(*map(Path, sys.argv[1:]), print))"


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compact") / "small.safetensors"
    write_small(path)
    return path


@dataclass(frozen=True)
class AskedAtOnce:
    """What each of several processes printed that asked for the model at the same time: a line when it expands it, and then the folder."""

    said: list[list[str]]

    @property
    def folder(self) -> Path:
        (folder,) = {Path(lines[-1]) for lines in self.said}
        return folder


@pytest.fixture(scope="module")
def asked_at_once(compact: Path) -> AskedAtOnce:
    command = [sys.executable, "-c", ASK, str(compact), str(compact.parent / "cache")]
    asking = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=100)[0].splitlines() for process in asking]
    assert [process.returncode for process in asking] == [0] * len(asking)
    return AskedAtOnce(said)


@pytest.fixture
def cached(asked_at_once: AskedAtOnce, tmp_path: Path) -> Path:
    """A cache of the test's own, to be damaged."""
    return Path(shutil.copytree(asked_at_once.folder, tmp_path / "cache" / asked_at_once.folder.name))


def test_processes_that_ask_at_once_expand_once(compact: Path, asked_at_once: AskedAtOnce) -> None:
    assert digest_files(asked_at_once.folder) == read_manifest(compact).files
    assert sorted(map(len, asked_at_once.said)) == [1, 1, 2], "one of them expanded it, the others found it"


def test_what_is_whole_is_left_alone(compact: Path, cached: Path) -> None:
    (cached / "notes.txt").write_text("someone's own")
    told: list[str] = []
    assert expanded_model(compact, cached.parent, told.append) == cached
    assert not told and (cached / "notes.txt").exists()


def test_one_wrong_bit_is_mended_and_what_a_killed_writer_left_removed(compact: Path, cached: Path) -> None:
    content = bytearray((cached / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (cached / SHARD).write_bytes(content)
    unfinished = cached.parent / f".{cached.name}.k3j2"
    unfinished.mkdir()
    (unfinished / SHARD).write_bytes(bytes(1000))
    told: list[str] = []
    assert expanded_model(compact, cached.parent, told.append) == cached
    assert told == [f"expanding small into {cached}"]
    assert digest_files(cached) == read_manifest(compact).files and not unfinished.exists()


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_file_that_is_missing_or_cut_off_is_noticed(compact: Path, cached: Path, name: str) -> None:
    manifest = read_manifest(compact)
    os.truncate(cached / name, 100)
    assert not is_whole(cached, manifest)
    (cached / name).unlink()
    assert not is_whole(cached, manifest)


def test_a_disk_without_room_is_one_line_before_anything_is_written(compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StartError, match=r"^cannot expand small into .*: it takes 0 MiB, which are not free; .* OSSIA_CACHE_DIR$"):
        expanded_model(compact, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_leaves_nothing(compact: Path, tmp_path: Path) -> None:
    """A limit on the size of files stops the writer where a full disk would."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))
    try:
        with pytest.raises(StartError, match=r"^cannot expand small into .*: File too large; .* OSSIA_CACHE_DIR$"):
            expanded_model(compact, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_folder_that_cannot_be_made_is_one_line(compact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"^cannot expand small into .*/file/cache: Not a directory; .* OSSIA_CACHE_DIR$"):
        expanded_model(compact, tmp_path / "file" / "cache")


def test_a_damaged_package_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"small.safetensors is damaged \(.*No such file.*\): install Ossia again$"):
        expanded_model(tmp_path / "small.safetensors", tmp_path / "cache")
    (tmp_path / "small.safetensors").write_bytes(bytes(100))
    with pytest.raises(StartError, match=r"small.safetensors is damaged \(no manifest in its header\): install Ossia again$"):
        expanded_model(tmp_path / "small.safetensors", tmp_path / "cache")


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OSSIA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_dir() == Path("/home/ada/.cache/ossia")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_dir() == Path("/var/caches/ossia")
    monkeypatch.setenv("OSSIA_CACHE_DIR", "~/models")
    assert cache_dir() == Path("/home/ada/models")
