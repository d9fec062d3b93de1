"""Seeds of samples, stop ids of model folders, arguments of engines: no engine needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raysys.config.parts import Rollout
from raysys.errors import ConfigError
from raysys.rollout.engine import contents, engine_arguments, environment, stop_ids
from raysys.rollout.spec import RolloutSpec, Sampling


def spec(device: str = "cpu", **config) -> RolloutSpec:
    return RolloutSpec(model="m", device=device, dtype="float32", max_model_len=4096, config=Rollout(**config))


def test_a_seed_depends_on_run_prompt_and_sample_only():
    one = Sampling(max_tokens=4, seed=1)
    seeds = {one.seed_of("a@0", 0), one.seed_of("a@0", 1), one.seed_of("b@0", 0), Sampling(max_tokens=4, seed=2).seed_of("a@0", 0)}
    assert len(seeds) == 4 and all(0 <= seed < 2**48 for seed in seeds)
    assert (
        Sampling(max_tokens=9, seed=1, temperature=0.5).seed_of("a@0", 0) == one.seed_of("a@0", 0) == 10269205916655
    )  # a resumed run draws the same
    assert one.seed_of("a", 11) != one.seed_of("a/1", 1)


@pytest.mark.parametrize(("generation", "config", "expected"), [(7, 3, [7]), ([7, 8], 3, [7, 8]), (None, 3, [3])])
def test_stop_ids_come_from_the_generation_config_first(tmp_path: Path, generation, config, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({} if generation is None else {"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert stop_ids(str(tmp_path)) == expected


def test_a_folder_without_stop_ids_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no eos_token_id"):
        stop_ids(str(tmp_path))


def test_weights_of_one_architecture_are_told_apart_and_copies_are_not(tmp_path: Path):
    whole = np.random.default_rng(0).bytes(300_000)
    changed = {place: whole[:place] + bytes(3000) + whole[place + 3000 :] for place in (0, 150_000, 297_000)}
    for name, data in {
        "one": whole,
        "copy": whole,
        "longer": whole + b"0",
        **{str(place): data for place, data in changed.items()},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    assert contents(str(tmp_path / "one")) == contents(str(tmp_path / "copy")) != ""
    assert len({contents(str(folder)) for folder in tmp_path.iterdir()}) == 5
    assert contents(str(tmp_path)) == ""


def test_arguments_follow_the_device():
    cpu, gpu = engine_arguments(spec(threads=3)), engine_arguments(spec("gpu", tensor_parallel=2))
    assert cpu["enforce_eager"] and not cpu["enable_chunked_prefill"] and cpu["max_num_batched_tokens"] == 4096
    assert cpu["kv_cache_memory_bytes"] == 64 << 20 and "gpu_memory_utilization" not in cpu
    assert not gpu["enforce_eager"] and gpu["tensor_parallel_size"] == 2 and gpu["gpu_memory_utilization"] == 0.85
    assert environment(spec(threads=3))["OMP_NUM_THREADS"] == "3" and "OMP_NUM_THREADS" not in environment(spec("gpu"))
    with pytest.raises(ConfigError, match="tensor_parallel=2 needs GPUs"):
        engine_arguments(spec(tensor_parallel=2))


def test_the_driver_side_imports_no_engine():
    code = "import sys, raysys.rollout.source, raysys.rollout.worker; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
