"""Groups of several ranks with a real checkpoint: one answer however many ranks, and one death for all."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worker.owner import Owner, admit, connect, make_plan
from tests.worker.worker_process import END_TIMEOUT_S, WorkerProcess, wait_dead, worker_process
from worker.self_check import REFERENCE

NUM_TOKENS = 12
PROMPT = list(range(5, 45))
RANKS_BY = """
import os, sys
from worker.__main__ import main
sys.executable = sys.argv.pop(1)  # what the other ranks are started with
os._exit(main(sys.argv[1:]))
"""


def flags(model_dir: Path, size: int) -> tuple[str, ...]:
    sizes = {"--num-full-blocks": 64, "--num-window-blocks": 64, "--max-model-len": 512, "--num-threads": 1, "--tensor-parallel-size": size}
    return ("--model-dir", str(model_dir), *(text for name, value in sizes.items() for text in (name, str(value))))


async def draw(worker: WorkerProcess) -> list[list[int]]:
    """Two streams one after the other: the first is cancelled with its sequence held."""
    async with connect(worker.address) as stub:
        first = Owner(stub)
        drawn = await first.generate(1, PROMPT, NUM_TOKENS)
        first.call.cancel()
        return [drawn, await Owner(stub).generate(1, PROMPT, NUM_TOKENS)]


async def test_ranks_draw_what_one_rank_draws(checkpoint_dir: Callable[[str], Path]) -> None:
    drawn = {}
    for size in (1, 2):
        async with worker_process(*flags(checkpoint_dir("four_ranks"), size)) as worker:
            await worker.wait_serving()
            drawn[size] = await draw(worker)
            pids = [await worker.wait_rank(rank) for rank in range(1, size)]
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.wait_end() == (0, [])
            for pid in pids:
                wait_dead(pid)
    assert drawn[1][0] == drawn[1][1] == drawn[2][0] == drawn[2][1]
    assert len(set(drawn[1][0])) > 1


@pytest.mark.parametrize("is_busy", [False, True])
async def test_the_death_of_a_rank_ends_the_group_with_one_line(checkpoint_dir: Callable[[str], Path], is_busy: bool) -> None:
    async with worker_process(*flags(checkpoint_dir("four_ranks"), 2)) as worker:
        await worker.wait_serving()
        async with connect(worker.address) as stub:
            owner, rank_1 = Owner(stub), await worker.wait_rank(1)
            if is_busy:  # rank 1 does not answer, so rank 0 waits for it in the midst of the step
                os.kill(rank_1, signal.SIGSTOP)
                await owner.send(make_plan(1, {1: len(PROMPT)}, admitted=[admit(1, PROMPT, range(3), range(3))]))
            os.kill(rank_1, signal.SIGKILL)
            code, lines = await worker.wait_end()
    assert code == 1
    assert [line for line in lines if "rank 1 ended by signal 9" in line] == lines[-1:]
    assert is_busy or len(lines) == 1, lines


async def test_the_death_of_rank_0_ends_the_others(checkpoint_dir: Callable[[str], Path]) -> None:
    async with worker_process(*flags(checkpoint_dir("four_ranks"), 2)) as worker:
        await worker.wait_serving()
        rank_1 = await worker.wait_rank(1)
        worker.process.kill()
        wait_dead(rank_1)


async def test_a_death_while_loading_ends_the_start(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """A rank that never comes is certainly not beyond its loading when it is killed."""
    late = tmp_path / "late"
    late.write_text(f"#!/bin/sh\nexec sleep {END_TIMEOUT_S:g}\n")
    late.chmod(0o755)
    async with worker_process(str(late), *flags(checkpoint_dir("four_ranks"), 2), start=("-c", RANKS_BY)) as worker:
        pid = await worker.wait_rank(1)
        os.kill(pid, signal.SIGKILL)
        code, lines = await worker.wait_end()
        assert worker.process.stdout is not None
        assert await worker.process.stdout.read() == b""
    assert code == 1
    assert "rank 1 ended by signal 9" in lines[-1]


async def test_a_checkpoint_with_a_truncated_file_ends_in_one_line(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    source, broken = checkpoint_dir("four_ranks"), tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    async with worker_process(*flags(broken, 2)) as worker:
        code, lines = await worker.wait_end()
    assert code == 1
    assert len(lines) == 1, lines
    assert "broken" in lines[0]


async def test_a_group_that_computes_something_else_never_serves(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir = shutil.copytree(checkpoint_dir("four_ranks"), tmp_path / "model")
    (model_dir / REFERENCE).write_text('{"references": [{"prompt": [1, 2], "token_ids": [3], "logits": [1e9]}]}')
    async with worker_process(*flags(model_dir, 2)) as worker:
        code, lines = await worker.wait_end()
        assert worker.process.stdout is not None
        told = [json.loads(line) for line in (await worker.process.stdout.read()).splitlines() if line.startswith(b"{")]
    assert code == 1
    assert len(lines) == 1 and "self-check failed" in lines[0], lines
    assert {one["event"] for one in told} == {"starting"}
    phases = [one["message"] for one in told]
    assert {f"rank {rank}: {phase}" for rank in (0, 1) for phase in ("loading", "warming up", "checking itself")} <= set(phases)
    assert any("MiB, " in phase and "GB/s" in phase for phase in phases if phase.startswith("rank 1: loading,"))


async def test_a_model_that_does_not_divide_ends_in_one_line(checkpoint_dir: Callable[[str], Path]) -> None:
    async with worker_process(*flags(checkpoint_dir("wide_heads"), 4)) as worker:
        code, lines = await worker.wait_end()
    assert code == 1
    assert len(lines) == 1, lines
    assert "tensor_parallel_size" in lines[0]
