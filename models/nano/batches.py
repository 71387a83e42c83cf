"""Conversations to tensors without padding: all tokens in a row; only attention sees sequences, in blocks of similar length."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.nano.data.conversation import Example, to_examples
from models.nano.data.mixture import draw_family, draw_setting
from models.nano.data.source import Source

MAX_STRETCH, MIN_STRETCH = 1.3, 32  # a block's longest sequence over its shortest
MAX_BLOCK_TOKENS = 8192
LENGTH_OF_DOUBLE_WORK = 2000  # at which a token's attention takes as long as all else


@dataclass(frozen=True)
class Block:
    """Sequences of similar length that begin with the same prefix. `places` are their tokens' places in [sequences * length]."""

    prefix: int | None  # the block that holds the prefix, computed once; None for a prefix itself
    rows: slice
    places: Tensor
    num_sequences: int
    length: int

    def pad(self, x: Tensor) -> Tensor:
        """[rows of this block, heads, dim] → [sequences, length, heads, dim], zeros at the end."""
        padded = x.new_zeros(self.num_sequences * self.length, *x.shape[1:]).index_copy(0, self.places, x)
        return padded.view(self.num_sequences, self.length, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """[sequences, length, heads, dim] → [rows of this block, heads, dim]"""
        return x.flatten(0, 1).index_select(0, self.places)

    def mask(self, num_keys: int, window: int) -> Tensor:
        """[length, 1 + keys]: the sink, then those of the last `num_keys` keys that lie within the window before each token."""
        distance = torch.arange(num_keys - self.length, num_keys).unsqueeze(1) - torch.arange(num_keys)
        return torch.nn.functional.pad((distance >= 0) & (distance < window), (1, 0), value=True)


@dataclass(frozen=True)
class Batch:
    """token_ids, positions, is_target [rows]: prefixes and sequences one after another, in the order of their blocks."""

    token_ids: Tensor
    positions: Tensor
    is_target: Tensor
    blocks: list[Block]

    @property
    def before_targets(self) -> Tensor:
        """The rows that say a target: those before each."""
        return self.is_target[1:].nonzero().squeeze(1)


def draw_examples(seed: str, num_conversations: int, is_held_out: bool = False) -> Iterator[Example]:
    """Of one date and effort. A function of the seed alone; what is held out is another part of the same text."""
    return itertools.islice(itertools.chain.from_iterable(_draw_families(seed, is_held_out)), num_conversations)


def draw_batch(seed: str, num_tokens: int, drill_share: float, short_share: float, rank: int, num_ranks: int) -> Batch:
    """One rank's share of at least `num_tokens` for each."""
    families: list[list[Example]] = []
    for drawing in range(num_ranks):
        left = num_tokens
        for family in _draw_families(f"{seed}/{drawing}", False, drill_share, short_share):
            families.append(family)
            left -= _num_tokens(family)
            if left <= 0:
                break
    return make_batch(itertools.chain.from_iterable(deal_families(families, num_ranks)[rank]))


def deal_families(families: Iterable[list[Example]], num_ranks: int) -> list[list[list[Example]]]:
    """Each rank's, so that ranks that wait for each other have about as much to do."""
    dealt: list[list[list[Example]]] = [[] for _ in range(num_ranks)]
    work = [0.0] * num_ranks
    for family in sorted(families, key=_work, reverse=True):
        least = work.index(min(work))
        work[least] += _work(family)
        dealt[least].append(family)
    return dealt


def _num_tokens(family: list[Example]) -> int:
    return len(family[0].prefix) * (len(family) > 1) + sum(len(one.token_ids) for one in family)


def _work(family: list[Example]) -> float:
    """Tokens, and what half of the layers, which look at all before each, spend on that."""
    return _num_tokens(family) * (1 + max(len(one.prefix) + len(one.token_ids) for one in family) / LENGTH_OF_DOUBLE_WORK)


def _draw_families(seed: str, is_held_out: bool, drill_share: float = 0.0, short_share: float = 0.0) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    effort, date = draw_setting(rng)
    while True:
        source = Source(rng, is_held_out, is_short=rng.random() < short_share)
        yield to_examples(draw_family(source, effort, date, drill_share))


def make_batch(examples: Iterable[Example]) -> Batch:
    by_prefix: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in examples:
        by_prefix[example.prefix].append(example)
    builder = _Builder()
    for prefix, alike in by_prefix.items():
        at = builder.add(None, [list(prefix)], [[False] * len(prefix)])
        for chunk in _divide(sorted(alike, key=lambda one: len(one.token_ids))):
            builder.add(at, [one.token_ids for one in chunk], [one.is_target for one in chunk])
    return builder.build()


def _divide(examples: list[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    for example in examples:
        length = len(example.token_ids)
        shortest = len(chunk[0].token_ids) if chunk else length
        if length > max(MAX_STRETCH * shortest, shortest + MIN_STRETCH) or (len(chunk) + 1) * length > max(MAX_BLOCK_TOKENS, length):
            yield chunk
            chunk = []
        chunk.append(example)
    yield chunk


class _Builder:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.is_target: list[bool] = []
        self.blocks: list[Block] = []

    def add(self, prefix: int | None, sequences: list[list[int]], is_target: list[list[bool]]) -> int:
        """The new block's place among the blocks."""
        begin, length = len(self.token_ids), max(map(len, sequences))
        first = 0 if prefix is None else self.blocks[prefix].length
        places: list[int] = []
        for number, (sequence, marks) in enumerate(zip(sequences, is_target, strict=True)):
            self.token_ids += sequence
            self.is_target += marks
            self.positions += range(first, first + len(sequence))
            places += range(number * length, number * length + len(sequence))
        rows = slice(begin, len(self.token_ids))
        self.blocks.append(Block(prefix, rows, torch.tensor(places), len(sequences), length))
        return len(self.blocks) - 1

    def build(self) -> Batch:
        return Batch(torch.tensor(self.token_ids), torch.tensor(self.positions), torch.tensor(self.is_target), self.blocks)
