"""How much of a checkpoint each rank of a tensor-parallel group reads, and in how much memory: real processes, as the kernel counts them.

Makes a checkpoint with the widths of gpt-oss-120b (hidden and intermediate 2880, 64 and 8 heads, 201,088 tokens) but few layers and
experts, drops it from the page cache, and starts a group on it. `--plan` prints what each rank of the published models holds instead,
from their sizes alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.report import Report, finish, parser
from worker.checkpoint import expected_tensors
from worker.checkpoint_maker import CheckpointSpec, random_tensor, write_checkpoint
from worker.config import WorkerConfig
from worker.load_progress import StartProgress
from worker.model_config import ModelConfig, parse_config
from worker.rank import load_rank
from worker.shard_sizes import measure_shard
from worker.tensor_parallel import plan_shards

PUBLISHED = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}  # layers, experts
REPEATED_ROWS = 1024  # of the embedding: random ones, again and again, so that writing them takes no minutes


@dataclass(frozen=True)
class Loaded:
    """What one rank tells of its load."""

    bytes_asked: int  # slices, exactly
    bytes_fetched: int  # from the disk, by whole pages; what another rank fetched before is not counted again
    anonymous_bytes: int  # memory of its own when all was loaded
    peak_bytes: int  # the most resident at once, pages of the files included
    load_s: float


def thin_spec(layers: int, experts: int) -> CheckpointSpec:
    return CheckpointSpec(
        num_hidden_layers=layers,
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_local_experts=experts,
    )


def config_of(spec: CheckpointSpec) -> ModelConfig:
    return parse_config(spec.config_json(), spec.generation_config_json())


def make_thin(directory: Path, spec: CheckpointSpec) -> None:
    config = config_of(spec)

    def tensor(name: str) -> Tensor:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            return random_tensor(name, config, 0)
        rows = torch.randn(REPEATED_ROWS, spec.hidden_size, generator=torch.Generator().manual_seed(len(name))).bfloat16()
        return rows.repeat(-(-spec.vocab_size // REPEATED_ROWS), 1)[: spec.vocab_size]

    write_checkpoint(directory, spec, tensor)


def drop_cached(directory: Path) -> None:
    """The files' pages leave memory, so that what is read is fetched again."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start_group(directory: Path, size: int) -> list[Loaded]:
    """Loads a group of real processes; what each rank told, by rank."""
    with tempfile.TemporaryDirectory() as rendezvous:
        command = [sys.executable, "-m", "benchmarks.tp_load", "--rank"]
        arguments = [[str(rank), str(size), str(directory), rendezvous] for rank in range(size)]
        ranks = [subprocess.Popen([*command, *one], stdout=subprocess.PIPE, text=True) for one in arguments]
        try:
            told = [rank.communicate()[0].splitlines() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    return [Loaded(**json.loads(lines[-1])) for lines in told]


class Asked(StartProgress):
    """Remembers the bytes that were read."""

    num_bytes = 0

    def note_bytes(self, num_done: int, num_all: int) -> None:
        self.num_bytes = num_done


def load_one(rank: int, size: int, directory: Path, rendezvous: Path) -> Loaded:
    """The life of one measured rank."""
    config = WorkerConfig(
        model_dir=directory,
        tensor_parallel_size=size,
        num_threads=1,
        dtype="bfloat16",
        num_full_blocks=16,
        num_window_blocks=16,
        max_model_len=256,
    )
    asked = Asked()
    fetched_before, start = _read_bytes(), perf_counter()
    loaded = load_rank(config, rank, rendezvous if size > 1 else None, asked)
    load_s = perf_counter() - start
    told = Loaded(
        bytes_asked=asked.num_bytes,
        bytes_fetched=_read_bytes() - fetched_before,
        anonymous_bytes=_status("RssAnon"),
        peak_bytes=_status("VmHWM"),
        load_s=load_s,
    )
    loaded.ranks.close()
    return told


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(layers: int, experts: int, size: int) -> Report:
    spec = thin_spec(layers, experts)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "thin"
        make_thin(directory, spec)
        drop_cached(directory)
        told = start_group(directory, size)
    config = config_of(spec)
    whole = measure_shard(config, plan_shards(config, rank=0, size=1))
    report = Report(
        f"{layers} layers and {experts} experts of gpt-oss-120b's widths ({whole.total / 1e9:.2f} GB) on {size} ranks",
        ("rank", "blocks of 90", "experts MB", "share of all", "asked MB", "fetched MB", "own MB", "peak MB", "seconds"),
    )
    for rank, one in enumerate(told):
        plan = plan_shards(config, rank=rank, size=size)
        shard = measure_shard(config, plan)
        assert one.bytes_asked == shard.total, "a rank read what is not its own"
        report.add(
            rank,
            len(plan.intermediate) // 32,
            f"{shard.experts / 1e6:.1f}",
            f"1/{whole.experts / shard.experts:.2f}",
            *(f"{count / 1e6:,.1f}" for count in (one.bytes_asked, one.bytes_fetched, one.anonymous_bytes, one.peak_bytes)),
            f"{one.load_s:.1f}",
        )
    report.figures |= {
        "num_ranks": size,
        "checkpoint_bytes": whole.total,
        "largest_expert_share_ratio": max(measure_shard(config, plan_shards(config, rank=rank, size=size)).experts for rank in range(size))
        / whole.experts,
        "most_asked_bytes": max(one.bytes_asked for one in told),
        "all_fetched_bytes": sum(one.bytes_fetched for one in told),
        "most_anonymous_bytes": max(one.anonymous_bytes for one in told),
        "most_peak_bytes": max(one.peak_bytes for one in told),
    }
    return report


def plan(size: int) -> Report:
    """What each rank of the published models holds."""
    report = Report(
        f"Bytes of each rank, {size} ranks", ("model", "rank", "blocks of 90", "experts", "heads", "vocabulary", "whole", "all")
    )
    for name, (layers, experts) in PUBLISHED.items():
        config = config_of(thin_spec(layers, experts))
        assert len(expected_tensors(config)) == 19 * layers + 3
        for rank in range(size):
            shares = plan_shards(config, rank=rank, size=size)
            shard = measure_shard(config, shares)
            cells = (*asdict(shard).values(), shard.total)
            report.add(
                name,
                rank,
                len(shares.intermediate) // 32,
                *(f"{count / 1e6:,.1f}" for count in cells),
                **{f"{name}_rank_{rank}_bytes": shard.total},
            )
    return report


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--size", type=int, default=8, help="ranks: 1, 2, 4 or 8")
    flags.add_argument("--layers", type=int, default=2)
    flags.add_argument("--experts", type=int, default=16)
    flags.add_argument("--plan", action="store_true", help="print the shares of the published models; loads nothing")
    flags.add_argument("--rank", nargs=4, metavar=("RANK", "SIZE", "DIR", "RENDEZVOUS"), help="be one rank (what the command starts)")
    given = flags.parse_args()
    if given.rank:
        rank, size, directory, rendezvous = given.rank
        print(json.dumps(asdict(load_one(int(rank), int(size), Path(directory), Path(rendezvous)))))
        return
    finish(plan(given.size) if given.plan else measure(given.layers, given.experts, given.size), given.json)


if __name__ == "__main__":
    main()
