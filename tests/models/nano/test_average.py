import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from models.nano import average as command
from models.nano.average import average
from models.nano.export import import_compact
from models.nano.network import Network
from models.nano.spec import SPEC
from models.nano.train import read_weights


@cache
def weights() -> dict[str, torch.Tensor]:
    return Network(list(range(10)), seed=3).masters()


def save(file: Path, offset: int, rows_seed: int = 3) -> Path:
    masters = {name: one + offset for name, one in weights().items()}
    torch.save({"masters": masters, "row_ids": torch.arange(10), "seed": rows_seed}, file)
    return file


def test_each_weight_is_the_mean_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = save(tmp_path / "one.pt", 0), save(tmp_path / "other.pt", 4)
    states = [read_weights(one), read_weights(other)]
    averaged = average(states, [3, 1])
    for name, mean in averaged["masters"].items():
        torch.testing.assert_close(mean, states[0]["masters"][name] * 0.75 + states[1]["masters"][name] * 0.25)
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "mean.safetensors"), f"{one}:3", f"{other}:1"])
    command.main()
    written = import_compact(tmp_path / "mean.safetensors")
    assert written["seed"] == 3 and torch.equal(written["row_ids"], averaged["row_ids"])
    norm = f"layers.{SPEC.num_hidden_layers - 1}.input_layernorm.weight"
    assert torch.equal(written["masters"][norm], averaged["masters"][norm].bfloat16().float())


@pytest.mark.parametrize(
    ("rows_seed", "parts", "told"),
    [
        (4, "1", "have other rows"),
        (3, "0", "a part above 0"),
        (3, "nan", "a part above 0"),
        (3, "much", "is not a checkpoint and its part"),
        (None, "1", "No such file"),
    ],
)
def test_what_cannot_be_averaged_is_told_in_a_line(
    rows_seed: int | None, parts: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = save(tmp_path / "one.pt", 0), tmp_path / "other.pt"
    if rows_seed is not None:
        save(other, 0, rows_seed)
    file = tmp_path / "mean.safetensors"
    monkeypatch.setattr(sys, "argv", ["average", str(file), f"{one}:1", f"{other}:{parts}"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err and not file.exists()
