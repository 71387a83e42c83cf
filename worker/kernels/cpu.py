"""The compiled kernels of cpu.c on tensors: the ops call these where `is_compiled`, after they have checked shapes.

Weights are read as published, bfloat16 or MXFP4; sums run in float32, whatever dtype the rows come in.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from services.telemetry import get_logger
from worker.kernels.cpu_build import BuildError, build

log = get_logger(__name__)

# The arguments of each function: p a pointer, b a truth value, n an integer, f a float. Those with ! return 0, or 1 for want of memory.
_SIGNATURES = {
    "linear": "ppbppnnn",
    "route": "pppnnn",
    "experts": "pppppppppnnnnnff!",
    "add_down_bias": "pppppnnn",
    "attention": "pppbppppppnnnnnnnf!",
    "add_rms_norm": "pppfppnn",
    "rotate_and_store": "pppppppppnnnnnnn",
}
_Type = type[ctypes.c_void_p] | type[ctypes.c_int] | type[ctypes.c_int64] | type[ctypes.c_float]
_TYPES: dict[str, _Type] = {"p": ctypes.c_void_p, "b": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float}


class Library:
    """A compiled cpu.c. Its functions run on the threads that torch runs on, as many as `torch.set_num_threads` gave the caller."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self.vectors = (ctypes.c_char_p.in_dll(loaded, "ossia_vectors").value or b"").decode()  # avx512, avx2 or plain
        self._functions: dict[str, Callable[..., int | None]] = {}
        for name, signature in _SIGNATURES.items():
            function = loaded[f"ossia_{name}"]
            function.argtypes = [_TYPES[letter] for letter in signature.removesuffix("!")]
            function.restype = ctypes.c_int if signature.endswith("!") else None
            self._functions[name] = function

    def call(self, name: str, *arguments: float | None) -> None:
        if self._functions[name](*arguments):
            raise MemoryError(f"{name}: too little memory for its scratch")


@cache
def library() -> Library | None:
    """Compiled at first use; None where that is not possible."""
    try:
        found = Library(build())
    except (BuildError, OSError) as error:
        log.warning("cpu_kernels_missing", reason=str(error), instead="torch, which is slower and takes more memory")
        return None
    log.info("cpu_kernels", vectors=found.vectors)
    return found


def is_compiled(device: torch.device) -> bool:
    return device.type == "cpu" and library() is not None


def _call(name: str, *arguments: float | None) -> None:
    found = library()
    assert found is not None, "ask is_compiled first"
    found.call(name, *arguments)


def _floats(x: Tensor) -> Tensor:
    """Float32 and contiguous; hold what this gives until the call that reads it is over."""
    return x.float().contiguous()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if dtype == torch.float32 else x.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in], weight [out, in] float32 or bfloat16 → [rows, out] in x's dtype."""
    assert weight.is_contiguous() and weight.dtype in (torch.float32, torch.bfloat16)
    (num_rows, width), num_outs = x.shape, weight.shape[0]
    wide, wide_bias, out = _floats(x), None if bias is None else _floats(bias), torch.empty(num_rows, num_outs)
    bias_at = None if wide_bias is None else wide_bias.data_ptr()
    is_bf16 = weight.dtype == torch.bfloat16
    _call("linear", wide.data_ptr(), weight.data_ptr(), is_bf16, bias_at, out.data_ptr(), num_rows, width, num_outs)
    return _as(out, x.dtype)


def route(router_logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As the op of that name."""
    wide, (num_rows, num_experts) = _floats(router_logits), router_logits.shape
    ids, weights = torch.empty(num_rows, num_chosen, dtype=torch.int64), torch.empty(num_rows, num_chosen)
    _call("route", wide.data_ptr(), ids.data_ptr(), weights.data_ptr(), num_rows, num_experts, num_chosen)
    return ids, weights


class Experts:
    """An `ExpertsOp` over packed weights, at 4.25 bits each: blocks and scales are contiguous, the bias float32."""

    def __init__(
        self, gate_up: tuple[Tensor, Tensor], gate_up_bias: Tensor, down: tuple[Tensor, Tensor], alpha: float, limit: float
    ) -> None:
        tensors = (*gate_up, gate_up_bias, *down)
        assert all(one.is_contiguous() for one in tensors) and gate_up_bias.dtype == torch.float32
        (num_experts, double_inner), hidden = gate_up_bias.shape, down[1].shape[1]
        self._tensors = tensors  # what the addresses are of
        self._addresses = [one.data_ptr() for one in tensors]
        self._hidden, self._sizes = hidden, (hidden, double_inner // 2, num_experts)
        self._constants = alpha, limit
        self.vectors = found.vectors if (found := library()) else None  # they decide a result's last bits

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        num_rows, num_chosen = expert_ids.shape
        assert x.shape == (num_rows, self._hidden) and expert_weights.shape == expert_ids.shape and expert_ids.dtype == torch.int64
        wide, ids, weights, out = _floats(x), expert_ids.contiguous(), _floats(expert_weights), torch.empty(num_rows, self._hidden)
        inputs = (wide.data_ptr(), ids.data_ptr(), weights.data_ptr())
        _call("experts", *inputs, *self._addresses, out.data_ptr(), num_rows, *self._sizes, num_chosen, *self._constants)
        return _as(out, x.dtype)


def add_down_bias(x: Tensor, down_bias: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """As the op of that name, for float32."""
    assert down_bias.dtype == torch.float32 and down_bias.is_contiguous() and expert_ids.dtype == torch.int64
    wide, ids, weights, out = _floats(x), expert_ids.contiguous(), _floats(expert_weights), torch.empty(x.shape)
    tensors = (wide.data_ptr(), down_bias.data_ptr(), ids.data_ptr(), weights.data_ptr(), out.data_ptr())
    _call("add_down_bias", *tensors, *x.shape, ids.shape[1])
    return out


def attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sinks: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    table_starts: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """As `paged_attention`; the caches float32 or bfloat16, the batch's tensors int64."""
    is_bf16 = key_cache.dtype == torch.bfloat16
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and (is_bf16 or key_cache.dtype == torch.float32)
    where = [one.contiguous() for one in (query_starts, context_lens, table_starts, block_tables)]
    assert all(one.dtype == torch.int64 for one in where)
    (num_sequences, table_width), (_, num_heads, head_dim), (_, block_size, num_kv_heads, _) = (
        block_tables.shape,
        queries.shape,
        key_cache.shape,
    )
    wide, wide_sinks = _floats(queries), _floats(sinks)
    out = torch.empty_like(wide)
    tensors = (wide.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), is_bf16, wide_sinks.data_ptr())
    sizes = (num_sequences, num_heads, num_kv_heads, head_dim, block_size, table_width, window)
    _call("attention", *tensors, *(one.data_ptr() for one in where), out.data_ptr(), *sizes, scale)
    return _as(out, queries.dtype)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the op of that name, for float32."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    tensors = (x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr())
    _call("add_rms_norm", *tensors, eps, normed.data_ptr(), total.data_ptr(), *x.shape)
    return normed, total


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """As the op of that name, for float32."""
    assert slot_mapping.dtype == torch.int64 and key_cache.is_contiguous() and value_cache.is_contiguous()
    turned = torch.empty(q.shape)
    tensors = (q, k, v, cos, sin, turned, key_cache, value_cache, slot_mapping)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    _call("rotate_and_store", *[one.data_ptr() for one in tensors], *strides, *q.shape[:2], *k.shape[1:])
    return turned
