"""One model of the weights of several courses, of which each began with the one before (https://arxiv.org/abs/2203.05482).

    python -m models.nano.average FILE build/one/state.0.pt:1 build/two/state.0.pt:2

Writes the compact model. A checkpoint is what a course saved, or an earlier compact model; the number is its part. A course learns some
things and unlearns others; the mean can have more of both sides than its last course, and takes no training. Spellings of one word are
told apart in it (`alike_rows.py`). The card has the figures.
"""

import argparse
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from models.nano.alike_rows import tell_apart
from models.nano.export import write_model
from models.nano.train import read_weights


def average(states: Sequence[dict[str, Any]], parts: Sequence[float]) -> dict[str, Any]:
    """What `read_weights` gave, together, spellings told apart. Every part is above 0. Raises ValueError where rows are not the same."""
    seed, row_ids = states[0]["seed"], states[0]["row_ids"]
    if any(state["seed"] != seed or not torch.equal(state["row_ids"], row_ids) for state in states):
        raise ValueError("the checkpoints have other rows: average those of which each began with another one's weights")
    shares = [part / sum(parts) for part in parts]
    masters = {
        name: sum((share * state["masters"][name] for share, state in zip(shares, states, strict=True)), start=torch.zeros(()))
        for name in states[0]["masters"]
    }
    masters["rows"] = tell_apart(row_ids.tolist(), masters["rows"], seed)
    return {"masters": masters, "row_ids": row_ids, "seed": seed}


def _read_part(text: str) -> tuple[Path, float]:
    path, _, number = text.rpartition(":")
    with suppress(ValueError):
        if 0 < (part := float(number)) < math.inf:
            return Path(path), part
    raise argparse.ArgumentTypeError(f"{text} is not a checkpoint and its part: give it a part above 0, as in build/one/state.0.pt:1")


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
