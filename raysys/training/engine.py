"""One DeepSpeed rank: the model, its optimiser, and what a step does with them. Imports torch and DeepSpeed: for actors only.

Loss of a step, whatever the micro-batches and ranks, with N the step's response tokens (or rows) on all ranks:

    L = sum over micro-batches of (n / N) * mean loss of the micro-batch;  each rank back-propagates its part times the
    number of ranks, because DeepSpeed averages gradients over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from raysys.batch import Batch, Ragged
from raysys.config.parallel import effective_stage
from raysys.errors import ConfigError, NumericsError
from raysys.models.causal import load_causal, response_logprobs
from raysys.training import deep
from raysys.training.hybrid import uniforms
from raysys.training.meter import Meter
from raysys.training.micro import MicroBatch
from raysys.training.objectives import Outputs
from raysys.training.rows import Inputs, Rows
from raysys.training.schedule import learning_rate
from raysys.training.spec import Share, Tally, TrainerSpec


class Engine:
    """A rank of the trainer. RANK, WORLD_SIZE and the rendezvous are in the environment before this module is imported.

    Every method is collective: all ranks call it together, in the same order.
    """

    def __init__(self, spec: TrainerSpec):
        self.spec, self.step_index, self.updates = spec, 0, 0
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.rank, self.world, self.device = deep.join(spec.device, spec.config.threads, spec.seed)
        # DeepSpeed moves it to its device.
        recompute = spec.config.activation_checkpointing
        self.model = load_causal(spec.model, self.dtype, "cpu", True, activation_checkpointing=recompute, vocabulary=spec.vocabulary)
        if getattr(self.model, "_weight_conversions", None):
            raise ConfigError(
                f"{spec.model}: transformers holds its weights under other names and shapes than the files, which is not supported yet"
            )
        self.names = dict(self.model.named_parameters())
        self.padded = not self.model.packs
        self.stage = effective_stage(spec.config.zero_stage, spec.dtype)
        self.parameters = sum(parameter.numel() for parameter in self.names.values())
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=spec.learning_rate,
            betas=spec.config.betas,
            eps=spec.config.epsilon,
            weight_decay=spec.config.weight_decay,
            fused=True,
        )
        offload = spec.config.offload_optimizer and spec.device == "gpu"
        config = deep.settings(self.stage, spec.dtype, spec.config.clip, self.parameters, offload)
        self.engine: Any = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0]

    @property
    def layout(self) -> dict[str, Any]:
        """What must be equal for shards to be loaded as they are."""
        return {"ranks": self.world, "zero_stage": self.spec.config.zero_stage, "dtype": self.spec.dtype}

    # -- training

    def step(self, batch: Batch, shares: Sequence[Share]) -> Tally:
        """One step of the run: an optimiser step for each of `shares` (more than one: old log-probs first).

        Returns:
            This rank's part of the metrics.

        Raises:
            DataError: a row that cannot be trained on.
            NumericsError: a loss or the gradient norm is not finite. Parameters are as before the failed optimiser step and may
                be saved; gradients are not, so no further step should follow.
        """
        rows = self._rows(batch, self.spec.objective.columns)
        old = self._old_logprobs(rows, shares) if len(shares) > 1 else None
        config = self.spec.config
        rate = learning_rate(
            self.spec.learning_rate, self.step_index, self.spec.steps, config.schedule, config.warmup_steps, config.min_lr_rate
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        tally, norms = Tally(), []
        for share in shares:
            self._accumulate(rows, share, old, tally, 1 / len(shares))
            norms.append(self._update(rows, share))
        self.step_index += 1
        tally.common |= {
            "grad_norm": float(np.mean(norms)),
            "learning_rate": rate,
            "tokens": float(sum(share.tokens for share in shares)),
        }
        return tally

    def _accumulate(self, rows: Rows, share: Share, old: dict[int, np.ndarray] | None, tally: Tally, weight: float) -> None:
        """Gradients of all micro-batches, and their metrics into `tally`."""
        packs = rows.packs(share.rows, self.spec.config.micro_batch_tokens, share.micro_batches, self.padded)
        losses: list[Tensor] = []
        meter = Meter()
        for index, pack in enumerate(packs):
            inputs = rows.inputs(pack)
            if inputs.dummy:
                loss, target, part = torch.zeros((), device=self.device), self._forward(inputs).sum(), 0.0
            else:
                before = None if old is None else torch.from_numpy(np.concatenate([old[int(row)] for row in pack])).to(self.device)
                target, outputs, loss, metrics = self._loss(MicroBatch(self.spec.objective, inputs, rows.micro(pack), before))
                tokens = int(rows.trained[pack].sum())
                part = tokens / share.tokens
                if self.spec.objective.weighting == "sequence":
                    part = len(pack) / share.sequences
                meter.part("loss", loss * (part * weight))
                meter.add({"entropy": (outputs.entropy.sum(), outputs.mask.sum()), **metrics}, tokens)
            losses.append(loss)
            self.engine.set_gradient_accumulation_boundary(index + 1 == len(packs))
            self.engine.backward(target * (part * self.world), scale_wrt_gas=False)
        self._check_losses(losses, packs, rows)
        meter.read(tally)

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Outputs, Tensor, dict[str, Any]]:
        """What to back-propagate, the answers, the loss, metrics. Where it is a sum over tokens its gradient is made on the way."""
        objective, asked = self.spec.objective, {"query_ids": micro.queries, "entropy": True}
        if micro.separable:
            target, logprobs, entropy = self._forward(micro.inputs, **asked, slope=micro.slope)
        else:
            target, (logprobs, entropy) = None, self._forward(micro.inputs, **asked)
        outputs = micro.outputs(logprobs, entropy.detach())
        loss, metrics = objective.loss(outputs, micro.micro)
        return loss if target is None else target, outputs, loss.detach(), metrics

    def _forward(self, inputs: Inputs, **asked: Any) -> Any:
        return response_logprobs(
            self.engine,
            inputs.input_ids,
            inputs.prompt_lengths,
            inputs.response_lengths,
            self.spec.temperature,
            self.spec.config.chunk_tokens,
            targets=inputs.targets,
            **asked,
        )

    def _check_losses(self, losses: list[Tensor], packs: list[np.ndarray], rows: Rows) -> None:
        values = torch.stack([loss.float() for loss in losses])
        bad = (~torch.isfinite(values)).any().float()
        if self.world > 1:  # a rank that stopped alone would leave the others waiting in the optimiser's collectives
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bad:
            return
        found = [(float(value), pack) for value, pack in zip(values, packs, strict=True) if not math.isfinite(value)]
        mine = f"micro-batch of {rows.name(found[0][1])} has loss {found[0][0]}" if found else None
        everyone: list[str | None] = [mine]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, mine)
        first = next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text), "")
        raise NumericsError(f"step {self.step_index}: {first}", _NUMERICS_REMEDY)

    def _update(self, rows: Rows, share: Share) -> float:
        """The optimiser step on the gradients of `share`. Returns the gradient norm before clipping."""
        norm, applied = deep.update(self.engine, self.stage, self.spec.config.clip)
        if not applied:
            mine = rows.name(share.rows) or "no rows"
            raise NumericsError(
                f"step {self.step_index}: all losses are finite, the gradient norm is not; rank {self.rank} had {mine}", _NUMERICS_REMEDY
            )
        self.updates += 1
        return norm

    def idle_step(self) -> None:
        """An optimiser step whose gradient is zero."""
        inputs = Rows.nothing(self.device)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self._forward(inputs).sum() * 0.0, scale_wrt_gas=False)
        self.engine.step()

    # -- reading

    def logprobs(self, batch: Batch, share: Share) -> Ragged:
        """Log-probs in nats of the response ids of this rank's rows, float32, in the order of `share.rows`."""
        found = self._old_logprobs(self._rows(batch, ()), [share])
        return Ragged.of([found[int(row)] for row in share.rows], np.float32)

    def draw(self, batch: Batch, share: Share) -> Ragged:
        """One id a trained response token, drawn from the student on the data's own prefix at the run's temperature; order of `share.rows`.

        A draw follows from the run's seed, the sample's id and the token's place: see `raysys.training.hybrid.uniforms`.
        """
        rows = self._rows(batch, ())
        numbers = uniforms(batch.ids, rows.trained, self.spec.seed)

        def drawn(inputs: Inputs) -> Tensor:
            chosen = [numbers[row] for row in inputs.rows] or [np.zeros(1)]
            return self._forward(inputs, uniform=torch.from_numpy(np.concatenate(chosen)).to(self.device))[0]

        found = self._read(rows, [share], drawn)
        return Ragged.of([found[int(row)] for row in share.rows], np.int32)

    def _old_logprobs(self, rows: Rows, shares: Sequence[Share]) -> dict[int, np.ndarray]:
        return self._read(rows, shares, lambda inputs: self._forward(inputs).float())

    def _read(self, rows: Rows, shares: Sequence[Share], forward: Callable[[Inputs], Tensor]) -> dict[int, np.ndarray]:
        """What `forward` says of each row's response tokens, without gradient."""
        found: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for share in shares:
                for pack in rows.packs(share.rows, self.spec.config.micro_batch_tokens, share.micro_batches, self.padded):
                    flat = forward(rows.inputs(pack)).cpu().numpy()
                    if len(pack):
                        pieces = np.split(flat, np.cumsum(rows.trained[pack])[:-1])
                        found |= {int(row): piece for row, piece in zip(pack, pieces, strict=True)}
        return found

    def probe_logprobs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probs of ids[1:] given what precedes each, float32, temperature 1."""
        tokens = torch.as_tensor(np.asarray(ids, dtype=np.int64), device=self.device)
        lengths = torch.tensor([1]), torch.tensor([len(tokens) - 1])
        with torch.no_grad():
            return response_logprobs(self.engine, tokens, *lengths, 1.0, self.spec.config.chunk_tokens).float().cpu().numpy()

    def _rows(self, batch: Batch, columns: Sequence[str]) -> Rows:
        return Rows(batch, columns, self.model.config.get_text_config().vocab_size, self.device)


_NUMERICS_REMEDY = "lower learning_rate or trainer.clip, or look at these rows; the weights are those of the last finite update"
