"""A sample of what `fuzz_harmony` reads by the million, and that its checks can fail."""

import random

import pytest

from edge.conversation.choice import Choice
from edge.conversation.harmony_parse import HarmonyParser, ParsedChannel
from services.vocabulary import load_vocabulary
from tests.edge.fuzz_harmony import check_stream, run

V = load_vocabulary()
ANSWER = V.encode_harmony("<|channel|>final<|message|>Hi there<|return|>")


def test_random_streams_read_the_same_in_every_chunking() -> None:
    num_streams, num_readings = run(seed=123, num_streams=3000)
    assert num_readings > 3 * num_streams


def test_text_that_depends_on_chunks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    emit_text = Choice._emit_text

    def forget_short(self: Choice) -> None:
        self._text = self._text if len(self._text) > 2 else ""
        emit_text(self)

    monkeypatch.setattr(Choice, "_emit_text", forget_short)
    with pytest.raises(AssertionError, match="reads otherwise"):
        check_stream(ANSWER, random.Random(1))


def test_a_lost_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    feed_body = HarmonyParser._feed_body

    def lose(self: HarmonyParser, token_id: int, channel: ParsedChannel) -> list[object]:
        events = feed_body(self, token_id, channel)
        self.num_tokens[channel] -= 1
        return list(events)

    monkeypatch.setattr(HarmonyParser, "_feed_body", lose)
    with pytest.raises(AssertionError, match="a token was lost"):
        check_stream(ANSWER, random.Random(1))
