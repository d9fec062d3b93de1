"""What `vs-trl-data` runs in TRL's environment: `python trl_peer_data.py SETTINGS.json FIGURES.json`.

TRL's `SFTTrainer`, or its `GKDTrainer` on data alone (lmbda 0), on their defaults but for what makes the work equal to raysys'. Knows
nothing of raysys.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

UNUSED = ("deepspeed", "ray", "vllm")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the seconds of each step, the losses and TRL's version.

    Args:
        settings: method ("sft" or "gkd"), student, teacher, data (a JSONL file), folder, batch, micro_rows, steps, length (of a row),
            learning_rate, threads, packing.
    """
    for name in UNUSED:  # what this run does not use shall not cost it memory
        sys.modules[name] = None  # type: ignore[assignment]
    import torch
    import trl

    torch.set_num_threads(settings["threads"])
    ends: list[float] = []
    trainer = build(settings, ends)
    began = time.perf_counter()
    trainer.train()
    return {
        "version": trl.__version__,
        "step_s": [end - start for start, end in zip([began, *ends], ends)],
        "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def build(settings: dict[str, Any], ends: list[float]) -> Any:
    """The trainer; it appends the clock at each step's end to `ends`."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(settings["student"])
    common = {"model": settings["student"], "processing_class": tokenizer, "callbacks": [Clock()]}
    if settings["method"] == "sft":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["answer"] + tokenizer.eos_token} for row in rows])
        return SFTTrainer(args=SFTConfig(**arguments(settings), packing=settings["packing"]), train_dataset=data, **common)
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer.chat_template = TEMPLATE
    messages = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}] for row in rows]
    own = {"lmbda": 0.0, "beta": 1.0, "temperature": 1.0, "teacher_model_init_kwargs": {"dtype": "float32"}}
    args = GKDConfig(**arguments(settings), **own)
    return GKDTrainer(teacher_model=settings["teacher"], args=args, train_dataset=Dataset.from_dict({"messages": messages}), **common)


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments that both configs share."""
    return {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": settings["micro_rows"],
        "gradient_accumulation_steps": settings["batch"] // settings["micro_rows"],
        "max_steps": settings["steps"],
        "max_length": settings["length"],
        "learning_rate": settings["learning_rate"],
        "weight_decay": 0.01,
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
