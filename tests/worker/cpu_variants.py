"""cpu.c compiled for several kinds of processor, as far as this machine can run them."""

import platform
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from worker.kernels.cpu import Library
from worker.kernels.cpu_build import NATIVE, build

_TARGETS = {"native": NATIVE} | ({"avx2": "-march=haswell", "plain": "-march=x86-64"} if platform.machine() == "x86_64" else {})
_FLAGS = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
VARIANTS = [name for name in _TARGETS if name != "avx2" or {"avx2", "fma", "bmi2"} <= set(_FLAGS)]


@cache
def compiled(variant: str) -> Library:
    """Raises `BuildError` where there is no compiler: the tests need one (tests/install_system_packages.sh)."""
    with TemporaryDirectory() as folder:  # what is loaded needs its file no longer
        return Library(build(_TARGETS[variant], Path(folder)))
