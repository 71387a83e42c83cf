"""The step contract on the wire: our values to `worker.proto` and back."""

from collections.abc import Callable, Mapping

from protos.ossia.v1 import sampling_pb2, worker_pb2
from scheduler.host_tier import TierCopy
from scheduler.sequence import Admission, GroupLimits, StepPlan, StepResult, TokenLogprobs
from services import errors

WireSampling = Callable[[Admission], sampling_pb2.SamplingParams]
TraceContext = Callable[[Admission], Mapping[str, str]]


def encode_plan(plan: StepPlan, epoch: int, sampling: WireSampling, trace_context: TraceContext) -> worker_pb2.StepPlan:
    """`sampling` and `trace_context` give what the core carries without reading it."""
    return worker_pb2.StepPlan(
        epoch=epoch,
        step=plan.step,
        released=plan.released,
        copies=[_encode_copy(one) for one in plan.copies],
        admitted=[_encode_admission(one, sampling(one), trace_context(one)) for one in plan.admitted],
        appended=[
            worker_pb2.AppendedBlocks(seq_id=seq_id, full_block_ids=full, window_block_ids=window) for seq_id, full, window in plan.appended
        ],
        scheduled_seq_ids=plan.scheduled.keys(),
        num_scheduled_tokens=plan.scheduled.values(),
    )


def _encode_copy(copy: TierCopy) -> worker_pb2.BlockCopy:
    device = (worker_pb2.BLOCK_TIER_DEVICE, copy.device_block_id)
    host = (worker_pb2.BLOCK_TIER_HOST, copy.host_block_id)
    (source_tier, source_id), (target_tier, target_id) = (device, host) if copy.to_host else (host, device)
    return worker_pb2.BlockCopy(
        pool=worker_pb2.BLOCK_POOL_WINDOW if copy.is_window else worker_pb2.BLOCK_POOL_FULL,
        source_tier=source_tier,
        source_block_id=source_id,
        target_tier=target_tier,
        target_block_id=target_id,
    )


def _encode_admission(
    admission: Admission, sampling: sampling_pb2.SamplingParams, trace_context: Mapping[str, str]
) -> worker_pb2.AdmittedSequence:
    request = admission.sequence.request
    return worker_pb2.AdmittedSequence(
        seq_id=admission.seq_id,
        request_id=request.request_id,
        token_ids=admission.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=admission.num_computed_tokens,
        sampling=sampling,
        full_block_ids=admission.full_block_ids,
        window_block_ids=admission.window_block_ids,
        first_window_block=admission.first_window_block,
        trace_context=trace_context,
    )


def decode_result(result: worker_pb2.StepResult) -> StepResult:
    """Raises the refusal as its exception where the worker refused the plan."""
    if result.HasField("refusal"):
        raise errors.from_proto(result.refusal)
    return StepResult(
        step=result.step,
        seq_ids=result.seq_ids,
        token_ids=result.token_ids,
        logprobs={one.seq_id: _decode_logprobs(one.logprobs) for one in result.logprobs},
        errors={one.seq_id: errors.from_proto(one.error) for one in result.errors},
        device_time_s=result.device_time_s,
    )


def _decode_logprobs(logprobs: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(logprobs.logprob, tuple(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)))


def read_limits(info: worker_pb2.GroupInfo) -> GroupLimits:
    return GroupLimits(
        block_size=info.block_size,
        num_full_blocks=info.num_full_blocks,
        num_window_blocks=info.num_window_blocks,
        sliding_window=info.sliding_window,
        max_model_len=info.max_model_len,
        max_batch_tokens=info.max_batch_tokens,
        max_num_seqs=info.max_num_seqs,
        eos_token_ids=frozenset(info.eos_token_ids),
        num_host_blocks=info.num_host_blocks,
    )
