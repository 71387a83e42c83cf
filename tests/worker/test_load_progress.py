"""A start tells how far it is, with its rate and the time left, a few times for each phase."""

import json

import pytest

from worker.load_progress import LoadProgress


def test_bytes_come_with_their_rate_and_the_time_left() -> None:
    now, told, counted = 0.0, [], []
    progress = LoadProgress(3, lambda *count: counted.append(count), clock=lambda: now, tell=told.append)
    progress.begin("loading")
    for done in range(0, 8_001, 4):
        now = done / 400
        progress.note_bytes(done * 2**20, 8_000 * 2**20)
    assert told[0] == "rank 3: loading"
    assert told[6] == "rank 3: loading, 4,000 of 8,000 MiB, 0.42 GB/s, 10 s left"
    assert told[-1] == "rank 3: loading, 8,000 of 8,000 MiB, 0.42 GB/s, 0 s left"
    assert len(told) == 12 and len(counted) == 2001


def test_every_phase_begins_anew_and_only_loading_counts_as_loaded() -> None:
    told: list[str] = []
    counted: list[tuple[int, int]] = []
    progress = LoadProgress(0, lambda *count: counted.append(count), clock=lambda: 1.0, tell=told.append)
    progress.begin("verifying")
    progress.note_bytes(10, 10)
    progress.begin("capturing graphs")
    for done in range(1, 41):
        progress.note_count(done, 40)
    assert counted == []
    assert told[2] == "rank 0: capturing graphs"
    assert told[-1] == "rank 0: capturing graphs, 40 of 40" and len(told) == 3 + 11


def test_by_default_it_goes_to_whoever_started_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    LoadProgress(1).begin("warming up")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"event": "starting", "message": "rank 1: warming up"}
