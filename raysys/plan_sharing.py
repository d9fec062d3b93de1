"""Places of a run that share their GPUs: at the same time, or in turns."""

from __future__ import annotations

from dataclasses import replace

from raysys.plan import Place, amount


def together(host: Place, lodger: Place, apart: str) -> Place:
    """Both at the same time. `apart`: the setting that gives each GPUs of its own."""
    parts = {name: host.parts.get(name, 0.0) + lodger.parts.get(name, 0.0) for name in host.parts | lodger.parts}
    role = f"{host.role} and {lodger.role}"
    return Place(role, host.actors, host.gpus_each, parts, [*host.notes, *lodger.notes], f"{host.remedy}; or {apart}")


def in_turns(trainer: Place, engine: Place) -> Place:
    """An engine beside each rank (`raysys.colocate`), in whichever turn the GPU is fuller. One that sleeps keeps its process only; a
    trainer at rest keeps what it `kept`."""
    asleep = replace(engine, parts={"process": engine.parts["process"]})
    awake = replace(engine, parts={name: size for name, size in engine.parts.items() if name != "left free"})
    training = together(trainer, asleep, "colocate=false")
    generating = together(replace(trainer, parts=trainer.kept), awake, "colocate=false")
    note = f"in turns: {amount(training.total)} while it trains, {amount(generating.total)} while it generates"
    if generating.total >= training.total:
        remedy = "lower rollout.gpu_memory_utilization, raise trainer.ranks or zero_stage, or set offload_optimizer or colocate=false"
        return replace(generating, notes=[note, *generating.notes], remedy=remedy)
    return replace(training, notes=[note, *training.notes])
