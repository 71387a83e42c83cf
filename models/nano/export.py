"""From the trainer's weights to the file in the repository, `python -m models.nano.export CHECKPOINT FILE`, and back."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from models.nano.compact import ROW_IDS, ROWS, write_compact
from models.nano.manifest import read_manifest
from models.nano.spec import ROW_SCALE, SHARPNESS, SPEC
from worker.kernels.mxfp4 import decode_mxfp4, encode_mxfp4

_LAST_NORM = "norm.weight"  # logits are linear in it; a power of two is exact in bfloat16


def published_tensors(masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 weights by the network's names → bfloat16 and MXFP4 by published name, without the embeddings; logits times `SHARPNESS`."""
    masters = {**masters, _LAST_NORM: masters[_LAST_NORM] * SHARPNESS}
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
    write_model(torch.load(checkpoint), file)


def write_model(state: Mapping[str, Any], file: Path) -> None:
    """`state`: weights by the network's names, trained rows and the seed of the others, as the trainer saves them."""
    masters = state["masters"]
    rows = masters["rows"].to(torch.bfloat16)
    write_compact(file, SPEC.config_json(), published_tensors(masters), state["row_ids"].tolist(), rows, state["seed"], ROW_SCALE)


def import_compact(file: Path) -> dict[str, Any]:
    """What `export` read, as far as the file tells: weights as they were rounded, without the optimizers' state."""
    with safe_open(file, framework="pt") as opened:
        published = {name.removeprefix("model."): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    row_ids, rows = published.pop(ROW_IDS).long(), published.pop(ROWS)
    masters = {"rows": rows.float()}
    for name, tensor in published.items():
        if name.endswith("_blocks"):
            proj = name.removesuffix("_blocks")
            masters[proj] = decode_mxfp4(tensor, published[f"{proj}_scales"], torch.float32)
        elif not name.endswith(("_scales", "sinks")):
            masters[name] = tensor.float()
    masters[_LAST_NORM] /= SHARPNESS
    return {"masters": masters, "row_ids": row_ids, "seed": read_manifest(file).seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.file)


if __name__ == "__main__":
    main()
