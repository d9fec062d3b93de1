"""`raysys plan` and `raysys doctor`: the numbers behind the tables, by hand and against real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysys import cli, doctor, plan, plan_quantising
from raysys.config.parts import Rollout, Scoring, Trainer
from raysys.config.runs import GopdConfig, NewModel
from raysys.errors import ConfigError
from raysys.methods import logprobs_blocks
from raysys.models.shape import Shape, new_shape, shape_of

CONFIGS = Path(__file__).resolve().parent.parent / "jobs" / "configs"
GPU = plan.Device("gpu", 80.0 * plan.GIB)


def shape(parameters: int = 1_000_000, **changes: Any) -> Shape:
    values: dict[str, Any] = {
        "active_parameters": parameters,
        "largest_module": 1000,
        "vocabulary": 100,
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn": 128,
    }
    return Shape(label="x", source="x", parameters=parameters, **(values | changes))


# -- shapes


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_those_of_the_real_model(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    from raysys.models.scratch import new_causal

    spec = NewModel(hidden_size=64, layers=3, heads=2, kv_heads=1, ffn_size=96, tied=tied)
    folder = new_causal(spec, tmp_path / "model", seed=0)
    real = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert shape_of(str(folder)).parameters == new_shape(spec).parameters == real
    # by hand: one layer's projections, norms (two of the layer, two of the heads), then embeddings and the last norm
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64 + 2 * 32
    assert real == 3 * layer + 98 * 64 * (1 if tied else 2) + 64


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30_532_122_624),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_published_models_have_their_published_size(model: str, parameters: int) -> None:
    assert shape_of(model).parameters == parameters


def test_a_damaged_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 25')
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: .*copy it again"):
        shape_of(str(tmp_path))


def test_experts_count_only_where_a_token_passes() -> None:
    found = shape_of("Qwen/Qwen3-30B-A3B")
    assert found.ffn == 8 * 768
    assert 3.0e9 < found.active_parameters < 3.4e9
    assert found.parameters - found.active_parameters == 48 * 120 * 3 * 2048 * 768 + 151936 * 2048


# -- memory


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "expected"),
    [
        (0, 4, "bfloat16", (2.0, 6.0, 3.0)),  # runs on stage 1
        (1, 4, "bfloat16", (2.0, 6.0, 3.0)),
        (2, 4, "bfloat16", (2.0, 1.0 + 8.0, 3.0)),
        (3, 4, "bfloat16", (0.5, 1.0 + 8.0, 3.0)),
        (0, 2, "float32", (4.0, 4.0, 8.0)),
        (1, 2, "float32", (4.0, 4.0, 6.0)),
        (3, 2, "float32", (2.0, 2.0 + 8.0, 6.0)),
    ],
)
def test_zero_stages_by_hand(stage: int, ranks: int, dtype: str, expected: tuple[float, float, float]) -> None:
    trainer = Trainer.parse({"zero_stage": stage, "ranks": ranks, "dtype": dtype})
    parts = plan.trainer_place(trainer, shape(), 1 << 20, GPU).parts
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == tuple(1e6 * each for each in expected)
    assert (parts["gathered"] > 0) == (stage == 3)


def test_offload_and_checkpointing_free_what_they_say() -> None:
    plain = plan.trainer_place(Trainer(), shape(), 1 << 20, GPU)
    offloaded = plan.trainer_place(Trainer(offload_optimizer=True), shape(), 1 << 20, GPU)
    assert plain.parts["optimiser"] == 12e6 and offloaded.parts["optimiser"] == 0
    assert (plain.parts["gradients"], offloaded.parts["gradients"]) == (6e6, 4e6 + 8e6), "stage 1: whole ones, and two buckets"
    assert offloaded.parts["gathered"] == 2 * shape().largest_module and "host memory: 17.2 MiB" in offloaded.notes[1]
    split = plan.trainer_place(Trainer(offload_optimizer=True, zero_stage=2, ranks=4), shape(2_000_000_000), 1 << 20, GPU)
    assert split.parts["gradients"] == 8 * 5e8, "the bucket has a largest size"
    cpu = plan.trainer_place(Trainer(offload_optimizer=True), shape(), 1 << 20, plan.Device("cpu"))
    assert cpu.parts["optimiser"] == 12e6 and len(cpu.notes) == 1, "there it is the same memory"
    # elements a token: kept inputs 2 x 64; inside a layer 8 x 64 + 3 x 64 + 3 x 32 + 4 x 128 = 1312
    assert plan.activation_bytes(shape(), 10, 2, checkpointing=True) == 10 * 2 * (2 * 64 + 1312)
    assert plan.activation_bytes(shape(), 10, 2, checkpointing=False) == 10 * 2 * 2 * (64 + 1312)


def test_logits_never_grow_with_the_tokens_of_a_batch() -> None:
    wide = shape(vocabulary=151936)
    grown = plan.logits_bytes(wide, 100_000, 1024) - plan.logits_bytes(wide, 50_000, 1024)
    assert grown == 4 * 2 * 50_000 * 64


def test_logits_of_a_training_step_are_no_more_than_the_head() -> None:
    wide = shape(vocabulary=151936)
    head = 4 * 151936 * 64
    few, many = plan.trained_logits_bytes(wide, 10, True), plan.trained_logits_bytes(wide, 100_000, True)
    assert few == 4 * 10 * (151936 + 64) and many == 2**26 + 4 * 100_000 * 64 + head
    assert many - plan.trained_logits_bytes(wide, 100_000, False) == head
    assert (plan.LOGITS_SHARE, plan.LOGITS_FLOOR) == (logprobs_blocks.WHOLE_SHARE, logprobs_blocks.WHOLE_FLOOR)


def test_kv_cache_takes_what_is_left_and_splits_over_ranks() -> None:
    device = plan.Device("gpu", 10.0 * plan.GIB)
    one = plan.rollout_place(Rollout(gpu_memory_utilization=0.5, max_batched_tokens=1), shape(), 1000, device)
    assert one.parts["weights"] == 2e6
    work = (4 * 64 + 3 * 128) * 2
    assert one.parts["KV cache"] == 5 * plan.GIB - 2e6 - work - plan.ENGINE
    assert one.total == pytest.approx(device.bytes)
    tokens = one.parts["KV cache"] / (2 * 2 * 2 * 2 * 16)  # key and value, two bytes, layers, KV heads, head size
    assert f"{tokens:,.0f} tokens" in one.notes[1]
    two = plan.rollout_place(Rollout(tensor_parallel=2, gpu_memory_utilization=0.5), shape(), 1000, device)
    assert two.gpus == 2 and two.parts["weights"] == 1e6


def test_engines_and_ranks_that_take_turns_share_their_gpus() -> None:
    of = {"student": "Qwen/Qwen3-4B", "teachers": {"default": "Qwen/Qwen3-4B"}, "data": {"path": "x.jsonl"}, "colocate": True}
    engines, device = {"workers": 4, "gpu_memory_utilization": 0.5}, plan.Device("gpu", 80 * plan.GIB, 5)
    trainer = {"ranks": 4, "zero_stage": 2, "activation_checkpointing": True}
    found = plan.estimate(GopdConfig.parse(of | {"rollout": engines, "trainer": trainer}), device)
    assert [(place.role, place.gpus) for place in found.places] == [("trainer and rollout", 4), ("scorer", 1)] and not found.problems
    count = found.models["student"].parameters
    rests = (2 + 12 / 4) * count + 256 * 2**20 + plan.PROCESS
    assert found.places[0].total == pytest.approx(40 * plan.GIB + rests), "an engine's share, and what the trainer does not give up"
    apart = GopdConfig.parse(of | {"rollout": engines, "trainer": trainer, "colocate": False})
    training = plan.estimate(apart, device).places[2].total + plan.ENGINE
    assert f"in turns: {plan.amount(training)} while it trains, " in found.places[0].notes[0], "a sleeping engine leaves its process"
    full = plan.estimate(GopdConfig.parse(of | {"rollout": {"workers": 4}, "trainer": trainer}), device)
    assert ["lower rollout.gpu_memory_utilization" in problem for problem in full.problems] == [True]
    wide = trainer | {"activation_checkpointing": False, "micro_batch_tokens": 32768}
    long = plan.estimate(GopdConfig.parse(of | {"rollout": engines, "trainer": wide}), device)
    assert long.places[0].parts["activations"] > 40 * plan.GIB and "lower micro_batch_tokens" in long.problems[0]
    whole = plan.estimate(GopdConfig.parse(of | {"rollout": engines, "trainer": trainer | {"zero_stage": 1}}), device).places[0]
    assert whole.parts["gradients"] == 4 * count, "float32 sums stay"
    assert len(plan.estimate(GopdConfig.parse(of | {"rollout": engines, "trainer": trainer}), plan.Device("cpu")).places) == 3


def test_a_scorer_holds_each_frozen_model_once() -> None:
    place = plan.scorer_place([shape(), shape(2_000_000)], Scoring(), GPU)
    assert place.parts["weights"] == 2 * 3e6
    shared = GopdConfig.load(CONFIGS / "gopd" / "paper.yaml", ["reference=Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500"])
    scorer = plan.estimate(shared, GPU).places[1]
    assert scorer.parts["weights"] == 2 * 2 * 4_022_468_096
    offloaded = plan.scorer_place([shape(), shape(2_000_000)], Scoring(offload=True), GPU)
    assert offloaded.parts["weights"] < place.parts["weights"] and "in host memory: 5.7 MiB a rank" in offloaded.notes


# -- what is said


def test_paper_fits_eight_gpus_and_not_four(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "gopd" / "paper.yaml"), "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "everything fits" in text and "4.02 B parameters" in text and "8 GPUs in all" in text
    assert cli.main(["plan", str(CONFIGS / "gopd" / "paper.yaml"), "--gpus", "4"]) == 1
    assert "the run asks for 8 GPUs (4 rollout + 1 scorer + 3 trainer), 4 are there" in capsys.readouterr().out


def test_what_does_not_fit_is_named_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "gopd" / "paper.yaml"), "student=Qwen/Qwen3-30B-A3B"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT: trainer needs" in text and "raise trainer.ranks" in text and "DOES NOT FIT: rollout" not in text
    assert cli.main(["plan", str(CONFIGS / "gopd" / "paper.yaml"), "--gpu-gib", "14"]) == 1
    assert "one sequence of 18432 tokens has no room" in capsys.readouterr().out


def test_the_local_config_is_planned_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "gopd" / "local.yaml")]) == 0
    text = capsys.readouterr().out
    assert "memory of one process" in text and "1 x trainer" in text
    assert cli.main(["plan", str(CONFIGS / "gopd" / "quickstart.yaml")]) == 0
    assert "== exopd (gopd)" in capsys.readouterr().out


def test_a_generation_is_planned_for_its_largest_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "generate" / "paper.yaml"), "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "7.62 B parameters" in text and "everything fits" in text and "8 GPUs in all" in text
    assert cli.main(["plan", str(CONFIGS / "generate" / "local.yaml")]) == 0
    assert "1 x rollout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "part"),
    [("colour: blue", "no config of"), ("teachers: {default: x}\nstudnt: y", "did you mean 'student'")],
)
def test_wrong_configs_give_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, part: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["plan", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


# -- doctor


def test_versions_are_compared_with_the_pins(tmp_path: Path) -> None:
    import numpy

    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "".join(f"{name}==0.0.1\n" for name in doctor.KEY_PACKAGES if name != "numpy") + f"numpy=={numpy.__version__}\nvllm==0.0.1\n"
    )
    by_name = {finding.what: finding for finding in doctor.pins(pins)}
    assert by_name["numpy"].state == "ok"
    assert by_name["ray"].state == "warn" and "tested with 0.0.1 -> bash cluster/install.sh" in by_name["ray"].line()


def test_an_open_token_file_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    finding = doctor.tokens()[0]
    assert finding.state == "fail" and finding.line().endswith(f"-> chmod 600 {token}")
    token.chmod(0o600)
    assert doctor.tokens()[0].state == "ok"


def test_doctor_goes_on_past_a_broken_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "imports", lambda: [doctor.Finding("import torch", "fail", "no module", "install it")])
    monkeypatch.setattr(doctor, "disk", broken)
    monkeypatch.setattr(doctor, "tokens", list)  # whoever runs this may have a careless one
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAIL  import torch: no module -> install it" in lines
    assert any(line.startswith("warn  broken: could not be examined: OSError") for line in lines)
    assert lines[-1].endswith("1 failed")


# -- quantisation


def test_quantising_is_planned_by_its_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from raysys.config.quantising import QuantizeConfig
    from raysys.plan_quantising import file_bytes, linears, states_bytes

    one = shape(100_000)
    assert linears(one) == 64 * (2 * 64 + 2 * 32 + 3 * 128) == 36_864
    # two layers of 36,864 weights in 3 bits with a 2-byte scale for each 64, the rest in 2 bytes
    assert file_bytes(one, 3, 64, 2) == 2 * 36_864 * (3 / 8 + 2 / 64) + (100_000 - 2 * 36_864) * 2
    tied = replace(one, tied=True)
    assert file_bytes(tied, 3, 64, 2) == file_bytes(one, 3, 64, 2) == file_bytes(one, 3, 64, 2, rotation=True)
    assert file_bytes(tied, 3, 64, 2, rotation=True) - file_bytes(one, 3, 64, 2) == 2 * tied.vocabulary * 64, "a head of its own"
    windows = {"path": "t.txt", "samples": 10, "length": 20}
    turned = QuantizeConfig.model_validate({"model": "m", "method": "rtn", "rotation": True, "keep_dequantised": True})
    small = shape_of("Qwen/Qwen3-0.6B")
    notes = plan_quantising.estimate_quantising(turned, small, GPU).places[0].notes
    assert f"disk meanwhile {plan.amount(2 * (small.parameters + 151936 * 1024))} more" in notes, "dequantised/, too"
    config = QuantizeConfig.model_validate({"model": "m", "method": "gptq", "calibration": windows, "batch": 2})
    assert states_bytes(config, one, 4) == 2 * 3 * 10 * 20 * 64 * 4
    place = plan_quantising.estimate_quantising(config, one, GPU).places[0]
    assert place.parts["statistics"] == 6 * 4 * 128**2 and place.gpus == 1 and place.parts["logits"] == 0
    mixture = shape(100_000, experts=8, expert_ffn=32, ffn=64)
    assert linears(mixture) == 64 * (2 * 64 + 2 * 32 + 3 * 8 * 32)
    place = plan_quantising.estimate_quantising(config, mixture, GPU).places[0]
    assert place.parts["statistics"] == 4 * (6 * 64**2 + 2 * 7 * 64**2) and any(
        note.startswith("8 experts a layer") for note in place.notes
    )
    assert cli.main(["plan", str(CONFIGS / "quantize" / "paper.yaml"), "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "published numbers of Qwen3-8B" in out and "before it 36 scoring tasks" in out and "everything fits" in out
    assert cli.main(["plan", str(CONFIGS / "quantize" / "paper.yaml"), "--gpu-gib", "4"]) == 1
    assert "quantiser needs" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("model: Qwen/Qwen3-8B\nmethod: rtn\n")
    assert cli.main(["plan", str(tmp_path / "mine.yaml")]) == 0
