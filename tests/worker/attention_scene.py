"""Ragged sequences on a paged cache for the tests of attention."""

import math
from collections.abc import Sequence as Ordered

import torch

from worker.input_batch import InputBatch, build_batch
from worker.kernels.kv_store import store_kv
from worker.sequences import SamplingParams, ScheduledSequence, Sequence

Chunks = list[tuple[int, int]]  # (tokens computed before, tokens now) of each sequence


class Scene:
    """Keys and values lie in shuffled blocks of a cache that is NaN everywhere else; blocks that the window has passed are stale."""

    def __init__(
        self,
        chunks: Chunks,
        window: int,
        *,
        heads: int = 6,
        kv_heads: int = 2,
        head_dim: int = 10,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        num_blocks = sum(math.ceil(sum(chunk) / block_size) for chunk in chunks) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.chunks, self.window, self.block_size, self.scale = chunks, window, block_size, head_dim**-0.5
        self.keys, self.values = torch.full((2, num_blocks, block_size, kv_heads, head_dim), math.nan, dtype=dtype)
        self.contexts = [torch.randn(2, before + now, kv_heads, head_dim, generator=generator).to(dtype) for before, now in chunks]
        self.scheduled: list[ScheduledSequence] = []
        for (before, now), (keys, values) in zip(chunks, self.contexts, strict=True):
            ids = [order.pop() for _ in range(math.ceil((before + now) / block_size))]
            sequence = Sequence(0, "r", [0] * (before + now), before + now, SamplingParams(), before, ids, list(ids))
            slots = torch.tensor([ids[position // block_size] * block_size + position % block_size for position in range(before + now)])
            store_kv(keys, values, self.keys, self.values, slots)
            for passed in range(max(0, before - window + 1) // block_size if window else 0):
                self.keys[ids[passed]] = self.values[ids[passed]] = math.nan
                sequence.window_block_ids[passed] = -1  # stale: no block at all
            self.scheduled.append(ScheduledSequence(sequence, now))
        self.queries = torch.randn(sum(now for _, now in chunks), heads, head_dim, generator=generator).to(dtype)
        self.sinks = torch.linspace(-1.0, 2.0, heads).to(dtype)
        self.batch: InputBatch = self.build(range(len(chunks)))

    def build(self, places: Ordered[int]) -> InputBatch:
        """The batch of some of the sequences."""
        return build_batch([self.scheduled[place] for place in places], block_size=self.block_size, sliding_window=self.window)

    def rows(self) -> list[tuple[int, int]]:
        """(row, sequence) of each sequence's first row; decodes come first."""
        order = sorted(range(len(self.chunks)), key=lambda place: self.chunks[place][1] > 1)
        begins = [sum(self.chunks[place][1] for place in order[:rank]) for rank in range(len(order))]
        return list(zip(begins, order, strict=True))
