"""What one rank holds of a checkpoint: the slice of every tensor, and its bytes. Known from the sizes alone, before a weight is read."""

import math
from dataclasses import dataclass

from worker.checkpoint import TensorSpec, expected_tensors
from worker.model_config import ModelConfig
from worker.tensor_parallel import ShardPlan, shard_slices

Slices = tuple[slice, ...]  # one a dimension


def tensor_slices(config: ModelConfig, plan: ShardPlan) -> dict[str, Slices]:
    """Of every tensor, by its published name, in the order of the forward pass."""
    slices = {name: (slice(None),) * len(spec.shape) for name, spec in expected_tensors(config).items()}
    for ending, (dimension, part) in shard_slices(config, plan).items():
        for name, whole in slices.items():
            if name.endswith(ending):
                slices[name] = (*whole[:dimension], part, *whole[dimension + 1 :])
    return slices


@dataclass(frozen=True)
class ShardSizes:
    """Bytes of one rank, as published: MXFP4 experts packed, all else bfloat16."""

    experts: int  # its columns of every expert
    attention: int  # its heads
    vocabulary: int  # its rows of the embedding and the unembedding
    whole: int  # what every rank holds whole: norms, routers, output and down biases

    @property
    def total(self) -> int:
        return self.experts + self.attention + self.vocabulary + self.whole


def measure_shard(config: ModelConfig, plan: ShardPlan) -> ShardSizes:
    num_bytes = dict.fromkeys(("experts", "attention", "vocabulary", "whole"), 0)
    specs = expected_tensors(config)
    for name, slices in tensor_slices(config, plan).items():
        lengths = (len(range(*part.indices(length))) for part, length in zip(slices, specs[name].shape, strict=True))
        num_bytes[_kind_of(name, slices)] += math.prod(lengths) * _item_bytes(specs[name])
    return ShardSizes(**num_bytes)


def _kind_of(name: str, slices: Slices) -> str:
    if all(part == slice(None) for part in slices):
        return "whole"
    if ".experts." in name:
        return "experts"
    return "attention" if ".self_attn." in name else "vocabulary"


def _item_bytes(spec: TensorSpec) -> int:
    return 1 if spec.is_packed else 2
