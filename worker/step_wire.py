"""Step plans and results between the wire and their values. The only part of the engine that sees protobuf."""

from protos.ossia.v1 import sampling_pb2, worker_pb2
from services.errors import BlockOutOfRange, InvalidArgument, InvalidPlan, Unsupported, to_proto
from services.vocabulary import VOCAB_SIZE
from worker.backend import BlockCopy, DrawnToken, ModelFacts
from worker.sequences import SamplingParams
from worker.step_plan import Admission, Appended, CachedBlock, StepOutcome, StepPlan


def decode_plan(message: worker_pb2.StepPlan, facts: ModelFacts) -> StepPlan:
    """The plan as a value. Raises InvalidPlan or BlockOutOfRange for what has no value here; the rest is the table's to judge."""
    if len(message.scheduled_seq_ids) != len(message.num_scheduled_tokens):
        raise InvalidPlan(
            f"scheduled_seq_ids has {len(message.scheduled_seq_ids)} entries and num_scheduled_tokens {len(message.num_scheduled_tokens)}; "
            "they are parallel",
            param="num_scheduled_tokens",
        )
    return StepPlan(
        epoch=message.epoch,
        step=message.step,
        released=tuple(message.released),
        copies=tuple(_decode_copy(copy) for copy in message.copies),
        admitted=tuple(_decode_admission(admitted, facts) for admitted in message.admitted),
        appended=tuple(Appended(one.seq_id, list(one.full_block_ids), list(one.window_block_ids)) for one in message.appended),
        cached=tuple(_decode_cached(block) for block in message.cached),
        scheduled=tuple(zip(message.scheduled_seq_ids, message.num_scheduled_tokens, strict=True)),
    )


def _is_window(pool: "worker_pb2.BlockPool.ValueType", param: str) -> bool:
    if pool not in (worker_pb2.BLOCK_POOL_FULL, worker_pb2.BLOCK_POOL_WINDOW):
        raise InvalidPlan(f"{param}.pool must be FULL or WINDOW", f"{param}.pool")
    return pool == worker_pb2.BLOCK_POOL_WINDOW


def _is_host(tier: "worker_pb2.BlockTier.ValueType", param: str) -> bool:
    if tier not in (worker_pb2.BLOCK_TIER_DEVICE, worker_pb2.BLOCK_TIER_HOST):
        raise InvalidPlan(f"{param} must be DEVICE or HOST", param)
    return tier == worker_pb2.BLOCK_TIER_HOST


def _decode_copy(copy: worker_pb2.BlockCopy) -> BlockCopy:
    return BlockCopy(
        _is_window(copy.pool, "copies"),
        copy.source_block_id,
        copy.target_block_id,
        _is_host(copy.source_tier, "copies.source_tier"),
        _is_host(copy.target_tier, "copies.target_tier"),
    )


def _decode_cached(block: worker_pb2.CachedBlock) -> CachedBlock:
    if _is_host(block.tier, "cached.tier"):
        raise BlockOutOfRange("cached.tier is HOST, where blocks are not named; name DEVICE", "cached.tier")
    return CachedBlock(_is_window(block.pool, "cached"), block.block_id, block.hash)


def encode_cached(block: CachedBlock) -> worker_pb2.CachedBlock:
    pool = worker_pb2.BLOCK_POOL_WINDOW if block.is_window else worker_pb2.BLOCK_POOL_FULL
    return worker_pb2.CachedBlock(pool=pool, tier=worker_pb2.BLOCK_TIER_DEVICE, block_id=block.block_id, hash=block.name)


def _decode_admission(message: worker_pb2.AdmittedSequence, facts: ModelFacts) -> Admission:
    return Admission(
        seq_id=message.seq_id,
        request_id=message.request_id,
        token_ids=list(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        num_computed_tokens=message.num_computed_tokens,
        sampling=decode_sampling(message.sampling, facts),
        full_block_ids=list(message.full_block_ids),
        window_block_ids=list(message.window_block_ids),
        first_window_block=message.first_window_block,
        rejection=_rejection(message.sampling, facts),
    )


def _rejection(sampling: sampling_pb2.SamplingParams, facts: ModelFacts) -> InvalidArgument | Unsupported | None:
    """Why a sequence cannot be sampled as asked. It is the client's doing, so it must not refuse the plan that others share."""
    if sampling.constraint.WhichOneof("kind") and facts.vocab_size != VOCAB_SIZE:
        return Unsupported(
            f"a constraint needs a vocabulary of {VOCAB_SIZE} tokens, and this model has {facts.vocab_size}; leave it unset",
            param="sampling.constraint",
        )
    unknown = next((token_id for token_id in sampling.logit_bias if token_id >= facts.vocab_size), None)
    if unknown is not None:
        return InvalidArgument(
            f"sampling.logit_bias names token {unknown}, but ids end at {facts.vocab_size - 1}; leave it out", param="sampling.logit_bias"
        )
    return None


def decode_sampling(message: sampling_pb2.SamplingParams, facts: ModelFacts) -> SamplingParams:
    """The parameters with "off" where a field is unset, and the ids that min_tokens bans."""
    stop_ids = set(message.stop_token_ids) | (set() if message.ignore_eos else set(facts.eos_token_ids))
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
        banned_token_ids=tuple(sorted(token_id for token_id in stop_ids if token_id < facts.vocab_size)) if message.min_tokens else (),
        min_tokens=message.min_tokens,
        constraint=message.constraint.SerializeToString(deterministic=True) if message.constraint.WhichOneof("kind") else b"",
    )


def encode_outcome(outcome: StepOutcome, is_draining: bool = False) -> worker_pb2.StepResult:
    result = worker_pb2.StepResult(epoch=outcome.epoch, step=outcome.step, device_time_s=outcome.device_time_s, draining=is_draining)
    if outcome.refusal is not None:
        result.refusal.CopyFrom(to_proto(outcome.refusal))
    result.seq_ids.extend(drawn.seq_id for drawn in outcome.output.drawn)
    result.token_ids.extend(drawn.token_id for drawn in outcome.output.drawn)
    result.logprobs.extend(_encode_logprobs(drawn) for drawn in outcome.output.drawn if drawn.logprobs is not None)
    result.errors.extend(worker_pb2.SequenceError(seq_id=one.seq_id, error=to_proto(one.error)) for one in outcome.failures)
    return result


def _encode_logprobs(drawn: DrawnToken) -> worker_pb2.SequenceLogprobs:
    assert drawn.logprobs is not None
    top_ids = [token_id for token_id, _ in drawn.logprobs.top]
    top_logprobs = [logprob for _, logprob in drawn.logprobs.top]
    logprobs = sampling_pb2.TokenLogprobs(logprob=drawn.logprobs.logprob, top_token_ids=top_ids, top_logprobs=top_logprobs)
    return worker_pb2.SequenceLogprobs(seq_id=drawn.seq_id, logprobs=logprobs)
