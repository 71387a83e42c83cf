"""The network that is trained is the model that is served."""

import pytest
import torch

from models.nano.batches import Batch, draw_examples, make_batch
from models.nano.data.conversation import Example
from models.nano.export import published_tensors
from models.nano.network import Network, round_mxfp4
from models.nano.spec import SHARPNESS, SPEC
from tests.worker.paged_run import PagedRun
from worker.kernels.mxfp4 import decode_mxfp4, encode_mxfp4
from worker.model_config import parse_config
from worker.models.gpt_oss import GptOss
from worker.tensor_parallel import SingleRank, plan_shards

SEED = 20


@pytest.fixture(scope="module")
def network() -> Network:
    """As at the beginning, rounded as it will be shipped."""
    network = Network(list(range(0, 4000, 2)), SEED)
    network.ship(network.masters())
    return network


@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 700.0])
def test_rounding_is_what_the_format_does(scale: float) -> None:
    weights = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(1)) * scale
    weights[0, 0, :32] = 0
    weights[0, 1, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # ties
    assert torch.equal(round_mxfp4(weights), decode_mxfp4(*encode_mxfp4(weights), torch.float32))


@pytest.mark.parametrize("num_prefix", [60, SPEC.sliding_window + 9])
def test_the_served_model_computes_the_same(network: Network, num_prefix: int) -> None:
    masters = {name: tensor.clone() for name, tensor in network.masters().items()}
    generator = torch.Generator().manual_seed(2)
    for name, tensor in masters.items():
        if name.endswith("bias"):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)  # no bias may go unnoticed
    trained = Network(network.row_ids.tolist(), SEED)
    trained.ship(masters)
    expected = served_logits(trained, masters, prompt := draw_prompt())
    batch = make_batch([Example("", tuple(prompt[:num_prefix]), prompt[num_prefix:], [False] * (len(prompt) - num_prefix))])
    with torch.no_grad():
        hidden, _ = trained.forward(batch)
        logits = hidden @ trained.table().T * SHARPNESS
    assert len(prompt) > SPEC.sliding_window + 16
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)


def draw_prompt() -> list[int]:
    example = max(draw_examples("prompt", 8), key=lambda one: len(one.token_ids))
    return [*example.prefix, *example.token_ids]


def served_logits(network: Network, masters: dict[str, torch.Tensor], prompt: list[int]) -> torch.Tensor:
    config = parse_config(SPEC.config_json(), SPEC.generation_config_json())
    published = published_tensors(masters)

    def weights(name: str) -> torch.Tensor:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return network.table().float()
        tensor = published[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    model = GptOss(weights, config, plan_shards(config, rank=0, size=1), SingleRank())
    run = PagedRun(model, config)
    return run.prefill(run.admit(prompt), (len(prompt),))


def test_a_sequence_does_not_see_its_neighbours(network: Network) -> None:
    examples = list(draw_examples("neighbours", 12))
    together, alone = make_batch(examples), make_batch(examples[:1])
    with torch.no_grad():
        hidden, _ = network.forward(together)
        expected, _ = network.forward(alone)
    rows = find_rows(together, examples[0])
    torch.testing.assert_close(hidden[rows], expected[alone.blocks[1].rows], atol=1e-3, rtol=0)


def find_rows(batch: Batch, example: Example) -> slice:
    token_ids, wanted = batch.token_ids.tolist(), example.token_ids
    at = next(at for at in range(len(token_ids)) if token_ids[at : at + len(wanted)] == wanted)
    return slice(at, at + len(wanted))


def test_it_begins_with_copying_what_it_never_saw(network: Network) -> None:
    once = torch.randint(5000, 190_000, (4, 40), generator=torch.Generator().manual_seed(3)).tolist()
    examples = [Example("", (200006,), ids + ids, [False] * 40 + [True] * 40) for ids in once]
    batch = make_batch(examples)
    with torch.no_grad():
        hidden, _ = network.forward(batch)
        said = (hidden[:-1][batch.is_target[1:]] @ network.table().T).argmax(-1)
    assert (said == batch.token_ids[1:][batch.is_target[1:]]).float().mean() > 0.5
