"""Pretraining under real Ray Train, Ray Data and DeepSpeed: a killed worker costs nothing, other ranks go on with the same samples."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raysys.data.local_text import train_tokenizer
from raysys.head import Head
from tests.e2e.test_gopd import Workplace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
STEPS = 12
TIMES = {"tokens_per_second"}


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("pretrain"), ray_head)
    rng = np.random.default_rng(0)
    words = ["the", "router", "follows", "its", "expert", "and", "a", "token", "finds", "one", "of", "sixteen"]
    for name, count in (("books", 160), ("notes", 60)):
        texts = [" ".join(rng.choice(words, rng.integers(5, 60))) for _ in range(count)]
        (place.folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([place.folder / "books.jsonl"], 300, place.folder / "tokenizer")
    return place


def config(place: Workplace, **more: Any) -> dict[str, Any]:
    return {
        "model": {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "experts": 4, "top_k": 2, "expert_width": 24, "deviation": 0.1},
        "router": {"scale": 1.5},
        "data": {
            "sources": {
                "books": {"path": str(place.folder / "books.jsonl"), "weight": 2},
                "notes": {"path": str(place.folder / "notes.jsonl")},
            },
            "tokenizer": str(place.folder / "tokenizer"),
            "sequence": 32,
            "unit_bytes": 4096,
            "held_out_share": 0.2,
            "cache": str(place.folder / "tokens"),
        },
        "steps": STEPS,
        "batch": 6,
        "accumulation": 2,
        "optimiser": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "trainer": {"ranks": 2, "zero_stage": 1, "threads": 1},
        "validation": {"sequences": 6},
        "watch_every": 4,
        "checkpoint_every": 3,
        "restarts": 0,
    } | more


def steps_of(place: Workplace, name: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in step.items() if key not in TIMES} for step in place.metrics(name)]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def calm(place: Workplace) -> Path:
    """Two ranks that nobody disturbs."""
    return place.run("pretrain_moe", "calm", config(place))


def test_it_learns_and_another_rank_count_goes_on(place: Workplace, calm: Path) -> None:
    steps = steps_of(place, "calm")
    assert [step["step"] for step in steps] == list(range(STEPS))
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["validation_loss"] < steps[0]["loss"]
    looks = [json.loads(line) for line in (calm / "routers.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [3, 7, 11] and len(looks[0]["load"]) == 2 and len(looks[0]["load"][0]) == 4

    fewer = place.folder / "fewer"
    shutil.copytree(calm, fewer)
    for point in sorted((fewer / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(point)
    (fewer / "ledger" / "finished.json").unlink()
    place.run("pretrain_moe", "fewer", config(place), "trainer={ranks: 1, zero_stage: 0, threads: 1}")
    assert [step["ranks"] for step in steps_of(place, "fewer")] == [2] * 9 + [1] * (STEPS - 9), "from the older of two resume points on"
    for found, wanted in zip(steps_of(place, "fewer"), steps, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4), "one rank goes on where two were"
    whole = tensors(calm)
    for name, tensor in tensors(place.folder / "fewer").items():
        np.testing.assert_allclose(tensor, whole[name], atol=1e-4, err_msg=name)


def same_as_calm(place: Workplace, name: str) -> None:
    assert steps_of(place, name) == steps_of(place, "calm"), "resumed at the right sample, bit by bit"
    before, after = tensors(place.folder / "calm"), tensors(place.folder / name)
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)


@pytest.mark.long
def test_a_killed_worker_costs_nothing(place: Workplace, calm: Path) -> None:
    run = place.start("pretrain_moe", "killed", config(place))
    place.await_lines(run, "killed", 7)
    place.processes("RayTrainWorker")[-1].kill()
    assert run.wait(timeout=240) == 0, (place.folder / "killed.log").read_text()[-3000:]
    same_as_calm(place, "killed")


@pytest.mark.long
def test_a_killed_driver_costs_nothing_nor_does_a_killed_supervisor(place: Workplace, calm: Path) -> None:
    """The driver comes back by itself, with its supervisor it takes the same command again; resume points are not in the run's folder."""
    log = place.folder / "orphan.log"
    run = place.start("pretrain_moe", "orphan", orphan := config(place, restarts=2, storage=f"file://{place.folder}/points"))
    place.await_lines(run, "orphan", 5)
    (driver,) = psutil.Process(run.pid).children()
    driver.kill()
    while "resuming" not in log.read_text():
        assert run.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    (driver,) = psutil.Process(run.pid).children()
    run.kill()
    assert run.wait(timeout=30) == -signal.SIGKILL
    driver.wait(timeout=30)
    assert place.start("pretrain_moe", "orphan", orphan).wait(timeout=240) == 0, log.read_text()[-3000:]
    assert log.read_text().count("goes on from its newest resume point") == 1 and log.read_text().count("resuming") == 2
    assert not list((place.folder / "orphan" / "checkpoints").iterdir())
    assert max(path.name for path in (place.folder / "points" / "orphan").glob("step_*")) == f"step_{STEPS:08d}"
    same_as_calm(place, "orphan")


def test_the_export_is_a_stock_model(calm: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = calm / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the router follows its expert", return_tensors="pt").input_ids
    loss = model(ids, labels=ids).loss.item()
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and loss < 0.9 * np.log(300)


def test_a_router_that_no_stock_model_has_is_trained_to_the_end(place: Workplace) -> None:
    run = place.run("pretrain_moe", "sigmoid", config(place, steps=2), "router.gate=sigmoid")
    steps, told = steps_of(place, "sigmoid"), (place.folder / "sigmoid.log").read_text()
    assert len(steps) == 2 and steps[-1]["validation_loss"] > 0
    assert (run / "checkpoints" / "step_00000002" / "manifest.json").is_file() and (run / "ledger" / "finished.json").is_file()
    assert (run / "report.html").is_file() and not any((run / "export").iterdir())
    assert told.count("router.gate=sigmoid: stock Qwen3-MoE") == 2 and f"weights: {run}/checkpoints/step_00000002" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.top_k=5", "top_k=5 exceeds experts=4"),
        ("model.width=33", "width=33 is no multiple of heads=2"),
        ("model.vocabulary=100", "model.vocabulary=100 is smaller than the tokenizer"),
        ("trainer={ranks: 2, zero_stage: 3, expert_parallel: 2}", "expert_parallel"),
        ("trainer={ranks: 2, expert_parallel: 3}", "expert_parallel"),
        ("start=FOLDER/tokenizer", "tokenizer has no config.json (give a Hugging Face folder of a Qwen3-MoE model)"),
        ("data.sources.books.path=FOLDER/gone.jsonl", "gone.jsonl does not exist"),
        ("optimiser.kind=lion", "optimiser.kind"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_actor(place: Workplace, override: str, told: str) -> None:
    from raysys.checks import check_pretrain_moe
    from raysys.config.pretraining import PretrainMoeConfig
    from raysys.errors import RaysysError

    values = json.loads(json.dumps(config(place)))
    path = place.folder / "wrong.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(RaysysError) as caught:
        check_pretrain_moe(PretrainMoeConfig.load(path, [override.replace("FOLDER", str(place.folder))]))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_other_data_under_the_same_name_are_refused(place: Workplace, calm: Path) -> None:
    lines = (place.folder / "books.jsonl").read_text().splitlines()
    (place.folder / "books.jsonl").write_text("\n".join(lines[1:]) + "\n")
    run = place.start("pretrain_moe", "calm", config(place), f"steps={STEPS + 1}")
    assert run.wait(timeout=120) == 1
    told = [line for line in (place.folder / "calm.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "data are not those that it was started with" in told[0]
