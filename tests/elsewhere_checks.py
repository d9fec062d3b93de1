"""Run by `test_elsewhere.py`: steps of trainers, scorers and quantisers on a device that is not the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raysys.batch import Batch, Ragged
from raysys.compression.backends import gptq
from raysys.compression.statistics import Statistics
from raysys.config.optimising import Optimiser
from raysys.config.parts import Trainer
from raysys.config.runs import NewModel
from raysys.methods import logprobs_blocks, logprobs_kernels
from raysys.models import grouped, packing
from raysys.models.causal import load_causal
from raysys.models.experts import mixture
from raysys.models.moe import MoeDecoder, MoeShape
from raysys.models.routing import Routing
from raysys.models.scratch import new_causal
from raysys.scoring.scorer import ScorerSpec, ScorerWorker
from raysys.training import pretrainer
from raysys.training.calibrated import CalibAdvObjective
from raysys.training.engine import Engine
from raysys.training.hybrid import HpdObjective
from raysys.training.objectives import GopdObjective, SftObjective
from raysys.training.optimisers import make_optimizer
from raysys.training.pretrain_spec import Sequences
from raysys.training.spec import Share, TrainerSpec
from raysys.training.weights import Packer
from tests.elsewhere import DEVICE, Elsewhere

CASES = [
    (GopdObjective(1.2), "bfloat16"),
    (GopdObjective(aggregation="sequence_token_mean"), "float32"),
    (SftObjective(), "bfloat16"),
    (HpdObjective(), "bfloat16"),
    (CalibAdvObjective(), "float32"),
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without what only CUDA has: Triton, and streams to wait for."""
    plain = logprobs_kernels.Kernels(logprobs_kernels.fold, logprobs_kernels.slope)
    monkeypatch.setattr(logprobs_blocks, "kernels_for", lambda _: plain)
    monkeypatch.setattr(grouped, "_fused", lambda function, _: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # which hides the mode
    with Elsewhere():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    size = NewModel(hidden_size=32, layers=2, heads=2, kv_heads=1, ffn_size=48, context=64)
    return str(new_causal(size, tmp_path_factory.mktemp("model"), 0))


class Plain:
    """A DeepSpeed engine's part of a step, without one."""

    def __init__(self, module: Any, optimizer: Any):
        self.module, self.optimizer = module, optimizer

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_optimization_stage(self) -> int:
        return 0


def rows() -> Batch:
    """Five rows with all columns that an objective reads."""
    rng = np.random.default_rng(0)
    lengths = (7, 1, 12, 20, 4)
    prompts = Ragged.of([rng.integers(3, 20, 3) for _ in lengths], np.int32)
    ids = {name: Ragged.of([rng.integers(3, 20, length) for length in lengths], np.int32) for name in ("response_ids", "draw_ids")}
    told = ("teacher_logprobs", "reference_logprobs", "rollout_logprobs", "advantages", "teacher_draw_logprobs")
    numbers = {name: Ragged.of([-rng.random(length) for length in lengths], np.float32) for name in told}
    names = {"prompt_id": [f"p{row}" for row in range(5)], "sample": [0] * 5, "domain": ["a", "b", "a", "b", "a"]}
    return Batch.from_columns(prompt_ids=prompts, **names, **ids, **numbers)


def share(batch: Batch, chosen: list[int], micro_batches: int) -> Share:
    return Share(np.array(chosen), int(batch.lengths("response_ids")[chosen].sum()), len(chosen), micro_batches)


@pytest.mark.parametrize(("objective", "dtype"), CASES, ids=[type(objective).__name__ for objective, _ in CASES])
def test_a_step_with_a_micro_batch_of_nothing(folder: str, objective: Any, dtype: str) -> None:
    """As a rank has one that got fewer rows than another."""
    engine, settings = Engine.__new__(Engine), Trainer(micro_batch_tokens=24, chunk_tokens=8, zero_stage=0)
    engine.spec = TrainerSpec(settings, folder, objective, 1e-3, 10, 0, 1.0, "gpu", dtype, None, None)
    engine.model = load_causal(folder, dtype, "cpu", True).to(DEVICE)  # type: ignore[arg-type]
    engine.engine = Plain(engine.model, torch.optim.SGD(engine.model.parameters(), 0.1))
    engine.rank, engine.world, engine.device, engine.stage, engine.padded = 0, 1, DEVICE, 0, not engine.model.packs
    engine.step_index = engine.updates = 0
    batch = rows()
    metrics = engine.step(batch, [share(batch, [0, 1, 2], 6), share(batch, [3, 4], 6)]).metrics()
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    whole = share(batch, [0, 1, 2, 3, 4], 8)
    assert len(engine.logprobs(batch, whole).values) == len(engine.draw(batch, whole).values) == 44
    assert np.isfinite(engine.probe_logprobs([3, 4, 5])).all()
    engine.idle_step()


@pytest.mark.parametrize(("kind", "mode"), [("adamw", "functional"), ("muonh", "functional"), ("adamw", "inplace")])
def test_a_step_of_pretraining(kind: Any, mode: Any) -> None:
    config, routing = Optimiser(kind=kind), Routing(mode=mode)
    sizes = {"width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "experts": 4, "top_k": 2, "expert_width": 12}
    shape = MoeShape(vocabulary=99, routing=routing, **sizes)
    model = MoeDecoder(shape, checkpointing=True).initialise(0).to(torch.bfloat16)
    optimizer = make_optimizer(model, config)
    model.to(DEVICE)
    rank = pretrainer.Pretrainer.__new__(pretrainer.Pretrainer)
    rank.model, rank.engine = model, Plain(pretrainer._Objective(model, 64), optimizer)
    rank.rank, rank.world, rank.device, rank.stage, rank.step_index, rank.updates = 0, 1, DEVICE, 0, 2000, 0
    rank._loads = torch.zeros(2, 4, dtype=torch.float64)
    rank.spec = SimpleNamespace(config=SimpleNamespace(optimiser=config, steps=10_000, balance_weight=0.1, z_weight=0.1))  # type: ignore[assignment]
    passes = [Sequences(np.arange(30, dtype=np.int32), np.array(lengths)) for lengths in ([20, 1, 9], [15, 15])]
    assert np.isfinite(rank.step(passes)["loss"]) and np.isfinite(rank.step(passes)["loss"])
    assert np.isfinite(rank.validate(passes)) and len(rank.routers()["alignment"]) == 2


def test_experts_one_by_one_and_none_of_them() -> None:
    gate, up, down = (torch.randn(*size).to(DEVICE).requires_grad_() for size in ((4, 12, 20), (4, 12, 20), (4, 20, 12)))
    for tokens in (9, 0):
        weights, indices = torch.rand(tokens, 4).topk(2)
        x, weights = torch.randn(tokens, 20).to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_()
        mixture(x, weights, indices.to(DEVICE), gate, up, down).sum().backward()


@pytest.mark.parametrize(("width", "values", "flash"), [(16, 16, True), (20, 20, False), (512, 512, False), (24, 16, False)])
def test_heads_that_flash_attention_does_not_have_go_block_by_block(
    width: int, values: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    taken: list[int] = []
    monkeypatch.setattr(packing, "_flash", lambda query, *_: taken.append(1) or query)
    query, key, value = (torch.randn(1, 2, 5, size, dtype=torch.bfloat16).to(DEVICE) for size in (width, width, values))
    out, _ = packing.attention(torch.nn.Module(), query, key, value, None, packing=packing.Packing([3, 2], DEVICE))
    assert out.shape == (1, 5, 2, values) and bool(taken) == flash


def test_scoring(folder: str) -> None:
    scorer = ScorerWorker(ScorerSpec({"a": folder, "b": folder}, None, folder, 1.0, "gpu", "bfloat16", 24, 8, 1))
    scorer._models = {folder: load_causal(folder, "bfloat16").to(DEVICE)}  # type: ignore[arg-type]
    assert np.isfinite(scorer.score(rows()).ragged("teacher_logprobs").values).all()


def test_buckets_for_engines(folder: str) -> None:
    model = load_causal(folder, "bfloat16").to(DEVICE)  # type: ignore[arg-type]
    packer = Packer(SimpleNamespace(module=model, zero_optimization_stage=lambda: 0), 10_000)
    for index in range(len(packer.plan.layouts())):
        bucket, offer = packer.gather(index), packer.offer(index, None)
        assert bucket is not None and offer is not None and bucket.digest == offer.digest


@pytest.mark.parametrize("levels", ["uniform", "binary"])
def test_calibrated_rounding(levels: Any) -> None:
    inputs, sums = torch.randn(20, 8), Statistics(8, device=DEVICE)
    sums.add(inputs.to(DEVICE), (inputs + 0.1).to(DEVICE))
    for down in (False, True):
        made = gptq(torch.randn(4, 8).to(DEVICE), sums, 2, 4, down=down, levels=levels, iterations=1)
        assert torch.isfinite(made.dequantize().cpu()).all()


def test_the_stand_in_refuses_what_a_gpu_refuses(tmp_path: Path) -> None:
    there = torch.ones(3).to(DEVICE)
    for mixed in (lambda: there + torch.ones(3), lambda: torch.stack([there.sum(), torch.zeros(())]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    with pytest.raises(TypeError):
        torch.save(there, tmp_path / "there.pt")
    assert float(there.sum() + torch.ones(())) == 4
