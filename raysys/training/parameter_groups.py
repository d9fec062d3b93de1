"""Which rule moves which parameter of a mixture-of-experts decoder, by its name, and the table that says so.

    attention    projections                    the optimiser's kind
    experts      stacks of matrices             the optimiser's kind
    router       [N, D] rows                    the optimiser's kind, with a weight decay of its own
    embeddings   embedding and head             AdamW
    norms        everything of one dimension    AdamW without weight decay

The MPI paper says neither how its routers are optimised nor what moves embeddings under Muon: routers as matrices, and AdamW, are inferred
(spec, section 12).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from raysys.config.optimising import Kind, Optimiser
from raysys.errors import ConfigError
from raysys.methods.matrix_steps import hyperball_scale, muon_scale

_PLACES = {".router.": "router", ".experts.": "experts", ".attention.": "attention", ".embedding.": "embeddings", ".head.": "embeddings"}
_ORDER = ("attention", "experts", "router", "embeddings", "norms")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one rule moves.

    Attributes:
        rule: whatever its name, AdamW for what is no hidden matrix.
        parameters: by name, in the model's order.
        width_ratio: base_width / width, for the scale of Hyperball's steps.
    """

    name: str
    rule: Kind
    weight_decay: float
    width_ratio: float
    parameters: dict[str, nn.Parameter] = field(repr=False)

    def scales(self) -> list[float]:
        """What multiplies the learning rate, of each tensor."""
        shapes = [tuple(parameter.shape) for parameter in self.parameters.values()]
        return [scale(self.rule, shape[-2], shape[-1], self.width_ratio) if len(shape) > 1 else 1.0 for shape in shapes]


def scale(rule: Kind, rows: int, columns: int, width_ratio: float) -> float:
    """What multiplies the learning rate of a matrix under a rule. See `raysys.methods.matrix_steps`."""
    if rule == "muon":
        return muon_scale(rows, columns)
    return 1.0 if rule == "adamw" else hyperball_scale(columns, width_ratio)


def states_of(rule: Kind) -> tuple[str, ...]:
    """Names of the states that a rule keeps for each number of a parameter."""
    return ("momentum_buffer",) if rule in ("muon", "muonh") else ("exp_avg", "exp_avg_sq")


def parameter_groups(model: nn.Module, config: Optimiser) -> list[ParameterGroup]:
    """The trainable parameters of a `raysys.models.moe.MoeDecoder` in their groups; empty groups are left out.

    Raises:
        ConfigError: a parameter that belongs to none, or a model whose width cannot be told.
    """
    ratio = _width_ratio(model, config)
    found: dict[str, dict[str, nn.Parameter]] = {name: {} for name in _ORDER}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_group(name, parameter)][name] = parameter
    groups = []
    for name in _ORDER:
        matrices = name in ("attention", "experts", "router")
        rule: Kind = config.kind if matrices else "adamw"
        decay = {"router": config.router_weight_decay, "norms": 0.0}.get(name, config.weight_decay)
        if rule in ("adamh", "muonh"):
            decay = 0.0
        if found[name]:
            groups.append(ParameterGroup(name, rule, decay, ratio, found[name]))
    return groups


def _group(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return "norms"
    for part, group in _PLACES.items():
        if part in f".{name}":
            return group
    raise ConfigError(
        f"parameter {name} {list(parameter.shape)} belongs to no group of raysys/training/parameter_groups.py", "name it there"
    )


def _width_ratio(model: nn.Module, config: Optimiser) -> float:
    if not config.hyperball or config.base_width is None:
        return 1.0
    width = getattr(getattr(model, "shape", None), "width", None)
    if width is None:
        raise ConfigError(f"{type(model).__name__} does not tell its width, which base_width needs", "set optimiser.base_width=null")
    return config.base_width / width


def table(groups: Sequence[ParameterGroup]) -> str:
    """The groups as text: tensors, parameters, optimiser, what multiplies the learning rate (a range where it differs), weight decay."""
    rows = [("group", "tensors", "parameters", "optimiser", "rate x", "decay"), *_rows(groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if index in (1, 2, 4, 5) else cell.ljust(width) for index, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _rows(groups: Sequence[ParameterGroup]) -> Iterator[tuple[str, ...]]:
    for group in groups:
        low, high = min(group.scales()), max(group.scales())
        factor = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        count = sum(parameter.numel() for parameter in group.parameters.values())
        yield group.name, str(len(group.parameters)), f"{count:,}", group.rule, factor, f"{group.weight_decay:g}"
    tensors = sum(len(group.parameters) for group in groups)
    count = sum(parameter.numel() for group in groups for parameter in group.parameters.values())
    yield "total", str(tensors), f"{count:,}", "", "", ""
