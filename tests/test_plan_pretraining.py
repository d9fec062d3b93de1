"""Plans of pretraining: the paper's counts, memory by hand, layouts, and one real step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysys import cli
from raysys.checks import check_pretrain_moe
from raysys.config.pretraining import PretrainMoeConfig
from raysys.data.local_text import train_tokenizer
from raysys.errors import ConfigError
from raysys.models.moe import MoeDecoder, shape_for
from raysys.models.moe_files import export_moe
from raysys.plan import GIB, Device
from raysys.plan_pretraining import choose_layout, counted, layout, render
from raysys.plan_trial import try_step

CONFIGS = Path(__file__).resolve().parent.parent / "jobs" / "configs" / "pretrain_moe"
H100 = Device("gpu", 80 * GIB)


def paper(size: str, *overrides: str) -> PretrainMoeConfig:
    return PretrainMoeConfig.load(CONFIGS / f"{size}.yaml", overrides)


@pytest.mark.parametrize(
    ("size", "dense", "sparse", "activated", "total"),
    [
        ("1b", "296M", "806M", "397M", "1.10B"),
        # The paper prints 823M here too, which are the 11B's: a router of 64 rows has 4 M fewer parameters than one of 256.
        ("3b", "479M", "2.72B", "820M", "3.20B"),
        ("11b", "479M", "10.88B", "823M", "11.36B"),
    ],
)
def test_counts_are_the_papers(size: str, dense: str, sparse: str, activated: str, total: str) -> None:
    def shown(number: int) -> str:
        return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"

    found = counted(paper(size))
    assert [shown(number) for number in (found.dense, found.sparse, found.activated, found.total)] == [dense, sparse, activated, total]


def test_memory_follows_the_table() -> None:
    config = paper("1b")
    found = counted(config)
    router = 8 * 64 * 1024
    dense, sparse = found.dense + found.query_key_norms + router, found.sparse - router
    shared = layout(config, 16, 2, 8, 1, H100).parts
    assert shared["weights"] == pytest.approx(2 * (dense + sparse / 8))
    assert shared["gradients"] == pytest.approx(4 * (dense + sparse) / 16 + 8 * (dense + sparse / 8))
    assert shared["optimiser"] == pytest.approx(12 * (dense + sparse) / 16)
    pieces = layout(config, 16, 3, 1, 1, H100).parts
    assert pieces["weights"] == pytest.approx(2 * (dense + sparse) / 16) and pieces["gathered"] > 0
    assert pieces["gradients"] == pytest.approx(4 * (dense + sparse) / 16 + 8 * 5e8), "the bucket has a largest size"
    single = layout(config, 1, 0, 1, 1, Device("cpu", 24 * GIB)).parts
    assert single["gradients"] == pytest.approx(6 * (dense + sparse)), "bfloat16 runs on stage 1"
    assert single["optimiser"] == pytest.approx(12 * (dense + sparse)), "the config says bfloat16"


def test_the_plainest_layout_that_fits_is_chosen() -> None:
    config = paper("11b")
    found = [choose_layout(one, 64, H100) for one in (paper("3b"), config)]
    assert [(one.zero_stage, one.expert_parallel) for one in found] == [(1, 1), (2, 1)], "whole float32 gradients of 11 B have no room"
    small = choose_layout(config, 64, Device("gpu", 30 * GIB))
    assert small.total <= 30 * GIB and small.expert_parallel > 1
    more = choose_layout(config, 8, H100)
    assert more.passes > config.accumulation and more.total <= 80 * GIB
    assert choose_layout(config, 8, Device("gpu", 4 * GIB)).total > 4 * GIB
    text, fits = render(config, Device("gpu", 4 * GIB))
    assert not fits and "DOES NOT FIT in 4.0 GiB" in text


@pytest.mark.parametrize("size", ["1b", "3b", "11b"])
def test_what_the_configs_ask_for_fits(size: str) -> None:
    assert render(paper(size), H100)[1]


def test_a_flat_router_is_warned_of() -> None:
    assert "flattens the softmax" in render(paper("11b", "router.scale=1"), H100)[0]
    assert "flattens" not in render(paper("11b"), H100)[0]
    assert not paper("11b", "router.scale=1", "router.mpi=false").flat_router()


def test_the_table_of_what_moves_which_parameter_is_printed() -> None:
    lines = [line.split() for line in render(paper("3b"), H100)[0].splitlines()]
    assert ["router", "12", "1,179,648", "muonh", "6.4", "0"] in lines
    assert ["router", "8", "524,288", "adamw", "1", "0"] in [line.split() for line in render(paper("1b"), H100)[0].splitlines()]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("trainer.zero_stage=3", "optimiser.kind=adamw"), "router.mode=inplace needs routers whole: set trainer.zero_stage to 0, 1 or 2"),
        ((), "optimiser.kind=muonh another: set optimiser.matrix_norm=initial"),
        (("optimiser.kind=adamw", "router.retract=false"), "mode=inplace with retract=false"),
    ],
)
def test_what_an_overwritten_router_does_not_go_with_is_refused(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        paper("3b", "router.mode=inplace", *overrides)
    assert paper("3b", "router.mode=inplace", "optimiser.matrix_norm=initial").router.mode == "inplace"


def test_a_model_that_stock_folders_cannot_hold_is_warned_of() -> None:
    config = paper("1b", "router.gate=sigmoid")
    assert "router.gate=sigmoid" in config.not_exported() and config.not_exported() in render(config, H100)[0]
    assert not paper("1b").not_exported()


def tiny(**more: Any) -> PretrainMoeConfig:
    return PretrainMoeConfig.model_validate(
        {
            "model": {"vocabulary": 300, "width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "experts": 8, "top_k": 2, "expert_width": 16},
            "data": {"sources": {"all": {"path": "x"}}, "tokenizer": "none", "sequence": 64},
            "batch": 8,
            "device": "cpu",
        }
        | more
    )


def test_a_run_that_starts_from_a_folder_is_planned_and_checked_by_its_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = shape_for(tiny().model.model_copy(update={"experts": 6, "layers": 2}), tiny().router, 300, 64)
    model = MoeDecoder(shape).initialise(0)
    export_moe(model, tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50)))
    train_tokenizer([tmp_path / "text.jsonl"], 300, tmp_path / "tokenizer")
    data = {"sources": {"all": {"path": str(tmp_path / "text.jsonl")}}, "tokenizer": str(tmp_path / "tokenizer"), "sequence": 64}

    def started(**more: Any) -> PretrainMoeConfig:
        values = {"start": str(tmp_path / "model"), "data": data, "batch": 8, "device": "cpu"}
        return PretrainMoeConfig.model_validate(values | more)

    found = counted(started())
    assert found.total + found.query_key_norms == sum(parameter.numel() for parameter in model.parameters())
    text, fits = render(started(), Device("cpu", 24 * GIB))
    assert fits and f"total {found.total:,}" in text and "largest logit of the router: 9.2" in text
    assert try_step(started(), tokens=16).asked == 2
    thirds = started(trainer={"ranks": 3, "expert_parallel": 3})  # 6 experts; the config's 64 cannot be split like this
    check_pretrain_moe(thirds)
    assert not caplog.records
    check_pretrain_moe(started(router={"scale": 0.5}))
    assert "router.scale=0.5: no logit can exceed 1.2" in caplog.text, "by the folder's sizes, and before anything starts"
    assert layout(thirds, 3, 1, 3, 1, H100).parts["weights"] < layout(thirds, 3, 1, 1, 1, H100).parts["weights"]
    with pytest.raises(ConfigError, match="experts=6 cannot be split evenly over expert_parallel=4"):
        check_pretrain_moe(started(trainer={"ranks": 4, "expert_parallel": 4}))
    with pytest.raises(ConfigError, match=r"start=.*text has no config\.json"):
        (tmp_path / "text").mkdir()
        check_pretrain_moe(started(start=str(tmp_path / "text")))
    later = render(started(start=str(tmp_path / "later"), model={"vocabulary": 300}), H100)[0]
    assert "later is not here: taken for the config's model" in later


def test_a_real_step_says_what_it_cut() -> None:
    whole = try_step(tiny())
    assert whole.layers == whole.asked == 3 and 4.5 < whole.loss < 7 and whole.grad_norm > 0 and "all 3 layers" in whole.line()
    per_layer = 3 * 8 * 32 * 16 * 8
    cut = try_step(tiny(), free=(2 * 300 * 32 * 8 + 1.9 * per_layer) / 0.6, tokens=16)
    assert cut.layers == 1 and "1 of 3 layers, more do not fit" in cut.line()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny().to_yaml())
    assert cli.main(["plan", str(path), "--try", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "parameters: dense" in out and "tried: all 3 layers" in out
