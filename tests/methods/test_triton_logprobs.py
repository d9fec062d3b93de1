"""The Triton kernels of the log-probs against the plain ones, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    """In a process of its own: Triton decides for the interpreter when it is imported, and for all of a process."""
    checks = Path(__file__).with_name("interpreted_logprobs.py")
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(
        call, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=checks.parents[2], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
