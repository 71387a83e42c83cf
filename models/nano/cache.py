"""The demonstration model in the published format, expanded on first use into a folder of this user, and looked at before every use.

Knows nothing of tensors: another process expands the compact file, so that whoever starts a cluster needs no torch.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from models.nano.manifest import DamagedFile, Manifest, digest_files, read_manifest
from services.process import StartError

NANO_NAME = "ossia-nano"
NANO_FILE = Path(__file__).parent / f"{NANO_NAME}.safetensors"


def cache_dir() -> Path:
    """$OSSIA_CACHE_DIR, else $XDG_CACHE_HOME/ossia, else ~/.cache/ossia."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("OSSIA_CACHE_DIR") or Path(caches) / "ossia").expanduser()


def expanded_model(compact: Path = NANO_FILE, root: Path | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:
    """The folder below `root` that holds the model, every byte as it should be; it is made, or made again, where it is not.

    Processes that ask at once wait for the first. Raises StartError.
    """
    root = root or cache_dir()
    try:
        manifest = read_manifest(compact)
    except (DamagedFile, OSError) as error:
        raise StartError(f"{compact} is damaged ({error}): install Ossia again") from None
    try:
        folder = root / f"{compact.stem}-{manifest.digest[:16]}"
        if not is_whole(folder, manifest):
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f".{folder.name}.lock"):
                if not is_whole(folder, manifest):
                    tell(f"expanding {compact.stem} into {folder}")
                    _remove_remains(folder)
                    _expand(compact, folder, manifest)
    except OSError as error:
        raise StartError(f"cannot expand {compact.stem} into {root}: {describe(error)}") from None
    return folder


def describe(error: OSError, other: str = "another folder in OSSIA_CACHE_DIR") -> str:
    """What is wrong with a folder, and the cure, in one line."""
    return f"{error.strerror}; make room there, or name {other}"


def is_whole(folder: Path, manifest: Manifest) -> bool:
    """0.2 s for 200 MB: cheaper than an answer from damaged weights."""
    return folder.is_dir() and manifest.files.items() <= digest_files(folder).items()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Inside, no other process is. The kernel lets go when a process ends, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_remains(folder: Path) -> None:
    """What is damaged, and what writers that were killed left; none is alive, as we hold the lock."""
    for path in (folder, *folder.parent.glob(f".{folder.name}.*")):
        if path.is_dir():
            shutil.rmtree(path)


def _expand(compact: Path, folder: Path, manifest: Manifest) -> None:
    if shutil.disk_usage(folder.parent).free < manifest.expanded_bytes:
        raise OSError(errno.ENOSPC, f"it takes {manifest.expanded_bytes / 2**20:.0f} MiB, which are not free")
    command = [sys.executable, "-m", "models.nano.compact", str(compact), str(folder)]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise StartError(f"cannot expand {compact.stem} into {folder.parent}: {reason}")
    if not is_whole(folder, manifest):
        raise StartError(f"{compact} does not expand to what it was made from: install Ossia again")
