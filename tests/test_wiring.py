"""What is known, found and asked for before any actor starts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysys import checks, wiring
from raysys.assembly import Hardware
from raysys.config.base import Config
from raysys.config.runs import GopdConfig, SftConfig
from raysys.errors import ConfigError
from raysys.job import CHECKOUT_VARIABLE, RUNS_VARIABLE, run_folder
from raysys.ledger import Ledger
from raysys.rollout.recorded import Recorder
from tests.fakes import FakeSource, FakeTrainer

KEYS = ["student=s", "teachers.default=t", "data.path=p.jsonl"]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a submitted job: Ray's copy of the sources."""
    folder = tmp_path / "_ray_pkg_0123"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in (CHECKOUT_VARIABLE, RUNS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_vocabularies", "_check_data"):
        monkeypatch.setattr(checks, name, lambda *args, **kwargs: None)


@pytest.mark.parametrize("key", ["rollout.record", "rollout.replay"])
def test_recordings_of_a_submitted_job_lie_in_the_checkout_or_are_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_models: None, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key}=taken is relative, but .* would be lost \\(give {key}= as an absolute path"):
        checks.check_gopd(GopdConfig.load(None, [*KEYS, f"{key}=taken"]))
    monkeypatch.setenv(CHECKOUT_VARIABLE, str(tmp_path))
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path / "kept"))
    assert checks.recording("taken", key) == tmp_path / "taken"
    assert checks.recording("runs/one", key) == tmp_path / "kept" / "one"
    assert checks.recording("/shared/taken", key) == Path("/shared/taken")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CHECKOUT_VARIABLE)
    assert checks.recording("taken", key) == tmp_path / "taken"


def test_a_run_records_where_it_was_told(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKOUT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(wiring, "PromptStream", lambda *args, **kwargs: None)
    monkeypatch.setattr(wiring, "OnPolicySource", lambda *args, **kwargs: FakeSource(FakeTrainer()))
    session: Any = SimpleNamespace(ledger=SimpleNamespace(dead_letter=None))
    config = GopdConfig.load(None, [*KEYS, "rollout.record=taken"])
    source = wiring._on_policy(config, session, None, "s", SimpleNamespace(callback=lambda *args: None))  # type: ignore[arg-type]
    source.take(2, 0)
    assert (tmp_path / "taken" / "step_00000000.arrow").is_file() and not list(copy.iterdir())


def test_a_folder_without_a_recording_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_models: None
) -> None:
    monkeypatch.chdir(tmp_path)
    config = GopdConfig.load(None, [*KEYS, "rollout.replay=taken"])
    with pytest.raises(ConfigError, match="taken holds no recorded samples"):
        checks.check_gopd(config)
    Recorder(FakeSource(FakeTrainer()), tmp_path / "taken").take(2, 0)
    checks.check_gopd(config)


def test_a_run_that_only_records_and_the_one_that_trains_on_it_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is finished then, and would keep the second from its work."""
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    records = GopdConfig.load(None, [*KEYS, "rollout.generate_only=true", "rollout.record=taken"])
    replays = GopdConfig.load(None, [*KEYS, "rollout.replay=taken"])
    first = run_folder("gopd", records)
    ledger = Ledger(first, records)
    ledger.finish(records.steps)
    ledger.close()
    second = run_folder("gopd", replays)
    assert (first.name, second.name) == ("gopd-1", "gopd-2")
    again = Ledger(second, replays)
    assert not again.finished and run_folder("gopd", records) == first
    again.close()
    with pytest.raises(ConfigError, match=r"rollout\.generate_only: True -> None.*choose another name="):
        Ledger(first, replays)
    elsewhere = GopdConfig.load(None, [*KEYS, "rollout.generate_only=true", "rollout.record=other"])
    assert run_folder("gopd", elsewhere).name == "gopd-3"
    assert replays.identity() == Config.identity(replays), "what trained before has the identity that it had"


def test_engines_over_several_gpus_are_counted_whole_where_data_are_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Exception):
        pass

    def choose(cls: type[Hardware], config: Any, dtype: str, gpus_needed: int) -> Hardware:
        raise Counted(gpus_needed)

    monkeypatch.setattr(Hardware, "choose", classmethod(choose))
    source = "{source: {domains: {rev: {task: spell_backward}}}}"
    keys = [f"data={source}", f"evaluation.data={source}", "rollout.workers=2", "rollout.tensor_parallel=4", "trainer.ranks=3"]
    for more, want in (([], 11), (["evaluation=null"], 3)):
        with pytest.raises(Counted) as told:
            wiring._on_data(SftConfig.load(None, [*keys, *more]), None, "s", None)  # type: ignore[arg-type]
        assert told.value.args == (want,)


def test_reading_data_may_take_as_long_as_the_key_says_that_its_error_names(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    stream = SimpleNamespace(prefetch=lambda: None)
    monkeypatch.setattr(wiring, "PromptStream", lambda *args, **kwargs: given.append(kwargs["deadline"]) or stream)
    session: Any = SimpleNamespace(ledger=SimpleNamespace(dead_letter=None, resume_point=None))
    with ExitStack() as stack:
        wiring._on_policy(GopdConfig.load(None, [*KEYS, "deadlines.start=7"]), session, None, "s", stack)  # type: ignore[arg-type]
        stack.pop_all()
    wiring._open_data(SftConfig.load(None, ["student=s", "data.path=p.jsonl", "deadlines.start=8"]), session, "s", [])
    assert given == [7.0, 8.0]
