import subprocess
import sys

import pytest

SHOW = (
    "from cvjax import cpu; cpu.begin_again();"
    "import os; print([os.environ.get(name) for name in ('GLIBC_TUNABLES', 'XLA_FLAGS')])"
)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and its tunables are Linux's")
def test_a_process_begins_again_once_and_what_is_set_stays(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    pages = "glibc.malloc.hugetlb=1"
    for given, expected in (
        ({"XLA_FLAGS": ""}, [pages, ""]),
        ({"GLIBC_TUNABLES": "", "XLA_FLAGS": ""}, ["", ""]),
    ):
        run = [sys.executable, str(script)]
        environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), **given}
        shown = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        assert shown.stdout == f"{expected}\n"
