"""Draws by inversion in the pass that finds the normaliser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raysys.methods import hpd, logprobs_blocks
from raysys.methods.logprobs import draw_logprobs, draw_tokens, token_logprobs

N, D, V = 13, 5, 301
CHUNKS = (1, 7, 64, 10**6)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of the vocabulary even at this size (their smallest width is 256)."""
    monkeypatch.setattr(logprobs_blocks, "CPU_BLOCK", 1)


def inputs(n: int = N, v: int = V, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype)
    unembedding = torch.randn(v, D, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, unembedding, torch.rand(n, generator=generator, dtype=torch.float64)


def inverted(logits: Tensor, uniform: Tensor) -> Tensor:
    """The definition, in float64."""
    return (torch.softmax(logits.double(), -1).cumsum(-1) <= uniform[:, None]).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_float64_is_the_definition(chunk, bias, temperature):
    hidden, unembedding, uniform = inputs(400)
    offset = torch.linspace(-2, 2, V, dtype=torch.float64) if bias else None
    ids, logprobs = draw_tokens(hidden, unembedding, uniform, temperature, chunk, offset)
    logits = (hidden @ unembedding.T + (0 if offset is None else offset)) / temperature
    assert torch.equal(ids, inverted(logits, uniform))
    want = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-12)
    assert len(ids.unique()) > 50


def test_equals_the_draw_of_the_loss_on_logits():
    hidden, unembedding, _ = inputs(500)
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want = hpd._draw(hidden @ unembedding.T, torch.arange(500), torch.Generator().manual_seed(3), 100)
    assert torch.equal(draw_tokens(hidden, unembedding, uniform)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_blocks_do_not_change_draws(dtype, monkeypatch):
    hidden, unembedding, uniform = inputs(1500, 2000, dtype)
    want, want_logprobs = draw_tokens(hidden, unembedding, uniform)
    wide = hidden.double() @ unembedding.double().T
    edges = torch.softmax(wide, -1).cumsum(-1)
    near = (edges - uniform[:, None]).abs().min(-1).values < 2e-7
    assert near.float().mean() < 0.01
    assert torch.equal(want[~near], inverted(wide, uniform)[~near])
    for block in (1, 2**11, 2**30):
        monkeypatch.setattr(logprobs_blocks, "CPU_BLOCK", block)
        for chunk in CHUNKS[1:]:
            ids, logprobs = draw_tokens(hidden, unembedding, uniform, chunk_tokens=chunk)
            assert torch.equal(ids[~near], want[~near])
            torch.testing.assert_close(logprobs[~near], want_logprobs[~near], rtol=0, atol=1e-5)


def test_frequencies_are_the_softmax():
    n, v = 40_000, 300
    hidden = torch.randn(1, D, generator=torch.Generator().manual_seed(0)).expand(n, D).contiguous()
    unembedding = 0.2 * torch.randn(v, D, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids, _ = draw_tokens(hidden, unembedding, uniform, 0.8)
    expected = n * torch.softmax(hidden[0].double() @ unembedding.double().T / 0.8, -1)
    assert expected.min() > 5
    chi_square = ((torch.bincount(ids, minlength=v) - expected) ** 2 / expected).sum()
    assert abs(chi_square - (v - 1)) < 4 * (2 * (v - 1)) ** 0.5  # mean and standard deviation of the distribution


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ids_of_probability_zero_are_never_drawn(dtype):
    hidden, unembedding, _ = inputs(64, 600, dtype)
    bias = torch.full((600,), -torch.inf, dtype=dtype)
    allowed = torch.tensor([3, 301, 302, 599])
    bias[allowed] = 0
    ends = torch.tensor([0.0, 5e-324, 1e-300, 1e-16, 0.5, 1 - 2**-53, 1 - 2**-30], dtype=torch.float64)
    for value in ends:
        ids, logprobs = draw_tokens(hidden, unembedding, value.expand(64).contiguous(), bias=bias)
        assert torch.isin(ids, allowed).all() and torch.isfinite(logprobs).all()
    bias[allowed[1:]] = -torch.inf
    assert (draw_tokens(hidden, unembedding, ends[-2].expand(64).contiguous(), bias=bias)[0] == 3).all()


def test_a_number_of_zero_finds_the_first_id_that_float32_can_tell_from_zero():
    unembedding = torch.zeros(600, 1)
    unembedding[:256], unembedding[256:400], unembedding[599] = -120.0, -80.0, 0.0
    ids, _ = draw_tokens(torch.ones(1, 1), unembedding, torch.zeros(1, dtype=torch.float64))
    assert ids.tolist() == [256]


def test_bfloat16_draws_from_float32_logits():
    """At logits near 20, bfloat16 would round 0.06 apart: hundreds of ids would share one probability."""
    v = 4096
    hidden = torch.full((20_000, 2), 1.0, dtype=torch.bfloat16)
    unembedding = torch.stack([torch.full((v,), 20.0), torch.linspace(0, 0.1, v)], 1).to(torch.bfloat16)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ids, _ = draw_tokens(hidden, unembedding, uniform)
    want = inverted(hidden[:1].double() @ unembedding.double().T, uniform)
    assert (ids - want).abs().max() <= 1


def test_draws_and_asked_for_ids_from_one_pass():
    hidden, unembedding, uniform = inputs()
    leaves = (hidden.requires_grad_(), unembedding.requires_grad_())
    ids = torch.randint(0, V, (N, 2), generator=torch.Generator().manual_seed(5))
    drawn = draw_logprobs(hidden, unembedding, ids, uniform, 0.7, 4, entropy=True)
    assert torch.equal(drawn.draws, draw_tokens(hidden, unembedding, uniform, 0.7)[0])
    both = torch.cat([ids, drawn.draws[:, None]], 1)
    want, entropy = token_logprobs(hidden, unembedding, both, 0.7, entropy=True)
    torch.testing.assert_close(drawn.logprobs, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.entropy, entropy, rtol=0, atol=1e-12)
    upstream = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(drawn.logprobs, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert draw_logprobs(hidden, unembedding, ids[:, 0], uniform).logprobs.shape == (N, 2)
    assert not draw_tokens(hidden, unembedding, uniform)[1].requires_grad


def test_nan_gives_a_valid_id_and_says_so():
    hidden, unembedding, uniform = inputs()
    hidden[4] = torch.nan
    ids, logprobs = draw_tokens(hidden, unembedding, uniform)
    assert (ids >= 0).all() and (ids < V).all()
    assert torch.isnan(logprobs).nonzero()[:, 0].tolist() == [4]


def test_no_positions():
    hidden, unembedding, uniform = inputs()
    ids, logprobs = draw_tokens(hidden[:0], unembedding, uniform[:0])
    assert ids.shape == logprobs.shape == (0,) and ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("uniform", "message"),
    [
        (torch.zeros(2), "uniform must be float64 [2]"),
        (torch.zeros(3, dtype=torch.float64), "uniform must be float64 [2]"),
        (torch.tensor([0.0, 1.0], dtype=torch.float64), "uniform must lie in [0, 1)"),
        (torch.tensor([0.0, torch.nan], dtype=torch.float64), "uniform must lie in [0, 1)"),
    ],
)
def test_bad_numbers_are_refused(uniform, message):
    with pytest.raises(ValueError) as error:
        draw_tokens(torch.zeros(2, D), torch.zeros(V, D), uniform)
    assert message in str(error.value)
