"""Every test sees 8 CPU devices, and programs compiled before are kept between runs.

Programs are compiled without LLVM's optimizations: tests are small, and compiling takes nearly all
of their time. The arithmetic is the same.
"""

import importlib.metadata
import os
import tempfile

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# XLA's older code generator compiles in half of the time. It will go, and a flag that is not known
# ends the process: only for versions that were tried.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "cvjax-tests-compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
