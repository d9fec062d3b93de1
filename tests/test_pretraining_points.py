"""Resume points of pretraining runs: found, fetched and cleared in folders and elsewhere; disks that are full, ranks that were killed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as filesystems
import pytest

from raysys import pretraining, pretraining_points
from raysys.config.pretraining import PretrainMoeConfig
from raysys.errors import CheckpointError, ConfigError, DeadlineError, InfrastructureError
from raysys.files import append_json
from raysys.ledger import Ledger
from raysys.pretraining import _told
from raysys.pretraining_points import Carrier, Storage, scratch, sweep, tell
from tests.training.pretraining import config


def bucket(name: str) -> Storage:
    """A place that is no folder."""
    from fsspec.implementations.memory import MemoryFileSystem

    system = filesystems.PyFileSystem(filesystems.FSSpecHandler(MemoryFileSystem()))
    return Storage(f"memory://{name}", "run", system, f"/{name}/run")


def put(storage: Storage, step: int, missing: bool = False, short: bool = False) -> str:
    """A point as ranks leave it."""
    place = f"{storage.base}/step_{step:08d}"
    files = {"trainer/state/rank_0.pt": b"zero" * step, "trainer/layout.json": b"{}"}
    manifest = {"step": step, "run": "/runs/mine", "files": {name: len(data) for name, data in files.items()}}
    if missing:
        del files["trainer/state/rank_0.pt"]
    if short:
        files["trainer/state/rank_0.pt"] = b"z"
    storage.system.create_dir(f"{place}/trainer/state")
    for name, data in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
        with storage.system.open_output_stream(f"{place}/{name}") as stream:
            stream.write(data)
    return f"step_{step:08d}"


@pytest.fixture(params=["folder", "own disk", "file", "elsewhere"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "elsewhere":
        return bucket(tmp_path.name)
    asked = {"folder": None, "own disk": f"{tmp_path}/own", "file": f"file://{tmp_path}/own/"}[request.param]
    return Storage.of(tmp_path / "run", asked)


def test_the_newest_whole_point_is_found_wherever_it_is(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    assert storage.newest() is None and storage.names() == [] and storage.step(Path("/runs/mine")) == 0
    names = [put(storage, 3), put(storage, 6), put(storage, 9, short=True), put(storage, 12, missing=True)]
    storage.system.create_dir(f"{storage.base}/step_00000015")
    assert storage.names()[:4] == names and storage.newest() == names[1] and storage.step(Path("/runs/mine")) == 6
    assert "step_00000009 is incomplete" in caplog.text
    with pytest.raises(ConfigError, match=r"are of the run in /runs/mine.*go on with run_dir=/runs/mine"):
        storage.step(Path("/runs/another"))
    with storage.system.open_output_stream(f"{storage.base}/{pretraining_points.SNAPSHOT}") as stream:
        stream.write(b"{}")
    storage.begin_anew()
    assert [info.base_name for info in storage.system.get_file_info(filesystems.FileSelector(storage.base))] == [names[1]]
    put(storage, 9), put(storage, 12)
    storage.keep(2)
    assert storage.names() == ["step_00000009", "step_00000012"]


def test_a_point_is_opened_as_a_folder(storage: Storage, tmp_path: Path) -> None:
    name, waited = put(storage, 5), []
    with storage.opened(name, tmp_path / "run", True, lambda: waited.append(1)) as folder:
        assert (folder / "trainer/state/rank_0.pt").read_bytes() == b"zero" * 5
        with storage.opened(name, tmp_path / "run", False, lambda: None) as other:  # another rank
            assert other == folder
        assert folder.is_dir()
    assert folder.is_dir() == storage.shared and len(waited) == (0 if storage.shared else 2)
    assert storage.newest() == name
    if not storage.shared:
        with pytest.raises(InfrastructureError, match="could not be brought"), storage.opened("step_00000006", tmp_path, True, print):
            pass


def test_what_cannot_be_a_storage_is_told_before_anything_starts(tmp_path: Path) -> None:
    for asked, told in (("what://is/this", "cannot be reached"), (f"file://{tmp_path}/*/x", "is a glob")):
        with pytest.raises(ConfigError, match=told):
            Storage.of(tmp_path, asked).check()
    with pytest.raises(ConfigError, match="storage=points is neither"):
        PretrainMoeConfig.parse(config().model_dump() | {"storage": "points"})
    Storage.of(tmp_path, None).check()
    Storage.of(tmp_path, str(tmp_path / "new")).check()


def test_a_run_goes_on_where_its_points_are_and_nowhere_else(tmp_path: Path) -> None:
    of = config(storage=f"file://{tmp_path}/points")
    lines = [json.dumps({"step": step}) for step in range(8)]
    Ledger(tmp_path / "run", of, stored=0).close()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    ledger = Ledger(tmp_path / "run", of, stored=6)
    assert ledger.step == 6
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(range(6))
    ledger.close()
    with pytest.raises(ConfigError, match=r"storage: 'file://.*' -> None"):
        Ledger(tmp_path / "run", config())
    assert config(storage="/elsewhere").identity() == config().identity()


# -- disks


class _Context:
    """Ray Train's, as far as `Carrier` knows it."""

    def __init__(self, error: Exception | None, target: Path):
        self._error, self._target = error, target

    def get_storage(self) -> _Context:
        return self

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> Any:
        (self._target / name).mkdir(parents=True)
        (self._target / name / "half").touch()
        if self._error is not None:
            raise self._error
        return checkpoint


class _Checkpoint:
    def __init__(self, path: Path):
        self.path = str(path)


def test_a_full_storage_ends_the_run_and_a_full_one_elsewhere_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import train

    full, failure = OSError(errno.ENOSPC, "No space left on device"), tmp_path / "failure.jsonl"
    storage, part = Storage.of(tmp_path / "run", None), tmp_path / "part"
    before = put(storage, 3)
    part.mkdir()
    carrier = Carrier(storage, tmp_path, failure, 1.0)
    carrier.ready()
    monkeypatch.setattr(train, "get_context", lambda: _Context(full, Path(storage.base)))
    with pytest.raises(CheckpointError, match=r"step_00000006 could not be written: .*No space left.*the one before it is intact"):
        carrier.carry(_Checkpoint(part), "step_00000006")  # type: ignore[arg-type]
    assert storage.names() == [before] == [storage.newest()] and not part.exists()
    told = _told(failure)
    assert isinstance(told, CheckpointError) and "step_00000006" in str(told) and "\n" not in str(told)
    carrier.ready()

    monkeypatch.setattr(train, "get_context", lambda: _Context(OSError("AWS Error SLOW_DOWN"), tmp_path / "there"))
    with pytest.raises(InfrastructureError, match="AWS Error SLOW_DOWN"):  # by its name Ray Train tries again
        Carrier(bucket("b"), tmp_path, tmp_path / "none", 1.0).carry(_Checkpoint(part), "step_00000006")  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


def test_a_storage_that_is_slower_than_the_points_holds_training_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import train

    carrier = Carrier(Storage.of(tmp_path / "run", None), tmp_path, tmp_path / "failure.jsonl", 0.05)
    carrier.ready()
    with pytest.raises(DeadlineError, match=r"deadlines\.checkpoint"):
        carrier.ready()
    monkeypatch.setattr(train, "get_context", lambda: _Context(None, tmp_path))
    carrier.carry(_Checkpoint(tmp_path), "step_00000003")  # type: ignore[arg-type]
    carrier.ready()


def test_a_disk_without_room_for_a_line_still_ends_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    failure = tmp_path / "run" / "ledger" / "failure.jsonl"
    failure.parent.mkdir(parents=True)
    assert _told(failure) is None
    failure.symlink_to("/dev/full")
    tell(failure, CheckpointError("never to be read"))
    failure.unlink()
    failure.touch()  # the file system had an entry left, and no block
    with pytest.raises(CheckpointError, match=r"run takes no more files \(\d+ MiB are free there\) \(make room"):
        raise _told(failure) or AssertionError


def test_what_killed_ranks_left_on_a_disk_is_swept(tmp_path: Path) -> None:
    code = "import sys; from raysys.pretraining_points import scratch; print(scratch(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    left, mine, other = Path(done.stdout.strip()), scratch(str(tmp_path)), tmp_path / "raysys-checkpoint-othernode-1-abc"
    other.mkdir()
    assert left.is_dir() and str(os.getpid()) in mine.name
    sweep(str(tmp_path))
    assert not left.exists() and mine.is_dir() and other.is_dir()
    with pytest.raises(CheckpointError, match=r"set trainer\.scratch"):
        scratch(str(tmp_path / "none"))


def test_the_status_names_the_ranks_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Shows:
        def __init__(self, folder: Path, job: str, status: Any):
            asked.append(status)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(pretraining, "Live", Shows)
    session: Any = SimpleNamespace(folder=tmp_path, job="pretrain_moe", submission_id="", ledger=SimpleNamespace(step=0))
    cache: Any = SimpleNamespace(trained=lambda rows: None, progress=dict)
    elastic = config(batch=8, trainer={"ranks": "1..4"})
    with pretraining._shown(elastic, session, cache):
        (status,) = asked
        assert status()["trainers"] == ["trainer rank 0"]
        for step, ranks in enumerate((3, 2)):
            append_json(tmp_path / "metrics.jsonl", {"step": step, "ranks": ranks})
            assert status()["trainers"] == [f"trainer rank {rank}" for rank in range(ranks)]
