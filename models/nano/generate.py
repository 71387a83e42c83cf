"""Answers from a checkpoint without a cluster: the worker's own model and sampling, many prompts beside each other."""

from collections import deque
from collections.abc import Sequence as Ordered
from pathlib import Path

from worker.model_start import load_model_backend
from worker.runner import ModelBackend
from worker.sequences import SamplingParams, ScheduledSequence, Sequence
from worker.tensor_parallel import SingleRank

BLOCK_SIZE = 16
MAX_RUNNING = 32


def load_backend(model_dir: Path, kv_cache_bytes: int = 512 << 20) -> ModelBackend:
    return load_model_backend(
        model_dir,
        tensor_parallel=SingleRank(),
        device="cpu",
        dtype="float32",
        block_size=BLOCK_SIZE,
        num_full_blocks=None,
        num_window_blocks=None,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=None,
        max_batch_tokens=4096,
        max_num_seqs=MAX_RUNNING,
    )


class Generator:
    """Continuous batching in its simplest form: a sequence takes the blocks of its longest possible course and keeps them to the end."""

    def __init__(self, backend: ModelBackend) -> None:
        self._backend = backend
        self._free_full = list(range(backend.facts.num_full_blocks))
        self._free_window = list(range(backend.facts.num_window_blocks))

    def generate(self, prompts: Ordered[list[int]], temperature: float, max_tokens: int, seed: int = 0) -> list[list[int]]:
        """The tokens after each prompt, up to a stop token, which is the last then."""
        waiting = deque(
            Sequence(at, "eval", list(prompt), len(prompt), SamplingParams(temperature=temperature, seed=seed + at))
            for at, prompt in enumerate(prompts)
        )
        outputs: list[list[int]] = [[] for _ in prompts]
        running: list[Sequence] = []
        while waiting or running:
            while waiting and len(running) < MAX_RUNNING and self._take_blocks(waiting[0], max_tokens):
                running.append(waiting.popleft())
            self._step(running)
            for sequence in [one for one in running if self._is_finished(one, max_tokens)]:
                running.remove(sequence)
                self._free_full += sequence.full_block_ids
                self._free_window += sequence.window_block_ids
                outputs[sequence.seq_id] = sequence.token_ids[sequence.num_prompt_tokens :]
        return outputs

    def _step(self, running: list[Sequence]) -> None:
        scheduled = [ScheduledSequence(one, len(one.token_ids) - one.num_computed_tokens) for one in running]
        drawn = {token.seq_id: token.token_id for token in self._backend.step(scheduled, ()).drawn}
        for sequence, num_tokens in scheduled:
            sequence.num_computed_tokens += num_tokens
            sequence.token_ids.append(drawn[sequence.seq_id])

    def _take_blocks(self, sequence: Sequence, max_tokens: int) -> bool:
        count = -(-(sequence.num_prompt_tokens + max_tokens) // BLOCK_SIZE)
        if min(len(self._free_full), len(self._free_window)) < count:
            return False
        sequence.full_block_ids = [self._free_full.pop() for _ in range(count)]
        sequence.window_block_ids = [self._free_window.pop() for _ in range(count)]
        return True

    def _is_finished(self, sequence: Sequence, max_tokens: int) -> bool:
        num_drawn = len(sequence.token_ids) - sequence.num_prompt_tokens
        return sequence.token_ids[-1] in self._backend.facts.eos_token_ids or num_drawn >= max_tokens
