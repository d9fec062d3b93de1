"""What a pretraining run counts and holds: the paper's parameter counts, and memory of a GPU under ZeRO and expert parallelism.

Bytes a rank, with D dense parameters (routers with them), S of experts, R ranks of which E share a layer's experts, buckets of
B = min(D + S/E, 5e8) numbers (mixed | float32; mixed precision runs on stage 1 where 0 is asked for):

    stage    weights              gradients            optimiser
    0        4 (D + S/E)          4 (D + S/E)          8 (D + S/E)
    1        (2|4) (D + S/E)      (6|4) (D + S/E)      12 (D + S)/R
    2        (2|4) (D + S/E)      4 (D + S)/R + 8B     12 (D + S)/R
    3        (2|4) (D + S)/R      4 (D + S)/R + 8B     12 (D + S)/R

See `raysys.plan` for what gradients are made of, and for an optimiser that is offloaded. Muon keeps one moment where AdamW has two; the
estimate stays on the high side. Activations and workspaces are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raysys.checks import here, sized, vocabulary_of
from raysys.config.parallel import effective_stage
from raysys.config.pretraining import PretrainMoeConfig
from raysys.models.moe import Counts, MoeDecoder, counts, shape_for
from raysys.plan import LOGITS_BLOCK, PROCESS, Device, amount, count, gradient_bytes
from raysys.training.parameter_groups import parameter_groups, table

CLUSTERS = (8, 64, 256)
"""GPUs that a plan is made for, besides those that the config asks for."""


@dataclass(frozen=True)
class Layout:
    """How R ranks share the model, and what each of them holds, in bytes by part."""

    ranks: int
    zero_stage: int
    expert_parallel: int
    passes: int
    """Of a step: the config's `accumulation`, or more where activations need it."""
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def planned(config: PretrainMoeConfig) -> PretrainMoeConfig:
    """With the sizes of the folder that the run starts from. One that an earlier stage will make is taken for the config's `model`."""
    return sized(config) if config.start is not None and here(config.start).exists() else config.model_copy(update={"start": None})


def counted(config: PretrainMoeConfig) -> Counts:
    """Parameters of the run's model; its vocabulary is the tokenizer's where it names none."""
    config = planned(config)
    return counts(shape_for(config.model, config.router, vocabulary_for(config), config.data.sequence))


def layout(config: PretrainMoeConfig, ranks: int, zero_stage: int, expert_parallel: int, passes: int, device: Device) -> Layout:
    """What one of `ranks` holds; see the module's table."""
    config = planned(config)
    found, model = counted(config), config.model
    mixed = config.trainer.dtype == "bfloat16" or (config.trainer.dtype == "auto" and device.kind == "gpu")
    stage, width = effective_stage(zero_stage, "bfloat16" if mixed else "float32"), 2 if mixed else 4
    offload = config.trainer.offload_optimizer and device.kind == "gpu" and stage > 0
    router = model.layers * model.experts * model.width
    dense, sparse = found.dense + found.query_key_norms + router, found.sparse - router
    whole, cut = dense + sparse / expert_parallel, (dense + sparse) / ranks
    rows = max(1, -(-config.batch // passes // ranks))
    tokens = rows * config.data.sequence
    layer = dense / model.layers + sparse / model.layers
    parts = {
        "weights": width * (cut if stage == 3 else whole),
        "gradients": gradient_bytes(stage, mixed, whole, cut, offload),
        "optimiser": 0.0 if offload else 12 * cut if stage else 8 * whole,
        "activations": _activations(config, tokens, width),
        "logits": 8.0 * min(min(tokens, config.trainer.chunk_tokens) * vocabulary_for(config), LOGITS_BLOCK),
        "gathered": (2.0 if stage == 3 else float(offload)) * width * layer,
        "process": PROCESS,
    }
    return Layout(ranks, zero_stage, expert_parallel, passes, parts)


def moved(config: PretrainMoeConfig) -> str:
    """Which rule moves which parameters, as a table, of a model without weights."""
    config = planned(config)
    with torch.device("meta"):
        model = MoeDecoder(shape_for(config.model, config.router, vocabulary_for(config), config.data.sequence))
    return table(parameter_groups(model, config.optimiser))


def vocabulary_for(config: PretrainMoeConfig) -> int:
    return vocabulary_of(config) if config.model.vocabulary is None else config.model.vocabulary


def _activations(config: PretrainMoeConfig, tokens: int, width: int) -> float:
    """Kept for backward: each layer's input, its norms, projections, attention output, and of each chosen expert rows and products."""
    model = config.model
    heads = model.heads * model.head_size, model.kv_heads * model.head_size
    inside = 6 * model.width + 3 * heads[0] + 3 * heads[1] + model.top_k * (2 * model.width + 3 * model.expert_width)
    inside += 4 * model.experts * 4 / width  # the router's float32 logits and probabilities
    kept = model.layers * model.width + inside if config.trainer.activation_checkpointing else model.layers * (model.width + inside)
    return float(tokens * kept * width)


def choose_layout(config: PretrainMoeConfig, ranks: int, device: Device) -> Layout:
    """The plainest that fits: whole copies with sharded states, then shared experts, then everything in pieces; and each of these in
    as few passes as it takes. The last one tried if none does."""
    config = planned(config)
    shared = [size for size in (2, 4, 8, 16, 32, 64) if ranks % size == 0 and config.model.experts % size == 0]
    tried = [(1, 1), (2, 1), *((stage, size) for size in shared for stage in (1, 2))]
    if config.optimiser.kind == "adamw":
        tried.append((3, 1))
    most = max(config.accumulation, config.batch // ranks)
    passes = [config.accumulation * 2**power for power in range(12) if config.accumulation * 2**power <= most]
    found = [layout(config, ranks, stage, size, number, device) for number in passes for stage, size in tried]
    return next((one for one in found if one.total <= device.bytes), found[-1])


def render(config: PretrainMoeConfig, device: Device, gpus: int | None = None) -> tuple[str, bool]:
    """The plan as text, and whether what the config asks for fits."""
    start, config = config.start, planned(config)
    found, model = counted(config), config.model
    asked = layout(config, config.trainer.fewest, config.trainer.zero_stage, config.trainer.expert_parallel, config.accumulation, device)
    rows = [("the config's", asked)]
    if device.kind == "gpu":
        rows += [(f"{size} GPUs", choose_layout(config, size, device)) for size in ([gpus] if gpus else CLUSTERS)]
    head = ["", "ranks", "ZeRO", "expert parallel", "passes", "sequences", *asked.parts, "total", ""]
    lines = [head]
    for label, one in rows:
        share = f"{config.batch / one.passes / one.ranks:g}"
        verdict = "fits" if one.total <= device.bytes else f"DOES NOT FIT in {amount(device.bytes)}"
        cells = [amount(value) if value else "-" for value in one.parts.values()]
        lines.append(
            [
                label,
                str(one.ranks),
                str(one.zero_stage),
                str(one.expert_parallel),
                str(one.passes),
                share,
                *cells,
                amount(one.total),
                verdict,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    memory = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text = [
        *([f"start={start} is not here: taken for the config's model"] if start is not None and not here(start).exists() else []),
        f"parameters: dense {found.dense:,}, sparse {found.sparse:,}, activated {found.activated:,}, total {found.total:,}",
        f"  ({', '.join(map(count, (found.dense, found.sparse, found.activated, found.total)))}; besides, {found.query_key_norms:,} in "
        "norms of queries and keys, which export to stock Qwen3-MoE needs)",
        f"tokens: {config.batch * config.data.sequence:,} a step, {config.steps * config.batch * config.data.sequence:,} in all",
        "",
        f"memory of one {'GPU' if device.kind == 'gpu' else 'process'} by part; sequences: of one pass on one rank",
        *memory,
        "",
        *(f"  {line}" for line in moved(config).splitlines()),
    ]
    if device.kind == "gpu":
        work = 8 if config.trainer.activation_checkpointing else 6
        rate = device.tflops * 1e12 / (work * found.activated)
        text += ["", f"at most, by the data sheet: {rate:,.0f} tokens/s a GPU ({work} operations a parameter that a token passes through)"]
    for warning in filter(None, (config.flat_router(), config.not_exported())):
        text += ["", warning]
    largest = config.router.largest_logit(model.width, model.experts)
    if largest is not None:
        text += ["", f"largest logit of the router: {largest:.1f}"]
    return "\n".join(text), asked.total <= device.bytes
