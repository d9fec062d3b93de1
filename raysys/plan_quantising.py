"""What quantising a model needs: memory of the actor that goes through it, of the tasks that look at its layers, disk, and the file's size.

Legend: n inputs of the widest linear layer, P parameters of a layer's linears, N windows of L positions, D width, V vocabulary.

    a layer        its weights as stored, two blocks of it, and what is made of the largest linear in float32
    statistics     sums H and D of n^2 float32 numbers, the copies that they are read as, and the factor's two; of a mixture the sums of all
                   experts at once
    activations    one forward pass of `batch` windows through both blocks
    evaluation     the unembedding [V, D]

Sizes of weights, sums and files are counts, the rest is an estimate on the high side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raysys.config.quantising import BY_WEIGHTS, QuantizeConfig
from raysys.plan import PROCESS, Device, Estimate, Place, amount

if TYPE_CHECKING:
    from raysys.models.shape import Shape

SCORING_WORK = 0.5 * 2**30
"""Beside a layer's weights, of a task that computes NSDS on the shapes of an 8B model (`python -m tests.bench nsds`)."""


def linears(shape: Shape) -> int:
    """Parameters of one layer's linears, those that get codes: of a mixture all experts', and not the router's."""
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return shape.hidden * (2 * query + 2 * keys + 3 * (shape.experts * shape.expert_ffn or shape.ffn))


def statistics_bytes(shape: Shape) -> float:
    """Of the calibration inputs' sums and factors, in float32."""
    inner = shape.expert_ffn or shape.ffn
    widest = max(inner, shape.heads * shape.head_dim, shape.hidden)
    return 4.0 * (6 * widest**2 + 2 * max(0, shape.experts - 1) * max(inner, shape.hidden) ** 2)


def written(shape: Shape, rotation: bool) -> int:
    """Parameters of the files that are made: a rotation unties the head."""
    return shape.parameters + (shape.vocabulary * shape.hidden if rotation and shape.tied else 0)


def file_bytes(shape: Shape, bits: float, group_size: int, width: int, rotation: bool = False) -> float:
    """Of the compressed checkpoint: codes, a scale of `width` bytes a group, and what is not quantised."""
    coded = shape.layers * linears(shape)
    return coded * (bits / 8 + width / group_size) + (written(shape, rotation) - coded) * width


def states_bytes(config: QuantizeConfig, shape: Shape, width: int) -> float:
    """Of hidden states on disk: two streams of calibration windows at three places, or one of evaluation windows at two."""
    sizes = [
        (part.samples * part.length * shape.hidden * width, many)
        for part, many in ((config.calibration, 6), (config.evaluation, 2))
        if part
    ]
    return float(max((size * many for size, many in sizes), default=0))


def estimate_quantising(config: QuantizeConfig, shape: Shape, device: Device) -> Estimate:
    """The one actor; what comes before it and what lies on disk are notes."""
    width, layer = device.width, linears(shape)
    inner = shape.expert_ffn or shape.ffn
    windows = max((part.length for part in (config.calibration, config.evaluation) if part is not None), default=0)
    held = states_bytes(config, shape, width)
    parts = {
        "layer": float(layer * 3 * width + 4 * 4 * inner * shape.hidden),
        "statistics": 0.0 if config.method == "rtn" else statistics_bytes(shape),
        "activations": 2.0 * config.batch * windows * (6 * shape.hidden + 3 * shape.ffn) * width,
        "logits": float(width * shape.vocabulary * shape.hidden + 2 * 4 * 512 * shape.vocabulary) if config.evaluation else 0.0,
        "process": PROCESS,
    }
    made = file_bytes(shape, config.bits, config.group_size, width, config.rotation)
    dequantised = width * written(shape, config.rotation) if config.keep_dequantised or config.evaluation else 0
    notes = [
        f"{config.method}, {config.bits:g} bits on average by {config.allocation}",
        f"export/ {amount(made)} ({8 * made / shape.parameters:.2f} bits a weight with all that is not quantised)",
        f"disk meanwhile {amount(held + dequantised)} more",
    ]
    remedy = (
        "lower batch, or the windows' length" if parts["activations"] > parts["statistics"] else "use a GPU with more memory, or device=cpu"
    )
    if config.check_export and config.served:
        notes.append(f"check_export loads the whole model, {amount(width * written(shape, config.rotation))}, on its host")
    if shape.experts:
        notes.append(f"{shape.experts} experts a layer, each with its own statistics; routers stay as they are")
    if config.allocation in BY_WEIGHTS:
        task = 4.0 * layer + SCORING_WORK * min(1.0, shape.hidden / 4096) + PROCESS
        notes.append(f"before it {min(config.scoring_tasks or shape.layers, shape.layers)} scoring tasks of {amount(task)} on CPUs")
    places = [Place("quantiser", 1, int(device.kind == "gpu"), parts, notes, remedy)]
    return Estimate({"model": shape}, places, device, {})
