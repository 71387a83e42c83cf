"""Checkpoints and models that the tests of the worker share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.worker.checkpoints import SEEDS, SPECS
from tests.worker.interpreter import exact_bfloat16
from worker.checkpoint import Checkpoint
from worker.checkpoint_maker import make_checkpoint
from worker.model_config import ModelConfig
from worker.model_loader import load_model
from worker.model_start import load_model_backend
from worker.models.gpt_oss import GptOss
from worker.runner import ModelBackend
from worker.tensor_parallel import SingleRank, plan_shards


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint in SPECS, made when first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    def find(name: str) -> Path:
        if not (root / name).exists():
            make_checkpoint(root / name, SPECS[name], SEEDS[name])
        return root / name

    return find


@pytest.fixture(scope="session")
def load(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], tuple[GptOss, ModelConfig]]:
    def load_by_name(name: str) -> tuple[GptOss, ModelConfig]:
        with Checkpoint(checkpoint_dir(name)) as checkpoint:
            plan = plan_shards(checkpoint.config, rank=0, size=1)
            model = load_model(
                checkpoint, plan, SingleRank(), dtype=torch.float32, device=torch.device("cpu"), progress=lambda done, total: None
            )
            return model, checkpoint.config

    return load_by_name


@pytest.fixture(scope="session")
def load_backend(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], ModelBackend]:
    def load_by_name(name: str) -> ModelBackend:
        return load_model_backend(
            checkpoint_dir(name),
            tensor_parallel=SingleRank(),
            device="cpu",
            dtype="float32",
            block_size=16,
            num_full_blocks=600,
            num_window_blocks=300,
            kv_cache_bytes=0,
            max_model_len=None,
            max_batch_tokens=1024,
            max_num_seqs=32,
        )

    return load_by_name


@pytest.fixture(scope="session")
def interpreter() -> Iterator[None]:
    """Triton's interpreter, in which bfloat16 is exact."""
    with exact_bfloat16():
        yield
