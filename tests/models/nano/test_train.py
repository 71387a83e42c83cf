import itertools
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.nano import train
from models.nano.cache import NANO_FILE
from models.nano.export import export, import_compact
from models.nano.network import Network
from models.nano.optimizer import orthogonalize
from models.nano.train import TrainConfig, run_rank, start_rank

CONFIG = TrainConfig(steps=2, minutes=60, tokens=150, held_out=2, seed=3, folder=Path(), ranks=1, initial=None, rate=1.0)


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "ROW_SAMPLE", 60)


def run(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The weights afterwards."""
    config.folder.mkdir(exist_ok=True)
    (config.folder / "rendezvous").unlink(missing_ok=True)
    run_rank(0, config)
    return load(config.folder / "state.0.pt")


def load(file: Path) -> dict[str, torch.Tensor]:
    masters: dict[str, torch.Tensor] = torch.load(file)["masters"]
    return masters


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(replace(CONFIG, folder=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("models.nano.train.time.monotonic", itertools.count().__next__)  # a second passes at every look at the clock
        stopped = {name: tensor.clone() for name, tensor in run(replace(CONFIG, folder=tmp_path / "parts", minutes=1.5 / 60)).items()}
    resumed = run(replace(CONFIG, folder=tmp_path / "parts"))
    assert any(not torch.equal(stopped[name], whole[name]) for name in whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_all_ranks_hold_the_same_weights(tmp_path: Path) -> None:
    network = Network(list(range(1000)), seed=5)
    before = network.masters()
    torch.save({"row_ids": network.row_ids, "masters": before, "seed": 5}, tmp_path / "initial.pt")
    config = replace(CONFIG, folder=tmp_path, ranks=2, steps=1, initial=tmp_path / "initial.pt")
    processes = [multiprocessing.get_context("spawn").Process(target=start_rank, args=(rank, config)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert torch.load(config.folder / "state.0.pt")["seed"] == 5, "the generated rows stay those that the weights know"
    one, other = (load(config.folder / f"state.{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(not torch.equal(one[name], before[name]) for name in one if "layers" in name and "_proj" in name)


def test_a_course_can_begin_with_the_file_in_the_repository(tmp_path: Path) -> None:
    state = import_compact(NANO_FILE)
    network = Network(state["row_ids"].tolist(), state["seed"])
    network.ship(state["masters"])
    torch.save(state, tmp_path / "state.pt")
    export(tmp_path / "state.pt", tmp_path / "again.safetensors")
    again = import_compact(tmp_path / "again.safetensors")["masters"]
    assert again.keys() == state["masters"].keys() and all(torch.equal(again[name], one) for name, one in state["masters"].items())
    run(replace(CONFIG, folder=tmp_path / "course", steps=1, initial=NANO_FILE))
    after = torch.load(tmp_path / "course" / "state.0.pt")
    assert after["masters"].keys() == network.masters().keys() and after["seed"] == state["seed"]
    moved = max((after["masters"][name] - one).abs().max().item() for name, one in network.masters().items() if not name.endswith("_proj"))
    assert 0 < moved < 0.01
    rows_moved = (after["masters"]["rows"] - state["masters"]["rows"]).abs().amax(-1)
    assert rows_moved.quantile(0.9) < 0.05 * rows_moved.max(), "rows that are not in the batch are hardly moved"


def test_a_direction_has_no_weak_side() -> None:
    matrix = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.logspace(0, -2, 64))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.5 and values.max() < 1.3
