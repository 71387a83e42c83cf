"""Tests see no key and no limit of the shell that they are run from. Triton kernels run in its interpreter, on the CPU. Hypothesis draws
the same examples each time, however long they take. No test leaves the processor in another mode for those after it. Threads that wait for
each other sleep: on a busy machine those that spin keep the one that they wait for from its core, and a step takes a hundred times as long.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

for name in ("OPENAI_API_KEY", "API_RATE_LIMIT_RPS"):
    os.environ.pop(name, None)
os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported, here and in the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which transformers does too
settings.load_profile("ci")  # Hypothesis's own: no deadline, no complaint of slowness, no store of earlier failures


@pytest.fixture(autouse=True)
def tiny_numbers() -> Iterator[None]:
    """`torch.set_flush_denormal` holds for the whole thread; MXFP4's 0.5 is such a number until its scale has been applied."""
    yield
    tiny = float.fromhex("0x1p-1074")
    assert tiny * 1.0 > 0, "this test makes tiny numbers 0 for all tests after it: undo that, or do it in a process of its own"
