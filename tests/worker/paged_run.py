"""Runs a model on real paged caches, one step at a time."""

import random

import torch

from worker.input_batch import build_batch
from worker.kv_cache import KVCache, KVCacheLayout
from worker.model_config import ModelConfig
from worker.models.gpt_oss import GptOss
from worker.sequences import SamplingParams, ScheduledSequence, Sequence


class PagedRun:
    """Sequences on real paged caches whose block ids are shuffled; each step's logits and greedy tokens are given back."""

    def __init__(self, model: GptOss, config: ModelConfig, *, block_size: int = 16, num_blocks: int = 400, seed: int = 0) -> None:
        self.model, self.config, self.block_size = model, config, block_size
        layout = KVCacheLayout(block_size, num_blocks, num_blocks)
        self.kv_cache = KVCache(config, layout, num_kv_heads=config.num_key_value_heads, dtype=torch.float32, device=torch.device("cpu"))
        self.kv_cache.full.fill_(float("nan"))  # whatever was not written must not count
        self.kv_cache.window.fill_(float("nan"))
        self._free = [list(range(num_blocks)), list(range(num_blocks))]
        for pool in self._free:
            random.Random(seed).shuffle(pool)
        self._num_sequences = 0

    def admit(self, token_ids: list[int]) -> Sequence:
        self._num_sequences += 1
        return Sequence(self._num_sequences, "r", list(token_ids), len(token_ids), SamplingParams(temperature=0.0))

    @torch.inference_mode()
    def step(self, *scheduled: tuple[Sequence, int]) -> torch.Tensor:
        """Computes the next tokens of each sequence; gives float32 logits of every row, in the order given."""
        for sequence, num_tokens in scheduled:
            while len(sequence.full_block_ids) * self.block_size < sequence.num_computed_tokens + num_tokens:
                sequence.full_block_ids.append(self._free[0].pop())
                sequence.window_block_ids.append(self._free[1].pop())
        rows = [ScheduledSequence(sequence, num_tokens) for sequence, num_tokens in scheduled]
        batch = build_batch(rows, block_size=self.block_size, sliding_window=self.config.sliding_window)
        logits = self.model.compute_logits(self.model.forward(batch, self.kv_cache))
        for sequence, num_tokens in scheduled:
            sequence.num_computed_tokens += num_tokens
        return logits

    def prefill(self, sequence: Sequence, chunks: tuple[int, ...]) -> torch.Tensor:
        """Logits [prompt, vocab]; `chunks` repeat until the prompt is computed."""
        parts: list[torch.Tensor] = []
        while sequence.num_computed_tokens < len(sequence.token_ids):
            left = len(sequence.token_ids) - sequence.num_computed_tokens
            parts.append(self.step((sequence, min(chunks[len(parts) % len(chunks)], left))))
        return torch.cat(parts)

    def decode(self, sequence: Sequence, last_logits: torch.Tensor, num_tokens: int) -> list[int]:
        """Greedy continuation from the logits of the last known token."""
        tokens = [int(last_logits.argmax())]
        while len(tokens) < num_tokens:
            sequence.token_ids.append(tokens[-1])
            tokens.append(int(self.step((sequence, 1))[0].argmax()))
        return tokens
