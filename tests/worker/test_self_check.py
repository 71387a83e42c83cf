"""A model that does not compute what is stored for it is refused before it serves; one that does is not."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.checkpoint import app
from tests.worker.reference_model import load_reference
from worker.model_start import load_model_backend
from worker.runner import ModelBackend
from worker.safetensors_files import CheckpointError
from worker.self_check import PROMPT_LENGTHS, REFERENCE, Reference, SelfCheckFailed, check_logits, make_prompts, read_reference
from worker.tensor_parallel import SingleRank


@pytest.fixture(scope="module")
def referenced_dir(checkpoint_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the reference that the command writes."""
    model_dir = shutil.copytree(checkpoint_dir("odd_window"), tmp_path_factory.mktemp("referenced") / "model")
    num_threads = torch.get_num_threads()
    assert CliRunner().invoke(app, ["reference", str(model_dir)]).exit_code == 0
    torch.set_num_threads(num_threads)
    return model_dir


@pytest.fixture
def model_dir(referenced_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(referenced_dir, tmp_path / "model")


def load(model_dir: Path, dtype: str = "float32", num_full_blocks: int = 64, max_batch_tokens: int = 512) -> ModelBackend:
    return load_model_backend(
        model_dir,
        tensor_parallel=SingleRank(),
        device="cpu",
        dtype=dtype,
        block_size=16,
        num_full_blocks=num_full_blocks,
        num_window_blocks=64,
        kv_cache_bytes=0,
        max_model_len=None,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=4,
    )


def change(model_dir: Path, prompt: int, by: float) -> None:
    content = json.loads((model_dir / REFERENCE).read_text())
    logits = content["references"][prompt]["logits"]
    logits[3] += by * max(abs(logit) for logit in logits)
    (model_dir / REFERENCE).write_text(json.dumps(content))


def test_the_command_writes_what_the_reference_model_computes(model_dir: Path) -> None:
    references, model = read_reference(model_dir, 512), load_reference(model_dir)
    assert [one.prompt for one in references] == make_prompts(512)
    assert tuple(len(one.prompt) for one in references) == PROMPT_LENGTHS
    for one in references:
        with torch.inference_mode():
            logits = model(torch.tensor([one.prompt])).logits[0, -1]
        assert torch.allclose(logits[one.token_ids], torch.tensor(one.logits), atol=1e-4)
        assert one.token_ids == logits.topk(len(one.token_ids)).indices.tolist()


def test_a_model_that_computes_right_starts_in_either_dtype_and_one_that_does_not_says_so(model_dir: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        load(model_dir, dtype)
    change(model_dir, 2, by=0.02)
    with pytest.raises(SelfCheckFailed, match="after a prompt of 200 tokens a logit is off by"):
        load(model_dir)
    load(model_dir, "bfloat16")  # is not that exact
    change(model_dir, 2, by=0.5)
    with pytest.raises(SelfCheckFailed, match="bfloat16 allows"):
        load(model_dir, "bfloat16")


def test_prompts_that_the_cache_or_a_step_does_not_hold_are_passed_over(model_dir: Path) -> None:
    change(model_dir, 2, by=0.5)
    load(model_dir, num_full_blocks=12)
    load(model_dir, max_batch_tokens=199)
    change(model_dir, 0, by=0.5)
    with pytest.raises(SelfCheckFailed, match="prompt of 5 tokens"):
        load(model_dir, num_full_blocks=12)


def test_logits_that_are_not_numbers_fail() -> None:
    logits = torch.zeros(8)
    logits[2] = math.nan
    with pytest.raises(SelfCheckFailed):
        check_logits(Reference([1], [2], [1.0]), logits, "bfloat16")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"references": []}',
        '{"references": [{"prompt": [1], "token_ids": [1]}]}',
        '{"references": [{"prompt": [], "token_ids": [1], "logits": [0.5]}]}',
        '{"references": [{"prompt": [1], "token_ids": [512], "logits": [0.5]}]}',
        '{"references": [{"prompt": [1], "token_ids": [1, 2], "logits": [0.5]}]}',
        '{"references": [{"prompt": [1], "token_ids": [1], "logits": ["a"]}]}',
    ],
)
def test_a_reference_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / REFERENCE).write_text(content)
    with pytest.raises(CheckpointError, match=r"reference\.json must hold"):
        read_reference(tmp_path, 512)
