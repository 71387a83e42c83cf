"""Tensors on their way between host and device: neither side waits for the other until a value is needed."""

from collections.abc import Iterable

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors in host memory. From a GPU they come after what its stream does now; on the CPU they are there at once."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(_pinned(tensor).copy_(tensor, non_blocking=True) for tensor in tensors)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def is_done(self) -> bool:
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[Tensor, ...]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def send(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors of one dtype on the device, by one copy that the host does not wait for."""
    sources = list(tensors)
    if device.type == "cpu":
        return sources
    # torch keeps page-locked memory from being used again until the copies out of it are done
    packed = torch.cat([source.flatten() for source in sources]).pin_memory().to(device, non_blocking=True)
    parts = torch.split(packed, [source.numel() for source in sources])
    return [part.view(source.shape) for part, source in zip(parts, sources, strict=True)]
