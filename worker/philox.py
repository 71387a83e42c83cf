"""Counter-based noise: Philox4x32-10 in torch's integer operations, and Gumbel noise made of it.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (2011). A word depends on its counter and key alone, so the noise
of a token is the same in whatever batch, step, process or order it is drawn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each of the broadcast counters (four words) and keys (two words), all int64 holding unsigned 32 bit.

    A product of two words wraps around in int64, whose 64 bits are those of the unsigned product. In place: new memory for every operation
    would take as long again.
    """
    k0, k1 = key
    shape = (counter[0] | counter[1] | counter[2] | counter[3] | k0 | k1).shape
    c0, c1, c2, c3 = (word.expand(shape).clone() for word in counter)
    high0, high1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        for word, high, multiplier in ((c0, high0, _MULTIPLIERS[0]), (c2, high1, _MULTIPLIERS[1])):
            word.mul_(multiplier)
            torch.bitwise_right_shift(word, 32, out=high).bitwise_and_(_WORD)
            word.bitwise_and_(_WORD)
        high1.bitwise_xor_(c1).bitwise_xor_(k0)
        high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c0, c1, c2, c3, high0, high1 = high1, c2, high0, c0, c1, c3  # the old c1 and c3 are free to be written
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], num_tokens: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [len(seeds), num_tokens], float32: row i is a function of seeds[i], positions[i] and the token id (the column).

    Token t takes word t % 4 of the counter (t // 4, position, 0, 0) under the key (low, high word of the seed).
    """
    group = torch.arange(-(-num_tokens // 4), device=device)[None, :]
    zero = torch.zeros((1, 1), dtype=torch.int64, device=device)
    key = [_column([(seed >> shift) & _WORD for seed in seeds], device) for shift in (0, 32)]
    words = philox((group, _column(positions, device), zero, zero), key)
    bits = torch.stack([word.to(torch.float32) for word in words], dim=-1).flatten(1)[:, :num_tokens]
    # The likely winners are those with a small exponential variate -log(1 - u), so u is what must be fine near 0.
    uniform = ((bits + 0.5) * 2.0**-32).clamp_(max=_LARGEST_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _column(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)[:, None]
