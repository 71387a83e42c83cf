"""One request while it is open: where its tokens go, its span, and the sequences that it became."""

from collections.abc import Callable, Iterable, Mapping

from opentelemetry.trace import Span, Status, StatusCode

from protos.ossia.v1 import sampling_pb2, scheduler_pb2
from scheduler.outbox import Outbox
from scheduler.sequence import Admission, Event, Finish, FinishReason, Sequence
from services import errors
from services.telemetry import inject_context

REASONS = {
    FinishReason.STOP: sampling_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sampling_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: sampling_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: sampling_pb2.FINISH_REASON_ERROR,
}


class OpenRequest:
    """Carried by the core as `Request.handle`. A group that takes one of its sequences, or all of them, says so by `place`."""

    def __init__(self, outbox: Outbox, stream_id: int, span: Span, on_closed: Callable[["OpenRequest"], None]) -> None:
        self.outbox = outbox
        self.stream_id = stream_id
        self.span = span
        self.placed: dict[int, tuple[str, Sequence]] = {}  # group id and sequence, by index
        self._on_closed = on_closed
        self._num_told = 0  # sequences whose end the caller was told of
        self._has_token = False

    def place(self, group_id: str, sequences: Iterable[Sequence]) -> None:
        self.placed.update((one.index, (group_id, one)) for one in sequences)

    def take(self, event: Event) -> scheduler_pb2.TokenDelta:
        """The event as the caller reads it; the last one of the last sequence closes the request."""
        delta = scheduler_pb2.TokenDelta(stream_id=self.stream_id, index=event.sequence.index, token_ids=event.token_ids)
        if event.token_ids and not self._has_token:
            self._has_token = True
            self.span.add_event("first_token")
        if event.logprobs is not None:
            top = event.logprobs.top
            delta.logprobs.add(
                logprob=event.logprobs.logprob, top_token_ids=[one for one, _ in top], top_logprobs=[value for _, value in top]
            )
        if event.finish is not None:
            delta.finished.CopyFrom(encode_finish(event.sequence, event.finish))
            self._num_told += 1
            if self._num_told == len(self.placed):
                self._close(event.finish)
        return delta

    def _close(self, finish: Finish) -> None:
        num_tokens = sum(one.request.num_resumed_tokens + len(one.output_token_ids) for _, one in self.placed.values())
        self.span.add_event("finished", {"ossia.reason": finish.reason.value, "ossia.preemptions": finish.num_preemptions})
        self.span.set_attribute("gen_ai.response.finish_reasons", [finish.reason.value])
        self.span.set_attribute("gen_ai.usage.output_tokens", num_tokens)
        if finish.error is not None:
            self.span.set_status(Status(StatusCode.ERROR, finish.error.message))
        self.span.end()
        self._on_closed(self)

    def sampling_of(self, sequence: Sequence) -> sampling_pb2.SamplingParams:
        """The request's sampling as the worker is to use it: sequence i draws with seed + i."""
        wire = sequence.request.wire_sampling
        assert isinstance(wire, sampling_pb2.SamplingParams)
        if sequence.index == 0:
            return wire
        own = sampling_pb2.SamplingParams()
        own.CopyFrom(wire)
        own.seed = (wire.seed + sequence.index) % 2**64
        return own


def handle_of(sequence: Sequence) -> OpenRequest:
    handle = sequence.request.handle
    assert isinstance(handle, OpenRequest)
    return handle


def sampling_of(admission: Admission) -> sampling_pb2.SamplingParams:
    return handle_of(admission.sequence).sampling_of(admission.sequence)


def trace_context_of(admission: Admission) -> Mapping[str, str]:
    return inject_context(handle_of(admission.sequence).span)


def encode_finish(sequence: Sequence, finish: Finish) -> scheduler_pb2.Finished:
    queue_s, ttft_s = finish.queue_s or 0.0, finish.ttft_s or 0.0
    return scheduler_pb2.Finished(
        reason=REASONS[finish.reason],
        stop_token_id=finish.stop_token_id,
        usage=sampling_pb2.Usage(
            prompt_tokens=sequence.request.num_prompt_tokens,
            completion_tokens=finish.num_completion_tokens,
            cached_tokens=finish.num_cached_tokens,
        ),
        timings=sampling_pb2.Timings(
            queue_s=queue_s,
            prefill_s=max(0.0, ttft_s - queue_s),
            ttft_s=ttft_s,
            total_s=finish.total_s,
            num_preemptions=finish.num_preemptions,
        ),
        error=errors.to_proto(finish.error) if finish.error else None,
    )
