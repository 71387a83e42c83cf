"""Random checkpoints: every byte from the seed, published form, nothing half-written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from worker import checkpoint_maker
from worker.checkpoint import Checkpoint, CheckpointError, expected_tensors
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint, random_tensor, write_checkpoint
from worker.model_config import parse_config
from worker.safetensors_files import INDEX_FILE

SPEC = CheckpointSpec(
    num_hidden_layers=2,
    hidden_size=96,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=5,
    num_experts_per_tok=2,
    vocab_size=512,
    max_shard_bytes=150_000,
)
CONFIG = parse_config(SPEC.config_json(), SPEC.generation_config_json())


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_checkpoint(tmp_path / name, SPEC, seed)
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    first, other = _contents(tmp_path / "a"), _contents(tmp_path / "c")
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_known_values_stay_what_they_are() -> None:
    embedding = random_tensor("model.embed_tokens.weight", CONFIG, 0)
    blocks = random_tensor("model.layers.1.mlp.experts.down_proj_blocks", CONFIG, 0)
    assert embedding[0, :4].tolist() == [-0.1982421875, 0.07177734375, -1.7109375, 0.10498046875]
    assert blocks[0, 0, 0, :6].tolist() == [75, 163, 141, 147, 192, 145]


def test_shards_hold_what_the_index_says_within_the_size_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", SPEC, 0)
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    loaded = {file.name: load_file(file) for file in files}
    assert {name: file for file, tensors in loaded.items() for name in tensors} == index["weight_map"]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in loaded.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 150_000
    assert index["weight_map"].keys() == expected_tensors(CONFIG).keys()


def test_weights_keep_activations_near_one() -> None:
    for name, shape in ((name, spec.shape) for name, spec in expected_tensors(CONFIG).items() if not spec.is_packed):
        tensor = random_tensor(name, CONFIG, 1).float()
        assert tensor.isfinite().all()
        if len(shape) == 2 and "bias" not in name and "embed" not in name:
            assert 0.9 < tensor.std().item() * shape[1] ** 0.5 < 1.1, name


def test_values_do_not_depend_on_where_chunks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("lm_head.weight", "model.layers.0.mlp.experts.gate_up_proj_blocks", "model.layers.0.mlp.experts.gate_up_proj_scales")
    whole = [random_tensor(name, CONFIG, 5) for name in names]
    monkeypatch.setattr(checkpoint_maker, "CHUNK_ELEMENTS", 1000)
    assert all(torch.equal(random_tensor(name, CONFIG, 5), tensor) for name, tensor in zip(names, whole, strict=True))


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists: name a directory that does not"):
        make_checkpoint(tmp_path, SPEC, 0)


def test_sizes_that_are_no_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="intermediate_size is 40, must be a multiple of 32"):
        make_checkpoint(tmp_path / "model", replace(SPEC, intermediate_size=40), 0)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(name: str) -> torch.Tensor:
        if name == "lm_head.weight":
            raise OSError("disk full")
        return random_tensor(name, CONFIG, 0)

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path / "model", SPEC, fail)
    assert not list(tmp_path.iterdir())


def test_the_defaults_are_published_vocabulary_and_stop_tokens() -> None:
    default = CheckpointSpec()
    assert default.generation_config_json()["eos_token_id"] == [200002, 200012, 199999]
    assert parse_config(default.config_json(), default.generation_config_json()).vocab_size == 201088


def test_what_was_made_opens(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", SPEC, 0)
    with Checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.config == CONFIG
