"""Muon for matrices (https://kellerjordan.github.io/posts/muon), Adam for everything else."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """Each matrix moves by its momentum made orthogonal. `state` maps names to momenta and can be saved."""

    def __init__(self, matrices: Iterable[tuple[str, Tensor]]) -> None:
        self.matrices = dict(matrices)
        self.state = {name: torch.zeros_like(matrix) for name, matrix in self.matrices.items()}

    @torch.no_grad()
    def step(self, learning_rates: Mapping[str, float]) -> None:
        for name, matrix in self.matrices.items():
            gradient, momentum = matrix.grad, self.state[name]
            assert gradient is not None
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = orthogonalize(gradient.lerp(momentum, MOMENTUM))
            matrix.sub_(direction, alpha=learning_rates[name] * max(1.0, matrix.shape[-2] / matrix.shape[-1]) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """[..., rows, columns] → about U V^T of its singular value decomposition, by five Newton-Schulz steps."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        squared = x @ x.mT
        x = a * x + (b * squared + c * squared @ squared) @ x
    orthogonal: Tensor = x.mT if is_tall else x
    return orthogonal
