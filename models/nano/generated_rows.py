"""Embedding rows for token ids that no text trained: random signs times one scale, a function of seed and id alone.

Two such rows are nearly orthogonal, so a word without a trained row can still be told from every other, and copied.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generated_rows(ids: Sequence[int], hidden: int, seed: int, scale: float) -> Tensor:
    """[len(ids), hidden] bfloat16, every element +scale or -scale, which bfloat16 must hold exactly; else ValueError.

    The signs of a row are the first `hidden` bits, high bit of each byte first, of SHAKE-256 (FIPS 202) over seed and id, 8 bytes each,
    little end first: the same in every release, on every machine. A bit of 1 is a minus.
    """
    if torch.tensor(scale, dtype=torch.bfloat16).item() != scale:
        raise ValueError(f"a scale of {scale} is not exact in bfloat16: take one of 8 significant bits, such as a power of two")
    num_bytes = -(-hidden // 8)
    prefix = seed.to_bytes(8, "little")
    bits = b"".join(hashlib.shake_256(prefix + token_id.to_bytes(8, "little")).digest(num_bytes) for token_id in ids)
    negative = np.unpackbits(np.frombuffer(bits, dtype=np.uint8).reshape(len(ids), num_bytes), axis=1, count=hidden)
    return torch.from_numpy(negative).to(torch.bfloat16).mul_(-2 * scale).add_(scale)
