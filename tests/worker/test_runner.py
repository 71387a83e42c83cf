"""The model as a backend: whole steps, batches and caches."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.worker.checkpoints import SPECS
from tests.worker.greedy import GreedyDriver, make_prompts
from tests.worker.paged_run import PagedRun
from worker import kernels
from worker.backend import BlockCopy
from worker.checkpoint import CheckpointError
from worker.kv_cache import KVCacheTooSmall
from worker.load_progress import StartProgress
from worker.model_config import ModelConfig
from worker.model_start import compile_kernels, load_model_backend
from worker.models.gpt_oss import GptOss
from worker.runner import ModelBackend
from worker.sequences import SamplingParams, ScheduledSequence, Sequence
from worker.tensor_parallel import SingleRank

LoadBackend = Callable[[str], ModelBackend]


@pytest.mark.parametrize("name", SPECS)
def test_32_mixed_streams_draw_the_tokens_that_each_draws_alone(name: str, load_backend: LoadBackend) -> None:
    backend = load_backend(name)
    prompts = make_prompts(32, backend.facts.vocab_size)
    together = GreedyDriver(backend, num_tokens=12).run(prompts)
    alone = [GreedyDriver(backend, num_tokens=12).run([prompt])[0] for prompt in prompts]
    assert together == alone


def test_a_rows_logits_do_not_depend_on_who_shares_its_batch(load: Callable[[str], tuple[GptOss, ModelConfig]]) -> None:
    model, config = load("odd_window")
    prompts = make_prompts(12, config.vocab_size)
    crowd, solo = PagedRun(model, config, num_blocks=900), PagedRun(model, config, num_blocks=900, seed=1)
    crowded = [crowd.admit([1, *prompt]) for prompt in prompts]
    alone = solo.admit(crowded[5].token_ids)
    for sequence in crowded:
        crowd.prefill(sequence, (31,))
        sequence.token_ids.append(7)
    solo.prefill(alone, (31,))
    alone.token_ids.append(7)
    rows = crowd.step(*((sequence, 1) for sequence in crowded))
    assert torch.equal(rows[5], solo.step((alone, 1))[0])


def _sequence(token_ids: list[int], blocks: list[int], num_computed: int = 0) -> Sequence:
    return Sequence(1, "r", token_ids, len(token_ids), SamplingParams(temperature=0.0), num_computed, blocks, list(blocks))


def test_only_sequences_whose_last_token_is_computed_draw_in_scheduled_order(load_backend: LoadBackend) -> None:
    backend = load_backend("four_ranks")
    prefilling, decoding, ending = (_sequence(list(range(1, 20)), [2 * i, 2 * i + 1]) for i in range(3))
    prefilling.seq_id, decoding.seq_id, ending.seq_id = 4, 5, 6
    assert backend.step([ScheduledSequence(decoding, 18), ScheduledSequence(ending, 9)], ()).drawn == ()
    decoding.num_computed_tokens, ending.num_computed_tokens = 18, 9
    scheduled = [ScheduledSequence(ending, 10), ScheduledSequence(prefilling, 3), ScheduledSequence(decoding, 1)]
    assert [token.seq_id for token in backend.step(scheduled, ()).drawn] == [6, 5]
    assert backend.step([], ()).drawn == ()
    assert backend.step([ScheduledSequence(prefilling, 3)], ()).drawn == ()


def test_a_sequence_goes_on_from_copied_blocks_as_from_its_own(load_backend: LoadBackend) -> None:
    backend = load_backend("four_ranks")
    token_ids = list(range(3, 35))
    original = backend.step([ScheduledSequence(_sequence(token_ids, [40, 41]), 32)], ()).drawn[0].token_id
    copies = [BlockCopy(is_window, source, source + 10) for is_window in (False, True) for source in (40, 41)]
    copied = backend.step([ScheduledSequence(_sequence(token_ids, [50, 51], num_computed=31), 1)], copies).drawn[0].token_id
    assert copied == original


def test_a_sequence_whose_logits_are_not_numbers_fails_alone(load_backend: LoadBackend) -> None:
    backend = load_backend("four_ranks")
    backend._kv_cache.full[:, :, 7] = math.nan
    healthy, poisoned = _sequence([1, 2, 3], [8]), _sequence([1, 2, 3], [7], num_computed=2)
    poisoned.seq_id = 9
    output = backend.step([ScheduledSequence(poisoned, 1), ScheduledSequence(healthy, 3)], ())
    assert [failure.seq_id for failure in output.failed] == [9]
    assert [token.seq_id for token in output.drawn] == [1]


def _load(model_dir: Path, *, kv_cache_bytes: int = 1 << 24, max_model_len: int | None = None, dtype: str = "float32") -> ModelBackend:
    return load_model_backend(
        model_dir,
        tensor_parallel=SingleRank(),
        device="cpu",
        dtype=dtype,
        block_size=16,
        num_full_blocks=None,
        num_window_blocks=None,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=max_model_len,
        max_batch_tokens=512,
        max_num_seqs=4,
    )


def test_the_facts_say_what_the_checkpoint_and_the_cache_hold(checkpoint_dir: Callable[[str], Path]) -> None:
    facts = _load(checkpoint_dir("odd_window")).facts
    spec = SPECS["odd_window"]
    assert (facts.vocab_size, facts.sliding_window, facts.eos_token_ids) == (spec.vocab_size, 37, (511,))
    assert facts.max_model_len == spec.max_position_embeddings
    assert facts.total_parameters > facts.active_parameters > 0
    block_bytes = 2 * 2 * 16 * 5 * 24 * 4  # layers of a pool, keys and values, tokens, heads, head_dim, float32
    assert (facts.num_full_blocks + facts.num_window_blocks) * block_bytes <= 1 << 24


def test_equal_files_have_one_fingerprint_and_other_dtypes_or_weights_another(checkpoint_dir: Callable[[str], Path]) -> None:
    first, again = (_load(checkpoint_dir("odd_window")).facts.fingerprint for _ in range(2))
    others = {
        _load(checkpoint_dir("odd_window"), dtype="bfloat16").facts.fingerprint,
        _load(checkpoint_dir("four_ranks")).facts.fingerprint,
    }
    assert first == again
    assert len(others | {first}) == 3


def test_other_kernels_have_another_fingerprint(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _load(checkpoint_dir("odd_window")).facts.fingerprint
    (tmp_path / "attention.py").write_text("# another one")
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    assert _load(checkpoint_dir("odd_window")).facts.fingerprint != before


def test_prompts_of_every_magnitude_are_computed_before_a_gpu_serves(load_backend: LoadBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, lengths = load_backend("odd_window"), []
    monkeypatch.setattr(backend, "prompt_logits", lambda prompt: lengths.append(len(prompt)))
    compile_kernels(backend, max_batch_tokens=300)
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    compile_kernels(backend, max_batch_tokens=1 << 20)
    assert max(lengths) == 1024 == backend.facts.max_model_len


def test_bfloat16_draws_tokens(checkpoint_dir: Callable[[str], Path]) -> None:
    backend = _load(checkpoint_dir("wide_heads"), dtype="bfloat16")
    tokens = GreedyDriver(backend, num_tokens=8).run(make_prompts(3, backend.facts.vocab_size))
    assert [len(drawn) for drawn in tokens] == [8, 8, 8]


@pytest.mark.parametrize(
    ("kv_cache_bytes", "max_model_len", "error", "words"),
    [
        (1 << 24, 1025, CheckpointError, "max_model_len is 1025, over the config's max_position_embeddings of 1024: lower"),
        (1 << 18, 1024, KVCacheTooSmall, "max_model_len is 1024, the KV cache holds"),
        (1 << 14, None, KVCacheTooSmall, "raise kv_cache_bytes"),
    ],
)
def test_a_length_that_cannot_be_held_is_refused(
    checkpoint_dir: Callable[[str], Path], kv_cache_bytes: int, max_model_len: int | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        _load(checkpoint_dir("odd_window"), kv_cache_bytes=kv_cache_bytes, max_model_len=max_model_len)


def test_progress_ends_with_all_bytes(checkpoint_dir: Callable[[str], Path]) -> None:
    seen: list[tuple[int, int]] = []
    progress = StartProgress()
    progress.note_bytes = lambda done, total: seen.append((done, total))  # type: ignore[method-assign]
    load_model_backend(
        checkpoint_dir("four_ranks"),
        tensor_parallel=SingleRank(),
        device="cpu",
        dtype="float32",
        block_size=16,
        num_full_blocks=8,
        num_window_blocks=16,
        kv_cache_bytes=0,
        max_model_len=None,
        max_batch_tokens=64,
        max_num_seqs=1,
        progress=progress,
    )
    weights = sum(file.stat().st_size for file in checkpoint_dir("four_ranks").glob("*.safetensors"))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert 0.9 * weights < seen[-1][1] < weights
