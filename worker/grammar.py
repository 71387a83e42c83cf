"""Which tokens the constraints of a step's sequences allow, worked out on threads of its own while the model computes.

A sequence's matcher has read the tokens generated so far, however it came to have them: drawn here, or brought along by a sequence that is
resumed or computed again. What is allowed is a function of those tokens and the constraint alone, so every rank of a group finds the same.
A constraint that cannot be compiled or followed any further ends its own sequence. Knows nothing of the model and needs no torch.
"""

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from protos.ossia.v1.sampling_pb2 import Constraint
from services.errors import ConstraintFailed
from services.output_grammar import LIMITS, build_tokenizer, write_grammar
from services.vocabulary import END_OF_TEXT, VOCAB_SIZE, load_vocabulary
from worker.backend import FailedSequence
from worker.sequences import ScheduledSequence, Sequence

# Grammars kept as compiled, least recently used ones go first. Memory grows with what a constraint says, some 400 bytes for each of it.
MAX_COMPILED, MAX_COMPILED_BYTES = 64, 1024 * 1024
MAX_THREADS = 8
MAX_REASON_CHARS = 200
NUM_WORDS = -(-VOCAB_SIZE // 32)
Words = NDArray[np.uint32]  # [NUM_WORDS], one bit a token id, the lowest first


class GrammarFollower:
    """One sequence's way through its grammar. `accept` every generated token, in order; `allowed` is what may come next."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        self._is_over = False  # an end token came where the output was complete; nothing more is asked of it
        self.num_accepted = 0

    def accept(self, token_id: int) -> None:
        """Raises ConstraintFailed where the token breaks the constraint."""
        self._is_over = self._is_over or (token_id in self._eos_token_ids and self._matcher.is_accepting())
        if not self._is_over and not self._matcher.consume_token(token_id):
            raise ConstraintFailed(f"the output breaks its constraint at generated token {self.num_accepted + 1}")
        self.num_accepted += 1

    def allowed(self) -> Words:
        """Where the output is complete as it is, the model's end tokens are allowed. Raises ConstraintFailed."""
        if self._is_over or (self._matcher.is_stopped() and self._matcher.is_accepting()):
            return _pack(self._eos_token_ids)
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)[:NUM_WORDS].copy()
        if self._matcher.is_error():
            raise ConstraintFailed(f"the constraint cannot be followed further ({self._matcher.stop_reason()}); simplify it")
        index, bit = divmod(END_OF_TEXT, 32)
        if words[index] >> bit & 1:
            words[index] &= ~np.uint32(1 << bit)
            words |= _pack(self._eos_token_ids)
        return words


class GrammarCompiler:
    """Compiled constraints, shared by the sequences that have the same one. Safe to use from several threads."""

    def __init__(self, eos_token_ids: Ordered[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = Lock()
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()  # by serialized constraint; matchers that have read nothing

    def compile(self, constraint: bytes) -> GrammarFollower:
        """Raises ConstraintFailed with the reason."""
        with self._lock:
            matcher = self._compiled.pop(constraint, None)
        if matcher is None:
            matcher = _compile(constraint)
        with self._lock:
            self._compiled[constraint] = matcher
            while len(self._compiled) > MAX_COMPILED or sum(map(len, self._compiled)) > max(MAX_COMPILED_BYTES, len(constraint)):
                self._compiled.popitem(last=False)
            return GrammarFollower(matcher.deep_copy(), self._eos_token_ids)


class StepMasks:
    """The masks of one step, under way. `take` waits for them."""

    def __init__(self, sequences: Ordered[Sequence], pending: dict[int, "Future[Words]"]) -> None:
        self._sequences = sequences
        self._pending = pending  # by row

    def take(self) -> tuple[dict[int, Words], list[FailedSequence]]:
        """The allowed tokens by row, and the sequences whose constraint failed; all other rows may draw anything."""
        masks, failed = {}, []
        for row, future in self._pending.items():
            try:
                masks[row] = future.result()
            except ConstraintFailed as failure:
                failed.append(FailedSequence(self._sequences[row].seq_id, failure.message, ConstraintFailed))
        return masks, failed


class GrammarMasks:
    """The followers of all sequences of one rank. Used by the thread that runs the steps."""

    def __init__(self, eos_token_ids: Ordered[int]) -> None:
        self._compiler = GrammarCompiler(eos_token_ids)
        self._pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="grammar")
        self._followers: dict[int, Future[GrammarFollower]] = {}  # by the sequence object's id; an entry goes with its sequence

    def warm_up(self) -> None:
        """Begins to load what the first constraint needs, which takes a second or two."""
        self._pool.submit(load_tokenizer)

    def start(self, scheduled: Iterable[ScheduledSequence], drawing: Ordered[Sequence]) -> StepMasks:
        """Begins on the masks of the sequences that draw, and compiles for those that will, while their prompts are computed."""
        for one in scheduled:
            if one.sequence.sampling.constraint:
                self._follower_of(one.sequence)
        pending = {
            row: self._pool.submit(_advance, self._follower_of(sequence), sequence)
            for row, sequence in enumerate(drawing)
            if sequence.sampling.constraint
        }
        return StepMasks(drawing, pending)

    def _follower_of(self, sequence: Sequence) -> "Future[GrammarFollower]":
        follower = self._followers.get(id(sequence))
        if follower is None:
            follower = self._followers[id(sequence)] = self._pool.submit(self._compiler.compile, sequence.sampling.constraint)
            weakref.finalize(sequence, self._followers.pop, id(sequence))
        return follower


def _advance(compiling: "Future[GrammarFollower]", sequence: Sequence) -> Words:
    """Reads the sequence while its step runs: it changes when the step is committed, and that waits for this."""
    follower = compiling.result()  # was submitted before, so that it runs or has run
    for token_id in sequence.token_ids[sequence.num_prompt_tokens + follower.num_accepted :]:
        follower.accept(token_id)
    return follower.allowed()


def _compile(constraint: bytes) -> LLMatcher:
    try:
        grammar = write_grammar(Constraint.FromString(constraint), load_vocabulary())
    except ValueError as error:
        raise ConstraintFailed(f"the constraint makes no grammar: {error}") from None
    matcher = LLMatcher(load_tokenizer(), grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ConstraintFailed(f"the constraint cannot be compiled: {matcher.get_error().splitlines()[0][:MAX_REASON_CHARS]}")
    return matcher


@lru_cache(maxsize=1)
def load_tokenizer() -> LLTokenizer:
    return build_tokenizer(load_vocabulary())


@lru_cache(maxsize=8)
def _pack(token_ids: tuple[int, ...]) -> Words:
    words = np.zeros(NUM_WORDS, dtype=np.uint32)
    for token_id in token_ids:
        words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words
