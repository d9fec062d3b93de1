"""Muon, AdamH and MuonH: their steps on matrices and stacks, alone and inside DeepSpeed's engine on one and two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raysys.config.optimising import Optimiser
from raysys.errors import CheckpointError, ConfigError
from raysys.methods.matrix_steps import hyperball_step, norms, orthogonal
from raysys.models.moe import MoeDecoder, MoeShape, next_token_loss
from raysys.models.packing import Packing
from raysys.training.matrix_optimizer import MatrixOptimizer
from raysys.training.optimisers import make_optimizer, rate_of, set_rate
from raysys.training.partitions import Fragment, places
from tests.training.ranks import Ranks

# Of sizes that leave an expert and a router cut between two ranks.
SHAPE = MoeShape(vocabulary=40, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, experts=3, top_k=2, expert_width=12, deviation=0.2)
MATRICES = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", ".experts.", ".router.")
WHOLE = ("muon", "adamh", "muonh")


def config(kind: str, **keys: Any) -> Optimiser:
    return Optimiser.parse({"kind": kind, "learning_rate": 0.01, "base_width": None, "schedule": "constant", "warmup_steps": 0} | keys)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decoder() -> MoeDecoder:
    return MoeDecoder(SHAPE).initialise(0)


def is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and any(part in name for part in MATRICES)


def stepped(kind: str, steps: int, size: float = 1.0, idle: bool = False, **keys: Any) -> tuple[MoeDecoder, MatrixOptimizer]:
    """A decoder after steps with drawn gradients of some size; with `idle`, expert 1 has none."""
    model = decoder()
    optimizer = make_optimizer(model, config(kind, **keys))
    for step in range(steps):
        for number, (name, parameter) in enumerate(model.named_parameters()):
            parameter.grad = size * drawn(1000 + 100 * step + number, *parameter.shape)
            if idle and ".experts." in name:
                parameter.grad[1] = 0
        optimizer.step()
    return model, optimizer  # type: ignore[return-value]


# -- the maths


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_vectors() -> None:
    for shape in ((12, 20), (20, 12), (16, 16)):
        u, _, v = torch.linalg.svd(drawn(1, *shape, dtype=torch.float64), full_matrices=False)
        sizes = torch.linspace(0.3, 1.0, len(v), dtype=torch.float64)
        found = orthogonal(3e-4 * (u * sizes) @ v)
        inner = u.T @ found @ v.T
        values = inner.diagonal()
        assert ((values > 0.65) & (values < 1.25)).all()
        torch.testing.assert_close(inner, values.diag(), atol=1e-9, rtol=0)


def test_a_stack_is_its_matrices_one_by_one() -> None:
    stack, directions = drawn(2, 5, 6, 9, dtype=torch.float64), drawn(3, 5, 6, 9, dtype=torch.float64)
    directions[3] *= 1e-6
    for whole, single in (
        (orthogonal(directions), [orthogonal(one) for one in directions]),
        (hyperball_step(stack, directions, 0.1, 2.0), [hyperball_step(*pair, 0.1, 2.0) for pair in zip(stack, directions)]),
    ):
        torch.testing.assert_close(whole, torch.stack(single), atol=1e-12, rtol=0)
    before = orthogonal(directions)
    directions[0] += 1.0
    assert (orthogonal(directions) - before).abs().amax((1, 2)).gt(1e-12).tolist() == [True, False, False, False, False]


def test_a_hyperball_step_by_hand() -> None:
    weights, direction = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    before = torch.tensor([[3.0, -0.5], [0.0, 4.0]])  # 0.1 times the norm 5 against the unit direction
    torch.testing.assert_close(hyperball_step(weights, direction, 0.1, None), before * 5 / before.norm())
    torch.testing.assert_close(hyperball_step(weights, torch.zeros(2, 2), 0.1, None), weights)
    # On the sphere, and turned by less than the rate says.
    moved = hyperball_step(weights, drawn(4, 2, 2), 0.1, 1.0)
    assert moved.norm().item() == pytest.approx(1.0, abs=1e-6)


def test_bad_input_of_the_maths() -> None:
    with pytest.raises(ValueError, match=r"matrices must be floating \[..., r, c\], got \[3\]"):
        orthogonal(torch.ones(3))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        orthogonal(torch.ones(3, 3), 0)
    with pytest.raises(ValueError, match=r"directions have shape \[2, 3\], weights \[3, 3\]"):
        hyperball_step(torch.ones(3, 3), torch.ones(2, 3), 0.1, None)
    with pytest.raises(ValueError, match="rate must not be negative"):
        hyperball_step(torch.ones(3, 3), torch.ones(3, 3), -0.1, None)


# -- the optimiser on whole tensors


def test_adamw_is_torchs_in_every_kind() -> None:
    model, reference = decoder(), decoder()
    optimizer = make_optimizer(model, config("adamw", router_weight_decay=0.1))
    decayed = [parameter for parameter in reference.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in reference.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(3):
        for number, pair in enumerate(zip(model.parameters(), reference.parameters(), strict=True)):
            pair[0].grad = drawn(1000 + 100 * step + number, *pair[0].shape)
            pair[1].grad = pair[0].grad.clone()
        optimizer.step()
        theirs.step()
    mixed, _ = stepped("muon", 3)
    for (name, mine), other, beside in zip(model.named_parameters(), reference.parameters(), mixed.parameters(), strict=True):
        assert torch.equal(mine, other)
        if not is_matrix(name, mine):
            assert torch.equal(beside, other), name


def test_muon_is_torchs_to_its_bfloat16() -> None:
    model, _ = stepped("muon", 3, router_weight_decay=0.1)
    reference = decoder()
    names = [name for name, parameter in reference.named_parameters() if is_matrix(name, parameter) and parameter.dim() == 2]
    mine, start = dict(reference.named_parameters()), dict(decoder().named_parameters())
    theirs = torch.optim.Muon([mine[name] for name in names], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for number, (name, parameter) in enumerate(reference.named_parameters()):
            parameter.grad = drawn(1000 + 100 * step + number, *parameter.shape) if name in names else None
        theirs.step()
    after = dict(model.named_parameters())
    for name in names:
        gap = (after[name] - mine[name]).norm() / (mine[name] - start[name]).norm()
        assert gap < 0.02, f"{name}: {gap:.3f} of the way"


@pytest.mark.parametrize("kind", ["adamh", "muonh"])
@pytest.mark.parametrize("norm", ["sqrt_out", "initial"])
def test_hyperball_keeps_norms_and_sizes_of_steps(kind: str, norm: str) -> None:
    fresh = dict(decoder().named_parameters())
    for steps in (0, 20):
        model, _ = stepped(kind, steps, matrix_norm=norm)
        for name, parameter in model.named_parameters():
            if is_matrix(name, parameter):
                target = parameter.shape[-2] ** 0.5 if norm == "sqrt_out" else norms(fresh[name])
                assert ((norms(parameter) / target - 1).abs() < 1e-6).all(), name
    one, two = (dict(stepped(kind, steps, matrix_norm=norm)[0].named_parameters()) for steps in (0, 1))
    for name, before in one.items():
        if is_matrix(name, before):
            rate = 0.01 * 0.2 * before.shape[-1] ** 0.5
            # Brought back, a step of t R has a length near t R: u is drawn, and so nearly orthogonal to W.
            chord = norms(two[name] - before) / norms(before)
            assert (chord <= rate * 1.001).all() and (chord > 0.9 * rate).all(), name


@pytest.mark.parametrize("kind", WHOLE)
def test_the_scale_of_gradients_does_not_matter(kind: str) -> None:
    keys = {"epsilon": 1e-30}
    first, second = (dict(stepped(kind, 3, size, **keys)[0].named_parameters()) for size in (1.0, 1e-6))
    for name, parameter in first.items():
        if is_matrix(name, parameter):
            torch.testing.assert_close(parameter, second[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", WHOLE)
def test_an_idle_expert_stays_finite_and_where_it_is(kind: str) -> None:
    start, _ = stepped(kind, 0)
    model, _ = stepped(kind, 3, idle=True, weight_decay=0.0)
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if ".experts." in name:
            torch.testing.assert_close(parameter[1], before[name][1], atol=1e-6, rtol=0)
            assert (parameter[0] - before[name][0]).abs().max() > 1e-4


# -- flat parts


def test_places_of_flat_parts_by_hand() -> None:
    # Two tensors in one vector of 36 + 4 (padding), two ranks: a stack of three [2, 4] and a [3, 4].
    shapes = {"a": (3, 2, 4), "b": (3, 4)}
    fragments = [[Fragment("a", 0, 20, 0)], [Fragment("a", 20, 4, 0), Fragment("b", 0, 12, 4)]]
    first, second = (places(fragments, shapes, rank) for rank in (0, 1))
    assert [(block.start, block.count, block.rows, block.columns) for block in first.blocks] == [(0, 2, 2, 4)]
    assert [(block.start, block.count, block.rows, block.columns) for block in second.blocks] == [(4, 1, 3, 4)]
    assert [(cut.start, cut.begin, cut.length) for cut in (*first.cuts, *second.cuts)] == [(16, 0, 4), (0, 4, 4)]
    assert first.cuts[0].pieces == second.cuts[0].pieces == ((0, 0, 4), (1, 4, 4))
    # A matrix over three ranks, of which the middle one holds nothing else.
    middle = places([[Fragment("b", 0, 4, 0)], [Fragment("b", 4, 4, 0)], [Fragment("b", 8, 4, 0)]], shapes, 1)
    assert not middle.blocks and [(cut.begin, cut.length) for cut in middle.cuts] == [(4, 4)]


@pytest.mark.parametrize("ends", [(0, 7, 9, 11, 44), (0, 0, 1, 43, 44), (0, 8, 32, 44, 44)])
def test_cut_matrices_come_together_on_all_who_hold_a_piece(ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"b": drawn(1, 4, 5), "a": drawn(2, 3, 2, 4)}
    flat, ranks = torch.cat([one.flatten() for one in tensors.values()]), range(len(ends) - 1)
    fragments: list[list[Fragment]] = [[] for _ in ranks]
    for rank in ranks:
        for name, low, high in (("b", 0, 20), ("a", 20, 44)):
            begin, end = max(low, ends[rank]), min(high, ends[rank + 1])
            if begin < end:
                fragments[rank].append(Fragment(name, begin - low, end - begin, begin - ends[rank]))
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    found = [places(fragments, shapes, rank) for rank in ranks]
    parts = [flat[ends[rank] : ends[rank + 1]] for rank in ranks]
    sent: list[list[Tensor]] = []

    def collect(received: Tensor, out: Tensor, read: list[int], write: list[int], group: Any) -> None:
        sent.append(list(out.split(write)))
        received.fill_(torch.nan)

    monkeypatch.setattr("torch.distributed.all_to_all_single", collect)
    for where, part in zip(found, parts):
        where.whole(part)
    known = {tuple(one.flatten().tolist()) for one in (tensors["b"], *tensors["a"])}
    for rank, (where, part) in enumerate(zip(found, parts)):
        given = torch.cat([pieces[rank] for pieces in sent]) if sent else torch.empty(0)
        monkeypatch.setattr("torch.distributed.all_to_all_single", lambda received, *_, given=given, group: received.copy_(given))
        whole = where.whole(part)
        assert len(whole) == len(where.cuts) and {tuple(one.flatten().tolist()) for one in whole} <= known
        held = sum(cut.length for cut in where.cuts) + sum(block.count * block.rows * block.columns for block in where.blocks)
        assert held == len(part)


# -- inside DeepSpeed, on ranks


def engine_of(rank: int, ranks: int, port: int, kind: str, stage: int, dtype: str, bound: bool = True) -> Any:
    import deepspeed

    from raysys.training.optimisers import bind

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # a garbage collection each
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = config(kind, epsilon=1e-4)
    model = decoder().to(getattr(torch, dtype))
    half = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    keys = (half if dtype == "bfloat16" else {}) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "allgather_bucket_size": 4000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine = deepspeed.initialize(model=model, optimizer=make_optimizer(model, settings), config=keys)[0]
    if bound:
        bind(engine, settings)
    if ranks > 1 and stage > 0 and settings.whole_matrices:
        cut = [cut.rows * cut.columns for where in engine.optimizer.optimizer._places.values() for cut in where.cuts]
        assert sorted(cut) == [3 * 16, 12 * 16]
    return engine


def train_rows(engine: Any, rank: int, ranks: int, steps: range) -> None:
    """Each step on four rows of eight tokens, an equal share of them a rank."""
    for step in steps:
        ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(step))[rank::ranks]
        loss, tokens, _ = next_token_loss(engine, ids.flatten(), Packing([8] * len(ids), "cpu"))  # type: ignore[arg-type]
        engine.backward(loss / tokens)
        engine.step()


def run(
    rank: int, ranks: int, port: int, *, kind: str, stage: int, dtype: str = "float32", steps: tuple[int, int] = (0, 4), **how: Any
) -> dict[str, dict[str, Tensor]]:
    """The state by name after some steps. how: folders to load from, and to save to after two steps; states to put."""
    from raysys.training.named_states import named_states, put_named_states

    engine = engine_of(rank, ranks, port, kind, stage, dtype, how.get("bound", True))
    if "load" in how:
        engine.load_checkpoint(how["load"], tag="state")
    if "put" in how:
        put_named_states(engine, how["put"].items())
    set_rate(engine, 0.01)
    if "save" in how:
        train_rows(engine, rank, ranks, range(2))
        engine.save_checkpoint(how["save"], tag="state", save_latest=False)
        steps = (2, steps[1])
    train_rows(engine, rank, ranks, range(*steps))
    found = {name: {key: value.clone() for key, value in state.items()} for name, state in named_states(engine)}
    lived = {name: one.detach().float() for name, one in engine.module.named_parameters()}
    assert all((lived[name] - state["fp32"]).abs().max() <= (0.01 if dtype == "bfloat16" else 0) for name, state in found.items())
    return found


def gap(first: dict[str, dict[str, Tensor]], second: dict[str, dict[str, Tensor]]) -> float:
    assert {name: sorted(state) for name, state in first.items()} == {name: sorted(state) for name, state in second.items()}
    return max(float((value - second[name][key]).abs().max()) for name, state in first.items() for key, value in state.items())


@pytest.mark.parametrize("kind", WHOLE)
def test_two_ranks_under_zero_are_one_without(kind: str, solo: Ranks, pair: Ranks) -> None:
    alone = solo(run, kind=kind, stage=0)[0]
    start = {name: one.detach() for name, one in decoder().named_parameters()}
    assert max(float((state["fp32"] - start[name]).abs().max()) for name, state in alone.items()) > 0.01
    for stage in (1, 2):
        first, second = pair(run, kind=kind, stage=stage)
        assert gap(first, second) == 0
        assert gap(alone, first) < 1e-5, f"stage {stage}: {gap(alone, first):.1e}"


def test_ranks_and_stages_apart_change_nothing(solo: Ranks, pair: Ranks) -> None:
    alone = solo(run, kind="muonh", stage=0)[0]
    assert gap(alone, pair(run, kind="muonh", stage=0)[1]) < 1e-5
    assert gap(alone, solo(run, kind="muonh", stage=2)[0]) < 1e-5


@pytest.mark.parametrize(("kind", "stage", "dtype"), [("muonh", 2, "float32"), ("adamh", 1, "bfloat16")])
def test_saved_loaded_and_continued_bit_by_bit(kind: str, stage: int, dtype: str, pair: Ranks, tmp_path: Path) -> None:
    how: dict[str, Any] = {"kind": kind, "stage": stage, "dtype": dtype}
    straight = pair(run, **how, save=str(tmp_path))[0]
    resumed = pair(run, **how, steps=(2, 4), load=str(tmp_path))[0]
    assert gap(straight, resumed) == 0 and all(state["step"] == 4 for state in resumed.values())
    for name, state in resumed.items():
        if is_matrix(name, state["fp32"]):  # the float32 masters, whatever the model's dtype
            assert ((norms(state["fp32"]) / state["fp32"].shape[-2] ** 0.5 - 1).abs() < 1e-6).all()


def test_states_by_name_continue_under_another_layout(solo: Ranks, pair: Ranks) -> None:
    straight = solo(run, kind="muonh", stage=0)[0]
    half = pair(run, kind="muonh", stage=2, steps=(0, 2))[0]
    assert gap(half, pair(run, kind="muonh", stage=1, steps=(2, 2), put=half)[1]) == 0
    for stage in (0, 1):
        assert gap(straight, solo(run, kind="muonh", stage=stage, steps=(2, 4), put=half)[0]) < 1e-5
    del half["norm.weight"]
    with pytest.raises(CheckpointError, match=r"the checkpoint has no norm.weight"):
        solo(run, kind="muonh", stage=1, put=half)


def test_what_cannot_work_says_so(solo: Ranks) -> None:
    with pytest.raises(ConfigError, match=r"muon needs matrices whole: set zero_stage to 0, 1 or 2, or optimiser.kind=adamw"):
        solo(run, kind="muon", stage=3)
    with pytest.raises(ConfigError, match=r"where its matrices lie \(call raysys.training.optimisers.bind\(engine\)"):
        solo(run, kind="muonh", stage=1, bound=False)


def test_rates_of_a_run() -> None:
    settings = config("muonh", schedule="wsd", warmup_steps=2, decay_share=0.4, min_lr_rate=0.5)
    rates = [rate_of(settings, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.005, *[0.01] * 6, 0.00875, 0.0075, 0.00625])
