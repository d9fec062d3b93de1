"""What ranks do in `test_expert_parallel.py`: a layer or a decoder whose experts they hold between them. By default, one rank has all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from raysys.models.expert_parallel import ExpertGroup, load_whole, own_part, summed, whole_tensors
from raysys.models.moe import Mixture, MoeDecoder, MoeShape, next_token_loss
from raysys.models.moe_files import export_moe, load_moe
from raysys.models.packing import Packing
from raysys.models.routing import Routing, balance_loss, z_loss

SHAPE = MoeShape(
    vocabulary=40, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, experts=8, top_k=3, expert_width=12, context=32, deviation=0.3
)
_GROUPS: dict[int, ExpertGroup] = {}


def group(rank: int, ranks: int, port: int, size: int) -> ExpertGroup:
    """The ranks stay for many tests, and so do their groups: runs of `size` consecutive ranks."""
    if not dist.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    if size not in _GROUPS:
        handles = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks, size)]
        _GROUPS[size] = ExpertGroup(handles[rank // size])  # type: ignore[arg-type]
    return _GROUPS[size]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    *,
    size: int = 1,
    dtype: torch.dtype = torch.float64,
    shape: MoeShape = SHAPE,
    tokens: tuple[int, ...],
    alike: bool = False,
) -> dict[str, Any]:
    """One mixture on this rank's share of the same tokens; `tokens` says how many each rank has. Loss: sums over all of them.

    With `alike` all tokens choose the same experts.
    """
    held = group(rank, ranks, port, size) if ranks > 1 else None
    one = Mixture(shape, held).to(dtype)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(one.named_parameters()):
            whole = drawn(number, shape.experts, *parameter.shape[1:], dtype=dtype) * 0.3
            parameter.copy_(whole if held is None or name == "router.weight" else held.part(whole))
    count = sum(tokens)
    everything, slopes = drawn(11, count, shape.width, dtype=dtype), drawn(12, count, shape.width, dtype=dtype)
    if alike:
        everything = everything[:1].expand(count, -1)
    mine = slice(0, count) if ranks == 1 else slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    x = everything[mine].clone().requires_grad_()
    out, routed = one(x)
    load = summed(routed.load) if ranks > 1 else routed.load
    loss = (out * slopes[mine]).sum() + 0.7 * balance_loss(routed, load) + 0.3 * z_loss(routed, max(1, count))
    loss.backward()
    assert x.grad is not None
    return {
        "out": out.detach().numpy(),
        "loss": loss.item(),
        "load": load.numpy(),
        "x": x.grad.numpy(),
        "grads": {name: parameter.grad.numpy() for name, parameter in one.named_parameters() if parameter.grad is not None},
    }


def decoder(
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
    *,
    size: int = 1,
    dtype: torch.dtype = torch.float64,
    shape: MoeShape = SHAPE,
    lengths: tuple[tuple[int, ...], ...],
    checkpointing: bool = False,
) -> dict[str, Any]:
    """A decoder on this rank's rows, one rank on all. A rank without rows computes one of two tokens that counts for nothing."""
    held = group(rank, ranks, port, size) if ranks > 1 else None
    model = MoeDecoder(shape, checkpointing, held).to(dtype).initialise(4)
    ids = torch.randint(shape.vocabulary, (sum(map(sum, lengths)),), generator=torch.Generator().manual_seed(1))
    mine = [length for row in lengths for length in row] if ranks == 1 else list(lengths[rank])
    before = 0 if ranks == 1 else sum(map(sum, lengths[:rank]))
    ids, weight = (ids[before : before + sum(mine)], 1.0) if mine else (torch.zeros(2, dtype=torch.long), 0.0)
    total = sum(length - 1 for row in lengths for length in row)
    loss, _, routed = next_token_loss(model, ids, Packing(mine or [2], "cpu"))
    routed = [one.take(torch.arange(sum(mine))) for one in routed]
    loads = torch.stack([one.load for one in routed])
    loads = summed(loads) if ranks > 1 else loads
    loss = loss * weight / total + sum(0.5 * balance_loss(one, load) for one, load in zip(routed, loads, strict=True))
    loss.backward()
    return {"loss": loss.item(), "grads": {name: one.grad.numpy() for name, one in model.named_parameters() if one.grad is not None}}


def states(rank: int, ranks: int, port: int, *, size: int, shape: MoeShape = SHAPE) -> dict[str, Any]:
    """A fresh decoder's whole tensors, and whether loading them into another gives the same one."""
    held = group(rank, ranks, port, size)
    model = MoeDecoder(shape, expert_group=held).initialise(5)
    found = {name: None if tensor is None else tensor.clone() for name, tensor in whole_tensors(model)}
    sent: list[Any] = [found]
    dist.broadcast_object_list(sent, src=0)
    other = MoeDecoder(shape, expert_group=held).initialise(6)
    load_whole(other, lambda name: sent[0][name])
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return {"same": same, "whole": {name: None if tensor is None else tensor.numpy() for name, tensor in found.items()}}


def export(rank: int, ranks: int, port: int, *, size: int, folder: Path, spoiled: bool = False) -> Any:
    held = group(rank, ranks, port, size)
    model = MoeDecoder(SHAPE, expert_group=held).initialise(7)
    if spoiled:
        (folder / "file").touch()
        try:
            export_moe(model, folder / "file" / "below")
        except OSError as error:
            return type(error).__name__
        return "returned"
    export_moe(model, folder)
    dist.barrier()
    again = load_moe(folder, SHAPE.routing, expert_group=held)
    mine, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    return all(torch.equal(mine[name], theirs[name]) for name in mine if not name.endswith("router.weight"))


def refusals(rank: int, ranks: int, port: int) -> list[str]:
    held = group(rank, ranks, port, ranks)
    model = MoeDecoder(SHAPE, expert_group=held)
    name = "layers.0.mixture.experts.gate"
    told = []
    for action in (
        lambda: held.part(torch.zeros(7, 2)),
        lambda: own_part(model, name, torch.zeros(4, 12, 16)),
        lambda: own_part(model, "embedding.weight", torch.zeros(4, 16)),
        lambda: MoeDecoder(MoeShape(**{**vars(SHAPE), "experts": 7}), expert_group=held),
    ):
        try:
            action()
        except ValueError as error:
            told.append(str(error))
    return told


def only_rank(results: list[Any], name: str) -> np.ndarray:
    """The gradient of a parameter on one rank, of what ranks of one group have: stacks one after another, everything else added up."""
    parts = [result["grads"][name] for result in results]
    return np.concatenate(parts) if ".experts." in f".{name}" else np.sum(parts, axis=0)


ROUTINGS = {
    "mpi": Routing(),
    "plain": Routing(mpi=False),
    "detached": Routing(detach_expert=True),
    "down": Routing(matrix="down", iterations=2, renormalise=True),
    "unretracted": Routing(retract=False, gate="sigmoid"),
}
