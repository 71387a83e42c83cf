"""Where everything random in the training text comes from. What is held out for the evaluation never comes up in training."""

import random
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

from models.nano.data.banks import phrase_words
from services.vocabulary import load_vocabulary

T = TypeVar("T")
HELD_OUT_EVERY = 6
_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
_NUCLEI = ["a", "e", "i", "o", "u", "ai", "ea", "io"]
_CODAS = ["", "", "n", "r", "l", "m", "s", "t", "x", "nd", "rk"]


class Source:
    """Draws for one conversation. Of a bank, every sixth item is held out; of words and number pairs, a sixth by their hash.

    Words that phrases have are never held out: they have trained rows, which nothing would teach to be copied.
    """

    def __init__(self, rng: random.Random, is_held_out: bool, is_short: bool = False) -> None:
        self.rng = rng
        self.is_held_out = is_held_out
        self.is_short = is_short  # few words, few facts, one turn: for the beginning of training

    def choose(self, bank: Sequence[T]) -> T:
        """From the part of the bank that is this side's; from all of it where it is too short to be divided."""
        return self.rng.choice(part_of(bank, self.is_held_out) or list(bank))

    def sample(self, bank: Sequence[T], count: int) -> list[T]:
        """Different items of the whole bank: their combination is new, not they."""
        return self.rng.sample(list(bank), count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def made_word(self) -> str:
        """A capitalised word that means nothing, spelled alike with and without a space before it."""
        while True:
            word = "".join(self._syllable() for _ in range(self.rng.choice((1, 2, 2)))).capitalize()
            if len(word) > 3 and is_held_out(word) == self.is_held_out and is_spelled_alike(word):
                return word

    def real_word(self) -> str:
        """A word of the vocabulary, in small letters or capitalised as it stands there."""
        words = _vocabulary_words()[self.is_held_out]
        return words[self.rng.randrange(len(words))]

    def lower_word(self) -> str:
        """A word of the vocabulary in small letters, spelled alike with and without a space before it."""
        return _lower(self.real_word)

    def lower_name(self) -> str:
        """A made word in small letters, spelled alike with and without a space before it."""
        return _lower(self.made_word)

    def name(self) -> str:
        """A proper name that is in no list."""
        return self.made_word() if self.chance(0.6) else self.real_word().capitalize()

    def pair(self, low: int, high: int) -> tuple[int, int]:
        """Two numbers whose pair is this side's."""
        while True:
            pair = self.rng.randint(low, high), self.rng.randint(low, high)
            if is_held_out(f"{pair[0]},{pair[1]}") == self.is_held_out:
                return pair

    def _syllable(self) -> str:
        return self.rng.choice(_ONSETS) + self.rng.choice(_NUCLEI) + self.rng.choice(_CODAS)


def _lower(draw: Callable[[], str]) -> str:
    """A word that is one id with a capital may be several in small letters, and others after a space."""
    while True:
        if is_spelled_alike(word := draw().lower()):
            return word


def part_of(bank: Sequence[T], is_held_out: bool) -> list[T]:
    """One side's of a bank: every sixth item is held out."""
    return [item for at, item in enumerate(bank) if (at % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == is_held_out]


def is_held_out(text: str) -> bool:
    lowered = text.lower()
    return zlib.crc32(lowered.encode()) % HELD_OUT_EVERY == 0 and lowered not in phrase_words()


@lru_cache(maxsize=100_000)
def is_spelled_alike(word: str) -> bool:
    """Whether its ids with a space before it are those without, the first one's space aside."""
    vocabulary = load_vocabulary()
    spaced, plain = vocabulary.encode(f" {word}"), vocabulary.encode(word)
    same_first = vocabulary.token_bytes(spaced[0])[1:] == vocabulary.token_bytes(plain[0])
    return same_first and spaced[1:] == plain[1:]


@lru_cache(maxsize=1)
def _vocabulary_words() -> tuple[list[str], list[str]]:
    """(trained, held out): words of 3 to 12 letters that are one id after a space, and are spelled alike."""
    vocabulary = load_vocabulary()
    plain = {vocabulary.token_bytes(token_id) for token_id in range(199_998)}
    words: tuple[list[str], list[str]] = [], []
    for text in sorted(plain):
        word = text[1:]
        if text[:1] == b" " and 3 <= len(word) <= 12 and word.isalpha() and word.isascii() and (word in plain):
            spelled = word.decode()
            if spelled[1:].islower() and (capital := spelled.capitalize().encode()) in plain and b" " + capital in plain:
                words[is_held_out(spelled)].append(spelled)
    return words


@lru_cache(maxsize=100_000)
def is_callable_alike(name: str) -> bool:
    """Whether `functions.NAME` is spelled as a declared NAME is, but for what stands before it."""
    vocabulary = load_vocabulary()
    declared, called = vocabulary.encode(f" {name}"), vocabulary.encode(f"functions.{name}")[1:]
    same_first = vocabulary.token_bytes(declared[0])[1:] == vocabulary.token_bytes(called[0])[1:]
    return same_first and declared[1:] == called[1:]
