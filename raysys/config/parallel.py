"""How ranks share a model: the stage of ZeRO that runs, and which ways of splitting a mixture of experts go together."""

from __future__ import annotations

from raysys.errors import ConfigError

REDUCE_BUCKET = 500_000_000
"""Numbers of a gradient bucket of DeepSpeed's, at most."""


def effective_stage(zero_stage: int, dtype: str) -> int:
    """Stage 0 keeps no masters and adds gradients up in bfloat16, so bfloat16 runs on stage 1: the same numbers, in float32."""
    return max(zero_stage, 1) if dtype == "bfloat16" else zero_stage


def check_parallel(zero_stage: int, expert_parallel: int, ranks: int, experts: int) -> None:
    """Raises ConfigError, naming the key to change, for what cannot run.

    Args:
        zero_stage: of DeepSpeed, 0 to 3.
        expert_parallel: ranks that hold every layer's experts between them; 1: each rank holds all.
        ranks: of the trainer.
        experts: of a layer.
    """
    if not isinstance(expert_parallel, int) or isinstance(expert_parallel, bool) or expert_parallel < 1:
        raise ConfigError(f"expert_parallel={expert_parallel} is no number of ranks", "set expert_parallel to 1 or more")
    if expert_parallel == 1:
        return
    if zero_stage > 2:
        raise ConfigError(
            f"expert_parallel={expert_parallel} does not go with zero_stage={zero_stage}, which splits every parameter over all ranks",
            "set expert_parallel to 1, or zero_stage to 0, 1 or 2",
        )
    if ranks % expert_parallel:
        raise ConfigError(
            f"ranks={ranks} cannot be split into groups of expert_parallel={expert_parallel}", "set expert_parallel to a divisor of ranks"
        )
    if experts % expert_parallel:
        raise ConfigError(
            f"experts={experts} cannot be split evenly over expert_parallel={expert_parallel} ranks",
            "set expert_parallel to a divisor of experts",
        )
