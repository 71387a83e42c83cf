"""How long a simulated group takes for one step."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What decides a step's time."""

    num_prefill_tokens: int
    num_decodes: int
    num_context_tokens: int  # positions that the decodes attend to, all together


class StepTime(Protocol):
    def __call__(self, shape: StepShape) -> float:
        """Seconds on the device."""


@dataclass(frozen=True)
class SerialPrefill:
    """Prompt tokens at one rate and nothing else: for workloads whose answers do not count."""

    tokens_per_s: float

    def __call__(self, shape: StepShape) -> float:
        return shape.num_prefill_tokens / self.tokens_per_s


@dataclass(frozen=True)
class Roofline:
    """A mixture-of-experts decoder that is bound by memory or by arithmetic, whichever takes longer.

    A step reads the dense weights, every expert that some token of it chose, and the decodes' keys and values. With n tokens, each choosing
    `experts_per_token` of `num_experts`, the expected share of experts read is 1 - (1 - k/E)^n: step time over batch size is concave.
    """

    dense_bytes: float  # attention, router, unembedding
    expert_bytes: float  # all experts of all layers
    num_experts: int
    experts_per_token: int
    full_kv_bytes: float  # per token, the full-attention layers
    window_kv_bytes: float  # per sequence, the sliding-window layers once the window is full
    flops_per_token: float
    bytes_per_s: float  # as reached, not as printed
    flops_per_s: float
    overhead_s: float = 0.0  # launches and the like, each step

    def __call__(self, shape: StepShape) -> float:
        num_tokens = shape.num_prefill_tokens + shape.num_decodes
        if not num_tokens:
            return 0.0
        share = 1.0 - (1.0 - self.experts_per_token / self.num_experts) ** num_tokens
        num_bytes = self.dense_bytes + share * self.expert_bytes
        num_bytes += shape.num_context_tokens * self.full_kv_bytes + shape.num_decodes * self.window_kv_bytes
        return self.overhead_s + max(num_bytes / self.bytes_per_s, num_tokens * self.flops_per_token / self.flops_per_s)


# One H200. At batch 1 and 1k context it reads 1.9 GB of experts, 1.9 GB of attention weights and 1.2 GB of unembedding, and its ceiling is
# 852 tokens/s: that gives the bandwidth. Eighteen full and eighteen window layers, 8 KV heads of 64 in two bytes, keys and values. Prefill:
# twice 5.1e9 active parameters a token, at half of the printed 990 Tflop/s.
GPT_OSS_120B_H200 = Roofline(
    dense_bytes=1.9e9 + 1.2e9,
    expert_bytes=1.9e9 * 128 / 4,
    num_experts=128,
    experts_per_token=4,
    full_kv_bytes=18 * 2 * 8 * 64 * 2,
    window_kv_bytes=18 * 2 * 8 * 64 * 2 * 128,
    flops_per_token=2 * 5.1e9,
    bytes_per_s=852 * (1.9e9 + 1.9e9 + 1.2e9 + 18 * 2 * 8 * 64 * 2 * (1024 + 128)),
    flops_per_s=495e12,
)
