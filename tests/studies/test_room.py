"""How many runs go on at once: by GPUs where there are any, else by cores and memory, never none, never more than are left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysys.config.agents import SearchAgentConfig
from raysys.config.pretraining import PretrainMoeConfig
from raysys.config.quantising import QuantizeConfig
from raysys.config.runs import Run
from raysys.plan import estimate, this_machine
from raysys.studies import ablation, pretrain_moe, quantize, search_agent
from raysys.studies.room import Room, at_once

ROOT = Path(__file__).resolve().parents[2]
MUCH = float(1 << 50)
DATA = {"source": {"domains": {"rev": {"task": "spell_backward"}}}}


def planned(folder: Path, job: str, kind: type[Run], studies: Any, values: dict[str, Any], cells: str | None = None) -> ablation.Plan:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    (name,) = studies
    return ablation.plan(job, name, studies, kind, path, [], "0,1,2", folder / "runs", cells)


def bits(folder: Path, cells: str | None = None, **values: Any) -> ablation.Plan:
    told = {"model": "m", "calibration": DATA, "threads": 2} | values
    return planned(folder, "quantize", QuantizeConfig, quantize.STUDIES, told, cells)


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room(0, 2, MUCH), 1),
        (Room(0, 8, MUCH), 4),
        (Room(0, 9, MUCH), 4),
        (Room(0, 1, MUCH), 1),
        (Room(3, 64, MUCH), 3),
        (Room(0, 1000, MUCH), 84),
        (Room(1000, 4, MUCH), 84),
    ],
)
def test_quantisations_take_a_gpu_each_or_their_threads(tmp_path: Path, room: Room, expected: int) -> None:
    assert at_once(bits(tmp_path), room) == expected


def test_runs_that_are_to_stay_on_cpus_are_counted_by_cores(tmp_path: Path) -> None:
    assert at_once(bits(tmp_path, device="cpu"), Room(8, 6, MUCH)) == 3


def test_no_more_than_are_left(tmp_path: Path) -> None:
    assert at_once(bits(tmp_path, cells="rtn-2"), Room(0, 64, MUCH)) == 3


def test_memory_counts_too_where_a_plan_knows_it(tmp_path: Path) -> None:
    known = tmp_path / "m"
    known.mkdir()
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
    (known / "config.json").write_text(json.dumps({"model_type": "qwen3", "head_dim": 64, "num_key_value_heads": 4} | shape))
    plan = bits(tmp_path, model=str(known))
    (place,) = estimate(plan.runs[0].config, this_machine()).places
    assert at_once(plan, Room(0, 64, 3.5 * place.total)) == 3
    assert at_once(plan, Room(8, 64, 3.5 * place.total)) == 8, "on GPUs their own memory is what is short"


def test_agents_and_pretraining_ask_for_all_their_actors(tmp_path: Path) -> None:
    agents = planned(
        *(tmp_path, "search_agent", SearchAgentConfig, search_agent.STUDIES),
        {
            "student": "m",
            "data": DATA,
            "search": {"url": "http://127.0.0.1:8001"},
            "rollout": {"workers": "2..4", "tensor_parallel": 2, "threads": 1},
            "trainer": {"ranks": 2, "threads": 3},
        },
    )
    assert at_once(agents, Room(13, 64, MUCH)) == 2, "two engines of two GPUs and two ranks"
    assert (at_once(agents, Room(0, 27, MUCH)), at_once(agents, Room(0, 26, MUCH))) == (3, 2)
    path = ROOT / "jobs/configs/pretrain_moe/local.yaml"
    routers = ablation.plan("pretrain_moe", "router", pretrain_moe.STUDIES, PretrainMoeConfig, path, ["trainer.ranks=2..4"], "0", tmp_path)
    assert (at_once(routers, Room(5, 1, MUCH)), at_once(routers, Room(0, 8, MUCH))) == (2, 2)


def test_a_study_that_asks_for_nothing_in_particular_has_a_core_a_run(tmp_path: Path) -> None:
    plain = ablation.Study(title="t", cells={"one": {}}, columns=())
    assert plain.asks(None) == ablation.Asks(1, 1)


def test_this_machine_has_cores_and_memory() -> None:
    room = Room.of_machine()
    assert room.gpus == 0 and room.cores == os.cpu_count() and room.bytes == this_machine().bytes


def test_a_cluster_of_one_machine_counts_cores_and_one_of_more_what_nodes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    monkeypatch.setattr(ray, "nodes", lambda: [node(CPU=4096.0, memory=8.0)])
    assert Room.of_cluster() == Room(0, os.cpu_count() or 1, 8.0)
    monkeypatch.setattr(ray, "nodes", lambda: [node(CPU=16.0, GPU=4.0, memory=8.0), node(CPU=32.0, memory=4.0), node(False, GPU=8.0)])
    assert Room.of_cluster() == Room(4, 48, 12.0)
