"""What the tests of kernels stand on: bfloat16 in Triton's interpreter is torch's, to the bit."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.usefixtures("interpreter")


@triton.jit
def _scale_and_square(source: tl.tensor, scaled: tl.tensor, squared: tl.tensor, side: tl.constexpr) -> None:
    places = tl.arange(0, side)[:, None] * side + tl.arange(0, side)[None, :]
    x = tl.load(source + places)
    tl.store(scaled + places, x.to(tl.float32) * 1.1)
    tl.store(squared + places, tl.dot(x, x))


def test_bfloat16_rounds_to_the_nearest_and_multiplies_as_numbers() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scaled, squared = torch.empty_like(x), torch.empty(16, 16)
    _scale_and_square[(1,)](x, scaled, squared, side=16)
    assert torch.equal(scaled, (x.float() * 1.1).to(torch.bfloat16))
    torch.testing.assert_close(squared, x.float() @ x.float(), rtol=0, atol=1e-5)
