"""SIGTERM under load: every stream that is open comes to its end, and the process ends well within its grace."""

import asyncio
from pathlib import Path

from benchmarks.drain import DRAIN_S, HELD_BY, drain_in_turn, write_script

NUM_CLIENTS, NUM_WORDS, STEP_MS = 8, 100, 5.0


def test_no_stream_breaks_when_edge_scheduler_and_worker_are_drained_in_turn(tmp_path: Path) -> None:
    write_script(tmp_path / "script.yaml", NUM_WORDS)
    results = asyncio.run(drain_in_turn(tmp_path / "script.yaml", STEP_MS, NUM_CLIENTS))
    assert [one.name.partition("-")[0] for one in results] == list(HELD_BY)
    for drained in results:
        assert drained.num_open and drained.num_held, drained
        assert (drained.num_broken, drained.exit_code) == (0, 0), drained
        assert drained.exit_s < DRAIN_S, drained
