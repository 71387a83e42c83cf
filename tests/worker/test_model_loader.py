"""What only shows when weights are read: a number that is none."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.checkpoint import Checkpoint, CheckpointError
from worker.model_loader import load_model
from worker.tensor_parallel import SingleRank, plan_shards


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_a_scale_that_is_nan_is_refused_by_its_tensors_name(checkpoint_dir: Callable[[str], Path], tmp_path: Path, part: str) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(checkpoint_dir("odd_window"), model_dir)
    name = f"model.layers.1.mlp.experts.{part}_scales"
    (file,) = (one for one in model_dir.glob("*.safetensors") if name in load_file(one))
    tensors = load_file(file)
    tensors[name][2, 1, 0] = 255
    save_file(tensors, file)
    with Checkpoint(model_dir) as checkpoint, pytest.raises(CheckpointError, match=rf"{name} holds the scale 255, .* fetch it again"):
        load_model(
            checkpoint,
            plan_shards(checkpoint.config, rank=0, size=1),
            SingleRank(),
            dtype=torch.float32,
            device=torch.device("cpu"),
            progress=lambda done, total: None,
        )
