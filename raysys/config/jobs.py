"""Which config each job takes. A new job adds one line here."""

from __future__ import annotations

from raysys.config.agents import QuestionsConfig, SearchAgentConfig
from raysys.config.pretraining import LocalTextConfig, PretrainMoeConfig
from raysys.config.quantising import QuantizeConfig
from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, HpdConfig, PipelineConfig, Run, SftConfig

CONFIGS: dict[str, type[Run]] = {
    "gopd": GopdConfig,
    "hpd": HpdConfig,
    "search_agent": SearchAgentConfig,
    "questions": QuestionsConfig,
    "local_text": LocalTextConfig,
    "pretrain_moe": PretrainMoeConfig,
    "sft": SftConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "quantize": QuantizeConfig,
    "pipeline": PipelineConfig,
}
