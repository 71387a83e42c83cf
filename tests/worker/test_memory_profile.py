"""Keys and values get what is left of a GPU's share, by a profile of the largest steps; the GPU is played here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worker.thread_ranks import rank_threads
from worker.kv_cache import KVCacheTooSmall
from worker.memory_profile import GIB, MemoryProfile, largest_steps
from worker.model_start import load_model_backend
from worker.plan_draft import Limits
from worker.runner import ModelBackend
from worker.tensor_parallel import SingleRank, TensorParallel


class PlayedMemory:
    """A GPU of 100 MB on which the weights take 40, and a step 10 and `extra`."""

    def __init__(self, extra_mb: int = 0) -> None:
        self.extra_mb = extra_mb
        self.num_profiles = 0

    def profile(self, compute: Callable[[], object]) -> MemoryProfile:
        compute()
        self.num_profiles += 1
        return MemoryProfile(100_000_000, 40_000_000, (10 + self.extra_mb) * 1_000_000)


def load(model_dir: Path, ranks: TensorParallel, memory: PlayedMemory, utilization: float = 0.9) -> ModelBackend:
    return load_model_backend(
        model_dir,
        tensor_parallel=ranks,
        device="cpu",
        dtype="float32",
        block_size=16,
        num_full_blocks=None,
        num_window_blocks=None,
        kv_cache_bytes=None,
        max_model_len=None,
        max_batch_tokens=64,
        max_num_seqs=3,
        gpu_memory_utilization=utilization,
        memory=memory,
    )


def test_the_budget_is_the_share_less_what_is_taken() -> None:
    assert MemoryProfile(100 * GIB, 60 * GIB, 5 * GIB).budget(0.9) == pytest.approx(25 * GIB)
    with pytest.raises(KVCacheTooSmall, match=r"0\.6 of 100\.0 GiB leaves nothing .* 60\.0 GiB are held .* a step takes 5\.0 GiB more"):
        MemoryProfile(100 * GIB, 60 * GIB, 5 * GIB).budget(0.6)


def test_the_largest_steps_fill_the_batch_with_chunks_and_with_the_longest_contexts() -> None:
    chunks, one_long, decodes = largest_steps(max_batch_tokens=50, max_num_seqs=4, max_model_len=1000, block_size=16)
    assert [row.num_tokens for row in chunks] == [12] * 4
    assert [row.num_tokens for row in one_long] == [50]
    assert [(row.num_tokens, len(row.sequence.token_ids), len(row.sequence.full_block_ids)) for row in decodes] == [(1, 1000, 63)] * 4
    assert all(row.draws_token for step in (chunks, one_long, decodes) for row in step)


def test_the_pools_get_what_a_profile_leaves(checkpoint_dir: Callable[[str], Path]) -> None:
    backend = load(checkpoint_dir("four_ranks"), SingleRank(), memory := PlayedMemory())
    facts = backend.facts
    per_layer = 2 * 16 * 4 * 32 * 4  # keys and values, tokens, heads, head_dim, float32; one layer in each pool
    assert memory.num_profiles == 1
    assert 40_000_000 - 2 * per_layer < (facts.num_full_blocks + facts.num_window_blocks) * per_layer <= 40_000_000


def test_the_rank_with_the_least_memory_decides_for_all(checkpoint_dir: Callable[[str], Path]) -> None:
    model_dir = checkpoint_dir("four_ranks")
    loaded: dict[int, ModelBackend] = {}

    def load_one(ranks: TensorParallel) -> ModelBackend:
        loaded[ranks.rank] = load(model_dir, ranks, PlayedMemory(extra_mb=10 if ranks.rank == 1 else 0))
        return loaded[ranks.rank]

    with rank_threads(2, load_one, lambda backend: Limits(backend.facts, 64, 3)):
        pass
    one, other = (loaded[rank].facts for rank in range(2))
    assert one == other
    per_layer = 2 * 16 * 2 * 32 * 4
    assert (one.num_full_blocks + one.num_window_blocks) * per_layer <= 30_000_000


def test_a_gpu_that_holds_no_sequence_is_told_before_serving(checkpoint_dir: Callable[[str], Path]) -> None:
    with pytest.raises(KVCacheTooSmall, match="leaves nothing for keys and values"):
        load(checkpoint_dir("four_ranks"), SingleRank(), PlayedMemory(), utilization=0.45)
    with pytest.raises(KVCacheTooSmall, match="one sequence needs at least 1 and 9"):
        load(checkpoint_dir("four_ranks"), SingleRank(), PlayedMemory(), utilization=0.501)
