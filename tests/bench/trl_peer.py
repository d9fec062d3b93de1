"""What `vs-trl` and `vs-trl-data` run in TRL's environment: `python trl_peer.py SETTINGS.json FIGURES.json`.

TRL's `DistillationTrainer` (opd), `SFTTrainer` (sft) or `GKDTrainer` on data alone (gkd, lmbda 0), on their defaults but for what makes the
work equal to raysys'. Knows nothing of raysys.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

UNUSED = ("deepspeed", "ray")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the seconds of each step, those of its generation, the responses' mean length, the losses and TRL's version.

    Args:
        settings: method, student, teacher, folder, batch, micro_rows, steps, learning_rate, weight_decay, threads. opd: prompts (a JSONL
            file), response_tokens, context, vllm (generate with TRL's colocated engine), engine_dtype (null: what TRL leaves to vLLM).
            sft and gkd: data (a JSONL file), length (of a row). sft: packing.
    """
    vllm = settings.get("vllm", False)
    # What this run does not use shall not cost it memory: TRL and accelerate import whatever they find.
    for name in UNUSED if vllm else (*UNUSED, "vllm"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    import trl

    torch.set_num_threads(settings["threads"])
    if vllm and settings["engine_dtype"]:
        from trl.generation import vllm_generation

        # TRL names no dtype, and vLLM then makes bfloat16 of float32 weights.
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=settings["engine_dtype"])
    generation: list[float] = []
    ends: list[float] = []
    trainer = {"opd": on_policy, "sft": sft, "gkd": gkd}[settings["method"]](settings, common(settings, ends), generation)
    began = time.perf_counter()
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "version": trl.__version__,
        "step_s": [end - start for start, end in zip([began, *ends], ends)],
        "generate_s": generation,
        "response_tokens": [line["completions/mean_length"] for line in logged if "completions/mean_length" in line],
        "loss": [line["loss"] for line in logged],
    }


def common(settings: dict[str, Any], ends: list[float]) -> dict[str, Any]:
    """Arguments that all trainers take; the clock at each step's end goes into `ends`."""
    from transformers import AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    side = "left" if settings["method"] == "opd" else "right"
    tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side=side)
    return {"model": settings["student"], "processing_class": tokenizer, "callbacks": [Clock()]}


def on_policy(settings: dict[str, Any], given: dict[str, Any], generation: list[float]) -> Any:
    """The on-policy trainer; it appends the seconds of each generation to `generation`."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return super()._generate_single_turn(*arguments, **options)
            finally:
                generation.append(time.perf_counter() - began)

    own = {
        "max_completion_length": settings["response_tokens"],
        "beta": 1.0,  # reverse KL
        "temperature": 1.0,
        "shuffle_dataset": False,
        "teacher_model_init_kwargs": {"dtype": "float32"},
        "use_vllm": settings["vllm"],
        "vllm_max_model_length": settings["context"],
    }
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows(settings["prompts"])])
    return Timed(teacher_model=settings["teacher"], args=DistillationConfig(**arguments(settings), **own), train_dataset=data, **given)


def sft(settings: dict[str, Any], given: dict[str, Any], generation: list[float]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    end = given["processing_class"].eos_token
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["answer"] + end} for row in rows(settings["data"])])
    args = SFTConfig(**arguments(settings), max_length=settings["length"], packing=settings["packing"])
    return SFTTrainer(args=args, train_dataset=data, **given)


def gkd(settings: dict[str, Any], given: dict[str, Any], generation: list[float]) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    given["processing_class"].chat_template = TEMPLATE
    messages = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in rows(settings["data"])
    ]
    own = {"lmbda": 0.0, "beta": 1.0, "temperature": 1.0, "teacher_model_init_kwargs": {"dtype": "float32"}}
    args = GKDConfig(**arguments(settings), max_length=settings["length"], **own)
    return GKDTrainer(teacher_model=settings["teacher"], args=args, train_dataset=Dataset.from_dict({"messages": messages}), **given)


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments that all of TRL's configs take."""
    return {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": settings["micro_rows"],
        "gradient_accumulation_steps": settings["batch"] // settings["micro_rows"],  # responses are still generated all at once
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "lr_scheduler_type": "constant",
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # raysys' default too
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    asked, out = sys.argv[1:]
    Path(out).write_text(json.dumps(main(json.loads(Path(asked).read_text()))))
