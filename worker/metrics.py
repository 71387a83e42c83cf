"""Every Prometheus metric of a worker."""

from prometheus_client import CollectorRegistry

from protos.ossia.v1 import sampling_pb2
from services.metrics import MetricSet
from worker.step_plan import StepOutcome

STEP_BUCKETS_S = (0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PLAN_ERRORS = (
    sampling_pb2.ERROR_CODE_STALE_EPOCH,
    sampling_pb2.ERROR_CODE_UNKNOWN_SEQUENCE,
    sampling_pb2.ERROR_CODE_BLOCK_OUT_OF_RANGE,
    sampling_pb2.ERROR_CODE_INVALID_PLAN,
)
SEQUENCE_ERRORS = (sampling_pb2.ERROR_CODE_INVALID_LOGITS, sampling_pb2.ERROR_CODE_CONSTRAINT_FAILED)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class WorkerMetrics(MetricSet):
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__("worker", registry)
        self._step_time = self.histogram("step_seconds", "Time of one step on the device", buckets=STEP_BUCKETS_S)
        self._batch_size = self.histogram("batch_size", "Sequences computed by one step", buckets=BATCH_BUCKETS)
        self._tokens = self.counter("tokens", "Tokens computed (prefill, decode) or drawn", "kind")
        self._held = self.gauge("sequences_held", "Sequences held after the last step")
        self._refused = self.counter("plans_refused", "Plans refused whole", "code")
        self._failed = self.counter("sequences_failed", "Sequences ended by an error", "code")
        for code in PLAN_ERRORS:
            self._refused.labels(sampling_pb2.ErrorCode.Name(code))  # from 0 on, so that an alert sees the first one
        for code in SEQUENCE_ERRORS:
            self._failed.labels(sampling_pb2.ErrorCode.Name(code))
        self._takeovers = self.counter("takeovers", "Streams replaced by another")
        self._loaded = self.gauge("loaded_bytes", "Bytes of weights that rank 0 has loaded")
        self._to_load = self.gauge("to_load_bytes", "Bytes of weights that rank 0 loads in all")
        self.gpu_utilization = self.gauge("gpu_utilization_ratio", "Share of the last second in which a kernel ran", "gpu")
        self.gpu_memory_used = self.gauge("gpu_memory_used_bytes", "Memory in use on the GPU, by anyone", "gpu")
        self.gpu_memory_total = self.gauge("gpu_memory_total_bytes", "Memory of the GPU", "gpu")
        self.gpu_temperature = self.gauge("gpu_temperature_celsius", "Temperature of the GPU's core", "gpu")
        self.gpu_power = self.gauge("gpu_power_watts", "Power that the GPU draws", "gpu")

    def note_outcome(self, outcome: StepOutcome) -> None:
        if outcome.refusal:
            self._refused.labels(sampling_pb2.ErrorCode.Name(outcome.refusal.code)).inc()
            return
        self._held.set(outcome.num_held)
        for failure in outcome.failures:
            self._failed.labels(sampling_pb2.ErrorCode.Name(failure.error.code)).inc()
        if outcome.num_scheduled:
            self._step_time.observe(outcome.device_time_s)
            self._batch_size.observe(outcome.num_scheduled)
            self._tokens.labels("prefill").inc(outcome.num_prefill_tokens)
            self._tokens.labels("decode").inc(outcome.num_decode_tokens)
            self._tokens.labels("drawn").inc(len(outcome.output.drawn))

    def note_loading(self, num_done: int, num_all: int) -> None:
        self._loaded.set(num_done)
        self._to_load.set(num_all)

    def note_takeover(self) -> None:
        self._takeovers.inc()

    def note_forgotten(self) -> None:
        self._held.set(0)
