"""Compiles cpu.c for this machine, once: the library lies in a cache, named by everything that it depends on.

Knows nothing of tensors. Where there is no compiler, the worker computes with torch alone.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
# No contraction: what is fused is written so, and a scalar loop gives the bits that a vector loop gives.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
TIMEOUT_S = 120.0


class BuildError(Exception):
    """The kernels could not be compiled. One line that says why."""


def build(target: str = NATIVE, directory: Path | None = None) -> Path:
    """The library for `target`, a flag of the compiler, compiled now if it is not there yet. Raises `BuildError`."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise BuildError("there is no C compiler: install gcc, or name one in CC")
    command = (compiler, *FLAGS, target)
    try:
        directory = _own(directory or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ossia")
        library = directory / f"cpu-{_digest(command)}.so"
        if not library.exists():
            _compile(command, library)
    except OSError as error:
        raise BuildError(str(error)) from error
    return library


def _own(directory: Path) -> Path:
    """A library is code: none is loaded that somebody else may have written."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{directory} can be written by others: make it yours alone, or name another XDG_CACHE_HOME")
    return directory


def _digest(command: Sequence[str]) -> str:
    """Of the source, the command, the compiler's version and the processor."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*command, _run([command[0], "--version"]), platform.machine(), *_processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What it can do, as the kernel tells it of the first core."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]


def _compile(command: Sequence[str], library: Path) -> None:
    """Whole or not at all: ranks that start together may compile the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _run([*command, "-o", str(made), str(SOURCE), "-lm"])
        made.replace(library)


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else f'exit code {error.returncode}'}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took over {TIMEOUT_S:g} s") from error
