"""One model of the weights of several courses, of which each began with the one before (https://arxiv.org/abs/2203.05482).

    python -m models.nano.average FILE build/one/state.0.pt:1 build/two/state.0.pt:2

Writes the compact model. A checkpoint is what a course saved, or an earlier compact model; the number is its part. What one course has
learned and what it has unlearned lie apart, so that the mean keeps more than either; it takes no training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.nano.export import write_model
from models.nano.train import read_weights


def average(states: Sequence[dict[str, Any]], parts: Sequence[float]) -> dict[str, Any]:
    """What `read_weights` gave, together. Raises ValueError where their rows are not the same or the parts not all above 0."""
    if min(parts) <= 0:
        raise ValueError("every checkpoint has a part above 0")
    seed, row_ids = states[0]["seed"], states[0]["row_ids"]
    if any(state["seed"] != seed or not torch.equal(state["row_ids"], row_ids) for state in states):
        raise ValueError("the checkpoints have other rows: average those of which each began with another one's weights")
    shares = [part / sum(parts) for part in parts]
    masters = {
        name: sum((share * state["masters"][name] for share, state in zip(shares, states, strict=True)), start=torch.zeros(()))
        for name in states[0]["masters"]
    }
    return {"masters": masters, "row_ids": row_ids, "seed": seed}


def _read_part(text: str) -> tuple[Path, float]:
    path, _, part = text.rpartition(":")
    try:
        return Path(path), float(part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a checkpoint and its part, as build/one/state.0.pt:1 is") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("checkpoints", type=_read_part, nargs="+", metavar="CHECKPOINT:PART")
    arguments = parser.parse_args()
    paths, parts = zip(*arguments.checkpoints, strict=True)
    try:
        averaged = average([read_weights(path) for path in paths], parts)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write_model(averaged, arguments.file)


if __name__ == "__main__":
    main()
