"""One choice: the same tokens give the same text however they are delivered, and nothing is lost or raised."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.conversation.choice import Choice, ChoiceOptions
from protos.ossia.v1 import inference_pb2 as inference
from protos.ossia.v1 import sampling_pb2 as sampling
from services.vocabulary import CONTROL_NAMES, VOCAB_SIZE, load_vocabulary

V = load_vocabulary()
NUM_FUZZED_STREAMS = 25_000  # of each seed


def run(token_ids: list[int], cuts: Sequence[int], options: ChoiceOptions) -> tuple[Choice, list[inference.ChatEvent]]:
    choice, events, begin = Choice(0, V, options), [], 0
    for end in [*cuts, len(token_ids)]:
        events += choice.feed(token_ids[begin:end])
        begin = end
    return choice, events + choice.finish(sampling.FINISH_REASON_STOP)


def join(events: list[inference.ChatEvent]) -> list[tuple[object, ...]]:
    """The events with neighbouring texts joined and the drawn call ids left out: what a client ends up with."""
    joined: list[tuple[object, ...]] = []
    for event in events:
        if event.HasField("channel_delta"):
            key, text = ("channel", event.channel_delta.channel), event.channel_delta.text
        elif event.HasField("tool_call_delta"):
            key, text = ("call", event.tool_call_delta.call), event.tool_call_delta.name + event.tool_call_delta.arguments
        else:
            key, text = ("finished", event.choice_finished.reason), event.choice_finished.matched_stop
        if joined and joined[-1][:2] == key:
            joined[-1] = (*key, f"{joined[-1][2]}{text}")
        else:
            joined.append((*key, text))
    return joined


def see(text: str, **options: object) -> list[tuple[object, ...]]:
    return join(run(V.encode_harmony(text), [], ChoiceOptions(**options))[1])  # type: ignore[arg-type]  # a test's own words


@pytest.mark.parametrize("seed", range(11, 15))
def test_any_tokens_in_any_chunks_give_the_same_text(seed: int) -> None:
    draw = random.Random(seed)
    words = [
        V.encode(word)[0] for word in ("assistant", "analysis", "commentary", "final", " to", "=", "functions", ".f", "Hi", "st", "op")
    ]
    alphabet = [*CONTROL_NAMES, *CONTROL_NAMES, *words, VOCAB_SIZE, 200_013, *V.encode("\U0001f9ff")]
    options = ChoiceOptions(stop=("stop", "HiHi"))
    for _ in range(NUM_FUZZED_STREAMS):
        token_ids = draw.choices(alphabet, k=draw.randint(0, 12))
        whole, events = run(token_ids, [], options)
        cuts = sorted(draw.randint(0, len(token_ids)) for _ in range(draw.randint(1, 4)))
        chunked, chunked_events = run(token_ids, cuts, options)
        assert join(events) == join(chunked_events), token_ids
        assert sum(whole.parser.num_tokens.values()) == len(whole.token_ids) == len(chunked.token_ids)
        assert whole.token_ids == token_ids[: len(whole.token_ids)]
        assert [event.HasField("choice_finished") for event in events] == [False] * (len(events) - 1) + [True]


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=5))
@settings(deadline=None)
def test_bytes_that_are_no_utf8_read_the_same_in_any_chunks(data: bytes, cuts: list[int]) -> None:
    byte_ids = {V.token_bytes(token_id): token_id for token_id in range(256)}
    token_ids = V.encode_harmony("<|channel|>final<|message|>") + [byte_ids[bytes([byte])] for byte in data]
    expected = data.decode("utf-8", "replace")
    cuts = sorted(min(cut, len(token_ids)) for cut in cuts)
    texts = [event.channel_delta.text for event in run(token_ids, cuts, ChoiceOptions())[1]]
    assert "".join(texts) == expected


def test_a_character_of_two_tokens_waits_for_the_second() -> None:
    token_ids = V.encode("\U0001f9ff")
    choice = Choice(0, V, ChoiceOptions())
    choice.feed(V.encode_harmony("<|channel|>final<|message|>"))
    assert len(token_ids) > 1
    assert choice.feed(token_ids[:-1]) == []
    assert choice.feed(token_ids[-1:])[0].channel_delta.text == "\U0001f9ff"


def test_a_stop_string_ends_visible_text_only() -> None:
    text = "<|channel|>analysis<|message|>a STOP b<|end|><|start|>assistant<|channel|>final<|message|>c STOP d<|return|>"
    assert see(text, stop=("STOP",)) == [
        ("channel", inference.CHANNEL_ANALYSIS, "a STOP b"),
        ("channel", inference.CHANNEL_FINAL, "c "),
        ("finished", sampling.FINISH_REASON_STOP, "STOP"),
    ]


def test_a_call_is_announced_with_id_and_name_and_ends_the_turn_as_a_call() -> None:
    _, events = run(V.encode_harmony(" to=functions.get<|channel|>commentary json<|message|>{}<|call|>"), [], ChoiceOptions())
    first, second, last = events
    assert first.tool_call_delta.id.startswith("call_") and first.tool_call_delta.name == "get"
    assert (second.tool_call_delta.id, second.tool_call_delta.arguments) == ("", "{}")
    assert last.choice_finished.reason == sampling.FINISH_REASON_TOOL_CALLS


def test_a_call_that_nobody_offered_is_shown_as_commentary() -> None:
    text = " to=functions.get<|channel|>commentary json<|message|>{}<|call|>"
    assert see(text, has_tools=False) == [("channel", inference.CHANNEL_COMMENTARY, "{}"), ("finished", sampling.FINISH_REASON_STOP, "")]


def test_reasoning_may_be_left_out_and_still_counts() -> None:
    choice, events = run(V.encode_harmony("<|channel|>analysis<|message|>Hm<|end|>"), [], ChoiceOptions(include_reasoning=False))
    assert [event.WhichOneof("event") for event in events] == ["choice_finished"]
    assert choice.num_reasoning_tokens == 5


@pytest.mark.parametrize("step", [1, 2, 50])
def test_each_visible_token_brings_its_logprobs_once(step: int) -> None:
    head, body = V.encode_harmony("<|channel|>final<|message|>"), V.encode("one two\U0001f9ff three")
    token_ids = head + body
    entries = [sampling.TokenLogprobs(logprob=-float(at), top_token_ids=[at], top_logprobs=[-1.0]) for at in range(len(token_ids))]
    choice, events = Choice(0, V, ChoiceOptions(logprobs=True, stop=("wot",))), []
    for begin in range(0, len(token_ids), step):
        events += choice.feed(token_ids[begin : begin + step], entries[begin : begin + step])
    events += choice.finish(sampling.FINISH_REASON_LENGTH)
    got = [one.chosen.token_id for event in events for one in event.channel_delta.logprobs]
    assert got == body


def test_a_stop_token_that_was_asked_for_is_named() -> None:
    stop_token_id = V.encode("!")[0]
    choice = Choice(0, V, ChoiceOptions(stop_token_ids=frozenset({stop_token_id})))
    choice.feed(V.encode_harmony("<|channel|>final<|message|>Hi!"))
    assert choice.finish(sampling.FINISH_REASON_STOP, stop_token_id)[-1].choice_finished.matched_stop == "!"
