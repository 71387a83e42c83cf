"""From the trainer's weights to the file in the repository: `python -m models.nano.export CHECKPOINT FILE`."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.nano.compact import write_compact
from models.nano.spec import ROW_SCALE, SPEC
from worker.kernels.mxfp4 import encode_mxfp4


def published_tensors(masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights by the network's names → bfloat16 and MXFP4 by published name, without the embeddings."""
    published = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in _split_experts(masters)}
    sinks = torch.zeros(SPEC.num_attention_heads, dtype=torch.bfloat16)
    return published | {f"model.layers.{layer}.self_attn.sinks": sinks.clone() for layer in range(SPEC.num_hidden_layers)}


def _split_experts(masters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, master in masters.items():
        if name.endswith("_proj"):
            blocks, scales = encode_mxfp4(master)
            yield from ((f"{name}_blocks", blocks), (f"{name}_scales", scales))
        elif name != "rows":
            yield name, master.to(torch.bfloat16)


def export(checkpoint: Path, file: Path) -> None:
    """Writes what the trainer saved in `checkpoint` as a compact model."""
    state = torch.load(checkpoint)
    masters = state["masters"]
    rows = masters["rows"].to(torch.bfloat16)
    write_compact(file, SPEC.config_json(), published_tensors(masters), state["row_ids"].tolist(), rows, state["seed"], ROW_SCALE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.file)


if __name__ == "__main__":
    main()
