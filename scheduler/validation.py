"""What a GenerateRequest must be before the core sees it. One table of bounds; every refusal names the field and the cure."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from protos.ossia.v1 import scheduler_pb2
from protos.ossia.v1.sampling_pb2 import SamplingParams
from scheduler.sequence import Request
from services.errors import InvalidArgument, MissingField
from services.prefix_hash import PrefixHasher, prefix_key

MAX_N = 8
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_CHECKPOINTS = 4096
MAX_NAME_BYTES = 256


class Bound(NamedTuple):
    """A number of SamplingParams and the interval it must lie in; `is_open` leaves `low` itself out."""

    field: str
    low: float
    high: float
    is_open: bool = False


BOUNDS = (
    Bound("temperature", 0, 2),
    Bound("top_p", 0, 1, is_open=True),
    Bound("min_p", 0, 1),
    Bound("presence_penalty", -2, 2),
    Bound("frequency_penalty", -2, 2),
    Bound("repetition_penalty", 0, 2, is_open=True),
    Bound("top_logprobs", 0, 20),
    Bound("max_tokens", 1, 2**31),
)


def read_request(wire: scheduler_pb2.GenerateRequest, model: scheduler_pb2.ModelStatus, now: float, handle: object) -> Request:
    """The checked request. Raises InvalidArgument or MissingField. `now` dates the deadlines."""
    vocab_size = model.vocab_size
    if not wire.prompt_token_ids:
        raise MissingField("prompt_token_ids is empty: give at least one token", "prompt_token_ids")
    if max(wire.prompt_token_ids) >= vocab_size:
        raise InvalidArgument(f"prompt_token_ids holds an id outside the vocabulary: keep ids under {vocab_size}", "prompt_token_ids")
    if wire.num_resumed_tokens >= len(wire.prompt_token_ids):
        raise InvalidArgument("num_resumed_tokens covers the whole prompt: leave at least one prompt token before it", "num_resumed_tokens")
    _require(wire.n <= MAX_N, "n", f"at most {MAX_N}")
    _require(len(wire.checkpoint_positions) <= MAX_CHECKPOINTS, "checkpoint_positions", f"at most {MAX_CHECKPOINTS}")
    _require(len(wire.tenant) <= MAX_NAME_BYTES, "tenant", f"at most {MAX_NAME_BYTES} characters")
    _require(len(wire.cache_salt) <= MAX_NAME_BYTES, "cache_salt", f"at most {MAX_NAME_BYTES} bytes")
    _require(-100 <= wire.priority <= 100, "priority", "between -100 and 100")
    check_sampling(wire.sampling, vocab_size)
    sampling = wire.sampling
    if sampling.HasField("max_tokens") and sampling.max_tokens <= wire.num_resumed_tokens:
        raise InvalidArgument("max_tokens is used up by num_resumed_tokens: ask for more tokens", "max_tokens")
    prompt_token_ids = list(wire.prompt_token_ids)
    return Request(
        request_id=wire.request_id,
        model=wire.model,
        prompt_token_ids=prompt_token_ids,
        num_resumed_tokens=wire.num_resumed_tokens,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        min_tokens=sampling.min_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        n=wire.n or 1,
        priority=wire.priority,
        tenant=wire.tenant,
        start_deadline_s=_deadline(wire, "start_timeout_s", now),
        deadline_s=_deadline(wire, "timeout_s", now),
        prefix=PrefixHasher(prefix_key(wire.tenant, wire.cache_salt), model.block_size, prompt_token_ids),
        checkpoint_blocks=_checkpoint_blocks(wire.checkpoint_positions, len(prompt_token_ids), model.block_size),
        wire_sampling=sampling,
        handle=handle,
    )


def read_quote(wire: scheduler_pb2.QuoteRequest, block_size: int) -> Request:
    """The request that is asked about. Its ids are not known: only their number and their blocks' names count."""
    num_tokens = wire.num_prompt_tokens
    _require(1 <= num_tokens <= 2**31, "num_prompt_tokens", "at least 1")
    _require(len(wire.block_hashes) * block_size <= num_tokens, "block_hashes", "one for each full block of the prompt")
    _require(wire.n <= MAX_N, "n", f"at most {MAX_N}")
    return Request(
        request_id="",
        model=wire.model,
        prompt_token_ids=range(num_tokens),
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else None,
        n=wire.n or 1,
        priority=wire.priority,
        tenant=wire.tenant,
        prefix=PrefixHasher.of_names(wire.block_hashes),
        checkpoint_blocks=_checkpoint_blocks(wire.checkpoint_positions, num_tokens, block_size),
    )


def _checkpoint_blocks(positions: Iterable[int], num_tokens: int, block_size: int) -> list[int]:
    """The positions worth coming back to, and the prompt's end, in full blocks."""
    return sorted({min(position, num_tokens) // block_size for position in (*positions, num_tokens)})


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    for bound in BOUNDS:
        if not sampling.DESCRIPTOR.fields_by_name[bound.field].has_presence or sampling.HasField(bound.field):  # type: ignore[arg-type]
            _check_bound(getattr(sampling, bound.field), bound)
    _require(len(sampling.stop_token_ids) <= MAX_STOP_TOKEN_IDS, "stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
    _require(len(sampling.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
    _require(all(token_id < vocab_size for token_id in sampling.logit_bias), "logit_bias", f"token ids under {vocab_size}")
    _require(all(-100 <= bias <= 100 for bias in sampling.logit_bias.values()), "logit_bias", "values between -100 and 100")


def _check_bound(value: float, bound: Bound) -> None:
    low = f"over {bound.low:g}" if bound.is_open else f"{bound.low:g}"
    is_inside = bound.low < value <= bound.high or (value == bound.low and not bound.is_open)
    _require(math.isfinite(value) and is_inside, bound.field, f"from {low} to {bound.high:g}")


def _require(holds: bool, field: str, rule: str) -> None:
    if not holds:
        raise InvalidArgument(f"{field} is out of bounds: give {rule}", field)


def _deadline(wire: scheduler_pb2.GenerateRequest, field: str, now: float) -> float | None:
    if not wire.HasField(field):  # type: ignore[arg-type]
        return None
    seconds: float = getattr(wire, field)
    _require(math.isfinite(seconds) and seconds > 0, field, "a number of seconds over 0")
    return now + seconds
