"""One step as values: what the owner asks for, and what came of it. The wire form is in `step_wire`."""

from dataclasses import dataclass, field

from services.errors import OssiaError
from worker.backend import BlockCopy, StepOutput
from worker.sequences import SamplingParams


@dataclass(frozen=True)
class Admission:
    """A sequence as the plan describes it; the table makes its own, mutable one of it."""

    seq_id: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling: SamplingParams
    full_block_ids: list[int]
    window_block_ids: list[int]  # table entries from first_window_block on
    first_window_block: int
    rejection: OssiaError | None = None  # set: the client asked for what cannot be done; this sequence alone fails


@dataclass(frozen=True)
class Appended:
    """Blocks at the end of a sequence's tables."""

    seq_id: int
    full_block_ids: list[int]
    window_block_ids: list[int]


@dataclass(frozen=True)
class CachedBlock:
    """A block whose content is named by a chained hash; an empty name withdraws it."""

    is_window: bool
    block_id: int
    name: bytes


@dataclass(frozen=True)
class StepPlan:
    """Changes only, applied whole or not at all, in the order of the fields."""

    epoch: int
    step: int
    released: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    admitted: tuple[Admission, ...] = ()
    appended: tuple[Appended, ...] = ()
    cached: tuple[CachedBlock, ...] = ()
    scheduled: tuple[tuple[int, int], ...] = ()  # (seq_id, tokens to compute)


@dataclass(frozen=True)
class SequenceFailure:
    """One sequence that the step ended."""

    seq_id: int
    error: OssiaError


@dataclass(frozen=True)
class StepOutcome:
    """What became of one plan. `refusal` set: nothing of it was done, and all else is empty."""

    epoch: int
    step: int
    refusal: OssiaError | None = None
    output: StepOutput = field(default_factory=lambda: StepOutput(()))
    failures: tuple[SequenceFailure, ...] = ()
    device_time_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_scheduled: int = 0  # sequences
    num_held: int = 0  # sequences, after the step
