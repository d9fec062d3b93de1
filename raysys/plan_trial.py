"""One real forward and backward step of a pretraining config on this machine, with as many of its layers as memory takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from raysys.config.pretraining import PretrainMoeConfig
from raysys.errors import ConfigError
from raysys.plan import amount
from raysys.plan_pretraining import planned, vocabulary_for

_SHARE = 0.6
"""Of the free memory that weights and gradients may take; the rest is for activations and everybody else."""


@dataclass(frozen=True)
class Trial:
    """What a step did. `layers` of `asked`; `grad_norm` over all parameters; `peak`: bytes of this process at most."""

    layers: int
    asked: int
    tokens: int
    loss: float
    balance: float
    grad_norm: float
    seconds: float
    peak: int

    def line(self) -> str:
        cut = "all" if self.layers == self.asked else f"{self.layers} of"
        why = "" if self.layers == self.asked else ", more do not fit in the memory that is free"
        return (
            f"tried: {cut} {self.asked} layers{why}; forward and backward of {self.tokens:,} random tokens in {self.seconds:.1f} s, "
            f"loss {self.loss:.3f}, balance loss {self.balance:.3f}, gradient norm {self.grad_norm:.3f}, peak memory {amount(self.peak)}"
        )


def try_step(config: PretrainMoeConfig, free: float | None = None, tokens: int | None = None) -> Trial:
    """Fresh weights of the config's shape on a GPU in its dtype, or on CPU in float32.

    Args:
        free: bytes that may be used; None: what is free.
        tokens: of one sequence; None: the config's sequence.

    Raises:
        ConfigError: not even one layer fits.
    """
    import torch

    from raysys.methods.tensors import compute_dtype
    from raysys.models.moe import MoeDecoder, counts, next_token_loss, shape_for
    from raysys.models.packing import Packing
    from raysys.models.routing import balance_loss

    config = planned(config)
    gpu = torch.cuda.is_available() and config.device != "cpu"
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    room = free if free is not None else _free(gpu)
    tokens = tokens or config.data.sequence

    def shape(layers: int):
        return shape_for(config.model.model_copy(update={"layers": layers}), config.router, vocabulary_for(config), config.data.sequence)

    layers = next((n for n in range(config.model.layers, 0, -1) if 2 * dtype.itemsize * counts(shape(n)).total <= _SHARE * room), 0)
    if not layers:
        raise ConfigError(f"not one layer of this model fits in the {amount(room)} that are free here", "try it on a larger machine")
    with torch.device("meta"):
        model = MoeDecoder(shape(layers), config.trainer.activation_checkpointing).to(dtype)
    model = model.to_empty(device=device)
    if config.model.tied:
        model.head.weight = model.embedding.weight
    model.initialise(config.seed)
    began = time.monotonic()
    ids = torch.randint(vocabulary_for(config), (tokens,), generator=torch.Generator().manual_seed(config.seed)).to(device)
    nll, predicted, routed = next_token_loss(model, ids, Packing([tokens], device), config.trainer.chunk_tokens)
    balance = torch.stack([balance_loss(one) for one in routed]).mean()
    loss = nll / predicted
    (loss + config.balance_weight * balance).backward()
    norm = torch.stack([one.grad.norm().to(compute_dtype(one)) for one in model.parameters() if one.grad is not None]).norm()
    found = float(norm), float(loss.detach()), float(balance.detach())  # waits for the device
    return Trial(layers, config.model.layers, tokens, found[1], found[2], found[0], time.monotonic() - began, _peak(gpu))


def _free(gpu: bool) -> float:
    if gpu:
        import torch

        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


def _peak(gpu: bool) -> int:
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
