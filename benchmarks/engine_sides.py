"""The two sides that are compared step by step: a worker's backend, and transformers. Both get the same tokens, whatever they draw."""

import time
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging

from worker.backend import ModelFacts
from worker.checkpoint_maker import CheckpointSpec
from worker.kv_cache import KVCache, KVCacheLayout
from worker.model_config import ARCHITECTURE, ModelConfig
from worker.models.gpt_oss import GptOss, Weights
from worker.runner import ModelBackend
from worker.sequences import SamplingParams, ScheduledSequence, Sequence
from worker.tensor_parallel import SingleRank, plan_shards

BLOCK_SIZE = 16


class Side(Protocol):
    @property
    def name(self) -> str: ...

    def admit(self, tokens: Tensor) -> None:
        """int64 [batch, context]: computes all but the last of them, which `decode_s` begins with. Forgets what was there before."""
        ...

    def decode_s(self, tokens: Tensor) -> float:
        """Seconds of one decode step, the mean over as many steps as `tokens` [batch, steps] has columns, each followed by its tokens."""
        ...

    def prefill_s(self, tokens: Tensor) -> float:
        """Seconds of a prompt [tokens] until its first token is drawn."""
        ...


@dataclass
class Worker:
    """Whole steps of a backend, one under way while the next is prepared: batches are built, logits computed, tokens drawn."""

    name: str
    backend: ModelBackend
    max_batch_tokens: int

    def admit(self, tokens: Tensor) -> None:
        num_blocks = self.backend.facts.num_full_blocks // len(tokens)
        self.sequences = [
            _sequence(index, row, range(index * num_blocks, (index + 1) * num_blocks)) for index, row in enumerate(tokens.tolist())
        ]
        for sequence in self.sequences:
            self._compute(sequence, len(sequence.token_ids) - 1)

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        while sequence.num_computed_tokens < num_tokens:
            chunk = min(self.max_batch_tokens, num_tokens - sequence.num_computed_tokens)
            self.backend.step([ScheduledSequence(sequence, chunk)], ())
            sequence.num_computed_tokens += chunk

    def decode_s(self, tokens: Tensor) -> float:
        begin = time.perf_counter()
        before = None
        for column in tokens.T.tolist():
            step = self.backend.start([ScheduledSequence(sequence, 1) for sequence in self.sequences], ())
            step.draw()
            if before:
                before.take()
            before = step
            for sequence, token_id in zip(self.sequences, column, strict=True):
                sequence.token_ids.append(token_id)
                sequence.num_computed_tokens += 1
        assert before, "no steps"
        before.take()
        return (time.perf_counter() - begin) / tokens.shape[1]

    def prefill_s(self, tokens: Tensor) -> float:
        sequence = _sequence(0, tokens.tolist(), range(-(-len(tokens) // BLOCK_SIZE)))
        begin = time.perf_counter()
        self._compute(sequence, len(tokens))
        return time.perf_counter() - begin


def _sequence(seq_id: int, token_ids: list[int], blocks: range) -> Sequence:
    return Sequence(seq_id, "", token_ids, len(token_ids), SamplingParams(temperature=0.0), 0, list(blocks), list(blocks))


def build_worker(weights: Weights, config: ModelConfig, *, num_blocks: int, dtype: torch.dtype, device: torch.device) -> ModelBackend:
    """One rank with weights from anywhere; both pools have `num_blocks` blocks."""
    model = GptOss(weights, config, plan_shards(config, rank=0, size=1), SingleRank())
    layout = KVCacheLayout(BLOCK_SIZE, num_blocks, num_blocks)
    cache = KVCache(config, layout, num_kv_heads=config.num_key_value_heads, dtype=dtype, device=device)
    facts = ModelFacts(
        architecture=ARCHITECTURE,
        fingerprint="",
        total_parameters=0,
        active_parameters=0,
        max_model_len=num_blocks * BLOCK_SIZE,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        block_size=BLOCK_SIZE,
        num_full_blocks=num_blocks,
        num_window_blocks=num_blocks,
        sliding_window=config.sliding_window,
        device=device.type,
        dtype=str(dtype),
    )
    return ModelBackend(model, cache, facts)


@dataclass
class Transformers:
    """GptOssForCausalLM with its KV cache, greedy draws and its default way through the experts, grouped_mm.

    Of the others eager was slower in nearly every decode that was measured here, and batched_mm copies the experts of every token.
    """

    name: str
    model: GptOssForCausalLM

    @torch.inference_mode()
    def admit(self, tokens: Tensor) -> None:
        self.cache: Cache = self.model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        self.last = tokens[:, -1:]

    @torch.inference_mode()
    def decode_s(self, tokens: Tensor) -> float:
        begin = time.perf_counter()
        for column in tokens.split(1, dim=1):
            logits = self.model(self.last, past_key_values=self.cache, use_cache=True).logits
            logits[:, -1].argmax(-1).tolist()
            self.last = column
        return (time.perf_counter() - begin) / tokens.shape[1]

    @torch.inference_mode()
    def prefill_s(self, tokens: Tensor) -> float:
        begin = time.perf_counter()
        self.model(tokens.unsqueeze(0), use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - begin

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """Of the token after a prompt [tokens]: float32 [vocabulary]."""
        return self.model(tokens.unsqueeze(0), logits_to_keep=1).logits[0, -1].float()


def open_transformers(model_dir: Path, dtypes: Ordered[torch.dtype]) -> list[Transformers]:
    """From a checkpoint, its MXFP4 experts dequantised, which is how transformers runs them on a CPU."""
    return [Transformers(_name(dtype), _load(model_dir, dtype)) for dtype in dtypes]


def random_transformers(spec: CheckpointSpec, dtype: torch.dtype, device: torch.device) -> Transformers:
    """With random weights made on the device, dequantised."""
    config = GptOssConfig.from_dict({key: value for key, value in spec.config_json().items() if key != "quantization_config"})
    with device:
        return Transformers(_name(dtype), GptOssForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager").eval())


def _name(dtype: torch.dtype) -> str:
    return f"transformers {str(dtype).removeprefix('torch.')}"


def _load(model_dir: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantization = Mxfp4Config(dequantize=True)
    return GptOssForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager", quantization_config=quantization).eval()
