"""A checkpoint that is not what its list of digests says is refused, by the file's name."""

from pathlib import Path

import pytest

from services.file_digests import make_manifest
from worker.load_progress import StartProgress
from worker.manifest import MANIFEST, verify_files
from worker.safetensors_files import CheckpointError


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    for name, content in {"model-1.safetensors": b"one" * 1000, "model-2.safetensors": b"two", "config.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    listed = make_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("".join(f"{one.sha256}  {one.name}\n" for one in listed))
    return tmp_path


def verify(model_dir: Path, *, is_required: bool = False) -> int:
    return verify_files(model_dir, StartProgress(), is_required=is_required)


def refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify(model_dir, is_required=True)
    return str(caught.value)


def test_whole_files_pass_and_every_byte_is_counted(model_dir: Path) -> None:
    told: list[tuple[int, int]] = []
    progress = StartProgress()
    progress.note_bytes = lambda *bytes_done: told.append(bytes_done)  # type: ignore[method-assign]
    assert verify_files(model_dir, progress, is_required=True) == 3
    assert told[-1] == (3005, 3005) and told == sorted(told)


def test_one_changed_byte_is_found(model_dir: Path) -> None:
    (model_dir / "model-1.safetensors").write_bytes(b"one" * 999 + b"ane")
    assert "model-1.safetensors is damaged" in refusal(model_dir)


def test_a_file_that_is_not_listed_is_named_if_it_is_read(model_dir: Path) -> None:
    (model_dir / "reference.json").write_text("{}")
    with (model_dir / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  original/model.bin\n")  # listed, not there, and no part of what is served
    assert verify(model_dir) == 3
    (model_dir / "model-3.safetensors").write_bytes(b"three")
    assert "does not list model-3.safetensors" in refusal(model_dir)


def test_without_a_list_there_is_nothing_to_verify_unless_it_is_required(model_dir: Path) -> None:
    (model_dir / MANIFEST).unlink()
    assert verify(model_dir) == 0
    assert "SHA256SUMS is missing and --verify-weights is require" in refusal(model_dir)
