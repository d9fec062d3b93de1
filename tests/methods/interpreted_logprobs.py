"""The Triton kernels in Triton's interpreter. Run by `test_triton_logprobs.py` in a process of its own, which sets TRITON_INTERPRET."""

from __future__ import annotations

import pytest
import torch

from raysys.methods import logprobs_blocks, logprobs_cuda
from raysys.methods.logprobs import draw_logprobs, draw_tokens, surrogate, token_logprobs
from raysys.methods.logprobs_kernels import Block, Kernels, Running, fold, slope

N, D, V = 7, 5, 301
TRITON = Kernels(logprobs_cuda.fold, logprobs_cuda.slope, leaves_products=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Two blocks of the vocabulary of several tiles each, the last of them ragged; nothing is kept, as on a GPU."""
    monkeypatch.setattr(logprobs_blocks, "CPU_BLOCK", 1)
    monkeypatch.setattr(logprobs_blocks.Kept, "plan", lambda *_: logprobs_blocks.Kept())
    monkeypatch.setattr(logprobs_cuda, "TILE", 64)


def rows_block(bias: bool, k: int, spread: float = 1.0, w: int = 150) -> Block:
    generator = torch.Generator().manual_seed(0)
    product = spread * torch.randn(N, w, generator=generator)
    offset = torch.randn(w, generator=generator) if bias else None
    ids = torch.randint(90, 260, (N, 2 * k), generator=generator)[:, ::2]  # some left of the block, some right of it; strided
    return Block(product, offset, 0.7, ids, 100)


def copy(block: Block) -> Block:
    return Block(block.product.clone(), block.bias, block.temperature, block.ids, block.start)


def running(k: int, entropy: bool, drawing: bool) -> Running:
    zeros = torch.zeros(N)
    mass = zeros.to(torch.float64 if drawing else torch.float32)
    peak = torch.full_like(zeros, torch.finfo(torch.float32).min)
    return Running(torch.zeros(N, k), peak, mass.clone(), zeros.clone() if entropy else None, mass.clone() if drawing else None)


@pytest.mark.parametrize(
    ("bias", "entropy", "drawing"), [(False, False, False), (True, False, True), (False, True, True), (True, True, False)]
)
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_fold_is_the_plain_one(bias, entropy, drawing, spread):
    mine, theirs = running(2, entropy, drawing), running(2, entropy, drawing)
    for scale in (spread, 2 * spread, 0.1 * spread):  # the peak rises, then stays
        block = rows_block(bias, 2, scale)
        logprobs_cuda.fold(copy(block), mine, False)
        fold(copy(block), theirs, False)
        for name in ("selected", "peak", "mass", "moment", "own"):
            got, want = getattr(mine, name), getattr(theirs, name)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slope_is_the_plain_one(bias, dtype):
    block = rows_block(bias, 3)
    block.ids[:, 2] = block.ids[:, 1]  # the same id twice
    generator = torch.Generator().manual_seed(1)
    log_z, grad = 5 + torch.rand(N, generator=generator), torch.randn(3, N, generator=generator).t()
    total = -grad.sum(1)
    got = logprobs_cuda.slope(copy(block), log_z, grad, total, dtype)
    want = slope(copy(block), log_z, grad, total, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


def inputs(bias: bool):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    unembedding = torch.randn(V, D, generator=generator, requires_grad=True)
    offset = torch.randn(V, generator=generator, requires_grad=True) if bias else None
    return hidden, unembedding, offset, torch.randint(0, V, (N, 2), generator=generator)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_whole_function(bias, chunk, monkeypatch):
    hidden, unembedding, offset, ids = inputs(bias)
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, unembedding, offset) if leaf is not None]
    upstream = torch.linspace(-1, 1, 3 * N).view(N, 3)
    want = draw_logprobs(hidden, unembedding, ids, uniform, 0.7, chunk, offset, entropy=True)
    want_grads = torch.autograd.grad(want.logprobs, leaves, upstream)
    monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: TRITON)
    got = draw_logprobs(hidden, unembedding, ids, uniform, 0.7, chunk, offset, entropy=True)
    assert torch.equal(got.draws, want.draws)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got.logprobs, leaves, upstream), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_made_in_the_forward_pass(bias, chunk, dtype, monkeypatch):
    monkeypatch.setattr(logprobs_blocks, "WHOLE_FLOOR", 0)
    monkeypatch.setattr(logprobs_blocks, "WHOLE_SHARE", 3 / D)  # three positions at a time
    slopes, found = torch.linspace(-1, 1, 2 * N).view(N, 2), []
    for kernels in (None, TRITON):
        hidden, unembedding, offset, ids = inputs(bias)
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, unembedding, offset) if leaf is not None]
        if kernels is not None:
            monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: TRITON)
        made = surrogate(*leaves[:2], ids, lambda rows, *_: slopes[rows], 0.7, chunk, leaves[2] if bias else None, entropy=True)
        made.value.backward()
        found.append([made.value.detach(), made.logprobs, made.entropy, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        # In bfloat16 what is kept is rounded on one side, each dz on both.
        assert (mine.double() - theirs.double()).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * theirs.double().norm()


def test_a_bias_of_minus_infinity_forbids_tokens(monkeypatch):
    hidden, unembedding, offset, _ = inputs(True)
    with torch.no_grad():
        offset[:256] = -torch.inf  # the whole first block
    allowed = torch.full((N,), 300)
    monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: TRITON)
    got, entropy = token_logprobs(hidden, unembedding, allowed, bias=offset, entropy=True)
    want = torch.log_softmax(hidden @ unembedding[256:].T + offset[256:], -1)
    torch.testing.assert_close(got, want[:, 44], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1), rtol=0, atol=1e-5)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(got.sum(), (hidden, unembedding)))
    drawn, _ = draw_tokens(hidden, unembedding, torch.zeros(N, dtype=torch.float64), bias=offset)
    assert (drawn == 256).all()


def test_no_positions(monkeypatch):
    hidden, unembedding, _, ids = inputs(False)
    monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: TRITON)
    token_logprobs(hidden[:0], unembedding, ids[:0]).sum().backward()
    assert torch.equal(unembedding.grad, torch.zeros_like(unembedding))
