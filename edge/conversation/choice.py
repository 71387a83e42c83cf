"""One choice of a conversation: the tokens of one sequence in, chat events out.

Joins the parser, the detokenizer and the stop strings, and hands log-probabilities out with the text that their tokens end.
"""

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edge.conversation.detokenize import Detokenizer
from edge.conversation.harmony_parse import Closed, HarmonyParser, Opened, ParsedChannel, ParseEvent
from edge.conversation.stop_strings import StopStrings
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.vocabulary import Vocabulary

_CHANNELS = {
    ParsedChannel.ANALYSIS: inference.CHANNEL_ANALYSIS,
    ParsedChannel.COMMENTARY: inference.CHANNEL_COMMENTARY,
    ParsedChannel.FINAL: inference.CHANNEL_FINAL,
}
_VISIBLE = (ParsedChannel.COMMENTARY, ParsedChannel.FINAL)


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What the request asks of every choice. Without `has_tools` a call is shown as commentary: a caller that offered none expects none."""

    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_reasoning: bool = True
    has_tools: bool = True
    logprobs: bool = False
    is_raw: bool = False  # the prompt was plain text: the first token is already content


@dataclass(slots=True)
class _OpenMessage:
    channel: ParsedChannel
    detokenizer: Detokenizer
    stops: StopStrings
    num_decoded: int = 0  # characters that left the detokenizer
    num_emitted: int = 0  # characters that were delivered


class Choice:
    """Feed every delta, then `finish`. `is_finished` tells that nothing more is wanted: the end, or a stop string."""

    def __init__(self, index: int, vocabulary: Vocabulary, options: ChoiceOptions) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.parser = HarmonyParser(vocabulary, ParsedChannel.FINAL if options.is_raw else None)
        self.is_finished = False
        self._vocabulary = vocabulary
        self._options = options
        self._message: _OpenMessage | None = None
        self._num_calls = 0
        self._text = ""  # of the open message, not yet in an event
        self._events: list[inference.ChatEvent] = []  # of the delta in hand
        self._logprobs: deque[tuple[int, inference.TextLogprobs]] = deque()  # waiting: the character that each token ends, and its entry
        if options.is_raw:
            self._open(Opened(ParsedChannel.FINAL))

    @property
    def num_reasoning_tokens(self) -> int:
        return self.parser.num_tokens[ParsedChannel.ANALYSIS]

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[sampling.TokenLogprobs] = ()) -> list[inference.ChatEvent]:
        """The events of one delta. A stop string ends the choice: its `choice_finished` is the last event."""
        for at, token_id in enumerate(token_ids):
            if self.is_finished:
                break
            self.token_ids.append(token_id)
            entry = self._describe(token_id, logprobs[at]) if self._options.logprobs and at < len(logprobs) else None
            for event in self.parser.feed(token_id):
                self._apply(event, entry)
        self._emit_text()
        return self._take_events()

    def finish(self, reason: sampling.FinishReason.ValueType, stop_token_id: int | None = None) -> list[inference.ChatEvent]:
        """The sequence has ended: what was held back, then `choice_finished`. Nothing if a stop string ended the choice before."""
        if self.is_finished:
            return []
        for event in self.parser.finish():
            self._apply(event, None)
        if not self.is_finished:
            if reason == sampling.FINISH_REASON_STOP and self._num_calls:
                reason = sampling.FINISH_REASON_TOOL_CALLS
            is_asked_for = stop_token_id is not None and stop_token_id in self._options.stop_token_ids
            self._end(reason, self._vocabulary.decode([stop_token_id]) if is_asked_for and stop_token_id is not None else "")
        return self._take_events()

    def _apply(self, event: ParseEvent, logprobs: inference.TextLogprobs | None) -> None:
        if self.is_finished:
            return
        if isinstance(event, Opened):
            self._open(event)
        elif isinstance(event, Closed):
            self._close()
        else:
            self._add(event.data, logprobs)

    def _open(self, opened: Opened) -> None:
        is_call = opened.channel is ParsedChannel.CALL
        channel = ParsedChannel.COMMENTARY if is_call and not self._options.has_tools else opened.channel
        self._message = _OpenMessage(channel, Detokenizer(), StopStrings(self._options.stop if channel in _VISIBLE else ()))
        if channel is ParsedChannel.CALL:
            call = inference.ToolCallDelta(
                choice=self.index, call=self._num_calls, id=f"call_{secrets.token_hex(12)}", name=opened.function
            )
            self._events.append(inference.ChatEvent(tool_call_delta=call))
            self._num_calls += 1

    def _add(self, data: bytes, logprobs: inference.TextLogprobs | None) -> None:
        message = self._message
        assert message is not None  # the parser opens a message before its text
        decoded = message.detokenizer.feed(data)
        message.num_decoded += len(decoded)
        if logprobs is not None and message.channel in _VISIBLE:
            self._logprobs.append((message.num_decoded + message.detokenizer.is_within_character, logprobs))
        self._deliver(message.stops.feed(decoded))

    def _close(self) -> None:
        message = self._message
        assert message is not None
        self._deliver(message.stops.feed(message.detokenizer.finish()))
        self._deliver(message.stops.flush())
        self._emit_text()
        self._message = None
        self._logprobs.clear()

    def _deliver(self, text: str) -> None:
        self._text += text
        if self._message is not None and self._message.stops.matched and not self.is_finished:
            self._emit_text()
            self._end(sampling.FINISH_REASON_STOP, self._message.stops.matched)

    def _emit_text(self) -> None:
        text, self._text = self._text, ""
        message = self._message
        if not text or message is None:
            return
        message.num_emitted += len(text)
        if message.channel is ParsedChannel.CALL:
            call = inference.ToolCallDelta(choice=self.index, call=self._num_calls - 1, arguments=text)
            self._events.append(inference.ChatEvent(tool_call_delta=call))
        elif message.channel is not ParsedChannel.ANALYSIS or self._options.include_reasoning:
            delta = inference.ChannelDelta(choice=self.index, channel=_CHANNELS[message.channel], text=text)
            delta.logprobs.extend(self._take_logprobs(message.num_emitted))
            self._events.append(inference.ChatEvent(channel_delta=delta))

    def _end(self, reason: sampling.FinishReason.ValueType, matched_stop: str) -> None:
        self.is_finished = True
        self.parser.finish()  # after a stop string a header may be open: its tokens count
        finished = inference.ChoiceFinished(choice=self.index, reason=reason, matched_stop=matched_stop, token_ids=self.token_ids)
        self._events.append(inference.ChatEvent(choice_finished=finished))

    def _take_events(self) -> list[inference.ChatEvent]:
        events, self._events = self._events, []
        return events

    def _take_logprobs(self, num_emitted: int) -> list[inference.TextLogprobs]:
        taken = []
        while self._logprobs and self._logprobs[0][0] <= num_emitted:
            taken.append(self._logprobs.popleft()[1])
        return taken

    def _describe(self, token_id: int, logprobs: sampling.TokenLogprobs) -> inference.TextLogprobs:
        top = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=False)
        return inference.TextLogprobs(chosen=self._candidate(token_id, logprobs.logprob), top=[self._candidate(*one) for one in top])

    def _candidate(self, token_id: int, logprob: float) -> inference.TextLogprobs.Candidate:
        return inference.TextLogprobs.Candidate(token_id=token_id, token=self._vocabulary.token_bytes(token_id), logprob=logprob)
