"""E3 to E9 of the export tests: what is written is what was quantised, readers agree, and what they cannot read is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raysys.compression.export import Export, absorbed, quantization_config, stored
from raysys.compression.packed import predicted_bytes, restored, sizes, write_plain
from raysys.compression.shards import ABOUT, HEAD, Checkpoint, header
from raysys.errors import CheckpointError, ConfigError
from raysys.methods.d2quant import Quantized, quantize, quantize_down
from tests.compression.models import GROUP, llama, logits_of, phi3, qwen2, qwen3, rounded

IDS = torch.arange(3, 40).unsqueeze(0)
DTYPE = "bfloat16"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("models")
    folders = [qwen3(root / "qwen3"), qwen3(root / "tied", tied=True), qwen2(root / "qwen2"), llama(root / "llama"), phi3(root / "phi3")]
    return {folder.name: Checkpoint.open(folder) for folder in folders}


def exported(source: Checkpoint, folder: Path, bits: list[int], dtype: str = DTYPE) -> dict[str, Quantized]:
    """Writes it; returns what was quantised, by full name."""
    export = Export(folder, source, bits, GROUP, dtype, {"method": "rtn"})
    found = {}
    for i, width in enumerate(bits):
        layer = rounded(source, i, width)
        export.write(i, layer)
        found |= {f"model.layers.{i}.{name}": one for name, one in layer.items()}
    export.finish()
    return found


def plain(source: Checkpoint, quantized: dict[str, Quantized], dtype: torch.dtype = torch.bfloat16) -> Any:
    """The source with what our quantised weights stand for."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    weights = {name: stored(one, dtype).dequantize() for name, one in quantized.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if module in weights:
                parameter.copy_(weights[module])
            else:
                parts = [
                    weights.get(module.replace(whole, part)) for whole, parts in source.fused.items() for part in parts if whole in module
                ]
                if parts:
                    parameter.copy_(torch.cat([part for part in parts if part is not None]))
    return model.eval()


@pytest.mark.parametrize("bits", [[2, 3, 4], [8, 5, 6]])
def test_e3_the_file_holds_the_quantised_weights_bit_for_bit(made: dict[str, Checkpoint], tmp_path: Path, bits: list[int]) -> None:
    quantized = exported(made["qwen3"], tmp_path / "out", bits)
    found = dict(restored(tmp_path / "out"))
    for name, one in quantized.items():
        assert torch.equal(found[f"{name}.weight"], stored(one, torch.bfloat16).dequantize()), name
    for name, tensor in made["qwen3"].rest():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert found.keys() == made["qwen3"].tensors.keys()


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_e4_each_linear_belongs_to_one_group_or_is_ignored(made: dict[str, Checkpoint], family: str) -> None:
    source = made[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.folder))
    bits = [2 + i % 2 for i in range(source.layers)]
    config = quantization_config(source, bits, GROUP)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 1 + source.layers * (7 if family == "qwen3" else 4)
    for name in linears:
        groups = [
            key
            for key, group in config["config_groups"].items()
            if any(re.match(one.removeprefix("re:"), name) for one in group["targets"])
        ]
        expected = [] if name in config["ignore"] else [f"w{bits[int(name.split('.')[2])]}"]
        assert groups == expected, name


def test_e4_layer_one_is_not_layer_eleven() -> None:
    source = Checkpoint(Path(), {}, 12, {})
    groups = quantization_config(source, [4] * 1 + [2] * 11, GROUP)["config_groups"]
    pattern = groups["w2"]["targets"][0].removeprefix("re:")
    assert re.match(pattern, "model.layers.11.mlp.up_proj") and not re.match(pattern, "model.layers.0.mlp.up_proj")
    assert not re.match(groups["w4"]["targets"][0].removeprefix("re:"), "model.layers.10.mlp.up_proj")


def test_e5_a_module_of_another_width_or_group_is_refused_by_name(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    export = Export(tmp_path / "out", source, [2, 2, 2], GROUP)
    weight = source.layer(1)["self_attn.v_proj.weight"]
    with pytest.raises(
        ConfigError, match=r"layer 1: self_attn\.v_proj codes of 2 bits must lie in \[-2, 1\].*all of the layer share 2 bits"
    ):
        export.write(1, rounded(source, 1, 2) | {"self_attn.v_proj": quantize(weight, 4, GROUP)})
    with pytest.raises(ConfigError, match=r"layer 1: self_attn\.v_proj must be codes .*share group_size=32"):
        export.write(1, rounded(source, 1, 2) | {"self_attn.v_proj": quantize(weight, 2, 16)})
    assert not export.have(1)


def readable(bits: list[int]) -> bool:
    """Newer compressed-tensors packs all widths densely, as vLLM does; 0.17 only those that divide 32."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    return all(helpers.pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), width).shape == (1, width) for width in bits)


@pytest.mark.parametrize(
    ("family", "bits"),
    [("qwen3", [2, 4, 8]), ("qwen3", [3, 6, 2]), ("tied", [4, 2, 2]), ("qwen2", [2, 4]), ("llama", [4, 2]), ("phi3", [2, 4])],
)
def test_e6_transformers_computes_what_we_quantised(made: dict[str, Checkpoint], tmp_path: Path, family: str, bits: list[int]) -> None:
    """E10 too: scales of both signs."""
    if not readable(bits):
        pytest.skip("this compressed-tensors unpacks 3, 5, 6 and 7 bits in another layout")
    quantized = exported(made[family], tmp_path / "out", bits)
    assert any(bool((one.scale < 0).any()) for one in quantized.values())
    ours = logits_of(plain(made[family], quantized), IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits_of(model.eval(), IDS), ours)
    assert float(ours.float().std()) > 0.01


def test_e6_a_plain_copy_computes_it_at_every_width(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    ours = logits_of(plain(source, exported(source, tmp_path / "out", [3, 5, 7])), IDS)
    copy = write_plain(tmp_path / "out", tmp_path / "plain")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).eval(), IDS), ours)
    with pytest.raises(ConfigError, match="exists"):
        write_plain(tmp_path / "out", tmp_path / "plain")


def test_the_column_scale_moves_into_up_and_its_bias(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    """T1 through the file: DSQ's scale is nowhere else than in up, and the block computes the same."""
    source = made["qwen3"]
    layer = source.layer(0)
    quantized = rounded(source, 0, 4)
    quantized["mlp.down_proj"] = quantize_down(layer["mlp.down_proj.weight"], 4, GROUP)
    moved, others = absorbed(quantized, {"mlp.up_proj.bias": torch.ones(96)})
    column = quantized["mlp.down_proj"].column_scale
    assert column is not None and moved["mlp.down_proj"].column_scale is None and torch.equal(others["mlp.up_proj.bias"], column)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

    def block(of: dict[str, Quantized], bias: Tensor) -> Tensor:
        up, gate, down = (of[f"mlp.{name}_proj"].dequantize() for name in ("up", "gate", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T + bias)) @ down.T

    torch.testing.assert_close(block(moved, others["mlp.up_proj.bias"]), block(quantized, torch.ones(96)), atol=1e-5, rtol=1e-5)
    Export(tmp_path / "out", source, [4, 4, 4], GROUP).write(0, moved)
    assert absorbed(moved, others) == (moved, others)


def test_e8_the_files_are_as_large_as_predicted(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source, bits = made["qwen3"], [2, 3, 4]
    exported(source, tmp_path / "out", bits)
    found = sizes(tmp_path / "out")
    assert found.quantised == sum(predicted_bytes(source.shapes, width, GROUP, torch.bfloat16) for width in bits)
    assert found.weights == 3 * sum(rows * columns for rows, columns in source.shapes.values())
    by_hand = 3 + 16 / GROUP + 8 * 16 * 7 * 3 / found.weights  # codes on average, scales, shapes
    assert found.bits == pytest.approx(by_hand, abs=1e-9)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.total


def test_e9_what_no_engine_serves_is_refused(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    export = Export(tmp_path / "out", source, [2, 2, 2], GROUP)
    good, layer = rounded(source, 0, 2), source.layer(0)
    down = layer["mlp.down_proj.weight"]
    for name, wrong, said in (
        ("mlp.down_proj", quantize_down(down, 2, GROUP, levels="binary"), "binary levels, which no serving kernel knows"),
        ("mlp.down_proj", quantize_down(down, 2, GROUP), "column scale: absorb it"),
        ("mlp.down_proj", quantize(down, 2, GROUP, symmetric=False), "zero points"),
        ("mlp.up_proj", replace(good["mlp.up_proj"], scale=good["mlp.up_proj"].scale * float("nan")), "0 or not finite in float32"),
    ):
        with pytest.raises(ConfigError, match=rf"layer 0: {name} has .*{said}"):
            export.write(0, good | {name: wrong})
    kept = source.layer(0, weights=False)
    for extra in ("post_attention_layernorm.bias", "mlp.gate_proj.bias"):
        with pytest.raises(ConfigError, match=f"a qwen3 has no place for {extra}, so engines would drop it"):
            export.write(0, good, kept | {extra: torch.zeros(64)})
    with pytest.raises(ConfigError, match=r"input_layernorm\.weight missing"):
        export.write(0, good, {name: tensor for name, tensor in kept.items() if name != "input_layernorm.weight"})
    with pytest.raises(ConfigError, match=r"layer 0: input_layernorm\.weight holds numbers that are not finite in float32"):
        export.write(0, good, kept | {"input_layernorm.weight": torch.full((64,), float("inf"))})
    with pytest.raises(ConfigError, match="layer 0 must have"):
        export.write(0, {name: one for name, one in good.items() if name != "mlp.up_proj"})
    with pytest.raises(ConfigError, match="a qwen3 has no place for MLP biases"):
        Export(tmp_path / "biased", source, [2, 2, 2], GROUP, mlp_bias=True)
    assert not export.have(0)


def test_a_scale_that_half_precision_loses_is_refused(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    layer = rounded(source, 0, 4)
    layer["mlp.up_proj"] = replace(layer["mlp.up_proj"], scale=layer["mlp.up_proj"].scale * 1e-9)
    with pytest.raises(ConfigError, match=r"mlp\.up_proj has scales that are 0 or not finite in float16"):
        Export(tmp_path / "out", source, [4, 4, 4], GROUP, "float16").write(0, layer)


def test_biases_of_a_llama_are_served(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["llama"]
    export = Export(tmp_path / "out", source, [4, 4], GROUP, DTYPE, mlp_bias=True)
    bias = torch.linspace(-1, 1, 96).to(torch.bfloat16)
    quantized = {}
    for i in range(2):
        layer = rounded(source, i, 4)
        export.write(i, layer, source.layer(i, weights=False) | ({"mlp.gate_proj.bias": bias} if i else {}))
        quantized |= {f"model.layers.{i}.{name}": one for name, one in layer.items()}
    export.finish()
    ours = plain(source, quantized)
    gate = ours.get_submodule("model.layers.1.mlp.gate_proj")
    gate.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    assert theirs.config.mlp_bias
    torch.testing.assert_close(logits_of(theirs, IDS), logits_of(ours, IDS), atol=0.02, rtol=0.02)


def test_a_rotated_tied_model_is_written_untied(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["tied"]
    export = Export(tmp_path / "out", source, [4, 4, 4], GROUP, DTYPE)
    for i in range(3):
        export.write(i, rounded(source, i, 4))
    rest = dict(source.rest())
    with pytest.raises(ConfigError, match=r"model\.norm\.weight missing"):
        export.finish((name, tensor) for name, tensor in rest.items() if "norm" not in name)
    head = -rest["model.embed_tokens.weight"]
    export.finish([*rest.items(), (HEAD, head)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, head.to(torch.bfloat16)) and not model.config.tie_word_embeddings


def test_the_folder_loads_as_a_whole_only_when_it_is_one(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    export = Export(tmp_path / "out", source, [4, 4, 4], GROUP, DTYPE)
    export.write(0, rounded(source, 0, 4))
    with pytest.raises(CheckpointError, match="layers 1, 2 are not written yet"):
        export.finish()
    assert not export.finished and not (tmp_path / "out" / "config.json").exists()
    for i in (1, 2):
        export.write(i, rounded(source, i, 4))
    path = tmp_path / "out" / "layer-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert not export.have(1), "a file that is cut short is no layer"
    path.write_bytes(whole)
    export.finish()
    assert export.finished
    text = "Text 1+2"
    before, after = (AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (source.folder, tmp_path / "out"))
    assert before == after
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (source.folder / "generation_config.json").read_bytes()


def test_folders_of_others_are_refused(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    about = {"method": "rtn", "seed": 1}
    Export(tmp_path / "out", source, [2, 2, 4], GROUP, DTYPE, about)
    Export(tmp_path / "out", source, [2, 2, 4], GROUP, torch.bfloat16, about)
    with pytest.raises(ConfigError, match=r"another run \(about\.seed, bits, dtype differ\)"):
        Export(tmp_path / "out", source, [2, 2, 2], GROUP, "float32", about | {"seed": 2})
    with pytest.raises(ConfigError, match=r"another run \(.*source\.digest.* differ\)"):
        Export(tmp_path / "out", made["tied"], [2, 2, 4], GROUP, DTYPE, about)
    with pytest.raises(ConfigError, match="exists and is no export of this run"):
        Export(source.folder, source, [2, 2, 4], GROUP)
    said = json.loads((tmp_path / "out" / ABOUT).read_text())
    assert said["bits"] == [2, 2, 4] and said["about"] == about


def test_settings_that_cannot_be_are_named(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": [2, 2]}, "bits must be 3 whole numbers"),
        ({"bits": [2, 2, 9]}, "bits must be 3 whole numbers"),
        ({"group_size": 64}, r"mlp\.down_proj has 96 inputs, no multiple of group_size=64"),
        ({"dtype": "float64"}, "dtype=float64 cannot be served"),
        ({"dtype": "int4"}, "dtype=int4 cannot be served"),
    ]
    for settings, said in cases:
        with pytest.raises(ConfigError, match=said):
            Export(tmp_path / "out", source, **({"bits": [2, 2, 2], "group_size": GROUP, "dtype": DTYPE} | settings))


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from raysys.compression import export as module
    from raysys.compression.shards import Checkpoint
    from tests.compression.models import GROUP, rounded

    source = Checkpoint.open(sys.argv[1])
    export = module.Export(sys.argv[2], source, [2, 3, 4], GROUP, "bfloat16", {"method": "rtn"})
    export.write(0, rounded(source, 0, 2))
    module.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # the draft is written, and nothing more
    export.write(1, rounded(source, 1, 3))
""")


def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    source = made["qwen3"]
    exported(source, tmp_path / "whole", [2, 3, 4])
    done = subprocess.run([sys.executable, "-c", KILLED, source.folder, tmp_path / "cut"], cwd=Path(__file__).parents[2], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    export = Export(tmp_path / "cut", source, [2, 3, 4], GROUP, DTYPE, {"method": "rtn"})
    assert [export.have(i) for i in range(3)] == [True, False, False] and any((tmp_path / "cut").glob(".*.draft"))
    for i in (1, 2):
        export.write(i, rounded(source, i, export.bits[i]))
    export.finish()
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert one == other


def test_what_is_written_has_the_tensors_of_the_format(made: dict[str, Checkpoint], tmp_path: Path) -> None:
    exported(made["phi3"], tmp_path / "out", [2, 3])
    names = header(tmp_path / "out" / "layer-00001.safetensors")
    assert names["model.layers.1.self_attn.qkv_proj.weight_packed"]["shape"] == [128, 6]
    assert names["model.layers.1.self_attn.qkv_proj.weight_scale"] | {"data_offsets": None} == {
        "dtype": "BF16",
        "shape": [128, 2],
        "data_offsets": None,
    }
    shape = load_file(tmp_path / "out" / "layer-00001.safetensors")["model.layers.1.mlp.gate_up_proj.weight_shape"]
    assert shape.tolist() == [192, 64]
