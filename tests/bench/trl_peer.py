"""What `vs-trl` runs in TRL's environment: `python trl_peer.py SETTINGS.json FIGURES.json`.

TRL's `DistillationTrainer` on its defaults, but for what makes the work equal to raysys' (see `vs_trl.py`). Knows nothing of raysys.
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


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the seconds of each step, those of its generation, the responses' mean length, the losses and TRL's version.

    Args:
        settings: student, teacher, prompts (a JSONL file), folder, batch, micro_rows, steps, response_tokens,
            context, learning_rate, weight_decay,
            threads, vllm (generate with TRL's colocated engine), engine_dtype (null: what TRL leaves to vLLM).
    """
    # What this run does not use shall not cost it memory: TRL and accelerate import whatever they find.
    for name in UNUSED if settings["vllm"] else (*UNUSED, "vllm"):
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    import trl

    torch.set_num_threads(settings["threads"])
    if settings["vllm"] and settings["engine_dtype"]:
        from trl.generation import vllm_generation

        # TRL names no dtype, and vLLM then makes bfloat16 of float32 weights.
        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype=settings["engine_dtype"])
    trainer, generation, ends = build(settings)
    began = time.perf_counter()
    trainer.train()
    logged = [line for line in trainer.state.log_history if "completions/mean_length" in line]
    return {
        "version": trl.__version__,
        "step_s": [end - start for start, end in zip([began, *ends], ends)],
        "generate_s": generation,
        "response_tokens": [line["completions/mean_length"] for line in logged],
        "reverse_kl": [line["loss"] for line in logged],
    }


def build(settings: dict[str, Any]) -> tuple[Any, list[float], list[float]]:
    """The trainer, and two lists that it fills as it runs: seconds of each generation, and the clock at each step's end."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    generation: list[float] = []
    ends: list[float] = []

    class Timed(DistillationTrainer):
        def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return super()._generate_single_turn(*arguments, **options)
            finally:
                generation.append(time.perf_counter() - began)

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    trainer = Timed(
        model=settings["student"],
        teacher_model=settings["teacher"],
        args=DistillationConfig(**arguments(settings)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(settings["student"], padding_side="left"),
        callbacks=[Clock()],
    )
    return trainer, generation, ends


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of TRL's `DistillationConfig`."""
    return {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": settings["micro_rows"],
        "gradient_accumulation_steps": settings["batch"] // settings["micro_rows"],  # responses are still generated all at once
        "max_steps": settings["steps"],
        "max_completion_length": settings["response_tokens"],
        "beta": 1.0,  # reverse KL
        "temperature": 1.0,
        "shuffle_dataset": False,
        "learning_rate": settings["learning_rate"],
        "weight_decay": settings["weight_decay"],
        "lr_scheduler_type": "constant",
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_model_init_kwargs": {"dtype": "float32"},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # raysys' default too
        "use_vllm": settings["vllm"],
        "vllm_max_model_length": settings["context"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    asked, out = sys.argv[1:]
    Path(out).write_text(json.dumps(main(json.loads(Path(asked).read_text()))))
