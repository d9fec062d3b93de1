"""Configs: clear errors, identity apart from placement, cheap imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raysys.config.agents import SearchAgentConfig
from raysys.config.base import read_yaml, set_key
from raysys.config.jobs import CONFIGS
from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, HpdConfig, Run, SftConfig
from raysys.errors import ConfigError

MINIMAL = ["student=s", "teachers.default=t", "data.path=p.jsonl"]


def load(*overrides: str) -> GopdConfig:
    return GopdConfig.load(None, [*MINIMAL, *overrides])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stepz=3", "unknown key 'stepz', did you mean 'steps'"),
        ("rollout.worker=3", "unknown key 'rollout.worker', did you mean 'rollout.workers'"),
        ("steps=many", "steps: .*valid integer.*'many'"),
        ("reward_scale=1.25", "reward_scale=1.25 needs reference"),
        ("reward_scale=.nan", "reward_scale"),
        ("teachers={}", "teachers is empty"),
        ("evaluate_every=5", "evaluation is not"),
        ("data.source={domains: {a: {task: t}}}", "exactly one of data.path and data.source"),
        ("name=../up", "name"),
        ("nonsense", "not key=value"),
    ],
)
def test_bad_input_gets_one_clear_line(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        load(override)
    assert "\n" not in str(error.value)


def test_overrides_read_numbers_lists_and_null() -> None:
    config = load("learning_rate=1e-3", "trainer.betas=[0.9, 0.95]", "reference=null", "rollout.workers=2")
    assert (config.learning_rate, config.trainer.betas, config.reference, config.rollout.workers) == (1e-3, (0.9, 0.95), None, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1e-06", 1e-6), ("-2.5E+2", -250.0), (".5e1", 5.0), ("1.e3", 1000.0), ("7", 7), ("0.5", 0.5),
        ('"20240101"', "20240101"), ("'1e-3'", "1e-3"),
        ("nan", "nan"), ("infinity", "infinity"), ("1e", "1e"), ("e5", "e5"), ("v1e5", "v1e5"),
    ],
)  # fmt: skip
def test_what_an_override_is_read_as(text: str, value: object) -> None:
    values: dict[str, object] = {}
    set_key(values, f"key={text}")
    assert values["key"] == value and type(values["key"]) is type(value)


def test_identity_ignores_placement_only() -> None:
    same = load("rollout.workers=4", "trainer.zero_stage=3", "steps=999", "deadlines.train=5", "name=x")
    assert same.identity() == load().identity() and same.fingerprint() == load().fingerprint()
    assert load("seed=1").fingerprint() != load().fingerprint()
    falling = [SftConfig.load(None, ["data.path=p", "trainer.schedule=cosine", f"steps={steps}"]) for steps in (3, 4)]
    assert falling[0].identity() != falling[1].identity()
    keys = ["data.path=p", "trainer.schedule=cosine", "trainer.schedule_steps=9"]
    assert SftConfig.load(None, [*keys, "steps=3"]).identity() == SftConfig.load(None, [*keys, "steps=4"]).identity()


def test_yaml_round_trip_and_base_files(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("student: s\nteachers: {default: t}\ndata: {path: p}\ntrainer: {zero_stage: 2, clip: 0.5}\n")
    (tmp_path / "over.yaml").write_text("base: base.yaml\ntrainer: {clip: 0.25}\n")
    config = GopdConfig.load(tmp_path / "over.yaml")
    assert (config.trainer.zero_stage, config.trainer.clip) == (2, 0.25)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert GopdConfig.load(tmp_path / "again.yaml") == config


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        GopdConfig.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        GopdConfig.load(tmp_path / "broken.yaml")


def test_configs_import_no_engine() -> None:
    code = "import sys, raysys.config.runs; print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.workers=8..1", "the range ends below its beginning"),
        ("rollout.workers=many", "rollout.workers"),
        ("rollout.generate_only=true", "needs record=FOLDER"),
        ("colocate=true", None),
    ],
)
def test_placement_that_cannot_be_is_refused(override: str, told: str | None) -> None:
    keys = ["student=s", "teachers.default=t", "data.path=p", override]
    if told is None:
        assert GopdConfig.load(None, keys).colocate
        for more, message in (("max_age=1", "take turns"), ("rollout.workers=2", "set rollout.workers=1")):
            with pytest.raises(ConfigError, match=message):
                GopdConfig.load(None, [*keys, more])
    else:
        with pytest.raises(ConfigError, match=told):
            GopdConfig.load(None, keys)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teachers={}", "teachers is empty"),
        ("rollout.replay=folder", "this job writes its answers to data/"),
        ("data={source: {domains: {a: {task: t}}}}", "has no end: set rows"),
        ("keep=good", "keep: .*'all' or 'correct'"),
        ("student=s", "unknown key 'student'"),
    ],
)
def test_generations_that_cannot_be_are_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        GenerateConfig.load(None, ["teachers.default=t", "data.path=p", override])
    assert "\n" not in str(error.value)


def test_how_data_are_cut_is_part_of_them_and_who_answers_is_not() -> None:
    def identity(*overrides: str) -> dict:
        return GenerateConfig.load(None, ["teachers.default=t", "data.path=p", *overrides]).identity()

    assert identity("rollout.workers=4", "rollout.max_sequences=7", "deadlines.generate=5") == identity()
    assert all(identity(change) != identity() for change in ("shard_rows=9", "samples=2", "rows=7", "rollout.temperature=0.7"))


def test_a_range_of_workers_has_two_ends() -> None:
    config = GopdConfig.load(None, ["student=s", "teachers.default=t", "data.path=p", "rollout.workers=1..8"])
    assert (config.rollout.fewest, config.rollout.most) == (1, 8) and "rollout.workers" not in config.identity()


def test_where_the_learning_rate_falls_the_steps_are_part_of_what_is_learned() -> None:
    from raysys.config.pretraining import PretrainMoeConfig

    data = {"sources": {"all": {"path": "x"}}, "tokenizer": "t"}
    falling, level = ({"data": data, "optimiser": {"schedule": name}} for name in ("cosine", "constant"))
    assert PretrainMoeConfig.parse(falling).identity()["steps"] == 10_000
    assert "steps" not in PretrainMoeConfig.parse(level).identity()


MODELS = ["student=s", "teachers.default=t", "data.path=p"]
KEYS: dict[type[Run], list[str]] = {
    SftConfig: ["data.path=p"],
    HpdConfig: MODELS,
    SearchAgentConfig: ["student=s", "data.path=p", "search.corpus=c"],
    EvaluateConfig: ["models.a=m", "evaluation.data.path=p"],
    GopdConfig: MODELS,
}


@pytest.mark.parametrize("kind", [SftConfig, HpdConfig, SearchAgentConfig, EvaluateConfig])
def test_keys_that_a_job_does_not_read_are_refused(kind: type[Run]) -> None:
    for more in (["rollout.record=r"], ["rollout.replay=r"], ["rollout.record=r", "rollout.generate_only=true"]):
        with pytest.raises(ConfigError, match=r"are of jobs/gopd\.py"):
            kind.load(None, [*KEYS[kind], *more])
    for key in ("temperature", "top_p"):
        override = [*KEYS[kind], f"rollout.{key}=0.5"]
        if kind is SearchAgentConfig:
            kind.load(None, override)
        else:
            with pytest.raises(ConfigError, match=r"set evaluation\.temperature and evaluation\.top_p"):
                kind.load(None, override)


def test_turns_keep_their_prefix_unless_told_otherwise() -> None:
    def caches(*more: str) -> bool:
        return SearchAgentConfig.load(None, [*KEYS[SearchAgentConfig], *more]).rollout.prefix_caching

    assert caches() and caches("rollout.workers=2") and not caches("rollout.prefix_caching=false")
    assert not caches("rollout.kv_cache=keep"), "one of the two, and it was asked for"
    with pytest.raises(ConfigError, match="set one of them back"):
        caches("rollout.kv_cache=keep", "rollout.prefix_caching=true")


@pytest.mark.parametrize("kind", [SftConfig, SearchAgentConfig, GopdConfig])
def test_more_mini_batches_than_rows_are_refused(kind: type[Run]) -> None:
    samples = {SearchAgentConfig: 2, GopdConfig: 1}.get(kind)
    keys = [*KEYS[kind], "batch=4", *([f"samples={samples}"] if samples else [])]
    rows = 4 * (samples or 1)
    kind.load(None, [*keys, f"trainer.mini_batches={rows}"])
    with pytest.raises(ConfigError, match=rf"mini_batches={rows + 1} exceeds the {rows} responses of a step"):
        kind.load(None, [*keys, f"trainer.mini_batches={rows + 1}"])


@pytest.mark.parametrize("kind", [SftConfig, HpdConfig, SearchAgentConfig, GopdConfig])
def test_a_schedule_that_ends_before_the_run_is_refused(kind: type[Run]) -> None:
    keys = [*KEYS[kind], "steps=9", "trainer.schedule=linear"]
    kind.load(None, [*keys, "trainer.schedule_steps=9"])
    with pytest.raises(ConfigError, match="schedule_steps=8 is below steps=9"):
        kind.load(None, [*keys, "trainer.schedule_steps=8"])
    with pytest.raises(ConfigError, match="is of a learning rate that falls"):
        kind.load(None, [*KEYS[kind], "trainer.schedule_steps=1000"])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps", "12", "steps: Input should be a valid integer, not text, got '12'"),
        ("steps", True, "steps: Input should be a valid integer, got True"),
        ("seed", True, "seed: Input should be a valid integer, got True"),
        ("learning_rate", "0.1", "learning_rate: Input should be a valid number, not text, got '0.1'"),
        ("evaluate_every", True, "evaluate_every: Input should be a valid integer, got True"),
        ("colocate", "no", "colocate: Input should be a valid boolean, not text, got 'no'"),
        ("trainer", {"betas": [0.9, "0.95"]}, "trainer.betas: Input should be a valid number, not text"),
        ("rollout", {"workers": True}, "rollout.workers: Input should be a valid integer, got True"),
    ],
)
def test_text_and_truth_are_no_numbers(key: str, value: object, told: str) -> None:
    values: dict[str, object] = {"student": "s", "teachers": {"default": "t"}, "data": {"path": "p"}, key: value}
    with pytest.raises(ConfigError) as error:
        GopdConfig.parse(values)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("student: s\nteachers: {default: t}\ndata: {path: p}\nlearning_rate: 1e-6\n")
    config = GopdConfig.load(tmp_path / "run.yaml", ["steps=12", "rollout.workers=1..3", "importance_cap=1e-06", "clip_low=0"])
    assert (config.learning_rate, config.steps, config.rollout.workers, config.importance_cap) == (1e-6, 12, "1..3", 1e-6)
    with pytest.raises(ConfigError, match="steps: Input should be a valid integer, got True"):
        load("steps=true")


ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "jobs" / "configs").glob("*/*.yaml") if path.stem not in ("common", "served"))
"""Without those that others complete."""
OF_OTHER_JOBS = {"table": "evaluate", "warm": "sft"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_load(path: Path) -> None:
    CONFIGS["pipeline" if "stages" in read_yaml(path) else OF_OTHER_JOBS.get(path.stem, path.parent.name)].load(path)


@pytest.mark.parametrize("job", [job for job in CONFIGS if job != "pipeline"])
def test_each_job_has_a_config_for_here_and_one_of_its_paper(job: str) -> None:
    """A pipeline is a list of other jobs' configs and lies beside the first of them."""
    for name in ("local", "paper"):
        CONFIGS[job].load(ROOT / "jobs" / "configs" / job / f"{name}.yaml")
