"""Scores of layers against closed forms, planted layers, and the methods' own functions."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysys.compression.sensitivity import CRITERIA, WEIGHED, Criterion, basis_of, bits, judge, layer_facts, scores, sizes_of
from raysys.compression.shards import SINGLE, Checkpoint
from raysys.errors import ConfigError
from raysys.methods.d2quant import quantize
from raysys.methods.nsds import SERIES, layer_scores
from tests.compression.models import GROUP, phi3, qwen3

LAYERS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(qwen3(tmp_path_factory.mktemp("model") / "m", layers=LAYERS))


def planted(source: Checkpoint, folder: Path, changes: dict[str, torch.Tensor]) -> Checkpoint:
    """The checkpoint with some weights replaced."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config))
    save_file(load_file(source.folder / SINGLE) | changes, folder / SINGLE)
    return Checkpoint.open(folder)


def heavy(shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = 0.1 * torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) < 0.01] *= 30
    return weight


def test_nsds_is_the_method_over_whole_models(source: Checkpoint) -> None:
    layers = [{name.split(".")[1]: source.layer(i)[f"{name}.weight"] for name in source.linears} for i in range(LAYERS)]
    expected = layer_scores(layers, source.unembedding(), *source.heads)
    assert scores(source, "nsds") == expected.tolist()


def test_nsds_parts_are_what_the_score_is_made_of(source: Checkpoint) -> None:
    basis = basis_of(source)
    found = judge("nsds", [layer_facts(source.folder, i, ["nsds"], basis) for i in range(LAYERS)])
    assert set(found.parts) == {*SERIES, "nv", "se"}
    for layer, score in enumerate(found.scores):
        rest = math.fsum(math.log1p(-found.parts[name][layer]) for name in SERIES)
        assert score == pytest.approx(-rest, rel=1e-12)
        assert 1 - found.parts["nv"][layer] == pytest.approx(math.prod(1 - found.parts[name][layer] for name in SERIES if "/nv" in name))


@pytest.mark.parametrize("criterion", ["nsds", "kurtosis"])
def test_t12_a_planted_layer_is_found(source: Checkpoint, tmp_path: Path, criterion: Criterion) -> None:
    """T12: heavy tails in one layer's down-projection."""
    found = scores(planted(source, tmp_path / "m", {"model.layers.7.mlp.down_proj.weight": heavy((64, 96))}), criterion)
    assert max(range(LAYERS), key=found.__getitem__) == 7


def test_t12_planting_in_gate_alone_is_found(source: Checkpoint, tmp_path: Path) -> None:
    found = scores(planted(source, tmp_path / "m", {"model.layers.4.mlp.gate_proj.weight": heavy((96, 64))}), "nsds")
    assert max(range(LAYERS), key=found.__getitem__) == 4


def test_mse_is_the_error_of_rounding(source: Checkpoint) -> None:
    layer, found = source.layer(3), layer_facts(source, 3, ["mse"], group_size=GROUP)
    total = count = 0.0
    for name in source.linears:
        weight = layer[f"{name}.weight"]
        total += float((quantize(weight, 2, GROUP).dequantize() - weight).double().square().sum())
        count += weight.numel()
    assert found["mse"] == pytest.approx(total / count, rel=1e-12)


def test_zd_counts_the_whole_layer_as_one_bag(source: Checkpoint) -> None:
    layer = source.layer(2)
    everything = torch.cat([layer[f"{name}.weight"].double().flatten() for name in source.linears])
    z = (everything - everything.mean()) / everything.std(correction=0)
    assert scores(source, "zd")[2] == pytest.approx(float((z.abs() > 1).double().mean()), abs=1e-9)


def test_kurtboost_doubles_the_layer_behind_an_outlying_step() -> None:
    kurtosis = [3.0, 3.1, 3.0, 3.1, 3.0, 3.1, 9.0, 9.1, 9.0, 9.1]
    found = judge("kurtosis", [{"kurtosis": value} for value in kurtosis])
    assert found.scores == pytest.approx([*kurtosis[:6], 18.0, *kurtosis[7:]])
    assert found.parts == {"kurtosis": kurtosis}
    flat = judge("kurtosis", [{"kurtosis": 3.0}] * 4)
    assert flat.scores == [3.0] * 4


def test_halves_and_random_orders() -> None:
    facts: list[dict[str, float]] = [{}] * 8
    sizes = [5] * 8
    assert bits(judge("first_half", facts).scores, sizes, 3.0) == [4] * 4 + [2] * 4
    assert bits(judge("last_half", facts).scores, sizes, 3.0) == [2] * 4 + [4] * 4
    drawn = {tuple(bits(judge("random", facts, seed=seed).scores, sizes, 3.0)) for seed in range(10)}
    assert len(drawn) > 3 and all(sum(one) == 24 for one in drawn)
    assert judge("random", facts, seed=3) == judge("random", facts, seed=3)


def test_one_reading_serves_all_criteria(source: Checkpoint) -> None:
    basis = basis_of(source)
    facts = layer_facts(source, 1, CRITERIA, basis, group_size=GROUP)
    assert set(facts) == {*SERIES, *WEIGHED} - {"nsds"}
    apart = [layer_facts(source, 1, [criterion], basis, group_size=GROUP) for criterion in CRITERIA]
    assert facts == {name: value for one in apart for name, value in one.items()}


def test_fused_projections_score_as_their_parts(tmp_path: Path) -> None:
    fused = Checkpoint.open(phi3(tmp_path / "fused"))
    found = layer_facts(fused, 1, ["nsds"], basis_of(fused))
    assert set(found) == set(SERIES) and all(math.isfinite(value) for value in found.values())


def test_budgets_and_sizes(source: Checkpoint) -> None:
    sizes = sizes_of(source)
    assert sizes == [sum(source.layer(0)[f"{name}.weight"].numel() for name in source.linears)] * LAYERS
    found = bits(scores(source, "zd"), sizes, 2.5)
    assert sum(found) / LAYERS == 2.5
    with pytest.raises(ConfigError, match=r"budget must lie in \[2, 4\], got 5"):
        bits([1.0, 2.0], [1, 1], 5.0)


def test_bad_input_is_named(source: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.5.mlp.up_proj.weight"
    broken = planted(source, tmp_path / "m", {name: torch.full((96, 64), float("nan"))})
    for criterion in WEIGHED:
        with pytest.raises(ConfigError, match=r"layer 5: .*finite numbers only"):
            layer_facts(broken, 5, [criterion], basis_of(source), group_size=GROUP)
    with pytest.raises(ConfigError, match="group_size must divide"):
        layer_facts(source, 0, ["mse"], group_size=128)
    with pytest.raises(ValueError, match="needs the basis"):
        layer_facts(source, 0, ["nsds"])
    with pytest.raises(ValueError, match="criterion must be one of"):
        judge("best", [{}])  # type: ignore[arg-type]


def test_few_layers_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    facts = [dict.fromkeys(SERIES, float(i)) for i in range(12)]
    with caplog.at_level(logging.WARNING):
        judge("nsds", facts)
        assert not caplog.records
        judge("nsds", facts[:11])
    assert "among 11, fewer than 12" in caplog.text


def test_constant_layers_score_like_the_middle(source: Checkpoint, tmp_path: Path) -> None:
    changes = {f"model.layers.0.{name}.weight": torch.full(shape, 0.5) for name, shape in source.shapes.items()}
    found = scores(planted(source, tmp_path / "m", changes), "nsds")
    assert all(math.isfinite(score) for score in found)
