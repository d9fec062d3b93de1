"""Which layers get more bits: NSDS and the free baselines it has to beat, each from one layer's weights at a time.

    nsds         methods.nsds (arXiv 2603.17354)
    zd           share of a layer's weights that lie more than one deviation from their mean
    mse          mean squared error of rounding to the low width
    kurtosis     mean kurtosis E z^4 of a layer's matrices, doubled where its step from the layer before is an outlier, |z| > 2 (KurtBoost)
    first_half   layers near the embedding first
    last_half    layers near the head first
    random       an order drawn from the seed

Higher scores are more sensitive. A layer's part (`layer_facts`) needs that layer's shards and nothing of other layers, so that tasks on
different nodes share them out; `judge` puts the parts together. Baselines are defined as in the NSDS authors' comparison, slips corrected.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from raysys.compression import experts
from raysys.compression.shards import Checkpoint
from raysys.errors import ConfigError
from raysys.methods.d2quant import quantize
from raysys.methods.nsds import (
    COMPONENTS,
    ENERGY,
    SERIES,
    Form,
    allocate,
    combine,
    excess_kurtosis,
    layer_series,
    mad_sigmoid,
    soft_or,
    unembedding_basis,
)

Criterion = Literal["nsds", "zd", "mse", "kurtosis", "first_half", "last_half", "random"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
WEIGHED: tuple[Criterion, ...] = ("nsds", "zd", "mse", "kurtosis")
"""Those that read weights."""
FEW_LAYERS = 12
"""Below, NSDS's medians are noise."""
_OUTLIER = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensitivity:
    """Of all layers, by one criterion.

    Attributes:
        scores: higher is more sensitive; what `bits` ranks.
        parts: what they are made of, [L] each: of NSDS p of each series in [0, 1] ("up/nv", ...) and its Soft-OR over the components
            ("nv", "se"); of the others the plain number, or nothing.
    """

    criterion: Criterion
    scores: list[float]
    parts: dict[str, list[float]]


def scores(source: Checkpoint, criterion: Criterion, *, seed: int = 0, low: int = 2, group_size: int = 128) -> list[float]:
    """Of each layer, one after another in this process. Arguments and errors: see `layer_facts` and `judge`."""
    basis = basis_of(source) if criterion == "nsds" else None
    facts = [layer_facts(source, i, [criterion], basis, low=low, group_size=group_size) for i in range(source.layers)]
    return judge(criterion, facts, seed=seed).scores


def basis_of(source: Checkpoint, energy: float = ENERGY) -> Tensor:
    """Directions that the unembedding reads, [D, r] float64: made once, shared by all layers of NSDS. Raises ConfigError: not finite."""
    try:
        return unembedding_basis(source.unembedding(), energy)
    except ValueError as error:
        raise ConfigError(f"{source.folder}: {error}", "its weights are damaged; copy the checkpoint again") from None


def layer_facts(
    source: Checkpoint | str | Path,
    i: int,
    criteria: Sequence[Criterion] = ("nsds",),
    basis: Tensor | None = None,
    *,
    energy: float = ENERGY,
    form: Form = "product",
    low: int = 2,
    group_size: int = 128,
) -> dict[str, float]:
    """What `judge` needs of one layer.

    Args:
        source: the original checkpoint (rotation flattens kurtosis), or its folder.
        criteria: those that will be judged; the ones without weights need nothing.
        basis: of `basis_of`, for nsds.
        energy, form: of NSDS, see `methods.nsds.layer_scores`.
        low, group_size: what mse rounds to.

    Raises:
        ConfigError: see `Checkpoint.open`; a weight that is no finite number (layer and weight are named), or a group that does not fit.
        ValueError: nsds without a basis, or no such criterion.
    """
    if unknown := [one for one in criteria if one not in CRITERIA]:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {', '.join(unknown)}")
    if "nsds" in criteria and basis is None:
        raise ValueError("nsds needs the basis of the unembedding")
    found: dict[str, float] = {}
    if not set(criteria) & set(WEIGHED):
        return found
    source = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    layer = source.layer(i)
    weights = {name: layer.pop(f"{name}.weight") for name in source.linears}
    try:
        if "nsds" in criteria and basis is not None:
            found |= dict(zip(SERIES, layer_series(_named(weights), basis, *source.heads, energy, form).tolist(), strict=True))
        if "kurtosis" in criteria:
            found["kurtosis"] = sum(excess_kurtosis(weight) + 3 for weight in weights.values()) / len(weights)
        if "mse" in criteria:
            found["mse"] = _error(list(weights.values()), low, group_size)
        if "zd" in criteria:
            found["zd"] = _outlying(list(weights.values()))
    except ValueError as error:
        raise ConfigError(f"{source.folder}: layer {i}: {error}", "the checkpoint's weights, or low and group_size, do not fit") from None
    return found


def judge(criterion: Criterion, facts: Sequence[Mapping[str, float]], *, seed: int = 0) -> Sensitivity:
    """Scores of all layers.

    Args:
        facts: of `layer_facts`, in the order of layers.
        seed: of random.

    Raises:
        ValueError: no layer, or no such criterion.
    """
    if criterion not in CRITERIA or not facts:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)} and there must be layers, got {criterion}, {len(facts)} layers")
    layers = len(facts)
    if criterion == "nsds":
        return _nsds(facts)
    if criterion in WEIGHED:
        plain = [one[criterion] for one in facts]
        return Sensitivity(criterion, _boosted(plain) if criterion == "kurtosis" else plain, {criterion: plain})
    order = [float(i) for i in range(layers)]
    if criterion == "first_half":
        order.reverse()
    elif criterion == "random":
        order = torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).double().tolist()
    return Sensitivity(criterion, order, {})


def sizes_of(source: Checkpoint) -> list[int]:
    """Quantised weights of each layer, which `bits` counts."""
    return [sum(rows * columns for rows, columns in source.shapes.values())] * source.layers


def bits(scores: Sequence[float], sizes: Sequence[int], budget: float, low: int = 2, high: int = 4) -> list[int]:
    """Bits of each layer, codes only, at most `budget` on average. Raises ConfigError: the budget is not between low and high."""
    try:
        return allocate(scores, sizes, budget, low, high)
    except ValueError as error:
        raise ConfigError(f"{error}", "choose low < high and a budget between them") from None


def _named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's linears as `methods.nsds` takes them, experts as stacks [E, out, in]."""
    found: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        found.setdefault(experts.pooled(name).rpartition(".")[2], []).append(weight)
    return {name: torch.stack(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}


def _nsds(facts: Sequence[Mapping[str, float]]) -> Sensitivity:
    if len(facts) < FEW_LAYERS:
        _log.warning("NSDS compares layers with their median: among %d, fewer than %d, that is noise", len(facts), FEW_LAYERS)
    series = torch.tensor([[one[name] for name in SERIES] for one in facts], dtype=torch.float64)
    p = torch.stack([mad_sigmoid(one) for one in series.unbind(dim=1)])
    parts = {name: one.tolist() for name, one in zip(SERIES, p, strict=True)}
    for kind in ("nv", "se"):
        parts[kind] = soft_or(torch.tensor([parts[f"{component}/{kind}"] for component in COMPONENTS], dtype=torch.float64)).tolist()
    return Sensitivity("nsds", combine(series).tolist(), parts)


def _boosted(kurtosis: Sequence[float]) -> list[float]:
    """Doubled where the step from the layer before stands out among all steps."""
    values = torch.tensor(kurtosis, dtype=torch.float64)
    steps = values.diff()
    spread = steps.std(correction=0) if len(steps) else values.new_zeros(())
    if bool(spread > 0):
        values[1:] = torch.where(((steps - steps.mean()) / spread).abs() > _OUTLIER, 2 * values[1:], values[1:])
    return values.tolist()


def _error(weights: Sequence[Tensor], low: int, group_size: int) -> float:
    total, count = 0.0, 0
    for weight in weights:
        off = quantize(weight.float(), low, group_size).dequantize() - weight.float()
        total, count = total + float(off.double().square().sum()), count + weight.numel()
    return total / count


def _outlying(weights: Sequence[Tensor]) -> float:
    """All matrices as one bag."""
    count = sum(weight.numel() for weight in weights)
    mean = sum(float(weight.double().sum()) for weight in weights) / count
    deviation = (sum(float((weight.double() - mean).square().sum()) for weight in weights) / count) ** 0.5
    if not torch.isfinite(torch.tensor(deviation)):
        raise ValueError("weights must hold finite numbers only")
    return sum(int(((weight.double() - mean).abs() > deviation).sum()) for weight in weights) / count
