"""The parser is total: it agrees with the format's own library on valid turns and keeps every token of any other."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import Author, Message, Role, StreamableParser, TextContent

from edge.conversation.harmony_parse import MAX_HEADER_TOKENS, Closed, HarmonyParser, Opened, ParsedChannel, Text
from services.vocabulary import CONTROL_NAMES, VOCAB_SIZE, load_vocabulary

V = load_vocabulary()


def parse(token_ids: list[int]) -> tuple[HarmonyParser, list[tuple[str, str, str]]]:
    """The parser after its turn, and the turn's messages: channel, function, text."""
    parser = HarmonyParser(V)
    events = [event for token_id in token_ids for event in parser.feed(token_id)] + parser.finish()
    messages: list[tuple[str, str, bytes]] = []
    for event in events:
        if isinstance(event, Opened):
            messages.append((event.channel.value, event.function, b""))
        elif isinstance(event, Text):
            channel, function, data = messages[-1]
            messages[-1] = (channel, function, data + event.data)
    assert sum(isinstance(event, Closed) for event in events) == len(messages)
    assert sum(parser.num_tokens.values()) == len(token_ids)
    return parser, [(channel, function, data.decode("utf-8", "replace")) for channel, function, data in messages]


def read(text: str) -> tuple[list[tuple[str, str, str]], int]:
    parser, messages = parse(V.encode_harmony(text))
    return messages, parser.num_malformed


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("<|channel|>final<|message|>Hi<|return|>", [("final", "", "Hi")]),
        (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            [("analysis", "", "Hm"), ("final", "", "Hi")],
        ),
        (" to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>analysis to=functions.f code<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>commentary<|message|>Let me look.<|end|>", [("commentary", "", "Let me look.")]),
        ("<|channel|>commentary to=f<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>final<|message|>cut he", [("final", "", "cut he")]),
        ("<|channel|>ana", []),
        ("<|channel|>analysis", []),
    ],
)
def test_a_valid_turn_is_read_without_complaint(text: str, messages: list[tuple[str, str, str]]) -> None:
    assert read(text) == (messages, 0)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("plain words", [("final", "", "plain words")]),
        ("<|channel|>poetry<|message|>Hi<|return|>", [("final", "", "Hi")]),
        ("<|message|>Hi<|return|>", [("final", "", "Hi")]),
        ("<|channel|>final to=functions.f<|message|>Hi<|return|>", [("final", "", "Hi")]),
        (" to=functions.f<|message|>{}<|call|>", [("call", "f", "{}")]),
        ("<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi<|return|>", [("analysis", "", "Hm"), ("final", "", "Hi")]),
        ("<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>final<|message|>Hi", [("analysis", "", "Hm"), ("final", "", "Hi")]),
        ("<|channel|>final<|message|>a<|message|>b<|constrain|>c<|return|>", [("final", "", "abc")]),
        ("<|channel|>final<|message|>Hi<|end|>there", [("final", "", "Hi"), ("final", "", "there")]),
        ("<|channel|>final<|message|>Hi<|end|>assistant<|channel|>final<|message|>b", [("final", "", "Hi"), ("final", "", "b")]),
        ("<|channel|>final<|message|>Hi<|end|><|start|>user<|message|>You?<|end|>", [("final", "", "Hi"), ("final", "", "You?")]),
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant Hello<|return|>", [("analysis", "", "Hm"), ("final", "", " Hello")]),
        ("<|channel|>final<|end|>", []),
    ],
)
def test_a_malformed_turn_becomes_content_and_a_count(text: str, messages: list[tuple[str, str, str]]) -> None:
    got, num_malformed = read(text)
    assert got == messages
    assert num_malformed > 0


def test_a_header_that_never_ends_is_released_within_a_bound() -> None:
    parser, words = HarmonyParser(V), V.encode(" word" * (MAX_HEADER_TOKENS + 5))
    released = [event for token_id in words[:MAX_HEADER_TOKENS] for event in parser.feed(token_id)]
    assert released[0] == Opened(ParsedChannel.FINAL)
    assert len(released) == 1 + MAX_HEADER_TOKENS
    assert parser.feed(words[-1]) == [Text(b" word", MAX_HEADER_TOKENS)]
    assert parser.num_malformed == 1


def test_header_body_and_end_count_in_the_channel_of_their_message() -> None:
    parser, _ = parse(V.encode_harmony("<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>"))
    assert parser.num_tokens == {ParsedChannel.ANALYSIS: 5, ParsedChannel.COMMENTARY: 0, ParsedChannel.FINAL: 7, ParsedChannel.CALL: 0}


BODIES = st.text(st.characters(codec="utf-8"), max_size=30)
FUNCTIONS = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)


def a_message(channel: str, recipient: str | None, body: str) -> Message:
    message = Message(author=Author(role=Role.ASSISTANT), content=[TextContent(text=body)], channel=channel)
    return message if recipient is None else message.with_recipient("functions." + recipient).with_content_type("<|constrain|>json")


MESSAGES = st.builds(a_message, st.sampled_from(["analysis", "commentary", "final"]), st.none(), BODIES) | st.builds(
    a_message, st.sampled_from(["analysis", "commentary"]), FUNCTIONS, BODIES
)


@given(st.lists(MESSAGES, min_size=1, max_size=4))
@settings(deadline=None, max_examples=300)
def test_valid_turns_are_read_as_the_formats_own_library_reads_them(turn: list[Message]) -> None:
    rendered = [token_id for message in turn for token_id in V.harmony.render(message)]
    token_ids = rendered[2:]  # generation begins after `<|start|>assistant`
    theirs = StreamableParser(V.harmony, Role.ASSISTANT)
    for token_id in token_ids:
        theirs.process(token_id)
    expected = [
        (
            "call" if message.recipient else str(message.channel),
            (message.recipient or "").removeprefix("functions."),
            message.content[0].text,
        )
        for message in theirs.messages
    ]
    parser, messages = parse(token_ids)
    assert messages == expected
    assert parser.num_malformed == 0


def test_no_token_stream_raises_or_loses_a_token() -> None:
    """Chunked delivery is fuzzed where chunks exist, in test_choice.py; here each prefix of a stream is an input of its own."""
    draw = random.Random(7)
    words = [V.encode(word)[0] for word in ("assistant", "analysis", "final", " to", "=", "functions", ".f", "json", " ", "user", "Hi")]
    alphabet = [*CONTROL_NAMES, *words, VOCAB_SIZE, 200_013, *V.encode("\U0001f9ff")]
    for _ in range(20_000):
        token_ids = draw.choices(alphabet, k=draw.randint(0, 14))
        parse(token_ids)
