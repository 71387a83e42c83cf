"""How much memory a rank has for keys and values: its share of the GPU, less the weights and what the largest steps take at their peak."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from worker.kv_cache import KVCacheTooSmall
from worker.sequences import SamplingParams, ScheduledSequence, Sequence

GIB = 1024**3


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of one GPU."""

    total_bytes: int
    held_bytes: int  # with the weights loaded and nothing computed, whoever holds them
    step_bytes: int  # what the largest step takes beside them, at its peak

    def budget(self, utilization: float) -> int:
        """What is left of `utilization`, from 0 to 1, of the GPU. Raises KVCacheTooSmall where nothing is."""
        budget = int(self.total_bytes * utilization) - self.held_bytes - self.step_bytes
        if budget > 0:
            return budget
        raise KVCacheTooSmall(
            f"--gpu-memory-utilization {utilization:g} of {self.total_bytes / GIB:.1f} GiB leaves nothing for keys and values: "
            f"{self.held_bytes / GIB:.1f} GiB are held once the weights are loaded, and a step takes {self.step_bytes / GIB:.1f} GiB more; "
            "take more ranks, lower --max-batch-tokens, or free the GPU of others."
        )


class DeviceMemory(Protocol):
    def profile(self, compute: Callable[[], object]) -> MemoryProfile:
        """Computes, and tells what that took."""
        ...


class CudaMemory:
    """The current CUDA device."""

    def profile(self, compute: Callable[[], object]) -> MemoryProfile:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute()
        torch.cuda.synchronize()
        step_bytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info()  # after the step: kernels that it loaded stay
        return MemoryProfile(total_bytes, total_bytes - free_bytes, step_bytes)


def largest_steps(*, max_batch_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int) -> Iterator[list[ScheduledSequence]]:
    """The steps that take the most memory: as many tokens of as many sequences as there may be, and as many decodes of the longest context.

    Every table names block 0 only, so that a pool of one block is enough: what is computed means nothing.
    """
    num_chunks = min(max_num_seqs, max_batch_tokens)
    chunk = min(max_batch_tokens // num_chunks, max_model_len)
    yield [_sequence(place, chunk, 0, block_size) for place in range(num_chunks)]
    if num_chunks * chunk < max_batch_tokens:
        yield [_sequence(0, min(max_batch_tokens, max_model_len), 0, block_size)]
    yield [_sequence(place, max_model_len, max_model_len - 1, block_size) for place in range(num_chunks)]


def _sequence(seq_id: int, num_tokens: int, num_computed: int, block_size: int) -> ScheduledSequence:
    table = [0] * -(-num_tokens // block_size)
    sequence = Sequence(seq_id, "profile", [0] * num_tokens, num_tokens, SamplingParams(), num_computed, table, table)
    return ScheduledSequence(sequence, num_tokens - num_computed)
