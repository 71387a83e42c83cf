"""The whole model on its Triton kernels, in the interpreter, as a GPU would run it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.worker.paged_run import PagedRun
from worker.checkpoint import Checkpoint
from worker.checkpoint_maker import CheckpointSpec, make_checkpoint
from worker.kernels.attention import PagedBatch
from worker.kernels.attention_triton import paged_attention_triton
from worker.kernels.experts_triton import TritonExperts, add_down_bias_triton
from worker.kernels.kv_store_triton import rotate_and_store_triton
from worker.kernels.linear_triton import linear_triton
from worker.kernels.rms_norm_triton import add_rms_norm_triton
from worker.kernels.routing_triton import route_triton
from worker.model_config import ModelConfig
from worker.model_loader import load_model
from worker.models import gpt_oss
from worker.models.gpt_oss import GptOss
from worker.tensor_parallel import SingleRank, plan_shards

SPEC = CheckpointSpec(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=32,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=24,
    num_local_experts=3,
    num_experts_per_tok=2,
    sliding_window=21,
    vocab_size=96,
    max_position_embeddings=1024,
    original_max_position_embeddings=64,
)
Load = Callable[[], tuple[GptOss, ModelConfig]]
pytestmark = pytest.mark.usefixtures("interpreter")


def attend(
    queries: Tensor, key_cache: Tensor, value_cache: Tensor, sinks: Tensor, batch: PagedBatch, *, scale: float, window: int
) -> Tensor:
    return paged_attention_triton(queries, key_cache, value_cache, sinks, batch, scale, window)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    model_dir = tmp_path_factory.mktemp("kernels") / "checkpoint"
    make_checkpoint(model_dir, SPEC, 5)

    def load_model_anew() -> tuple[GptOss, ModelConfig]:
        with Checkpoint(model_dir) as checkpoint:
            plan = plan_shards(checkpoint.config, rank=0, size=1)
            place = {"dtype": torch.float32, "device": torch.device("cpu")}
            return load_model(checkpoint, plan, SingleRank(), progress=lambda done, total: None, **place), checkpoint.config

    return load_model_anew


@pytest.fixture
def load_on_kernels(load: Load, monkeypatch: pytest.MonkeyPatch) -> Load:
    """From the call on, every model runs on the kernels."""

    def load_with_ops() -> tuple[GptOss, ModelConfig]:
        monkeypatch.setattr(gpt_oss, "paged_attention", attend)
        monkeypatch.setattr(gpt_oss, "rotate_and_store", rotate_and_store_triton)
        monkeypatch.setattr(gpt_oss, "add_rms_norm", add_rms_norm_triton)
        monkeypatch.setattr(gpt_oss, "rms_norm", lambda x, weight, eps: add_rms_norm_triton(x, None, weight, eps)[0])
        monkeypatch.setattr(gpt_oss, "linear", lambda x, weight, bias=None: linear_triton(x, weight.to(x.dtype), bias))
        monkeypatch.setattr(gpt_oss, "route", route_triton)
        monkeypatch.setattr(gpt_oss, "prepare_experts", TritonExperts)
        monkeypatch.setattr(gpt_oss, "add_down_bias", add_down_bias_triton)
        return load()

    return load_with_ops


def make_prompt(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(0, SPEC.vocab_size, (num_tokens,), generator=generator)]


def test_logits_are_the_references_over_chunks_and_decodes(load: Load, load_on_kernels: Load) -> None:
    logits = []
    for load_one in (load, load_on_kernels):  # in this order
        run = PagedRun(*load_one())
        sequence, other = run.admit(make_prompt(43, 1)), run.admit(make_prompt(6, 2))
        steps = [((sequence, 25),), ((sequence, 17), (other, 5)), ((sequence, 1), (other, 1))]
        logits.append(torch.cat([run.step(*step) for step in steps]))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


def test_a_decodes_logits_are_the_same_to_the_bit_alone_and_in_any_batch(load_on_kernels: Load) -> None:
    run = PagedRun(*load_on_kernels())
    sequences = [run.admit(make_prompt(1 if place < 31 else 24, place)) for place in range(32)]
    run.step((sequences[-1], 23))
    logits = []
    for size in (32, 7, 2, 1):
        logits.append(run.step(*((one, 1) for one in sequences[-size:]))[-1])
        for one in sequences[-size:]:
            one.num_computed_tokens -= 1
    assert all(torch.equal(one, logits[0]) for one in logits)
