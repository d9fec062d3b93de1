"""Distillation on data with real DeepSpeed and Ray: it learns, and killed in the middle of an epoch it goes on exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raysys.compare import differences
from raysys.config.runs import NewModel
from raysys.head import Head
from raysys.models.scratch import new_causal
from tests.e2e.test_gopd import SMALL, Workplace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
ROWS, BATCH, STEPS = 50, 8, 16


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("hpd"), ray_head)
    for number, name in enumerate(("student", "teacher")):
        new_causal(NewModel(**SMALL, tied=bool(number)), place.folder / name, seed=number)
    rows = [{"id": f"r{row}", "prompt": f"{row:02d}+", "answer": "abcdefghij"[: 1 + row % 10], "domain": "add"} for row in range(ROWS)]
    rows += [
        {"id": "empty", "prompt": "1+", "answer": "", "domain": "add"},
        {"id": "long", "prompt": "2+", "answer": "x" * 40, "domain": "add"},
    ]
    (place.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config(place: Workplace, **more: Any) -> dict[str, Any]:
    return {
        "student": str(place.folder / "student"),
        "teachers": {"add": str(place.folder / "teacher")},
        "data": {"path": str(place.folder / "data.jsonl"), "max_bad_share": 0.5},
        "steps": STEPS,
        "batch": BATCH,
        "max_prompt_tokens": 16,
        "max_response_tokens": 14,
        "learning_rate": 3e-3,
        "trainer": {"zero_stage": 1, "micro_batch_tokens": 64, "threads": 1},
        "checkpoint_every": 2,
        "restarts": 0,
    } | more


def test_killed_in_the_middle_of_an_epoch_it_goes_on_exactly(place: Workplace) -> None:
    """50 usable rows and batches of 8: the second epoch begins inside a batch, and its draws are others than the first's.

    Where the scorer lives changes nothing: it moves to the trainer's place on the way.
    """
    calm = place.run("hpd", "calm", config(place))
    run = place.start("hpd", "killed", config(place))
    place.await_lines(run, "killed", 9)
    run.kill()
    run.wait()
    killed = place.run("hpd", "killed", config(place), "scoring.placement=colocated")
    assert not list(differences(calm, killed))
    steps = place.metrics("calm")
    assert [step["step"] for step in steps] == list(range(STEPS)) and place.metrics("killed") == steps
    for file in sorted((calm / "export").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "export" / file.name).read_bytes()
    ids = [one for line in (calm / "ledger" / "steps.jsonl").read_text().splitlines() for one in json.loads(line)["ids"]]
    assert len(ids) == len(set(ids)) == STEPS * BATCH and {one.partition("@")[2][0] for one in ids} == {"0", "1", "2"}
    assert {"k_min", "reinforced", "suppressed", "sampled_other", "entropy", "nll", "forward_kl_data", "reverse_kl_draws"} <= steps[
        0
    ].keys()
    first, last = (sum(step["nll"] for step in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last != first
    log = (place.folder / "calm.log").read_text()
    assert "answer too long" in log and "no `answer` to learn" in log, "rows over the limits are counted, never cut"
    assert "all but rules out" in log or max(step["teacher_doubts"] for step in steps) < 1e-2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("teachers={math: TEACHER}", "unknown domain tag 'add'"),
        ("loss=akl", "loss"),
        ("scoring={placement: colocated, ranks: 2}", "set scoring.ranks=1"),
        ("trainer.mini_batches=2", "the weights are those of the step's own student"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_actor(place: Workplace, override: str, told: str) -> None:
    name = f"wrong-{override.partition('=')[0]}"
    driver = place.start("hpd", name, config(place), override.replace("TEACHER", str(place.folder / "teacher")))
    assert driver.wait(timeout=120) in (1, 2)
    lines = [line for line in (place.folder / f"{name}.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]
