"""The GPUs' metrics, from a driver that is played here: its numbers, and what it does not tell."""

import math
from types import SimpleNamespace

import pynvml
import pytest

from worker.gpus import watch_gpus
from worker.metrics import WorkerMetrics


class Driver:
    """Three GPUs; the one that is asked for by UUID has no temperature sensor."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pynvml, "nvmlInit", lambda: None)
        patch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        patch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        patch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: SimpleNamespace(gpu=75))
        patch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: SimpleNamespace(used=3, total=4))
        patch.setattr(pynvml, "nvmlDeviceGetTemperature", self.temperature)
        patch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda gpu: 350_000)

    def temperature(self, gpu: object, sensor: int) -> int:
        if isinstance(gpu, str):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 60


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Driver().install(monkeypatch)


def value(metrics: WorkerMetrics, name: str, gpu: str) -> float | None:
    return metrics.registry.get_sample_value(f"ossia_worker_gpu_{name}", {"gpu": gpu})


def test_each_rank_has_the_metrics_of_its_gpu() -> None:
    with watch_gpus(metrics := WorkerMetrics(), num_ranks=2):
        told = ("utilization_ratio", "memory_used_bytes", "memory_total_bytes", "temperature_celsius", "power_watts")
        for gpu in ("0", "1"):
            assert [value(metrics, name, gpu) for name in told] == [0.75, 3, 4, 60, 350]
        assert value(metrics, "utilization_ratio", "2") is None


def test_the_visible_gpus_are_the_ones_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    with watch_gpus(metrics := WorkerMetrics(), num_ranks=2):
        assert value(metrics, "temperature_celsius", "2") == 60
        assert value(metrics, "power_watts", "GPU-abc") == 350
        silent = value(metrics, "temperature_celsius", "GPU-abc")
        assert silent is not None and math.isnan(silent), "a sensor that is not there does not break the page"


def test_without_a_driver_the_service_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with watch_gpus(metrics := WorkerMetrics(), num_ranks=1):
        assert value(metrics, "utilization_ratio", "0") is None
