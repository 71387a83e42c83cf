"""Whole decode and prefill steps on the device at hand, against its ceilings, and beside transformers on the same model.

On a CPU: one MXFP4 checkpoint of 8 layers, served as a worker serves it, and by transformers on as many threads in float32 and in bfloat16.
The sides take turns in one run and are given the same tokens; medians are compared, and a ratio is over transformers' faster dtype. On a
GPU: random weights of the published shapes, made on the device, and transformers on the shape of gpt-oss-20b. The ceilings are those of
`benchmarks.roofline`, at the bandwidth and the matmul rate measured in the same run.
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.engine_sides import BLOCK_SIZE, Side, Worker, build_worker, open_transformers, random_transformers
from benchmarks.kernels import CPU_SHAPES, Bench, measure_ceilings, measure_s
from benchmarks.report import Report, finish, parser
from benchmarks.roofline import MXFP4, SHAPES, Device, Shape, Step, Storage, decode_step, prefill_step
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint, random_tensor
from worker.cuda_graphs import CudaCapture, list_shapes
from worker.kv_cache import blocks_per_window
from worker.model_config import ModelConfig, parse_config
from worker.model_start import load_model_backend
from worker.runner import ModelBackend
from worker.tensor_parallel import SingleRank

COLUMNS = ("step", "ossia tok/s", "transformers tok/s", "in", "ratio", "of the ceiling")
CEILING_TRIES = 5
MOE_ROWS = (8, 32, 128)
SEED = 3


@dataclass(frozen=True)
class Measurement:
    """What is measured on one kind of device."""

    batches: Sequence[int]
    context: int  # tokens of each decoding sequence
    chunk: int  # tokens of the prefill
    storage: Storage
    rounds: int = 9  # in which the sides take turns, after one that warms up
    steps: int = 2  # of a round: short, so that what else the machine does meets all sides alike
    max_compared_batch: int = 64  # transformers' attention holds every score of a prefill

    @property
    def num_tokens(self) -> int:
        return self.context + (self.rounds + 1) * self.steps

    @property
    def num_blocks(self) -> int:
        return max(max(self.batches) * math.ceil(self.num_tokens / BLOCK_SIZE), math.ceil(self.chunk / BLOCK_SIZE))


CPU = Measurement((1, 2, 4, 8, 16, 32), context=32, chunk=512, storage=Storage(kv=4.0))
GPU = Measurement((1, 8, 64, 256), context=1024, chunk=2048, storage=MXFP4)


def compare_decodes(sides: Sequence[Side], tokens: Tensor, measurement: Measurement) -> dict[str, float]:
    """Median seconds of a step by side; tokens [batch, context and all steps]."""
    for side in sides:
        side.admit(tokens[:, : measurement.context])
    times = defaultdict(list)
    for burst in tokens[:, measurement.context :].split(measurement.steps, dim=1):
        for side in sides:
            times[side.name].append(side.decode_s(burst))
    return _medians(times)


def compare_prefills(sides: Sequence[Side], tokens: Tensor, measurement: Measurement) -> dict[str, float]:
    """Median seconds by side for one prompt [tokens]."""
    times = defaultdict(list)
    for _ in range(measurement.rounds + 1):
        for side in sides:
            times[side.name].append(side.prefill_s(tokens))
    return _medians(times)


def _medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def compare(report: Report, model: str, shape: Shape, sides: Sequence[Side], measurement: Measurement, ceilings: Device) -> None:
    """Adds a row and figures for each batch and for the prefill; the worker is the first of the sides. Figures begin with `model`."""
    generator = torch.Generator().manual_seed(SEED)
    for batch in measurement.batches:
        tokens = torch.randint(0, shape.vocab_size, (batch, measurement.num_tokens), generator=generator)
        taking_part = sides if batch <= measurement.max_compared_batch else sides[:1]
        needed = decode_step(shape, batch, measurement.num_tokens, measurement.storage)
        add_row(report, f"{model}_decode_{{}}_b{batch}", needed, compare_decodes(taking_part, tokens, measurement), ceilings)
    tokens = torch.randint(0, shape.vocab_size, (measurement.chunk,), generator=generator)
    needed = prefill_step(shape, measurement.chunk, measurement.chunk, measurement.storage)
    add_row(report, f"{model}_prefill_{{}}", needed, compare_prefills(sides, tokens, measurement), ceilings)


def add_row(report: Report, figure: str, needed: Step, seconds: Mapping[str, float], ceilings: Device) -> None:
    """`figure` has a place for what it tells; `seconds` by side, the worker's first."""
    rates = {name: needed.num_rows / found for name, found in seconds.items()}
    ours, *others = rates
    share = needed.seconds(ceilings) / seconds[ours]
    figures = {figure.format(f"tokens_per_s_{name.replace(' ', '_')}"): rate for name, rate in rates.items()}
    figures[figure.format("share")] = share
    cells = ["", "", ""]
    if others:
        best = max(others, key=rates.__getitem__)
        ratio = figures[figure.format("ratio")] = rates[ours] / rates[best]
        cells = [f"{rates[best]:,.1f}", best.removeprefix("transformers "), f"{ratio:.2f}"]
    step = figure.format(needed.num_rows).partition("_b")[0].replace("_", " ")
    report.add(step, f"{rates[ours]:,.1f}", *cells, f"{share:.0%}", **figures)
    print(*report.rows[-1], sep="  ", file=sys.stderr, flush=True)  # a whole run takes minutes


def best_ceilings(device: torch.device, dtype: torch.dtype) -> Device:
    """A ceiling is what was reached at best, whatever else the machine did meanwhile."""
    tries = [measure_ceilings(device, dtype) for _ in range(CEILING_TRIES)]
    return Device(max(one.bytes_per_s for one in tries), max(one.flop_per_s for one in tries))


def note_ceilings(report: Report, kind: str, ceilings: Device) -> None:
    report.title += f": {ceilings.bytes_per_s / 1e9:,.1f} GB/s, {ceilings.flop_per_s / 1e12:,.3f} TFLOP/s"
    report.figures |= {f"{kind}_bandwidth_gb_s": ceilings.bytes_per_s / 1e9, f"{kind}_matmul_tflop_s": ceilings.flop_per_s / 1e12}


def measure_cpu(report: Report, shape: Shape, measurement: Measurement) -> None:
    ceilings = best_ceilings(torch.device("cpu"), torch.float32)
    note_ceilings(report, "cpu", ceilings)
    report.figures["cpu_threads"] = torch.get_num_threads()
    with TemporaryDirectory(prefix="ossia-bench-") as folder:
        model_dir = Path(folder) / "model"
        make_checkpoint(model_dir, spec_of(shape), SEED)
        backend = load_model_backend(
            model_dir,
            tensor_parallel=SingleRank(),
            device="cpu",
            dtype="float32",
            block_size=BLOCK_SIZE,
            num_full_blocks=measurement.num_blocks,
            num_window_blocks=measurement.num_blocks,
            kv_cache_bytes=0,
            max_model_len=None,
            max_batch_tokens=measurement.chunk,
            max_num_seqs=max(measurement.batches),
        )
        transformers = open_transformers(model_dir, (torch.float32, torch.bfloat16))
    prompt = torch.randint(0, shape.vocab_size, (measurement.chunk,), generator=torch.Generator().manual_seed(SEED))
    difference = backend.prompt_logits(prompt.tolist()) - transformers[0].logits(prompt)
    report.figures["cpu_logit_difference"] = float(difference.abs().max())  # the largest, in float32: both compute the same
    compare(report, "cpu", shape, [Worker("ossia", backend, measurement.chunk), *transformers], measurement, ceilings)


def measure_gpu(report: Report, shapes: Mapping[str, Shape], compared: str, device: torch.device, measurement: Measurement) -> None:
    """`compared` names the shape that transformers is measured on as well. `device` may be a CPU, to try the measurement itself."""
    ceilings = best_ceilings(device, torch.bfloat16)
    note_ceilings(report, "gpu", ceilings)
    for name, shape in shapes.items():
        model, spec = f"gpu_{name.removeprefix('gpt-oss-')}", spec_of(shape)
        config = parse_config(spec.config_json(), spec.generation_config_json(), source=name)
        weights = partial(random_tensor, config=config, seed=SEED, device=device)
        backend = build_worker(weights, config, num_blocks=measurement.num_blocks, dtype=torch.bfloat16, device=device)
        backend.warm_up()
        if device.type == "cuda":
            capture_graphs(backend, config, measurement)
        sides: list[Side] = [Worker("ossia", backend, measurement.chunk)]
        if name == compared:
            sides.append(random_transformers(spec, torch.bfloat16, device))
        compare(report, model, shape, sides, measurement, ceilings)
        for case in Bench(device, torch.bfloat16, shape, measurement.context).experts(MOE_ROWS):
            seconds = measure_s(case.calls, device)
            share = case.part.seconds(ceilings) / seconds
            report.add(
                f"{model.replace('_', ' ')} experts {case.num_rows}",
                f"{case.num_rows / seconds:,.1f}",
                *[""] * 3,
                f"{share:.0%}",
                **{f"{model}_experts_share_{case.num_rows}": share},
            )


def capture_graphs(backend: ModelBackend, config: ModelConfig, measurement: Measurement) -> None:
    shapes = list_shapes(
        max_num_seqs=max(measurement.batches),
        max_model_len=measurement.num_tokens,
        block_size=BLOCK_SIZE,
        num_window_blocks=blocks_per_window(config, BLOCK_SIZE),
    )
    backend.graphs.capture([one for one in shapes if one.num_sequences in measurement.batches], CudaCapture())


def spec_of(shape: Shape) -> CheckpointSpec:
    """A shape's fields have the names that a checkpoint's sizes have."""
    return CheckpointSpec(**asdict(shape))


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--threads", type=int, help="of the CPU, default: torch's")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    report = Report("whole steps, medians; ceilings as measured", COLUMNS)
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        measure_gpu(report, SHAPES, "gpt-oss-20b", torch.device("cuda"), GPU)
    else:
        measure_cpu(report, CPU_SHAPES["small"], CPU)
    finish(report, arguments.json)
    if not is_gpu:
        print(
            "Not measured for want of a GPU: the steps of gpt-oss-20b and gpt-oss-120b, their experts alone, and transformers beside them."
        )


if __name__ == "__main__":
    main()
