"""Pins with hashes what images and chart tools are made of, from pyproject.toml and constraints.txt: `python -m deploy.lock`.

Needs uv (`pip install uv`), which finds the hashes of every platform's files.
"""

import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON_VERSION = "3.11"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@dataclass(frozen=True)
class Lock:
    """A file of pinned requirements. `is_constrained`: it has the versions that the tests run with."""

    file: str
    requirements: tuple[str, ...]
    is_constrained: bool = True


def list_locks() -> list[Lock]:
    own, extras = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]
    return [
        Lock("deploy/docker/control.txt", tuple(own)),
        Lock("deploy/docker/worker.txt", (*own, *extras["worker"])),
        Lock("deploy/docker/build.txt", tuple(PROJECT["build-system"]["requires"])),
        Lock("tests/deploy/chart-tools.txt", tuple(extras["chart"])),
        Lock("tests/deploy/checkov.txt", tuple(extras["policy"]), is_constrained=False),
    ]


def compile_lock(lock: Lock, uv: str) -> None:
    command = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate", "--python-version", PYTHON_VERSION]
    command += ["--python-platform", "x86_64-manylinux_2_36", "--only-binary", ":all:"]
    command += ["--constraint", str(ROOT / "constraints.txt")] if lock.is_constrained else []
    subprocess.run([*command, "-", "--output-file", str(ROOT / lock.file)], input="\n".join(lock.requirements), text=True, check=True)
    print(lock.file)


def main() -> int:
    uv = shutil.which("uv")
    if uv is None:
        print("uv is missing: install it with `pip install uv`", file=sys.stderr)
        return 1
    for lock in list_locks():
        compile_lock(lock, uv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
