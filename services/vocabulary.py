"""The vocabulary o200k_harmony: 201088 token ids, text to ids and back, from the file in the package. No network.

Text and control tokens never mix by accident: `encode` yields no control id whatever the text says; `encode_harmony` is for text of our
own in which control tokens are written out.
"""

import base64
import os
import re
import threading
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path

from openai_harmony import HarmonyEncoding, load_harmony_encoding  # type: ignore[import-untyped]  # it ships no types

VOCABULARY_PATH = Path(__file__).parent / "data" / "o200k_base.tiktoken"
VOCAB_SIZE = 201088
FIRST_CONTROL_ID = 199998  # ids below it are text, ids from here on are control tokens, used or reserved

START_OF_TEXT, END_OF_TEXT = 199998, 199999
RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL = 200002, 200003, 200005, 200006, 200007, 200008, 200012
CONTROL_NAMES = {
    START_OF_TEXT: "<|startoftext|>",
    END_OF_TEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
}
STOP_TOKEN_IDS = (RETURN, CALL)

# Byte-pair merging is quadratic in the length of one word, so that a megabyte of one letter would take minutes. Longer runs are cut.
MAX_RUN_CHARS = 1024
_LONG_RUN = re.compile(rf"[^\s\d]{{{MAX_RUN_CHARS}}}|\s{{{MAX_RUN_CHARS}}}")
# Long texts are encoded in pieces, cut where two words meet, which is a border of tokens whatever stands around it.
MAX_PIECE_CHARS = 16_384
_WORD_BORDER = re.compile(r"(?<=[a-zA-Z]) (?=[a-zA-Z])")
_ENCODINGS_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"


def has_long_run(text: str) -> bool:
    """Whether `text` holds a word or a gap that takes too long to merge as a whole."""
    return _LONG_RUN.search(text) is not None


class Vocabulary:
    """Use `load_vocabulary`: one instance serves the process."""

    def __init__(self, harmony: HarmonyEncoding, table: list[bytes]) -> None:
        self.harmony = harmony
        self._table = table

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, not always whole characters; control tokens written out; b"" for an id outside the vocabulary."""
        return self._table[token_id] if 0 <= token_id < VOCAB_SIZE else b""

    def encode(self, text: str) -> list[int]:
        """Plain text to ids; never a control id. Linear in the length of the text. Runs over MAX_RUN_CHARS are cut there.

        On a thread it lets others run after every MAX_PIECE_CHARS: the library holds the interpreter while it encodes one piece.
        """
        token_ids: list[int] = []
        for piece in _cut_long_texts(text):
            token_ids += self.harmony.encode(piece, disallowed_special=())
        return token_ids

    def encode_harmony(self, text: str) -> list[int]:
        """Text in which control tokens are written out, as in `<|channel|>final<|message|>Hi<|return|>`. Never for text that arrived."""
        token_ids: list[int] = self.harmony.encode(text, allowed_special=self._control_names, disallowed_special=())
        return token_ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """Ids to text, control tokens written out, invalid UTF-8 as U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    @cached_property
    def _control_names(self) -> set[str]:
        return {self._table[token_id].decode() for token_id in range(FIRST_CONTROL_ID, VOCAB_SIZE)}


_loading = threading.Lock()


def load_vocabulary() -> Vocabulary:
    """Reads the packaged file once, about a second. Threads that call it first at the same time wait for one of them."""
    with _loading:
        return _load_once()


@lru_cache(maxsize=1)
def _load_once() -> Vocabulary:
    return Vocabulary(_load_harmony(), _read_table())


def _load_harmony() -> HarmonyEncoding:
    """The library reads the folder of its vocabularies from the environment; the variable is put back afterwards."""
    before = os.environ.get(_ENCODINGS_VARIABLE)
    os.environ[_ENCODINGS_VARIABLE] = str(VOCABULARY_PATH.parent)
    try:
        return load_harmony_encoding("HarmonyGptOss")
    finally:
        del os.environ[_ENCODINGS_VARIABLE]
        if before is not None:
            os.environ[_ENCODINGS_VARIABLE] = before


def _read_table() -> list[bytes]:
    """The bytes of every id. Lines of the file are `base64 id`; control ids are not in it."""
    table = [b""] * FIRST_CONTROL_ID
    for line in VOCABULARY_PATH.read_bytes().splitlines():
        encoded, token_id = line.split()
        table[int(token_id)] = base64.b64decode(encoded)
    names = (CONTROL_NAMES.get(token_id, f"<|reserved_{token_id}|>") for token_id in range(FIRST_CONTROL_ID, VOCAB_SIZE))
    return table + [name.encode() for name in names]


def _cut_long_texts(text: str) -> Iterator[str]:
    for run in _cut_long_runs(text):
        start = 0
        while border := _WORD_BORDER.search(run, start + MAX_PIECE_CHARS):
            yield run[start : border.start()]
            start = border.start()
        yield run[start:]


def _cut_long_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    if start < len(text):
        yield text[start:]
