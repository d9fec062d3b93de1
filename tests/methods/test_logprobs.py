"""Blockwise log-probs against log_softmax and gather, in float64."""

from __future__ import annotations

import pytest
import torch

from raysys.methods import logprobs_blocks
from raysys.methods.logprobs import token_logprobs

N, D, V = 13, 5, 301


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, request):
    """Two blocks of the vocabulary even at this size, of which backward finds one as the forward pass left it, or none, or both."""
    kept = getattr(request, "param", "one kept")
    monkeypatch.setattr(logprobs_blocks, "CPU_BLOCK", 1)
    monkeypatch.setattr(logprobs_blocks, "KEPT_FLOOR", 2**26 if kept == "all kept" else 0)
    monkeypatch.setattr(logprobs_blocks, "KEPT_SHARE", 0.7 if kept == "one kept" else 0)


however_many_kept = pytest.mark.parametrize("small_blocks", ["none kept", "one kept", "all kept"], indirect=True)


def inputs(k: int | None = None, bias: bool = False, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    unembedding = torch.randn(V, D, dtype=dtype, requires_grad=True)
    offset = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    ids = torch.randint(0, V, (N,) if k is None else (N, k))
    ids.view(-1)[0], ids.view(-1)[-1] = 0, V - 1  # ends of the first and the last block
    return hidden, unembedding, offset, ids


def plain(hidden, unembedding, offset, ids, temperature):
    logits = hidden @ unembedding.T if offset is None else hidden @ unembedding.T + offset
    table = torch.log_softmax(logits / temperature, -1)
    picked = table.gather(1, ids if ids.dim() == 2 else ids[:, None])
    return picked.reshape(ids.shape), -(table.exp() * table).sum(-1)


@however_many_kept
@pytest.mark.parametrize("k", [None, 1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_value_and_gradients_equal_the_plain_form(k, bias, temperature, chunk):
    hidden, unembedding, offset, ids = inputs(k, bias)
    leaves = [leaf for leaf in (hidden, unembedding, offset) if leaf is not None]
    got, got_entropy = token_logprobs(hidden, unembedding, ids, temperature, chunk, offset, entropy=True)
    want, want_entropy = plain(hidden, unembedding, offset, ids, temperature)
    assert got.shape == ids.shape and got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_entropy, want_entropy, rtol=0, atol=1e-12)
    assert not got_entropy.requires_grad
    upstream = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@however_many_kept
def test_gradients_equal_finite_differences():
    hidden, unembedding, offset, ids = inputs(2, bias=True)
    assert torch.autograd.gradcheck(
        lambda h, u, b: token_logprobs(h, u, ids[:3], 0.8, 2, b),
        (hidden[:3], unembedding, offset),
        fast_mode=True,
        nondet_tol=1e-12,  # the second backward pass of a graph finds nothing kept
    )


@however_many_kept
def test_a_graph_may_be_gone_through_twice():
    hidden, unembedding, _, ids = inputs()
    out = token_logprobs(hidden, unembedding, ids).sum()
    first, second = (torch.autograd.grad(out, (hidden, unembedding), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_nothing_is_kept_without_gradients(monkeypatch):
    asked = []
    monkeypatch.setattr(logprobs_blocks.Kept, "plan", lambda *_: asked.append(True) or logprobs_blocks.Kept())
    hidden, unembedding, _, ids = inputs()
    with torch.no_grad():
        token_logprobs(hidden, unembedding, ids)
    token_logprobs(hidden.detach(), unembedding.detach(), ids)
    assert not asked
    token_logprobs(hidden, unembedding, ids)
    assert asked


def test_what_is_kept_costs_no_peak(monkeypatch):
    monkeypatch.undo()
    width, vocabulary = 1536, 151_936
    for n, dtype in ((1024, torch.float32), (2048, torch.float32), (8192, torch.float32), (2048, torch.bfloat16)):
        tensors = (torch.empty(size, width, dtype=dtype, device="meta") for size in (n, vocabulary))
        head = logprobs_blocks.Head(*tensors, None, 1.0, 1024)
        start, stop = head.blocks()[0]
        kept = logprobs_blocks.Kept.plan(head, True)
        taken = min(kept.limit, len(head.blocks())) * n * (stop - start) * dtype.itemsize
        assert taken <= max(head.unembedding.nbytes, n * vocabulary * 4 / 3)
        assert (kept.limit >= len(head.blocks())) == (n <= width)


@however_many_kept
def test_chunks_give_the_same_loss_and_gradients():
    hidden, unembedding, _, ids = inputs(2)
    losses, grads = [], []
    for chunk in (1, 7, 64, 10**6):
        loss = -token_logprobs(hidden, unembedding, ids, 0.9, chunk).mean()
        losses.append(loss.detach())
        grads.append(torch.autograd.grad(loss, (hidden, unembedding)))
    for loss, pair in zip(losses[1:], grads[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-13)
        for a, b in zip(pair, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_the_same_id_asked_for_twice():
    hidden, unembedding, _, ids = inputs()
    once = token_logprobs(hidden, unembedding, ids)
    twice = token_logprobs(hidden, unembedding, ids[:, None].repeat(1, 2))
    assert torch.equal(twice, once[:, None].expand(-1, 2))
    torch.testing.assert_close(
        torch.autograd.grad(twice.sum(), unembedding)[0], torch.autograd.grad(2 * once.sum(), unembedding)[0], rtol=0, atol=1e-12
    )


@however_many_kept
def test_tied_weights_gather_both_gradients():
    torch.manual_seed(1)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (N,))
    tokens = torch.randint(0, V, (N,))
    got = torch.autograd.grad(token_logprobs(torch.tanh(weight[tokens]), weight, ids, chunk_tokens=4).sum(), weight)[0]
    want = torch.autograd.grad(plain(torch.tanh(weight[tokens]), weight, None, ids, 1.0)[0].sum(), weight)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_only_wanted_gradients_are_made():
    hidden, unembedding, _, ids = inputs()
    token_logprobs(hidden, unembedding.detach(), ids).sum().backward()
    assert hidden.grad is not None and unembedding.grad is None
    hidden.grad = None
    token_logprobs(hidden.detach(), unembedding, ids).sum().backward()
    assert hidden.grad is None and unembedding.grad is not None
    assert not token_logprobs(hidden.detach(), unembedding.detach(), ids).requires_grad


@however_many_kept
def test_extreme_logits_stay_finite_and_never_above_zero():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], dtype=torch.float32, requires_grad=True)
    unembedding = torch.linspace(-1, 1, V)[:, None].requires_grad_()
    out, entropy = token_logprobs(hidden, unembedding, torch.tensor([V - 1, 0, 7]), chunk_tokens=2, entropy=True)
    out.sum().backward()
    assert (out <= 0).all() and out[0] > -1e-6 and out[1] > -1e-6
    assert torch.isfinite(entropy).all() and torch.isfinite(hidden.grad).all() and torch.isfinite(unembedding.grad).all()


@however_many_kept
def test_a_bias_of_minus_infinity_forbids_tokens():
    hidden, unembedding, offset, ids = inputs(bias=True)
    with torch.no_grad():
        offset[:256] = -torch.inf  # the whole first block
    allowed = torch.full_like(ids, 300)
    got, entropy = token_logprobs(hidden, unembedding, allowed, bias=offset, entropy=True)
    want = torch.log_softmax(hidden @ unembedding[256:].T + offset[256:], -1)
    torch.testing.assert_close(got, want[:, 44], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(want.exp() * want).sum(-1), rtol=0, atol=1e-12)
    assert torch.isfinite(torch.autograd.grad(got.sum(), hidden)[0]).all()


@however_many_kept
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_normalise_in_float32(dtype):
    hidden, unembedding, _, ids = inputs(dtype=dtype)
    got, entropy = token_logprobs(hidden, unembedding, ids, 0.9, 4, entropy=True)
    want = torch.log_softmax((hidden.float() @ unembedding.T.float()) / 0.9, -1)
    assert got.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(got, want.gather(1, ids[:, None])[:, 0], rtol=0, atol=2e-6)  # bfloat16 rounds inputs, not logits
    got_grads = torch.autograd.grad(got.sum(), (hidden, unembedding))
    want_grads = torch.autograd.grad(want.gather(1, ids[:, None]).sum(), (hidden, unembedding))
    for a, b in zip(got_grads, want_grads, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.03)


def test_no_positions_still_reach_the_parameters():
    hidden, unembedding, _, ids = inputs()
    out, entropy = token_logprobs(hidden[:0], unembedding, ids[:0], entropy=True)
    assert out.shape == entropy.shape == (0,)
    out.sum().backward()
    assert torch.equal(unembedding.grad, torch.zeros_like(unembedding))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, V])}, f"ids must lie in [0, {V}), got {V}"),
        ({"ids": torch.tensor([-1, 0])}, "got -1"),
        ({"ids": torch.tensor([0])}, "ids must be [2]"),
        ({"ids": torch.tensor([0.0, 1.0])}, "ids must be integers"),
        ({"hidden": torch.zeros(2, 1, D)}, "hidden must be floating [N, D]"),
        ({"unembedding": torch.zeros(0)}, "unembedding must be [V, 5]"),
        ({"unembedding": torch.zeros(V, D, dtype=torch.bfloat16)}, "unembedding is torch.bfloat16"),
        ({"bias": torch.zeros(1)}, "bias must be [301]"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer, got 0"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    good = {"hidden": torch.zeros(2, D), "unembedding": torch.zeros(V, D), "ids": torch.tensor([0, 1])}
    with pytest.raises(ValueError) as error:
        token_logprobs(**{**good, **change})
    assert message in str(error.value)
