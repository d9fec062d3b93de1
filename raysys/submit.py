"""Submits a job to a Ray cluster and follows it: the Python half of `cluster/quickstart.sh`.

Without RAY_ADDRESS it starts (or takes) this checkout's own head; with `RAY_ADDRESS=http://host:8265` it starts nothing here.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from raysys import following
from raysys import head as heads
from raysys.borrow import borrowed
from raysys.config.jobs import CONFIGS
from raysys.config.runs import Run
from raysys.errors import ConfigError, RaysysError

ROOT = Path(__file__).resolve().parent.parent
EXCLUDES = [
    *("/.venv/", "/.venv-*/", "/venv/", "/runs/", "/.git/", "/.raysys/", "/build/", "/dist/", "/tests/"),
    *("*.egg-info/", "__pycache__/", "*.pyc", ".pytest_cache/", ".ruff_cache/", ".hypothesis/"),
]
"""What stays behind when the sources travel to a cluster."""


class PlainRun(Run):
    """What is known of a job that `CONFIGS` does not list: any further key passes, the job itself judges it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


@dataclass(frozen=True)
class Request:
    """What to run, as the command line says."""

    job: str
    script: str
    config: Path | None
    overrides: list[str]

    def command(self, python: str, config: str | None, extra: Sequence[str] = ()) -> list[str]:
        return [python, f"jobs/{self.script}.py", *extra, *(["--config", config] if config else []), *self.overrides]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 the job succeeded, 2 the input was wrong, 130 or 143 stopped by a signal, else the job's own."""
    parser = argparse.ArgumentParser(
        prog="cluster/quickstart.sh", description="Runs a job on this machine, or on the cluster that RAY_ADDRESS=http://host:8265 names."
    )
    parser.add_argument("--config", help="YAML of the job; without it the job's quickstart pipeline runs")
    parser.add_argument("--keep-head", action="store_true", help="leave the local Ray head running at the end")
    parser.add_argument("--stop-head", action="store_true", help="stop the local Ray head and leave")
    parser.add_argument("arguments", nargs="*", metavar="job | key=value")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.stop_head:
            return _stop_head()
        request = parse(options.config, options.arguments, ROOT)
        if os.environ.get("RAY_ADDRESS"):
            return _remote(request)
        return _local(request, options.keep_head)
    except _Signalled as stopped:
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130
    except RaysysError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1


# -- what to run


def parse(config: str | None, arguments: Sequence[str], root: Path) -> Request:
    """The request behind `[job] [--config FILE] [key=value ...]`. Raises ConfigError for an unknown job or a missing file."""
    config, rest = split_config(config, arguments)
    overrides = [argument for argument in rest if "=" in argument]
    names = [argument for argument in rest if "=" not in argument]
    jobs = sorted(path.stem for path in (root / "jobs").glob("*.py"))
    if len(names) > 1:
        raise ConfigError(f"one job at a time, got {', '.join(names)}", "overrides are written key=value")
    job = names[0] if names else "pipeline" if config and _is_pipeline(Path(config)) else "gopd"
    if job not in jobs:
        raise ConfigError(f"unknown job '{job}'", f"jobs: {', '.join(jobs)}")
    if config is not None:
        path = Path(config).absolute()
        if not path.is_file():
            raise ConfigError(f"config file {config} does not exist", "check --config")
        return Request(job, "pipeline" if _is_pipeline(path) else job, path, overrides)
    for name, script in (("quickstart", "pipeline"), ("local", job)):
        path = root / "jobs" / "configs" / job / f"{name}.yaml"
        if path.is_file():
            return Request(job, script, path, overrides)
    raise ConfigError(f"job '{job}' has no quickstart", f"give --config FILE; examples are in jobs/configs/{job}/")


def split_config(config: str | None, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """A YAML file among the arguments counts as `--config`."""
    files = [argument for argument in arguments if "=" not in argument and argument.endswith((".yaml", ".yml"))]
    rest = [argument for argument in arguments if argument not in files]
    if len(files) + (config is not None) > 1:
        raise ConfigError(f"one config at a time, got {', '.join([*([config] if config else []), *files])}")
    return (files[0] if files else config), rest


def _is_pipeline(path: Path) -> bool:
    from raysys.config.base import read_yaml

    return path.is_file() and "stages" in read_yaml(path)


def runs_folder() -> Path:
    """Where runs go: RAYSYS_RUNS_DIR, else `runs/` under the working directory."""
    return Path(os.environ.get("RAYSYS_RUNS_DIR", "runs")).absolute()


def home_folder() -> Path:
    """Where the local head keeps its token and state: RAYSYS_HOME, else `.raysys/` of the checkout."""
    asked = os.environ.get("RAYSYS_HOME")
    if asked:
        return Path(asked).absolute()
    return ROOT / ".raysys" if os.access(ROOT, os.W_OK) else Path.home() / ".raysys"


def ensure_token() -> None:
    """Sets RAY_AUTH_MODE, and RAY_AUTH_TOKEN_PATH to a token of ours if the person has none anywhere."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not _has_token(os.environ):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(heads.token_file(home_folder()))


def _has_token(env: Mapping[str, str]) -> bool:
    named = env.get("RAY_AUTH_TOKEN") or env.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path(env.get("HOME", "/")) / ".ray" / "auth_token").is_file()


# -- here or there


def _local(request: Request, keep_head: bool) -> int:
    runs = Path(os.environ.get("RAYSYS_RUNS_DIR") or ROOT / "runs").absolute()
    travelling = _submitter_facts(request)
    travelling |= {"RAYSYS_RUNS_DIR": str(runs), "RAYSYS_HOME": str(home_folder()), "RAYSYS_CHECKOUT": str(ROOT)}
    check = subprocess.run(
        request.command(sys.executable, str(request.config), ["--check"]),
        cwd=ROOT,
        env=os.environ | travelling,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    if check.returncode:
        return check.returncode
    began = time.monotonic()
    with _Watch() as watch, borrowed(home_folder(), keep=keep_head) as (head, found):
        print(f"Ray head {'found' if found else 'started'} in {time.monotonic() - began:.1f} s, dashboard {head.dashboard}", flush=True)
        os.environ.pop("RAY_AUTH_TOKEN", None)  # a cluster's token, and it would win over the head's own
        os.environ.update(head.environment({}))
        for name in ("NO_PROXY", "no_proxy"):  # a proxy knows nothing of this machine's loopback
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
        return _run(request, head.dashboard, str(request.config), travelling, watch)


def _stop_head() -> int:
    with heads.locked(home_folder()):
        head = heads.living(home_folder())  # also one that does not answer any more
        if head is not None:
            head.stop()
    print("Ray head stopped" if head else "no Ray head of this checkout is running")
    return 0


def _remote(request: Request) -> int:
    address = os.environ["RAY_ADDRESS"]
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address} is not a dashboard address", "write RAY_ADDRESS=http://host:8265, or unset it to run here"
        )
    assert request.config is not None
    if not request.config.is_relative_to(ROOT):
        raise ConfigError(
            f"config file {request.config} lies outside {ROOT} and would not travel to the cluster", "move it into the checkout"
        )
    runs = os.environ.get("RAYSYS_RUNS_DIR")
    shared = _validated_run_dir(request) or runs
    if shared is None or not shared.startswith("/"):
        raise ConfigError(
            "on a cluster the run folder must be a path that all nodes share" + (f", got run_dir={shared}" if shared else ""),
            "give run_dir=/shared/runs/NAME, or set RAYSYS_RUNS_DIR=/shared/runs",
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token(os.environ) else "disabled")
    travelling = _submitter_facts(request) | ({"RAYSYS_RUNS_DIR": runs} if runs else {})
    with _Watch() as watch:
        return _run(request, address.rstrip("/"), str(request.config.relative_to(ROOT)), travelling, watch)


def _validated_run_dir(request: Request) -> str | None:
    """`run_dir` as configured. The data a config names may exist only over there, so nothing else is looked at here."""
    if request.script == "pipeline":
        from raysys import pipeline

        assert request.config is not None
        return pipeline.plan(request.config, request.overrides, Path("/runs")).config.run_dir
    kind = CONFIGS.get(request.script, PlainRun)
    return kind.load(request.config, request.overrides).run_dir


def _submitter_facts(request: Request) -> dict[str, str]:
    """What only the submitter knows: the command that reproduces the run and the revision of the sources."""
    from raysys.job import code_revision

    config = [] if request.config is None else ["--config", os.path.relpath(request.config, ROOT)]
    default = (
        request.config is not None
        and request.config.name in ("quickstart.yaml", "local.yaml")
        and request.config.parent.name == request.job
    )
    command = ["bash", "cluster/quickstart.sh", request.job, *([] if default else config), *request.overrides]
    return {"RAYSYS_COMMAND": shlex.join(command), "RAYSYS_CODE_REVISION": code_revision(), "PYTHONUNBUFFERED": "1"}


# -- submit and follow


class _Signalled(BaseException):
    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Watch:
    """While open, SIGINT, SIGTERM and SIGHUP raise `_Signalled` once; later ones are ignored, so that leaving is not cut short."""

    def __enter__(self) -> _Watch:
        self._before = {one: signal.signal(one, self._raise) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def restore(self) -> None:
        """Ray's client may have put its own handlers in place."""
        for one in self._before:
            signal.signal(one, self._raise)

    def _raise(self, signum: int, frame: object) -> None:
        for one in self._before:
            signal.signal(one, signal.SIG_IGN)
        raise _Signalled(signum)


def _run(request: Request, address: str, config: str, env: Mapping[str, str], watch: _Watch) -> int:
    client = following.connected(address)
    began = time.monotonic()
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")  # ours name more, and Ray would warn of each of its own
    try:
        job = client.submit_job(
            entrypoint=shlex.join(request.command("python", config)),
            runtime_env={"working_dir": str(ROOT), "excludes": EXCLUDES, "env_vars": dict(env)},
        )
    except Exception as error:
        raise following.plain(error, address) from None
    watch.restore()
    print(f"job {job} submitted in {time.monotonic() - began:.1f} s", flush=True)
    try:
        return following.follow(client, job, address)
    except _Signalled:
        print(f"stopping job {job}", flush=True)
        following.stop(client, job)
        raise


if __name__ == "__main__":
    sys.exit(main())
