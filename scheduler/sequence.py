"""What the scheduler knows of a request and of each sequence that it became. Token ids and block ids only: no text, no tensors."""

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from scheduler.host_tier import TierCopy
from services.errors import OssiaError
from services.prefix_hash import PrefixHasher


@dataclass(frozen=True)
class Request:
    """One checked request. `wire_sampling` and `handle` are carried for the shell, and never read by the core."""

    request_id: str
    model: str
    prompt_token_ids: Ordered[int]  # the last num_resumed_tokens of them were generated before
    num_resumed_tokens: int = 0
    max_tokens: int | None = None  # completion tokens, resumed ones included; None: up to the model's context
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n: int = 1
    first_index: int = 0  # of its n sequences
    num_moves: int = 0  # times that a group was lost under it
    priority: int = 0  # higher runs first
    tenant: str = ""
    start_deadline_s: float | None = None  # on the core's clock
    deadline_s: float | None = None
    arrived_s: float | None = None  # where it was before; None: it arrives now
    prefix: PrefixHasher | None = None  # names of the prompt's full blocks; None: nothing is shared
    checkpoint_blocks: Ordered[int] = ()  # prompt lengths worth coming back to, in full blocks, ascending
    wire_sampling: object = None
    handle: object = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids) - self.num_resumed_tokens

    @property
    def block_names(self) -> Ordered[bytes]:
        return self.prefix.hashes if self.prefix else ()


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Finish:
    """How a sequence ended. Times are seconds from arrival; None: it never came so far."""

    reason: FinishReason
    num_completion_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    queue_s: float | None
    ttft_s: float | None
    total_s: float
    stop_token_id: int | None = None
    error: OssiaError | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), descending


class Event(NamedTuple):
    """What one step, or one refusal, means for one sequence: new tokens, its end, or both."""

    sequence: "Sequence"
    token_ids: tuple[int, ...] = ()
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None


@dataclass(eq=False)
class Sequence:
    """One of a request's n sequences. Changed by the batcher of its group only.

    Positions [0, num_scheduled_tokens) have been planned. A planned draw counts as a token before its id is known here: the worker has it.

        prompt          output_token_ids   in flight
        |--------------|------------------|=====|        num_tokens is the right end
        |-------- num_scheduled_tokens ------|

    Both ends are kept as plain fields: every step reads them for every sequence.
    """

    request: Request
    index: int
    arrival: int  # counts up over all sequences of the group
    arrival_s: float
    max_new_tokens: int  # resumed ones not included
    num_tokens: int  # prompt, output, and draws in flight
    num_uncached_tokens: int = 0  # of its prompt, as expected when it was routed here
    output_token_ids: list[int] = field(default_factory=list)
    seq_id: int = 0  # the worker's name for it; a new one at each admission, 0 while it waits
    num_scheduled_tokens: int = 0
    num_in_flight: int = 0  # draws planned whose results are not back
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    full_block_ids: list[int] = field(default_factory=list)
    window_block_ids: list[int] = field(default_factory=list)  # from table entry num_passed_window_blocks on
    num_passed_window_blocks: int = 0
    num_named_blocks: int = 0  # leading blocks of the table that were given their names
    prefix: PrefixHasher | None = None  # the request's names and those of the output's blocks
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    is_promised: bool = False  # its prompt counts as cached for those that are placed after it
    is_finished: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: higher priority, then earlier arrival."""
        return (-self.request.priority, self.arrival)

    @property
    def num_known_tokens(self) -> int:
        return self.num_tokens - self.num_in_flight

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens to compute before the next draw; 0 once every token it may have is drawn or in flight."""
        return self.num_tokens - self.num_scheduled_tokens if self.may_draw else 0

    @property
    def may_draw(self) -> bool:
        return len(self.output_token_ids) + self.num_in_flight < self.max_new_tokens

    @property
    def is_decoding(self) -> bool:
        return self.num_tokens - self.num_scheduled_tokens == 1 and self.num_scheduled_tokens > 0

    @property
    def token_ids(self) -> list[int]:
        return [*self.request.prompt_token_ids, *self.output_token_ids]

    def block_names(self, num_blocks: int, block_size: int) -> Ordered[bytes]:
        """Names of at least the first `num_blocks` blocks, all of whose tokens are known; none where the request shares nothing."""
        if self.request.prefix is None or num_blocks <= len(self.request.prefix.hashes):
            return self.request.block_names
        if self.prefix is None:
            self.prefix = self.request.prefix.fork()
        if num_blocks > len(self.prefix.hashes):
            first, num_prompt = len(self.prefix.hashes) * block_size, len(self.request.prompt_token_ids)
            prompt_part = self.request.prompt_token_ids[first:] if first < num_prompt else ()
            self.prefix.extend([*prompt_part, *self.output_token_ids[max(0, first - num_prompt) : num_blocks * block_size - num_prompt]])
        return self.prefix.hashes

    def continuation(self) -> Request:
        """This sequence as a request of its own, to go on elsewhere with the tokens that it has."""
        return replace(
            self.request,
            prompt_token_ids=self.token_ids,
            num_resumed_tokens=self.request.num_resumed_tokens + len(self.output_token_ids),
            n=1,
            first_index=self.index,
            num_moves=self.request.num_moves + 1,
            start_deadline_s=None if self.first_token_s is not None else self.request.start_deadline_s,
            arrived_s=self.arrival_s,
        )

    def inherit(self, before: "Sequence") -> None:
        """Counts on from what this sequence was in the group that was lost."""
        self.first_scheduled_s, self.first_token_s = before.first_scheduled_s, before.first_token_s
        self.num_cached_tokens, self.num_preemptions = before.num_cached_tokens, before.num_preemptions

    def finish(self, reason: FinishReason, now: float, *, stop_token_id: int | None = None, error: OssiaError | None = None) -> Finish:
        self.is_finished = True
        return Finish(
            reason=reason,
            num_completion_tokens=self.request.num_resumed_tokens + len(self.output_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            queue_s=None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s,
            ttft_s=None if self.first_token_s is None else self.first_token_s - self.arrival_s,
            total_s=now - self.arrival_s,
            stop_token_id=stop_token_id,
            error=error,
        )


@dataclass(frozen=True)
class GroupLimits:
    """What one worker group can hold; learned from Describe, then constant."""

    block_size: int  # tokens
    num_full_blocks: int
    num_window_blocks: int  # 0: the model has no window layers
    sliding_window: int  # tokens; 0: no window layers
    max_model_len: int  # tokens, prompt and completion
    max_batch_tokens: int  # tokens per step
    max_num_seqs: int
    eos_token_ids: frozenset[int] = frozenset()
    num_host_blocks: int = 0  # of each pool, in host memory; 0: none

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence that this group can hold when it is alone."""
        return min(self.max_model_len, self.num_full_blocks * self.block_size)

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True)
class Admission:
    """A sequence as the worker is to take it: its tokens and blocks at that moment."""

    sequence: Sequence
    seq_id: int
    token_ids: Ordered[int]
    num_computed_tokens: int  # their KV was found in the cache
    full_block_ids: Ordered[int]
    window_block_ids: Ordered[int]  # from table entry first_window_block on
    first_window_block: int


@dataclass(frozen=True)
class StepPlan:
    """One step, as changes. `scheduled` gives token counts by the worker's sequence ids, in the order of the batch."""

    step: int
    released: Ordered[int] = ()
    copies: Ordered[TierCopy] = ()
    admitted: Ordered[Admission] = ()
    appended: Ordered[tuple[int, Ordered[int], Ordered[int]]] = ()  # (seq_id, full block ids, window block ids)
    scheduled: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What the worker answers to one plan. `token_ids` is parallel to `seq_ids`."""

    step: int
    seq_ids: Ordered[int] = ()
    token_ids: Ordered[int] = ()
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    errors: Mapping[int, OssiaError] = field(default_factory=dict)
    device_time_s: float = 0.0
