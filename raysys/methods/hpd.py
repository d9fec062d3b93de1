"""HPD, hybrid-policy distillation: the data token and one draw from the student at each position. Paper: arXiv 2604.20244.

Legend: B rows, R response tokens (right padded), V vocabulary, m the mask of real ones, a* the data's ("expert") token, a the draw,
q the student, p the teacher, both on the data's own prefix; log-probs in nats.

    k  = q(a*) (log p(a*) - log q(a*)),   k' = q(a) (log p(a) - log q(a)),   a ~ q                Eq. 11, Alg. 1
    w* = 2 p(a*) + k  if k > 0 and k' < 0;   p(a*) + k  if k >= 0 otherwise;   k  if k < 0          Eq. 14
    w  = 1[a != a*] 1[k' < 0] k'                                                                    Eq. 13
    L  = sum_t m_t (-w*_t log q(a*_t) - w_t log q(a_t)) / sum_t m_t                                 Eq. 15
    dL/dz_v = -(m/N) (w* (1[v=a*] - q_v) + w (1[v=a] - q_v))                                        Eq. 10

All weights are constants: gradients reach the student's log-probs and nothing else. Signs of k and k' are those of log p - log q, so that
a probability that underflows keeps its branch. Where paper and the authors' two programs disagree: a tie k = 0 takes Eq. 14 (weight p),
the draw is compared with the expert token of its own position, and a logit of -inf is a probability of 0, not a logit of 0. A token that
the teacher gives 0 and the student does not therefore has a weight of -inf: such a loss is not finite, and nothing here hides it.

SFT, sequence KD, and reverse KL and Jensen-Shannon on data are other weights w* in the same loss, with w = 0. The paper prints the last
two as divergences; descent takes the opposite sign.

float64 stays float64, lower precisions compute in float32. Masked positions may hold anything, inf and NaN included.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysys.methods.tensors import check_chunk, check_ids, check_shapes, chunks, compute_dtype, real_mask

Kind = Literal["hpd", "sft", "seqkd", "rkld", "jsd"]
KINDS: tuple[Kind, ...] = ("hpd", "sft", "seqkd", "rkld", "jsd")
DRAWING = 2**22
"""Probabilities that exist at once where the caller names no chunk."""


def token_weights(
    student_expert: Tensor,
    teacher_expert: Tensor,
    student_sample: Tensor,
    teacher_sample: Tensor,
    same: Tensor,
    use_student_sample: bool = True,
    use_reinforce: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weights of -log q at the data's token and at the draw, Eqs. 12 to 14; without gradient.

    Args:
        student_expert, teacher_expert: log-probs [B, R] of the data's tokens.
        student_sample, teacher_sample: log-probs [B, R] of the draws. What they hold has no effect without `use_student_sample`.
        same: [B, R] bool, where the draw is the data's token.
        use_student_sample: without, there is no second term, and nothing is reinforced (Eq. 12).
        use_reinforce: without, the teacher's probability is never counted twice.

    Returns:
        (w*, w), each [B, R]; w is never positive.

    Raises:
        ValueError: shapes differ, a log-prob is no floating number, or `same` is not bool.
    """
    others = {"teacher_expert": teacher_expert, "student_sample": student_sample, "teacher_sample": teacher_sample}
    check_shapes("student_expert", student_expert, **others)
    if same.dtype != torch.bool or same.shape != student_expert.shape:
        raise ValueError(f"same must be bool {list(student_expert.shape)}, got {same.dtype} {list(same.shape)}")
    dtype = compute_dtype(student_expert, teacher_expert, student_sample, teacher_sample)
    lq, lp, lq_draw, lp_draw = (x.detach().to(dtype) for x in (student_expert, teacher_expert, student_sample, teacher_sample))
    k, p = _gap(lq, lp), lp.exp()
    expert = torch.where(lp < lq, k, p + k)
    if not use_student_sample:
        return expert, torch.zeros_like(expert)
    over = lp_draw < lq_draw
    if use_reinforce:
        expert = torch.where((lp > lq) & over, 2 * p + k, expert)
    return expert, torch.where(over & ~same, _gap(lq_draw, lp_draw), 0.0)


def baseline_weights(kind: Kind, student_expert: Tensor, teacher_expert: Tensor) -> Tensor:
    """Weight of -log q at the data's token for the methods that draw nothing; without gradient.

        sft 1;   seqkd p;   rkld q (log p - log q);   jsd -q/2 (log q - log((p + q)/2))

    Args:
        kind: which; not "hpd".
        student_expert, teacher_expert: log-probs [B, R] of the data's tokens; sft reads only their shape.

    Raises:
        ValueError: the kind is unknown or shapes differ.
    """
    check_shapes("student_expert", student_expert, teacher_expert=teacher_expert)
    dtype = compute_dtype(student_expert, teacher_expert)
    lq, lp = student_expert.detach().to(dtype), teacher_expert.detach().to(dtype)
    if kind == "sft":
        return torch.ones_like(lq)
    if kind == "seqkd":
        return lp.exp()
    if kind == "rkld":
        return _gap(lq, lp)
    if kind == "jsd":
        return 0.5 * _gap(lq, torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0, dtype=dtype)))
    raise ValueError(f"kind must be one of {', '.join(KINDS[1:])}, got {kind!r}")


def token_loss(
    student_expert: Tensor,
    teacher_expert: Tensor,
    student_sample: Tensor,
    teacher_sample: Tensor,
    same: Tensor,
    mask: Tensor,
    kind: Kind = "hpd",
    use_student_sample: bool = True,
    use_reinforce: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of Eq. 15 from log-probs of two tokens a position, whatever made them.

    Args:
        student_expert, student_sample: log-probs [B, R] with gradient, the only arguments that get one.
        teacher_expert, teacher_sample: log-probs [B, R].
        same: [B, R] bool, where the draw is the data's token.
        mask: [B, R], bool or 0/1.
        kind: "hpd", or a baseline of `baseline_weights`.
        use_student_sample, use_reinforce: see `token_weights`; of "hpd" only.

    Returns:
        The loss (0-d; 0 without active tokens), and detached 0-d numbers over active tokens. Shares: `sampled_other` (the draw is not the
        data's token), `reinforced`, `suppressed` (w < 0), `expert_negative` (w* < 0). `k_mean`, `k_min`, `k_max` at the data's tokens;
        `k_draw_mean`, `k_draw_min`, `k_draw_max` at draws that are not. `nll`. Two estimates of a divergence at the data's prefixes:
        `forward_kl_data` (mean of log p - log q at the data's token: the forward KL only where the teacher wrote the data) and
        `reverse_kl_draws` (mean of log q - log p at the draws).

    Raises:
        ValueError: as `token_weights`; the mask holds something else than 0 and 1, or the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    real = real_mask(mask, "student_expert", student_expert)
    dtype = compute_dtype(student_expert, teacher_expert, student_sample, teacher_sample)
    others = {"teacher_expert": teacher_expert, "student_sample": student_sample, "teacher_sample": teacher_sample}
    check_shapes("student_expert", student_expert, **others)
    lq, lp, lq_draw, lp_draw = (
        torch.where(real, x.to(dtype), 0.0) for x in (student_expert, teacher_expert.detach(), student_sample, teacher_sample.detach())
    )
    if kind == "hpd":
        expert, draw = token_weights(lq, lp, lq_draw, lp_draw, same, use_student_sample, use_reinforce)
    else:
        expert, draw = baseline_weights(kind, lq, lp), torch.zeros_like(lq)
    reinforced = (lp > lq) & (lp_draw < lq_draw) if kind == "hpd" and use_student_sample and use_reinforce else torch.zeros_like(real)
    expert, draw = torch.where(real, expert, 0.0), torch.where(real, draw, 0.0)
    count = real.sum().clamp(min=1)
    # A weight of 0 leaves a term out, also where the log-prob is -inf.
    terms = torch.where(expert != 0, expert * lq, 0.0) + torch.where(draw != 0, draw * lq_draw, 0.0)
    shares = {"reinforced": reinforced, "suppressed": draw < 0, "expert_negative": expert < 0, "sampled_other": ~same}
    metrics = {name: (real & where).sum() / count for name, where in shares.items()}
    return -terms.sum() / count, metrics | _estimates(lq.detach(), lp, lq_draw.detach(), lp_draw, real, real & ~same)


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    expert_ids: Tensor,
    mask: Tensor,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_tokens: int | None = None,
    use_student_sample: bool = True,
    use_reinforce: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of Eq. 15 from logits, `chunk_tokens` positions at a time: no float32 copy of all logits is made.

    Position j of every argument predicts response token j. Draws follow softmax(student_logits) in float32 (float64 for float64), one
    uniform number an active position, so that neither padding nor chunks nor the teacher change them.

    Args:
        student_logits: [B, R, V], the only argument that gets a gradient.
        teacher_logits: [B, R, V']. Where V' != V both are cut to the shared prefix before the softmax, and positions whose data token is
            outside it are left out of numerator and denominator.
        expert_ids: [B, R] integers, the data's tokens.
        mask: [B, R], bool or 0/1.
        sample_ids: [B, R] draws; None draws them here.
        generator: of the draws.
        chunk_tokens: positions whose probabilities exist at once; None chooses by V.
        use_student_sample, use_reinforce: see `token_weights`.

    Returns:
        As `token_loss`, and `entropy` of the student in nats.

    Raises:
        ValueError: shapes do not fit, ids of active positions are out of range, chunk_tokens is not positive, or both `sample_ids` and
            `generator` are given.
    """
    size = _check_logits(student_logits, teacher_logits, expert_ids, sample_ids, generator, chunk_tokens)
    real = real_mask(mask, "student_logits", student_logits[..., 0])
    check_ids("expert_ids", expert_ids[real], max(student_logits.shape[-1], teacher_logits.shape[-1]))
    real = real & (expert_ids < size)
    where = real.flatten().nonzero()[:, 0]
    student, teacher = (x[..., :size].reshape(-1, size) for x in (student_logits, teacher_logits.detach()))
    ids = expert_ids.flatten()[where].long()
    chunk = chunk_tokens or max(1, DRAWING // size)
    if sample_ids is not None:
        check_ids("sample_ids", sample_ids[real], size)
        draws = sample_ids.flatten()[where].long()
    elif use_student_sample:
        draws = _draw(student.detach(), where, generator, chunk)
    else:
        draws = ids
    both = torch.stack([ids, draws], 1)
    q, entropy = _Picked.apply(student, where, both, chunk)
    with torch.no_grad():
        p, _ = _Picked.apply(teacher, where, both, chunk)
    whole = torch.ones_like(where, dtype=torch.bool)[None]
    value, metrics = token_loss(
        q[None, :, 0], p[None, :, 0], q[None, :, 1], p[None, :, 1], (ids == draws)[None], whole, "hpd", use_student_sample, use_reinforce
    )
    return value, metrics | {"entropy": entropy.sum() / max(len(where), 1)}


class _Picked(torch.autograd.Function):
    """Log-probs of `ids` [n, K] at the rows `where` [n] of `logits` [N, V], and their entropies [n]; a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, where: Tensor, ids: Tensor, chunk: int):
        dtype = compute_dtype(logits)
        picked, entropy = logits.new_empty(ids.shape, dtype=dtype), logits.new_empty(len(ids), dtype=dtype)
        for rows in chunks(len(where), chunk):
            logprobs = torch.log_softmax(logits[where[rows]].to(dtype), -1)
            picked[rows] = logprobs.gather(1, ids[rows])
            entropy[rows] = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
        ctx.save_for_backward(logits, where, ids)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return picked, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor):
        logits, where, ids = ctx.saved_tensors
        out = torch.zeros_like(logits)
        for rows in chunks(len(where), ctx.chunk):
            share = grad[rows].to(compute_dtype(logits))
            block = torch.softmax(logits[where[rows]].to(share.dtype), -1).mul_(-share.sum(1, keepdim=True))
            for k in range(ids.shape[1]):
                block.scatter_add_(1, ids[rows, k : k + 1], share[:, k : k + 1])
            out[where[rows]] = block.to(logits.dtype)
        return out, None, None, None


def _draw(logits: Tensor, where: Tensor, generator: torch.Generator | None, chunk: int) -> Tensor:
    """[n] ids by inversion of the cumulative distribution, which is added up in float64: at V = 150,000 float32 would lose the tail."""
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(len(where), generator=generator, device=device, dtype=torch.float64).to(logits.device)
    ids = torch.empty_like(where)
    for rows in chunks(len(where), chunk):
        mass = torch.softmax(logits[where[rows]].to(compute_dtype(logits)), -1).cumsum(-1, dtype=torch.float64)
        # The last sum is 1 but for rounding; no id of probability 0 is ever the first above a number.
        found = torch.searchsorted(mass, uniform[rows, None] * mass[:, -1:], right=True)[:, 0]
        ids[rows] = found.clamp_(max=logits.shape[-1] - 1)
    return ids


def _gap(lq: Tensor, lp: Tensor) -> Tensor:
    """q (log p - log q); 0 where q is 0, whatever p is."""
    q = lq.exp()
    return torch.where(q > 0, q * (lp - lq), 0.0)


def _estimates(lq: Tensor, lp: Tensor, lq_draw: Tensor, lp_draw: Tensor, real: Tensor, other: Tensor) -> dict[str, Tensor]:
    """What `token_loss` says of k, k', likelihood and divergences; `other`: active positions where the draw is not the data's token."""
    found: dict[str, Tensor] = {}
    for name, values, where in (("k", _gap(lq, lp), real), ("k_draw", _gap(lq_draw, lp_draw), other)):
        chosen = values[where] if where.any() else values.new_zeros(1)
        found |= {f"{name}_mean": chosen.mean(), f"{name}_min": chosen.min(), f"{name}_max": chosen.max()}
    means = {"nll": -lq, "forward_kl_data": lp - lq, "reverse_kl_draws": lq_draw - lp_draw}
    return found | {name: torch.where(real, values, 0.0).sum() / real.sum().clamp(min=1) for name, values in means.items()}


def _check_logits(
    student: Tensor, teacher: Tensor, expert_ids: Tensor, sample_ids: Tensor | None, generator: Any, chunk_tokens: int | None
) -> int:
    """The size of the shared vocabulary."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.dim() != 3 or not logits.is_floating_point() or not logits.shape[-1]:
            raise ValueError(f"{name} must be floating [B, R, V], got {logits.dtype} {list(logits.shape)}")
    if teacher.shape[:2] != student.shape[:2]:
        raise ValueError(f"teacher_logits has shape {list(teacher.shape)}, student_logits has {list(student.shape)}")
    for name, ids in (("expert_ids", expert_ids), ("sample_ids", sample_ids)):
        if ids is not None and (ids.shape != student.shape[:2] or ids.is_floating_point() or ids.dtype == torch.bool):
            raise ValueError(f"{name} must be integers {list(student.shape[:2])}, got {ids.dtype} {list(ids.shape)}")
    if sample_ids is not None and generator is not None:
        raise ValueError("sample_ids and generator are both given: a generator has nothing to draw then")
    if chunk_tokens is not None:
        check_chunk(chunk_tokens)
    return min(student.shape[-1], teacher.shape[-1])
