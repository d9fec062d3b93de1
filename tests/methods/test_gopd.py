"""Properties 1 to 14 and 16 of the method, by number; 15 (re-prompted teacher) is in tests/scoring/test_scorer.py.

Everything in float64; V tokens of a small vocabulary are enumerated where an expectation is meant.
"""

from __future__ import annotations

import pytest
import torch

from raysys.methods.gopd import advantage, importance_weights, policy_loss
from raysys.methods.logprobs import token_logprobs

B, R, V = 4, 6, 7
SCALES = [0.0, 0.25, 0.5, 1.0, 1.25, 2.0]
NAN, INF = float("nan"), float("inf")


def table(seed: int, *shape: int, spread: float = 1.5) -> torch.Tensor:
    """Log-probs of random categorical distributions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(spread * torch.randn(*shape, generator=generator, dtype=torch.float64), -1)


def logprobs(seed: int) -> torch.Tensor:
    return table(seed, B, R, V)[..., 0]


def lengths_mask() -> torch.Tensor:
    return torch.arange(R) < torch.tensor([R, 3, 1, 4])[:, None]


def tilt(teacher: torch.Tensor, reference: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The locally normalised tilt softmax(scale log T + (1 - scale) log ref), and log Z."""
    raw = scale * teacher + (1 - scale) * reference
    return torch.log_softmax(raw, -1), torch.logsumexp(raw, -1)


# 1


def test_1_scale_one_ignores_the_reference_bitwise():
    student, teacher = logprobs(0), logprobs(1)
    plain = advantage(student, teacher)
    assert torch.equal(plain, teacher - student)
    for reference in (logprobs(2), torch.full_like(student, NAN), torch.full_like(student, -INF)):
        assert torch.equal(advantage(student, teacher, reference, 1.0), plain)


# 2


def test_2_reference_equal_to_teacher_makes_the_scale_irrelevant():
    student, teacher = logprobs(0), logprobs(1)
    for scale in SCALES:
        torch.testing.assert_close(advantage(student, teacher, teacher, scale), teacher - student, rtol=0, atol=1e-15)


# 3


def test_3_scale_zero_pulls_to_the_reference_whatever_the_teacher():
    student, reference = logprobs(0), logprobs(2)
    for teacher in (logprobs(1), torch.full_like(student, NAN)):
        assert torch.equal(advantage(student, teacher, reference, 0.0), reference - student)


# 4


@pytest.mark.parametrize("scale", SCALES)
def test_4_reference_equal_to_student_scales_the_gradient(scale):
    student, teacher = logprobs(0), logprobs(1)
    torch.testing.assert_close(advantage(student, teacher, student, scale), scale * (teacher - student), rtol=0, atol=1e-14)

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        leaf = student.clone().requires_grad_()
        return torch.autograd.grad(policy_loss(leaf, student, advantages, lengths_mask())[0], leaf)[0]

    scaled, plain = gradient(advantage(student, teacher, student, scale)), gradient(advantage(student, teacher))
    torch.testing.assert_close(scaled, scale * plain, rtol=0, atol=1e-14)


def test_4_first_adam_step_does_not_see_the_scale():
    student, teacher = logprobs(0), logprobs(1)
    ends = []
    for scale in (1.0, 1.25):
        leaf = student.clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=0.1, eps=1e-12)
        policy_loss(leaf, student, advantage(student, teacher, student, scale), torch.ones_like(student))[0].backward()
        optimiser.step()
        ends.append(leaf.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


# 5


@pytest.mark.parametrize("scale", SCALES)
def test_5_both_forms_of_the_objective(scale):
    student, teacher, reference = logprobs(0), logprobs(1), logprobs(2)
    got = advantage(student, teacher, reference, scale)
    reward_form = scale * (teacher - reference) - (student - reference)
    distillation_form = (scale - 1) * (teacher - reference) - (student - teacher)
    torch.testing.assert_close(got, reward_form, rtol=0, atol=1e-14)
    torch.testing.assert_close(got, distillation_form, rtol=0, atol=1e-14)


# 6


@pytest.mark.parametrize("scale", SCALES)
def test_6_expected_gradient_is_that_of_the_reverse_kl_to_the_local_tilt(scale):
    teacher, reference = table(1, V), table(2, V)
    logits = table(0, V).requires_grad_()
    student = torch.log_softmax(logits, -1)
    advantages = advantage(student[:, None], teacher[:, None], reference[:, None], scale)
    # One row a token of the vocabulary; its probability stands where the importance weight would.
    loss, _ = policy_loss(
        student[:, None], student[:, None].detach(), advantages, torch.ones(V, 1), student.exp()[:, None], aggregation="token"
    )
    got = torch.autograd.grad(V * loss, logits, retain_graph=True)[0]
    target, _ = tilt(teacher, reference, scale)
    want = torch.autograd.grad((student.exp() * (student - target)).sum(), logits)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


# 7


@pytest.mark.parametrize("scale", SCALES)
def test_7_at_the_tilt_the_advantage_is_the_constant_log_normaliser(scale):
    teacher, reference = table(1, B, V), table(2, B, V)
    target, log_z = tilt(teacher, reference, scale)
    got = advantage(target, teacher, reference, scale)
    torch.testing.assert_close(got, log_z[:, None].expand(B, V), rtol=0, atol=1e-13)
    if scale in (0.0, 1.0):
        assert log_z.abs().max() < 1e-14
    elif scale > 1:
        assert (log_z > 0).all()
    else:
        assert (log_z < 0).all()


def test_7_scale_one_every_sampled_gradient_is_exactly_zero_at_the_teacher():
    teacher = logprobs(1)
    leaf = teacher.clone().requires_grad_()
    loss, _ = policy_loss(leaf, teacher, advantage(teacher, teacher), lengths_mask())
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


# 8


def test_8_the_product_of_local_tilts_is_not_the_sequence_level_tilt():
    """Two tokens: the estimator's optimum is the product of per-token tilts (its expected gradient vanishes there)."""
    scale = 2.0
    teacher = [table(1, V), table(2, V, V)]  # first token; second token given the first
    reference = [table(3, V), table(4, V, V)]
    local = [tilt(t, r, scale)[0] for t, r in zip(teacher, reference, strict=True)]
    joint_teacher, joint_reference, joint_local = (pair[0][:, None] + pair[1] for pair in (teacher, reference, local))
    sequence = torch.log_softmax((scale * joint_teacher + (1 - scale) * joint_reference).flatten(), 0).view(V, V)
    assert (sequence - joint_local).abs().max() > 0.05

    def expected_gradient(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        logits = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        one, two = torch.log_softmax(logits[0], -1)[:, None].expand(V, V), torch.log_softmax(logits[1], -1)
        student = torch.stack([one, two], -1).reshape(V * V, 2)  # every sequence of two tokens
        scores = [torch.stack([m[0][:, None].expand(V, V), m[1]], -1).reshape(V * V, 2) for m in (teacher, reference)]
        share = student.sum(1, keepdim=True).exp().expand(-1, 2)
        loss, _ = policy_loss(
            student, student.detach(), advantage(student, *scores, scale), torch.ones(V * V, 2), share, aggregation="sequence_token_sum"
        )
        return torch.cat([g.flatten() for g in torch.autograd.grad(V * V * loss, logits)])

    assert expected_gradient(*local).abs().max() < 1e-14
    marginal = torch.logsumexp(sequence, 1)
    assert expected_gradient(marginal, sequence - marginal[:, None]).abs().max() > 1e-3


# 9


def test_9_reward_correction_changes_the_advantage_by_the_bases_gap():
    student, teacher, student_base, teacher_base = (logprobs(seed) for seed in range(4))
    for scale in SCALES:
        change = advantage(student, teacher, teacher_base, scale) - advantage(student, teacher, student_base, scale)
        torch.testing.assert_close(change, (scale - 1) * (student_base - teacher_base), rtol=0, atol=1e-14)


# 10


def from_logits(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]


def test_10_gradient_is_the_closed_form():
    ids = torch.randint(0, V, (B, R), generator=torch.Generator().manual_seed(9))
    mask = lengths_mask()
    logits = (1.5 * torch.randn(B, R, V, generator=torch.Generator().manual_seed(8), dtype=torch.float64)).requires_grad_()
    student = from_logits(logits, ids)
    advantages = advantage(student, logprobs(1), logprobs(2), 1.25)
    weights = importance_weights(student, logprobs(5), mask)
    for weight in (None, weights):
        loss, _ = policy_loss(student, student.detach(), advantages, mask, weight)
        got = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        onehot = torch.nn.functional.one_hot(ids, V)
        share = (1.0 if weight is None else weight) * advantages * mask / mask.sum()
        torch.testing.assert_close(got, -share[..., None] * (onehot - logits.softmax(-1)), rtol=0, atol=1e-15)
        assert got.sum(-1).abs().max() < 1e-15
        assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))


@pytest.mark.parametrize("aggregation", ["token", "sequence_token_mean", "sequence_token_sum"])
def test_10_invariant_to_padding_and_to_constants_on_logits(aggregation):
    ids = torch.randint(0, V, (B, R), generator=torch.Generator().manual_seed(9))
    raw = torch.randn(B, R, V, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    mask = lengths_mask()

    def run(shift: torch.Tensor | float, rows: int, columns: int):
        logits = (raw + shift).requires_grad_()
        pad = (0, columns, 0, rows)
        student = torch.nn.functional.pad(from_logits(logits, ids), pad, value=NAN)
        teacher = torch.nn.functional.pad(from_logits(raw.flip(0) + shift, ids), pad, value=-INF)
        loss, metrics = policy_loss(
            student, student.detach(), advantage(student, teacher), torch.nn.functional.pad(mask, pad), aggregation=aggregation
        )
        return loss.detach(), torch.autograd.grad(loss, logits)[0], metrics

    loss, grad, _ = run(0.0, 0, 0)
    shift = 3 * torch.randn(B, R, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for other in (run(shift, 0, 0), run(0.0, 0, 3), run(0.0, 2, 0), run(shift, 2, 5)):
        torch.testing.assert_close(other[0], loss, rtol=0, atol=1e-13)
        torch.testing.assert_close(other[1], grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e300])
@pytest.mark.parametrize("aggregation", ["token", "sequence_token_mean", "sequence_token_sum"])
def test_10_masked_positions_may_hold_anything(junk, aggregation):
    mask = lengths_mask()
    clean = {"logprobs": logprobs(0), "old_logprobs": logprobs(5), "advantages": logprobs(1) - logprobs(2), "weights": logprobs(3).exp()}

    def run(values: dict[str, torch.Tensor]):
        leaf = values["logprobs"].clone().requires_grad_()
        loss, metrics = policy_loss(**{**values, "logprobs": leaf}, mask=mask, aggregation=aggregation)
        loss.backward()
        return [loss.detach(), leaf.grad, *metrics.values()]

    dirty = {name: value.masked_fill(~mask, junk) for name, value in clean.items()}
    assert all(torch.equal(a, b) for a, b in zip(run(clean), run(dirty), strict=True))
    weights = importance_weights(dirty["logprobs"], dirty["old_logprobs"], mask)
    assert torch.equal(weights, importance_weights(clean["logprobs"], clean["old_logprobs"], mask))


# 11


def test_11_only_the_ratio_carries_gradient():
    leaves = [logprobs(seed).requires_grad_() for seed in range(5)]
    student, teacher, reference, old, rollout = leaves
    advantages = advantage(student, teacher, reference, 1.25)
    weights = importance_weights(old, rollout, torch.ones(B, R))
    assert not advantages.requires_grad and not weights.requires_grad
    live_advantages, live_weights = advantages.clone().requires_grad_(), weights.clone().requires_grad_()
    loss, metrics = policy_loss(student, old, live_advantages, lengths_mask(), live_weights)
    loss.backward()
    assert student.grad is not None
    assert all(leaf.grad is None for leaf in (teacher, reference, old, rollout, live_advantages, live_weights))
    assert not any(value.requires_grad for value in metrics.values())


def test_11_gradient_equals_finite_differences_with_the_advantage_frozen():
    base, old = logprobs(0), logprobs(0) + 0.03 * torch.randn(B, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages = advantage(base, logprobs(1), logprobs(2), 1.25)
    weights = importance_weights(base, logprobs(3), lengths_mask())
    for aggregation in ("token", "sequence_token_mean", "sequence_token_sum"):
        leaf = base.clone().requires_grad_()
        check = torch.autograd.gradcheck(
            lambda x, a=aggregation: policy_loss(x, old, advantages, lengths_mask(), weights, aggregation=a)[0], leaf
        )
        assert check


def test_11_through_the_blockwise_log_probs():
    """Gradient of hidden states and unembedding, against finite differences of the whole chain with A frozen."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(B * R, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    unembedding = torch.randn(V, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, V, (B * R,), generator=generator)
    old = token_logprobs(hidden, unembedding, ids, chunk_tokens=5).view(B, R).detach()
    advantages = advantage(old, logprobs(1), logprobs(2), 1.25)

    def loss(h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return policy_loss(token_logprobs(h, u, ids, chunk_tokens=5).view(B, R), old, advantages, lengths_mask())[0]

    # A second backward pass makes again what the first one took as the forward pass had left it: equal but for rounding.
    assert torch.autograd.gradcheck(loss, (hidden, unembedding), nondet_tol=1e-12)


# 12


def test_12_importance_weights_worked():
    gap = torch.tensor([[0.0, 0.5, -0.7, 3.0, 50.0, -50.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    rollout = torch.full_like(gap, -2.0)
    got = importance_weights(rollout + gap, rollout, mask)
    want = torch.tensor([[0.0, 0.5, -0.7, 3.0, 0.0, -20.0, 0.0]], dtype=torch.float64).exp()
    want[0, 3] = want[0, 4] = 5.0
    want[0, 6] = 0.0
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)
    assert torch.equal(importance_weights(rollout, rollout, mask), mask.double())
    torch.testing.assert_close(
        importance_weights(rollout + gap, rollout, mask, cap=INF)[0, 4], torch.tensor(20.0, dtype=torch.float64).exp()
    )
    assert importance_weights(rollout + gap, rollout, mask, cap=1.5)[0, 1] == 1.5


def test_12_weights_scale_tokens_and_stay_out_of_the_denominator():
    student, mask = logprobs(0), lengths_mask()
    advantages = logprobs(1) - student
    for aggregation in ("token", "sequence_token_mean", "sequence_token_sum"):
        plain, _ = policy_loss(student, student, advantages, mask, aggregation=aggregation)
        half, _ = policy_loss(student, student, advantages, mask, torch.full_like(student, 0.5), aggregation=aggregation)
        torch.testing.assert_close(half, plain / 2)


# 13


@pytest.mark.parametrize(
    ("sign", "ratio", "factor", "value", "metric"),
    [
        (1.0, 1.1, 1.1, 1.1, None),
        (1.0, 1.3, 0.0, 1.2, "clip_fraction_high"),
        (1.0, 0.5, 0.5, 0.5, None),
        (1.0, 5.0, 0.0, 1.2, "clip_fraction_high"),
        (-1.0, 0.9, 0.9, 0.9, None),
        (-1.0, 0.7, 0.0, 0.8, "clip_fraction_low"),
        (-1.0, 1.5, 1.5, 1.5, None),
        (-1.0, 2.9, 2.9, 2.9, None),
        (-1.0, 3.5, 0.0, 3.0, "dual_clip_fraction"),
    ],
)
def test_13_clipping_table(sign, ratio, factor, value, metric):
    old = torch.tensor([[-2.0]], dtype=torch.float64)
    leaf = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    size = 0.7
    loss, metrics = policy_loss(leaf, old, torch.full_like(old, sign * size), torch.ones(1, 1))
    loss.backward()
    torch.testing.assert_close(loss.item(), -sign * size * value)
    torch.testing.assert_close(leaf.grad.item(), -sign * size * factor)
    for name in ("clip_fraction_high", "clip_fraction_low", "dual_clip_fraction"):
        assert metrics[name].item() == (name == metric)
    torch.testing.assert_close(metrics["approx_kl"].item(), -torch.tensor(ratio, dtype=torch.float64).log().item())


def test_13_asymmetric_clips_and_weights_after_clipping():
    old = torch.zeros(1, 3, dtype=torch.float64)
    ratio = torch.tensor([[1.25, 1.35, 0.6]], dtype=torch.float64)
    gain = torch.tensor([[1.0, 1.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([[2.0, 2.0, 4.0]], dtype=torch.float64)
    loss, metrics = policy_loss(ratio.log(), old, gain, torch.ones(1, 3), weights, clip_low=0.5, clip_high=0.28)
    torch.testing.assert_close(loss.item(), (-2 * 1.25 - 2 * 1.28 + 4 * 0.6) / 3)
    assert [metrics[name].item() * 3 for name in ("clip_fraction_high", "clip_fraction_low")] == [1.0, 0.0]


def test_13_log_ratio_is_bounded():
    old = torch.zeros(1, 2, dtype=torch.float64)
    leaf = torch.tensor([[300.0, -300.0]], dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(leaf, old, torch.tensor([[-1.0, 1.0]], dtype=torch.float64), torch.ones(1, 2), dual_clip=INF)
    torch.testing.assert_close(loss, (torch.tensor(20.0).double().exp() - torch.tensor(-20.0).double().exp()) / 2)
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert metrics["approx_kl"].item() == 0.0


# 14


def test_14_rows_of_other_domains_and_their_order_do_not_matter():
    tags = ["math", "code", "math", "code"]
    student, mask = logprobs(0), lengths_mask()
    teachers = {"math": logprobs(1), "code": logprobs(2)}

    def gradient(models: dict[str, torch.Tensor], order: list[int]) -> torch.Tensor:
        routed = torch.stack([models[tags[row]][row] for row in order])
        leaf = student[order].clone().requires_grad_()
        loss, _ = policy_loss(leaf, student[order], advantage(student[order], routed, logprobs(3)[order], 1.25), mask[order])
        return torch.autograd.grad(loss, leaf)[0]

    here = list(range(B))
    whole = gradient(teachers, here)
    other = gradient({**teachers, "code": logprobs(6)}, here)
    assert torch.equal(whole[[0, 2]], other[[0, 2]]) and not torch.equal(whole[[1, 3]], other[[1, 3]])
    order = [2, 0, 3, 1]
    torch.testing.assert_close(gradient(teachers, order), whole[order], rtol=0, atol=1e-16)
    single = gradient({"math": logprobs(1), "code": logprobs(1)}, here)
    assert torch.equal(single[[0, 2]], whole[[0, 2]])


# 16


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_16_toy_policy_reaches_the_normalised_tilt(scale):
    teacher, reference = table(1, 3, V, spread=0.5), table(2, 3, V, spread=0.5)
    logits = reference.clone().requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=2.0)
    for _ in range(2000):
        student = torch.log_softmax(logits, -1)
        advantages = advantage(student, teacher, reference, scale)
        loss, _ = policy_loss(student, student.detach(), advantages, torch.ones(3, V), student.exp(), aggregation="sequence_token_sum")
        optimiser.zero_grad()
        (3 * loss).backward()
        optimiser.step()
    student = torch.log_softmax(logits.detach(), -1)
    target, log_z = tilt(teacher, reference, scale)
    torch.testing.assert_close(student, target, rtol=0, atol=1e-6)
    extrapolated = (student - reference) - scale * (teacher - reference)
    torch.testing.assert_close(extrapolated, -log_z[:, None].expand(3, V), rtol=0, atol=1e-6)


# What the section's numbers leave open


def test_aggregations_worked():
    losses = torch.tensor([[1.0, 2.0, 3.0], [10.0, 7.0, 7.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    zeros = torch.zeros_like(losses)
    for aggregation, want in (("token", 16 / 4), ("sequence_token_mean", (2 + 10) / 2), ("sequence_token_sum", (6 + 10) / 2)):
        for kind in (mask, mask.bool(), mask.float()):
            loss, _ = policy_loss(zeros, zeros, -losses, kind, aggregation=aggregation)
            torch.testing.assert_close(loss.item(), want)


@pytest.mark.parametrize("aggregation", ["token", "sequence_token_mean", "sequence_token_sum"])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_no_tokens_give_zero_and_a_zero_gradient(aggregation, shape):
    leaf = torch.full(shape, NAN, dtype=torch.float64, requires_grad=True)
    loss, metrics = policy_loss(leaf, leaf.detach(), leaf.detach(), torch.zeros(shape), leaf.detach(), aggregation=aggregation)
    loss.backward()
    assert loss.item() == 0.0 and all(value.item() == 0.0 for value in metrics.values())
    assert torch.equal(leaf.grad, torch.zeros(shape, dtype=torch.float64))


def test_token_means_of_micro_batches_add_up_by_their_share_of_tokens():
    student, old, mask = logprobs(0), logprobs(5), lengths_mask()
    advantages = logprobs(1) - old
    whole, _ = policy_loss(student, old, advantages, mask)
    parts = [
        policy_loss(student[rows], old[rows], advantages[rows], mask[rows])[0] * mask[rows].sum() for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts) / mask.sum(), whole, rtol=0, atol=1e-15)


def test_non_finite_values_under_the_mask_are_not_hidden():
    student = logprobs(0)
    broken = student.clone()
    broken[0, 0] = NAN
    assert policy_loss(broken, student, student, torch.ones_like(student))[0].isnan()
    assert importance_weights(broken, student, torch.ones_like(student))[0, 0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_compute_in_float32(dtype):
    values = [logprobs(seed).to(dtype) for seed in range(4)]
    advantages = advantage(*values[:3], 1.25)
    weights = importance_weights(values[0], values[3], lengths_mask())
    leaf = values[0].clone().requires_grad_()
    loss, metrics = policy_loss(leaf, values[3], advantages, lengths_mask(), weights)
    loss.backward()
    assert {advantages.dtype, weights.dtype, loss.dtype, *(m.dtype for m in metrics.values())} == {torch.float32}
    assert leaf.grad.dtype == dtype
    wide = [value.double() for value in values]
    want = advantage(*wide[:3], 1.25)
    assert want.dtype == torch.float64
    torch.testing.assert_close(advantages.double(), want, rtol=0, atol=3e-6)
    want_loss, _ = policy_loss(wide[0], wide[3], want, lengths_mask(), importance_weights(wide[0], wide[3], lengths_mask()))
    torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=1e-6)


GOOD = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantage(GOOD, GOOD, None, 1.25), "reference is needed for reward_scale=1.25"),
        (lambda: advantage(GOOD, GOOD, None, 0.0), "reference is needed"),
        (lambda: advantage(GOOD, GOOD, GOOD, -0.5), "reward_scale must be at least 0 and finite, got -0.5"),
        (lambda: advantage(GOOD, GOOD, GOOD, NAN), "reward_scale"),
        (lambda: advantage(GOOD, GOOD[:1]), r"teacher has shape [1, 3], student has [2, 3]"),
        (lambda: advantage(GOOD, GOOD, GOOD[0], 1.25), r"reference has shape [3]"),
        (lambda: advantage(GOOD[0], GOOD[0]), r"student must be [B, R], got shape [3]"),
        (lambda: advantage(GOOD, GOOD.long()), "teacher must be floating, got torch.int64"),
        (lambda: importance_weights(GOOD, GOOD[:, :1], GOOD), r"rollout has shape [2, 1]"),
        (lambda: importance_weights(GOOD, GOOD, GOOD[0]), r"mask has shape [3], trainer has [2, 3]"),
        (lambda: importance_weights(GOOD, GOOD, GOOD, cap=-1.0), "cap must be above 0, got -1.0"),
        (lambda: importance_weights(GOOD, GOOD, GOOD, cap=NAN), "cap"),
        (lambda: importance_weights(GOOD, GOOD, GOOD + 0.5), "mask must hold 0 and 1 only, got 0.5"),
        (lambda: policy_loss(GOOD, GOOD[:, :1], GOOD, GOOD), r"old_logprobs has shape [2, 1], logprobs has [2, 3]"),
        (lambda: policy_loss(GOOD, GOOD, GOOD[:1], GOOD), "advantages has shape [1, 3]"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD[:, :1]), "mask has shape [2, 1]"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD, GOOD[:, 0]), "weights has shape [2]"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD, clip_low=-0.1), "clip_low must be at least 0, got -0.1"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD, clip_high=-0.1), "clip_high must be at least 0, got -0.1"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD, dual_clip=1.0), "dual_clip must be above 1, got 1.0"),
        (lambda: policy_loss(GOOD, GOOD, GOOD, GOOD, aggregation="mean"), "aggregation must be one of token"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
