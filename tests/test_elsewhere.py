"""What runs on a GPU only, run without one: tensors of another device than the CPU go through it. See `elsewhere.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_no_tensor_is_left_on_the_cpu():
    """In a process of its own, which has a foreign device from then on."""
    checks = Path(__file__).with_name("elsewhere_checks.py")
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(call, env=environment, cwd=checks.parents[1], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
