"""From configuration to something that computes steps: the script, or the model on all ranks. Imports torch only for the model."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from services.process import StartError
from worker.backend import Backend
from worker.config import WorkerConfig
from worker.load_progress import LoadProgress
from worker.metrics import WorkerMetrics
from worker.rank_group import RankGroup
from worker.scripted.backend import ScriptedBackend, StepTimes
from worker.scripted.script import Script, ScriptError, read_script
from worker.step_broadcast import Ranks

SCRIPTED_MAX_MODEL_LEN, SCRIPTED_NUM_BLOCKS = 131_072, 16_384


@dataclass(frozen=True)
class Loaded:
    """A backend, and the ranks that must follow it (None: it is alone)."""

    backend: Backend
    ranks: Ranks | None = None


async def load_backend(config: WorkerConfig, group: RankGroup, thread: ThreadPoolExecutor, metrics: WorkerMetrics) -> Loaded:
    """Loads on `thread`, which runs the steps later. Raises StartError."""
    loop, progress = asyncio.get_running_loop(), LoadProgress(0, metrics.note_loading)
    if config.backend == "scripted":
        return Loaded(await loop.run_in_executor(thread, _load_scripted, config))
    await loop.run_in_executor(thread, _check_model, config, progress)
    await group.start(config)
    return await loop.run_in_executor(thread, _load_model, config, group.rendezvous, progress)


def _load_scripted(config: WorkerConfig) -> ScriptedBackend:
    try:
        script = read_script(config.script) if config.script else Script()
    except ScriptError as error:
        raise StartError(str(error)) from None
    return ScriptedBackend(
        script,
        StepTimes(config.step_ms, config.prefill_token_ms, config.sequence_ms),
        block_size=config.block_size,
        num_full_blocks=config.num_full_blocks or SCRIPTED_NUM_BLOCKS,
        num_window_blocks=config.num_window_blocks or SCRIPTED_NUM_BLOCKS,
        sliding_window=config.script_sliding_window,
        max_model_len=config.max_model_len or SCRIPTED_MAX_MODEL_LEN,
        num_host_blocks=config.script_host_blocks,
    )


# torch takes seconds to import, and a scripted worker may stand where it is not installed.


def _check_model(config: WorkerConfig, progress: LoadProgress) -> None:
    from worker.rank import check_model

    check_model(config, progress)


def _load_model(config: WorkerConfig, rendezvous: Path | None, progress: LoadProgress) -> Loaded:
    from worker.rank import load_rank

    rank = load_rank(config, 0, rendezvous, progress)
    return Loaded(rank.backend, rank.ranks if config.tensor_parallel_size > 1 else None)
