"""Folders read layer by layer, and the ones that are refused before any weight is read."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysys.compression.shards import INDEX, SINGLE, Checkpoint
from raysys.errors import ConfigError
from tests.compression.models import llama, phi3, qwen3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"qwen3": qwen3(root / "q"), "tied": qwen3(root / "t", tied=True), "llama": llama(root / "l"), "phi3": phi3(root / "p")}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["llama"], tmp_path / "copy"))


def changed(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_layers_and_rest_are_all_there_is(made: dict[str, Path]) -> None:
    source = Checkpoint.open(made["qwen3"])
    whole = load_file(made["qwen3"] / SINGLE)
    found = {f"model.layers.{i}.{name}": tensor for i in range(source.layers) for name, tensor in source.layer(i).items()}
    found |= dict(source.rest())
    assert source.layers == 3 and source.heads == (4, 2, 32) and not source.tied
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    layer = source.layer(1)
    assert {name: tuple(layer[f"{name}.weight"].shape) for name in source.linears} == source.shapes
    assert torch.equal(source.unembedding(), whole["lm_head.weight"])
    assert source.layer(1, weights=False).keys() == layer.keys() - {f"{name}.weight" for name in source.linears}


def test_a_layer_needs_its_own_shards_only(copy: Path) -> None:
    source = Checkpoint.open(copy)
    wanted = source.layer(1)
    own = {source.tensors[name].file for name in source.layer_names(1).values()}
    others = {tensor.file for tensor in source.tensors.values()} - own
    assert others
    for file in others:
        (copy / file).unlink()
    again = pickle.loads(pickle.dumps(source)).layer(1)
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_tied_model_gives_its_embedding(made: dict[str, Path]) -> None:
    source = Checkpoint.open(made["tied"])
    assert source.tied and torch.equal(source.unembedding(), source.tensor("model.embed_tokens.weight"))
    with pytest.raises(ConfigError, match=r"has no tensor lm_head\.weight"):
        source.tensor("lm_head.weight")


def test_fused_projections_come_in_their_parts(made: dict[str, Path]) -> None:
    source = Checkpoint.open(made["phi3"])
    layer = source.layer(1)
    whole = load_file(made["phi3"] / SINGLE)
    parts = [layer[f"self_attn.{name}_proj.weight"] for name in "qkv"]
    assert [len(part) for part in parts] == [64, 32, 32]
    assert torch.equal(torch.cat(parts), whole["model.layers.1.self_attn.qkv_proj.weight"])
    assert torch.equal(
        torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]), whole["model.layers.1.mlp.gate_up_proj.weight"]
    )
    assert not any("qkv" in name or "gate_up" in name for name in layer)


def test_the_digest_is_of_the_weights_and_not_of_the_place(made: dict[str, Path], tmp_path: Path) -> None:
    same, other = qwen3(tmp_path / "same"), qwen3(tmp_path / "other", seed=1)
    digest = Checkpoint.open(made["qwen3"]).digest()
    assert Checkpoint.open(same).digest() == digest != Checkpoint.open(other).digest()


def test_a_quantised_model_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantised already \(by gptq\)"):
        Checkpoint.open(changed(copy, quantization_config={"quant_method": "gptq"}))


def test_weights_of_integers_are_refused(copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    file = copy / Checkpoint.open(copy).tensors[name].file
    save_file(load_file(file) | {name: torch.zeros(96, 64, dtype=torch.int8)}, file)
    with pytest.raises(ConfigError, match=r"mlp\.up_proj\.weight is I8: quantised already"):
        Checkpoint.open(copy)


def test_a_family_without_gated_mlp_is_named(copy: Path) -> None:
    path = copy / INDEX
    index = json.loads(path.read_text())
    del index["weight_map"]["model.layers.1.mlp.gate_proj.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"layer 1 of a opt has no mlp\.gate_proj"):
        Checkpoint.open(changed(copy, model_type="opt"))


def test_shards_missing_or_cut_short_are_named(copy: Path) -> None:
    file = copy / Checkpoint.open(copy).tensors["model.layers.1.mlp.down_proj.weight"].file
    whole = file.read_bytes()
    for kept, what in ((len(whole) - 1, f"has {len(whole) - 1} bytes, its header says {len(whole)}"), (40, "cut short"), (3, "cut short")):
        file.write_bytes(whole[:kept])
        with pytest.raises(ConfigError, match=rf"{file.name} .*{what}"):
            Checkpoint.open(copy)
    file.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(ConfigError, match=f"{file.name} has a damaged header"):
        Checkpoint.open(copy)
    file.unlink()
    with pytest.raises(ConfigError, match=f"{file.name} could not be read: No such file"):
        Checkpoint.open(copy)


def test_a_shard_without_a_tensor_of_the_index_is_named(copy: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    file = copy / Checkpoint.open(copy).tensors[name].file
    save_file({other: tensor for other, tensor in load_file(file).items() if other != name} | {"other": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=rf"{file.name} has no tensor {name}"):
        Checkpoint.open(copy)


def test_an_index_stays_within_its_folder(copy: Path) -> None:
    path = copy / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no weight_map of file names"):
        Checkpoint.open(copy)


def test_shapes_that_the_config_does_not_explain_are_named(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.gate_proj\.weight is \[96, 64\], the config of a llama says \[128, 64\]"):
        Checkpoint.open(changed(copy, intermediate_size=128))
    with pytest.raises(ConfigError, match=r"layer 2 of a llama has no self_attn\.q_proj"):
        Checkpoint.open(changed(copy, intermediate_size=96, num_hidden_layers=3))


def test_pickles_and_no_weights_at_all_are_told_apart(copy: Path, tmp_path: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has neither"):
        Checkpoint.open(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        Checkpoint.open(copy)
    with pytest.raises(ConfigError, match=r"config\.json could not be read"):
        Checkpoint.open(tmp_path / "nowhere")
