"""What the network can do before it is trained: find where the current token stood before, and copy what followed.

These are the circuits that small transformers find first (https://arxiv.org/abs/2209.11895), slowly; given at the start they leave the
training time to everything else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.nano.attention import Attention
from models.nano.spec import HEAD_DIM, SPEC

NEAR_GAIN, MATCH_GAIN, CONTEXT_GAIN, COPY_GAIN, SEARCH_GAIN = 4.5, 3.0, 1.5, 4.0, 0.25
BAG_GAIN, BAG_CENTER, BAG_WRITE, ALIKE_GAIN, SELF_GAIN = 2.8, 4, 0.5, 5.0, 2.8
SEARCHING = {1: (2, 3), 2: (0, 1), 3: (0, 1, 2, 3), 4: (0, 1), 5: (0, 1, 2, 3)}  # heads by layer that copy from wherever they learn to look
ALIKE = {1: (2,), 3: (0, 1), 5: (0, 1)}  # those of them that begin with looking for places with similar words before them
_SLOW = torch.cat((torch.arange(12, HEAD_DIM // 2), torch.arange(12 + HEAD_DIM // 2, HEAD_DIM)))  # pairs that hardly turn
_FAST = torch.arange(8)  # pairs whose angle tells neighbours apart
_MIDDLE = torch.arange(2, 8)  # pairs whose angles, together, tell the last ten tokens from those before


@torch.no_grad()
def begin_with_copying(layers: Sequence[Attention], frequencies: Tensor) -> None:
    """Layer 0 looks one and two tokens back; layer 1 compares that with the current token and the one before it, and copies.

    Of one orthonormal basis, A and B are what is copied; C and D take in the A of the token before and of the one before that, E the mean
    of about the last eight. Searching heads copy too, and look everywhere at first, so that looking at the right place pays at once; some
    begin with places where E is alike, as a fact and the question for it are.
    """
    basis_a, basis_b, basis_c, basis_d, basis_e = torch.linalg.qr(torch.randn(SPEC.hidden_size, SPEC.hidden_size))[0].split(HEAD_DIM)
    first, second = layers[:2]
    _look_back(first, 0, basis_a, 0.25 * basis_c, _FAST, NEAR_GAIN, frequencies[_FAST])
    _look_back(first, 1, basis_a, 0.25 * basis_d, _FAST, NEAR_GAIN, 2 * frequencies[_FAST])
    _look_back(first, 2, basis_a, BAG_WRITE * basis_e, _MIDDLE, BAG_GAIN, BAG_CENTER * frequencies[_MIDDLE])
    for head, copied in enumerate((basis_a, basis_b)):
        rows = rows_of(head)
        queries, keys = torch.zeros(2, HEAD_DIM, SPEC.hidden_size)
        for places, gain, asked, found in ((_SLOW[::2], MATCH_GAIN, basis_a, basis_c), (_SLOW[1::2], CONTEXT_GAIN, basis_c, basis_d)):
            queries[places], keys[places] = gain * asked[places], gain * found[places]
        second.q_proj.weight[rows], second.k_proj.weight[rows] = queries, keys
        second.v_proj.weight[rows] = copied
        second.o_proj.weight[:, rows] = COPY_GAIN * copied.T
    for layer, heads in SEARCHING.items():
        for head in heads:
            rows, copied = rows_of(head), (basis_a, basis_b)[head % 2]
            layers[layer].q_proj.weight[rows] *= 0.3
            layers[layer].k_proj.weight[rows] *= 0.3
            layers[layer].v_proj.weight[rows] = copied
            layers[layer].o_proj.weight[:, rows] = SEARCH_GAIN * copied.T
            if head in ALIKE.get(layer, ()):
                _look_for_alike(layers[layer], rows, basis_e)


def _look_back(layer: Attention, head: int, taken: Tensor, written: Tensor, pairs: Tensor, gain: float, turn: Tensor) -> None:
    """Always as far back as the pairs of the rotation turn by `turn`: to one token, or, where they are slow, to several around it."""
    rows = rows_of(head)
    layer.q_proj.weight[rows] *= 0.1
    layer.k_proj.weight[rows] *= 0.1
    layer.q_proj.bias[rows][pairs] = gain
    layer.k_proj.bias[rows][pairs] = gain * turn.cos()
    layer.k_proj.bias[rows][pairs + HEAD_DIM // 2] = gain * turn.sin()
    layer.v_proj.weight[rows] = taken
    layer.o_proj.weight[:, rows] = written.T


def _look_for_alike(layer: Attention, rows: slice, gathered: Tensor) -> None:
    """Where the words before are those that stand before the current token; and not here, where they always are."""
    queries, keys = torch.zeros(2, HEAD_DIM, SPEC.hidden_size)
    queries[_SLOW], keys[_SLOW] = ALIKE_GAIN * gathered[: len(_SLOW)], ALIKE_GAIN * gathered[: len(_SLOW)]
    layer.q_proj.weight[rows], layer.k_proj.weight[rows] = queries, keys
    layer.q_proj.bias[rows][_MIDDLE] = SELF_GAIN
    layer.k_proj.bias[rows][_MIDDLE] = -SELF_GAIN


def rows_of(head: int) -> slice:
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
