"""The demonstration model by its name."""

import errno
import os
from pathlib import Path

import pytest

from cli import checkpoint, nano
from cli.nano import is_nano, nano_flags, title
from models.nano import compact
from services.process import StartError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the expanded model."""
    monkeypatch.setattr(nano, "expanded_model", lambda tell: tmp_path)
    return tmp_path


def test_a_worker_finds_it_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nano_flags(["--model", "ossia-nano"]) == ["--model-dir", str(folder)]
    monkeypatch.setenv("OSSIA_WORKER_MODEL", "ossia-nano")
    assert nano_flags([]) == ["--model-dir", str(folder)]


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "gpt-oss-20b"],
        ["--model", "ossia-nano", "--model-dir", "/models/mine"],
        ["--model", "ossia-nano", "--backend", "scripted"],
        ["--model", "ossia-nano", "--block-size", "none"],
    ],
    ids=["another name", "a folder", "a script", "a wrong flag, which the worker reports"],
)
def test_a_worker_that_asks_for_something_else_gets_its_flags_alone(folder: Path, argv: list[str]) -> None:
    assert nano_flags(argv) == []


def test_a_cluster_serves_it_where_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_nano(None) and is_nano(Path("ossia-nano")) and not is_nano(Path("gpt-oss-20b"))
    (tmp_path / "ossia-nano").mkdir()
    assert not is_nano(Path("ossia-nano"))


def test_people_are_told_what_it_is() -> None:
    assert title("ossia-nano") == "ossia-nano, a small demonstration model" and title("gpt-oss-20b") == "gpt-oss-20b"


def test_a_folder_that_cannot_be_filled_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(compact, "write_published", fill_disk)
    with pytest.raises(StartError, match=rf"^cannot expand ossia-nano into {tmp_path}/x: No space left on device; make room"):
        checkpoint.expand(tmp_path / "x")
