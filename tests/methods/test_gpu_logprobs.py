"""Blockwise log-probs on a CUDA device at a real vocabulary. Needs torch alone: no Ray, no engine."""

from __future__ import annotations

import pytest
import torch

from raysys.methods import logprobs_blocks, logprobs_kernels
from raysys.methods.logprobs import draw_logprobs, draw_tokens, surrogate, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]

N, D, V = 700, 256, 151_936


def inputs(dtype: torch.dtype, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=generator).to("cuda", dtype).requires_grad_()
    unembedding = (torch.randn(V, D, generator=generator) / D**0.5).to("cuda", dtype).requires_grad_()
    return hidden, unembedding, torch.randint(0, V, (n, 2), generator=generator).cuda()


# Relative error of a gradient: one rounding to the dtype of it and of dz, and bfloat16 products summed over V or N.
@pytest.mark.parametrize(("dtype", "gap", "relative"), [(torch.float32, 2e-5, 2e-5), (torch.bfloat16, 2e-4, 1e-2)])
def test_equals_float64_on_the_same_inputs(dtype, gap, relative):
    hidden, unembedding, ids = inputs(dtype)
    weights = torch.randn(N, 2, generator=torch.Generator().manual_seed(1)).cuda()
    got, entropy = token_logprobs(hidden, unembedding, ids, 0.9, 256, entropy=True)
    grads = torch.autograd.grad(got, (hidden, unembedding), weights)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, unembedding)]
    table = torch.log_softmax(wide[0] @ wide[1].T / 0.9, -1)
    want = table.gather(1, ids)
    want_grads = torch.autograd.grad(want, wide, weights.double())
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < gap
    assert (entropy + (table.detach().exp() * table.detach()).sum(-1)).abs().max() < 5 * gap
    for mine, theirs in zip(grads, want_grads, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() < relative * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_an_eighth_of_the_plain_form(dtype):
    hidden, unembedding, ids = inputs(dtype, 4096)  # fewer positions' logits are not much beside the unembedding's gradient

    def peak(call) -> int:
        hidden.grad = unembedding.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    blockwise = peak(lambda: token_logprobs(hidden, unembedding, ids, chunk_tokens=256))
    plain = peak(lambda: torch.log_softmax((hidden @ unembedding.T).float(), -1).gather(1, ids))
    assert blockwise < plain / 8, (blockwise, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1024, 50])
def test_a_gradient_made_in_the_forward_pass_is_that_of_the_backward_pass(dtype, chunk):
    slopes = torch.randn(N, 2, generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for form in ("surrogate", "token_logprobs"):
        hidden, unembedding, ids = inputs(dtype)
        if form == "surrogate":
            made = surrogate(hidden, unembedding, ids, lambda rows, *_: slopes[rows], 0.9, chunk, entropy=True)
            loss, values = made.value, (made.logprobs, made.entropy)
        else:
            values = token_logprobs(hidden, unembedding, ids, 0.9, 1024, entropy=True)
            loss = (values[0] * slopes).sum()
        loss.backward()
        found.append((*(value.detach() for value in values), hidden.grad, unembedding.grad))
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.double() - theirs.double()).norm() < (2e-5 if dtype == torch.float32 else 1e-2) * theirs.double().norm()


def test_chunks_do_not_matter():
    hidden, unembedding, ids = inputs(torch.float32)
    whole, parts = (token_logprobs(hidden, unembedding, ids, chunk_tokens=chunk) for chunk in (1024, 100))
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_is_used_and_equals_torch(dtype, monkeypatch):
    """Both take the same products, so what is between them is a matter of float32 (of one rounding of dz in bfloat16)."""
    pytest.importorskip("triton")
    hidden, unembedding, ids = inputs(dtype)
    bias = torch.linspace(-1, 1, V, device="cuda").to(dtype).requires_grad_()
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cuda()
    plain = logprobs_kernels.Kernels(logprobs_kernels.fold, logprobs_kernels.slope)
    assert logprobs_kernels.kernels_for(hidden.float()).fold is not plain.fold
    leaves, upstream = (hidden, unembedding, bias), torch.randn(N, 3, generator=torch.Generator().manual_seed(1)).cuda()
    upstream[:, 2] = 0  # of the draw, which may differ where a number is within rounding of a boundary
    mine = draw_logprobs(hidden, unembedding, ids, uniform, 0.9, 256, bias, entropy=True)
    my_grads = torch.autograd.grad(mine.logprobs, leaves, upstream)
    monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: plain)
    theirs = draw_logprobs(hidden, unembedding, ids, uniform, 0.9, 256, bias, entropy=True)
    their_grads = torch.autograd.grad(theirs.logprobs, leaves, upstream)
    same = mine.draws == theirs.draws
    assert same.float().mean() > 0.99
    assert (mine.logprobs - theirs.logprobs)[same].abs().max() < 1e-5
    assert (mine.entropy - theirs.entropy).abs().max() < 1e-4
    for a, b in zip(my_grads, their_grads, strict=True):
        assert (a.double() - b.double()).norm() < (1e-5 if dtype == torch.float32 else 4e-3) * b.double().norm()


def test_draws_are_the_inversion():
    hidden, unembedding, _ = inputs(torch.float32)
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cuda()
    edges = torch.softmax(hidden.detach().double() @ unembedding.detach().double().T / 0.8, -1).cumsum(-1)
    want = (edges <= uniform[:, None]).sum(-1)
    near = (edges - uniform[:, None]).abs().min(-1).values < 1e-6
    for chunk in (64, 1024):
        ids, _ = draw_tokens(hidden, unembedding, uniform, 0.8, chunk)
        assert torch.equal(ids[~near], want[~near])
    assert near.float().mean() < 0.5
