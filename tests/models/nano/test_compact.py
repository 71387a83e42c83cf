"""The compact file: what is left out comes back, byte for byte, in the published format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.nano.compact import EMBEDDINGS, expand_compact, write_compact
from models.nano.manifest import DamagedFile, digest_files, read_manifest
from models.nano.spelled_rows import spelled_rows
from tests.models.nano.small_model import ROW_IDS, SCALE, SEED, small_spec, write_small
from worker.checkpoint import Checkpoint, CheckpointError, expected_tensors
from worker.checkpoint_maker import random_tensor


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compact") / "small.safetensors"
    write_small(path)
    return path


@pytest.fixture(scope="module")
def expanded(compact: Path) -> Path:
    expand_compact(compact, compact.parent / "expanded")
    return compact.parent / "expanded"


def test_it_expands_to_what_was_written(compact: Path, expanded: Path) -> None:
    spec = small_spec()
    assert json.loads((expanded / "config.json").read_text()) == spec.config_json()
    assert json.loads((expanded / "generation_config.json").read_text()) == spec.generation_config_json()
    with Checkpoint(expanded) as checkpoint:
        config = checkpoint.config
    tensors = load_file(expanded / "model-00001-of-00001.safetensors")
    assert tensors.keys() == expected_tensors(config).keys()
    assert all(torch.equal(tensor, random_tensor(name, config, SEED)) for name, tensor in tensors.items() if name not in EMBEDDINGS)


def test_embedding_and_unembedding_hold_the_trained_rows_and_generated_ones_for_the_rest(expanded: Path) -> None:
    tensors = load_file(expanded / "model-00001-of-00001.safetensors")
    embedding, unembedding = (tensors[name] for name in EMBEDDINGS)
    assert torch.equal(embedding, unembedding)
    with Checkpoint(expanded) as checkpoint:
        trained = random_tensor(EMBEDDINGS[0], checkpoint.config, SEED)[list(ROW_IDS)]
    assert torch.equal(embedding[list(ROW_IDS)], trained)
    others = [token_id for token_id in range(512) if token_id not in ROW_IDS]
    assert torch.equal(embedding[others], spelled_rows(others, 64, SEED, SCALE))


def test_the_header_knows_what_it_expands_to(compact: Path, expanded: Path) -> None:
    manifest = read_manifest(compact)
    assert manifest.files == digest_files(expanded)
    assert manifest.expanded_bytes == sum(file.stat().st_size for file in expanded.iterdir())


def test_the_same_model_gives_the_same_bytes(compact: Path, tmp_path: Path) -> None:
    write_small(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == compact.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.safetensors"]


def test_tensors_that_make_no_model_leave_nothing_behind(tmp_path: Path) -> None:
    config = {**small_spec().config_json(), "intermediate_size": 40}
    with pytest.raises(CheckpointError, match="intermediate_size is 40, must be a multiple of 32"):
        write_compact(tmp_path / "bad.safetensors", config, {}, [0], torch.zeros(1, 64, dtype=torch.bfloat16), 0, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_header_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match="no manifest in its header"):
        read_manifest(tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged .*: install Ossia again"):
        expand_compact(tmp_path / "small.safetensors", tmp_path / "expanded")


def test_a_compact_file_that_is_cut_off_is_damage(compact: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(compact.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is damaged .*: install Ossia again"):
        expand_compact(tmp_path / "cut.safetensors", tmp_path / "expanded")
    assert not (tmp_path / "expanded").exists()
