"""The model against transformers' GptOssForCausalLM, in float32 from the same files: with the compiled kernels, and with torch alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

from tests.worker.checkpoints import SPECS
from tests.worker.paged_run import PagedRun
from tests.worker.reference_model import generate, load_reference
from worker.kernels import cpu
from worker.model_config import ModelConfig
from worker.models.gpt_oss import GptOss

TOLERANCE = 1e-4
PROMPT_TOKENS = 300  # over two windows of 128

Load = Callable[[str], tuple[GptOss, ModelConfig]]
pytestmark = pytest.mark.parametrize("name", SPECS)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    assert cpu.is_compiled(torch.device("cpu")) == (request.param == "compiled"), "the tests need a C compiler: install gcc"


@pytest.fixture
def prompt(name: str) -> list[int]:
    generator = torch.Generator().manual_seed(len(name))
    return [int(token) for token in torch.randint(0, SPECS[name].vocab_size, (PROMPT_TOKENS,), generator=generator)]


@pytest.fixture(scope="module")
def reference(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], GptOssForCausalLM]:
    models: dict[str, GptOssForCausalLM] = {}

    def find(name: str) -> GptOssForCausalLM:
        if name not in models:
            models[name] = load_reference(checkpoint_dir(name))
        assert {parameter.dtype for parameter in models[name].parameters()} == {torch.float32}
        return models[name]

    return find


@torch.inference_mode()
def test_chunked_prefill_gives_the_reference_logits_at_every_position(
    name: str, prompt: list[int], load: Load, reference: Callable[[str], GptOssForCausalLM]
) -> None:
    expected = reference(name)(torch.tensor([prompt])).logits[0]
    for chunks in ((PROMPT_TOKENS,), (7, 61, 129), (16, 1, 33)):
        run = PagedRun(*load(name), seed=len(chunks))
        assert (run.prefill(run.admit(prompt), chunks) - expected).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_decoding_token_by_token_gives_the_reference_logits_at_every_position(
    name: str, prompt: list[int], load: Load, reference: Callable[[str], GptOssForCausalLM]
) -> None:
    expected = reference(name)(torch.tensor([prompt])).logits[0]
    run = PagedRun(*load(name), block_size=8)
    assert (run.prefill(run.admit(prompt), (1,)) - expected).abs().max() <= TOLERANCE


def test_64_greedy_tokens_are_those_of_the_reference(
    name: str, prompt: list[int], load: Load, reference: Callable[[str], GptOssForCausalLM]
) -> None:
    run = PagedRun(*load(name))
    sequence = run.admit(prompt)
    tokens = run.decode(sequence, run.prefill(sequence, (29,))[-1], 64)
    assert tokens == generate(reference(name), prompt, 64)
    assert len(set(tokens)) > 20  # a constant output would prove nothing
