"""`ossia weights` as it is run: by the shell, and in a pod."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from services.file_digests import digest_of, read_manifest
from services.process import StartError
from tests.fakes.breaking_store import serve_files

SHA = "0" * 64


def ossia(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "cli.main", "weights", *arguments], check=False, capture_output=True, text=True)


def sha256sum_agrees(folder: Path, manifest: Path) -> bool:
    return subprocess.run(["sha256sum", "--check", "--strict", str(manifest)], cwd=folder, check=False, capture_output=True).returncode == 0


async def test_a_made_list_fetches_the_same_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "original").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "original/a.safetensors").write_bytes(b"\0\1" * 1000)
    (source / ".cache").write_text("not listed")
    made = ossia("manifest", str(source))
    (tmp_path / "SHA256SUMS").write_text(made.stdout)
    assert made.returncode == 0 and sha256sum_agrees(source, tmp_path / "SHA256SUMS")
    files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    async with serve_files(files) as store:
        store.breaks_after = [100, 100]
        fetched = await asyncio.to_thread(ossia, "fetch", store.url, str(target), f"--manifest={tmp_path / 'SHA256SUMS'}")
    assert fetched.returncode == 0, fetched.stderr
    assert {path.name for path in target.rglob("[!.]*") if path.is_file()} == {"config.json", "a.safetensors"}
    assert (target / "original/a.safetensors").read_bytes() == b"\0\1" * 1000


def test_values_are_what_the_chart_takes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ossia("manifest", "--values", str(tmp_path)).stdout == f'config.json: "{hashlib.sha256(b"{}").hexdigest()}"\n'


async def test_a_wrong_digest_fails_the_command_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{SHA}  config.json\n")
    async with serve_files({"config.json": b"{}"}) as store:
        fetched = await asyncio.to_thread(ossia, "fetch", store.url, str(tmp_path / "m"), f"--manifest={tmp_path / 'SHA256SUMS'}")
    assert fetched.returncode == 1
    assert fetched.stderr == "ossia: config.json: what the store has is not what is listed; correct the store or the list\n"
    assert not (tmp_path / "m/config.json").exists()


@pytest.mark.parametrize(
    "line", ["config.json", f"{SHA[1:]}  config.json", f"{SHA}  ../config.json", f"{SHA}  /etc/passwd", f"{SHA}  a//b", f"{SHA}  .hidden"]
)
def test_a_line_that_lists_no_file_of_the_folder_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"{SHA}  a\n{line}\n")
    with pytest.raises(StartError, match="line 2: give a SHA-256 in hex"):
        read_manifest(tmp_path / "list")


def test_a_list_is_read_whatever_its_order(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(f"{SHA}  b\n{SHA} *a/c\n\n")
    (tmp_path / "other").write_text(f"{SHA}  a/c\n{SHA}  b\n")
    assert digest_of(read_manifest(tmp_path / "one")) == digest_of(read_manifest(tmp_path / "other"))
    (tmp_path / "twice").write_text(f"{SHA}  a\n{SHA}  a\n")
    with pytest.raises(StartError, match="listed twice"):
        read_manifest(tmp_path / "twice")
    (tmp_path / "none").write_text("\n")
    with pytest.raises(StartError, match="no file is listed"):
        read_manifest(tmp_path / "none")
    with pytest.raises(StartError, match="cannot be read"):
        read_manifest(tmp_path / "absent")
