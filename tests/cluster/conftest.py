"""A small checkout of its own: the package, the quickstart's Python half, and a job that takes no time."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys import head as heads

ROOT = Path(__file__).resolve().parent.parent.parent

ECHO = """
import os, signal, sys, time
if "--check" in sys.argv:
    if "bad=1" in sys.argv:
        print("error: bad is not allowed", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
import raysys
signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), sys.exit(7)))
pairs = dict(argument.split("=", 1) for argument in sys.argv if "=" in argument)
print("echo pid", os.getpid(), "package", raysys.__file__, "runs", os.environ.get("RAYSYS_RUNS_DIR"), flush=True)
print("checkout", os.environ.get("RAYSYS_CHECKOUT"), flush=True)
print("said", sorted(pairs.items()), "command", os.environ["RAYSYS_COMMAND"], flush=True)
for _ in range(int(pairs.get("ticks", 0))):
    print("tick", flush=True)
    time.sleep(0.5)
sys.exit(int(pairs.get("code", 0)))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(ROOT / "raysys", tmp_path / "raysys", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jobs" / "configs" / "echo").mkdir(parents=True)
    (tmp_path / "jobs" / "echo.py").write_text(ECHO)
    (tmp_path / "jobs" / "configs" / "echo" / "local.yaml").write_text("{}\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large.bin").write_bytes(os.urandom(1 << 20))
    yield tmp_path
    heads.remove_traces(tmp_path / ".raysys")


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "raysys.submit"]


def plain_env(checkout: Path, **more: str) -> dict[str, str]:
    """The environment of a person with an empty home and no Ray anywhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYSYS_"))}
    home = checkout / "home"
    home.mkdir(exist_ok=True)
    return kept | {"HOME": str(home), "PYTHONPATH": str(checkout), "RAY_USAGE_STATS_ENABLED": "0"} | more
