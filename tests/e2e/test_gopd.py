"""The main job with real vLLM, DeepSpeed and Ray: it learns, routes, survives kill -9, and what it exports loads elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raysys.config.runs import NewModel
from raysys.head import Head
from raysys.models.scratch import new_causal
from tests.processes import below

ROOT = Path(__file__).resolve().parents[2]
ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
REV = {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}, "style": "scratchpad"}
SMALL = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn_size": 192, "context": 64}

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Workplace:
    """A folder of runs and the Ray head that they share."""

    def __init__(self, folder: Path, head: Head):
        self.folder, self.head = folder, head
        self.env = head.env | {"RAYSYS_RUNS_DIR": str(folder), "PYTHONPATH": str(ROOT)}

    def start(self, job: str, name: str, config: dict[str, Any], *overrides: str) -> subprocess.Popen[bytes]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--config", str(path), f"name={name}", *overrides]
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115  the child keeps it
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=log, cwd=self.folder)

    def run(self, job: str, name: str, config: dict[str, Any], *overrides: str) -> Path:
        code = self.start(job, name, config, *overrides).wait(timeout=360)
        assert code == 0, f"{job} {name} ended with {code}:\n{(self.folder / f'{name}.log').read_text()[-3000:]}"
        return self.folder / name

    def reach(self, name: str, config: dict[str, Any], lines: int) -> subprocess.Popen[bytes]:
        """Starts a distillation and returns when its metrics have so many lines."""
        run = self.start("gopd", name, config)
        self.await_lines(run, name, lines)
        return run

    def await_lines(self, run: subprocess.Popen[bytes], name: str, lines: int) -> None:
        end = time.monotonic() + 240
        while len(self.metrics(name)) < lines:
            assert run.poll() is None, (
                f"the run ended with {run.returncode} before line {lines}:\n{(self.folder / f'{name}.log').read_text()[-3000:]}"
            )
            assert time.monotonic() < end, f"the run did not get to line {lines} in time"
            time.sleep(0.02)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of that name under this head."""
        return below(psutil.Process(self.head.pid), name)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [
            {key: value for key, value in json.loads(line).items() if key not in ("seconds", "recovered")}
            for line in lines
            if line.endswith("}")
        ]


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"), ray_head)


def sft(tied: bool, domains: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "new_model": SMALL | {"tied": tied},
        "data": {"source": {"domains": domains}},
        "batch": 128,
        "max_prompt_tokens": 16,
        "max_response_tokens": 14,
        "learning_rate": 4e-3,
        "trainer": {"betas": [0.9, 0.95], "zero_stage": 0, "warmup_steps": 5},
    } | more


def gopd(student: Path, teachers: dict[str, Path], domains: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "student": str(student / "export"),
        "teachers": {tag: str(folder / "export") for tag, folder in teachers.items()},
        "data": {"source": {"domains": domains}},
        "batch": 128,
        "max_prompt_tokens": 16,
        "max_response_tokens": 14,
        "learning_rate": 1e-3,
        "trainer": {"betas": [0.9, 0.95], "zero_stage": 1, "warmup_steps": 5},
    } | more


@pytest.fixture(scope="module")
def base(place: Workplace) -> Path:
    """An untied student that knows a little of words."""
    return place.run("sft", "base", sft(False, {"rev": REV}, steps=100))


@pytest.fixture(scope="module")
def teacher(place: Workplace, base: Path) -> Path:
    return place.run("sft", "teacher", sft(False, {"rev": REV}, steps=300, student=str(base / "export"), seed=1))


@pytest.fixture(scope="module")
def tied(place: Workplace) -> Path:
    """A model with tied embeddings, hardly trained: enough to be a student and two teachers of the routing test."""
    return place.run("sft", "tied", sft(True, {"add": ADD, "rev": REV}, steps=5))


@pytest.fixture(scope="module")
def other(place: Workplace) -> Path:
    """A teacher unlike the student: of one that is the student, gradients are nothing but rounding, which Adam scales up."""
    new_causal(NewModel(**SMALL, tied=True), place.folder / "other" / "export", seed=3)
    return place.folder / "other"


@pytest.fixture(scope="module")
def two_teachers(tied: Path, other: Path) -> dict[str, Any]:
    """Two teachers, tied embeddings, ExOPD."""
    config = gopd(tied, {"add": tied, "rev": other}, {"add": ADD, "rev": REV}, reward_scale=1.25, reference=str(tied / "export"))
    return config | {"steps": 24, "checkpoint_every": 2, "batch": 32}


@pytest.fixture(scope="module")
def calm(place: Workplace, two_teachers: dict[str, Any]) -> Path:
    """A run that nobody disturbs; a colocated one: where engine and trainer live changes nothing."""
    return place.run("gopd", "calm", two_teachers, "colocate=true")


def test_the_student_moves_towards_its_teacher(place: Workplace, base: Path, teacher: Path) -> None:
    held_out = {"rows": 32, "data": {"source": {"split": "choose", "domains": {"rev": REV}}}}
    run = place.run("gopd", "learn", gopd(base, {"rev": teacher}, {"rev": REV}, steps=60, evaluation=held_out))
    steps = place.metrics("learn")
    assert len(steps) == 60
    first, last = (sum(step["reverse_kl"] for step in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last < 0.9 * first, f"reverse KL per token went from {first:.3f} to {last:.3f}"
    assert max(step["parity_gap"] for step in steps) < 1e-4
    assert all(step["age_max"] == 0 and step["version"] == step["step"] + 1 for step in steps)
    assert len({step["fingerprint"] for step in steps}) == 60
    labels = [json.loads(line)["label"] for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert labels == ["before", "after"]
    report = (run / "report.html").read_text()
    assert "<h1>learn</h1>" in report and "Reverse KL to the teacher" in report and 'src="' not in report.partition("<body>")[2]


STOCK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=40, kv_cache_memory_bytes=1 << 26)
    outputs = llm.generate(json.loads(sys.argv[2]), SamplingParams(temperature=0.0, max_tokens=14))
    print("ANSWERS " + json.dumps([output.outputs[0].text for output in outputs]))
"""


def test_the_export_gives_the_same_answers_in_stock_transformers_and_stock_vllm(place: Workplace, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = str(place.folder / "learn" / "export")
    prompts = ["stone<", "wall<", "river<", "abc<"]
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export, dtype="float32")
    mine = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, max_new_tokens=14, do_sample=False)[0, ids.shape[1] :]
        mine.append(tokenizer.decode(out, skip_special_tokens=True))
    script = tmp_path / "stock.py"
    script.write_text(STOCK_VLLM)
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), export, json.dumps(prompts)], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert answers, done.stderr[-2000:]
    assert json.loads(answers[0].removeprefix("ANSWERS ")) == mine


@pytest.mark.long
def test_kill_nine_of_anything_changes_nothing(place: Workplace, two_teachers: dict[str, Any], calm: Path) -> None:
    """All of the run is killed at once, then one part after another, and it goes on by itself."""
    run = place.reach("killed", two_teachers, 3)
    run.kill()  # the supervisor, and with it the driver
    run.wait()
    run = place.reach("killed", two_teachers, 7)
    (driver,) = [child for child in psutil.Process(run.pid).children() if "gopd.py" in " ".join(child.cmdline())]
    time.sleep(0.1)
    driver.kill()
    for step, parts in ((11, ("EngineCore", "ray::ScorerWorker")), (15, ("ray::RolloutWorker",)), (19, ("ray::TrainerWorker",))):
        place.await_lines(run, "killed", step)
        for part in parts:
            (victim,) = place.processes(part)
            victim.kill()
    assert run.wait(timeout=300) == 0
    log = (place.folder / "killed.log").read_text()
    assert place.metrics("killed") == place.metrics("calm") and len(place.metrics("calm")) == 24, log[-3000:]
    for file in sorted((calm / "export").glob("*.safetensors")):
        assert file.read_bytes() == (place.folder / "killed" / "export" / file.name).read_bytes()
    for told in (
        "resumed at step",
        "the run was killed by SIGKILL",
        "scorer 0 died",
        "is lost: rollout worker",
        "the run lost a part of the cluster",
    ):
        assert told in log
    assert max(step["parity_gap"] for step in place.metrics("calm")) < 1e-4


@pytest.mark.long
def test_another_layout_on_recorded_rollouts_trains_the_same(place: Workplace, tied: Path, other: Path) -> None:
    """Two engines and one trainer rank record; two ranks and no engine train on that; asynchronous, so that ages are in it."""
    from raysys.compare import differences

    config = gopd(tied, {"rev": other}, {"rev": REV}, steps=6)
    config |= {"batch": 32, "max_age": 2, "checkpoint_every": 3}
    recorded = place.folder / "recording"
    live = place.run("gopd", "live", config | {"rollout": {"record": str(recorded), "workers": 2}})
    steps = place.metrics("live")
    assert len(steps) == 6 and max(step["age_max"] for step in steps) >= 1 and all(step["age_max"] <= 2 for step in steps)
    ids = [one for line in (live / "ledger" / "steps.jsonl").read_text().splitlines() for one in json.loads(line)["ids"]]
    assert len(ids) == len(set(ids)) == 6 * 32
    config["trainer"] = config["trainer"] | {"ranks": 2}
    replayed = place.run("gopd", "replayed", config | {"rollout": {"replay": str(recorded)}})
    assert not list(differences(live, replayed, 1e-5))
    assert not (replayed / "rollout-0.log").exists(), "no engine was started"


def test_the_routed_teacher_is_the_one_that_scored(place: Workplace, calm: Path) -> None:
    """The first step's KL to a teacher that is the student itself is 0; the other domain's is not."""
    steps = place.metrics("calm")
    assert len(steps) == 24 and max(step["parity_gap"] for step in steps) < 1e-4
    assert abs(steps[0]["reverse_kl/add"]) < 1e-5 < steps[0]["reverse_kl/rev"]


def test_models_of_one_architecture_are_evaluated_by_the_same_engine(place: Workplace, base: Path, teacher: Path) -> None:
    """Weights that were pushed into it answer as those that it began with."""
    task = {"evaluation": {"rows": 16, "data": {"source": {"split": "choose", "domains": {"rev": REV}}}}}
    models = {"first": str(teacher / "export"), "second": str(base / "export"), "third": str(teacher / "export")}
    found = by_label(place.run("evaluate", "table", task | {"max_prompt_tokens": 16, "max_response_tokens": 14, "models": models}))
    assert list(found) == ["first", "second", "third"]
    assert found["third"] == found["first"] != found["second"]
    assert (place.folder / "table.log").read_text().count("is up after") == 1


def by_label(folder: Path) -> dict[str, list[Any]]:
    """What was measured, and examples of responses with their scores."""
    found: dict[str, list[Any]] = {}
    for name, keys in (("evaluation", ("domains",)), ("samples", ("prompt", "response", "score"))):
        for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()):
            found.setdefault(row["label"], []).append([row[key] for key in keys])
    return found


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("device=gpu", "the run needs 3 GPUs, the cluster has 0"),
        ("max_response_tokens=999", "together exceed the 64 tokens"),
        ("teachers={math: /nowhere}", "model folder /nowhere does not exist"),
        ("data.source.domains.rev.task=no_such_task", "no_such_task"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_actor(place: Workplace, tied: Path, override: str, told: str) -> None:
    name = f"wrong-{override.partition('=')[0]}"
    driver = place.start("gopd", name, gopd(tied, {"rev": tied}, {"rev": REV}, steps=1), override)
    assert driver.wait(timeout=120) == 2
    lines = [line for line in (place.folder / f"{name}.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]


def test_a_finished_run_prints_its_report_and_leaves(place: Workplace, tied: Path) -> None:
    before = (tied / "metrics.jsonl").read_bytes()
    driver = place.start("sft", "tied", sft(True, {"add": ADD, "rev": REV}, steps=5))
    assert driver.wait(timeout=120) == 0
    assert "finished already; report:" in (place.folder / "tied.log").read_text() and (tied / "metrics.jsonl").read_bytes() == before


def test_another_identity_in_the_same_folder_is_refused(place: Workplace, tied: Path) -> None:
    driver = place.start("sft", "tied", sft(True, {"add": ADD, "rev": REV}, steps=5, learning_rate=1e-5))
    assert driver.wait(timeout=120) == 2
    assert "learning_rate: 0.004 -> 1e-05" in (place.folder / "tied.log").read_text()
