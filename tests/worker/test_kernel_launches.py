"""Every kernel compiles for Hopper, without a GPU at hand, and its registers suffice. A worker on the CPU needs no Triton."""

import subprocess
import sys

from tests.worker.sm90 import compile_kernels

KERNELS = {
    *("_attend_split", "_merge_splits", "_attend_chunk", "_rotate_and_store", "_add_rms_norm", "_multiply", "_add_parts"),
    *("_penalise_and_mask", "_find_tops", "_find_floors", "_draw_tiles", "_choose"),
}


def test_kernels_compile_for_hopper_without_spills() -> None:
    compiled = compile_kernels("tests.worker.kernel_launches")
    assert {one.name for one in compiled} == KERNELS
    assert not [one for one in compiled if one.stack_bytes or one.shared_bytes > 128 * 1024]


def test_a_worker_on_the_cpu_needs_no_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
import worker.__main__, worker.runner
from worker.sampling import sample
from worker.sequences import SamplingParams, Sequence
drawn, _ = sample(torch.zeros(1, 9), [Sequence(1, "", [2], 1, SamplingParams(top_k=3, top_p=0.5, presence_penalty=1.0))])
sys.exit(len(drawn) != 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
