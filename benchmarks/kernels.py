"""Each kernel of the worker on the device at hand, against what memory and arithmetic allow there, both measured in the same run.

The ceilings are the better of a copy and a sum for memory, and a square matrix product for arithmetic. A kernel's share is the time that
its bytes or its FLOP need at the ceiling, whichever is longer, over the time that it took. Weights and keys come from memory and not from
a cache: calls take turns over as many copies as fill COLD_BYTES; what is small enough to stay in the cache has no share. On a GPU the calls
are replayed as a CUDA graph. The error is the largest difference from the torch reference over the reference's largest value.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.report import Report, finish, parser
from benchmarks.roofline import SHAPES, Device, Part, Shape
from worker.kernels.attention import PagedBatch, paged_attention, paged_attention_reference
from worker.kernels.experts import DenseExperts, ExpertsWeights, prepare_experts
from worker.kernels.kv_store import rotate_and_store
from worker.kernels.linear import linear, linear_reference, reads_published
from worker.kernels.rms_norm import rms_norm, rms_norm_reference
from worker.kernels.rope import rotate
from worker.kernels.routing import route, route_reference
from worker.sampling import draw
from worker.sequences import SamplingParams, Sequence

COLD_BYTES, MAX_COPIES = 1 << 28, 64
MATMUL_SIDES = {"cuda": 8192, "cpu": 2048}  # of the square matrices whose product is the ceiling of arithmetic
BLOCK_SIZE = 16
PACKED_BYTES = 4.25 / 8  # of an expert's weight
CPU_SHAPES = {"small": Shape(8, 32, 1024, 1024, 16, 4, 64, 4, 128, 32_768)}
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """Calls that do the same on different copies of what they read, and what one of them needs."""

    kernel: str
    num_rows: int
    part: Part
    calls: Ordered[Call]
    reference: Call  # of the first call

    @property
    def is_cold(self) -> bool:
        return len(self.calls) > 1 or self.part.num_bytes >= COLD_BYTES


@dataclass(frozen=True)
class Bench:
    """Where and in what types everything is made."""

    device: torch.device
    dtype: torch.dtype  # of activations, keys and values
    shape: Shape
    context: int

    def make(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        narrow = self.dtype == torch.bfloat16 or reads_published(self.device)
        return (torch.randn(rows, columns, device=self.device) / math.sqrt(columns)).to(torch.bfloat16 if narrow else self.dtype)

    def cases(self, row_counts: tuple[int, ...], chunk: int) -> Iterator[Case]:
        for num_rows in (*row_counts, chunk):
            yield self.norm(num_rows)
            yield self.projections(num_rows)
            if self.device.type == "cuda":
                yield self.projections(num_rows, "projections by the library", linear_reference)
            yield self.turn_and_store(num_rows)
        for window in (0, self.shape.sliding_window):
            for num_rows in row_counts:
                yield self.attention([1] * num_rows, window)
            yield self.attention([chunk], window)
        for num_rows in (*row_counts, chunk):
            yield self.routing(num_rows)
        yield from self.experts((*row_counts, chunk))
        for num_rows in row_counts:
            yield self.unembedding(num_rows)
            yield self.sampling("sampling", num_rows, SamplingParams())
            yield self.sampling("sampling, top-p", num_rows, SamplingParams(top_p=0.9))

    def norm(self, num_rows: int) -> Case:
        x, weight = self.make(num_rows, self.shape.hidden_size), self.make(self.shape.hidden_size)
        return Case(
            "norm",
            num_rows,
            Part(2 * x.nbytes, 4 * x.numel()),
            [partial(rms_norm, x, weight, 1e-5)],
            partial(rms_norm_reference, x, weight, 1e-5),
        )

    def projections(self, num_rows: int, kernel: str = "projections", op: Callable[[Tensor, Tensor], Tensor] = linear) -> Case:
        """q, k and v as one matrix. A library chooses its order of sums by the batch; what it is faster by is the price of not doing so."""
        shape = self.shape
        width = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
        return self._linear(kernel, num_rows, width, op)

    def unembedding(self, num_rows: int) -> Case:
        return self._linear("unembedding", num_rows, self.shape.vocab_size, linear)

    def _linear(self, kernel: str, num_rows: int, width: int, op: Callable[[Tensor, Tensor], Tensor]) -> Case:
        first = self.weight(width, self.shape.hidden_size)
        weights = [first, *(first.clone() for _ in range(num_copies(first.nbytes) - 1))]
        x = self.make(num_rows, self.shape.hidden_size)
        calls = [partial(op, x, weight) for weight in weights]
        return Case(
            kernel, num_rows, Part(first.nbytes, 2 * num_rows * first.numel()), calls, lambda: linear_reference(x, first.to(self.dtype))
        )

    def turn_and_store(self, num_rows: int) -> Case:
        shape = self.shape
        q, k, v = (
            self.make(num_rows, heads, shape.head_dim)
            for heads in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
        )
        cos, sin = self.make(num_rows, shape.head_dim // 2), self.make(num_rows, shape.head_dim // 2)
        pages = (math.ceil(num_rows / BLOCK_SIZE), BLOCK_SIZE, *k.shape[1:])
        slots = torch.randperm(num_rows, device=self.device)
        part = Part(2 * (q.nbytes + k.nbytes + v.nbytes), 6 * (q.numel() + k.numel()))
        call = partial(rotate_and_store, q, k, v, cos, sin, self.make(*pages), self.make(*pages), slots)
        return Case("turn and store", num_rows, part, [call], lambda: rotate(q, cos, sin))

    def attention(self, query_lens: list[int], window: int) -> Case:
        """The last rows of sequences of `context` tokens, or of a prompt of a chunk's length."""
        shape, is_chunk = self.shape, query_lens[0] > 1
        context = query_lens[0] if is_chunk else self.context
        num_blocks, num_rows, head_dim = math.ceil(context / BLOCK_SIZE), sum(query_lens), shape.head_dim
        num_keys = sum(min(context, length + window - 1) if window else context for length in query_lens)
        num_pairs = sum(min(position + 1, window or context) for length in query_lens for position in range(context - length, context))
        row_bytes = 2 * shape.num_key_value_heads * head_dim * self.dtype.itemsize
        part = Part(num_keys * row_bytes, 4 * num_pairs * shape.num_attention_heads * head_dim)
        q, sinks = self.make(num_rows, shape.num_attention_heads, head_dim), self.make(shape.num_attention_heads)
        pages = (len(query_lens) * num_blocks, BLOCK_SIZE, shape.num_key_value_heads, head_dim)
        caches = [(self.make(*pages), self.make(*pages)) for _ in range(num_copies(math.prod(pages[:2]) * row_bytes))]
        tables = torch.randperm(len(query_lens) * num_blocks, device=self.device).view(len(query_lens), num_blocks)
        whole = torch.full((len(query_lens),), context, device=self.device)
        slots = torch.zeros(num_rows, dtype=torch.int64, device=self.device)  # attention only reads
        batch = PagedBatch(0 if is_chunk else num_rows, tuple(query_lens), whole, torch.zeros_like(whole), tables, slots)
        scale = head_dim**-0.5
        calls = [partial(paged_attention, q, keys, values, sinks, batch, scale=scale, window=window) for keys, values in caches]
        reference = partial(paged_attention_reference, q, *caches[0], sinks, batch, scale, window)
        return Case(f"attention, {'window' if window else 'full'}", num_rows, part, calls, reference)

    def routing(self, num_rows: int) -> Case:
        logits, num_chosen = self.make(num_rows, self.shape.num_local_experts), self.shape.num_experts_per_tok
        return Case(
            "routing",
            num_rows,
            Part(logits.nbytes, logits.numel()),
            [lambda: route(logits, num_chosen)[1]],
            lambda: route_reference(logits, num_chosen)[1],
        )

    def experts(self, row_counts: tuple[int, ...]) -> Iterator[Case]:
        """A layer's experts, already chosen, each call with choices of its own."""
        expert = self.shape.expert_weights
        layers = [self.experts_weights() for _ in range(num_copies(self.shape.num_local_experts * expert * PACKED_BYTES))]
        dense, ops = DenseExperts(layers[0]), [prepare_experts(weights) for weights in layers]
        value_bytes = self.dtype.itemsize if isinstance(ops[0], DenseExperts) else PACKED_BYTES
        for num_rows in row_counts:
            x, num_pairs = self.make(num_rows, self.shape.hidden_size), num_rows * self.shape.num_experts_per_tok
            choices = [
                route_reference(self.make(num_rows, self.shape.num_local_experts), self.shape.num_experts_per_tok)
                for _ in range(num_copies(min(num_pairs, self.shape.num_local_experts) * expert * value_bytes))
            ]
            num_distinct = statistics.mean(len(set(ids.flatten().tolist())) for ids, _ in choices)
            part = Part(num_distinct * expert * value_bytes, 2 * num_pairs * expert)
            calls = [partial(op, x, *choice) for op, choice in zip(cycle(ops), choices, strict=False)]
            yield Case("experts", num_rows, part, calls, partial(dense, x, *choices[0]))

    def sampling(self, kernel: str, num_rows: int, params: SamplingParams) -> Case:
        """On a GPU the kernels alone, on a CPU with what gathers their inputs."""
        sequences = [Sequence(row, "", [1, 2, 3], 3, replace(params, seed=row)) for row in range(num_rows)]
        size = num_rows * self.shape.vocab_size * torch.float32.itemsize
        rows = [self.make(num_rows, self.shape.vocab_size).float() for _ in range(num_copies(size))]
        calls = [partial(self.drawing(sequences), logits) for logits in rows]
        return Case(kernel, num_rows, Part(size, 0), calls, lambda: draw(rows[0].cpu(), sequences).token_ids.to(self.device))

    def drawing(self, sequences: list[Sequence]) -> Callable[[Tensor], Tensor]:
        if self.device.type != "cuda":
            return lambda logits: draw(logits, sequences).token_ids
        from worker.gpu_sampling import gather_inputs  # a machine without a GPU needs no Triton
        from worker.kernels.sampling_triton import draw_triton

        inputs = gather_inputs(sequences, {}, self.shape.vocab_size, self.device)
        return lambda logits: draw_triton(logits, inputs, not_numbers=1, nothing_left=2)[0]

    def same_bits(self, row_counts: tuple[int, ...]) -> Iterator[tuple[str, bool]]:
        """By kernel, whether a row gives the same to the bit in every one of these batches."""
        x, experts = self.make(max(row_counts), self.shape.hidden_size), prepare_experts(self.experts_weights())
        ids, weights = route_reference(self.make(len(x), self.shape.num_local_experts), self.shape.num_experts_per_tok)
        router = self.weight(self.shape.num_local_experts, self.shape.hidden_size)
        projection = self.weight(self.shape.num_attention_heads * self.shape.head_dim, self.shape.hidden_size)
        ops: dict[str, Callable[[int], Tensor]] = {
            "experts": lambda count: experts(x[:count], ids[:count], weights[:count]),
            "router": lambda count: linear(x[:count], router),
            "projections": lambda count: linear(x[:count], projection),
        }
        for kernel, op in ops.items():
            first, *others = (op(count)[0] for count in row_counts)
            yield kernel, all(torch.equal(first, other) for other in others)

    def experts_weights(self) -> ExpertsWeights:
        """Random bytes, under scales that keep the values' size."""
        num_experts, hidden, inner = self.shape.num_local_experts, self.shape.hidden_size, self.shape.intermediate_size
        packed = []
        for rows, columns in ((2 * inner, hidden), (hidden, inner)):
            groups = (num_experts, rows, columns // 32)
            packed.append(torch.randint(256, (*groups, 16), dtype=torch.uint8, device=self.device))
            packed.append(torch.full(groups, 127 - round(math.log2(3 * math.sqrt(columns))), dtype=torch.uint8, device=self.device))
        bias = self.make(num_experts, 2 * inner)
        return ExpertsWeights(packed[0], packed[1], bias, packed[2], packed[3], alpha=1.702, limit=7.0)


def num_copies(num_bytes: float) -> int:
    return max(1, min(MAX_COPIES, math.ceil(COLD_BYTES / num_bytes)))


def measure_s(calls: Ordered[Call], device: torch.device) -> float:
    """Seconds of one call, the median over rounds of all of them."""

    def run() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph  # a machine without a GPU needs no Triton

        return float(do_bench_cudagraph(run, rep=50, return_mode="median")) / 1e3 / len(calls)
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.1:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / len(calls)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Device:
    """Bytes and FLOP a second."""
    source = torch.zeros(COLD_BYTES // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = max(2 * source.nbytes / measure_s([partial(target.copy_, source)], device), source.nbytes / measure_s([source.sum], device))
    side = MATMUL_SIDES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    return Device(bandwidth, 2 * side**3 / measure_s([partial(torch.mm, a, b)], device))


def error_of(case: Case) -> float:
    out, expected = case.calls[0]().float(), case.reference().float()
    return float((out - expected).abs().max() / expected.abs().max())


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128], help="rows of the decode batches, default: %(default)s")
    flags.add_argument("--chunk", type=int, help="rows of a prefill chunk, default: 2048, on a CPU 256")
    flags.add_argument("--context", type=int, default=1024, help="tokens of each decoding sequence, default: %(default)s")
    flags.add_argument("--threads", type=int, help="of the CPU, default: torch's")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    is_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if is_gpu else (torch.device("cpu"), torch.float32)
    ceilings = measure_ceilings(device, dtype)
    title = f"kernels at {ceilings.bytes_per_s / 1e9:,.0f} GB/s and {ceilings.flop_per_s / 1e12:,.2f} TFLOP/s, measured"
    report = Report(title, ("shape", "kernel", "rows", "us", "GB/s", "TFLOP/s", "of the ceiling", "error"))
    report.figures |= {"bandwidth_gb_s": ceilings.bytes_per_s / 1e9, "matmul_tflop_s": ceilings.flop_per_s / 1e12}
    row_counts, chunk = tuple(arguments.rows), arguments.chunk or (2048 if is_gpu else 256)
    for name, shape in (SHAPES if is_gpu else CPU_SHAPES).items():
        bench = Bench(device, dtype, shape, arguments.context)
        for case in bench.cases(row_counts, chunk):
            add_row(report, name, case, measure_s(case.calls, device), ceilings)
        for kernel, same in bench.same_bits((*row_counts, chunk)):
            bits = {f"{name}_{kernel}_same_bits".replace("-", "_"): float(same)}
            report.add(name, f"{kernel}: a row's bits in any batch", "", "", "", "", "", "same" if same else "differ", **bits)
    finish(report, arguments.json)
    if not is_gpu:
        print("Not measured for want of a GPU: the Triton kernels, at the widths of gpt-oss-20b and gpt-oss-120b.")


def add_row(report: Report, shape: str, case: Case, seconds: float, ceilings: Device) -> None:
    name = f"{shape}_{case.kernel}_{case.num_rows}".replace("-", "_").replace(", ", "_").replace(" ", "_")
    figures = {f"{name}_us": seconds * 1e6, f"{name}_error": error_of(case)}
    share = "cached"
    if case.is_cold:
        figures[f"{name}_share"] = case.part.seconds(ceilings) / seconds
        share = f"{figures[f'{name}_share']:.0%}"
    rates = (f"{case.part.num_bytes / seconds / 1e9:,.1f}", f"{case.part.flop / seconds / 1e12:,.3f}")
    report.add(shape, case.kernel, case.num_rows, f"{seconds * 1e6:,.1f}", *rates, share, f"{figures[f'{name}_error']:.1e}", **figures)


if __name__ == "__main__":
    main()
