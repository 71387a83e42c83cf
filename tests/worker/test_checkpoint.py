"""A checkpoint that cannot be served is refused before a weight is read, in one sentence with file, tensor or field, and cure."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.checkpoint import Checkpoint, CheckpointError, count_parameters, expected_tensors
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint
from worker.model_config import parse_config
from worker.safetensors_files import INDEX_FILE

SPEC = CheckpointSpec(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=2,
    vocab_size=128,
    max_shard_bytes=40_000,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "original"
    make_checkpoint(directory, SPEC, 1)
    return directory


@pytest.fixture
def model_dir(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _place_of(model_dir: Path, name: str) -> Path:
    return model_dir / str(json.loads((model_dir / INDEX_FILE).read_text())["weight_map"][name])


def _replace_tensor(model_dir: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    file = _place_of(model_dir, name)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, file)


def _refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(model_dir)
    return str(caught.value)


def test_a_whole_checkpoint_opens_sharded_and_as_a_single_file(model_dir: Path) -> None:
    files = sorted(model_dir.glob("*.safetensors"))
    assert len(files) > 2
    with Checkpoint(model_dir) as sharded:
        slices = (slice(1, 3), slice(10, 30), slice(None))
        part = sharded.read("model.layers.1.mlp.experts.down_proj_scales", slices)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in (*files, model_dir / INDEX_FILE):
        file.unlink()
    save_file(tensors, model_dir / "model.safetensors")
    with Checkpoint(model_dir) as single:
        assert torch.equal(single.read("model.layers.1.mlp.experts.down_proj_scales", slices), part)
    assert torch.equal(tensors["model.layers.1.mlp.experts.down_proj_scales"][slices], part)


def test_a_missing_tensor_is_named(model_dir: Path) -> None:
    name = "model.layers.1.self_attn.sinks"
    _replace_tensor(model_dir, name, lambda tensor: None)
    assert f"lacks tensor {name}" in _refusal(model_dir)
    index = json.loads((model_dir / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (model_dir / INDEX_FILE).write_text(json.dumps(index))
    assert f"holds no tensor {name}" in _refusal(model_dir)


def test_a_wrong_shape_is_named_with_both_shapes(model_dir: Path) -> None:
    _replace_tensor(model_dir, "model.layers.0.mlp.router.bias", lambda tensor: tensor[:2].clone())
    message = _refusal(model_dir)
    assert "model.layers.0.mlp.router.bias has shape [2]" in message
    assert "asks for [3]" in message


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("model.norm.weight", torch.int32, "dtype I32, must be BF16 or F16 or F32"),
        ("model.layers.0.mlp.experts.down_proj_scales", torch.int8, "dtype I8, must be U8"),
    ],
)
def test_a_wrong_dtype_is_named(model_dir: Path, name: str, dtype: torch.dtype, words: str) -> None:
    _replace_tensor(model_dir, name, lambda tensor: tensor.to(dtype))
    assert f"{name} has {words}" in _refusal(model_dir)


@pytest.mark.parametrize("num_bytes", [0, 7, 300, -1])
def test_a_truncated_file_is_named(model_dir: Path, num_bytes: int) -> None:
    file = _place_of(model_dir, "lm_head.weight")
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert f"{file} is truncated or not a safetensors file" in _refusal(model_dir)


def test_an_index_that_promises_other_sizes_is_refused(model_dir: Path) -> None:
    index = json.loads((model_dir / INDEX_FILE).read_text())
    index["metadata"]["total_size"] += 2
    (model_dir / INDEX_FILE).write_text(json.dumps(index))
    assert f"promises {index['metadata']['total_size']} bytes of tensors" in _refusal(model_dir)


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    file = _place_of(model_dir, "lm_head.weight")
    file.unlink()
    assert _refusal(model_dir) == f"{file} is missing: download the checkpoint again."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": 3}}', "has no weight_map"),
        ('{"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}', "not a plain file name"),
    ],
)
def test_a_bad_index_is_refused(model_dir: Path, text: str, words: str) -> None:
    (model_dir / INDEX_FILE).write_text(text)
    message = _refusal(model_dir)
    assert words in message
    assert INDEX_FILE in message


def test_a_folder_without_weights_or_config_is_refused(tmp_path: Path, model_dir: Path) -> None:
    assert "config.json is missing" in _refusal(tmp_path)
    (model_dir / INDEX_FILE).unlink()
    assert "model.safetensors is missing" in _refusal(model_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq', must be 'mxfp4': convert"),
        ({"quantization_config": None}, "quantization_config is None, must be an object"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM'], must be ['GptOssForCausalLM']"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": 72}, "hidden_size is 72, must be a multiple of 32"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, must be a multiple of 3"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, must be at most num_local_experts 3"),
        ({"layer_types": ["full_attention"]}, "layer_types must list"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type is 'llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "rope_scaling.factor is -1, must be a number over 0"),
        ({"vocab_size": 64}, "must lie under vocab_size"),
    ],
)
def test_a_config_that_is_no_such_model_is_refused(model_dir: Path, changes: dict[str, object], words: str) -> None:
    _edit(model_dir / "config.json", **changes)
    message = _refusal(model_dir)
    assert words in message
    assert str(model_dir / "config.json") in message


def test_one_error_lists_every_bad_field(model_dir: Path) -> None:
    _edit(model_dir / "config.json", hidden_size="64", head_dim=0, rms_norm_eps=None, attention_bias=False)
    message = _refusal(model_dir)
    for words in (
        "hidden_size is '64', must be an integer of at least 1",
        "head_dim is 0",
        "rms_norm_eps is None",
        "attention_bias is False, must be True",
    ):
        assert words in message


def test_rope_parameters_of_newer_files_read_as_the_published_form() -> None:
    published = SPEC.config_json()
    newer = {name: value for name, value in published.items() if name not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = {**SPEC.config_json()["rope_scaling"], "rope_theta": 150000.0}  # type: ignore[dict-item]  # an object
    generation = SPEC.generation_config_json()
    assert parse_config(newer, generation) == parse_config(published, generation)


def test_stop_tokens_come_from_the_generation_config_where_there_is_one(model_dir: Path) -> None:
    _edit(model_dir / "generation_config.json", eos_token_id=[5, 7])
    assert Checkpoint(model_dir).config.eos_token_ids == (5, 7)
    (model_dir / "generation_config.json").unlink()
    assert Checkpoint(model_dir).config.eos_token_ids == (127,)


def test_the_digest_tells_weights_apart(model_dir: Path, original: Path) -> None:
    assert Checkpoint(model_dir).digest() == Checkpoint(original).digest()
    _replace_tensor(model_dir, "model.norm.weight", lambda tensor: tensor + 1)
    assert Checkpoint(model_dir).digest() != Checkpoint(original).digest()


def test_parameters_of_the_published_sizes_are_counted() -> None:
    sizes = CheckpointSpec(
        num_hidden_layers=36, hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, num_local_experts=128
    )
    for spec, total, active in (
        (sizes, 116.83, 5.13),
        (replace(sizes, num_hidden_layers=24, num_local_experts=32), 20.91, 3.61),
    ):
        config = parse_config(spec.config_json(), spec.generation_config_json())
        assert [round(count / 1e9, 2) for count in count_parameters(config)] == [total, active]
        assert len(expected_tensors(config)) == 19 * config.num_hidden_layers + 3
