"""More layers for a network that has learnt something: it says the same at first, and has more to learn with."""

from collections.abc import Mapping

from torch import Tensor

_OUTPUTS = "o_proj.weight", "o_proj.bias", "down_proj", "down_proj_bias"
_COPIED = 2  # layers: a window and full attention, so that these go on by turns


def deepen(masters: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Weights by name of fewer layers, or of as many → of `num_layers`. Raises ValueError where that takes no whole pairs.

    What is added stands before the last two layers and looks at what they look at, but adds nothing until it is trained: its outputs are
    zero (block expansion, https://arxiv.org/abs/2401.02415, with pairs of blocks).
    """
    given = {name: name.split(".", 2) for name in masters if name.startswith("layers.")}
    num_given = 1 + max(int(layer) for _, layer, _ in given.values())
    more, kept = num_layers - num_given, num_given - _COPIED
    if more < 0 or more % _COPIED:
        raise ValueError(f"weights of {num_given} layers cannot begin a network of {num_layers}: only pairs of layers can be added")
    deeper = {name: master for name, master in masters.items() if name not in given}
    for name, (_, number, part) in given.items():
        layer = int(number)
        if layer < kept:
            deeper[name] = masters[name]
            continue
        for added in range(layer, more + layer, _COPIED):
            silent = masters[name].new_zeros(masters[name].shape) if part.endswith(_OUTPUTS) else masters[name].clone()
            deeper[f"layers.{added}.{part}"] = silent
        deeper[f"layers.{more + layer}.{part}"] = masters[name]
    return deeper
