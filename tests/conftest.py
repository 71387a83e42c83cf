"""Tests see no key and no limit of the shell that they are run from. Triton kernels run in its interpreter, on the CPU. Hypothesis draws
the same examples each time, however long they take.
"""

import os

from hypothesis import settings

for name in ("OPENAI_API_KEY", "API_RATE_LIMIT_RPS"):
    os.environ.pop(name, None)
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which transformers does too
settings.load_profile("ci")  # Hypothesis's own: no deadline, no complaint of slowness, no store of earlier failures
