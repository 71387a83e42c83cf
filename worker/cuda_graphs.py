"""Decode steps as CUDA graphs: one launch in place of hundreds. A graph computes one shape, so a step is filled up to the next shape.

Rows that fill up belong to no sequence: they read and write a block of each pool that no table names, `KVCache.null_blocks`. Prefills, and
decodes larger than every graph, run without. Only `CudaCapture` needs a GPU.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from worker.input_batch import InputBatch
from worker.kernels.attention import PagedBatch

BATCHES = (1, 2, 4, *range(8, 257, 8))  # sequences
CONTEXTS = tuple(2048 * 4**step for step in range(10))  # tokens
MAX_TOKENS = 1 << 21  # sequences times context: memory for the parts of a long context's attention grows with it
Forward = Callable[[InputBatch], Tensor]


class Shape(NamedTuple):
    """What one graph can compute: so many sequences, each with tables of so many blocks."""

    num_sequences: int
    num_full_blocks: int
    num_window_blocks: int


def list_shapes(*, max_num_seqs: int, max_model_len: int, block_size: int, num_window_blocks: int) -> list[Shape]:
    """The shapes that such a group's decodes fill up to. `num_window_blocks` is what a window can touch."""
    contexts = [*(context for context in CONTEXTS if context < max_model_len), max_model_len]
    largest = min((batch for batch in BATCHES if batch >= max_num_seqs), default=BATCHES[-1])
    return [
        Shape(batch, -(-context // block_size), num_window_blocks)
        for context in contexts
        for batch in BATCHES
        if batch <= largest and (batch * context <= MAX_TOKENS or batch == 1)
    ]


def pad_decodes(batch: InputBatch, num_sequences: int, block_size: int, null_blocks: tuple[int, int]) -> InputBatch:
    """A decode step with as many sequences; those that are added hold one token, in the pools' null blocks (full, window)."""
    full = _pad_pool(batch.full, num_sequences, block_size, null_blocks[0])
    return replace(
        batch,
        token_ids=_pad(batch.token_ids, num_sequences, 0),
        positions=_pad(batch.positions, num_sequences, 0),
        full=full,
        window=full if batch.window is batch.full else _pad_pool(batch.window, num_sequences, block_size, null_blocks[1]),
    )


def _pad_pool(pool: PagedBatch, num_sequences: int, block_size: int, null_block: int) -> PagedBatch:
    return PagedBatch(
        num_decodes=num_sequences,
        query_lens=(1,) * num_sequences,
        context_lens=_pad(pool.context_lens, num_sequences, 1),
        table_starts=_pad(pool.table_starts, num_sequences, 0),
        block_tables=_pad(pool.block_tables, num_sequences, null_block),
        slot_mapping=_pad(pool.slot_mapping, num_sequences, null_block * block_size),
    )


def _pad(tensor: Tensor, num_rows: int, value: int) -> Tensor:
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, num_rows - len(tensor)), value=value)


class Capture(Protocol):
    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `compute` gives, and a function that computes it again into the same memory."""
        ...


class CudaCapture:
    """Records what the stream is given. All graphs share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.freeze()  # torch walks the heap before each recording

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        compute()  # compiles, and allocates what must not be allocated while recording
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as NCCL's, may call the driver meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        return output, graph.replay


@dataclass(frozen=True)
class _Graph:
    inputs: InputBatch  # memory that the graph reads
    output: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one model on one device. `forward` gives hidden states [rows, hidden] of a batch on the device."""

    def __init__(self, forward: Forward, *, block_size: int, null_blocks: tuple[int, int], device: torch.device) -> None:
        self._forward = forward
        self._block_size = block_size
        self._null_blocks = null_blocks
        self._device = device
        self._graphs: dict[Shape, _Graph] = {}  # in the order of their capture; filled by `capture` only

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def capture(self, shapes: Iterable[Shape], capture: Capture, progress: Callable[[int], None] = lambda num_done: None) -> None:
        """From the largest shape on, so that the smaller ones live in its memory; `progress` gets how many are done."""
        captured: dict[Shape, _Graph] = {}
        for num_done, shape in enumerate(sorted(shapes, key=lambda one: one.num_sequences * one.num_full_blocks, reverse=True), start=1):
            inputs = self._null_inputs(shape).to(self._device)
            captured[shape] = _Graph(inputs, *capture(partial(self._forward, inputs)))
            progress(num_done)
        self._graphs = dict(sorted(captured.items(), key=lambda item: (item[0].num_full_blocks, item[0].num_sequences)))

    def find(self, batch: InputBatch) -> Shape | None:
        """The smallest shape that holds the step; None: no graph can compute it."""
        if batch.full.num_decodes < len(batch.full.query_lens):
            return None
        num_sequences, num_full_blocks = batch.full.block_tables.shape
        return next((one for one in self._graphs if one.num_sequences >= num_sequences and one.num_full_blocks >= num_full_blocks), None)

    def pad(self, batch: InputBatch, shape: Shape) -> InputBatch:
        return pad_decodes(batch, shape.num_sequences, self._block_size, self._null_blocks)

    @torch.inference_mode()
    def run(self, batch: InputBatch, shape: Shape) -> Tensor:
        """A padded batch on the device → hidden states [shape.num_sequences, hidden], which stay until the graph runs again."""
        graph = self._graphs[shape]
        for target, source in zip(graph.inputs.tensors, batch.tensors, strict=True):
            # block tables may be narrower than the graph's: what lies beyond a context's end is not read
            (target[:, : source.shape[1]] if target.dim() == 2 else target).copy_(source)
        graph.replay()
        return graph.output

    def _null_inputs(self, shape: Shape) -> InputBatch:
        """A step of padding only."""
        one = torch.zeros(0, dtype=torch.int64)
        full, window = (
            PagedBatch(0, (), one, one, torch.zeros(0, num_blocks, dtype=torch.int64), one)
            for num_blocks in (shape.num_full_blocks, shape.num_window_blocks)
        )
        empty = InputBatch(one, one, full, window if shape.num_window_blocks else full, one, ())
        return self.pad(empty, shape)
