"""Which rule moves which parameter, and the optimiser's config and table."""

from __future__ import annotations

import pytest
import torch

from raysys.config.optimising import Optimiser
from raysys.errors import ConfigError
from raysys.models.moe import MoeDecoder, MoeShape
from raysys.training.optimisers import make_optimizer
from raysys.training.parameter_groups import parameter_groups, table

SHAPE = MoeShape(vocabulary=40, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_width=12)


def decoder() -> MoeDecoder:
    return MoeDecoder(SHAPE).initialise(0)


def config(kind: str, **keys: object) -> Optimiser:
    return Optimiser.parse({"kind": kind, **keys})


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamh", "muonh"])
def test_every_parameter_is_in_one_group_under_its_rule(kind: str) -> None:
    model = decoder()
    groups = {group.name: group for group in parameter_groups(model, config(kind))}
    names = [name for group in groups.values() for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {name: group.rule for name, group in groups.items()} == {
        "attention": kind,
        "experts": kind,
        "router": kind,
        "embeddings": "adamw",
        "norms": "adamw",
    }
    decays = [group.weight_decay for group in groups.values()]
    assert decays == ([0.0, 0.0, 0.0, 0.1, 0.0] if kind in ("adamh", "muonh") else [0.1, 0.1, 0.0, 0.1, 0.0])
    assert list(groups["embeddings"].parameters) == ["embedding.weight", "head.weight"]
    assert all(parameter.dim() == 1 for parameter in groups["norms"].parameters.values())
    assert parameter_groups(model, config("adamw", router_weight_decay=0.3))[2].weight_decay == 0.3


def test_the_table_by_hand() -> None:
    lines = [line.split() for line in table(parameter_groups(decoder(), config("muonh", base_width=64))).splitlines()]
    # 0.2 sqrt(d_in 64 / 16): d_in is 16 everywhere but for the experts' down projections, 12.
    assert lines == [
        ["group", "tensors", "parameters", "optimiser", "rate", "x", "decay"],
        ["attention", "8", "1,536", "muonh", "1.6", "0"],
        ["experts", "6", "4,608", "muonh", "1.39", "to", "1.6", "0"],
        ["router", "2", "128", "muonh", "1.6", "0"],
        ["embeddings", "2", "1,280", "adamw", "1", "0.1"],
        ["norms", "9", "112", "adamw", "1", "0"],
        ["total", "27", "7,664"],
    ]
    assert sum(parameter.numel() for parameter in decoder().parameters()) == 7664


def test_a_frozen_parameter_is_in_no_group_and_an_unknown_one_is_an_error() -> None:
    model = decoder()
    model.embedding.weight.requires_grad_(False)
    assert list(parameter_groups(model, config("muon"))[3].parameters) == ["head.weight"]
    model.extra = torch.nn.Linear(3, 3, bias=False)
    with pytest.raises(ConfigError, match=r"extra.weight \[3, 3\] belongs to no group"):
        parameter_groups(model, config("adamw"))


def test_bad_configs_are_one_clear_line() -> None:
    for keys, line in {
        ("kind", "lion"): "kind: Input should be 'adamw', 'muon', 'adamh' or 'muonh'",
        ("betas", (0.9, 1.0)): "betas=.* each must be at least 0 and below 1",
        ("momentum", 1.0): "momentum: Input should be less than 1",
        ("newton_schulz_steps", 0): "newton_schulz_steps: Input should be greater than 0",
        ("learning_rate", 0): "learning_rate: Input should be greater than 0",
        ("decay_share", 0): "decay_share: Input should be greater than 0",
        ("moment", 0.9): "unknown key 'moment', did you mean 'momentum'",
    }.items():
        with pytest.raises(ConfigError, match=line):
            Optimiser.parse(dict([keys]))
    with pytest.raises(ValueError, match="muon needs matrices whole: set zero_stage to 0, 1 or 2"):
        config("muon").check(2000, 3)
    config("adamw").check(2000, 3, offload=True)
    with pytest.raises(ValueError, match="offload_optimizer=false"):
        config("adamh").check(2000, 1, offload=True)
    with pytest.raises(ValueError, match="warmup_steps=1000 never ends in steps=500"):
        config("adamw").check(500, 1)
    with pytest.raises(ValueError, match="overlap"):
        config("adamw", schedule="wsd", warmup_steps=60, decay_share=0.5).check(100, 1)


def test_a_matrix_without_norm_is_refused_under_hyperball() -> None:
    model = decoder()
    torch.nn.init.zeros_(model.layers[1].mixture.experts.gate[2])
    make_optimizer(model, config("muon"))
    with pytest.raises(ConfigError, match=r"layers.1.mixture.experts.gate has a matrix of norm 0"):
        make_optimizer(model, config("muonh"))
