"""The vocabulary agrees with the format's own library on every id, and text never becomes a control token."""

import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services import vocabulary as v

VOCABULARY = v.load_vocabulary()


def test_the_packaged_file_is_the_published_one() -> None:
    digest = hashlib.sha256(v.VOCABULARY_PATH.read_bytes()).hexdigest()
    assert digest == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def test_threads_that_load_it_first_get_the_same_one_and_leave_the_environment_as_it_was() -> None:
    code = """
import os
from concurrent.futures import ThreadPoolExecutor
from services.vocabulary import load_vocabulary
before = dict(os.environ)
with ThreadPoolExecutor(4) as threads:
    loaded = [threads.submit(load_vocabulary) for _ in range(4)]
assert len({id(one.result()) for one in loaded}) == 1
assert dict(os.environ) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_id_has_the_librarys_bytes() -> None:
    for first in range(0, v.VOCAB_SIZE, 4096):
        ids = list(range(first, min(first + 4096, v.VOCAB_SIZE)))
        ours = b"".join(map(VOCABULARY.token_bytes, ids))
        assert ours.decode("utf-8", "replace") == VOCABULARY.harmony.decode(ids)
    assert all(VOCABULARY.token_bytes(token_id) for token_id in range(v.VOCAB_SIZE))


@pytest.mark.parametrize("token_id", [-1, v.VOCAB_SIZE, 2**32])
def test_an_id_outside_the_vocabulary_has_no_bytes(token_id: int) -> None:
    assert VOCABULARY.token_bytes(token_id) == b""


@pytest.mark.parametrize(("token_id", "name"), v.CONTROL_NAMES.items())
def test_a_control_token_is_written_out_and_read_back(token_id: int, name: str) -> None:
    assert VOCABULARY.decode([token_id]) == name
    assert VOCABULARY.encode_harmony(name) == [token_id]
    assert all(part < v.FIRST_CONTROL_ID for part in VOCABULARY.encode(name))
    assert VOCABULARY.harmony.is_special_token(token_id)


def test_harmony_text_keeps_what_is_not_a_control_token_as_text() -> None:
    ids = VOCABULARY.encode_harmony("<|channel|>final<|message|>a <|b|> c<|return|>")
    assert [token_id for token_id in ids if token_id >= v.FIRST_CONTROL_ID] == [v.CHANNEL, v.MESSAGE, v.RETURN]


@given(st.text() | st.lists(st.sampled_from(["<|start|>", "<|end|>", "<|reserved_200013|>", "a", " "])).map("".join))
def test_plain_text_comes_back_whole_and_never_as_control_tokens(text: str) -> None:
    ids = VOCABULARY.encode(text)
    assert VOCABULARY.decode(ids) == text
    assert all(token_id < v.FIRST_CONTROL_ID for token_id in ids)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "=", "é", "漢", "e\u0301", "1"])
def test_a_long_run_is_cut_and_loses_nothing(unit: str) -> None:
    text = unit * 50_000
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text


@given(
    st.lists(st.sampled_from(["word", " a", " ", "  ", "\n", "Don't", " 12", ".", "é", "你好", "'s", "\t", "ABC"]), max_size=40),
    st.integers(1, 30),
)
def test_a_long_text_has_the_same_ids_in_pieces_as_whole(words: list[str], size: int) -> None:
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v, "MAX_PIECE_CHARS", size)
        assert VOCABULARY.encode(text) == VOCABULARY.harmony.encode(text, disallowed_special=())
