"""Which config each job takes. A new job adds one line here."""

from __future__ import annotations

from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, PipelineConfig, Run, SftConfig

CONFIGS: dict[str, type[Run]] = {
    "gopd": GopdConfig,
    "sft": SftConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}
