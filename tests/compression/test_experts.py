"""Mixtures of experts: their files in both forms, statistics by expert, experts without tokens, and what is written, loaded again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from raysys.compression import one_layer
from raysys.compression.backends import gptq, rtn
from raysys.compression.blocks import Skeleton, check_halves
from raysys.compression.experts import GATE_UP, ROUTER, apart, stacked
from raysys.compression.export import Export, absorbed, quantization_config
from raysys.compression.packed import predicted_bytes, sizes, write_plain
from raysys.compression.pipeline import Pipeline
from raysys.compression.rotated import Rotated
from raysys.compression.sensitivity import WEIGHED, basis_of, layer_facts, scores, sizes_of
from raysys.compression.shards import SINGLE, Checkpoint
from raysys.compression.statistics import Statistics
from raysys.compression.walk import walk
from raysys.errors import ConfigError, DataError
from raysys.evaluation.perplexity import window_nll
from raysys.methods.nsds import SERIES, layer_series
from raysys.quantising import scarcity
from tests.compression.models import GROUP, logits_of, qwen3_moe, rounded
from tests.compression.test_pipeline import config, digests, windows

IDS = torch.arange(3, 33)[None]
EXPERTS, CHOSEN = 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return qwen3_moe(tmp_path_factory.mktemp("moe") / "m")


@pytest.fixture(scope="module")
def source(model: Path) -> Checkpoint:
    return Checkpoint.open(model)


def pipeline(folder: Path, model: Path, settings: Any, bits: list[int] | None = None, **more: Any) -> Pipeline:
    checkpoint = Checkpoint.open(model)
    bits = bits or [3] * checkpoint.layers
    sink = Export(folder / "export", checkpoint, bits, settings.group_size)
    return Pipeline(settings, checkpoint, bits, more.pop("windows", windows()), folder, [sink], **more)


def changed(source: Checkpoint, folder: Path, tensors: dict[str, Tensor], **keys: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(source.config | keys))
    save_file(load_file(source.folder / SINGLE) | tensors, folder / SINGLE)
    return folder


# -- files


def test_stacked_files_read_as_single_experts_do(source: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint.open(qwen3_moe(tmp_path / "stacked", stacked=True))
    assert f"model.layers.0.{GATE_UP}" in other.tensors and f"model.layers.0.{GATE_UP}" not in source.tensors
    assert source.linears == other.linears and len(source.linears) == 4 + 3 * EXPERTS
    for weights in (True, False):
        one, same = source.layer(1, weights), other.layer(1, weights)
        assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)
    assert f"{ROUTER}.weight" in source.layer(1, weights=False), "routers are not quantised"
    layer = source.layer(1)
    assert {name: tuple(layer[f"{name}.weight"].shape) for name in source.linears} == source.shapes
    again = apart(stacked(layer))
    assert again.keys() == layer.keys() and all(torch.equal(again[name], layer[name]) for name in layer)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_type": "mixtral"}, "mixtral is a mixture of experts whose layers are not known"),
        ({"mlp_only_layers": [1]}, "dense layers among its mixtures"),
        ({"decoder_sparse_step": 2}, "dense layers among its mixtures"),
        ({"num_local_experts": 5}, r"has no mlp\.experts\.4\.gate_proj, mlp\.experts\.4\.up_proj, mlp\.experts\.4\.down_proj"),
        ({"moe_intermediate_size": 64}, r"mlp\.experts\.0\.gate_proj\.weight is \[32, 64\], the config of a qwen3_moe says \[64, 64\]"),
        ({"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ({"num_local_experts": None}, "has no num_experts"),
    ],
)
def test_mixtures_of_other_kinds_are_named(source: Checkpoint, tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Checkpoint.open(changed(source, tmp_path / "m", {}, **keys))


def test_an_expert_that_is_damaged_is_named(source: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    broken = changed(source, tmp_path / "m", {name: torch.zeros(32, 64)})
    with pytest.raises(DataError, match=r"layer 0: mlp\.experts\.2\.up_proj\.weight holds 0 only"):
        pipeline(tmp_path / "run", broken, config("gptq")).layer(0)


# -- scores


def test_scores_are_means_over_experts(source: Checkpoint) -> None:
    """NSDS: of each component its own series; the router is left out."""
    basis, layer = basis_of(source), source.layer(1)
    facts = layer_facts(source, 1, WEIGHED, basis, group_size=GROUP)
    attention = {name: layer[f"self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    apart_ = [
        layer_series(
            attention | {part: layer[f"mlp.experts.{expert}.{part}.weight"] for part in ("gate_proj", "up_proj", "down_proj")},
            basis,
            *source.heads,
        )
        for expert in range(EXPERTS)
    ]
    assert [facts[name] for name in SERIES] == pytest.approx(torch.stack(apart_).mean(dim=0).tolist(), rel=1e-9)
    everything = [layer[f"{name}.weight"].double().flatten() for name in source.linears]
    flat = torch.cat(everything)
    assert facts["zd"] == pytest.approx(float(((flat - flat.mean()).abs() > flat.std(correction=0)).double().mean()), abs=1e-9)
    assert sizes_of(source) == [len(flat)] * source.layers


def test_heavy_tails_in_experts_are_found(source: Checkpoint, tmp_path: Path) -> None:
    heavy = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)) ** 5
    planted = changed(source, tmp_path / "m", {f"model.layers.1.mlp.experts.{e}.down_proj.weight": heavy.clone() for e in range(EXPERTS)})
    found = scores(Checkpoint.open(planted), "nsds")
    assert found[1] > found[0]


# -- forward


def test_halves_are_the_layer_and_walks_the_model(source: Checkpoint, tmp_path: Path) -> None:
    skeleton = Skeleton(source.folder, 12)
    block = skeleton.block(1, source.layer(1))
    check_halves(block, 64, torch.float32, torch.device("cpu"))
    for name in source.linears:
        assert torch.equal(block.weight(name), source.layer(1)[f"{name}.weight"]), name
    block.put("mlp.experts.2.up_proj", torch.ones(32, 64))
    up, gate = (block.module.mlp.experts.gate_up_proj[2, rows] for rows in (slice(32, 64), slice(32)))
    assert bool((up == 1).all()) and torch.equal(gate, source.layer(1)["mlp.experts.2.gate_proj.weight"])
    data = windows(count=3)
    found = walk(skeleton, data, source.layer, source.tensor, source.unembedding, tmp_path / "states", batch=2)
    loaded = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    nll = 0.0
    for ids, length in zip(torch.from_numpy(data.ids).long(), data.lengths.tolist(), strict=True):
        nll += float(window_nll(logits_of(loaded, ids[None, :length])[0], ids[:length])[0])
    assert found.mean == pytest.approx(nll / (int(data.lengths.sum()) - 3), rel=1e-5)


# -- statistics


def brute_force(model: Any, teacher: Any, ids: Tensor, real: Tensor) -> dict[str, tuple[Tensor, Tensor, int]]:
    """H, D and tokens of the first layer's experts' linears, token by token, from hooks on whole models."""
    seen: dict[str, Tensor] = {}
    for name, one in (("student", model), ("teacher", teacher)):
        layer = one.model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        one(ids, use_cache=False)
    sums: dict[str, list[Any]] = {}
    mlp, full = model.model.layers[0].mlp, teacher.model.layers[0].mlp

    def add(name: str, x: Tensor, wanted: Tensor) -> None:
        one = sums.setdefault(name, [torch.zeros(len(x), len(x)), torch.zeros(len(x), len(x)), 0])
        one[0] += torch.outer(x, x)
        one[1] += torch.outer(wanted - x, x)
        one[2] += 1

    def hidden(of: Any, expert: int, x: Tensor) -> Tensor:
        gate, up = (of.experts.gate_up_proj[expert] @ x).chunk(2)
        return torch.nn.functional.silu(gate) * up

    for row, place in real.nonzero().tolist():
        x, wanted = seen["student"][row, place], seen["teacher"][row, place]
        for expert in (mlp.gate.weight @ x).topk(CHOSEN).indices.tolist():
            add(f"mlp.experts.{expert}.gate_proj", x, wanted)
            add(f"mlp.experts.{expert}.down_proj", hidden(mlp, expert, x), hidden(full, expert, wanted))
    return {name: (h * 2 / n, d * 2 / n, n) for name, (h, d, n) in sums.items()}


def test_statistics_are_those_of_the_tokens_that_reach_an_expert(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[tuple[tuple[int, ...], Tensor, Tensor, int, float]] = []

    def catching(weight: Tensor, statistics: Statistics, *args: Any, **kwargs: Any) -> Any:
        assert statistics.deviation is not None
        caught.append((tuple(weight.shape), statistics.hessian, statistics.deviation, statistics.tokens, kwargs["damp"]))
        return gptq(weight, statistics, *args, **kwargs)

    monkeypatch.setattr(one_layer, "gptq", catching)
    line = pipeline(tmp_path / "run", model, config("gptaq"))
    record = line.layer(0)
    line.layer(1)
    line.finish()
    data = windows()
    real = torch.arange(12) < torch.from_numpy(data.lengths)[:, None]
    plain = AutoModelForCausalLM.from_pretrained(write_plain(tmp_path / "run" / "export", tmp_path / "plain"))
    with torch.no_grad():
        expected = brute_force(plain, AutoModelForCausalLM.from_pretrained(model), torch.from_numpy(data.ids).long(), real)
    assert sum(n for name, (_, _, n) in expected.items() if "gate" in name) == CHOSEN * int(real.sum())
    joint, down = caught[4 : 4 + 2 * EXPERTS], caught[4 + 2 * EXPERTS : 4 + 3 * EXPERTS]
    for expert in range(EXPERTS):
        for kind, found in (("gate", joint[2 * expert]), ("gate", joint[2 * expert + 1]), ("down", down[expert])):
            hessian, deviation, tokens = expected[f"mlp.experts.{expert}.{kind}_proj"]
            assert found[3] == tokens and found[4] == pytest.approx(0.01 + 0.5 * len(hessian) / tokens)
            torch.testing.assert_close(found[1], hessian, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()))
            torch.testing.assert_close(found[2], deviation, rtol=1e-3, atol=1e-3 * float(deviation.abs().max()))
    counts = [expected[f"mlp.experts.{expert}.gate_proj"][2] for expert in range(EXPERTS)]
    assert record["experts"] == EXPERTS and record["expert_tokens_least"] == min(counts)
    assert record["experts_scarce"] == sum(one < 64 for one in counts) and record["experts_rounded"] == 0


def test_an_expert_that_no_token_reaches_is_rounded_and_told_of(source: Checkpoint, tmp_path: Path) -> None:
    router = source.layer(0)[f"{ROUTER}.weight"].clone()
    router[3] = router[:3].mean(dim=0)  # a mean is never the largest
    model = changed(source, tmp_path / "m", {f"model.layers.0.{ROUTER}.weight": router}, num_experts_per_tok=1)
    line = pipeline(tmp_path / "run", model, config("d2quant", d2quant={"iterations": 2}), bits=[3, 2])
    record = line.layer(0)
    assert record["experts_rounded"] == 1 and record["expert_tokens_least"] == 0 and record["experts_scarce"] == EXPERTS
    told = scarcity([record, record | {"experts_rounded": 0}])
    assert told is not None and "8 of 8 experts have fewer calibration tokens than inputs" in told and ", 1 of them have none" in told
    assert scarcity([{"layer": 0}]) is None and scarcity([record | {"experts_scarce": 0}]) is None
    line.layer(1)
    line.finish()
    layer = source.layer(0)
    found = load_file(write_plain(tmp_path / "run" / "export", tmp_path / "plain") / "layer-00000.safetensors")

    def by_rounding(expert: int) -> dict[str, Tensor]:
        place, made = f"mlp.experts.{expert}.", {}
        for part in ("gate_proj", "up_proj", "down_proj"):
            made[place + part] = rtn(layer[f"{place}{part}.weight"], 3, GROUP, column=part == "down_proj", iterations=2)
        return {name: one.dequantize() for name, one in absorbed(made, {})[0].items()}

    same = {
        expert: [torch.equal(found[f"model.layers.0.{name}.weight"], weight) for name, weight in by_rounding(expert).items()]
        for expert in range(EXPERTS)
    }
    assert all(same[3]) and not any(any(same[expert]) for expert in range(3))


# -- the pipeline


@pytest.mark.parametrize("method", ["rtn", "gptaq", "d2quant"])
def test_the_last_stream_is_what_the_written_model_computes(model: Path, tmp_path: Path, method: str) -> None:
    """Each expert's column scale is in its own up; routing is on the quantised prefix; DAC's bias reaches router and experts alike."""
    line = pipeline(tmp_path / "run", model, config(method), bits=[4, 3])
    errors = [line.layer(i)["error_after"] for i in range(2)]
    full, prefix = (stream.read(2)[0:6] for stream in line.streams)
    line.finish()
    real = next(iter(line.batches()))[1]
    plain = write_plain(tmp_path / "run" / "export", tmp_path / "plain")
    seen: dict[str, Tensor] = {}
    for name, folder in (("full", model), ("prefix", plain)):
        loaded = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        for i, bias in line.corrections.read().items() if name == "prefix" else ():
            loaded.model.layers[i].post_attention_layernorm.register_forward_hook(lambda _, __, out, bias=bias: out + bias)
        loaded.model.layers[1].register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
        with torch.no_grad():
            loaded(torch.from_numpy(windows().ids).long(), use_cache=False)
    assert len(line.corrections.read()) == (2 if method == "d2quant" else 0)
    for name, stream in (("full", full), ("prefix", prefix)):
        gap = (seen[name][:4] - stream[:4])[real].abs().max() / stream.abs().max()
        assert gap < 5e-5, (name, float(gap))
    assert 0 < errors[1] < 1


def test_killed_among_experts_it_goes_on_there_and_no_bit_differs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    line = pipeline(calm, model, config())
    expected = [line.layer(i) for i in range(2)]
    line.finish()

    class Killed(BaseException):
        pass

    def dying(deaths: Iterator[int]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(deaths) == 0:
                raise Killed
            return gptq(*args, **kwargs)

        return call

    line = pipeline(killed, model, config())
    line.layer(0)
    with monkeypatch.context() as patch:
        patch.setattr(one_layer, "gptq", dying(iter(range(8, -1, -1))))  # attention has four linears, then experts come
        with pytest.raises(Killed):
            line.layer(1)
    again = pipeline(killed, model, config())
    assert again.next == 1 and again.layer(1) == expected[1]
    again.finish()
    assert digests(killed / "export") == digests(calm / "export")


def test_calibrated_experts_lose_less_than_rounded_ones(model: Path, tmp_path: Path) -> None:
    many = windows(count=48, seed=1)
    ends = {}
    for method in ("rtn", "gptq", "d2quant"):
        line = pipeline(tmp_path / method, model, config(method), windows=many)
        ends[method] = [line.layer(i) for i in range(2)][-1]["error_after"]
    assert ends["gptq"] < ends["rtn"] and ends["d2quant"] < ends["rtn"], ends


def test_a_rotated_mixture_computes_the_same(source: Checkpoint, tmp_path: Path) -> None:
    """With eight bits hardly anything is lost, so what is left of a difference would be the rotation's."""
    rotated = Rotated(source, seed=0)
    sink = Export(tmp_path / "export", source, [8, 8], 32)
    line = Pipeline(config("gptq", rotation=True), rotated, [8, 8], windows(), tmp_path, [sink], stored=sink.dtype, rest=rotated.rest)
    errors = [line.layer(i)["error_after"] for i in range(2)]
    line.finish()
    loaded = AutoModelForCausalLM.from_pretrained(write_plain(tmp_path / "export", tmp_path / "plain"))
    wanted, found = (logits_of(one, IDS) for one in (AutoModelForCausalLM.from_pretrained(source.folder), loaded))
    # Rounding sends a token of two equally good experts to the other one now and then, so logits differ by more than weights.
    assert max(errors) < 1e-3 and float((wanted - found).square().mean() / wanted.square().mean()) < 3e-2
    assert not torch.equal(loaded.model.layers[0].mlp.gate.weight, source.layer(0)[f"{ROUTER}.weight"])


# -- what is written


def exported(source: Checkpoint, folder: Path, bits: list[int]) -> Path:
    export = Export(folder, source, bits, GROUP, "bfloat16")
    for i, width in enumerate(bits):
        export.write(i, rounded(source, i, width))
    return export.finish()


def test_each_linear_of_the_file_belongs_to_one_group_and_routers_are_ignored(source: Checkpoint) -> None:
    settings = quantization_config(source, [2, 4], GROUP)

    def matches(patterns: list[str], name: str) -> bool:
        return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in patterns)

    for i, width in ((0, 2), (1, 4)):
        for linear in (*source.linears, "mlp.experts.123.up_proj"):
            name = f"model.layers.{i}.{linear}"
            groups = [key for key, group in settings["config_groups"].items() if matches(group["targets"], name)]
            assert groups == [f"w{width}"] and not matches(settings["ignore"], name), name
        router = f"model.layers.{i}.{ROUTER}"
        assert matches(settings["ignore"], router)
        assert not any(matches(group["targets"], router) for group in settings["config_groups"].values())


@pytest.mark.parametrize("bits", [[4, 4], [2, 2]])
def test_stock_transformers_computes_what_we_quantised(source: Checkpoint, tmp_path: Path, bits: list[int]) -> None:
    folder = exported(source, tmp_path / "out", bits)
    plain, packed = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16).eval() for one in (write_plain(folder, tmp_path / "plain"), folder)
    )
    assert torch.equal(logits_of(packed, IDS), logits_of(plain, IDS))
    assert torch.equal(plain.model.layers[1].mlp.gate.weight, source.layer(1)[f"{ROUTER}.weight"].to(torch.bfloat16))
    found = sizes(folder)
    assert found.quantised == sum(predicted_bytes(source.shapes, width, GROUP, torch.bfloat16) for width in bits)
    assert found.weights == 2 * sum(rows * columns for rows, columns in source.shapes.values())


def test_a_stacked_source_is_written_as_single_experts(source: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint.open(qwen3_moe(tmp_path / "stacked", stacked=True))
    one, same = (exported(each, tmp_path / name, [4, 2]) for each, name in ((source, "a"), (other, "b")))
    assert (one / "layer-00001.safetensors").read_bytes() == (same / "layer-00001.safetensors").read_bytes()
