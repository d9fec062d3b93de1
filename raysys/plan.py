"""Will it fit? Memory by part and placement of a run, estimated from its config and meta tensors; nothing is loaded or started.

Weights, gradients, optimiser states and KV cache are exact counts; activations and workspaces are estimates, on the high side.
ZeRO with R ranks, P parameters, buckets of B = min(P, 5e8) numbers, in bytes (mixed precision | float32):

    stage        weights      gradients  optimiser
    0            4P           4P         8P         float32 only: mixed precision runs on stage 1
    1            2P | 4P      6P | 4P    12P/R      mixed: DeepSpeed's float32 sums, and a .grad of 2P beside them
    2            2P | 4P      4P/R + 8B  12P/R      a bucket that fills, and one that is reduced
    3            2P/R | 4P/R  4P/R + 8B  12P/R

With the optimiser offloaded nothing of it is on the GPU, gradients take 4P + 8B at stage 1 and 8B from stage 2 on, and one of the largest
module's is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Literal

from raysys.config.agents import SearchAgentConfig
from raysys.config.parallel import REDUCE_BUCKET, effective_stage
from raysys.config.parts import Rollout, Scoring, Trainer
from raysys.config.quantising import QuantizeConfig
from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, HpdConfig, OnData, Run, SftConfig
from raysys.errors import ConfigError

if TYPE_CHECKING:
    from raysys.models.shape import Shape

GIB = 1 << 30
LOGITS_BLOCK = 2**26
"""Logits that exist at once on a GPU, at most (`methods/logprobs.py`)."""
LOGITS_SHARE, LOGITS_FLOOR = 0.75, 2.0**26
"""Logits whose gradients are made at once: of the unembedding's bytes in float32, and so many bytes in any case (`methods/logprobs.py`)."""
ENGINE = 2.0 * GIB
"""An engine's CUDA context, graphs and workspaces."""
PROCESS = 1.0 * GIB
"""What the libraries of one process take: the CUDA context and slack on a GPU, code and interpreter on a CPU."""


@dataclass(frozen=True)
class Device:
    """What the run is planned for. The rates are peaks; the defaults are the H100 SXM data sheet's."""

    kind: Literal["gpu", "cpu"] = "gpu"
    bytes: float = 80.0 * GIB
    """Memory of one GPU; on CPU of the whole machine."""
    count: int | None = None
    """GPUs at hand; None: not checked."""
    tflops: float = 989.0
    gbps: float = 3350.0

    @property
    def width(self) -> int:
        """Bytes of a weight: bfloat16 on GPU, float32 on CPU."""
        return 2 if self.kind == "gpu" else 4


@dataclass(frozen=True)
class Place:
    """One kind of actor: where it sits and what it holds on each of its GPUs."""

    role: str
    actors: int
    gpus_each: int
    parts: dict[str, float]
    """Bytes by part, on one GPU; on CPU in one process."""
    notes: list[str] = field(default_factory=list)
    remedy: str = ""
    kept: dict[str, float] = field(default_factory=dict)
    """Of `parts`, what a trainer does not give up between its steps."""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def gpus(self) -> int:
        return self.actors * self.gpus_each


@dataclass(frozen=True)
class Estimate:
    """All places of a run, and what does not fit."""

    models: dict[str, Shape]
    places: list[Place]
    device: Device
    tokens: dict[str, float]
    """Upper bounds in tokens a second, by phase."""

    @property
    def problems(self) -> list[str]:
        device = self.device
        if device.kind == "cpu":
            needed = sum(place.total * place.actors for place in self.places)
            return [f"all processes need {amount(needed)}, this machine has {amount(device.bytes)}"] if needed > device.bytes else []
        found = [
            f"{place.role} needs {amount(place.total)} on each GPU, {amount(device.bytes)} are there: {place.remedy}"
            for place in self.places
            if place.total > device.bytes
        ]
        needed = sum(place.gpus for place in self.places)
        if device.count is not None and needed > device.count:
            asked = " + ".join(f"{place.gpus} {place.role}" for place in self.places)
            found.append(
                f"the run asks for {needed} GPUs ({asked}), {device.count} are there: lower rollout.workers, trainer.ranks or scoring.ranks"
            )
        return found


def choose(config: Run, asked: Literal["gpu", "cpu"] | None, gpu_gib: float, gpus: int | None) -> Device:
    """What to plan for: as asked, else as the config says, else GPUs, except for models so small (below 100 M) that a laptop is meant."""
    gpu = Device("gpu", gpu_gib * GIB, gpus)
    wanted = asked or config.device
    if wanted == "auto":
        largest = max(shape.parameters for shape in estimate(config, gpu).models.values())
        wanted = "gpu" if gpus is not None or largest >= 100_000_000 else "cpu"
    if wanted == "gpu":
        return gpu
    return this_machine()


def this_machine() -> Device:
    """Its CPUs' memory, as one device."""
    import psutil

    return Device("cpu", float(psutil.virtual_memory().total))


def estimate(config: Run, device: Device) -> Estimate:
    """The estimate for all but pipelines. Raises ConfigError: a job without a plan, a model without a shape."""
    from raysys.models.shape import new_shape, shape_of
    from raysys.plan_sharing import in_turns, together

    scratch = SftConfig.model_fields["new_model"].default
    models: dict[str, Shape]
    if isinstance(config, (EvaluateConfig, GenerateConfig)):
        named = config.models if isinstance(config, EvaluateConfig) else {f"teacher {tag}": name for tag, name in config.teachers.items()}
        models = {label: shape_of(name, scratch) for label, name in named.items()}
        largest = max(models.values(), key=lambda shape: shape.parameters)
        return Estimate(models, [rollout_place(config.rollout, largest, _length(config), device)], device, {})
    if isinstance(config, SftConfig | HpdConfig):
        student = shape_of(config.student, scratch) if config.student else new_shape(config.new_model)  # type: ignore[union-attr]
        places = [trainer_place(config.trainer, student, config.weights.bucket_mib << 20, device)]
        if config.evaluation is not None:
            places.insert(0, rollout_place(config.rollout, student, _length(config), device))
        models = {"student": student}
        if isinstance(config, HpdConfig) and config.loss != "sft":
            frozen = {name: shape_of(name, scratch) for name in config.teachers.values()}
            models |= {f"teacher {tag}": frozen[name] for tag, name in config.teachers.items()}
            scorer = scorer_place(list(frozen.values()), config.scoring, device)
            if config.scoring.placement == "colocated":
                places[-1] = together(places[-1], scorer, "scoring.placement=own")
            else:
                places.insert(len(places) - 1, scorer)
        tokens = bounds(student, config.rollout, config.trainer, _length(config), device)
        return Estimate(
            models, places, device, tokens if config.evaluation else {name: tokens[name] for name in tokens if name == "training"}
        )
    if isinstance(config, SearchAgentConfig):
        student = shape_of(config.student, scratch)
        places = [
            rollout_place(config.rollout, student, _length(config), device),
            trainer_place(config.trainer, student, config.weights.bucket_mib << 20, device),
        ]
        return Estimate({"student": student}, places, device, bounds(student, config.rollout, config.trainer, _length(config), device))
    if isinstance(config, QuantizeConfig):
        from raysys.plan_quantising import estimate_quantising

        return estimate_quantising(config, shape_of(config.model, scratch), device)
    if not isinstance(config, GopdConfig):
        raise ConfigError(
            f"no plan for {type(config).__name__}", "plan takes configs of gopd, hpd, search_agent, quantize, sft, generate and evaluate"
        )
    names = {"student": config.student} | {f"teacher {tag}": name for tag, name in config.teachers.items()}
    if config.reward_scale != 1 and config.reference is not None:
        names["reference"] = config.reference
    models = {role: shape_of(name, scratch) for role, name in names.items()}
    student = models["student"]
    frozen = {names[role]: shape for role, shape in models.items() if role != "student"}
    places = [
        rollout_place(config.rollout, student, _length(config), device),
        scorer_place(list(frozen.values()), config.scoring, device),
        trainer_place(config.trainer, student, config.weights.bucket_mib << 20, device),
    ]
    if config.colocate and device.kind == "gpu":  # on a CPU nothing sleeps
        places = [in_turns(places[2], places[0]), places[1]]
    return Estimate(models, places, device, bounds(student, config.rollout, config.trainer, _length(config), device))


def _length(config: GopdConfig | SearchAgentConfig | OnData | EvaluateConfig | GenerateConfig) -> int:
    return config.max_prompt_tokens + config.max_response_tokens


def trainer_place(trainer: Trainer, shape: Shape, bucket_bytes: int, device: Device) -> Place:
    """Bytes on one GPU (on CPU: in one process) of one rank; see the module's table."""
    ranks, count = trainer.ranks, shape.parameters
    mixed = trainer.dtype == "bfloat16" or (trainer.dtype == "auto" and device.kind == "gpu")
    stage, width = effective_stage(trainer.zero_stage, "bfloat16" if mixed else "float32"), 2 if mixed else 4
    offload = trainer.offload_optimizer and device.kind == "gpu"
    parts = {
        "weights": width * count / (ranks if stage == 3 else 1),
        "gradients": gradient_bytes(stage, mixed, count, count / ranks, offload),
        "optimiser": 0.0 if offload else 12 * count / ranks if stage else 8.0 * count,
        "activations": activation_bytes(shape, trainer.micro_batch_tokens, width, trainer.activation_checkpointing),
        "logits": trained_logits_bytes(shape, trainer.micro_batch_tokens, mixed),
        "gathered": (2.0 if stage == 3 else float(offload)) * width * shape.largest_module,
        "bucket": float(min(bucket_bytes, width * count)),
        "process": PROCESS,
    }
    notes = [f"{ranks} rank(s), ZeRO {stage}, {trainer.micro_batch_tokens} tokens a micro-batch"]
    if offload:  # besides the states float32 gradients, once more at stage 3, else a copy of the weights on their way back
        held = 12 + 4 + (4 if stage == 3 else width)
        notes.append(f"optimiser and gradients in host memory: {amount(held * count / ranks)} a rank")
    remedy = "raise trainer.ranks or zero_stage, lower micro_batch_tokens, set activation_checkpointing or offload_optimizer"
    sums = parts["gradients"] if stage == 3 else 4.0 * count if stage == 1 and mixed and not offload else 0.0
    kept = {name: size for name, size in parts.items() if name not in ("activations", "logits")} | {"gradients": sums}
    return Place("trainer", ranks, 1, parts, notes, remedy, kept)


def gradient_bytes(stage: int, mixed: bool, whole: float, part: float, offload: bool) -> float:
    """Gradients on one rank; see the module's table.

    Args:
        stage: an `effective_stage`.
        whole: parameters whose gradients backward makes here.
        part: those that this rank updates.
        offload: they go to the host bucket by bucket, at stage 1 when all of them are there.
    """
    buckets = 8.0 * min(whole, REDUCE_BUCKET)
    if stage >= 2:
        return buckets + (0.0 if offload else 4.0 * part)
    return buckets + 4.0 * whole if offload else (6.0 if mixed else 4.0) * whole


def scorer_place(frozen: Sequence[Shape], scoring: Scoring, device: Device) -> Place:
    """Every rank holds all frozen models (each folder once) and scores with one at a time."""
    tokens = scoring.micro_batch_tokens
    weights = float(device.width * sum(shape.parameters for shape in frozen))
    notes = [f"{len(frozen)} frozen model(s) a rank"]
    if scoring.offload:
        notes.append(f"in host memory: {amount(weights)} a rank")
        weights = 2.0 * device.width * max(shape.largest_module for shape in frozen)
    parts = {
        "weights": weights,
        "activations": float(max(tokens * (4 * shape.hidden + 3 * shape.ffn) * device.width for shape in frozen)),
        "logits": max(logits_bytes(shape, tokens, scoring.chunk_tokens) for shape in frozen),
        "process": PROCESS,
    }
    remedy = "lower scoring.micro_batch_tokens, set scoring.offload, or use fewer or smaller teachers"
    return Place("scorer", scoring.ranks, 1, parts, notes, remedy)


def rollout_place(rollout: Rollout, shape: Shape, length: int, device: Device) -> Place:
    """An engine on a GPU fills its share with KV cache; it fits if at least one sequence of full length does."""
    split = rollout.tensor_parallel
    weights = device.width * shape.parameters / split
    per_token = device.width * shape.kv_per_token / min(split, shape.kv_heads)
    work = rollout.max_batched_tokens * (4 * shape.hidden + 3 * shape.ffn / split) * device.width
    if device.kind == "cpu":
        free = float(rollout.kv_cache_mib << 20)
        parts = {"weights": weights, "KV cache": free, "activations": work, "process": PROCESS}
    else:
        free = device.bytes * rollout.gpu_memory_utilization - weights - work - ENGINE
        parts = {"weights": weights, "KV cache": max(free, length * per_token), "activations": work, "process": ENGINE}
        parts["left free"] = device.bytes * (1 - rollout.gpu_memory_utilization)
    full = max(int(free // (length * per_token)), 0)
    notes = [f"{split} GPU(s) an engine"] if device.kind == "gpu" else []
    notes.append(f"KV cache for {max(free, 0) / per_token:,.0f} tokens, or {full:,} sequences of {length} at once")
    if 0 < full < rollout.max_sequences:
        notes.append(f"rollout.max_sequences={rollout.max_sequences} is reached by shorter sequences only")
    remedy = f"one sequence of {length} tokens has no room; raise rollout.tensor_parallel or gpu_memory_utilization, or shorten responses"
    return Place("rollout", rollout.fewest, split, parts, notes, remedy)


def activation_bytes(shape: Shape, tokens: int, width: int, checkpointing: bool) -> float:
    """Kept for backward: each layer's input, and inside a layer its norms, projections, attention output and feed-forward.

    With checkpointing only the inputs stay, plus one layer's inside while it is recomputed. Attention scores are not kept (fused kernels).
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inside = 8 * shape.hidden + 3 * query + 3 * key + 4 * shape.ffn
    per_token = shape.layers * shape.hidden + inside if checkpointing else shape.layers * (shape.hidden + inside)
    return float(tokens * per_token * width)


def logits_bytes(shape: Shape, tokens: int, chunk_tokens: int) -> float:
    """One block of logits and its copy in float32, and two float32 `[tokens, hidden]`: never `[tokens, vocabulary]`."""
    block = min(min(tokens, chunk_tokens) * shape.vocabulary, LOGITS_BLOCK)
    return 4.0 * (2 * block + 2 * tokens * shape.hidden)


def trained_logits_bytes(shape: Shape, tokens: int, mixed: bool) -> float:
    """Logits of positions whose gradients are made at once, float32 `[tokens, hidden]`, and room to add the unembedding's gradient up in
    float32 if it comes in parts and is of lower precision."""
    unembedding = 4.0 * shape.vocabulary * shape.hidden
    everything = 4.0 * tokens * shape.vocabulary
    at_once = min(everything, max(LOGITS_SHARE * unembedding, LOGITS_FLOOR))
    return at_once + 4.0 * tokens * shape.hidden + (unembedding if mixed and at_once < everything else 0.0)


def bounds(shape: Shape, rollout: Rollout, trainer: Trainer, length: int, device: Device) -> dict[str, float]:
    """What a GPU's data sheet allows at most, in tokens a second; nothing is said of CPUs.

    Generation reads all active weights and the KV cache of half-grown sequences once per decoding step; training does 6 (8 with
    checkpointing) operations a parameter and token.
    """
    if device.kind == "cpu":
        return {}
    sequences = rollout.max_sequences
    step_bytes = device.width * (shape.active_parameters + sequences * length / 2 * shape.kv_per_token)
    decode = sequences / (step_bytes / (device.gbps * 1e9 * rollout.tensor_parallel))
    work = (8 if trainer.activation_checkpointing else 6) * shape.active_parameters
    return {"generation": decode * rollout.fewest, "training": trainer.ranks * device.tflops * 1e12 / work}


# -- as text

COLUMNS = (
    *("weights", "layer", "statistics", "gradients", "optimiser", "activations", "logits", "gathered", "bucket", "KV cache", "process"),
    "left free",
)


def render(found: Estimate) -> str:
    """The estimate as tables for a terminal."""
    device = found.device
    lines = ["models"]
    for role, shape in found.models.items():
        lines.append(f"  {role:14} {count(shape.parameters):>9} parameters  {shape.label}  ({shape.source})")
    one = f"one GPU (it has {amount(device.bytes)})" if device.kind == "gpu" else f"one process (the machine has {amount(device.bytes)})"
    lines += ["", f"memory of {one}; weights, states and KV cache are counts, the rest estimates", *_table(found)]
    lines += ["", "placement", *_placement(found)]
    if found.tokens:
        lines += ["", "at most, by the data sheet: " + ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in found.tokens.items())]
    lines += ["", *(f"DOES NOT FIT: {problem}" for problem in found.problems)] if found.problems else ["", "everything fits"]
    return "\n".join(lines)


def _table(found: Estimate) -> list[str]:
    columns = [name for name in COLUMNS if any(place.parts.get(name) for place in found.places)]
    rows = [["", "actors", *columns, "total"]]
    for place in found.places:
        cells = [amount(place.parts[name]) if place.parts.get(name) else "-" for name in columns]
        rows.append([place.role, str(place.actors), *cells, amount(place.total)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells))
    return lines


def _placement(found: Estimate) -> list[str]:
    if found.device.kind == "cpu":
        return [f"  {place.actors} x {place.role}: {'; '.join(place.notes)}" for place in found.places]
    lines, first = [], 0
    for place in found.places:
        last = first + place.gpus - 1
        where = f"GPU {first}" if last == first else f"GPUs {first}-{last}"
        lines.append(f"  {where:10} {place.role}: {'; '.join(place.notes)}")
        first = last + 1
    nodes = ceil(first / 8)
    return [*lines, f"  {first} GPUs in all" + (f", {nodes} nodes of 8" if nodes > 1 else "")]


def amount(number: float) -> str:
    """Bytes for people."""
    return f"{number / GIB:.1f} GiB" if number >= GIB / 2 else f"{number / (1 << 20):.1f} MiB"


def count(number: int) -> str:
    """A large number for people."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
