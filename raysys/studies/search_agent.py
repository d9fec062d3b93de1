"""Studies of `jobs/search_agent.py`. Paper: arXiv 2604.18235."""

from __future__ import annotations

import statistics
from typing import Any, Literal

from raysys.config.agents import SearchAgentConfig
from raysys.studies.ablation import Asks, Study
from raysys.studies.measures import Column, Seen, number

FULL: dict[str, Any] = {"advantage": "calibadv", "opener": True, "soft_penalty": True, "rebalance": 1.0}
END = 10
"""Steps at the end of a run that count as its end."""


def _f1(seen: Seen, when: Literal["before", "after"]) -> float | None:
    """Held-out F1 times validity; of evaluations that measure nothing by name it is their score."""
    found = seen.held_out("f1", when)
    domains = (seen.evaluation(when) or {}).get("domains", {}).values()
    scores = [score for one in domains if (score := number(one.get("score"))) is not None]
    return found if found is not None or not scores else statistics.fmean(scores)


def _asks(config: SearchAgentConfig) -> Asks:
    engines, ranks = config.rollout.fewest, config.trainer.ranks
    beside = 1 + (config.search.corpus is not None)  # tasks that read data, and a search of its own
    return Asks(
        engines * config.rollout.tensor_parallel + ranks, engines * config.rollout.threads + ranks * config.trainer.threads + beside
    )


ABLATION = Study(
    title="CalibAdv, part by part",
    cells={
        "grpo": FULL | {"advantage": "grpo", "opener": False},  # the paper's baseline learns its opener
        "calibadv": FULL,
        "no-opener": FULL | {"opener": False},
        "no-soft-penalty": FULL | {"soft_penalty": False},
        "no-rebalance": FULL | {"rebalance": None},
        "rebalance-0.5": FULL | {"rebalance": 0.5},  # the positive control: the paper says that it collapses
    },
    columns=(
        Column("F1 before", lambda seen: _f1(seen, "before")),
        Column("F1 after", lambda seen: _f1(seen, "after")),
        Column("EM before", lambda seen: seen.held_out("exact_match", "before")),
        Column("EM after", lambda seen: seen.held_out("exact_match")),
        Column("searches", lambda seen: seen.held_out("searches"), share=False),
        Column("high PPL", lambda seen: seen.held_out("high_ppl")),
        Column("high PPL in training", lambda seen: seen.mean("high_ppl", END)),
        Column("reward in training", lambda seen: seen.mean("reward", END)),
        Column("softened", lambda seen: seen.mean("softened_of_negative")),
    ),
    told=("reward", "searches", "high_ppl"),
    asks=_asks,
)

STUDIES = {"ablation": ABLATION}
