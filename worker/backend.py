"""The seam between the worker service, which speaks plans, and what computes them: the model, or a script in its place."""

from collections.abc import Sequence as Ordered
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from services.errors import InvalidLogits, OssiaError
from worker.sequences import ScheduledSequence


@dataclass(frozen=True)
class ModelFacts:
    """What a backend serves and can hold; learned at start, then constant. Becomes `GroupInfo`."""

    architecture: str
    fingerprint: str
    total_parameters: int
    active_parameters: int
    max_model_len: int  # tokens, prompt and completion
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    block_size: int  # tokens
    num_full_blocks: int
    num_window_blocks: int  # 0: no window layers
    sliding_window: int  # 0: no window layers
    device: str
    dtype: str
    num_host_blocks: int = 0  # of each pool, in host memory


@dataclass(frozen=True)
class BlockCopy:
    """Copy one block's keys and values, in all layers of its pool: on the device, or between it and host memory."""

    is_window: bool
    source: int
    target: int
    source_on_host: bool = False
    target_on_host: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities before temperature, penalties and masks; `top` descends."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob)


@dataclass(frozen=True)
class DrawnToken:
    seq_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class FailedSequence:
    """A sequence that cannot go on, as for logits that were not numbers; the rest of the batch does."""

    seq_id: int
    message: str
    error: type[OssiaError] = InvalidLogits


@dataclass(frozen=True)
class StepOutput:
    drawn: tuple[DrawnToken, ...]  # in the order in which the drawing sequences were scheduled
    failed: tuple[FailedSequence, ...] = ()

    def without(self, seq_ids: AbstractSet[int]) -> "StepOutput":
        if not seq_ids:
            return self
        drawn = tuple(one for one in self.drawn if one.seq_id not in seq_ids)
        return StepOutput(drawn, tuple(one for one in self.failed if one.seq_id not in seq_ids))


class StepUnderWay(Protocol):
    """A step that was started. `draw` once the tokens of the step before it are known, then `take`, once each."""

    def draw(self) -> None:
        """Draws one token for each sequence that had `draws_token` when the step was started."""
        ...

    def is_done(self) -> bool:
        """After `draw`: whether `take` has nothing to wait for."""
        ...

    def wait(self) -> None:
        """After `draw`: returns when it is done. From any thread."""
        ...

    def take(self) -> StepOutput: ...


class Backend(Protocol):
    """Computes steps. One instance a rank; every rank returns the same output."""

    @property
    def facts(self) -> ModelFacts: ...

    def start(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> StepUnderWay:
        """Copies blocks and writes the scheduled tokens' KV, or sets the device to it.

        A sequence's last token may be UNKNOWN_TOKEN: the one that the step started before this one draws. Changes nothing of the sequences:
        the caller appends the drawn tokens and advances `num_computed_tokens`.
        """
        ...


@dataclass(frozen=True)
class FinishedStep:
    """The step of a backend that computes at once."""

    output: StepOutput

    def draw(self) -> None:
        return

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def take(self) -> StepOutput:
        return self.output
