"""What a worker is told: flags `--like-this`, or environment variables OSSIA_WORKER_LIKE_THIS."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.config import Address, ConfigError, ProcessConfig

GIB = 1024**3
CPU_KV_CACHE_GIB = 1.0


class WorkerConfig(ProcessConfig):
    """One worker group. What is learned at start, such as the number of KV blocks, is in `ModelFacts`."""

    model_config = SettingsConfigDict(env_prefix="OSSIA_WORKER_", cli_prog_name="ossia worker")

    backend: Annotated[str, Field(pattern="^(model|scripted)$", description="what computes steps: model or scripted")] = "model"
    model_dir: Annotated[Path | None, Field(description="directory of the checkpoint; needed by the model backend")] = None
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$", description="name under which it is served")] = "gpt-oss"
    group_id: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{0,63}$", description="name of this group; empty: drawn at start")] = ""
    listen: Annotated[Address, Field(description="host:port of the gRPC service; port 0 takes a free one")] = "127.0.0.1:0"
    advertise_host: Annotated[str, Field(description="host at which schedulers reach this worker; empty: that of --listen")] = ""

    tensor_parallel_size: Annotated[int, Field(ge=1, le=8, description="ranks of the group: 1, 2, 4 or 8")] = 1
    device: Annotated[str, Field(pattern="^(cpu|cuda)$", description="cpu or cuda")] = "cpu"
    dtype: Annotated[str, Field(pattern="^(auto|float32|bfloat16)$", description="auto: float32 on cpu, bfloat16 on cuda")] = "auto"
    num_threads: Annotated[int, Field(ge=0, le=1024, description="CPU threads of each rank; 0: cores / ranks")] = 0
    start_timeout_s: Annotated[float, Field(gt=0, le=3600, description="seconds that the ranks wait for each other at start")] = 120.0

    step_timeout_s: Annotated[
        float,
        Field(gt=0, le=3600, description="a step that takes longer means a hung group: /livez turns bad, so that it is started again"),
    ] = 120.0

    block_size: Annotated[int, Field(ge=1, le=256, description="tokens per KV block")] = 16
    num_full_blocks: Annotated[int, Field(ge=0, le=2**31, description="blocks for full attention; 0: what --kv-cache-gib holds")] = 0
    num_window_blocks: Annotated[int, Field(ge=0, le=2**31, description="blocks for window attention; 0: what --kv-cache-gib holds")] = 0
    kv_cache_gib: Annotated[
        float | None,
        Field(
            gt=0,
            le=4096,
            description="GiB for keys and values, for each rank; unset: on cuda what --gpu-memory-utilization leaves, on cpu 1",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float, Field(gt=0, le=1, description="share of each GPU that weights, the largest step, keys and values may take")
    ] = 0.9
    swap_space_gib: Annotated[float, Field(ge=0, le=4096, description="GiB of host memory behind the KV cache, for each rank")] = 0.0
    max_model_len: Annotated[
        int, Field(ge=0, le=2**24, description="tokens of prompt and completion; 0: what the model and cache hold")
    ] = 0
    cuda_graphs: Annotated[bool, Field(description="on cuda: decode by recorded graphs, of which each takes a moment at start")] = True
    verify_weights: Annotated[
        str,
        Field(
            pattern="^(auto|require|off)$", description="hash the files: auto where the folder has a SHA256SUMS; require: it must have one"
        ),
    ] = "auto"
    max_batch_tokens: Annotated[int, Field(ge=1, le=2**20, description="tokens per step, over all sequences")] = 2048
    max_num_seqs: Annotated[int, Field(ge=1, le=4096, description="sequences held at once")] = 64

    script: Annotated[Path | None, Field(description="YAML rules of the scripted backend; unset: one fixed answer")] = None
    script_host_blocks: Annotated[int, Field(ge=0, le=2**24, description="host blocks of the scripted backend, in each pool")] = 0
    script_sliding_window: Annotated[int, Field(ge=1, le=2**20, description="window that the scripted backend checks, in tokens")] = 128
    step_ms: Annotated[float, Field(ge=0, le=60_000, description="scripted: milliseconds of every step")] = 0.0
    prefill_token_ms: Annotated[float, Field(ge=0, le=60_000, description="scripted: milliseconds more for each prefill token")] = 0.0
    sequence_ms: Annotated[float, Field(ge=0, le=60_000, description="scripted: milliseconds more for each sequence")] = 0.0

    def check(self) -> None:
        """What no field can tell alone. Raises ConfigError with one line for each fault."""
        faults = {
            "--model-dir: name the checkpoint's directory, or take --backend scripted": self.backend == "model" and self.model_dir is None,
            "--tensor-parallel-size: must be 1 with --backend scripted": self.backend == "scripted" and self.tensor_parallel_size > 1,
            "--tensor-parallel-size: must be 1, 2, 4 or 8": self.tensor_parallel_size not in (1, 2, 4, 8),
            "--script: takes --backend scripted": self.backend != "scripted" and self.script is not None,
        }
        if lines := [fault for fault, holds in faults.items() if holds]:
            raise ConfigError("\n".join(lines))

    @property
    def threads_per_rank(self) -> int:
        return self.num_threads or max(1, len(os.sched_getaffinity(0)) // self.tensor_parallel_size)

    @property
    def torch_dtype(self) -> str:
        return {"cpu": "float32", "cuda": "bfloat16"}[self.device] if self.dtype == "auto" else self.dtype

    @property
    def swap_space_bytes(self) -> int:
        return int(self.swap_space_gib * GIB)

    @property
    def kv_cache_bytes(self) -> int | None:
        """None: to be found out by a profile."""
        if self.kv_cache_gib is None and self.device == "cuda":
            return None
        return int((self.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB)
