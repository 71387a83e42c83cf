"""One span per admitted sequence, from its admission to its release, under the scheduler's span. Costs nothing where tracing is off."""

from collections.abc import Iterable

from opentelemetry.trace import NoOpTracer, Span, Status, StatusCode, Tracer

from protos.ossia.v1 import worker_pb2
from services.telemetry import extract_context
from worker.step_plan import StepOutcome


class SequenceSpans:
    """The open spans of one stream."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = None if isinstance(tracer, NoOpTracer) else tracer
        self._spans: dict[int, Span] = {}  # by seq_id; changed by the methods only
        self._silent: set[int] = set()  # those that have drawn no token yet

    def note_step(self, plan: worker_pb2.StepPlan, outcome: StepOutcome) -> None:
        """Follows a plan that was applied."""
        if self._tracer is None:
            return
        self._end(plan.released)
        for admitted in plan.admitted:
            self._start(self._tracer, admitted)
        for drawn in outcome.output.drawn:
            if drawn.seq_id in self._silent:
                self._silent.remove(drawn.seq_id)
                self._spans[drawn.seq_id].add_event("first_token", {"ossia.step": outcome.step})
        for failure in outcome.failures:
            if span := self._spans.get(failure.seq_id):
                span.set_status(Status(StatusCode.ERROR, failure.error.message))

    def end_all(self) -> None:
        self._end(list(self._spans))

    def _start(self, tracer: Tracer, admitted: worker_pb2.AdmittedSequence) -> None:
        attributes: dict[str, str | int] = {
            "ossia.request_id": admitted.request_id,
            "ossia.seq_id": admitted.seq_id,
            "gen_ai.usage.input_tokens": admitted.num_prompt_tokens,
            "ossia.cached_tokens": admitted.num_computed_tokens,
        }
        context = extract_context(admitted.trace_context)
        self._spans[admitted.seq_id] = tracer.start_span("worker.sequence", context=context, attributes=attributes)
        self._silent.add(admitted.seq_id)

    def _end(self, seq_ids: Iterable[int]) -> None:
        for seq_id in seq_ids:
            self._silent.discard(seq_id)
            if span := self._spans.pop(seq_id, None):
                span.end()
