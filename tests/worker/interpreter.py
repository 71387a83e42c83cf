"""Triton's interpreter with bfloat16 and products of matrices as hardware has them.

By itself it cuts bfloat16 off where it should round, multiplies its bits as integers, and leaves the order of a product's sums to a BLAS.
"""

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


def _multiply(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every element is summed in the order of `k`, wherever in its tile it stands; a BLAS sums in another order at a tile's edges."""
    out = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
    for k in range(a.shape[-1]):
        out += a[..., :, k, None] * b[..., k, None, :]
    return out


@contextmanager
def exact_bfloat16() -> Iterator[None]:
    cast, multiply = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fmul

    def exact_cast(builder: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        match source.dtype.scalar, target.scalar:
            case tl.bfloat16, tl.float32:
                return TensorHandle(_widen(source.data), tl.float32)
            case tl.float32, tl.bfloat16:
                return TensorHandle(_round(source.data), tl.bfloat16)
        return cast(builder, source, target)

    def exact_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, added: TensorHandle, *_: Any) -> TensorHandle:
        left, right = (_widen(one.data) if one.dtype.scalar == tl.bfloat16 else one.data for one in (a, b))
        return TensorHandle(_multiply(left, right) + added.data, added.dtype.scalar)

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
