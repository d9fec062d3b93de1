"""Studies of `jobs/pretrain_moe.py`. Paper: arXiv 2606.12397, sections 5 and 6."""

from __future__ import annotations

from typing import Any

from raysys.studies.ablation import Asks, Study
from raysys.studies.measures import Column

MPI: dict[str, Any] = {
    "router.mpi": True,
    "router.mode": "functional",
    "router.iterations": 1,
    "router.matrix": "gate",
    "router.detach_expert": False,
}
END = 20
"""Steps at the end of a run that count as its end."""

ROUTER = Study(
    title="Routers, part by part",
    cells={
        "plain": MPI | {"router.mpi": False},
        "normalised": MPI | {"router.iterations": 0},
        "mpi": MPI,
        "mpi-10": MPI | {"router.iterations": 10},
        "detached": MPI | {"router.detach_expert": True},
        "inplace": MPI | {"router.mode": "inplace"},
        "up": MPI | {"router.matrix": "up"},
        "down": MPI | {"router.matrix": "down"},
        **{f"scale-{scale}": MPI | {"router.scale": scale} for scale in (1, 2, 4, 8)},
    },
    columns=(
        Column("held-out loss", lambda seen: seen.mean("validation_loss", 1), share=False, digits=3),
        Column("loss at the end", lambda seen: seen.mean("loss", END), share=False, digits=3),
        Column("lambda", lambda seen: seen.mean("alignment", 1), share=False),
        Column("MaxVio", lambda seen: seen.mean("max_violation", END), share=False),
        Column("MaxVio global", lambda seen: seen.mean("max_violation_global", 1), share=False),
        Column("row cosine", lambda seen: seen.mean("row_cosine", 1), share=False),
        Column("tokens/s", lambda seen: seen.mean("tokens_per_second"), share=False, digits=0),
    ),
    told=("loss", "max_violation"),
    asks=lambda config: Asks(gpus=config.trainer.fewest, cores=config.trainer.fewest * config.trainer.threads),
)

STUDIES = {"router": ROUTER}
