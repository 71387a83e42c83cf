"""transformers' GptOssForCausalLM on one of our checkpoints, in float32: what our own model must equal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging


@contextmanager
def _quietly() -> Iterator[None]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity_warning()


def load_reference(model_dir: Path) -> GptOssForCausalLM:
    with _quietly():
        return GptOssForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
        ).eval()


def generate(model: GptOssForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation."""
    ids = torch.tensor([prompt])
    with _quietly():
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return [int(token_id) for token_id in generated[0, len(prompt) :]]
