"""What keeps a rank from starting is one sentence with the cure, told before the group registers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.process import StartError
from worker import rank
from worker.config import WorkerConfig
from worker.load_progress import StartProgress
from worker.rank import check_model, load_rank
from worker.self_check import REFERENCE

SMALL = {"num_full_blocks": 16, "num_window_blocks": 16, "max_model_len": 256, "num_threads": 1}


def config(model_dir: Path, **fields: object) -> WorkerConfig:
    return WorkerConfig(model_dir=model_dir, **{**SMALL, **fields})


def refusal(model_dir: Path, check: Callable[[WorkerConfig], object], **fields: object) -> str:
    with pytest.raises(StartError) as caught:
        check(config(model_dir, **fields))
    (line,) = str(caught.value).splitlines()
    return line


def check(given: WorkerConfig) -> None:
    check_model(given, StartProgress())


def load(given: WorkerConfig) -> None:
    num_threads = torch.get_num_threads()
    try:
        load_rank(given, 0, None, StartProgress())
    finally:
        torch.set_num_threads(num_threads)


def test_a_missing_driver_and_too_few_gpus_are_told(checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = checkpoint_dir("four_ranks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device and driver are visible; take --device cpu" in refusal(model_dir, check, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "--tensor-parallel-size 4: only 3 GPUs are visible" in refusal(model_dir, check, device="cuda", tensor_parallel_size=4)
    check(config(model_dir, device="cuda", tensor_parallel_size=2))


def test_a_size_that_does_not_divide_the_model_is_told_with_those_that_do(checkpoint_dir: Callable[[str], Path]) -> None:
    assert "does not divide the model" in (line := refusal(checkpoint_dir("four_ranks"), check, tensor_parallel_size=8))
    assert line.endswith("take 1 or 2 or 4.")


def test_files_are_held_against_their_list(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = shutil.copytree(checkpoint_dir("four_ranks"), tmp_path / "model")
    assert "SHA256SUMS is missing" in refusal(model_dir, check, verify_weights="require")
    (model_dir / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {file.name}\n" for file in model_dir.iterdir()))
    assert "is damaged" in refusal(model_dir, check)
    check(config(model_dir, verify_weights="off"))


def test_a_cache_too_small_and_a_failed_check_are_told(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = shutil.copytree(checkpoint_dir("four_ranks"), tmp_path / "model")
    assert "one sequence needs at least 1 and 9" in refusal(model_dir, load, num_window_blocks=2)
    (model_dir / REFERENCE).write_text('{"references": [{"prompt": [1, 2], "token_ids": [3], "logits": [1e9]}]}')
    assert "self-check failed" in refusal(model_dir, load)


def test_weights_that_do_not_fit_a_gpu_are_told(checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(rank, "load_model_backend", run_out)
    assert "Tried to allocate 2.00 GiB.); take more ranks" in refusal(checkpoint_dir("four_ranks"), load)
