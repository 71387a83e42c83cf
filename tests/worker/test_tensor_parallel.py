"""Shard plans, and real groups of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.worker import greedy
from tests.worker.checkpoints import SPECS
from worker.checkpoint_maker import CheckpointSpec
from worker.model_config import ModelConfig, parse_config
from worker.tensor_parallel import ShardPlanError, join_group, plan_shards


def _config(spec: CheckpointSpec) -> ModelConfig:
    return parse_config(spec.config_json(), spec.generation_config_json())


def _run_group(model_dir: Path, group_dir: Path, size: int) -> list[list[list[int]]]:
    """The tokens that each rank drew."""
    group_dir.mkdir()
    outputs = [group_dir / f"{rank}.json" for rank in range(size)]
    arguments = [[str(model_dir), str(group_dir), str(rank), str(size), str(output)] for rank, output in enumerate(outputs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, str(greedy.__file__), *argument], env=environment) for argument in arguments]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads(output.read_text()) for output in outputs]


def test_1_2_and_4_ranks_draw_the_same_tokens(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    alone, *_ = _run_group(checkpoint_dir("four_ranks"), tmp_path / "1", 1)
    assert len({token for tokens in alone for token in tokens}) > 20
    for size in (2, 4):
        for tokens in _run_group(checkpoint_dir("four_ranks"), tmp_path / str(size), size):
            assert tokens == alone


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_together_hold_every_part_once(size: int) -> None:
    config = _config(SPECS["four_ranks"])
    plans = [plan_shards(config, rank=rank, size=size) for rank in range(size)]
    for part, total in (
        ("query_heads", config.num_attention_heads),
        ("kv_heads", config.num_key_value_heads),
        ("vocabulary", config.vocab_size),
        ("intermediate", config.intermediate_size),
    ):
        assert [index for plan in plans for index in getattr(plan, part)] == list(range(total))


def test_published_experts_are_dealt_in_whole_blocks_to_8_ranks() -> None:
    config = _config(CheckpointSpec(hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8))
    shares = [plan_shards(config, rank=rank, size=8).intermediate for rank in range(8)]
    assert sum(map(len, shares)) == 2880
    assert {len(share) for share in shares} == {11 * 32, 12 * 32}
    assert all(share.start % 32 == 0 for share in shares)


def test_a_model_that_does_not_divide_is_refused_with_the_sizes_that_do() -> None:
    config = _config(replace(SPECS["four_ranks"], num_key_value_heads=2, vocab_size=1022))
    with pytest.raises(ShardPlanError, match=r"num_key_value_heads is 2, vocab_size is 1022\): take 1 or 2\."):
        plan_shards(config, rank=0, size=4)


def test_a_rank_waits_for_the_others_no_longer_than_asked(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"Not all of the group's 2 ranks came within 0\.2 s"):
        join_group(tmp_path, rank=0, size=2, device="cpu", start_timeout_s=0.2)
