"""Bytes of tokens to text, as they come. A token may end within a character; what is incomplete waits for the next one."""

import codecs


class Detokenizer:
    """The text of one message. The pieces join to the same text however the bytes were split; invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The characters that are now complete."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an incomplete character at the end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)

    @property
    def is_within_character(self) -> bool:
        return bool(self._decoder.getstate()[0])
