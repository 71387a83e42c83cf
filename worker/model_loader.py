"""One rank's slice of a checkpoint onto its device, tensor by tensor."""

from collections.abc import Callable

import torch
from torch import Tensor

from worker.checkpoint import Checkpoint
from worker.kernels.linear import reads_published
from worker.kernels.mxfp4 import NAN_SCALE
from worker.models.gpt_oss import GptOss
from worker.safetensors_files import CheckpointError
from worker.shard_sizes import tensor_slices
from worker.tensor_parallel import ShardPlan, TensorParallel

MATRICES = ("_proj.weight", "router.weight", "embed_tokens.weight", "lm_head.weight")
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class ShardReader:
    """Gives the model its weights by published name: MXFP4 blocks and scales as they are, the others in the model's dtype.

    Where the kernels can widen them as they read, bfloat16 matrices stay as they are too: the same values in half of float32's memory.
    `read` raises `CheckpointError` where a scale is NaN, since that part of the model has no values.
    """

    def __init__(self, checkpoint: Checkpoint, plan: ShardPlan, *, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self._checkpoint, self._dtype, self._device, self._progress = checkpoint, dtype, device, progress
        self._reads_published = reads_published(device)
        self._slices = tensor_slices(checkpoint.config, plan)
        self._num_bytes = sum(checkpoint.count_bytes(name, slices) for name, slices in self._slices.items())
        self._num_bytes_done = 0

    def read(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name, self._slices[name]).to(self._device)
        if name.endswith("_scales") and (tensor == NAN_SCALE).any():
            raise CheckpointError(f"{name} holds the scale 255, which is MXFP4's NaN: the checkpoint is damaged, fetch it again.")
        self._num_bytes_done += tensor.nbytes
        self._progress(self._num_bytes_done, self._num_bytes)
        stays = not tensor.is_floating_point() or (self._reads_published and tensor.dtype == torch.bfloat16 and name.endswith(MATRICES))
        return tensor if stays else tensor.to(self._dtype)


def load_model(
    checkpoint: Checkpoint,
    plan: ShardPlan,
    tensor_parallel: TensorParallel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> GptOss:
    reader = ShardReader(checkpoint, plan, dtype=dtype, device=device, progress=progress)
    return GptOss(reader.read, checkpoint.config, plan, tensor_parallel)
