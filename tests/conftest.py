"""What all tests share: a token for every Ray they start, one head for the end-to-end ones, and GPU tests that skip themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys import head as heads

_GPU_REASON = "no CUDA device on this machine"


def pytest_configure(config: pytest.Config) -> None:
    """Small machines: one thread each. Ray never starts without a token, and never looks at a person's own."""
    folder = Path(tempfile.mkdtemp(prefix="raysys-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    os.environ |= {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(heads.token_file(folder)),
        "RAYSYS_HOME": str(folder),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=_GPU_REASON))


def _has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and b"GPU" in subprocess.run([tool, "-L"], capture_output=True).stdout


@pytest.fixture(scope="session")
def ray_head() -> Iterator[heads.Head]:
    """A token-protected Ray head for the whole session: `.gcs` for `ray.init`, `.dashboard` for submitting, `.env` for subprocesses."""
    home = Path(os.environ["RAYSYS_HOME"])
    with heads.locked(home):
        head = heads.start(home, cpus=16)
    try:
        yield head
    finally:
        heads.remove_traces(home)
