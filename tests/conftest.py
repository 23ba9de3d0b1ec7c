"""Every test sees 8 CPU devices, and programs compiled before are kept between runs.

Programs are compiled without LLVM's optimizations, and with the emitters of fused loops that XLA
had before: tests are small, and compiling takes nearly all of their time. These two take it to a
third. The arithmetic is the same.
"""

import gc
import importlib.metadata
import os
import tempfile

flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",  # each worker has one core
]
# XLA ends the process for a flag that it does not know: this one is in some versions alone.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "cvjax-tests-compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Tracing makes many objects and hardly any garbage, which Python looks for after every 700.
gc.set_threshold(50_000, 20, 50)
