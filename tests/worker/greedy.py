"""Drives a backend as a scheduler would: staggered arrivals, chunked prefill beside decodes, window blocks given to others once passed.

Run as a program it is one rank of a group, and writes the tokens that it drew to a file.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from worker.backend import Backend
from worker.model_start import load_model_backend
from worker.sequences import SamplingParams, ScheduledSequence, Sequence
from worker.tensor_parallel import join_group

CHUNK = 23  # prompt tokens of one sequence per step; no multiple of a block


@dataclass
class GreedyDriver:
    """Starts one sequence a step. Block ids are handed out last freed first, so that passed blocks are soon overwritten."""

    backend: Backend
    num_tokens: int  # to draw for each sequence
    free_full: list[int] = field(init=False)
    free_window: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free_full = list(range(self.backend.facts.num_full_blocks))
        self.free_window = list(range(self.backend.facts.num_window_blocks))

    def run(self, prompts: list[list[int]]) -> list[list[int]]:
        waiting = [Sequence(i, "r", list(prompt), len(prompt), SamplingParams(temperature=0.0)) for i, prompt in enumerate(prompts)]
        running: list[Sequence] = []
        outputs: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            running += [waiting.pop(0)] if waiting else []
            scheduled = [ScheduledSequence(seq, min(CHUNK, len(seq.token_ids) - seq.num_computed_tokens)) for seq in running]
            for row in scheduled:
                self._grow(row)
            drawn = {token.seq_id: token.token_id for token in self.backend.step(scheduled, ()).drawn}
            for row in scheduled:
                self._advance(row, drawn)
            for seq in [seq for seq in running if len(seq.token_ids) - seq.num_prompt_tokens == self.num_tokens]:
                outputs[seq.seq_id] = seq.token_ids[seq.num_prompt_tokens :]
                running.remove(seq)
                self.free_full += seq.full_block_ids
                self.free_window += seq.window_block_ids[self._num_passed(seq) :]
        return outputs

    def _grow(self, row: ScheduledSequence) -> None:
        seq = row.sequence
        while len(seq.full_block_ids) * self.backend.facts.block_size < seq.num_computed_tokens + row.num_tokens:
            seq.full_block_ids.append(self.free_full.pop())
            seq.window_block_ids.append(self.free_window.pop())

    def _advance(self, row: ScheduledSequence, drawn: dict[int, int]) -> None:
        seq = row.sequence
        passed_before = self._num_passed(seq)
        seq.num_computed_tokens += row.num_tokens
        self.free_window += seq.window_block_ids[passed_before : self._num_passed(seq)]
        if seq.num_computed_tokens == len(seq.token_ids):
            seq.token_ids.append(drawn[seq.seq_id])

    def _num_passed(self, seq: Sequence) -> int:
        """Blocks of which the next token sees nothing."""
        return max(seq.num_computed_tokens - self.backend.facts.sliding_window + 1, 0) // self.backend.facts.block_size


def make_prompts(num_prompts: int, vocab_size: int) -> list[list[int]]:
    """Lengths from 1 to 200, spread."""
    return [[(7 * i * i + 31 * j * j + 5 * j) % vocab_size for j in range(1 + 37 * i % 200)] for i in range(num_prompts)]


def main(model_dir: str, group_dir: str, rank: str, size: str, output: str) -> None:
    tensor_parallel = join_group(Path(group_dir), rank=int(rank), size=int(size), device="cpu", start_timeout_s=240)
    assert tensor_parallel.broadcast_bytes(b"plan" if rank == "0" else None) == b"plan"
    for payload in (b"", bytes(range(256)) * 16, bytes(range(256)) * 16 + b"1", b"long" * 5000):
        assert tensor_parallel.broadcast_bytes(payload if rank == "0" else None) == payload
    backend = load_model_backend(
        Path(model_dir),
        tensor_parallel=tensor_parallel,
        device="cpu",
        dtype="float32",
        block_size=16,
        num_full_blocks=None,
        num_window_blocks=None,
        kv_cache_bytes=32 << 20,
        max_model_len=None,
        max_batch_tokens=256,
        max_num_seqs=8,
    )
    tokens = GreedyDriver(backend, num_tokens=24).run(make_prompts(4, backend.facts.vocab_size))
    Path(output).write_text(json.dumps(tokens))
    tensor_parallel.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
