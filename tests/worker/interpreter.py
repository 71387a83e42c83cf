"""Triton's interpreter with bfloat16 as hardware has it. By itself it cuts off where it should round, and multiplies bits as integers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    cast, dot, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul

    def exact_cast(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        match source.dtype.scalar, target.scalar:
            case tl.bfloat16, tl.float32:
                return TensorHandle(_widen(source.data), tl.float32)
            case tl.float32, tl.bfloat16:
                return TensorHandle(_round(source.data), tl.bfloat16)
        return cast(builder, source, target)

    def exact_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        wide = [exact_cast(builder, one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b)]
        return dot(builder, *wide, *rest)

    def exact_multiply(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle) -> TensorHandle:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(builder, a, b)
        with np.errstate(over="ignore"):  # as in hardware, what is too large becomes infinite without a word
            return TensorHandle(_round(_widen(a.data) * _widen(b.data)), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", exact_cast)
        patch.setattr(InterpreterBuilder, "create_fmul", exact_multiply)
        patch.setattr(InterpreterBuilder, "create_dot", exact_dot)
        yield
