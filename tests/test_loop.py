"""The loop and the ledger with fake rooms: kill anywhere, resume, and nothing differs from a run nobody disturbed."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import pytest

from raysys.batch import Batch
from raysys.config.runs import GopdConfig
from raysys.errors import CheckpointError, ConfigError
from raysys.evaluation.during import NoEvaluation
from raysys.ledger import Ledger
from raysys.loop import Parts, describe, train
from tests.fakes import FakeObjective, FakeScorers, FakeSource, FakeTrainer, FakeWeights, FileMetrics, Killed

KEYS = ["student=s", "teachers.default=t", "data.path=p.jsonl", "batch=3", "steps=7"]


def launch(folder: Path, steps: int = 7, die_in: str = "", die_at: int = -1, every: int = 3) -> tuple[FakeTrainer, int]:
    """One process's life: open the ledger, go on from it, maybe die in a phase of a step."""
    ledger = Ledger(folder, GopdConfig.load(None, [*KEYS, f"steps={steps}"]), keep=2)
    try:
        trainer = FakeTrainer()
        source = FakeSource(trainer)
        if ledger.resume_point:
            trainer.load(str(ledger.resume_point / "trainer"))
            source.restore(ledger.cursor() or {})
        parts = Parts(source, FakeScorers(), FakeObjective(), trainer, FakeWeights(), ledger, NoEvaluation(), FileMetrics(folder))
        targets = {
            "take": source,
            "annotate": parts.scorers,
            "step": trainer,
            "push": parts.weights,
            "write": parts.metrics,
            "commit": ledger,
            "save": trainer,
        }
        if die_in:
            _break(targets[die_in], die_in, die_at)
        end = train(parts, steps=steps, batch=3, checkpoint_every=every)
        ledger.finish(end)
        return trainer, end
    finally:
        ledger.close()


def _break(target: object, method: str, at: int) -> None:
    whole, calls = getattr(target, method), iter(range(10**6))

    def dies(*args, **kwargs):
        if next(calls) == at:
            if method == "save":  # half a checkpoint on disk
                Path(args[0]).mkdir(parents=True)
                (Path(args[0]) / "weight.json").write_text("[")
            raise Killed
        return whole(*args, **kwargs)

    setattr(target, method, dies)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def trained(folder: Path) -> list[str]:
    return [i for line in (folder / "ledger/steps.jsonl").read_text().splitlines() for i in json.loads(line)["ids"]]


@pytest.mark.parametrize("phase", ["take", "annotate", "step", "push", "write", "commit", "save"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_kill_in_any_phase_changes_nothing(tmp_path: Path, phase: str, at: int) -> None:
    calm, _ = launch(tmp_path / "calm")
    try:
        launch(tmp_path / "hit", die_in=phase, die_at=at)
        assert phase == "save", "only a checkpoint that is never reached may go unharmed"
    except Killed:
        pass
    _resumed, _ = launch(tmp_path / "hit")
    assert records(tmp_path / "hit") == records(tmp_path / "calm")
    assert trained(tmp_path / "hit") == trained(tmp_path / "calm") == [f"p{i}@0/0" for i in range(21)]
    if (tmp_path / "hit/checkpoints/step_00000007").exists():
        assert (tmp_path / "hit/checkpoints/step_00000007/trainer/weight.json").read_text() == json.dumps([calm.weight, 7])


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    straight, _ = launch(tmp_path / "straight", steps=11)
    launch(tmp_path / "grown", steps=7)
    grown, end = launch(tmp_path / "grown", steps=11)
    assert end == 11 and grown.weight == straight.weight
    assert records(tmp_path / "grown") == records(tmp_path / "straight")


def test_a_half_written_checkpoint_is_passed_over_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calm, _ = launch(tmp_path / "calm")
    launch(tmp_path / "hit")
    (tmp_path / "hit/checkpoints/step_00000007/trainer/weight.json").write_text("")
    (tmp_path / "hit/ledger/finished.json").unlink()
    again, _ = launch(tmp_path / "hit")
    assert "step_00000007 is incomplete" in caplog.text
    assert again.weight == calm.weight and records(tmp_path / "hit") == records(tmp_path / "calm")


def test_a_full_disk_stops_the_run_and_leaves_the_resume_point_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysys import ledger as ledgers

    whole, calls = ledgers.write_json, []

    def full(path: Path, record) -> None:
        if path.name == "manifest.json":
            calls.append(path)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, record)

    monkeypatch.setattr(ledgers, "write_json", full)
    with pytest.raises(CheckpointError, match=r"step_00000006 could not be written: .*No space left.*the one before it is intact"):
        launch(tmp_path / "hit")
    assert [path.name for path in (tmp_path / "hit/checkpoints").iterdir()] == ["step_00000003"]
    monkeypatch.undo()
    calm, _ = launch(tmp_path / "calm")
    again, _ = launch(tmp_path / "hit")
    assert again.weight == calm.weight and records(tmp_path / "hit") == records(tmp_path / "calm")


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger/steps.jsonl"])
def test_a_line_that_cannot_be_written_is_one_clear_error(tmp_path: Path, name: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    calm, _ = launch(tmp_path / "calm")
    with pytest.raises(Killed):
        launch(tmp_path / "hit", die_in="step", die_at=5)
    path = tmp_path / "hit" / name
    kept = path.read_text()
    whole, opened = Ledger._roll_back, []

    def filled(ledger: Ledger) -> None:
        whole(ledger)
        opened.append(path.read_text())
        path.unlink()
        path.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=rf"{name} could not be written: .*No space left"):
        patch.setattr(Ledger, "_roll_back", filled)
        launch(tmp_path / "hit")
    path.unlink()
    path.write_text(opened[0])
    again, _ = launch(tmp_path / "hit")
    assert len(kept) > len(opened[0]) and again.weight == calm.weight and records(tmp_path / "hit") == records(tmp_path / "calm")


class Slow(NoEvaluation):
    """An evaluator that takes its time before the first step."""

    def due(self, step: int) -> bool:
        return step == 0

    def run(self, step: int) -> bool:
        time.sleep(0.1)
        return False


def test_an_evaluation_before_the_first_step_is_timed_into_its_record(tmp_path: Path) -> None:
    ledger, trainer = Ledger(tmp_path, GopdConfig.load(None, KEYS)), FakeTrainer()
    parts = Parts(FakeSource(trainer), FakeScorers(), FakeObjective(), trainer, FakeWeights(), ledger, Slow(), FileMetrics(tmp_path))
    train(parts, steps=2, batch=3)
    first, second = (json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["total"] >= first["evaluate"] >= 0.1 and "evaluate" not in second
    ledger.close()


class Stops(NoEvaluation):
    """An evaluator that says stop at one step, also when it is asked again."""

    def __init__(self, at: int):
        self._at = at

    def due(self, step: int) -> bool:
        return step % 2 == 0

    def run(self, step: int) -> bool:
        return step == self._at


def test_a_run_that_was_told_to_stop_stays_stopped_when_it_is_killed_before_its_end(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    for _ in range(2):  # the second as after a kill between the last resume point and the export
        ledger = Ledger(tmp_path, GopdConfig.load(None, KEYS))
        source = FakeSource(trainer)
        parts = Parts(source, FakeScorers(), FakeObjective(), trainer, FakeWeights(), ledger, Stops(4), FileMetrics(tmp_path))
        assert train(parts, steps=7, batch=3, checkpoint_every=3) == 4 and trainer.steps == 4
        ledger.close()
    assert len(records(tmp_path)) == 4


def test_texts_with_odd_line_ends_survive_a_resume(tmp_path: Path) -> None:
    from raysys.files import append_json, read_json_lines
    from raysys.ledger import cut_lines

    text = "a\u2028b\u0085c\u2029d"
    for step in range(3):
        append_json(tmp_path / "samples.jsonl", {"step": step, "text": text})
    (tmp_path / "samples.jsonl").open("a").write('{"step": 3, "te')
    cut_lines(tmp_path / "samples.jsonl", 1)
    assert [record for _, record in read_json_lines(tmp_path / "samples.jsonl")] == [{"step": step, "text": text} for step in range(2)]


def test_a_line_torn_inside_a_character_goes_like_any_other(tmp_path: Path) -> None:
    from raysys.files import append_json, read_json_lines
    from raysys.ledger import cut_lines

    path = tmp_path / "episodes.jsonl"
    append_json(path, {"step": 0, "text": "Zürich"})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: whole.index("ü".encode()) + 1])
    assert [record for _, record in read_json_lines(path)] == [{"step": 0, "text": "Zürich"}]
    cut_lines(path, 1)
    assert path.read_bytes() == whole


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = GopdConfig.load(None, KEYS)
    first = Ledger(tmp_path, config)
    with pytest.raises(ConfigError, match=r"in use by pid \d+ on"):
        Ledger(tmp_path, config)
    first.close()
    Ledger(tmp_path, config).close()


def test_a_disk_that_is_full_before_the_run_begins_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "lock").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="lock could not be written"):
        Ledger(tmp_path, GopdConfig.load(None, KEYS))


def test_another_identity_is_refused_by_key_and_placement_is_not(tmp_path: Path) -> None:
    Ledger(tmp_path, GopdConfig.load(None, KEYS)).close()
    Ledger(tmp_path, GopdConfig.load(None, [*KEYS, "rollout.workers=2", "trainer.ranks=2", "steps=9"])).close()
    with pytest.raises(ConfigError, match=r"learning_rate: 1e-05 -> 0.001; seed: 0 -> 4"):
        Ledger(tmp_path, GopdConfig.load(None, [*KEYS, "learning_rate=1e-3", "seed=4"]))


def test_old_resume_points_go_and_the_last_two_stay(tmp_path: Path) -> None:
    launch(tmp_path, every=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000006", "step_00000007"]


def test_describe_names_domains_and_age() -> None:
    trainer = FakeTrainer()
    trainer.steps = 2
    scored = FakeScorers().annotate(FakeSource(trainer).take(3, 0))
    facts = describe(scored, version=3)
    assert facts["age_max"] == 1.0 and facts["truncated"] == 0.0 and facts["response_tokens"] == 2.0
    assert facts["reward/b"] == pytest.approx((1 / 3 + 1) / 2) and facts["reward/a"] == pytest.approx(2 / 3)


def test_describe_has_a_reward_of_sampled_rows_also_where_nothing_judges_them() -> None:
    trainer = FakeTrainer()
    trainer.steps = 2
    scored = FakeScorers().annotate(FakeSource(trainer).take(3, 0))
    bare = Batch(scored.table.drop_columns("reward"))
    facts = describe(bare, version=3)
    assert facts["reward"] is None and not any(name.startswith("reward/") for name in facts)
    assert "reward" not in describe(Batch(bare.table.drop_columns("version_spans")), version=3), "rows that were not sampled have none"
