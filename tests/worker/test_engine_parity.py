"""Whole engines on 1 to 8 ranks under the real scheduler's core: the reference's tokens, whatever happens to a sequence on its way."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from protos.ossia.v1.sampling_pb2 import Constraint
from services.vocabulary import VOCAB_SIZE
from tests.worker.late_backend import LateBackend
from tests.worker.reference_model import generate, load_reference
from tests.worker.scheduled_run import ScheduledRun, make_request
from tests.worker.thread_ranks import rank_threads
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint
from worker.grammar import GrammarCompiler
from worker.model_start import load_model_backend
from worker.plan_draft import Limits
from worker.runner import ModelBackend
from worker.tensor_parallel import SingleRank, TensorParallel

# 8 key heads, and 11 MXFP4 blocks of each expert: the shares of 8 ranks differ by a block, those of 2 and 4 ranks too
SPEC = CheckpointSpec(
    num_hidden_layers=2,
    hidden_size=96,
    intermediate_size=352,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=24,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=37,
    vocab_size=1000,
    max_position_embeddings=1024,
    original_max_position_embeddings=64,
)
BLOCK_SIZE, NUM_TOKENS, NUM_HOST_BLOCKS = 8, 24, 96
SHARED = [(17 * i * i + 5 * i) % 1000 for i in range(90)]  # the prefix that every second prompt begins with
PROMPTS = [
    [*(SHARED if which % 2 else []), *((31 * which + 7 * i * i + 3 * i) % 1000 for i in range(length))]
    for which, length in enumerate((41, 13, 150, 29, 7, 61))
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parity") / "eight_ranks"
    make_checkpoint(directory, SPEC, 5)
    return directory


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    reference = load_reference(model_dir)
    tokens = [generate(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert len({token for one in tokens for token in one}) > 40  # constant output would prove nothing
    return tokens


def load(model_dir: Path, ranks: TensorParallel) -> ModelBackend:
    """41 full blocks hold one and a half of the longest sequence."""
    block_bytes = 2 * 2 * BLOCK_SIZE * 24 * 4 * SPEC.num_key_value_heads // ranks.size  # both pools: layers, keys and values, float32
    return load_model_backend(
        model_dir,
        tensor_parallel=ranks,
        device="cpu",
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_full_blocks=41,
        num_window_blocks=36,
        kv_cache_bytes=0,
        swap_space_bytes=NUM_HOST_BLOCKS * block_bytes,
        max_model_len=None,
        max_batch_tokens=45,  # no multiple of a block: every chunk of a prompt ends at an odd border
        max_num_seqs=4,
    )


def limits_of(backend: ModelBackend) -> Limits:
    return Limits(backend.facts, 45, 4)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_draw_the_references_tokens_through_hits_chunks_preemption_and_swaps(
    size: int, model_dir: Path, expected: list[list[int]]
) -> None:
    with rank_threads(size, lambda ranks: load(model_dir, ranks), limits_of) as (backend, leader):
        late = LateBackend(backend)
        assert backend.facts.num_host_blocks == NUM_HOST_BLOCKS
        for num_host_blocks in (0, NUM_HOST_BLOCKS):
            limits = Limits(replace(backend.facts, num_host_blocks=num_host_blocks), 45, 4)
            run = ScheduledRun(late, limits, leader)
            sequences = run.run([make_request(prompt, NUM_TOKENS, BLOCK_SIZE) for prompt in PROMPTS])
            assert [one.output_token_ids for one in sequences] == expected
            assert sum(one.num_preemptions for one in sequences) > 0
            assert run.counts.num_cached_tokens > 0 and run.counts.num_chunks > 0 and late.num_unknown > 0
            assert (run.counts.num_swapped_in > 0) == (run.counts.num_swapped_out > 0) == (num_host_blocks > 0)


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 12345, "frequency_penalty": 0.7, "repetition_penalty": 1.1}


def test_a_seed_draws_the_same_tokens_alone_in_a_batch_and_resumed_in_the_middle(model_dir: Path) -> None:
    backend = load(model_dir, SingleRank())
    limits = limits_of(backend)

    def draw(prompt: list[int], num_tokens: int, others: list[list[int]], num_resumed: int = 0) -> list[int]:
        """The tokens of `prompt` among greedy requests, over a device whose draws come late."""
        request = make_request(prompt, num_tokens, BLOCK_SIZE, num_resumed, **SAMPLED)
        run = ScheduledRun(LateBackend(backend), limits)
        return run.run([request, *(make_request(other, NUM_TOKENS, BLOCK_SIZE) for other in others)], stagger=1)[0].output_token_ids

    prompt = PROMPTS[1]
    alone = draw(prompt, NUM_TOKENS, [])
    assert draw(prompt, NUM_TOKENS, PROMPTS) == alone
    assert draw([*prompt, *alone[:10]], NUM_TOKENS, [PROMPTS[0]], num_resumed=10) == alone[10:]
    assert len(set(alone)) > 10
    at_once = ScheduledRun(backend, limits).run([make_request(prompt, NUM_TOKENS, BLOCK_SIZE, **SAMPLED)])
    assert at_once[0].output_token_ids == alone


def test_a_grammar_and_a_penalty_see_tokens_that_came_late(tmp_path: Path) -> None:
    """Their masks and counts need what the step before drew, which is not on the host when theirs starts."""
    tiny = replace(SPEC, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB_SIZE)
    make_checkpoint(tmp_path / "tiny", tiny, 7)
    backend, constraint = load(tmp_path / "tiny", SingleRank()), Constraint(regex="[a-z]{3,8}( [a-z]{3,8}){40}")
    limits = replace(limits_of(backend), facts=replace(backend.facts, num_host_blocks=0))
    requests = [
        make_request([5, 6, 7], NUM_TOKENS, BLOCK_SIZE, constraint=constraint),
        make_request([8, 9], NUM_TOKENS, BLOCK_SIZE, frequency_penalty=2.0, presence_penalty=1.0),
    ]
    at_once = ScheduledRun(backend, limits).run(requests)
    late = ScheduledRun(behind := LateBackend(backend), limits).run(requests)
    drawn = [one.output_token_ids for one in at_once]
    assert drawn == [one.output_token_ids for one in late] and behind.num_unknown > 0
    assert [len(one) for one in drawn] == [NUM_TOKENS, NUM_TOKENS]
    follower = GrammarCompiler(backend.facts.eos_token_ids).compile(constraint.SerializeToString())
    for token_id in drawn[0]:
        follower.accept(token_id)  # raises where the constraint is broken


def test_a_sequence_that_fails_ends_alone_though_its_next_step_is_under_way(model_dir: Path, expected: list[list[int]]) -> None:
    backend = load(model_dir, SingleRank())
    run = ScheduledRun(late := LateBackend(backend), limits_of(backend))
    doomed, healthy = (run.submit(make_request(PROMPTS[which], NUM_TOKENS, BLOCK_SIZE)) for which in (0, 3))
    while len(doomed.output_token_ids) < 5:
        run.step()
    backend._kv_cache.full[:, :, doomed.full_block_ids[0]] = math.nan
    while not healthy.is_finished:
        run.step()
    assert doomed.is_finished and len(doomed.output_token_ids) < NUM_TOKENS
    assert healthy.output_token_ids == expected[3] and late.num_unknown > 0
