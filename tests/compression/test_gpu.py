"""Quantising and scoring on a CUDA device: the same weights as on CPU, but for what rounding decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raysys.compression.backends import gptq, rtn
from raysys.compression.packed import write_plain
from raysys.compression.statistics import Statistics
from raysys.methods.nsds import layer_series, unembedding_basis
from tests.compression.test_pipeline import config, model_in, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_is_the_same_there(bits: int) -> None:
    weight = drawn(0, 96, 256)
    torch.testing.assert_close(rtn(weight.cuda(), bits, 64).dequantize().cpu(), rtn(weight, bits, 64).dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_calibrated_weights_lose_the_same_there(asymmetric: bool, down: bool) -> None:
    weight, x = drawn(0, 96, 256), drawn(1, 2000, 256) @ drawn(2, 256, 256)
    full = x + 0.1 * x.roll(1, dims=1) if asymmetric else None
    errors = []
    for device in ("cuda", "cpu"):
        sums = Statistics(256, device=device)
        sums.add(x.to(device), None if full is None else full.to(device))
        made = gptq(weight.to(device), sums, 2, 64, down=down)
        restored = made.dequantize().cpu()
        errors.append(float(((x @ restored.T) - (x if full is None else full) @ weight.T).square().mean()))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_scores_of_a_layer_are_the_same_there() -> None:
    width, inner, heads, head_dim = 64, 128, 4, 16
    names = {"q_proj": (64, width), "k_proj": (32, width), "v_proj": (32, width), "o_proj": (width, 64)}
    names |= {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    layer = {name: drawn(seed, *shape, dtype=torch.bfloat16) for seed, (name, shape) in enumerate(names.items())}
    head = drawn(99, 500, width, dtype=torch.bfloat16)
    near = layer_series(layer, unembedding_basis(head), heads, 2, head_dim)
    there = layer_series({name: one.cuda() for name, one in layer.items()}, unembedding_basis(head.cuda()), heads, 2, head_dim)
    torch.testing.assert_close(there.cpu(), near, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["gptq", "d2quant"])
def test_a_whole_model_is_quantised_there(tmp_path: Path, method: str) -> None:
    model, errors = model_in(tmp_path / "model"), []
    for device in ("cuda", "cpu"):
        records = run(tmp_path / device, model, config(method), device=device)
        errors.append([record["error_after"] for record in records])
        plain = write_plain(tmp_path / device / "export", tmp_path / f"{device}-plain")
        assert all(torch.isfinite(one).all() for path in plain.glob("*.safetensors") for one in load_file(path).values())
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
