"""A folder of safetensors files as one table of tensors, of which any slice can be read. Knows nothing of the model.

Headers are read and checked when the folder is opened, weights when they are asked for, and of those only the bytes in the slice.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SAMPLE_BYTES = 4096  # of each tensor that the digest reads


class CheckpointError(Exception):
    """The checkpoint cannot be served. One sentence that names the file, the tensor or field, and the cure."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `dtype` is spelled as in the file: BF16, F32, U8 and so on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class _TensorSlice(Protocol):
    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor: ...


class _OpenFile(Protocol):
    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _TensorSlice: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class SafetensorsFiles:
    """The tensors of one folder, open until the `with` block ends. Raises `CheckpointError` where the files do not fit together."""

    def __init__(self, model_dir: Path) -> None:
        self._stack = ExitStack()
        self._opened: dict[Path, _OpenFile] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.promised_bytes = _read_total(model_dir)  # of all tensors, by the index; None: it tells nothing
        with ExitStack() as on_error:
            on_error.callback(self._stack.close)
            for file, names in _list_files(model_dir):
                self._open(file, names)
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, file: Path, names: set[str] | None) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: download the checkpoint again.")
        try:
            # safe_open checks that the file holds every byte that its header promises
            opened: _OpenFile = self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file ({error}): download it again.") from error
        self._opened[file] = opened
        found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        for name in sorted(found.keys() if names is None else names):
            if name not in found:
                raise CheckpointError(f"{file} lacks tensor {name}, which {INDEX_FILE} places there: download the checkpoint again.")
            self.entries[name] = TensorEntry(file, found[name].get_dtype(), tuple(found[name].get_shape()))

    def read(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """The slice of tensor `name`, contiguous, in the file's dtype on the CPU; one slice a dimension, step 1.

        What is contiguous in the file stays there, mapped into memory; other slices are copied out.
        """
        return self._opened[self.entries[name].file].get_slice(name)[slices].contiguous()

    def digest(self) -> str:
        """SHA-256 over every header and a sample of every tensor, in hex: tells checkpoints apart without reading them whole."""
        digest = hashlib.sha256()
        for file in sorted(self._opened):
            for part in _sample(file):
                digest.update(part)
        return digest.hexdigest()


def _list_files(model_dir: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each file with the tensors that the index places there; None where there is no index."""
    index = model_dir / INDEX_FILE
    if not index.is_file():
        yield model_dir / SINGLE_FILE, None
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names: download it again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file!r}, which is not a plain file name: put the shards beside the index.")
        yield model_dir / file, {name for name, place in weight_map.items() if place == file}


def _read_total(model_dir: Path) -> int | None:
    metadata = read_json(model_dir / INDEX_FILE).get("metadata") if (model_dir / INDEX_FILE).is_file() else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) else None


def _sample(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        yield header
        data_begin = stream.tell()
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                stream.seek(data_begin + max(begin, (begin + end - SAMPLE_BYTES) // 2))
                yield stream.read(min(SAMPLE_BYTES, end - begin))


def read_json(file: Path) -> dict[str, object]:
    """The JSON object in `file`; raises `CheckpointError`."""
    try:
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: point the model directory at a whole checkpoint.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object: download it again.")
    return content
