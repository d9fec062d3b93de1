"""The house's rules: arrows point one way, configs and the driver stay light, files stay short, no machine shows through."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "raysys"

ROOMS = {"data", "rollout", "scoring", "training", "weights"}
LOW = {"methods", "models", "config", "batch", "buckets", "runtime", "errors", "files", "memory", "processes", "tasks"}
FREE = {
    *("loop", "wiring", "assembly", "studies", "compression", "cli", "plan", "doctor", "submit", "stages", "pipeline", "job", "jobs"),
    *("watching", "supervise", "supervised", "compare", "colocate", "checks", "generation", "search_agent", "agent_watch"),
    *("agent_transcripts", "pretraining", "pretraining_points", "pretraining_work", "plan_pretraining", "plan_quantising", "plan_sharing"),
    *("plan_trial", "quantising", "quantising_served", "quantising_work"),
}
"""Who may import what it likes: these wire rooms together, or stand outside of a run."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "memory": {"errors"},
    "processes": set(),
    "methods": set(),
    "config": {"errors"},
    "batch": {"errors"},
    "buckets": set(),
    "runtime": {"errors"},
    "head": {"errors"},
    "borrow": {"head"},
    "following": {"errors", "head"},
    "tasks": {"errors"},
    "models": {"config", "errors", "methods", "runtime", "batch"},
    "ledger": {"config", "errors", "files", "batch", "runtime"},
    "evaluation": {"config", "batch", "errors", "files", "runtime"},
    "report": {"config", "batch", "errors", "files", "runtime"},
    "retrieval": {"config", "errors", "files", "runtime"},
    **dict.fromkeys(ROOMS, LOW),
}


def arrows() -> dict[tuple[str, str], set[str]]:
    """(room, imported room) to the files that draw the arrow; imports inside functions and for type checkers count too."""
    drawn: dict[tuple[str, str], set[str]] = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py") if path.is_relative_to(PACKAGE) else "jobs"
        for target in imported(path):
            if target != here:
                drawn.setdefault((here, target), set()).add(str(path.relative_to(ROOT)))
    return drawn


def imported(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("raysys.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where an arrow points"
            if node.module == "raysys":
                rooms |= {alias.name for alias in node.names if alias.name != "__version__"}
            elif node.module and node.module.startswith("raysys."):
                rooms.add(node.module.split(".")[1])
    return rooms


def test_arrows_point_one_way() -> None:
    wrong = []
    for (here, target), files in arrows().items():
        if here in FREE or here == "__init__":
            continue
        assert here in MAY_IMPORT, f"raysys/{here} is new: say in this test what it may import"
        if target not in MAY_IMPORT[here]:
            wrong.append(f"{here} -> {target} in {', '.join(sorted(files))}")
    assert not wrong, "; ".join(wrong)


def test_the_graph_is_seen_at_all() -> None:
    drawn = arrows()
    assert ("config", "errors") in drawn and ("loop", "batch") in drawn and ("jobs", "config") in drawn


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("raysys.config.jobs", ("torch", "ray", "vllm", "transformers")),
        ("raysys.errors", ("torch", "ray", "vllm", "transformers")),
        ("raysys.pipeline", ("torch", "ray", "vllm", "transformers")),
        ("raysys.submit", ("torch", "ray", "vllm", "transformers")),
        ("raysys.cli", ("torch", "ray", "vllm", "transformers")),
        ("raysys.studies.search_agent", ("torch", "ray", "vllm", "transformers")),
        ("raysys.studies.command", ("torch", "ray", "vllm", "transformers")),
        ("raysys.loop", ("torch", "vllm", "deepspeed")),
        ("raysys.retrieval.client", ("torch", "ray", "vllm", "transformers", "fastapi", "bm25s", "numba")),
        ("raysys.retrieval.service", ("torch", "ray", "vllm", "transformers")),
    ],
)
def test_what_must_stay_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", f"importing {module} brings {done.stdout}{done.stderr}"


def test_importing_the_driver_brings_no_engine() -> None:
    code = "import sys, raysys.wiring; print([name for name in ('torch', 'vllm', 'deepspeed') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    folders = ("raysys", "jobs", "tests", "cluster")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_files_stay_short() -> None:
    code = [path for path in sources() if path.suffix == ".py" and path.is_relative_to(PACKAGE)]
    long = {str(path.relative_to(ROOT)): lines for path in code if (lines := len(path.read_text().splitlines())) > 400}
    assert len(code) > 20 and not long, long


def test_no_machine_shows_through() -> None:
    """No path of somebody's machine and no package index by name."""
    telling = re.compile(r"/(?:home|Users)/\w|/root/|/work/(?:main|shared)|pypi\.org|download\.pytorch\.org|files\.pythonhosted")
    found = []
    for path in sources():
        if path == Path(__file__) or path.suffix in (".png", ".parquet", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if telling.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, found
