"""How cpu.c becomes a library, and what the worker does where it cannot."""

import os
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from worker.kernels import cpu
from worker.kernels.cpu_build import BuildError, build
from worker.kernels.linear import linear, linear_reference, reads_published


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ossia"


def write_compiler(folder: Path, script: str) -> str:
    """A compiler that says its version and then does what `script` says; $1 is the file to write."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\nwhile [ "$1" != -o ]; do shift; done\nshift\n{script}\n')
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once_and_belongs_to_its_user_alone(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", write_compiler(tmp_path, 'echo made >> "$1"'))
    first, again = build(), build()
    assert first == again and first.read_text() == "made\n"
    assert own_cache.stat().st_mode & 0o077 == 0
    assert list(first.parent.iterdir()) == [first], "scratch is left behind"
    assert build("-march=other") != first


def test_another_compiler_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", write_compiler(tmp_path, 'echo made >> "$1"'))
    first = build()
    path = Path(os.environ["CC"])
    path.write_text(path.read_text().replace("1.0", "2.0"))
    assert build() != first


def test_what_stands_in_the_way_is_said_in_one_line(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="no C compiler: install gcc, or name one in CC"):
        build()
    monkeypatch.setenv("CC", write_compiler(tmp_path, "echo it broke >&2; exit 3"))
    with pytest.raises(BuildError, match="it broke"):
        build()
    assert not list(own_cache.iterdir())
    own_cache.chmod(0o777)
    with pytest.raises(BuildError, match="can be written by others"):
        build()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-place")
    with pytest.raises(BuildError, match="No such file"):
        build()


def test_without_a_compiler_torch_computes_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    cpu.library.cache_clear()
    try:
        x, weight = torch.ones(2, 32), torch.ones(3, 32)
        with capture_logs() as logs:
            assert torch.equal(linear(x, weight), linear_reference(x, weight))
            assert not reads_published(torch.device("cpu"))
        assert [(line["event"], line["log_level"]) for line in logs] == [("cpu_kernels_missing", "warning")]
    finally:
        cpu.library.cache_clear()


def test_what_the_compiler_made_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", write_compiler(tmp_path, 'echo nonsense > "$1"'))
    cpu.library.cache_clear()
    try:
        with capture_logs() as logs:
            assert cpu.library() is None
        assert "invalid ELF header" in logs[0]["reason"] or "file too short" in logs[0]["reason"]
    finally:
        cpu.library.cache_clear()
