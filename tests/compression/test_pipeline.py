"""Layer after layer through a tiny model: order of the steps, corrections, absorption, and a restart that changes no bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from raysys.compression.blocks import Skeleton, check_halves
from raysys.compression.calibration import TokenWindows
from raysys.compression.corrections import Corrections
from raysys.compression.export import Export
from raysys.compression.packed import write_plain
from raysys.compression.packing import unpack
from raysys.compression.pipeline import Pipeline
from raysys.compression.plain import Plain
from raysys.compression.rotated import Rotated
from raysys.compression.shards import LINEARS, NORM, Checkpoint
from raysys.compression.walk import walk
from raysys.config.quantising import QuantizeConfig
from raysys.errors import ConfigError, DataError
from raysys.evaluation.perplexity import window_nll

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_in(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    kind, cls, own = FAMILIES[family]
    torch.manual_seed(3)
    model = cls(kind(**(SIZES | own | more))).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.2 * torch.randn_like(weight))
            elif weight.dim() == 2:
                weight.mul_(8)  # the usual first weights are so small that attention hardly looks anywhere
            else:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def windows(count: int = 6, length: int = 12, seed: int = 0) -> TokenWindows:
    """Some full, some with padding."""
    rng = np.random.default_rng(seed)
    lengths = np.array([length - (n % 3) for n in range(count)], np.int32)
    return TokenWindows(rng.integers(40, size=(count, length)).astype(np.int32), lengths, np.ones(count, np.int32), np.ones(count, bool))


def config(method: str = "d2quant", **more: Any) -> QuantizeConfig:
    values: dict[str, Any] = {
        "model": "x",
        "method": method,
        "group_size": 32,
        "batch": 4,
        "d2quant": {"iterations": 2, "correction": True},
        "calibration": {"path": "x"},
    }
    return QuantizeConfig.parse(values | more)


def pipeline(
    folder: Path, model: Path, settings: QuantizeConfig, bits: list[int] | None = None, folds: bool = False, **more: Any
) -> Pipeline:
    checkpoint = Checkpoint.open(model)
    bits = bits or [2, 4, 3]
    sink = Export(folder / "export", checkpoint, bits, settings.group_size, mlp_bias=folds)
    return Pipeline(settings, checkpoint, bits, more.pop("windows", windows()), folder, [sink], folds=folds, **more)


def run(folder: Path, model: Path, settings: QuantizeConfig, **more: Any) -> list[dict[str, Any]]:
    line = pipeline(folder, model, settings, **more)
    records = [line.layer(i) for i in range(line.next, 3)]
    line.finish()
    return records


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "d2quant"])
def test_each_method_writes_a_model_that_loads(tmp_path: Path, method: str) -> None:
    model = model_in(tmp_path / "model")
    records = run(tmp_path / "run", model, config(method))
    assert [record["layer"] for record in records] == [0, 1, 2] and [record["bits"] for record in records] == [2, 4, 3]
    assert records[0]["error_before"] == 0 and all(0 < record["error_after"] < 2 for record in records)
    assert records[1]["error_before"] == pytest.approx(records[0]["error_after"])
    assert all(0 < record["weight_error/down_proj"] < 1 for record in records)
    assert ("output_error/o_proj" in records[0]) == (method != "rtn") and ("correction" in records[0]) == (method == "d2quant")
    assert not (tmp_path / "run" / "states").exists(), "hidden states are not kept"
    plain = write_plain(tmp_path / "run" / "export", tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(plain)
    assert torch.isfinite(loaded(torch.arange(10)[None]).logits).all()
    assert (tmp_path / "run" / "corrections.safetensors").is_file() == (method == "d2quant")


def test_calibrated_methods_lose_less_than_rounding(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    many = windows(count=24, seed=1)
    ends = {
        method: run(tmp_path / method, model, config(method), bits=[3, 3, 3], windows=many)[-1]["error_after"]
        for method in ("rtn", "gptq", "d2quant")
    }
    assert ends["gptq"] < ends["rtn"] and ends["d2quant"] < ends["rtn"], ends


def test_without_windows_rounding_needs_no_forward_pass(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    with_windows, without = tmp_path / "a", tmp_path / "b"
    run(with_windows, model, config("rtn"))
    run(without, model, config("rtn"), windows=None)
    assert digests(with_windows / "export") == digests(without / "export")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_last_stream_is_what_the_written_model_computes(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorption, rounding of scales and folding are in the stream: behind the last layer it is what the plain copy gives."""
    model = model_in(tmp_path / "model", family)
    folds = family == "llama"
    line = pipeline(tmp_path / "run", model, config(), folds=folds)
    for i in range(3):
        line.layer(i)
    full, prefix = (stream.read(3)[0:6] for stream in line.streams)
    line.finish()
    ids, real = torch.from_numpy(windows().ids).long(), next(iter(Pipeline.batches(line)))[1]
    original = AutoModelForCausalLM.from_pretrained(model)
    seen: dict[str, Tensor] = {}
    for name, loaded in (
        ("full", original),
        ("prefix", AutoModelForCausalLM.from_pretrained(write_plain(tmp_path / "run" / "export", tmp_path / "plain"))),
    ):
        biases = {} if folds or name == "full" else Corrections(tmp_path / "run").read()
        for i, bias in biases.items():
            loaded.model.layers[i].post_attention_layernorm.register_forward_hook(lambda _, __, out, bias=bias: out + bias)
        loaded.model.layers[2].register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            loaded(ids, use_cache=False)
    assert len(Corrections(tmp_path / "run").read()) == (0 if folds else 3)
    for name, stream in (("full", full), ("prefix", prefix)):
        gap = (seen[name][:4] - stream[:4])[real].abs().max() / stream.abs().max()
        assert gap < 2e-5, (name, float(gap))


def test_correction_takes_the_mean_shift_of_each_channel_away(tmp_path: Path) -> None:
    """T8 and T9: with the bias, the mean of the norm's output is that of attention in full precision, on the same inputs."""
    model = model_in(tmp_path / "model")
    line = pipeline(tmp_path / "run", model, config())
    line.layer(0)
    export = tmp_path / "run" / "export"
    checkpoint = Checkpoint.open(model)
    skeleton = Skeleton(model, 12)
    full = skeleton.block(0, checkpoint.layer(0))
    stored = {name.removeprefix("model.layers.0."): tensor for name, tensor in load_file(export / "layer-00000.safetensors").items()}
    student = skeleton.block(0, checkpoint.layer(0))
    for name in LINEARS:
        scale = stored[f"{name}.weight_scale"]
        codes = unpack(stored[f"{name}.weight_packed"], 2, int(stored[f"{name}.weight_shape"][1]))
        student.put(name, (codes.unflatten(1, (scale.shape[1], -1)).float() * scale.unsqueeze(-1)).flatten(1))
    data = windows()
    states = checkpoint.tensor("model.embed_tokens.weight")[torch.from_numpy(data.ids).long()]
    real = torch.arange(12) < torch.from_numpy(data.lengths)[:, None]
    line.corrections.finish()
    mu = Corrections(tmp_path / "run").read()[0]
    with torch.no_grad():
        shift = (full.normed(full.attend(states)) - student.normed(student.attend(states)))[real].mean(dim=0)
        student.bias = mu
        left = (full.normed(full.attend(states)) - student.normed(student.attend(states)))[real].mean(dim=0)
    assert float(shift.abs().max()) > 1e-3 and torch.allclose(mu, shift, atol=1e-5) and float(left.abs().max()) < 1e-5


def test_the_norm_before_the_head_is_corrected_beside_the_file(tmp_path: Path) -> None:
    """d2quant.md, section 4: the teacher is the last block with its MLP in full precision, behind its quantised and corrected attention."""
    model = model_in(tmp_path / "model")
    plain_run = run(tmp_path / "without", model, config())
    records = run(tmp_path / "run", model, config(d2quant={"iterations": 2, "correction": True, "final_norm": True}))
    assert digests(tmp_path / "run" / "export") == digests(tmp_path / "without" / "export"), "no code depends on it"
    assert records[-1].pop("correction_final") > 0 and records == plain_run
    corrections = Corrections(tmp_path / "run")
    final, plain = corrections.final(), write_plain(tmp_path / "run" / "export", tmp_path / "plain")
    assert final is not None and Corrections(tmp_path / "without").final() is None
    original, data = AutoModelForCausalLM.from_pretrained(model), windows()
    ids, real = torch.from_numpy(data.ids).long(), torch.arange(12) < torch.from_numpy(data.lengths)[:, None]

    def corrected() -> tuple[Any, list[Tensor]]:
        """The written model with its biases, and what its last norm gives."""
        loaded, seen = AutoModelForCausalLM.from_pretrained(plain), list[Tensor]()
        for i, bias in corrections.read().items():
            loaded.model.layers[i].post_attention_layernorm.register_forward_hook(lambda _, __, out, bias=bias: out + bias)
        loaded.model.norm.register_forward_hook(lambda _, __, out: seen.append(out))
        return loaded, seen

    (teacher, wanted), (student, given) = corrected(), corrected()
    teacher.model.layers[2].mlp.load_state_dict(original.model.layers[2].mlp.state_dict())
    student.model.norm.register_forward_hook(lambda _, __, out: out + final)
    with torch.no_grad():
        teacher(ids, use_cache=False)
        logits = student(ids, use_cache=False).logits
    shift = (wanted[0] - given[0])[real].mean(dim=0)
    assert float(shift.abs().max()) > 1e-3 and torch.allclose(final, shift, atol=1e-5)
    quantised = Checkpoint.open(plain)
    found = walk(
        *(Skeleton(plain, 12), data, quantised.layer, quantised.tensor, quantised.unembedding, tmp_path / "states"),
        biases=corrections.read(),
        final=final,
    )
    nll = [float(window_nll(rows[:length], own[:length])[0]) for rows, own, length in zip(logits, ids, data.lengths.tolist(), strict=True)]
    assert found.mean == pytest.approx(sum(nll) / (int(data.lengths.sum()) - len(nll)), rel=1e-5)


def test_killed_in_the_middle_of_a_layer_it_goes_on_there_and_no_bit_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(tmp_path / "model")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    expected = run(calm, model, config())
    line = pipeline(killed, model, config())
    line.layer(0)

    class Killed(BaseException):
        pass

    from raysys.compression import one_layer as module

    before, calls = module.gptq, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # in gate and up of layer 1
            raise Killed
        return before(*args, **kwargs)

    monkeypatch.setattr(module, "gptq", dies)
    with pytest.raises(Killed):
        line.layer(1)
    monkeypatch.setattr(module, "gptq", before)
    again = pipeline(killed, model, config())
    assert again.next == 1
    assert [again.layer(i) for i in (1, 2)] == expected[1:]
    again.finish()
    assert digests(killed / "export") == digests(calm / "export")
    assert (killed / "corrections.safetensors").read_bytes() == (calm / "corrections.safetensors").read_bytes()


def test_killed_between_files_and_record_the_layer_is_written_again(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run(calm, model, config("gptq"))
    line = pipeline(killed, model, config("gptq"))
    line.layer(0)
    keep = {path: path.read_bytes() for path in (killed / "states").glob("*-00001.npy")}
    line.layer(1)
    (killed / "ledger" / "layers" / "00001.json").unlink()
    for path, data in keep.items():  # the files in front of a layer go last
        path.write_bytes(data)
    assert pipeline(killed, model, config("gptq")).next == 1
    run(killed, model, config("gptq"))
    assert digests(killed / "export") == digests(calm / "export")


def test_padding_is_not_looked_at(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    data = windows()
    other = data.ids.copy()
    other[np.arange(12) >= data.lengths[:, None]] = 39
    run(tmp_path / "a", model, config())
    run(tmp_path / "b", model, config(), windows=replace(data, ids=other))
    assert digests(tmp_path / "a" / "export") == digests(tmp_path / "b" / "export")
    assert data.digest == replace(data, ids=other).digest


def test_a_rotated_model_is_written_untied_and_computes_the_same(tmp_path: Path) -> None:
    """With eight bits hardly anything is lost, so what is left of a difference would be the rotation's."""
    model = model_in(tmp_path / "model", tie_word_embeddings=True)
    checkpoint = Checkpoint.open(model)
    rotated = Rotated(checkpoint, seed=0)
    assert bool((rotated.tensor(NORM) == 1).all()) and torch.equal(rotated.tensor(NORM), dict(rotated.rest())[NORM])
    sink = Export(tmp_path / "export", checkpoint, [8, 8, 8], 32)
    settings = config("gptq", rotation=True)
    line = Pipeline(settings, rotated, [8, 8, 8], windows(), tmp_path, [sink], stored=sink.dtype, rest=rotated.rest)
    errors = [line.layer(i)["error_after"] for i in range(3)]
    line.finish()
    loaded = AutoModelForCausalLM.from_pretrained(write_plain(tmp_path / "export", tmp_path / "plain"))
    assert not torch.equal(loaded.model.embed_tokens.weight, loaded.lm_head.weight) and loaded.config.tie_word_embeddings is False
    ids = torch.from_numpy(windows().ids).long()
    with torch.no_grad():
        wanted, found = (one(ids).logits for one in (AutoModelForCausalLM.from_pretrained(model), loaded))
    assert max(errors) < 1e-2 and float((wanted - found).square().mean() / wanted.square().mean()) < 1e-2


def test_binary_levels_go_to_a_plain_folder(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    settings = config(d2quant={"levels": "binary", "iterations": 2}, keep_dequantised=True)
    assert not settings.served
    checkpoint = Checkpoint.open(model)
    line = Pipeline(settings, checkpoint, [2, 4, 3], windows(), tmp_path, [Plain(tmp_path / "dequantised", checkpoint, {})])
    for i in range(3):
        line.layer(i)
    line.finish()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantised")
    assert loaded.dtype == torch.bfloat16
    row = loaded.model.layers[0].self_attn.q_proj.weight[0]
    assert len(row.unique()) <= 4, "two bits have four levels"
    down = loaded.model.layers[0].mlp.down_proj.weight[0, :32].float()
    assert len(down.abs().unique()) <= 2, "binary levels are symmetric; the column scale is in up"


def test_perplexity_by_layers_is_that_of_the_whole_model(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model", tie_word_embeddings=True)
    checkpoint, data = Checkpoint.open(model), windows()
    starts = np.array([1, 2, data.lengths[2], 1, data.lengths[4] - 1, 1], np.int32)
    data = replace(data, starts=starts, whole=np.array([True, True, False, True, True, False]))
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():  # one window ends as greedy decoding would end it
        data.ids[4, data.lengths[4] - 1] = int(loaded(torch.from_numpy(data.ids[4:5, : data.lengths[4] - 1]).long()).logits[0, -1].argmax())
    skeleton = Skeleton(model, 12)
    found = walk(skeleton, data, checkpoint.layer, checkpoint.tensor, checkpoint.unembedding, tmp_path / "states", batch=4)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, length, start in zip(data.ids, data.lengths, data.starts, strict=True):
            own = torch.from_numpy(ids[:length]).long()
            logp = loaded(own[None]).logits[0].log_softmax(-1)
            total -= float(logp[start - 1 : -1].gather(1, own[start:, None]).sum())
            count += len(own) - int(start)
    assert found.tokens == count and found.mean == pytest.approx(total / count, rel=1e-5) and found.accuracy == 1 / 4


def test_what_cannot_be_quantised_is_named(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    checkpoint = Checkpoint.open(model)

    class Spoilt:
        folder, layers, linears = checkpoint.folder, 3, LINEARS
        value = float("nan")

        def layer(self, i: int) -> dict[str, Tensor]:
            found = checkpoint.layer(i)
            weight = found["mlp.up_proj.weight"]
            weight[:] = 0.5
            weight[0, 0] = self.value
            return found

        def tensor(self, name: str) -> Tensor:
            return checkpoint.tensor(name)

    with pytest.raises(DataError, match=r"layer 0: mlp.up_proj.weight holds what is no finite number"):
        Pipeline(config(), Spoilt(), [2, 2, 2], windows(), tmp_path, []).layer(0)
    Spoilt.value = 0.5
    with pytest.raises(DataError, match=r"layer 0: mlp.up_proj.weight holds 0.5 only"):
        Pipeline(config(), Spoilt(), [2, 2, 2], windows(), tmp_path, []).layer(0)
    with pytest.raises(ConfigError, match="holds 32 tokens, a window has 64"):
        Skeleton(model, 64)


def test_a_layer_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    block = Skeleton(model, 12).block(0, Checkpoint.open(model).layer(0))
    check_halves(block, 32, torch.float32, torch.device("cpu"))
    block.module.mlp.register_forward_hook(lambda _, __, out: 2 * out)
    inner = block.module.forward
    block.module.forward = lambda *args, **kwargs: 0.5 * inner(*args, **kwargs)
    with pytest.raises(ConfigError, match="is not attention and MLP behind a norm each"):
        check_halves(block, 32, torch.float32, torch.device("cpu"))
