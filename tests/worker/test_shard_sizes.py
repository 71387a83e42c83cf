"""What each rank holds of the published models, to the byte, and that it reads no more than that."""

from pathlib import Path

import pytest
import torch

from tests.worker.thread_ranks import Meeting, ThreadRank
from worker.checkpoint import Checkpoint, expected_tensors
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint
from worker.model_config import ModelConfig, parse_config
from worker.model_loader import load_model
from worker.shard_sizes import ShardSizes, measure_shard, tensor_slices
from worker.tensor_parallel import plan_shards

WIDTHS = {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8}
MODELS = {
    "gpt-oss-20b": CheckpointSpec(num_hidden_layers=24, num_local_experts=32, **WIDTHS),  # type: ignore[arg-type]  # all are int
    "gpt-oss-120b": CheckpointSpec(num_hidden_layers=36, num_local_experts=128, **WIDTHS),  # type: ignore[arg-type]  # all are int
}
WHOLE_BYTES = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}


def config_of(spec: CheckpointSpec) -> ModelConfig:
    return parse_config(spec.config_json(), spec.generation_config_json())


def shards_of(config: ModelConfig, size: int) -> list[ShardSizes]:
    return [measure_shard(config, plan_shards(config, rank=rank, size=size)) for rank in range(size)]


def test_the_shares_of_120b_between_8_ranks_are_known_to_the_byte() -> None:
    """11 or 12 of an expert's 90 blocks; padding each share to 12 would add 6 blocks to the 90, 4.1 GB of nothing."""
    config = config_of(MODELS["gpt-oss-120b"])
    eleven = ShardSizes(experts=7_451_541_504, attention=238_925_376, vocabulary=289_566_720, whole=53_721_216)
    twelve = ShardSizes(experts=8_128_954_368, attention=238_925_376, vocabulary=289_566_720, whole=53_721_216)
    assert shards_of(config, 8) == [eleven, eleven, eleven, twelve] * 2
    assert (eleven.total, twelve.total) == (8_033_754_816, 8_711_167_680)
    assert twelve.experts * 8 - sum(shard.experts for shard in shards_of(config, 8)) == 4_064_477_184


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shares_add_up_to_the_published_size(name: str, size: int) -> None:
    shards = shards_of(config_of(MODELS[name]), size)
    assert len({shard.whole for shard in shards}) == 1
    assert sum(shard.total for shard in shards) - (size - 1) * shards[0].whole == WHOLE_BYTES[name]
    most, least = (pick(shard.experts for shard in shards) for pick in (max, min))
    assert most - least in (0, shards[0].experts // (90 // size)), "shares differ by one block at most"


@pytest.fixture(scope="module")
def thin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with the published number of blocks in an expert."""
    spec = CheckpointSpec(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=2880,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=512,
    )
    directory = tmp_path_factory.mktemp("thin") / "model"
    make_checkpoint(directory, spec, 3)
    return directory


@pytest.mark.parametrize("rank", range(8))
def test_each_of_8_ranks_reads_its_part_of_the_files_and_no_more(thin_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}
    done: list[tuple[int, int]] = []
    real_read = Checkpoint.read

    def note(checkpoint: Checkpoint, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        tensor = real_read(checkpoint, name, slices)
        read[name] = tensor.nbytes
        return tensor

    monkeypatch.setattr(Checkpoint, "read", note)
    with Checkpoint(thin_dir) as checkpoint:
        config = checkpoint.config
        plan = plan_shards(config, rank=rank, size=8)
        ranks, cpu = ThreadRank(rank, 8, Meeting(8)), torch.device("cpu")
        load_model(checkpoint, plan, ranks, dtype=torch.float32, device=cpu, progress=lambda *told: done.append(told))
    expected, slices = measure_shard(config, plan), tensor_slices(config, plan)
    divided = [name for name, parts in slices.items() if ".experts." in name and parts != (slice(None),) * len(parts)]
    assert read.keys() == expected_tensors(config).keys()
    assert sum(read[name] for name in divided) == expected.experts
    assert sum(read.values()) == expected.total == done[-1][0] == done[-1][1]
