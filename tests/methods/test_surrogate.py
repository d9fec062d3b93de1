"""Losses whose gradient is made in the forward pass, against autograd through the plain form, in float64."""

from __future__ import annotations

import pytest
import torch

from raysys.methods import logprobs_blocks
from raysys.methods.logprobs import surrogate, token_logprobs

N, D, V = 13, 5, 301


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch, request):
    """So many positions whose logits exist at once, in two blocks of the vocabulary."""
    monkeypatch.setattr(logprobs_blocks, "CPU_BLOCK", 1)
    monkeypatch.setattr(logprobs_blocks, "WHOLE_FLOOR", 0)
    monkeypatch.setattr(logprobs_blocks, "WHOLE_SHARE", getattr(request, "param", 4) / D)


however_many = pytest.mark.parametrize("few_at_a_time", [1, 4, 100], indirect=True)


def inputs(k: int = 2, bias: bool = False, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    unembedding = torch.randn(V, D, dtype=dtype, requires_grad=True)
    offset = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    ids = torch.randint(0, V, (N, k))
    ids.view(-1)[0], ids.view(-1)[-1] = 0, V - 1
    return hidden, unembedding, offset, ids


def log_softmax(hidden, unembedding, offset, temperature):
    logits = hidden @ unembedding.T if offset is None else hidden @ unembedding.T + offset
    return torch.log_softmax(logits / temperature, -1)


WEIGHTS = torch.linspace(-1, 2, N, dtype=torch.float64)


def curved(logprobs, weights):
    """A loss a position that is not linear in its log-probs."""
    return (weights[:, None] * (logprobs.exp() + logprobs**2)).sum(1)


def slope_of_curved(rows, logprobs, entropy):
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        return torch.autograd.grad(curved(leaf, WEIGHTS[rows].to(leaf.dtype)).sum(), leaf)[0]


@however_many
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_gradients_equal_those_through_the_plain_form(bias, temperature, chunk):
    hidden, unembedding, offset, ids = inputs(2, bias)
    leaves = [leaf for leaf in (hidden, unembedding, offset) if leaf is not None]
    got = surrogate(hidden, unembedding, ids, slope_of_curved, temperature, chunk, offset, entropy=True)
    table = log_softmax(hidden, unembedding, offset, temperature)
    want = table.gather(1, ids)
    torch.testing.assert_close(got.logprobs, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.entropy, -(table.exp() * table).sum(1), rtol=0, atol=1e-12)
    assert not got.logprobs.requires_grad and not got.entropy.requires_grad
    slopes = slope_of_curved(slice(None), want, None)
    torch.testing.assert_close(got.value, (slopes * want.detach()).sum(), rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * got.value, leaves), torch.autograd.grad(3 * curved(want, WEIGHTS).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@however_many
def test_positions_come_once_and_in_order():
    hidden, unembedding, _, ids = inputs()
    seen = []

    def slope(rows, logprobs, entropy):
        seen.extend(range(N)[rows])
        assert len(logprobs) == len(range(N)[rows]) and len(entropy) == 0
        return torch.ones_like(logprobs)

    surrogate(hidden, unembedding, ids, slope)
    assert seen == list(range(N))


@however_many
def test_equals_the_backward_pass_of_its_own(monkeypatch):
    hidden, unembedding, _, ids = inputs(1)
    mine = surrogate(hidden, unembedding, ids[:, 0], lambda rows, lp, _: -torch.ones_like(lp) / N)
    theirs = -token_logprobs(hidden, unembedding, ids[:, 0]).mean()
    assert mine.logprobs.shape == (N,)
    for a, b in zip(
        torch.autograd.grad(mine.value, (hidden, unembedding)), torch.autograd.grad(theirs, (hidden, unembedding)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_bfloat16_sums_are_float32():
    hidden, unembedding, _, ids = inputs(2, dtype=torch.bfloat16)
    wide = hidden.detach().double().requires_grad_(), unembedding.detach().double().requires_grad_()
    got = torch.autograd.grad(surrogate(hidden, unembedding, ids, slope_of_curved).value, (hidden, unembedding))
    want = torch.autograd.grad(curved(log_softmax(*wide, None, 1.0).gather(1, ids), WEIGHTS).sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03 * float(b.abs().max()))


def test_a_slope_of_zero_leaves_a_position_out_whatever_it_holds():
    hidden, unembedding, _, ids = inputs()
    bad = hidden.detach().clone()
    bad[3] = torch.inf
    bad.requires_grad_()

    def slope(rows, logprobs, entropy):
        return torch.ones_like(logprobs) * (torch.arange(N)[rows] != 3)[:, None]

    assert torch.isfinite(surrogate(bad, unembedding, ids, slope).value)


def test_only_wanted_gradients_are_made_and_none_without_autograd():
    hidden, unembedding, _, ids = inputs()
    surrogate(hidden, unembedding.detach(), ids, slope_of_curved).value.backward()
    assert hidden.grad is not None and unembedding.grad is None
    with torch.no_grad():
        assert not surrogate(hidden, unembedding, ids, slope_of_curved).value.requires_grad


def test_a_second_backward_pass_is_refused():
    hidden, unembedding, _, ids = inputs()
    value = surrogate(hidden, unembedding, ids, slope_of_curved).value
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_no_positions():
    hidden, unembedding, _, ids = inputs()
    found = surrogate(hidden[:0], unembedding, ids[:0], slope_of_curved)
    for grad in torch.autograd.grad(found.value, (hidden, unembedding)):
        assert not grad.any()


def test_a_slope_of_another_shape_is_refused():
    hidden, unembedding, _, ids = inputs()
    with pytest.raises(ValueError, match=r"slope must give \[4, 2\] for these positions, gave \[4\]"):
        surrogate(hidden, unembedding, ids, lambda rows, lp, _: lp[:, 0])


def test_positions_at_a_real_size():
    """What exists at once stays below an eighth of the plain form's three copies of all logits."""
    width, vocabulary, n = 1536, 151_936, 8192
    logprobs_blocks.WHOLE_SHARE, logprobs_blocks.WHOLE_FLOOR = 3 / 4, 2**26
    hidden, unembedding = (torch.empty(size, width, device="meta") for size in (n, vocabulary))
    parts = logprobs_blocks.Head(hidden, unembedding, None, 1.0, n).wholes()
    largest = max(part.stop - part.start for part in parts)
    assert 4 * largest * vocabulary + unembedding.nbytes + hidden.nbytes < (3 * 4 * n * vocabulary + unembedding.nbytes) / 8
    assert [part.start for part in parts] == [0, *[part.stop for part in parts[:-1]]] and parts[-1].stop == n
