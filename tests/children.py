"""What tests hand to the processes that they start."""

import os
import re
from pathlib import Path


def environment() -> dict[str, str]:
    """This one, with one device, and programs compiled as quickly as those of the other tests."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": flags}
