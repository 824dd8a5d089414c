"""Protects the tests of `make gpu` from falling behind the program: a few of them run here, on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import environment

QUICK = "stay_in_fp32 or overflows or moves_no_weight"


def test_some_of_them_pass_on_a_cpu() -> None:
    folder = Path(__file__).parent / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), "-k", QUICK]
    variables = {**environment(), "HCNET_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, env=variables, cwd=folder.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
