"""HPD against the paper's equations; the numbers in the names are those of the spec's testable properties (8.1)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from raysys.methods import hpd
from raysys.methods.gopd import policy_loss

B, R, V = 3, 5, 7


def logits(seed: int = 0, vocabulary: int = V, scale: float = 1.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(B, R, vocabulary, generator=dice, dtype=torch.float64) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def tokens(seed: int = 0, vocabulary: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Data tokens, draws, mask."""
    dice = torch.Generator().manual_seed(100 + seed)
    expert, draw = (torch.randint(vocabulary, (B, R), generator=dice) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    return expert, draw, mask


def picked(student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    lq, lp = (torch.log_softmax(x, -1).gather(-1, ids[..., None])[..., 0] for x in (student, teacher))
    return lq, lp


def by_equations(q: float, p: float, q_draw: float, p_draw: float, same: bool, sampled: bool = True, doubled: bool = True):
    """Eqs. 11 to 14 in plain numbers."""
    k, k_draw = q * math.log(p / q), q_draw * math.log(p_draw / q_draw)
    expert = k if k < 0 else p + k
    if sampled and doubled and k > 0 and k_draw < 0:
        expert = 2 * p + k
    return expert, k_draw if sampled and not same and k_draw < 0 else 0.0


@pytest.mark.parametrize(("sampled", "doubled"), [(True, True), (True, False), (False, True), (False, False)])
def test_1_weights_are_those_of_the_equations_in_all_sign_combinations(sampled: bool, doubled: bool) -> None:
    for (q, p), (qs, ps), same in itertools.product(
        [(0.2, 0.6), (0.6, 0.2), (0.3, 0.3)], [(0.1, 0.5), (0.5, 0.1), (0.4, 0.4)], [False, True]
    ):
        given = [torch.tensor([[math.log(x)]], dtype=torch.float64) for x in (q, p, qs, ps)]
        found = hpd.token_weights(*given, torch.tensor([[same]]), sampled, doubled)
        assert [float(x) for x in found] == pytest.approx(by_equations(q, p, qs, ps, same, sampled, doubled), abs=1e-15)


def test_1_a_probability_that_underflows_keeps_its_branch() -> None:
    """Float32: exp(-120) is 0, so k is 0; the token that the student misses still gets the teacher's weight."""
    missing, likely, nowhere = (torch.tensor([[x]]) for x in (-120.0, -0.5, -math.inf))
    other = torch.tensor([[False]])
    w, _ = hpd.token_weights(missing, likely, likely, likely, other)
    assert float(w) == pytest.approx(math.exp(-0.5))
    assert float(hpd.token_weights(missing, likely, likely, missing, other)[0]) == pytest.approx(2 * math.exp(-0.5))
    assert float(hpd.token_weights(nowhere, likely, likely, likely, other)[0]) == pytest.approx(math.exp(-0.5))
    assert float(hpd.token_weights(nowhere, nowhere, likely, likely, other)[0]) == 0.0


def closed_form(student: Tensor, teacher: Tensor, expert: Tensor, draw: Tensor, mask: Tensor, **toggles: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient of Eqs. 15 and 10, every number by hand."""
    with torch.no_grad():
        (lq, lp), (lqs, lps) = picked(student, teacher, expert), picked(student, teacher, draw)
        w, ws = hpd.token_weights(lq, lp, lqs, lps, expert == draw, **toggles)
        n, q = mask.sum(), student.softmax(-1)
        value = -((w * lq + ws * lqs) * mask).sum() / n
        one = torch.nn.functional.one_hot
        grad = -(w[..., None] * (one(expert, V) - q) + ws[..., None] * (one(draw, V) - q)) * mask[..., None] / n
        return value, grad


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
@pytest.mark.parametrize("toggles", [{}, {"use_reinforce": False}, {"use_student_sample": False}])
def test_2_and_3_loss_and_gradient_are_the_closed_form_whatever_the_chunk(chunk: int | None, toggles: dict[str, bool]) -> None:
    for seed in range(4):
        (student, teacher), (expert, draw, mask) = logits(seed), tokens(seed)
        value, _ = hpd.loss(student, teacher, expert, mask, draw, chunk_tokens=chunk, **toggles)
        (grad,) = torch.autograd.grad(value, student)
        want, want_grad = closed_form(student, teacher, expert, draw, mask, **toggles)
        torch.testing.assert_close(value, want, rtol=0, atol=1e-14)
        torch.testing.assert_close(grad, want_grad, rtol=0, atol=1e-14)
        assert grad.sum(-1).abs().max() < 1e-15 and not grad[~mask].any() and grad[mask].any()


def test_2_finite_differences_with_the_weights_held() -> None:
    (student, teacher), (expert, draw, mask) = logits(1), tokens(1)
    (lq, lp), (lqs, lps) = picked(student.detach(), teacher, expert), picked(student.detach(), teacher, draw)
    w, ws = hpd.token_weights(lq, lp, lqs, lps, expert == draw)

    def held(z: Tensor) -> Tensor:
        now, drawn = picked(z, teacher, expert)[0], picked(z, teacher, draw)[0]
        return -((w * now + ws * drawn) * mask).sum() / mask.sum()

    value, _ = hpd.loss(student, teacher, expert, mask, draw)
    (grad,) = torch.autograd.grad(value, student)
    for b, r, v in itertools.product(range(2), range(R), range(V)):
        step = torch.zeros_like(student)
        step[b, r, v] = 1e-6
        slope = (held(student.detach() + step) - held(student.detach() - step)) / 2e-6
        assert float(grad[b, r, v]) == pytest.approx(float(slope), abs=1e-8)


def test_3_differs_from_differentiating_the_weights_too() -> None:
    (student, teacher), (expert, draw, mask) = logits(2), tokens(2)
    value, _ = hpd.loss(student, teacher, expert, mask, draw, use_student_sample=False)
    (grad,) = torch.autograd.grad(value, student)
    lq, lp = picked(student, teacher, expert)
    k = lq.exp() * (lp - lq)
    through = -((torch.where(k < 0, k, lp.exp() + k) * lq) * mask).sum() / mask.sum()
    torch.testing.assert_close(through, value)
    assert (torch.autograd.grad(through, student)[0] - grad).abs().max() > 1e-3


def test_4_a_constant_per_position_changes_nothing() -> None:
    (student, teacher), (expert, _, mask) = logits(), tokens()
    shift = torch.randn(B, R, 1, dtype=torch.float64) * 50
    value, _ = hpd.loss(student, teacher, expert, mask, generator=torch.Generator().manual_seed(5))
    for moved in ((student + shift, teacher), (student, teacher - shift)):
        again, _ = hpd.loss(*moved, expert, mask, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(again, value, rtol=1e-10, atol=1e-12)


def test_5_masked_positions_and_padding_are_irrelevant() -> None:
    (student, teacher), (expert, draw, mask) = logits(), tokens()
    value, told = hpd.loss(student, teacher, expert, mask, draw)
    (grad,) = torch.autograd.grad(value, student)
    rubbish, spoilt_teacher, ids, draws = student.detach().clone(), teacher.clone(), expert.clone(), draw.clone()
    rubbish[~mask], spoilt_teacher[~mask], ids[~mask], draws[~mask] = math.inf, math.nan, -100, 10**9
    rubbish.requires_grad_()
    again, told_again = hpd.loss(rubbish, spoilt_teacher, ids, mask, draws)
    assert torch.equal(again, value) and torch.equal(torch.autograd.grad(again, rubbish)[0], grad)
    assert all(torch.equal(told[name], told_again[name]) for name in told)
    wider = torch.nn.functional.pad
    longer = [wider(student, (0, 0, 0, 3), value=9.0), wider(teacher, (0, 0, 0, 3)), wider(expert, (0, 3)), wider(mask, (0, 3))]
    drawn, _ = hpd.loss(student, teacher, expert, mask, generator=torch.Generator().manual_seed(1))
    padded, _ = hpd.loss(*longer, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    torch.testing.assert_close(padded, drawn, rtol=0, atol=1e-15)


def test_6_draws_that_are_the_data_leave_equation_12() -> None:
    (student, teacher), (expert, _, mask) = logits(), tokens()
    value, told = hpd.loss(student, teacher, expert, mask, expert)
    plain, _ = hpd.loss(student, teacher, expert, mask, use_student_sample=False)
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    assert told["sampled_other"] == told["suppressed"] == told["reinforced"] == 0


def test_7_reductions_to_the_baselines() -> None:
    (student, teacher), (expert, _, mask) = logits(), tokens()
    lq, lp = picked(student, teacher, expert)
    nothing, same = torch.zeros_like(lq).detach(), torch.zeros_like(mask)
    q, p = lq.exp().detach(), lp.exp()
    mixed = (p + q) / 2
    want = {"sft": torch.ones_like(q), "seqkd": p, "rkld": q * (lp - lq.detach()), "jsd": -0.5 * q * (lq.detach() - mixed.log())}
    for kind, weight in want.items():
        torch.testing.assert_close(hpd.baseline_weights(kind, lq, lp), weight, rtol=0, atol=1e-15)  # type: ignore[arg-type]
        value, _ = hpd.token_loss(lq, lp, nothing, nothing, same, mask, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(value, -(weight * lq * mask).sum() / mask.sum(), rtol=0, atol=1e-15)
    hybrid = hpd.token_weights(lq, lp, nothing, nothing, same, use_student_sample=False)[0]
    torch.testing.assert_close(hybrid, torch.where(lp < lq, 0.0, p) + want["rkld"], rtol=0, atol=1e-15)


def test_8_the_mean_over_draws_is_the_stated_expectation() -> None:
    (student, teacher), (expert, _, mask) = logits(3), tokens(3)
    with torch.no_grad():
        lq, lp = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
        q, p = lq.exp(), lp.exp()
        over = (lp < lq) & (torch.arange(V) != expert[..., None])
        rho = (q * over).sum(-1)
        k, p_expert = (x.gather(-1, expert[..., None])[..., 0] for x in (q * (lp - lq), p))
        w = torch.where(k > 0, p_expert * (1 + rho) + k, k)
        suppression = torch.where(over, q * q * (lp - lq), 0.0)
        want = -((w * lq.gather(-1, expert[..., None])[..., 0] + (suppression * lq).sum(-1)) * mask).sum() / mask.sum()
        hit = torch.nn.functional.one_hot(expert, V) - q
        pull = w[..., None] * hit + suppression - suppression.sum(-1, keepdim=True) * q
        want_grad = -pull * mask[..., None] / mask.sum()
    every = torch.zeros((), dtype=torch.float64)
    every_grad = torch.zeros_like(student)
    for v in range(V):  # each position's draw is v with probability q_v: the mean over draws, by enumeration
        value, grad = (x.detach() for x in _of_positions(student, teacher, expert, torch.full_like(expert, v), mask))
        every += (q[..., v] * value).sum()
        every_grad += q[..., v, None] * grad
    torch.testing.assert_close(every, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(every_grad, want_grad, rtol=0, atol=1e-13)
    dice, total, times = torch.Generator().manual_seed(0), 0.0, 1500
    losses = [float(hpd.loss(student.detach(), teacher, expert, mask, generator=dice)[0]) for _ in range(times)]
    total = sum(losses) / times
    spread = (sum((x - total) ** 2 for x in losses) / times) ** 0.5
    assert abs(total - float(want)) < 4 * spread / times**0.5 + 1e-12


def _of_positions(student: Tensor, teacher: Tensor, expert: Tensor, draw: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's part of the loss [B, R], and the gradient of their sum [B, R, V]."""
    value, _ = hpd.loss(student, teacher, expert, mask, draw)
    (grad,) = torch.autograd.grad(value, student)
    (lq, lp), (lqs, lps) = picked(student, teacher, expert), picked(student, teacher, draw)
    w, ws = hpd.token_weights(lq, lp, lqs, lps, expert == draw)
    parts = -(w * lq + ws * lqs) * mask / mask.sum()
    torch.testing.assert_close(parts.sum(), value)
    return parts, grad


def test_9_bounds_of_the_weights() -> None:
    dice = torch.Generator().manual_seed(0)
    lq, lp, lqs, lps = (torch.rand(1, 20000, generator=dice, dtype=torch.float64).log() for _ in range(4))
    w, ws = hpd.token_weights(lq, lp, lqs, lps, torch.zeros_like(lq, dtype=torch.bool))
    k, p = lq.exp() * (lp - lq), lp.exp()
    assert (k <= p / math.e + 1e-15).all() and (w <= 2 * p + p / math.e + 1e-15).all() and (ws <= 0).all()
    at = torch.tensor([[math.log(0.4 / math.e)]], dtype=torch.float64), torch.tensor([[math.log(0.4)]], dtype=torch.float64)
    assert float(hpd.token_weights(*at, *at, torch.ones(1, 1, dtype=torch.bool))[0]) == pytest.approx(0.4 + 0.4 / math.e)
    sure, never = torch.zeros(1, 1), torch.full((1, 1), -50.0)
    assert float(hpd.token_weights(sure, never, sure, sure, torch.ones(1, 1, dtype=torch.bool))[0]) == -50.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_10_draws_follow_the_student_and_nothing_else(dtype: torch.dtype) -> None:
    row = torch.tensor([2.0, -1.0, 0.5, 0.0, -math.inf, 1.0, -3.0], dtype=dtype)
    many = 40000
    student = row.expand(1, many, V).contiguous()
    where = torch.arange(many)
    drawn = hpd._draw(student[0], where, torch.Generator().manual_seed(3), 999)
    counts = torch.bincount(drawn, minlength=V).double()
    expected = torch.softmax(row.double(), -1) * many
    live = expected > 0
    assert not counts[~live].any()
    chi2 = ((counts - expected)[live] ** 2 / expected[live]).sum()
    assert chi2 < 20.5, f"5 degrees of freedom, 0.1 % above 20.5: {chi2}"
    assert torch.equal(hpd._draw(student[0], where, torch.Generator().manual_seed(3), 7), drawn)
    assert torch.equal(hpd._draw(student[0] + 4, where, torch.Generator().manual_seed(3), 7), drawn)
    assert not torch.equal(hpd._draw(student[0], where, torch.Generator().manual_seed(4), 7), drawn)


def test_11_unequal_vocabularies_share_a_prefix() -> None:
    (student, _), (_, teacher) = logits(0, V), logits(1, V + 4)
    expert, draw, mask = tokens(0)
    value, _ = hpd.loss(student, teacher, expert, mask, draw)
    cut, _ = hpd.loss(student, teacher[..., :V], expert, mask, draw)
    assert torch.equal(value, cut)
    outside = expert.clone()
    outside[0, 1] = V + 2
    smaller = mask.clone()
    smaller[0, 1] = False
    dropped, _ = hpd.loss(student, teacher, outside, mask, draw)
    torch.testing.assert_close(dropped, hpd.loss(student, teacher, expert, smaller, draw)[0], rtol=0, atol=1e-15)
    (other_way, small_teacher) = logits(2, V + 4)[0], logits(3, V)[1]
    value, _ = hpd.loss(other_way, small_teacher, expert, mask, draw)
    (grad,) = torch.autograd.grad(value, other_way)
    assert not grad[..., V:].any() and grad[..., :V].any()


def test_12_the_surrogate_with_ratio_one_has_the_same_gradient_and_another_value() -> None:
    (student, teacher), (expert, draw, mask) = logits(4), tokens(4)
    value, _ = hpd.loss(student, teacher, expert, mask, draw)
    (lq, lp), (lqs, lps) = picked(student, teacher, expert), picked(student, teacher, draw)
    w, ws = hpd.token_weights(lq, lp, lqs, lps, expert == draw)
    surrogate = policy_loss(lq, lq.detach(), w, mask, dual_clip=10.0)[0] + policy_loss(lqs, lqs.detach(), ws, mask, dual_clip=10.0)[0]
    grads = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (value, surrogate)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)
    torch.testing.assert_close(surrogate, -((w + ws) * mask).sum() / mask.sum(), rtol=0, atol=1e-14)
    assert abs(float((surrogate - value).detach())) > 1e-3


def test_13_no_active_token_is_a_zero() -> None:
    (student, teacher), (expert, draw, mask) = logits(), tokens()
    for given in ({"sample_ids": draw}, {}):
        value, told = hpd.loss(student, teacher, expert, torch.zeros_like(mask), **given)
        (grad,) = torch.autograd.grad(value, student)
        assert float(value.detach()) == 0 and not grad.any() and all(math.isfinite(float(x)) for x in told.values())


def test_a_tie_takes_the_teachers_probability() -> None:
    """Self-distillation at its first step: Eq. 14, not the zero of Eq. 12."""
    (student, _), (expert, draw, mask) = logits(), tokens()
    value, told = hpd.loss(student, student.detach(), expert, mask, draw)
    lq = picked(student, student, expert)[0]
    torch.testing.assert_close(value, -(lq.exp() * lq * mask).sum() / mask.sum(), rtol=0, atol=1e-15)
    assert told["reinforced"] == told["suppressed"] == 0 and told["forward_kl_data"] == 0


def test_a_logit_of_minus_infinity_is_a_probability_of_zero() -> None:
    """One of the authors' programs makes such logits 0. Here they leave the softmax: as if the id were not in the vocabulary."""
    (student, teacher), (expert, draw, mask) = logits(6), tokens(6)
    gone = V - 1
    expert, draw = expert % gone, draw % gone
    less, less_teacher = student.detach().clone(), teacher.clone()
    less[..., gone] = less_teacher[..., gone] = -math.inf
    less.requires_grad_()
    value, told = hpd.loss(less, less_teacher, expert, mask, draw)
    want, want_told = hpd.loss(student[..., :gone], teacher[..., :gone], expert, mask, draw)
    torch.testing.assert_close(value, want, rtol=0, atol=1e-14)
    (grad,), (want_grad,) = torch.autograd.grad(value, less), torch.autograd.grad(want, student)
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(told["entropy"], want_told["entropy"], rtol=0, atol=1e-14)


def test_metrics_by_hand() -> None:
    (student, teacher), (expert, draw, mask) = logits(5), tokens(5)
    _, told = hpd.loss(student, teacher, expert, mask, draw)
    (lq, lp), (lqs, lps) = picked(student.detach(), teacher, expert), picked(student.detach(), teacher, draw)
    k, ks, other = lq.exp() * (lp - lq), lqs.exp() * (lps - lqs), mask & (expert != draw)
    entropy = -(student.softmax(-1) * student.log_softmax(-1)).sum(-1)
    want = {
        "sampled_other": other.sum() / mask.sum(),
        "reinforced": ((k > 0) & (ks < 0) & mask).sum() / mask.sum(),
        "suppressed": ((ks < 0) & other).sum() / mask.sum(),
        "expert_negative": ((k < 0) & mask).sum() / mask.sum(),
        "k_mean": k[mask].mean(),
        "k_min": k[mask].min(),
        "k_max": k[mask].max(),
        "k_draw_mean": ks[other].mean(),
        "k_draw_min": ks[other].min(),
        "k_draw_max": ks[other].max(),
        "nll": -lq[mask].mean(),
        "forward_kl_data": (lp - lq)[mask].mean(),
        "reverse_kl_draws": (lqs - lps)[mask].mean(),
        "entropy": entropy[mask].mean(),
    }
    assert set(told) == set(want)
    for name, number in want.items():
        assert float(told[name]) == pytest.approx(float(number.detach()), abs=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_compute_in_float32(dtype: torch.dtype) -> None:
    (student, teacher), (expert, draw, mask) = logits(dtype=dtype), tokens()
    value, _ = hpd.loss(student, teacher, expert, mask, draw)
    assert value.dtype == torch.float32
    want, want_grad = closed_form(student.double(), teacher.double(), expert, draw, mask)
    torch.testing.assert_close(value.double(), want, rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(value, student)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-2, atol=1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": torch.full((B, R), V)}, r"expert_ids must lie in \[0, 7\), got 7"),
        ({"sample_ids": torch.full((B, R), -1)}, r"sample_ids must lie in \[0, 7\), got -1"),
        ({"expert_ids": torch.zeros(B, R)}, r"expert_ids must be integers \[3, 5\], got torch.float32"),
        ({"mask": torch.ones(B, R + 1)}, r"mask has shape \[3, 6\]"),
        ({"mask": torch.full((B, R), 0.5)}, "mask must hold 0 and 1 only, got 0.5"),
        ({"teacher_logits": torch.zeros(B, R + 1, V)}, r"teacher_logits has shape \[3, 6, 7\]"),
        ({"student_logits": torch.zeros(R, V)}, r"student_logits must be floating \[B, R, V\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer, got 0"),
        ({"generator": torch.Generator()}, "sample_ids and generator are both given"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    (student, teacher), (expert, draw, mask) = logits(), tokens()
    good: dict[str, object] = {
        "student_logits": student,
        "teacher_logits": teacher,
        "expert_ids": expert,
        "mask": mask,
        "sample_ids": draw,
    }
    with pytest.raises(ValueError, match=message):
        hpd.loss(**(good | change))  # type: ignore[arg-type]


def test_bad_log_probs_are_named() -> None:
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"teacher_expert has shape \[2, 4\]"):
        hpd.token_weights(good, torch.zeros(2, 4), good, good, good > 0)
    with pytest.raises(ValueError, match=r"same must be bool \[2, 3\], got torch.float32"):
        hpd.token_weights(good, good, good, good, good)
    with pytest.raises(ValueError, match="kind must be one of sft, seqkd, rkld, jsd, got 'hpd'"):
        hpd.baseline_weights("hpd", good, good)
    with pytest.raises(ValueError, match="kind must be one of hpd, sft"):
        hpd.token_loss(good, good, good, good, good > 0, good > -1, "akl")  # type: ignore[arg-type]
