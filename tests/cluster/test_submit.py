"""The quickstart's Python half: what it asks a head for, and what it says when something is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from raysys import head as heads
from raysys import submit
from raysys.errors import ConfigError
from tests.cluster.conftest import ROOT, plain_env
from tests.processes import ended, gone


def run(command: list[str], env: dict[str, str], checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, cwd=checkout, capture_output=True, text=True, timeout=120)


# -- the command line


def test_default_job_and_its_quickstart() -> None:
    request = submit.parse(None, [], ROOT)
    assert (request.job, request.script, request.overrides) == ("gopd", "pipeline", [])
    assert request.config == ROOT / "jobs/configs/gopd/quickstart.yaml"
    request = submit.parse("jobs/configs/gopd/paper.yaml", ["gopd", "steps=3"], ROOT)
    assert request.command("python", "x.yaml") == ["python", "jobs/gopd.py", "--config", "x.yaml", "steps=3"]


@pytest.mark.parametrize(
    ("config", "arguments", "part"),
    [
        (None, ["gpd"], "unknown job 'gpd' .*gopd"),
        ("nowhere.yaml", [], "nowhere.yaml does not exist"),
        (None, ["gopd", "sft"], "one job at a time"),
        ("a.yaml", ["b.yaml"], "one config at a time"),
    ],
)
def test_wrong_command_lines(config: str | None, arguments: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        submit.parse(config, arguments, ROOT)


def test_what_travels_is_small_and_has_no_environment() -> None:
    from ray._private.runtime_env.packaging import create_package

    target = Path(os.environ["RAYSYS_HOME"]) / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=submit.EXCLUDES)
    with zipfile.ZipFile(target) as package:
        names = package.namelist()
    assert target.stat().st_size < 5 << 20
    assert "raysys/loop.py" in names and "jobs/gopd.py" in names and "jobs/configs/gopd/quickstart.yaml" in names
    assert not [name for name in names if name.split("/")[0] in (".venv", "runs", ".git", ".raysys", "tests")]


def test_the_token_is_private_and_stays(tmp_path: Path) -> None:
    path = heads.token_file(tmp_path / "home")
    assert path.stat().st_mode & 0o777 == 0o600 and (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    assert len(path.read_text()) == 64
    assert heads.token_file(tmp_path / "home").read_text() == path.read_text()


# -- a cluster that is there already


@pytest.mark.e2e
def test_submit_to_a_running_cluster(ray_head: heads.Head, checkout: Path, command: list[str]) -> None:
    env = plain_env(checkout, RAY_ADDRESS=ray_head.dashboard, RAY_AUTH_TOKEN_PATH=ray_head.token_path)
    done = run([*command, "echo", "run_dir=/shared/x", "word=two words"], env, checkout)
    assert done.returncode == 0, done.stderr
    assert "('word', 'two words')" in done.stdout and "_ray_pkg_" in done.stdout and "checkout None" in done.stdout
    assert not (checkout / ".raysys").exists(), "nothing local may be started"
    failed = run([*command, "echo", "run_dir=/shared/x", "code=5"], env, checkout)
    assert failed.returncode == 5


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("token", "part"), [({}, "wants a token (401)"), ({"RAY_AUTH_TOKEN": "f" * 64}, "refused the token")], ids=["no token", "wrong token"]
)
def test_without_the_right_token_nothing_is_taken(
    ray_head: heads.Head, checkout: Path, command: list[str], token: dict[str, str], part: str
) -> None:
    refused = run([*command, "echo", "run_dir=/shared/x"], plain_env(checkout, RAY_ADDRESS=ray_head.dashboard, **token), checkout)
    assert refused.returncode == 2
    assert part in refused.stderr and refused.stderr.count("\n") == 1 and "submitted" not in refused.stdout


@pytest.mark.parametrize(
    ("address", "arguments", "code", "part"),
    [
        ("http://127.0.0.1:9", ["run_dir=/shared/x"], 1, "no Ray dashboard answers at http://127.0.0.1:9"),
        ("10.0.0.1:6379", ["run_dir=/shared/x"], 2, "not a dashboard address"),
        ("http://127.0.0.1:9", [], 2, "a path that all nodes share"),
        ("http://127.0.0.1:9", ["run_dir=runs/x"], 2, "got run_dir=runs/x"),
    ],
)
def test_wrong_addresses_and_folders(checkout: Path, command: list[str], address: str, arguments: list[str], code: int, part: str) -> None:
    refused = run([*command, "echo", *arguments], plain_env(checkout, RAY_ADDRESS=address), checkout)
    assert refused.returncode == code
    assert part in refused.stderr and refused.stderr.count("\n") == 1


# -- a head of its own


def test_bad_input_starts_no_head(checkout: Path, command: list[str]) -> None:
    refused = run([*command, "echo", "bad=1"], plain_env(checkout), checkout)
    assert refused.returncode == 2 and refused.stderr == "error: bad is not allowed\n"
    assert not (checkout / ".raysys" / "head.json").exists()


def test_a_port_in_use_is_named_with_its_knob(checkout: Path, command: list[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        refused = run([*command, "echo"], plain_env(checkout, RAYSYS_DASHBOARD_PORT=port), checkout)
    assert refused.returncode == 2
    assert f"port {port}" in refused.stderr and "RAYSYS_DASHBOARD_PORT" in refused.stderr


@pytest.mark.e2e
def test_local_head_is_started_kept_found_and_stopped(checkout: Path, command: list[str]) -> None:
    env = plain_env(checkout)
    first = run([*command, "echo", "--keep-head"], env, checkout)
    assert first.returncode == 0 and "Ray head started" in first.stdout, first.stderr
    assert f"runs {checkout}/runs" in first.stdout and f"checkout {checkout}\n" in first.stdout
    assert "command bash cluster/quickstart.sh echo" in first.stdout
    head = heads.running(checkout / ".raysys")
    assert head is not None
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    second = run([*command, "echo"], env, checkout)
    assert second.returncode == 0 and "Ray head found" in second.stdout, second.stderr
    assert heads.running(checkout / ".raysys") is None
    assert all(ended(process) for process in family)


@pytest.mark.e2e
def test_ctrl_c_stops_the_job_and_the_head(checkout: Path, command: list[str]) -> None:
    log = checkout / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "echo", "ticks=200"], env=plain_env(checkout), cwd=checkout, stdout=output, stderr=output, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while "tick" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        pid = int(re.search(r"echo pid (\d+)", log.read_text())[1])  # type: ignore[index]
        head = heads.running(checkout / ".raysys")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=90) == 130
    assert gone(pid)
    assert head is not None and not head.alive()
    assert "stopping job" in log.read_text() and "Traceback" not in log.read_text()


STAGE = """
import json, os, pathlib, sys, yaml
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import ray
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
ray.init(log_to_driver=False)
where = ray.get(ray.remote(lambda: __import__("raysys").__file__).remote())
print("a task of", config["name"], "found the package at", where)
folder = pathlib.Path(config["run_dir"]) / "ledger"
folder.mkdir(parents=True)
(folder / "finished.json").write_text("{}")
"""


@pytest.mark.e2e
def test_the_stages_of_a_submitted_pipeline_join_its_ray(ray_head: heads.Head, checkout: Path, command: list[str]) -> None:
    (checkout / "jobs" / "sft.py").write_text(STAGE)
    shutil.copy(ROOT / "jobs" / "pipeline.py", checkout / "jobs")
    data = "data: {source: {domains: {rev: {task: spell_backward}}}}"
    (checkout / "jobs" / "configs" / "echo" / "two.yaml").write_text(
        f"stages:\n  one: {{job: sft, set: {{{data}}}}}\n  two: {{job: sft, set: {{student: '${{one}}', {data}}}}}\n"
    )
    shared = checkout / "shared"
    env = plain_env(checkout, RAY_ADDRESS=ray_head.dashboard, RAY_AUTH_TOKEN_PATH=ray_head.token_path, RAYSYS_RUNS_DIR=str(shared))
    done = run([*command, "--config", "jobs/configs/echo/two.yaml"], env, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"\[(?:one|two)\] a task of .*_ray_pkg_", done.stdout)) == 2
    assert len(list(shared.glob("*-*/ledger/finished.json"))) == 2 and (shared / "echo-two" / "stages.json").is_file()
    again = run([*command, "--config", "jobs/configs/echo/two.yaml"], env, checkout)
    assert again.returncode == 0 and again.stdout.count("done already") == 2
