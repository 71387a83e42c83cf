"""More layers for a network that has learnt something: it says the same at first, and has more to learn with."""

from collections.abc import Mapping

import torch
from torch import Tensor

_OUTPUTS = "o_proj.weight", "o_proj.bias", "down_proj", "down_proj_bias"
_COPIED = 2  # layers: a window and full attention, so that these go on by turns


def deepen(masters: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Weights by name of fewer layers, or of as many → of `num_layers`. Raises ValueError where that takes no whole pairs.

    What is added stands before the last two layers and looks at what they look at, but adds nothing until it is trained: its outputs are
    zero (block expansion, https://arxiv.org/abs/2401.02415, with pairs of blocks).
    """
    num_given = 1 + max(int(name.split(".")[1]) for name in masters if name.startswith("layers."))
    if num_layers < num_given or (num_layers - num_given) % _COPIED:
        raise ValueError(f"weights of {num_given} layers cannot begin a network of {num_layers}: only pairs of layers can be added")
    deeper = {name: master for name, master in masters.items() if not name.startswith("layers.")}
    kept = num_given - _COPIED
    for layer in range(num_layers):
        source = f"layers.{min(layer, kept + (layer - kept) % _COPIED)}."
        is_added = kept <= layer < num_layers - _COPIED
        for name, master in masters.items():
            if name.startswith(source):
                is_silent = is_added and name.endswith(_OUTPUTS)
                deeper[f"layers.{layer}.{name.removeprefix(source)}"] = torch.zeros_like(master) if is_silent else master.clone()
    return deeper
