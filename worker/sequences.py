"""What a rank knows of the sequences it holds. Values and bookkeeping only: no tensors, no gRPC.

Every rank keeps an equal table and applies equal plans to it, so that a step needs nothing but the plan's bytes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

UNKNOWN_TOKEN = -1  # stands in for a token that was drawn and has not come to the host


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence's tokens are drawn; ranges as in `sampling.proto`, "off" filled in where a field was unset."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    top_logprobs: int | None = None  # None: no log-probabilities; 0: of the drawn token only
    banned_token_ids: tuple[int, ...] = ()  # must not be drawn while fewer than min_tokens were generated
    min_tokens: int = 0
    constraint: bytes = b""  # a serialized `Constraint`, for `grammar.py`; empty: anything may come


@dataclass
class Sequence:
    """One admitted sequence. `token_ids` grows by the token each step draws, UNKNOWN_TOKEN at first; the tables grow by the plan."""

    seq_id: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    num_computed_tokens: int = 0  # tokens whose KV stands in the blocks
    full_block_ids: list[int] = field(default_factory=list)  # entry i holds positions [i * block_size, (i + 1) * block_size)
    window_block_ids: list[int] = field(default_factory=list)  # the same from entry 0; entries that passed out of the window are stale


class ScheduledSequence(NamedTuple):
    """What one step computes of one sequence: tokens [num_computed_tokens, num_computed_tokens + num_tokens)."""

    sequence: Sequence
    num_tokens: int

    @property
    def draws_token(self) -> bool:
        """True when this step computes the last known token, whose logits give the next one."""
        return self.sequence.num_computed_tokens + self.num_tokens == len(self.sequence.token_ids)
