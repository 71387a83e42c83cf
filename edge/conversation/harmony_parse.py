"""Generated tokens to messages: a total state machine over the Harmony format.

A turn is a row of messages, `<|start|>assistant HEADER<|message|>BODY<|end|>`; the prompt ends with the first `<|start|>assistant`, so
generation begins within a header. Whatever the tokens are, nothing raises, nothing is held without bound, and every token is counted in
exactly one channel, that of the message whose header, body or end it is. What breaks the format is counted in `num_malformed` and read in
the way that shows the most:

    a header that never comes to `<|message|>`        its text is content of `final`
    a channel that is unknown or absent               the message is content of `final`
    a role other than `assistant`                     the message is content of `final`
    `<|start|>` or `<|channel|>` within a body        the message ends there and another begins
    any other control token within a body             it is dropped from the text

Knows nothing of tools: a recipient is a name. Knows token ids and bytes: characters are made elsewhere.
"""

from dataclasses import dataclass
from enum import StrEnum

from services.vocabulary import CALL, CHANNEL, END, FIRST_CONTROL_ID, MESSAGE, RETURN, START, Vocabulary

# A function's name of 64 characters is at most 64 tokens; the rest of a header is about ten.
MAX_HEADER_TOKENS = 96
_CLOSING = frozenset((END, RETURN, CALL))
_NOBODY = frozenset(("", "assistant", "user", "all"))  # recipients that are no function


class ParsedChannel(StrEnum):
    """Where a token counts."""

    ANALYSIS = "analysis"
    COMMENTARY = "commentary"
    FINAL = "final"
    CALL = "call"


_CHANNELS = {name.value: name for name in (ParsedChannel.ANALYSIS, ParsedChannel.COMMENTARY, ParsedChannel.FINAL)}


@dataclass(frozen=True, slots=True)
class Opened:
    """A message begins. `function` is the name that a call goes to; empty where the channel is not CALL."""

    channel: ParsedChannel
    function: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes of one token of the open message; `position` is the token's place in the turn, from 0."""

    data: bytes
    position: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The open message has ended."""


ParseEvent = Opened | Text | Closed


@dataclass(frozen=True, slots=True)
class Header:
    channel: ParsedChannel
    function: str
    is_malformed: bool


class HarmonyParser:
    """One turn. Feed every token, then `finish`; the events do not depend on how the tokens came in."""

    def __init__(self, vocabulary: Vocabulary, opened: ParsedChannel | None = None) -> None:
        self._vocabulary = vocabulary
        self._channel = opened  # of the open message; None: within a header
        self._header: list[int] = []  # the header's tokens so far, at most MAX_HEADER_TOKENS
        self._is_expected = True  # the prompt's `<|start|>assistant` stands before the header
        self._position = 0  # tokens fed
        self.num_tokens = dict.fromkeys(ParsedChannel, 0)
        self.num_malformed = 0

    @property
    def is_in_body(self) -> bool:
        return self._channel is not None

    def feed(self, token_id: int) -> list[ParseEvent]:
        self._position += 1
        return self._feed_header(token_id) if self._channel is None else self._feed_body(token_id, self._channel)

    def finish(self) -> list[ParseEvent]:
        """The turn is over, perhaps cut: closes what is open and releases what was held back."""
        if self._channel is not None:
            return self._close()
        return self._abandon_header(is_cut=True) if self._header else []

    def _feed_body(self, token_id: int, channel: ParsedChannel) -> list[ParseEvent]:
        if token_id in (START, CHANNEL):
            self.num_malformed += 1
            events = self._close()
            self._is_expected = token_id == CHANNEL  # the role may be left out there
            return events + self._feed_header(token_id)
        self.num_tokens[channel] += 1
        if token_id < FIRST_CONTROL_ID:
            return [Text(self._vocabulary.token_bytes(token_id), self._position - 1)]
        if token_id in _CLOSING:
            return self._close()
        self.num_malformed += 1
        return []

    def _feed_header(self, token_id: int) -> list[ParseEvent]:
        if token_id == START and self._header:
            return self._abandon_header() + self._feed_header(token_id)
        self._header.append(token_id)
        if token_id == MESSAGE:
            return self._open_message()
        if token_id in _CLOSING:
            return self._abandon_header()
        return self._release_header() if len(self._header) >= MAX_HEADER_TOKENS else []

    def _open_message(self) -> list[ParseEvent]:
        header = self._read_header()
        self.num_malformed += header.is_malformed
        return self._open(header.channel, header.function)

    def _open(self, channel: ParsedChannel, function: str = "") -> list[ParseEvent]:
        self._channel = channel
        self.num_tokens[channel] += len(self._header)
        self._header = []
        return [Opened(channel, function)]

    def _close(self) -> list[ParseEvent]:
        self._channel, self._is_expected = None, False
        return [Closed()]

    def _abandon_header(self, is_cut: bool = False) -> list[ParseEvent]:
        """A header that ended without a message: what reads as a header's beginning is only counted, anything else is content.

        `is_cut`: the turn ended there, which breaks nothing.
        """
        role, channel = self._split_header()
        words = channel.split()
        names = [name for name in _CHANNELS if words and name.startswith(words[0])]
        is_beginning = all(word == "assistant" or "to=".startswith(word[:3]) for word in role.split()) and (names or not words)
        if not is_beginning:
            return self._release_header() + self._close()
        counted = ParsedChannel(names[0]) if len(names) == 1 else ParsedChannel.FINAL
        self.num_tokens[counted] += len(self._header)
        self.num_malformed += not is_cut
        self._header, self._is_expected = [], False
        return []

    def _release_header(self) -> list[ParseEvent]:
        """The header's text becomes the beginning of a `final` message; the role word after `<|start|>` is no text."""
        self.num_malformed += 1
        first = self._position - len(self._header)
        texts: list[ParseEvent] = [
            Text(self._vocabulary.token_bytes(token_id), first + at)
            for at, token_id in enumerate(self._header)
            if token_id < FIRST_CONTROL_ID and not (at == 1 and self._is_role_word(token_id))
        ]
        return self._open(ParsedChannel.FINAL) + texts

    def _is_role_word(self, token_id: int) -> bool:
        return self._header[0] == START and self._vocabulary.token_bytes(token_id) == b"assistant"

    def _read_header(self) -> Header:
        """The recipient is read before the channel, in the role part or in the channel part."""
        role, channel = self._split_header()
        words = role.split() + channel.split()
        recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), "")
        function = "" if recipient in _NOBODY else recipient.removeprefix("functions.")
        named = _CHANNELS.get(next((word for word in channel.split() if not word.startswith("to=")), ""))
        who = [word for word in role.split() if not word.startswith("to=")]
        if who not in ([], ["assistant"]):
            return Header(ParsedChannel.FINAL, "", is_malformed=True)
        has_start = self._header[0] == START
        is_malformed = named is None or who == [] if has_start else named is None or not self._is_expected
        if function and named is not ParsedChannel.FINAL and not (named is None and channel.strip()):
            return Header(ParsedChannel.CALL, function, is_malformed)
        return Header(named or ParsedChannel.FINAL, "", is_malformed or bool(function))

    def _split_header(self) -> tuple[str, str]:
        """The text before and after the first `<|channel|>`; other control tokens separate words."""
        parts = [b"", b""]
        part = 0
        for token_id in self._header:
            if token_id == CHANNEL:
                part = 1
            parts[part] += self._vocabulary.token_bytes(token_id) if token_id < FIRST_CONTROL_ID else b" "
        return parts[0].decode("utf-8", "replace"), parts[1].decode("utf-8", "replace")
