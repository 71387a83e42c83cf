"""The least that a step must read and compute, and so the most that a device allows: bytes, FLOP and seconds by batch and context.

Nothing is measured here. A step reads each weight that it uses once, the keys and values that its rows attend to, and one row of the
embedding per token; activations count nothing, since they stay in the caches. Its parts (attention weights, keys and values, experts,
unembedding) run one after the other, each as long as the slower of memory and arithmetic: the ceiling is the sum of these times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.report import Report, finish, parser

H200_GB_S, H200_TFLOP_S = 4800.0, 989.5  # the data sheet's bandwidth, and its dense bfloat16 rate


@dataclass(frozen=True)
class Shape:
    """A gpt-oss model's sizes, named as in `config.json`. Every second layer, from the first on, has the sliding window."""

    num_hidden_layers: int
    num_local_experts: int
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    vocab_size: int = 201_088

    @property
    def attention_weights(self) -> int:
        """Of one layer: q, k, v and o with their biases, and the router."""
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        projections = self.hidden_size * (2 * query + 2 * key) + query + 2 * key + self.hidden_size
        return projections + (self.hidden_size + 1) * self.num_local_experts

    @property
    def expert_weights(self) -> int:
        """Of one expert of one layer: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def windows(self) -> Iterator[int]:
        """Of each layer; 0: it attends to everything."""
        return (self.sliding_window * (layer % 2 == 0) for layer in range(self.num_hidden_layers))


SHAPES = {"gpt-oss-20b": Shape(24, 32), "gpt-oss-120b": Shape(36, 128)}


@dataclass(frozen=True)
class Storage:
    """Bytes of a value: MXFP4 experts (4 bits each, and one byte for 32 of them), the rest in bfloat16."""

    expert: float = 4.25 / 8
    dense: float = 2.0
    kv: float = 2.0


MXFP4 = Storage()


@dataclass(frozen=True)
class Device:
    bytes_per_s: float
    flop_per_s: float


class Part(NamedTuple):
    num_bytes: float
    flop: float

    def seconds(self, device: Device) -> float:
        return max(self.num_bytes / device.bytes_per_s, self.flop / device.flop_per_s)


@dataclass(frozen=True)
class Step:
    """What one step of `num_rows` tokens needs at least."""

    num_rows: int
    attention: Part  # projections and router
    kv: Part  # scores and weighted values
    experts: Part
    vocabulary: Part  # embedding and unembedding

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.attention, self.kv, self.experts, self.vocabulary)

    @property
    def num_bytes(self) -> float:
        return sum(part.num_bytes for part in self.parts)

    @property
    def flop(self) -> float:
        return sum(part.flop for part in self.parts)

    def seconds(self, device: Device) -> float:
        return sum(part.seconds(device) for part in self.parts)

    def tokens_per_s(self, device: Device) -> float:
        return self.num_rows / self.seconds(device)


def distinct_experts(num_experts: int, num_chosen: int, num_rows: int) -> float:
    """Expected number of experts that `num_rows` tokens use, each choosing evenly: E (1 - (1 - k/E)^rows)."""
    return num_experts * (1 - (1 - num_chosen / num_experts) ** num_rows)


def decode_step(shape: Shape, batch: int, context: int, storage: Storage = MXFP4) -> Step:
    """Each of `batch` sequences computes one token that attends to `context` tokens, itself included."""
    seen = sum(min(context, window or context) for window in shape.windows)
    return _step(shape, storage, num_rows=batch, num_sampled=batch, num_read=batch * seen, num_scores=batch * seen)


def prefill_step(shape: Shape, num_tokens: int, context: int, storage: Storage = MXFP4) -> Step:
    """One sequence computes its last `num_tokens` of `context` tokens, and draws one."""
    begin = context - num_tokens
    num_read = sum(min(context, num_tokens + window - 1) if window else context for window in shape.windows)
    num_scores = sum(_count_seen(context, window) - _count_seen(begin, window) for window in shape.windows)
    return _step(shape, storage, num_rows=num_tokens, num_sampled=1, num_read=num_read, num_scores=num_scores)


def _count_seen(num_tokens: int, window: int) -> int:
    """Pairs of a token and one that it attends to, over the first `num_tokens` positions."""
    ramp = min(num_tokens, window or num_tokens)
    return ramp * (ramp + 1) // 2 + (num_tokens - ramp) * window


def _step(shape: Shape, storage: Storage, *, num_rows: int, num_sampled: int, num_read: int, num_scores: int) -> Step:
    """num_read: tokens whose keys and values are read, num_scores: pairs of query and key, both summed over layers."""
    layers = shape.num_hidden_layers
    kv_values = 2 * shape.num_key_value_heads * shape.head_dim  # of one token in one layer; each row's own are written too
    num_experts = distinct_experts(shape.num_local_experts, shape.num_experts_per_tok, num_rows)
    num_uses = num_rows * shape.num_experts_per_tok
    vocabulary = shape.hidden_size * shape.vocab_size
    return Step(
        num_rows,
        attention=Part(layers * shape.attention_weights * storage.dense, layers * 2 * num_rows * shape.attention_weights),
        kv=Part((num_read + layers * num_rows) * kv_values * storage.kv, 4 * num_scores * shape.num_attention_heads * shape.head_dim),
        experts=Part(layers * num_experts * shape.expert_weights * storage.expert, layers * 2 * num_uses * shape.expert_weights),
        vocabulary=Part((vocabulary + num_rows * shape.hidden_size) * storage.dense, 2 * num_sampled * vocabulary),
    )


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--gb-s", type=float, default=H200_GB_S, help="memory bandwidth of the device, default: %(default)g (H200)")
    flags.add_argument("--tflop-s", type=float, default=H200_TFLOP_S, help="dense matmul rate of the device, default: %(default)g (H200)")
    flags.add_argument("--context", type=int, default=1024, help="tokens of each sequence, default: %(default)s")
    arguments = flags.parse_args()
    device = Device(arguments.gb_s * 1e9, arguments.tflop_s * 1e12)
    title = f"ceilings at {arguments.gb_s:g} GB/s and {arguments.tflop_s:g} TFLOP/s, context {arguments.context} (computed, not measured)"
    report = Report(title, ("model", "step", "experts read", "GB", "TFLOP", "ms", "tok/s"))
    for name, shape in SHAPES.items():
        steps = {f"decode {batch}": decode_step(shape, batch, arguments.context) for batch in (1, 8, 32, 64, 128, 256)}
        steps |= {f"prefill {size}": prefill_step(shape, size, size) for size in (512, 2048, 8192)}
        for kind, step in steps.items():
            experts = distinct_experts(shape.num_local_experts, shape.num_experts_per_tok, step.num_rows)
            sizes = (f"{experts:.1f}", f"{step.num_bytes / 1e9:.2f}", f"{step.flop / 1e12:.2f}")
            rate = step.tokens_per_s(device)
            figure = f"{name}_{kind}_tokens_per_s".replace("-", "_").replace(" ", "_")
            report.add(name, kind, *sizes, f"{step.seconds(device) * 1e3:.2f}", f"{rate:,.0f}", **{figure: rate})
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
