"""How many runs of a study a cluster has room for: what a run keeps busy against what there is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from raysys.config.runs import Run
from raysys.errors import ConfigError
from raysys.studies.ablation import Plan, Study


@dataclass(frozen=True)
class Room:
    """What a cluster has now. `bytes` is memory of its hosts."""

    gpus: int
    cores: int
    bytes: float

    @classmethod
    def of_cluster(cls) -> Room:
        """Of the Ray that is joined. A machine by itself counts its cores: as logical CPUs it has more, for actors' bookkeeping."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = int(sum(node.get("CPU", 0) for node in nodes))
        if len(nodes) == 1:
            cores = min(cores, os.cpu_count() or 1)
        return cls(int(sum(node.get("GPU", 0) for node in nodes)), cores, float(sum(node.get("memory", 0) for node in nodes)))

    @classmethod
    def of_machine(cls) -> Room:
        """Of this machine before there is a Ray; its GPUs are not looked for."""
        from raysys.plan import this_machine

        return cls(0, os.cpu_count() or 1, this_machine().bytes)


def at_once(plan: Plan, room: Room) -> int:
    """Runs that fit beside each other, by those of the plan that ask for most; at least 1, and no more than there are to do.

    A run that may take GPUs is counted by them where there are any, else by cores and memory.
    """
    left = list({one.cell: one.config for one in plan.left}.values())  # seeds change nothing of it
    return max(1, min([len(plan.left), *(_beside(plan.study, config, room) for config in left)]))


def _beside(study: Study, config: Run, room: Room) -> int:
    asks = study.asks(config)
    if room.gpus and config.device != "cpu":
        return room.gpus // max(1, asks.gpus)
    needed = _bytes(config)
    by_memory = [int(room.bytes // needed)] if needed else []
    return min([room.cores // max(1, asks.cores), *by_memory])


def _bytes(config: Run) -> float:
    """Of all processes of a run on CPUs, as `raysys plan` counts them; 0 where it has no figure for them."""
    from raysys import plan

    try:
        return sum(place.total * place.actors for place in plan.estimate(config, plan.this_machine()).places)
    except ConfigError:
        return 0.0
