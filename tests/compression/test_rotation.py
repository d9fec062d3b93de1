"""A rotated model computes what it did: real models of each family, in float64, with gains and biases that are not trivial."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from raysys.compression.experts import apart, stacked
from raysys.compression.rotation import FAMILIES, Rotation, check_family

WIDTH, LAYERS = 32, 2


def model(family: str, tied: bool, **more: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        family,
        **sizes,
        intermediate_size=48,
        vocab_size=40,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    for parameter in made.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel())).mul_(0.3)
        if parameter.dim() == 1:
            parameter.data.add_(1)
    for module in made.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    return made


def _norm(module: Any, h: Tensor) -> Tensor:
    """Theirs computes in float32, whatever it is given."""
    return module.weight * h * (h.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def rotated(state: dict[str, Tensor], rotation: Rotation) -> dict[str, Tensor]:
    out = dict(state)
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        out |= {prefix + name: tensor for name, tensor in stacked(rotation.layer(apart(layer))).items()}
    ends = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return out | dict(zip(ends, rotation.ends(*(state[name] for name in ends)), strict=True))


@pytest.mark.parametrize(
    ("family", "tied", "more"),
    [
        ("llama", False, {}),
        ("llama", True, {"attention_bias": True, "mlp_bias": True}),
        ("mistral", False, {}),
        ("qwen2", True, {}),
        ("qwen3", True, {}),
        ("qwen3_moe", False, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ],
)
def test_logits_stay(family: str, tied: bool, more: dict[str, Any]) -> None:
    before, after = model(family, tied, **more), model(family, False, **more)
    state = before.state_dict()
    assert any(name.endswith("o_proj.bias") for name in state) == ("mlp_bias" in more)
    after.load_state_dict(rotated(state, Rotation(WIDTH, seed=3, size=16)))
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = before(ids), after(ids)
    assert want.logits.std() > 0.1
    near = 1e-5 if "num_experts" in more else 1e-10  # routers take their softmax in float32, whatever they are given
    torch.testing.assert_close(got.logits, want.logits, rtol=near, atol=near)
    assert not torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_blocks_are_orthogonal_the_same_and_told_by_the_seed() -> None:
    rotation = Rotation(256, seed=5)
    torch.testing.assert_close(rotation.block @ rotation.block.T, torch.eye(128, dtype=torch.float64))
    assert rotation.block.abs().unique().numel() == 1
    whole = rotation.stream(torch.eye(256, dtype=torch.float64))
    assert torch.equal(whole[:128, :128], whole[128:, 128:]) and not whole[:128, 128:].any()
    assert torch.equal(rotation.block, Rotation(128, seed=5).block) and not torch.equal(rotation.block, Rotation(128, seed=6).block)


def test_a_column_of_outliers_is_spread() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 17] *= 20
    spread = Rotation(256).stream(weight)
    assert spread.square().mean(0).amax() < 0.1 * weight.square().mean(0).amax()
    torch.testing.assert_close(spread.square().sum(1), weight.square().sum(1))


def test_halves_are_rotated_in_single_precision() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = Rotation(128).stream(weight)
    assert got.dtype == torch.bfloat16 and torch.equal(got, Rotation(128).stream(weight.float()).bfloat16())


def test_families() -> None:
    for family in FAMILIES:
        check_family(family)
    with pytest.raises(ValueError, match="models of type 'gemma' cannot be rotated: of llama, mistral"):
        check_family("gemma")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda layer: Rotation(32, size=12), "size must be a power of two, got 12"),
        (lambda layer: Rotation(48, size=32), "size must divide the model's width 48, got 32"),
        (lambda layer: Rotation(64, size=32).layer(layer), r"must be \[64\], got \[32\]"),
        (lambda layer: Rotation(32, size=32).layer({**layer, "input_layernorm.bias": torch.ones(32)}), "it has input_layernorm.bias"),
        (
            lambda layer: Rotation(32, size=32).layer({"mlp.up_proj.weight": layer["mlp.up_proj.weight"]}),
            "must have input_layernorm.weight",
        ),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[dict[str, Tensor]], Any], told: str) -> None:
    state = model("llama", False).state_dict()
    prefix = "model.layers.0."
    with pytest.raises(ValueError, match=told):
        call({name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)})
