"""One chat request on its way: what is asked of the scheduler, and what its deltas become. Plain state, no I/O.

A turn ends when every choice has: with its sequence, or earlier with a stop string. `completed` is then the turn's last event.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge.conversation.choice import Choice, ChoiceOptions
from edge.conversation.harmony_parse import ParsedChannel
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from protos.ossia.v1 import scheduler_pb2 as scheduler
from services.errors import Cancelled, Internal, from_proto
from services.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A checked request: the model that answers, what the scheduler is asked, and what is asked of every choice."""

    request_id: str
    model: scheduler.ModelStatus
    generate: scheduler.GenerateRequest
    options: ChoiceOptions
    created: int  # seconds since the epoch

    @property
    def started(self) -> inference.ChatEvent:
        return inference.ChatEvent(
            started=inference.ChatStarted(
                request_id=self.request_id,
                model=self.model.model,
                created=self.created,
                prompt_tokens=len(self.generate.prompt_token_ids),
                system_fingerprint=self.model.fingerprint,
            )
        )


class Turn:
    def __init__(self, prepared: PreparedChat, vocabulary: Vocabulary) -> None:
        self._prompt_tokens = len(prepared.generate.prompt_token_ids)
        self._choices = [Choice(at, vocabulary, prepared.options) for at in range(max(1, prepared.generate.n))]
        self._cached_tokens = 0
        self._timings = sampling.Timings()

    @property
    def is_finished(self) -> bool:
        return all(choice.is_finished for choice in self._choices)

    @property
    def num_malformed(self) -> int:
        return sum(choice.parser.num_malformed for choice in self._choices)

    def count_tokens(self, channel: ParsedChannel) -> int:
        return sum(choice.parser.num_tokens[channel] for choice in self._choices)

    def apply(self, deltas: Iterable[scheduler.TokenDelta]) -> Iterator[inference.ChatEvent]:
        """The events of these deltas. Raises the OssiaError that ended a sequence, after what was said before; the turn is then over."""
        for delta in deltas:
            yield from self._apply(delta)

    def _apply(self, delta: scheduler.TokenDelta) -> Iterator[inference.ChatEvent]:
        if delta.index >= len(self._choices):
            raise Internal(f"the scheduler sent sequence {delta.index} of a request for {len(self._choices)}")
        choice = self._choices[delta.index]
        yield from choice.feed(delta.token_ids, delta.logprobs)
        if delta.HasField("finished"):
            self._settle(delta.finished, choice)
            stop_token_id = delta.finished.stop_token_id if delta.finished.HasField("stop_token_id") else None
            yield from choice.finish(delta.finished.reason, stop_token_id)

    def complete(self, ttft_s: float, total_s: float) -> inference.ChatEvent:
        """The last event. Times are seconds since the request's arrival."""
        self._timings.ttft_s, self._timings.total_s = ttft_s, total_s
        return inference.ChatEvent(completed=inference.ChatCompleted(usage=self.usage, timings=self._timings))

    @property
    def usage(self) -> sampling.Usage:
        """What was used so far. Completion tokens are those that were delivered: a choice that a stop string ended counts up to it."""
        return sampling.Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(len(choice.token_ids) for choice in self._choices),
            cached_tokens=self._cached_tokens,
            reasoning_tokens=self.count_tokens(ParsedChannel.ANALYSIS),
        )

    def _settle(self, finished: scheduler.Finished, choice: Choice) -> None:
        if finished.reason == sampling.FINISH_REASON_ERROR:
            raise from_proto(finished.error)
        if finished.reason == sampling.FINISH_REASON_CANCELLED and not choice.is_finished:
            raise Cancelled("the request was cancelled in the cluster; send it again")
        self._cached_tokens = max(self._cached_tokens, finished.usage.cached_tokens)
        timings = finished.timings
        if timings.total_s >= self._timings.total_s:  # of several sequences the one that took longest
            self._timings.CopyFrom(timings)
