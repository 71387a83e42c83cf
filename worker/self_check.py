"""Whether this build, on these devices, computes the model: its logits against those that are stored beside the checkpoint.

`reference.json` holds, for a few prompts, the likeliest next tokens with their logits. `write_reference` makes it with this engine, where
that is known to be right: in float32 on one rank of a CPU, say. Any other program may write it too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worker.safetensors_files import CheckpointError, read_json

REFERENCE = "reference.json"
PROMPT_LENGTHS = (5, 60, 200)  # the last one is longer than a window
NUM_TOP = 16
# By dtype, how far a logit may lie from its reference, as a share of the largest one stored for its prompt
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.08}
Logits = Callable[[list[int]], Tensor]  # of the token after a prompt: float32 [vocabulary]


class SelfCheckFailed(Exception):
    """The model does not compute what it should. One sentence with the cure."""


@dataclass(frozen=True)
class Reference:
    """What should follow one prompt: token ids and their logits, likeliest first."""

    prompt: list[int]
    token_ids: list[int]
    logits: list[float]


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Ids spread over the vocabulary."""
    return [[(7919 * (place + 1) * (length + place)) % vocab_size for place in range(length)] for length in PROMPT_LENGTHS]


def write_reference(model_dir: Path, logits: Logits, vocab_size: int) -> None:
    """Writes `reference.json` from what `logits` computes."""
    references = []
    for prompt in make_prompts(vocab_size):
        top = logits(prompt).topk(min(NUM_TOP, vocab_size))
        references.append({"prompt": prompt, "token_ids": top.indices.tolist(), "logits": top.values.tolist()})
    unfinished = model_dir / f".{REFERENCE}"
    unfinished.write_text(json.dumps({"references": references}) + "\n", encoding="utf-8")
    unfinished.rename(model_dir / REFERENCE)


def read_reference(model_dir: Path, vocab_size: int) -> list[Reference]:
    """Empty where there is none. Raises CheckpointError."""
    file = model_dir / REFERENCE
    if not file.is_file():
        return []
    entries = read_json(file).get("references")
    if not isinstance(entries, list) or not entries or not all(_is_reference(entry, vocab_size) for entry in entries):
        raise CheckpointError(
            f"{file} must hold `references`, each with a prompt, token_ids and logits of this vocabulary: make it again with "
            "`ossia checkpoint reference`, or delete it."
        )
    return [Reference(**entry) for entry in entries]


def _is_reference(entry: object, vocab_size: int) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"prompt", "token_ids", "logits"}:
        return False
    prompt, token_ids, logits = (entry[name] for name in ("prompt", "token_ids", "logits"))
    if not all(isinstance(part, list) and part for part in (prompt, token_ids, logits)) or len(token_ids) != len(logits):
        return False
    are_ids = all(isinstance(token_id, int) and 0 <= token_id < vocab_size for token_id in (*prompt, *token_ids))
    return are_ids and all(isinstance(logit, (int, float)) for logit in logits)


def check_logits(reference: Reference, computed: Tensor, dtype: str) -> None:
    """`computed` [vocabulary] are the logits after the reference's prompt. Raises SelfCheckFailed."""
    stored = torch.tensor(reference.logits)
    error = float((computed.cpu()[reference.token_ids] - stored).abs().max())
    allowed = TOLERANCES[dtype] * float(stored.abs().max())
    if not error <= allowed:  # a NaN fails too
        raise SelfCheckFailed(
            f"self-check failed: after a prompt of {len(reference.prompt)} tokens a logit is off by {error:.3g}, and {dtype} allows "
            f"{allowed:.3g}: the weights are damaged or a kernel is wrong here; check the files, or try --device cpu."
        )
