"""A model through the whole job under Ray: scored, quantised, exported, measured; killed and resumed it is the same file."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from raysys.config.runs import NewModel
from raysys.head import Head
from raysys.models.scratch import new_causal
from tests.e2e.test_gopd import ADD, REV, Workplace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
MODEL = {"hidden_size": 64, "layers": 12, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn_size": 128, "context": 64}


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"), ray_head)


@pytest.fixture(scope="module")
def config(place: Workplace) -> dict[str, Any]:
    model = new_causal(NewModel(**MODEL), place.folder / "model", seed=0)
    tasks = {"domains": {"add": ADD, "rev": REV}}
    return {
        "model": str(model),
        "method": "d2quant",
        "group_size": 64,
        "d2quant": {"iterations": 2, "correction": True},
        "calibration": {"source": tasks, "samples": 16, "length": 24},
        "evaluation": {"source": {"split": "report", **tasks}, "samples": 16, "length": 24},
        "threads": 1,
    }


def await_layers(place: Workplace, run: subprocess.Popen[bytes], name: str, count: int) -> None:
    end = time.monotonic() + 240
    while len(list((place.folder / name / "ledger" / "layers").glob("*.json"))) < count:
        assert run.poll() is None, (place.folder / f"{name}.log").read_text()[-3000:]
        assert time.monotonic() < end, f"no {count} layers in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def calm(place: Workplace, config: dict[str, Any]) -> Path:
    return place.run("quantize", "calm", config)


def test_layers_are_scored_quantised_measured_and_shown(place: Workplace, calm: Path) -> None:
    assert [line["step"] for line in place.metrics("calm")] == list(range(12))
    layers = json.loads((calm / "layer_map.json").read_text())
    assert sorted(layers["bits"]) == [2] * 6 + [4] * 6 and len(layers["series"]["up/nv"]) == 12
    evaluated = {one["label"]: one["measures"] for one in map(json.loads, (calm / "evaluation.jsonl").read_text().splitlines())}
    assert set(evaluated) == {"full precision", "quantised", "quantised, with its correction"}
    assert 3 < evaluated["quantised"]["bits_per_weight"] < 4 and evaluated["full precision"]["bits_per_weight"] == 32
    assert not (calm / "dequantised").exists() and not (calm / "states").exists() and (calm / "corrections.safetensors").is_file()
    report = (calm / "report.html").read_text()
    assert "12 layers: 6 of 2 bits, 6 of 4 bits" in report and "<h2>Layers" in report


@pytest.mark.long
def test_killed_and_resumed_it_is_the_same_file(place: Workplace, config: dict[str, Any], calm: Path) -> None:
    run = place.start("quantize", "killed", config)
    await_layers(place, run, "killed", 2)
    run.kill()
    run.wait()
    run = place.start("quantize", "killed", config)
    assert run.wait(timeout=300) == 0, (place.folder / "killed.log").read_text()[-3000:]
    done = re.search(r"resumed: (\d+) of 12 layers are finished", (place.folder / "killed.log").read_text())
    assert done is not None and 2 <= int(done[1]) < 12, "it was killed in the middle; the actor may finish a layer after its driver's end"
    files = {path.name: path.read_bytes() for path in (calm / "export").iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in (place.folder / "killed" / "export").iterdir() if path.is_file()}
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in place.metrics(name)] for name in ("calm", "killed")]
    assert lines[0] == lines[1]


def test_four_bits_are_loaded_and_served_as_their_users_do_it(place: Workplace, config: dict[str, Any]) -> None:
    """E7: stock transformers, and stock vLLM, whose CPU kernel has this width only and computes in bfloat16."""
    wide = new_causal(NewModel(**MODEL | {"hidden_size": 128, "layers": 2}), place.folder / "wide", seed=0)
    rounded = {"model": str(wide), "method": "rtn", "d2quant": {}, "calibration": None, "evaluation": None}
    place.run("quantize", "served", config | rounded | {"bits": 4, "allocation": "uniform", "check_export": True})
    told = (place.folder / "served.log").read_text()
    assert "export/ loads in transformers with compressed-tensors; logits of what its codes stand for, to 0 of the largest" in told
    found = re.search(r"export/ is served by vLLM; log-probs of what its codes stand for, to (\S+) nats in the mean", told)
    assert float(found[1]) < 0.05 if found else "is not served by vLLM here: its CPU kernel needs AVX-512" in told
