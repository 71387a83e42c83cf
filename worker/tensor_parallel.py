"""One group's ranks: which slice of every tensor each of them holds, and the collectives between them. Nothing is pickled."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from worker.model_config import MXFP4_BLOCK, ModelConfig

# Followers wait in a collective for the next step while the group is idle. A rank that dies ends the wait at once, by its connection.
IDLE_TIMEOUT = timedelta(days=365)

LENGTH_BYTES, HEAD_BYTES = 8, 4096  # of a broadcast that goes in one piece


class ShardPlanError(Exception):
    """The model cannot be divided between that many ranks. One sentence with the cure."""


@dataclass(frozen=True)
class ShardPlan:
    """Half-open ranges of one rank, in heads, vocabulary entries and expert intermediate columns (a multiple of 32, possibly empty)."""

    query_heads: range
    kv_heads: range
    vocabulary: range
    intermediate: range


def plan_shards(config: ModelConfig, *, rank: int, size: int) -> ShardPlan:
    """Raises `ShardPlanError`. Experts are dealt in whole MXFP4 blocks, so the ranks' shares of them may differ by one block."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    uneven = [f"{name} is {total}" for name, total in sizes.items() if total % size]
    if uneven:
        fitting = [n for n in (1, 2, 4, 8) if not any(total % n for total in sizes.values())]
        raise ShardPlanError(
            f"tensor_parallel_size {size} does not divide the model ({', '.join(uneven)}): take {' or '.join(map(str, fitting))}."
        )
    blocks = _share(config.intermediate_size // MXFP4_BLOCK, rank, size)
    return ShardPlan(
        query_heads=_share(config.num_attention_heads, rank, size),
        kv_heads=_share(config.num_key_value_heads, rank, size),
        vocabulary=_share(config.vocab_size, rank, size),
        intermediate=range(blocks.start * MXFP4_BLOCK, blocks.stop * MXFP4_BLOCK),
    )


def _share(total: int, rank: int, size: int) -> range:
    return range(total * rank // size, total * (rank + 1) // size)


def shard_slices(config: ModelConfig, plan: ShardPlan) -> Mapping[str, tuple[int, slice]]:
    """(dimension, slice) of each tensor that is divided, by the end of its published name. The others are held whole by every rank."""
    query_rows = slice(plan.query_heads.start * config.head_dim, plan.query_heads.stop * config.head_dim)
    key_rows = slice(plan.kv_heads.start * config.head_dim, plan.kv_heads.stop * config.head_dim)
    vocabulary = slice(plan.vocabulary.start, plan.vocabulary.stop)
    gate_up_rows = slice(2 * plan.intermediate.start, 2 * plan.intermediate.stop)  # gate and up rows take turns
    down_blocks = slice(plan.intermediate.start // MXFP4_BLOCK, plan.intermediate.stop // MXFP4_BLOCK)
    return {
        "embed_tokens.weight": (0, vocabulary),
        "lm_head.weight": (0, vocabulary),
        **{f"{name}_proj.{part}": (0, key_rows) for name in "kv" for part in ("weight", "bias")},
        **{f"q_proj.{part}": (0, query_rows) for part in ("weight", "bias")},
        "sinks": (0, slice(plan.query_heads.start, plan.query_heads.stop)),
        "o_proj.weight": (1, query_rows),
        **{f"gate_up_proj_{part}": (1, gate_up_rows) for part in ("blocks", "scales", "bias")},
        **{f"down_proj_{part}": (2, down_blocks) for part in ("blocks", "scales")},
    }


class TensorParallel(Protocol):
    """The ranks of a group. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors; may be written into `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors side by side in the last dimension."""
        ...

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Rank 0's payload, on every rank; the others pass None and wait for it."""
        ...

    def close(self) -> None: ...


class SingleRank:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        assert payload is not None, "rank 0 brings the payload"
        return payload

    def close(self) -> None:
        return


class RankGroup:
    """The ranks of one process group, over NCCL for tensors on a GPU and over gloo for those on the CPU."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """The length and the first bytes go at once, which is all of a decode's plan."""
        head = bytearray(LENGTH_BYTES + HEAD_BYTES)
        if payload is not None:
            head[:LENGTH_BYTES] = len(payload).to_bytes(LENGTH_BYTES, "little")
            head[LENGTH_BYTES : LENGTH_BYTES + min(len(payload), HEAD_BYTES)] = payload[:HEAD_BYTES]
        dist.broadcast(torch.frombuffer(head, dtype=torch.uint8), src=0)
        length = int.from_bytes(head[:LENGTH_BYTES], "little")
        received = bytes(head[LENGTH_BYTES : LENGTH_BYTES + length])
        if length <= HEAD_BYTES:
            return received
        rest = bytearray(payload[HEAD_BYTES:] if payload else length - HEAD_BYTES)
        dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), src=0)
        return received + rest

    def close(self) -> None:
        dist.destroy_process_group()


def join_group(directory: Path, *, rank: int, size: int, device: str, start_timeout_s: float) -> TensorParallel:
    """Meets the group's other ranks through a file in `directory`, which must be fresh: a group that starts again takes another one.

    Raises `TimeoutError` where not all ranks came within `start_timeout_s`.
    """
    if size == 1:
        return SingleRank()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo would listen on the address that the host's name resolves to
    store = dist.FileStore(str(directory / "ranks"), size)  # type: ignore[attr-defined]  # public, but torch's own stub does not export it
    store.set(f"{rank} is here", "")
    try:
        store.wait([f"{other} is here" for other in range(size)], timedelta(seconds=start_timeout_s))
    except RuntimeError as error:  # what FileStore raises at its time-out
        raise TimeoutError(
            f"Not all of the group's {size} ranks came within {start_timeout_s:g} s: read the log of the missing one."
        ) from error
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=IDLE_TIMEOUT)
    return RankGroup(rank, size)
