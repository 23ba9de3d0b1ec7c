"""The environment in which training steps on a CPU are shorter. It imports nothing heavy."""

import os
import sys
from importlib.metadata import version

# Large pages of memory (experiments/large_pages).
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# XLA's own convolutions, which use all cores: those of YNNPACK, which XLA 0.10 prefers, do not
# (experiments/step_time). Later ones do, and may not know the flag.
if version("jaxlib").startswith("0.10."):
    ENVIRONMENT["XLA_FLAGS"] = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"


def begin_again() -> None:
    """Begins this process again in that environment, which is read before Python is there.

    On Linux, not in a debugger, and not where GLIBC_TUNABLES is set; XLA_FLAGS that are set stay.
    """
    is_plain = sys.platform == "linux" and sys.orig_argv[1:] == sys.argv
    if is_plain and "GLIBC_TUNABLES" not in os.environ:
        os.environ.update({**ENVIRONMENT, **os.environ})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
