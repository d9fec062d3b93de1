"""One rank that pretrains a mixture-of-experts decoder. Imports torch and DeepSpeed: for Ray Train's workers only.

With n tokens predicted in a step by all ranks, T tokens of a pass on all ranks, L layers, N experts, K of them a token:

    L = (1/n) sum of -log p  +  mean over passes and layers of (balance N sum_i f_i P_i + z mean_t lse_t^2)
    f_i = (tokens of expert i) / (T K),  without gradient;   P_i = (1/T) sum_t p_ti

f is counted over all ranks before anything is back-propagated, so the loss is the same whatever number of ranks shares a pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from raysys.config.parallel import effective_stage
from raysys.errors import NumericsError
from raysys.files import write_json
from raysys.methods.mpi import alignment, input_matrix, max_violation, row_cosine
from raysys.models.expert_parallel import ExpertGroup
from raysys.models.moe import Mixture, MoeDecoder, counts, next_token_loss, shape_for
from raysys.models.moe_files import export_moe, load_moe
from raysys.models.packing import Packing
from raysys.models.routing import Routing
from raysys.training import checkpoint, deep, named_checkpoint
from raysys.training.expert_groups import clip_gradients, expert_group, mark
from raysys.training.expert_states import master, put_weight
from raysys.training.optimisers import bind, make_optimizer, rate_of, set_rate
from raysys.training.parameter_groups import parameter_groups, states_of
from raysys.training.pretrain_spec import PretrainSpec, Sequences
from raysys.training.weights import gathered


class Pretrainer:
    """A rank. RANK, WORLD_SIZE and the rendezvous are in the environment. Every method is collective."""

    def __init__(self, spec: PretrainSpec):
        config = spec.config
        self.spec, self.step_index, self.updates = spec, 0, 0
        self.rank, self.world, self.device = deep.join(spec.device, config.trainer.threads, config.seed)
        self.stage = effective_stage(config.trainer.zero_stage, spec.dtype)
        self.model = mark(_model(spec, expert_group(config.trainer.expert_parallel)))
        for mixture in self._overwritten:
            mixture.overwrite_(mixture.router.weight)
        self.activated = counts(self.model.shape).activated
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        optimizer = make_optimizer(self.model, config.optimiser)
        groups = parameter_groups(self.model, config.optimiser)
        self.names = {f"model.{name}": parameter for group in groups for name, parameter in group.parameters.items()}
        self._states = {f"model.{name}": states_of(group.rule) for group in groups for name in group.parameters}
        objective = _Objective(self.model, config.trainer.chunk_tokens)
        offload = config.trainer.offload_optimizer and spec.device == "gpu"
        settings = deep.settings(self.stage, spec.dtype, config.optimiser.clip, self.parameters, offload)
        self.engine: Any = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)[0]
        bind(self.engine, config.optimiser)
        self._loads = torch.zeros(self.model.shape.layers, self.model.shape.experts, dtype=torch.float64)

    @property
    def layout(self) -> dict[str, Any]:
        """What must be equal for shards to be loaded as they are."""
        trainer = self.spec.config.trainer
        group = self.model.expert_group
        split = {} if group is None else {"expert_parallel": group.size}  # of whole experts nothing is said
        return {"ranks": self.world, "zero_stage": trainer.zero_stage, "dtype": self.spec.dtype} | split

    @property
    def _by_name(self) -> bool:
        """Whether DeepSpeed's own checkpoints do not serve: experts are split, or moments are not AdamW's."""
        return self.model.expert_group is not None or self.spec.config.optimiser.whole_matrices

    def moments(self, name: str) -> tuple[str, ...]:
        """The optimiser's states of a parameter, as DeepSpeed sees its name."""
        return self._states[name]

    # -- training

    def step(self, passes: Sequence[Sequences]) -> dict[str, float]:
        """One optimiser step.

        Args:
            passes: this rank's part of each; every rank gives as many, empty ones included.

        Returns:
            Metrics, the same on every rank.

        Raises:
            NumericsError: a loss or the gradient norm is not finite. Parameters are as before the step.
        """
        config = self.spec.config
        rate = rate_of(config.optimiser, self.step_index, config.steps)
        set_rate(self.engine, rate)
        sizes = self._summed(torch.tensor([[part.predicted, len(part.ids)] for part in passes], dtype=torch.float64))
        sums = torch.zeros(3, dtype=torch.float64)
        violation = 0.0
        for number, part in enumerate(passes):
            self.engine.set_gradient_accumulation_boundary(number + 1 == len(passes))
            target, found, loads = self._pass(part, sizes[:, 0].sum(), sizes[number, 1], len(passes))
            self.engine.backward(target * self.world, scale_wrt_gas=False)
            sums += found
            violation += float(max_violation(loads).mean()) / len(passes)
            self._loads += loads
        loss, balance, z = self._summed(sums).tolist()
        self._check(loss + balance + z)
        norm, applied = deep.update(self.engine, self.stage, config.optimiser.clip, partial(clip_gradients, self.model))
        if not applied:
            raise NumericsError(f"step {self.step_index}: the loss is {loss:.4g}, the gradient norm is not finite", _REMEDY)
        self._overwrite()
        self.step_index, self.updates = self.step_index + 1, self.updates + 1
        return {
            "loss": loss,
            "balance_loss": balance,
            "z_loss": z,
            "max_violation": violation,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": float(sizes[:, 1].sum()),
        }

    @property
    def _overwritten(self) -> list[Mixture]:
        return [mixture for mixture in self.model.mixtures() if mixture.router.routing.overwritten]

    @torch.no_grad()
    def _overwrite(self) -> None:
        """The in-place mode, once a step and not in each pass: passes, and layers that are computed again, see the same rows. From the
        float32 masters, since a step is often less than bfloat16 tells apart."""
        for mixture in self._overwritten:
            weight = mixture.router.weight
            put_weight(self.engine, weight, mixture.overwrite_(master(self.engine, weight)))

    def _pass(self, part: Sequences, predicted: Tensor, tokens: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
        """What to back-propagate; loss, balance and z as this rank's share of their means; loads [L, N] of all ranks."""
        config, shape = self.spec.config, self.model.shape
        nothing = not len(part.ids)
        ids, rows = self._inputs(part)
        nll, loads, probs, z = self.engine(ids, rows)
        loads = self._summed(torch.zeros_like(loads) if nothing else loads)
        # A rank without sequences goes through all of it for the sake of the others' collectives.
        weight = 0.0 if nothing else 1.0
        shares = (loads / loads.sum(dim=1, keepdim=True)).to(probs)
        balance = shape.experts * (shares * probs).sum(dim=1).mean() / float(tokens)
        z = z.mean() / float(tokens)
        loss = nll / float(predicted)
        target = weight * (loss + (config.balance_weight * balance + config.z_weight * z) / passes)
        found = torch.stack([loss.detach(), balance.detach() / passes, z.detach() / passes]).double().cpu() * weight
        return target, found, loads.cpu()

    def _inputs(self, part: Sequences) -> tuple[Tensor, Packing]:
        ids, lengths = (part.ids, part.lengths) if len(part.ids) else (np.zeros(2, np.int64), np.array([2]))
        return torch.from_numpy(ids.astype(np.int64)).to(self.device), Packing(lengths, self.device)

    def _check(self, value: float) -> None:
        if not math.isfinite(value):  # the same on every rank: it is a sum over all of them
            raise NumericsError(f"step {self.step_index}: the loss is not finite", _REMEDY)

    def _summed(self, values: Tensor) -> Tensor:
        """Over all ranks."""
        if self.world == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def idle_step(self) -> None:
        """An optimiser step whose gradient is zero."""
        self.engine.set_gradient_accumulation_boundary(True)
        nll, _, probs, _ = self.engine(*self._inputs(Sequences.none()))
        self.engine.backward((nll + probs.sum()) * 0.0, scale_wrt_gas=False)
        self.engine.step()

    # -- reading

    @torch.no_grad()
    def validate(self, passes: Sequence[Sequences]) -> float:
        """Mean -log p in nats a token of this rank's and the others' sequences."""
        sums = torch.zeros(2, dtype=torch.float64)
        for part in passes:
            nll = self.engine(*self._inputs(part))[0]
            if len(part.ids):
                sums += torch.tensor([float(nll), part.predicted], dtype=torch.float64)
        total, count = self._summed(sums).tolist()
        return total / count if count else math.nan

    @torch.no_grad()
    def routers(self) -> dict[str, Any]:
        """What is watched of the routers: `alignment` and `row_cosine` of each layer, and of the loads since the last call `load` [L][N],
        as shares of the mean, with `max_violation_global` [L]."""
        alignments, cosines, group = [], [], self.model.expert_group
        for mixture in self.model.mixtures():
            experts = mixture.experts
            with gathered(self.engine, list(mixture.parameters())):
                rows = mixture.rows().detach()
                matrix = input_matrix(mixture.router.routing.matrix, experts.gate, experts.up, experts.down).detach()
                alignments.append(float(alignment(rows if group is None else group.part(rows), matrix).mean()))
                cosines.append(float(row_cosine(rows)))
        if group is not None:
            alignments = (self._summed(torch.tensor(alignments, dtype=torch.float64)) / self.world).tolist()
        loads, self._loads = self._loads, torch.zeros_like(self._loads)
        mean = loads.mean(dim=1, keepdim=True).clamp_min(1e-12)
        return {
            "alignment": alignments,
            "row_cosine": cosines,
            "load": [[round(value, 4) for value in row] for row in (loads / mean).tolist()],
            "max_violation_global": max_violation(loads).tolist(),
        }

    def export(self, folder: Path, tokenizer: Any) -> None:
        """The stock folder; rank 0 writes, and brings the tokenizer."""
        export_moe(self.model, folder, tokenizer, opened=self._opened, write=self.rank == 0)

    def _opened(self, parameters: list[nn.Parameter]) -> Any:
        return gathered(self.engine, list(parameters))

    def save(self, folder: Path) -> None:
        """See `raysys.training.checkpoint.save` and `raysys.training.named_checkpoint.save`."""
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _LOADS, self._loads.tolist())
        (named_checkpoint if self._by_name else checkpoint).save(self, folder)

    def load(self, folder: Path) -> None:
        """See `raysys.training.checkpoint.load` and `raysys.training.named_checkpoint.load`; what was written decides.

        Raises:
            CheckpointError: the folder fits neither.
        """
        (named_checkpoint if (folder / named_checkpoint.NAMED).is_dir() else checkpoint).load(self, folder)
        self._loads = torch.tensor(json.loads((folder / _LOADS).read_text()), dtype=torch.float64)


class _Objective(nn.Module):
    """The decoder with what a step needs of it: sums, so that parts of a pass add up."""

    def __init__(self, model: MoeDecoder, chunk_tokens: int):
        super().__init__()
        self.model, self.chunk_tokens, self.expert_group = model, chunk_tokens, model.expert_group

    def forward(self, ids: Tensor, rows: Packing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum of -log p; loads [L, N] float64; sums of probabilities [L, N]; sums of squared log-partitions [L]."""
        nll, _, routed = next_token_loss(self.model, ids, rows, self.chunk_tokens)
        probs = [one.probs / one.probs.sum(dim=-1, keepdim=True) for one in routed]
        return (
            nll,
            torch.stack([one.load for one in routed]).double(),
            torch.stack([one.sum(dim=0) for one in probs]),
            torch.stack([one.logits.logsumexp(dim=-1).square().sum() for one in routed]),
        )


def _model(spec: PretrainSpec, group: ExpertGroup | None) -> MoeDecoder:
    config, kind = spec.config, getattr(torch, spec.dtype)
    recompute = config.trainer.activation_checkpointing
    if spec.start is not None:
        return load_moe(spec.start, Routing(**config.router.model_dump()), kind, recompute, group)
    shape = shape_for(config.model, config.router, spec.vocabulary, config.data.sequence)
    return MoeDecoder(shape, recompute, group).initialise(config.seed).to(kind)


_LOADS = "loads.json"
"""What `routers` has counted since its last call."""
_REMEDY = "lower optimiser.learning_rate or optimiser.clip; the weights are those of the last finite update"
