"""The mixture-of-experts decoder on a CUDA device in bfloat16. Needs torch alone: no Ray, no engine."""

from __future__ import annotations

import pytest
import torch

from raysys.methods.mpi import effective_router
from raysys.models.experts import mixture
from raysys.models.moe import MoeDecoder, MoeShape, next_token_loss
from raysys.models.packing import Packing
from raysys.models.routing import Routing
from tests.models.test_moe import dense_mixture, drawn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]


def test_grouped_products_are_every_expert_for_every_token_and_so_are_their_gradients() -> None:
    width, inner, experts, tokens = 64, 48, 16, 500
    chosen, indices = drawn(1, tokens, experts).softmax(-1).topk(4)
    indices[indices == 4] = 5  # expert 4 has no token
    exact = [drawn(0, tokens, width), chosen.clone(), drawn(2, experts, inner, width), drawn(3, experts, inner, width)]
    exact.append(drawn(4, experts, width, inner))
    exact = [one.to("cuda", torch.bfloat16).double().cpu() for one in exact]  # both sides start from the same numbers
    upstream, found = drawn(9, tokens, width), []
    for form, device, dtype in ((mixture, "cuda", torch.bfloat16), (dense_mixture, "cpu", torch.float64)):
        x, weights, *matrices = (one.to(device, dtype).requires_grad_() for one in exact)
        out = form(x, weights, indices.to(device), *matrices)
        (out * upstream.to(device, dtype)).sum().backward()
        found.append([one.detach().double().cpu() for one in (out, x.grad, weights.grad, *(one.grad for one in matrices))])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()
    assert not found[0][3][4].any(), "the expert without tokens"


def test_the_router_of_mpi_is_the_same_there() -> None:
    router, gate = drawn(1, 16, 64).float(), drawn(2, 16, 48, 64).float()
    near = effective_router(router, gate, 4.0)
    torch.testing.assert_close(effective_router(router.cuda(), gate.cuda(), 4.0).cpu(), near, rtol=1e-4, atol=1e-6)
    rounded = effective_router(router.cuda().bfloat16(), gate.cuda().bfloat16(), 4.0).float().cpu()
    assert (rounded - near).norm() < 2e-2 * near.norm()


@pytest.mark.parametrize("mpi", [False, True])
def test_a_decoder_in_bfloat16_has_the_loss_and_gradients_of_float32(mpi: bool) -> None:
    shape = MoeShape(
        vocabulary=300, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=8, expert_width=64, routing=Routing(mpi=mpi)
    )  # every expert for every token: a router's choice between near equals would not survive rounding
    lengths = [100, 1, 57, 30]
    ids = torch.randint(300, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        model = MoeDecoder(shape).initialise(0).to(device, dtype)
        nll, count, _ = next_token_loss(model, ids.to(device), Packing(lengths, device))
        (nll / count).backward()
        found.append((float((nll / count).detach()), {name: one.grad.double().cpu() for name, one in model.named_parameters()}))
    (loss, grads), (wanted, exact) = found
    assert loss == pytest.approx(wanted, rel=2e-3)
    for name, grad in grads.items():
        assert (grad - exact[name]).norm() < 0.06 * exact[name].norm() + 1e-7, name


def test_each_run_gives_the_same_bits() -> None:
    found = []
    for _ in range(2):
        chosen, indices = drawn(1, 500, 16).softmax(-1).topk(4)
        exact = [drawn(0, 500, 64), chosen, drawn(2, 16, 48, 64), drawn(3, 16, 48, 64), drawn(4, 16, 64, 48)]
        x, weights, *matrices = (one.to("cuda", torch.bfloat16).requires_grad_() for one in exact)
        mixture(x, weights, indices.cuda(), *matrices).sum().backward()
        found.append([one.grad for one in (x, weights, *matrices)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
