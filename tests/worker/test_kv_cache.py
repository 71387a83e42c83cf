"""Pools, copies between blocks, and how a byte budget is divided."""

from dataclasses import replace

import pytest
import torch

from tests.worker.checkpoints import SPECS
from worker.backend import BlockCopy
from worker.kv_cache import KVCache, KVCacheLayout, KVCacheTooSmall, block_bytes, blocks_per_window, size_kv_cache
from worker.model_config import FULL, ModelConfig, parse_config


@pytest.fixture
def config() -> ModelConfig:
    spec = SPECS["wide_heads"]  # layers: window, full, window
    return parse_config(spec.config_json(), spec.generation_config_json())


def _size(config: ModelConfig, budget_bytes: int, **blocks: int | None) -> KVCacheLayout:
    return size_kv_cache(
        config,
        block_size=16,
        num_kv_heads=2,
        dtype=torch.float32,
        budget_bytes=budget_bytes,
        max_batch_tokens=512,
        max_num_seqs=4,
        num_full_blocks=blocks.get("full"),
        num_window_blocks=blocks.get("window"),
    )


def test_each_layer_has_its_own_place_in_its_pool(config: ModelConfig) -> None:
    cache = KVCache(config, KVCacheLayout(4, 5, 7), num_kv_heads=2, dtype=torch.float32, device=torch.device("cpu"))
    for index in range(3):
        for offset, part in enumerate(cache.layer(index)):
            part.fill_(2 * index + offset)
    assert [cache.layer(index)[0].shape[0] for index in range(3)] == [7 + 1, 5 + 1, 7 + 1]
    assert [set(part.flatten().tolist()) for index in range(3) for part in cache.layer(index)] == [{i} for i in range(6)]


def test_a_copy_moves_keys_and_values_of_one_pool_and_sees_earlier_copies(config: ModelConfig) -> None:
    cache = KVCache(config, KVCacheLayout(4, 5, 7), num_kv_heads=2, dtype=torch.float32, device=torch.device("cpu"))
    cache.full.copy_(torch.arange(6).view(1, 1, 6, 1, 1, 1).expand_as(cache.full))
    cache.window.copy_(torch.arange(8).view(1, 1, 8, 1, 1, 1).expand_as(cache.window))
    cache.copy_blocks([BlockCopy(False, 4, 0), BlockCopy(False, 0, 1), BlockCopy(True, 6, 2)])
    assert cache.full[0, 1, :, 3, 1, 5].tolist() == [4, 4, 2, 3, 4, 5]
    assert cache.window[1, 0, :, 0, 0, 0].tolist() == [0, 1, 6, 3, 4, 5, 6, 7]


def test_host_memory_takes_a_block_in_and_gives_it_back(config: ModelConfig) -> None:
    cache = KVCache(config, KVCacheLayout(4, 5, 7, 3), num_kv_heads=2, dtype=torch.float32, device=torch.device("cpu"))
    for is_window, pool in ((False, cache.full), (True, cache.window)):
        before = pool.normal_().clone()
        cache.copy_blocks([BlockCopy(is_window, 2, 1, target_on_host=True)])
        pool.zero_()
        cache.copy_blocks([BlockCopy(is_window, 1, 4, source_on_host=True)])
        assert torch.equal(pool[:, :, 4], before[:, :, 2]) and not pool[:, :, :4].any()


@pytest.mark.parametrize("budget_bytes", [1 << 20, 1 << 22, 1 << 25])
def test_the_budget_is_used_but_never_exceeded(config: ModelConfig, budget_bytes: int) -> None:
    layout = _size(config, budget_bytes)
    full_bytes, window_bytes = block_bytes(config, block_size=16, num_kv_heads=2, dtype=torch.float32)
    used = layout.num_full_blocks * full_bytes + layout.num_window_blocks * window_bytes
    assert budget_bytes - full_bytes < used <= budget_bytes


def test_a_large_budget_has_window_blocks_for_every_running_sequence_and_for_cached_prefixes(config: ModelConfig) -> None:
    layout = _size(config, 1 << 25)
    assert layout.num_window_blocks >= 4 * blocks_per_window(config, 16) + 512 // 16
    assert layout.num_window_blocks >= layout.num_full_blocks // 5


def test_numbers_of_blocks_that_are_given_stay(config: ModelConfig) -> None:
    assert _size(config, 0, full=20, window=30) == KVCacheLayout(16, 20, 30)
    assert _size(config, 1 << 22, full=20).num_full_blocks == 20
    assert _size(config, 1 << 22, window=30).num_window_blocks == 30


def test_a_model_without_window_layers_has_one_pool(config: ModelConfig) -> None:
    full_only = replace(config, layer_types=(FULL,) * 3, sliding_window=0)
    assert _size(full_only, 1 << 22).num_window_blocks == 0
    assert _size(full_only, 0, full=3, window=9) == KVCacheLayout(16, 3, 0)


def test_a_budget_that_holds_no_sequence_is_refused(config: ModelConfig) -> None:
    with pytest.raises(KVCacheTooSmall, match=r"needs at least 1 and 9: raise kv_cache_bytes"):
        _size(config, 1 << 17)


@pytest.mark.parametrize(("window", "blocks"), [(1, 1), (2, 2), (17, 2), (18, 3), (128, 9), (129, 9), (130, 10)])
def test_a_window_can_lie_across_this_many_blocks(config: ModelConfig, window: int, blocks: int) -> None:
    touched = max(len({(end - back) // 16 for back in range(window)}) for end in range(512, 528))
    assert blocks_per_window(replace(config, sliding_window=window), 16) == touched == blocks
