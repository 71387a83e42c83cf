"""What the compact file says of itself in its header: the model's configuration, the seed of its generated rows, and what it expands to.

Reads the header by itself, so that whoever only looks for an expanded model needs no torch.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

KEY = "manifest"  # of the file's metadata; one key, because safetensors writes several in no fixed order
LENGTH_BYTES = 8


class DamagedFile(Exception):
    """The compact file is not as it was written; the message says what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """`config` and `generation_config` as published; `files` are the expanded folder's, each with its SHA-256 in hex."""

    config: dict[str, object]
    generation_config: dict[str, object]
    seed: int
    scale: float
    files: dict[str, str]
    expanded_bytes: int

    def to_metadata(self) -> dict[str, str]:
        return {KEY: json.dumps(asdict(self))}

    @property
    def digest(self) -> str:
        """Tells one expanded model from another, in hex."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def read_manifest(compact: Path) -> Manifest:
    """Raises DamagedFile; OSError where the file cannot be read."""
    with compact.open("rb") as file:
        num_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = file.read(min(num_bytes, compact.stat().st_size))
    try:
        return Manifest(**json.loads(json.loads(header)["__metadata__"][KEY]))
    except (ValueError, KeyError, TypeError):
        raise DamagedFile("no manifest in its header") from None


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of each file in the folder, by name."""
    digests = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
