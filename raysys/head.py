"""A Ray head on this machine: token-protected, on free ports, stopped by its own handle.

`ray stop` ends every Ray on the machine by name; this never does. One head serves one folder (`home`, usually `.raysys/` of the
checkout): whoever needs it takes the one that is alive or starts it, and the last one to leave stops it (`raysys.borrow`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from raysys.errors import ConfigError, InfrastructureError

PORT_KNOB = "RAYSYS_DASHBOARD_PORT"
STORE_KNOB = "RAYSYS_OBJECT_STORE_GIB"
STOP = "bash cluster/quickstart.sh --stop-head"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""States of a job that does not run any more."""
_GIB = 1 << 30
PATIENCE_SECONDS = 30.0
"""For so long a head that lives may be too busy to answer."""
ANSWER_SECONDS = 10.0
"""One question's share of it."""


@dataclass(frozen=True)
class Head:
    """A running head. `pid` and `started` (seconds since the epoch) name the process beyond doubt."""

    pid: int
    started: float
    gcs: str
    """`host:port` for `ray.init(address=...)`."""
    dashboard: str
    """`http://127.0.0.1:port` for submitting jobs."""
    token_path: str
    temp: str
    """Ray's temporary folder: sockets, logs."""

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (default: this process's environment) with what a client of this head needs; RAY_ADDRESS is the GCS."""
        env = dict(os.environ if base is None else base)
        env.pop("RAY_AUTH_TOKEN", None)  # would win over the file
        env |= {
            "RAY_ADDRESS": self.gcs,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return env

    @property
    def env(self) -> dict[str, str]:
        """`environment()` for a subprocess that joins this head."""
        return self.environment()

    def alive(self) -> bool:
        return self._process() is not None

    def answers(self, timeout: float = 2.0) -> bool:
        """Whether the dashboard accepts the token and can list jobs."""
        return self.jobs(timeout) is not None

    def jobs(self, timeout: float = 2.0) -> list[dict[str, Any]] | None:
        """What the dashboard lists: jobs that were submitted and drivers started by hand, ended ones too; None: it gives no answer."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            token = Path(self.token_path).read_text().strip()
            request = urllib.request.Request(f"{self.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            with opener.open(request, timeout=timeout) as reply:
                return json.load(reply)
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def stop(self, timeout: float = 15.0) -> None:
        """Ends this head and everything it started; returns when all of it is gone."""
        process = self._process()
        if process is None:
            return
        family = [process]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
            process.send_signal(signal.SIGTERM)
        psutil.wait_procs([process], timeout=timeout)
        _, left = psutil.wait_procs(family, timeout=0.5)
        for survivor in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(left, timeout=5)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Only one process at a time starts, adopts or stops the head of `home`."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(home / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def living(home: Path) -> Head | None:
    """The head of `home` if its process is alive, whether it answers or not."""
    try:
        head = Head(**json.loads((home / "head.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return head if head.alive() else None


def running(home: Path) -> Head | None:
    """The head of `home`, if it is alive.

    Raises:
        InfrastructureError: it is alive and does not answer, however often it is asked.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (head := living(home)) is not None and not head.answers(ANSWER_SECONDS):
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"the Ray head of {home} (process {head.pid}) is alive, but {head.dashboard} has not answered for {PATIENCE_SECONDS:g} s",
                f"wait until it is less busy, or end it with all that runs on it: {STOP}",
            )
        time.sleep(0.5)
    return head


def start(
    home: Path,
    *,
    cpus: int | None = None,
    resources: Mapping[str, float] | None = None,
    gcs_port: int | None = None,
    options: Sequence[str] = (),
    timeout: float = 120.0,
) -> Head:
    """Starts a head for `home` and waits until it accepts jobs. Call under `locked(home)`.

    Args:
        home: folder of the token, the state and the head's own log; made with mode 700.
        cpus: logical CPUs. The default is at least 8: actors of a small run ask for bookkeeping, not for cores.
        resources: further custom resources.
        gcs_port: the default is a free one.
        options: further ones of `ray start`.
        timeout: seconds until the dashboard must answer.

    Raises:
        ConfigError: the dashboard port that `RAYSYS_DASHBOARD_PORT` asks for is in use.
        InfrastructureError: `home` has a head that is alive, or the new one died or did not answer; the end of its log is in the text.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (head := living(home)) is not None:  # whatever it does not answer: others may have their runs on it
        raise InfrastructureError(f"{home} has a Ray head that is alive (process {head.pid})", f"end it with all that runs on it: {STOP}")
    _sweep(home)
    with _ports_to_itself():
        return _start(home, cpus, resources, gcs_port, options, timeout)


@contextlib.contextmanager
def _ports_to_itself() -> Iterator[None]:
    """One head of this user starts at a time, whatever its home: between finding a port free and taking it others would find it too."""
    path = Path(tempfile.gettempdir()) / f"raysys-{os.getuid()}-ports.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # the folder is everybody's: nothing there is followed or emptied
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _start(
    home: Path,
    cpus: int | None,
    resources: Mapping[str, float] | None,
    gcs_port: int | None,
    options: Sequence[str],
    timeout: float,
) -> Head:
    temp = Path(tempfile.mkdtemp(prefix=_temp_prefix(home)))
    dashboard_port = _dashboard_port()
    free = free_ports(4)
    gcs_port = gcs_port or free[0]
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", "--log-color=false"),
        f"--port={gcs_port}",
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={free[1]}"),
        *(f"--metrics-export-port={free[2]}", f"--ray-client-server-port={free[3]}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temp}"),
        *(f"--num-cpus={cpus or max(8, os.cpu_count() or 1)}", f"--object-store-memory={_store_bytes()}"),
        *([f"--resources={json.dumps(dict(resources))}"] if resources else []),
        *options,
    ]
    token = token_file(home)
    with open(home / "head.log", "w") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_head_environment(token), cwd="/", start_new_session=True
        )
    head = Head(
        pid=child.pid,
        started=psutil.Process(child.pid).create_time(),
        gcs=f"127.0.0.1:{gcs_port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        token_path=str(token),
        temp=str(temp),
    )
    (home / "head.json").write_text(json.dumps(asdict(head)))
    try:
        _await(head, child, home / "head.log", timeout)
    except BaseException:
        head.stop()
        raise
    return head


def _await(head: Head, child: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not head.answers():
        tail = " | ".join(line for line in log.read_text(errors="replace").splitlines()[-6:] if line.strip())
        if child.poll() is not None:
            raise InfrastructureError(f"the Ray head ended with exit code {child.returncode}: {tail}", f"see {log} and {head.temp}")
        if time.monotonic() > deadline:
            raise InfrastructureError(f"the Ray head did not answer at {head.dashboard} within {timeout:g} s: {tail}", f"see {log}")
        time.sleep(0.2)


def token_file(home: Path) -> Path:
    """The token of `home`, made on first use, readable by its owner only."""
    path = home / "token"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def free_port(preferred: int = 0) -> int:
    """A TCP port nobody listens on, `preferred` if it is free."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise InfrastructureError("this machine has no free TCP port")


def free_ports(count: int) -> list[int]:
    """So many different TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:  # all are held until the last one is found
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _dashboard_port() -> int:
    asked = os.environ.get(PORT_KNOB)
    if asked is None:
        return free_port(8265)
    if not asked.isdigit() or not 0 < int(asked) < 65536:
        raise ConfigError(f"{PORT_KNOB}={asked} is not a port number")
    port = free_port(int(asked))
    if port != int(asked):
        raise ConfigError(f"port {asked} for the Ray dashboard is in use", f"unset {PORT_KNOB} or choose another port")
    return port


def _store_bytes() -> int:
    asked = os.environ.get(STORE_KNOB)
    if asked is None:
        return max(_GIB, psutil.virtual_memory().total // 10)
    try:
        return max(int(float(asked) * _GIB), 80 << 20)  # Ray refuses less than 75 MiB
    except ValueError:
        raise ConfigError(f"{STORE_KNOB}={asked} is not a number of GiB") from None


def _head_environment(token: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "RAY_JOB", "RAY_AUTH"))}
    return inherited | {
        # A submitted job runs under the `python` of the head's PATH: it must be this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        **small_machine(),
    }


def small_machine() -> dict[str, str]:
    """What a node's processes need in their environment on a machine with few cores that says it has more, for actors' bookkeeping."""
    return {
        # Otherwise the first driver makes one idle worker per logical CPU, which costs a small machine ten seconds.
        "RAY_prestart_worker_first_driver": "0",
        # As many idle workers stay; by default one per logical CPU: a dozen processes that nobody needs, of which Ray then warns.
        "RAY_num_workers_soft_limit": str(os.cpu_count() or 1),
        # A raylet ends itself when its agents are not up within 30 s; on a busy small machine they need longer to import.
        "RAY_agent_register_timeout_ms": "120000",
    }


def remove_traces(home: Path) -> None:
    """Stops the head of `home` and removes its temporary folders, logs included."""
    if (head := living(home)) is not None:
        head.stop()
    prefix = Path(_temp_prefix(home))
    for folder in prefix.parent.glob(prefix.name + "*"):
        shutil.rmtree(folder, ignore_errors=True)


def _temp_prefix(home: Path) -> str:
    """Short, because the path of a Unix socket may have 107 bytes at most."""
    return f"/tmp/raysys-{os.getuid()}-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:6]}-"


def _sweep(home: Path) -> None:
    """Removes all temporary folders of earlier heads but the newest (its logs may be wanted)."""
    prefix = Path(_temp_prefix(home))
    folders = sorted(prefix.parent.glob(prefix.name + "*"), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-1]:
        shutil.rmtree(folder, ignore_errors=True)
