"""The GPUs of a group as its metrics show them: read from the driver whenever they are scraped, without touching the model's context."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pynvml
from prometheus_client import Gauge

from services.telemetry import get_logger
from worker.metrics import WorkerMetrics

log = get_logger(__name__)
Gpu = object  # the driver's handle


@contextmanager
def watch_gpus(metrics: WorkerMetrics, num_ranks: int) -> Iterator[None]:
    """Rank i uses the i-th visible GPU. 0 ranks: none. A driver that tells nothing costs the metrics, not the service."""
    if num_ranks == 0:
        yield
        return
    try:
        pynvml.nvmlInit()
        for name, gpu in _visible(num_ranks):
            _watch(metrics, name, gpu)
    except pynvml.NVMLError as error:
        log.warning("gpus_not_watched", reason=str(error))
    yield  # no shutdown: a scrape may be under way, and the process ends


def _visible(num_ranks: int) -> list[tuple[str, Gpu]]:
    """The driver's names and handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, by index or by UUID; of all where it is not set."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in chosen.split(",")] if chosen else [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [(name, _open(name)) for name in names[:num_ranks]]


def _open(name: str) -> Gpu:
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _watch(metrics: WorkerMetrics, name: str, gpu: Gpu) -> None:
    sensors: dict[Gauge, Callable[[], float]] = {
        metrics.gpu_utilization: lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
        metrics.gpu_memory_used: lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
        metrics.gpu_memory_total: lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).total,
        metrics.gpu_temperature: lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
        metrics.gpu_power: lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    }
    for gauge, sensor in sensors.items():
        gauge.labels(name).set_function(partial(_read, sensor))


def _read(sensor: Callable[[], float]) -> float:
    """NaN where the driver does not tell: not every GPU has every sensor."""
    try:
        return sensor()
    except pynvml.NVMLError:
        return math.nan
