"""The mixture-of-experts decoder: its dispatch, its routers, its counts, and the same model in stock transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raysys.errors import ConfigError
from raysys.methods.mpi import effective_router
from raysys.models import moe_files
from raysys.models.experts import _Blocked, mixture
from raysys.models.grouped import Grouped
from raysys.models.moe import MoeDecoder, MoeShape, counts, next_token_loss
from raysys.models.moe_files import export_moe, hub_tensors, load_moe
from raysys.models.packing import Packing
from raysys.models.routing import Routing, balance_loss, choose, z_loss

SHAPE = MoeShape(
    vocabulary=50, width=32, layers=2, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=3, expert_width=24, context=64, deviation=0.2
)
PAPER = {"vocabulary": 128_256, "top_k": 8, "rope_theta": 5e5}
ONE_B = MoeShape(width=1024, layers=8, heads=8, kv_heads=8, head_dim=128, experts=64, expert_width=512, context=2048, **PAPER)  # type: ignore[arg-type]
THREE_B = MoeShape(width=1536, layers=12, heads=16, kv_heads=8, head_dim=96, experts=64, expert_width=768, **PAPER)  # type: ignore[arg-type]
ELEVEN_B = replace(THREE_B, experts=256)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_mixture(x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert for every token."""
    inner = functional.silu(torch.einsum("td,nfd->tnf", x, gate)) * torch.einsum("td,nfd->tnf", x, up)
    made = torch.einsum("tnf,ndf->tnd", inner, down)
    share = torch.zeros(len(x), len(gate), dtype=x.dtype).scatter_add(1, indices, weights)
    return torch.einsum("tn,tnd->td", share, made)


def parts(n: int = 6, top_k: int = 2, tokens: int = 9) -> list[Tensor]:
    weights = drawn(1, tokens, n).softmax(-1)
    chosen, indices = weights.topk(top_k)
    indices[indices == 4] = 5  # expert 4 has no token, expert 5 may be chosen twice
    return [drawn(0, tokens, 8), chosen.clone(), indices, drawn(2, n, 5, 8), drawn(3, n, 5, 8), drawn(4, n, 8, 5)]


def test_dispatch_is_every_expert_for_every_token_and_so_are_its_gradients() -> None:
    found = []
    for form in (mixture, dense_mixture):
        given = [one.clone().requires_grad_(one.is_floating_point()) for one in parts()]
        out = form(*given)
        (out * drawn(9, *out.shape)).sum().backward()
        found.append([out.detach(), *(one.grad for one in given if one.grad is not None)])
    assert len(found[0]) == 6
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert not found[0][3][4].any(), "the expert without tokens"


def test_dispatch_does_not_depend_on_other_tokens() -> None:
    x, weights, indices, *experts = parts()
    whole = mixture(x, weights, indices, *experts)
    one_by_one = torch.cat([mixture(x[t : t + 1], weights[t : t + 1], indices[t : t + 1], *experts) for t in range(len(x))])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-12, atol=1e-12)
    order = torch.randperm(len(x))
    torch.testing.assert_close(mixture(x[order], weights[order], indices[order], *experts), whole[order], rtol=1e-12, atol=1e-12)
    assert mixture(x[:0], weights[:0], indices[:0], *experts).shape == (0, 8)


def test_routing_switches() -> None:
    logits = drawn(5, 7, 6)
    plain = choose(logits, 2, Routing())
    torch.testing.assert_close(plain.weights, logits.softmax(-1).topk(2).values)
    first = choose(logits, 2, Routing(normalise_first=False))
    torch.testing.assert_close(first.weights, logits.topk(2).values.softmax(-1))
    torch.testing.assert_close(choose(logits, 2, Routing(renormalise=True)).weights, first.weights)
    torch.testing.assert_close(choose(logits, 2, Routing(gate="sigmoid")).weights, logits.topk(2).values.sigmoid())
    assert int(plain.load.sum()) == 14


def test_a_router_in_place_scores_as_a_plain_one_until_it_is_overwritten() -> None:
    one = next(MoeDecoder(replace(SHAPE, routing=Routing(mode="inplace", matrix="down"))).double().initialise(0).mixtures())
    experts, weight = one.experts, one.router.weight
    assert one.rows() is weight
    x = drawn(3, 5, SHAPE.width)
    one(x)[0].square().sum().backward()
    routed = one.router(x, experts.gate, experts.up, experts.down)
    torch.testing.assert_close(routed.logits, x @ weight.T)
    routed.logits.square().sum().backward()
    assert weight.grad is not None and weight.grad.any()
    want = effective_router(weight, experts.down.mT, 4.0 / 8**0.5)
    assert one.overwrite_(weight) is weight and torch.equal(weight, want)
    assert not Routing(mpi=False, mode="inplace").overwritten


def test_losses_of_even_and_of_collapsed_routers() -> None:
    even = choose(torch.zeros(4, 4, dtype=torch.float64), 4, Routing())
    assert balance_loss(even).item() == pytest.approx(1) and z_loss(even).item() == pytest.approx(torch.tensor(4.0).log().item() ** 2)
    collapsed = choose(torch.tensor([[40.0, 0, 0, 0]], dtype=torch.float64).expand(5, 4), 1, Routing())
    assert balance_loss(collapsed).item() == pytest.approx(4)


@pytest.mark.parametrize("mpi", [True, False])
def test_rows_see_nothing_of_each_other(mpi: bool) -> None:
    model = MoeDecoder(replace(SHAPE, routing=Routing(mpi=mpi))).double().initialise(0)
    ids = torch.randint(50, (12,), generator=torch.Generator().manual_seed(0))
    together, _ = model(ids, Packing([5, 4, 3], "cpu"))
    alone = torch.cat([model(part, Packing([len(part)], "cpu"))[0] for part in ids.split([5, 4, 3])])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_loss_is_of_the_tokens_that_their_own_row_predicts() -> None:
    model = MoeDecoder(SHAPE).double().initialise(0)
    ids, rows = torch.arange(10), Packing([4, 1, 5], "cpu")
    loss, count, _ = next_token_loss(model, ids, rows)
    logprobs = model.head(model(ids, rows)[0]).log_softmax(-1)
    want = sum(logprobs[t, t + 1] for t in (0, 1, 2, 5, 6, 7, 8))
    assert int(count) == 7
    torch.testing.assert_close(loss, -want)


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = MoeDecoder(SHAPE, checkpointing).double().initialise(0)
        next_token_loss(model, torch.arange(10), Packing([6, 4], "cpu"))[0].backward()
        grads.append([one.grad for one in model.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_counts_are_the_paper_s_and_the_model_s() -> None:
    for shape, dense, sparse, activated, total in (
        (ONE_B, 296e6, 806e6, 397e6, 1.10e9),
        (THREE_B, 479e6, 2.72e9, 823e6, 3.20e9),
        (ELEVEN_B, 479e6, 10.88e9, 823e6, 11.36e9),
    ):
        made = counts(shape)
        for mine, theirs in ((made.dense, dense), (made.sparse, sparse), (made.total, total)):
            assert mine == pytest.approx(theirs, abs=theirs * 0.0035)
        assert made.activated == pytest.approx(activated, rel=0.01)
        with torch.device("meta"):
            model = MoeDecoder(shape)
        assert sum(one.numel() for one in model.parameters()) == made.total + made.query_key_norms


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("routing", [Routing(), Routing(mpi=False, renormalise=True), Routing(matrix="down", normalise_first=False)])
def test_stock_transformers_computes_the_same(tmp_path: Path, routing: Routing, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = MoeDecoder(replace(SHAPE, routing=routing, tied=tied)).initialise(1)
    export_moe(model, tmp_path)
    ids = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(2))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        theirs = stock(ids).logits.log_softmax(-1)
        states, _ = model(ids.flatten(), Packing([11] * 3, "cpu"))
        mine = model.head(states).log_softmax(-1).view_as(theirs)
    assert (mine - theirs).abs().max() < 1e-5


def test_the_exported_router_is_the_effective_one_and_import_then_export_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MoeDecoder(SHAPE).initialise(3)
    export_moe(model, tmp_path / "a")
    written = dict(hub_tensors(model))
    one = next(iter(model.mixtures()))
    want = effective_router(one.router.weight, one.experts.gate, 4.0 / 8**0.5)
    torch.testing.assert_close(written["model.layers.0.mlp.gate.weight"], want.detach(), rtol=0, atol=0)
    again = load_moe(tmp_path / "a")
    assert not again.shape.routing.mpi
    export_moe(again, tmp_path / "b")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    monkeypatch.setattr(moe_files, "SHARD_BYTES", 20_000)
    export_moe(again, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3 and not (tmp_path / "b" / "model.safetensors").exists()
    for mine, theirs in zip(load_moe(tmp_path / "b").parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    onward = load_moe(tmp_path / "a", Routing())
    assert torch.equal(next(iter(onward.mixtures())).router.weight, want.detach())


def test_fresh_weights_come_from_the_seed_alone() -> None:
    first, other = (MoeDecoder(SHAPE).initialise(seed) for seed in (0, 1))
    torch.manual_seed(77)
    again = MoeDecoder(SHAPE).initialise(0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "is a llama, not a qwen3_moe"),
        ({"mlp_only_layers": [0]}, "has dense layers"),
        ({"hidden_size": 64}, r"model.embed_tokens.weight is \[50, 32\], its config.json says \[50, 64\]"),
        ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scales its rotary positions"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    export_moe(MoeDecoder(SHAPE).initialise(0), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ConfigError, match=told):
        load_moe(tmp_path)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gate=sigmoid cannot be exported"):
        export_moe(MoeDecoder(replace(SHAPE, routing=Routing(gate="sigmoid"))).initialise(0), tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_moe(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="top_k=9 must be 1 to experts=8"):
        replace(SHAPE, top_k=9)
    with pytest.raises(ValueError, match="heads=4 must be a multiple of kv_heads=3"):
        replace(SHAPE, kv_heads=3)
    with pytest.raises(ValueError, match=r"ids must be \[7\]"):
        MoeDecoder(SHAPE).initialise(0)(torch.arange(6), Packing([7], "cpu"))


@pytest.mark.parametrize("chosen", [False, True])
def test_grouped_products_give_what_blocks_give(chosen: bool) -> None:
    """The form that CUDA takes, uncompiled; with `chosen`, experts that are elsewhere add nothing."""
    width, inner, experts, tokens, top_k = 32, 24, 6, 50, 3
    weights, indices = drawn(1, tokens, experts + 2 * chosen).softmax(-1).topk(top_k)
    indices = indices.clamp(max=experts)
    if not chosen:
        indices[indices == 4] = 5  # expert 4 has no token
        indices = indices.clamp(max=experts - 1)
    here = int((indices < experts).sum())
    exact = [drawn(0, tokens, width), weights, drawn(2, experts, inner, width), drawn(3, experts, inner, width)]
    exact.append(drawn(4, experts, width, inner))
    exact = [one.bfloat16().double() for one in exact]
    order = indices.flatten().argsort(stable=True)[:here]
    counts = indices.flatten().bincount(minlength=experts)[:experts]
    upstream, found = drawn(9, tokens, width).bfloat16().double(), []
    for form, dtype in ((Grouped, torch.bfloat16), (_Blocked, torch.float64)):
        x, shares, *matrices = (one.to(dtype).requires_grad_() for one in exact)
        out = form.apply(x, shares, order, counts if form is Grouped else counts.tolist(), *matrices)
        out.backward(upstream.to(dtype))
        found.append([one.detach().double() for one in (out, x.grad, shares.grad, *(one.grad for one in matrices))])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()
