"""Tests see no key and no limit of the shell that they are run from. Triton kernels run in its interpreter, on the CPU. Hypothesis draws
the same examples each time, however long they take. Threads that wait for each other sleep: on a busy machine those that spin keep the
one that they wait for from its core, and a step takes a hundred times as long.
"""

import os

from hypothesis import settings

for name in ("OPENAI_API_KEY", "API_RATE_LIMIT_RPS"):
    os.environ.pop(name, None)
os.environ["OMP_WAIT_POLICY"] = "passive"  # read when torch is imported, here and in the processes that tests start
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which transformers does too
settings.load_profile("ci")  # Hypothesis's own: no deadline, no complaint of slowness, no store of earlier failures
