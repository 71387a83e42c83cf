"""The list of a checkpoint's files with their SHA-256, in the form that `sha256sum` writes and reads."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from services.process import StartError

LINE = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?P<name>.+)")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ListedFile:
    """`name` is relative to the checkpoint's folder and never leads out of it; `sha256` is in hex."""

    name: str
    sha256: str


def read_manifest(path: Path) -> tuple[ListedFile, ...]:
    """The files by name. Raises StartError naming the line that is wrong."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise StartError(f"--manifest: {path} cannot be read ({error.strerror})") from None
    files: dict[str, ListedFile] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if not found or not NAME.fullmatch(found["name"]):
            raise StartError(f"{path}, line {number}: give a SHA-256 in hex, two spaces and a name within the folder, as sha256sum does")
        if found["name"] in files:
            raise StartError(f"{path}, line {number}: {found['name']} is listed twice")
        files[found["name"]] = ListedFile(found["name"], found["sha256"])
    if not files:
        raise StartError(f"{path}: no file is listed; make the list with `ossia weights manifest DIR`")
    return tuple(sorted(files.values(), key=lambda file: file.name))


def make_manifest(directory: Path) -> tuple[ListedFile, ...]:
    """Every file of a folder, hidden ones aside. Raises StartError where there is none."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    files = tuple(ListedFile(name, hash_file(directory / name).hexdigest()) for name in names if NAME.fullmatch(name))
    if not files:
        raise StartError(f"{directory}: there is no file to list")
    return files


def digest_of(files: tuple[ListedFile, ...]) -> str:
    """One digest for the whole list."""
    return hashlib.sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()


def hash_file(path: Path) -> "hashlib._Hash":
    """The state of SHA-256 after a file's bytes, to be read or to go on with."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state
