"""The job that quantises, without a cluster: what is refused before anything starts, and the table of a pipeline of such jobs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysys import pipeline, quantising
from raysys.compression.calibration import token_windows
from raysys.compression.shards import Checkpoint
from raysys.config.quantising import QuantizeConfig
from raysys.config.runs import NewModel
from raysys.errors import ConfigError
from raysys.models.scratch import new_causal
from raysys.pipeline import Planned
from raysys.quantising import check_quantize
from raysys.quantising_served import unservable
from raysys.quantising_work import CORRECTED, FULL, QUANTISED, Quantiser, Work, facts_options, known_of

SMALL: dict[str, Any] = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn_size": 96, "context": 64}
ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_causal(NewModel(**SMALL, tied=True), tmp_path_factory.mktemp("model"), seed=0)


def config(at: Path, **more: Any) -> QuantizeConfig:
    windows = {"source": {"domains": {"add": ADD}}, "samples": 4, "length": 24}
    return QuantizeConfig.parse({"model": str(at), "group_size": 32, "calibration": windows} | more)


def test_what_fits_passes(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="raysys"):
        check_quantize(config(model, rotation=True))
    assert "will have a head of its own" in caplog.text, "tied embeddings are untied, and it is said"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"group_size": 64}, "mlp.down_proj has 96 inputs, which groups of group_size=64 do not divide"),
        ({"bits": 5.0}, "bits=5 cannot be met by widths low=2 and high=4"),
        ({"low": 4}, "low=4 must be below high=4"),
        ({"allocation": "uniform", "bits": 2.5}, "which must be a whole number"),
        ({"calibration": None}, "method=d2quant measures activations and needs calibration"),
        ({"d2quant": {"levels": "binary"}}, "set keep_dequantised=true, or levels=uniform"),
        ({"calibration": {"path": "/nowhere.txt", "length": 24}}, "calibration.path=/nowhere.txt does not exist"),
        ({"evaluation": {"source": {"domains": {"add": ADD}}, "length": 65}}, "evaluation.length=65 exceeds the 64 tokens"),
        ({"model": "/nowhere"}, "model folder /nowhere does not exist"),
        ({"shared": "/proc/shared"}, "shared=/proc/shared cannot be made"),
    ],
)
def test_wrong_input_is_one_line(model: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_quantize(config(model, **changed))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_windows_of_which_nothing_could_be_measured_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "ten tokens", "answer": "1"}) + "\n")
    windows = {"path": str(tmp_path / "rows.jsonl"), "samples": 1}
    check_quantize(config(model, evaluation=windows | {"length": 11}))
    with pytest.raises(ConfigError, match=r"evaluation\.length=10 ends each window before its answer begins \(raise evaluation\.length\)"):
        check_quantize(config(model, evaluation=windows | {"length": 10}))


@pytest.mark.parametrize("key", ["hidden_act", "quantization_config"])
def test_a_checkpoint_that_is_none_is_named(model: Path, tmp_path: Path, key: str) -> None:
    values = json.loads((model / "config.json").read_text())
    if key == "quantization_config":
        values[key] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    told = "is quantised already (by gptq)" if key == "quantization_config" else "safetensors"
    with pytest.raises(ConfigError) as caught:
        check_quantize(config(tmp_path))
    assert told in str(caught.value)


def test_a_correction_of_the_last_norm_alone_is_measured_too(model: Path, tmp_path: Path) -> None:
    windows = {"source": {"domains": {"add": ADD}}, "samples": 4, "length": 24}
    settings = config(model, evaluation=windows, bits=3.0, allocation="uniform", threads=1, d2quant={"iterations": 2, "final_norm": True})
    data = token_windows(settings.evaluation, str(model), 0, "evaluation", in_order=True)  # type: ignore[arg-type]
    actor = Quantiser(Work(settings, Checkpoint.open(model).folder, tmp_path, [3, 3], data, data, "cpu", "float32", {}))
    assert ["correction_final" in actor.layer(i) for i in range(2)] == [False, True]
    assert list(actor.finish()["models"]) == [FULL, QUANTISED, CORRECTED]
    assert actor.perplexity(CORRECTED)["nll"] != actor.perplexity(QUANTISED)["nll"]


def test_the_export_is_loaded_as_its_users_load_it(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    settings = config(model, method="rtn", calibration=None, check_export=True)
    for bits in ([2, 4], [4, 4]):
        folder = tmp_path / str(bits)
        actor = Quantiser(Work(settings, Checkpoint.open(model).folder, folder, bits, None, None, "cpu", "float32", {}))
        for i in range(2):
            actor.layer(i)
        actor.finish()
        told = actor.load_export()
        assert told.startswith("export/ loads in transformers with compressed-tensors; logits of what its codes stand for, to 0 of"), told
        actor.close()
        assert not (folder / "dequantised").exists()


def test_the_engine_is_asked_only_where_it_has_a_kernel(tmp_path: Path) -> None:
    def export(**changes: Any) -> Path:
        group = {"weights": {"num_bits": changes.pop("bits", 4)}}
        config = {"quantization_config": {"config_groups": {"group_0": group}}} | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    assert unservable(export(), "cpu", True) is None and unservable(export(bits=3), "gpu", False) is None
    assert "4 bits only" in str(unservable(export(bits=3), "cpu", True))
    assert "AMX" in str(unservable(export(num_experts=8), "cpu", True)) and "AVX-512" in str(unservable(export(), "cpu", False))


def test_runs_share_what_is_known_of_a_model_and_nothing_else(model: Path, tmp_path: Path) -> None:
    windows = {"source": {"domains": {"add": ADD}}, "samples": 4, "length": 24}
    base = {"method": "rtn", "shared": str(tmp_path / "shared"), "evaluation": windows, "batch": 2, "threads": 1}

    def measured(name: str, **more: Any) -> dict[str, float]:
        settings, checkpoint = config(model, **base | more), Checkpoint.open(model)
        held_out = token_windows(settings.evaluation, str(model), 0, "evaluation", in_order=True)  # type: ignore[arg-type]
        folder = tmp_path / name
        return Quantiser(Work(settings, checkpoint.folder, folder, [4, 4], None, held_out, "cpu", "float32", {})).perplexity(FULL)

    first = measured("first")
    (known,) = (tmp_path / "shared").rglob("perplexity-*")
    assert json.loads(known.read_text()) == first and 0 <= first["accuracy"] <= 1
    known.write_text(json.dumps({"nll": 0.5}))
    assert measured("second", bits=4.0, allocation="uniform") == {"nll": 0.5}, "the model is the same, whatever becomes of it"
    assert measured("third", batch=4)["nll"] == pytest.approx(first["nll"]) and measured("fourth", shared=None) == first
    options = [known_of(Checkpoint.open(model), config(model, **base | more), "nsds", **facts_options(config(model, **base | more)))
               for more in ({}, {"energy": 0.9}, {"high": 8})]  # fmt: skip
    assert options[0] == options[2] != options[1]


def test_stages_that_quantise_share_a_table_with_what_evaluates_them(model: Path, tmp_path: Path) -> None:
    stages = []
    for name, value in (("rtn", 9.0), ("gptq", 7.5)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [("full precision", 6.0), ("quantised", value), ("quantised, with its correction", value - 1)]
        records = [{"step": 0, "label": label, "mean": 0.0, "domains": {}, "measures": {"perplexity": one}} for label, one in lines]
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        stages.append(Planned(name, "quantize", config(model), name, folder))
    found = pipeline.comparison(stages)
    assert found is not None and found["split"] is None and found["columns"] == []
    told = {row["label"]: row["measures"]["perplexity"] for row in found["rows"]}
    assert told == {
        "full precision": 6.0, "rtn": 9.0, "rtn, with its correction": 8.0, "gptq": 7.5, "gptq, with its correction": 6.5,
    }  # fmt: skip
    assert pipeline.table(found).splitlines()[0].split() == ["perplexity"]


@pytest.mark.parametrize(("told", "loss"), [({"error_after": 0.2, "weight_error": 0.1}, 0.2), ({"weight_error": 0.1}, 0.1)])
def test_the_loss_of_a_layer_is_its_error(model: Path, tmp_path: Path, told: dict[str, float], loss: float) -> None:
    answers = {"records": [], "layer": told}
    session: Any = SimpleNamespace(folder=tmp_path, job="quantize", ledger=SimpleNamespace(step=0, committed=0))
    quantising._layers(config(model), session, [4, 2], lambda method, *_: answers[method], {})
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [loss, loss]
