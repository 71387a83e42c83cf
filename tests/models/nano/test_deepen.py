from dataclasses import replace

import pytest
import torch

from models.nano.batches import draw_examples, make_batch
from models.nano.deepen import deepen
from models.nano.network import Network
from models.nano.spec import SPEC

LAYERS = SPEC.num_hidden_layers


def test_more_layers_say_the_same_and_can_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(draw_examples("a", 4))
    network = Network(list(range(500)), seed=3)
    before = network.masters()
    network.ship(before)
    said = network.forward(batch)[0]
    monkeypatch.setattr("models.nano.network.SPEC", replace(SPEC, num_hidden_layers=LAYERS + 2))
    deeper = Network(list(range(500)), seed=3)
    deeper.ship(deepen(before, LAYERS + 2))
    again = deeper.forward(batch)[0]
    torch.testing.assert_close(again, said, rtol=1e-4, atol=1e-4)
    torch.autograd.backward(again.square().mean())
    outputs = [
        one
        for name, one in deeper.named_parameters()
        if name.startswith((f"layers.{LAYERS - 2}.", f"layers.{LAYERS - 1}.")) and name.endswith(("o_proj.weight", "down_proj"))
    ]
    assert len(outputs) == 4 and all(one.grad is not None and one.grad.abs().max() > 0 for one in outputs)


def test_as_many_layers_stay_as_they_are() -> None:
    masters = Network(list(range(10)), seed=3).masters()
    same = deepen(masters, LAYERS)
    assert same.keys() == masters.keys() and all(torch.equal(same[name], one) for name, one in masters.items())


def test_layers_are_added_in_pairs_at_the_place_before_the_last_two() -> None:
    masters = {f"layers.{layer}.mlp.router.bias": torch.full((1,), float(layer)) for layer in range(4)}
    assert [deepen(masters, 8)[f"layers.{layer}.mlp.router.bias"].item() for layer in range(8)] == [0, 1, 2, 3, 2, 3, 2, 3]
    for wrong in (2, 5):
        with pytest.raises(ValueError, match="layers"):
            deepen(masters, wrong)
