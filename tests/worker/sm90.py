"""Compiles Triton kernels for Hopper on a machine without a GPU: what an op would launch is compiled instead.

Runs in a process of its own: where Triton interprets, nothing can be compiled. `python -m tests.worker.sm90 MODULE` calls the module's
`launch_kernels()`, whose ops get CPU tensors, and prints a line of JSON for every kernel compiled.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.uint32: "*u32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    name: str
    num_warps: int
    num_registers: int  # per thread
    stack_bytes: int  # per thread: registers that were spilled
    shared_bytes: int


def compile_kernels(module: str) -> list[CompiledKernel]:
    """What `module`'s launch_kernels() launches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.worker.sm90", module], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [CompiledKernel(**json.loads(line)) for line in done.stdout.splitlines()]


@contextmanager
def _compile_only() -> Iterator[list[CompiledKernel]]:
    compiled: list[CompiledKernel] = []

    def compile_instead(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        compiled.append(_compile(kernel, values, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_instead)
        yield compiled


def _compile(kernel: Any, values: dict[str, Any], options: dict[str, Any]) -> CompiledKernel:
    """As Triton would for these values: pointers and sizes that are multiples of 16 are known to be, a size of 1 is a constant."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        is_aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if is_aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=HOPPER, options=options)
    return CompiledKernel(kernel.__name__, binary.metadata.num_warps, *_resources(binary.asm["cubin"]), binary.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    with _compile_only() as kernels:
        importlib.import_module(sys.argv[1]).launch_kernels()
    for one in kernels:
        print(json.dumps(dataclasses.asdict(one)))
