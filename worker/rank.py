"""One rank of a group that computes with the model: its place among the ranks, its weights, and the loop of those that follow rank 0.

Rank 0 lives in the worker's main process and loads itself with `load_rank`. The others run this file as `python -m worker.rank`, started by
`rank_group`, and die with rank 0.
"""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from services.process import EXIT_FAILED, StartError
from services.telemetry import configure_logging, get_logger
from worker.checkpoint import Checkpoint, CheckpointError
from worker.config import WorkerConfig
from worker.kv_cache import KVCacheTooSmall
from worker.load_progress import LoadProgress, StartProgress
from worker.manifest import verify_files
from worker.model_start import load_model_backend
from worker.plan_draft import Limits
from worker.runner import ModelBackend
from worker.self_check import SelfCheckFailed
from worker.sequence_table import SequenceTable
from worker.step_broadcast import follow
from worker.tensor_parallel import ShardPlanError, SingleRank, TensorParallel, join_group, plan_shards

log = get_logger(__name__)

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class LoadedRank:
    """A rank that can compute."""

    backend: ModelBackend
    ranks: TensorParallel


def check_model(config: WorkerConfig, progress: StartProgress) -> None:
    """Raises StartError before any rank starts: where there are too few GPUs, or the checkpoint is not whole or cannot be divided."""
    assert config.model_dir is not None
    if config.device == "cuda":
        _check_gpus(config.tensor_parallel_size)
    try:
        with Checkpoint(config.model_dir) as checkpoint:
            plan_shards(checkpoint.config, rank=0, size=config.tensor_parallel_size)
        if config.verify_weights != "off":
            verify_files(config.model_dir, progress, is_required=config.verify_weights == "require")
    except (CheckpointError, ShardPlanError) as error:
        raise StartError(str(error)) from None


def _check_gpus(num_ranks: int) -> None:
    if not torch.cuda.is_available():
        raise StartError("--device cuda: no CUDA device and driver are visible; take --device cpu")
    if (num_visible := torch.cuda.device_count()) < num_ranks:
        raise StartError(f"--tensor-parallel-size {num_ranks}: only {num_visible} GPUs are visible; take fewer ranks")


def load_rank(config: WorkerConfig, rank: int, rendezvous: Path | None, progress: StartProgress) -> LoadedRank:
    """Joins the group and loads this rank's slice. Call it on the thread that will run the steps: torch counts threads per caller.

    Raises StartError, one line with the cure.
    """
    assert config.model_dir is not None
    torch.set_num_threads(config.threads_per_rank)
    if config.device == "cuda":
        torch.cuda.set_device(rank)
    ranks = join_ranks(config, rank, rendezvous)
    try:
        backend = load_model_backend(
            config.model_dir,
            tensor_parallel=ranks,
            device=config.device,
            dtype=config.torch_dtype,
            block_size=config.block_size,
            num_full_blocks=config.num_full_blocks or None,
            num_window_blocks=config.num_window_blocks or None,
            kv_cache_bytes=config.kv_cache_bytes,
            swap_space_bytes=config.swap_space_bytes,
            max_model_len=config.max_model_len or None,
            max_batch_tokens=config.max_batch_tokens,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            use_graphs=config.cuda_graphs,
            progress=progress,
        )
    except (CheckpointError, ShardPlanError, KVCacheTooSmall, SelfCheckFailed) as error:
        raise StartError(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise StartError(
            f"the GPU of rank {rank} cannot hold its part of the model ({str(error).splitlines()[0]}); take more ranks"
        ) from None
    return LoadedRank(backend, ranks)


def join_ranks(config: WorkerConfig, rank: int, rendezvous: Path | None) -> TensorParallel:
    """Waits for the group's other ranks; a group of one has no rendezvous."""
    if rendezvous is None:
        return SingleRank()
    size, device = config.tensor_parallel_size, config.device
    return join_group(rendezvous, rank=rank, size=size, device=device, start_timeout_s=config.start_timeout_s)


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent ends, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before we asked
        os._exit(EXIT_FAILED)


def run_follower(rank: int, rendezvous: Path, parent_pid: int, config: WorkerConfig) -> None:
    """The life of a rank other than 0."""
    die_with_parent(parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole process group; rank 0 drains and then says stop
        signal.signal(number, signal.SIG_IGN)
    configure_logging(f"worker-rank-{rank}", config.log_level)
    loaded = load_rank(config, rank, rendezvous, LoadProgress(rank))
    log.info("rank_ready", rank=rank, pid=os.getpid())
    limits = Limits(loaded.backend.facts, config.max_batch_tokens, config.max_num_seqs)
    follow(loaded.ranks, loaded.backend, SequenceTable(limits))
    loaded.ranks.close()


def main(argv: list[str]) -> int:
    rank, rendezvous, parent_pid, config = argv
    try:
        run_follower(int(rank), Path(rendezvous), int(parent_pid), WorkerConfig.model_validate_json(config))
    except StartError as error:
        print(f"ossia worker, rank {rank}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
