"""The demonstration model as it lies in the repository: one safetensors file, without what its seed gives back.

Nearly all of the 201,088 ids occur in no text that it was trained on. Their embedding rows are generated, so only the others are stored,
and each once: embedding and unembedding are equal. Run as a program, it expands such a file to the published format.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.nano.cache import describe
from models.nano.manifest import DamagedFile, Manifest, digest_files, read_manifest
from models.nano.spelled_rows import spelled_rows
from services.process import EXIT_FAILED
from worker.checkpoint_maker import CheckpointSpec, write_published
from worker.safetensors_files import CheckpointError

ROW_IDS, ROWS = "row_ids", "rows"
EMBEDDINGS = "model.embed_tokens.weight", "lm_head.weight"


def write_compact(
    path: Path, config: dict[str, object], tensors: Mapping[str, Tensor], row_ids: Sequence[int], rows: Tensor, seed: int, scale: float
) -> None:
    """Writes the model to `path`, with the digests of what it expands to.

    `config` is the published config.json; `tensors` are by published name, bfloat16 or packed bytes, all but the two embeddings; `rows`
    [len(row_ids), hidden], bfloat16, are those of the trained ids, and `spelled_rows` of (seed, scale) are the rest. Raises
    `CheckpointError` where these make no model.
    """
    assert len(set(row_ids)) == len(row_ids) == len(rows) and rows.dtype == torch.bfloat16
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        expanded, unfinished = Path(folder) / "expanded", Path(folder) / "compact"
        generation_config = CheckpointSpec(vocab_size=_vocab_size(config)).generation_config_json()
        embedding = _embedding(_vocab_size(config), row_ids, rows, seed, scale)
        write_published(expanded, config, generation_config, lambda name: embedding if name in EMBEDDINGS else tensors[name])
        num_bytes = sum(file.stat().st_size for file in expanded.iterdir())
        manifest = Manifest(config, generation_config, seed, scale, digest_files(expanded), num_bytes)
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(
            {**stored, ROW_IDS: torch.tensor(row_ids, dtype=torch.int32), ROWS: rows.contiguous()}, unfinished, manifest.to_metadata()
        )
        unfinished.chmod(0o644)  # safetensors keeps others out
        unfinished.rename(path)


def expand_compact(compact: Path, directory: Path) -> None:
    """Writes the published format to `directory`, which must not exist yet. Whole or not at all.

    Raises `CheckpointError`, or OSError where the folder cannot be written.
    """
    try:
        manifest = read_manifest(compact)
        with safe_open(compact, framework="pt") as file:
            row_ids, rows = file.get_tensor(ROW_IDS).tolist(), file.get_tensor(ROWS)
            embedding = _embedding(_vocab_size(manifest.config), row_ids, rows, manifest.seed, manifest.scale)
            write_published(
                directory,
                manifest.config,
                manifest.generation_config,
                lambda name: embedding if name in EMBEDDINGS else file.get_tensor(name),
            )
    except (DamagedFile, SafetensorError) as error:
        raise CheckpointError(f"{compact} is damaged ({error}): install Ossia again") from None


def _vocab_size(config: Mapping[str, object]) -> int:
    size = config["vocab_size"]
    assert isinstance(size, int)
    return size


def _embedding(vocab_size: int, row_ids: Sequence[int], rows: Tensor, seed: int, scale: float) -> Tensor:
    """[vocab_size, hidden]"""
    embedding = spelled_rows(range(vocab_size), rows.shape[1], seed, scale)
    embedding[torch.tensor(row_ids)] = rows
    return embedding


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("compact", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    try:
        expand_compact(arguments.compact, arguments.directory)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(describe(error), file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
