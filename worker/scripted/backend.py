"""A backend that answers from a script in the time that a model would take, and checks the scheduler's blocks while it does. No torch.

The token at output position k is token k of the reply, so a token that was lost, doubled or reordered on its way shows in the text, and a
sequence that is resumed elsewhere goes on where it was. A constraint changes no token: a reply that breaks it fails its sequence.
"""

import hashlib
import time
import weakref
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from services.errors import ConstraintFailed
from services.vocabulary import RETURN, STOP_TOKEN_IDS, VOCAB_SIZE, load_vocabulary
from worker.backend import BlockCopy, DrawnToken, FailedSequence, FinishedStep, ModelFacts, StepOutput, TokenLogprobs
from worker.grammar import GrammarCompiler
from worker.scripted.block_ledger import BlockLedger, extend_chain
from worker.scripted.script import Script
from worker.sequences import ScheduledSequence, Sequence


@dataclass(frozen=True)
class StepTimes:
    """How long a step takes: the sum of these, in milliseconds."""

    step_ms: float = 0.0
    prefill_token_ms: float = 0.0  # for each token of the sequences that compute more than one
    sequence_ms: float = 0.0  # for each sequence

    def duration_s(self, scheduled: Ordered[ScheduledSequence]) -> float:
        num_prefill_tokens = sum(one.num_tokens for one in scheduled if one.num_tokens > 1)
        return (self.step_ms + self.prefill_token_ms * num_prefill_tokens + self.sequence_ms * len(scheduled)) / 1000


@dataclass
class _Progress:
    """What is remembered of one sequence between steps."""

    chain: list[int] = field(default_factory=list)  # prefix values of its known tokens
    reply: list[int] | None = None  # looked up when the first token is drawn


class ScriptedBackend:
    """Serves the vocabulary of gpt-oss with the sizes it is given."""

    def __init__(
        self,
        script: Script,
        times: StepTimes,
        *,
        block_size: int,
        num_full_blocks: int,
        num_window_blocks: int,
        sliding_window: int,
        max_model_len: int,
        num_host_blocks: int = 0,
    ) -> None:
        self._script = script
        self._times = times
        self._vocabulary = load_vocabulary()
        self._ledger = BlockLedger(num_full_blocks, num_window_blocks, block_size, sliding_window, num_host_blocks)
        self._compiler = GrammarCompiler(STOP_TOKEN_IDS)
        self._progress: dict[int, _Progress] = {}  # by the sequence object's id; an entry goes with its sequence
        self._facts = ModelFacts(
            architecture="scripted",
            fingerprint=hashlib.sha256(repr(script).encode()).hexdigest()[:16],
            total_parameters=0,
            active_parameters=0,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=STOP_TOKEN_IDS,
            block_size=block_size,
            num_full_blocks=num_full_blocks,
            num_window_blocks=num_window_blocks,
            sliding_window=sliding_window if num_window_blocks else 0,
            device="scripted",
            dtype="none",
            num_host_blocks=num_host_blocks,
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def start(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> FinishedStep:
        return FinishedStep(self.step(scheduled, copies))

    def step(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> StepOutput:
        time.sleep(self._times.duration_s(scheduled))
        self._ledger.copy(copies)
        chains = [self._extended_chain(one.sequence) for one in scheduled]
        # A model stores all keys and values of a step before it attends to any: sequences may share a block written in the same step.
        for one, chain in zip(scheduled, chains, strict=True):
            self._ledger.write(one.sequence, chain, one.num_tokens)
        drawn, failed = [], []
        for one, chain in zip(scheduled, chains, strict=True):
            if fault := self._ledger.find_fault(one.sequence, chain, one.num_tokens):
                failed.append(FailedSequence(one.sequence.seq_id, f"the scheduler mixed up blocks: {fault}"))
            elif one.draws_token:
                try:
                    drawn.append(self._draw(one.sequence))
                except ConstraintFailed as failure:
                    failed.append(FailedSequence(one.sequence.seq_id, failure.message, ConstraintFailed))
        return StepOutput(tuple(drawn), tuple(failed))

    def _progress_of(self, sequence: Sequence) -> _Progress:
        progress = self._progress.get(id(sequence))
        if progress is None:
            progress = self._progress[id(sequence)] = _Progress()
            weakref.finalize(sequence, self._progress.pop, id(sequence))
        return progress

    def _extended_chain(self, sequence: Sequence) -> list[int]:
        chain = self._progress_of(sequence).chain
        extend_chain(chain, sequence.token_ids)
        return chain

    def _draw(self, sequence: Sequence) -> DrawnToken:
        progress = self._progress_of(sequence)
        if progress.reply is None:
            prompt = self._vocabulary.decode(sequence.token_ids[: sequence.num_prompt_tokens])
            reply = self._vocabulary.encode_harmony(self._script.reply_to(prompt))
            self._check_reply(reply, sequence.sampling.constraint)
            progress.reply = reply
        position = len(sequence.token_ids) - sequence.num_prompt_tokens
        token_id = progress.reply[position] if position < len(progress.reply) else RETURN
        return DrawnToken(sequence.seq_id, token_id, _certainty(token_id, sequence.sampling.top_logprobs))

    def _check_reply(self, reply: list[int], constraint: bytes) -> None:
        """Raises ConstraintFailed where the reply, up to its first stop token, is not what the sequence's constraint allows."""
        if not constraint:
            return
        follower = self._compiler.compile(constraint)
        for token_id in (*reply, RETURN):
            follower.accept(token_id)
            if token_id in STOP_TOKEN_IDS:
                return


def _certainty(token_id: int, top_logprobs: int | None) -> TokenLogprobs | None:
    """A script leaves no choice: its token has probability 1, and no other has any."""
    if top_logprobs is None:
        return None
    return TokenLogprobs(0.0, ((token_id, 0.0),) if top_logprobs else ())
