"""The same on-policy distillation through raysys and through TRL's `DistillationTrainer`: response tokens a second and peak memory.

Same student, teacher, prompts, batch, tokens of a micro-batch, number of updates, float32, CPU and threads. `quickstart` and `small` never
draw their end token: all responses are equally long, which suits generation in one padded block best. `uneven` has a vocabulary of
today's size, and ends with the same probability after every token: its lengths are spread as those of real responses are (geometric: the
99th percentile is 6.6 times the median). raysys takes the reverse KL on the sampled tokens, TRL over the whole vocabulary, in chunks.

TRL (Apache-2.0) generates with a vLLM of its own process if it can. It cannot with float32 on CPU: the engine starts, and TRL's way of
giving it new weights fails, because vLLM packs linear weights there; TRL's server mode wants CUDA for the weights. `auto` tries once,
keeps the error as a figure, and goes on with transformers' `generate`. TRL lives in `.venv-trl`, made on first use: a few packages on top
of this environment's.

Memory is the proportional resident size (shared pages count once) of all processes of a side, Ray's own included, by what they are.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import yaml

from tests.bench.peak import Failed, last_line, watched

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl"
PINS = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "multiprocess==0.70.19", "xxhash==4.1.0")
SMALL = {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64, "ffn_size": 768, "initializer_range": 0.06}
UNEVEN = {
    "hidden_size": 320,
    "layers": 6,
    "heads": 5,
    "kv_heads": 5,
    "head_dim": 64,
    "ffn_size": 960,
    "initializer_range": 0.05,
    "tied": False,
}
DEFAULTS: dict[str, Any] = {
    "models": {
        "quickstart": {"sizes": {}, "steps": 20},
        "small": {"sizes": SMALL, "steps": 10},
        "uneven": {
            "sizes": UNEVEN,
            "vocabulary": 49152,
            "mean_tokens": 96,
            "response_tokens": 512,
            "micro_rows": 8,
            "learning_rate": 1e-6,
            "batch": 32,
            "steps": 4,
            "skip": 1,
            "deadline": 1500.0,
        },
    },
    "batch": 64,
    "micro_rows": 64,
    "prompt_tokens": 16,
    "response_tokens": 48,
    "mean_tokens": None,
    "vocabulary": None,
    "steps": 10,
    "skip": 2,
    "rounds": 1,
    "threads": 2,
    "learning_rate": 3.0e-4,
    "generation": "auto",
    "engine_dtype": "float32",
    "deadline": 600.0,
}
NEVER = 1000.0
LUCK = 0.15
"""How far the mean length of a side's responses may be from the one that was asked for, where lengths are drawn."""


def run(models: dict[str, dict[str, Any]], generation: str, **work: Any) -> dict[str, Any]:
    """Figures by model: each side's, and the ratios raysys / TRL.

    Args:
        models: name to `sizes` (keys of `raysys.config.runs.NewModel`) and to what of `work` is different for it.
        generation: TRL's: `vllm`, `transformers`, or `auto`.
        work: the other keys of `DEFAULTS`. `rounds`: times that both sides run, in turns. `skip`: first steps that do not count.
            `micro_rows`: full rows of a micro-batch. `mean_tokens`: of a response, null for always `response_tokens`. `vocabulary`: ids of
            the models, null for those of the tokenizer.
            `engine_dtype`: of TRL's vLLM; null is what TRL leaves to vLLM, which is bfloat16. `deadline`: seconds that one side may take.
    """
    if generation not in ("auto", "vllm", "transformers"):
        raise SystemExit(f"vs-trl: generation={generation}, expected auto, vllm or transformers")
    python, figures, why = peer(), {}, ""
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), python, **(work | model))
            if generation == "auto":
                generation, why = bench.probe_vllm()
            figures[name] = bench.compare(generation == "vllm")
    return {"generation": generation, "why": why, "packages": list(PINS), "models": figures}


def peer() -> Path:
    """TRL's Python, in an environment that sees this one's packages and holds what they lack. Made once.

    Raises SystemExit when it cannot be made.
    """
    python, mark = PEER / "bin" / "python", PEER / "pins.txt"
    if mark.is_file() and mark.read_text().split() == list(PINS):
        return python
    venv.EnvBuilder(clear=True, symlinks=True).create(PEER)
    libraries = PEER / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (libraries / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *PINS]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vs-trl: cannot install {' '.join(PINS)} into {PEER.name}: {last_line(done.stderr)}")
    mark.write_text("\n".join(PINS) + "\n")
    return python


class Bench:
    """Both sides on one pair of models."""

    def __init__(self, folder: Path, python: Path, sizes: dict[str, Any], steps: int, vocabulary: int | None, **work: Any):
        self.folder, self.python, self.steps, self.work = folder, python, steps, work
        self.deadline, self.skip = work["deadline"], work["skip"]
        if steps <= self.skip:
            raise SystemExit(f"vs-trl: steps={steps} leaves nothing after skip={self.skip}")
        self.prompts = folder / "prompts.jsonl"
        lines = (json.dumps({"id": str(row), "prompt": _prompt(row, work["prompt_tokens"])}) for row in range(steps * work["batch"]))
        self.prompts.write_text("\n".join(lines) + "\n")
        context = work["prompt_tokens"] + work["response_tokens"]
        sizes = sizes | {"context": context}
        self.student, self.teacher = (
            lengthy_model(folder / name, seed, sizes, work["mean_tokens"], vocabulary) for seed, name in enumerate("st")
        )
        self.parameters = _parameters(self.student)

    def compare(self, vllm: bool) -> dict[str, Any]:
        """Both sides in turns. Raises SystemExit when one fails or they did not do the same work."""
        sides: dict[str, list[dict[str, Any]]] = {"raysys": [], "trl": []}
        try:
            for number in range(self.work["rounds"]):
                sides["raysys"].append(self._raysys(f"run-{number}"))
                sides["trl"].append(self._trl(vllm, self.steps))
        except Failed as error:
            raise SystemExit(f"vs-trl: {error}") from None
        ours, theirs = (self._pool(rounds) for rounds in sides.values())
        return {
            "parameters": self.parameters,
            "raysys": ours,
            "trl": theirs,
            "tokens_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
            "memory_ratio": ours["peak_mib"] / theirs["peak_mib"],
        }

    def probe_vllm(self) -> tuple[str, str]:
        """How TRL can generate here, and why not with vLLM: two steps, because weights are given to the engine before each."""
        try:
            self._trl(True, 2)
        except Failed as error:
            return "transformers", f"with vllm, {error}"
        return "vllm", ""

    def _raysys(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self._config(name)))
        command = [sys.executable, str(ROOT / "jobs" / "gopd.py"), "--config", str(path)]
        # A home of its own: a head of this checkout would otherwise be joined, and its processes are nobody's children here.
        # Ray's workers otherwise yield to everything else (nice 15), which on a machine that is not idle would be no equal race.
        ours = {"RAYSYS_RUNS_DIR": str(self.folder), "RAYSYS_HOME": str(self.folder / "home"), "RAY_worker_niceness": "0"}
        seconds, peak = watched("raysys", command, ours, self.folder / "raysys.log", self.deadline)
        records = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        laps = [record["seconds"] for record in records]
        return {
            "step_s": [lap["total"] for lap in laps],
            "phases": {phase: [lap.get(phase, 0.0) for lap in laps] for phase in ("generate", "score", "train", "push")},
            "response_tokens": [record["response_tokens"] for record in records],
            "reverse_kl": [record["reverse_kl"] for record in records],
            "wall_s": seconds,
            "peak": peak,
        }

    def _config(self, name: str) -> dict[str, Any]:
        work = self.work
        return {
            "name": name,
            "student": str(self.student),
            "teachers": {"default": str(self.teacher)},
            "data": {"path": str(self.prompts), "shuffle": False},
            **{key: work[key] for key in ("batch", "learning_rate")},
            "steps": self.steps,
            "max_prompt_tokens": work["prompt_tokens"],
            "max_response_tokens": work["response_tokens"],
            "rollout": {"threads": work["threads"]},
            "scoring": {"threads": work["threads"], "micro_batch_tokens": self._micro_tokens()},
            "trainer": {"threads": work["threads"], "micro_batch_tokens": self._micro_tokens()},
            "checkpoint_every": 10**6,  # TRL saves nothing either
            "device": "cpu",
        }

    def _micro_tokens(self) -> int:
        return self.work["micro_rows"] * (self.work["prompt_tokens"] + self.work["response_tokens"])

    def _trl(self, vllm: bool, steps: int) -> dict[str, Any]:
        asked, out = self.folder / "trl.json", self.folder / "trl-figures.json"
        settings = {
            "method": "opd",
            "student": str(self.student),
            "teacher": str(self.teacher),
            "prompts": str(self.prompts),
            "folder": str(self.folder / "trl"),
            "steps": steps,
            "vllm": vllm,
            "context": self.work["prompt_tokens"] + self.work["response_tokens"],
            "weight_decay": 0.01,  # the default of raysys' trainer
            **{key: self.work[key] for key in ("batch", "micro_rows", "response_tokens", "learning_rate", "threads", "engine_dtype")},
        }
        asked.write_text(json.dumps(settings))
        command = [str(self.python), str(Path(__file__).with_name("trl_peer.py")), str(asked), str(out)]
        engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        environment = {"OMP_NUM_THREADS": str(self.work["threads"]), **(engine if vllm else {})}
        seconds, peak = watched("TRL", command, environment, self.folder / "TRL.log", self.deadline)
        found = json.loads(out.read_text())
        found["reverse_kl"] = found.pop("loss")
        return {**found, "phases": {"generate": found["generate_s"]}, "wall_s": seconds, "peak": peak}

    def _pool(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """One side's rounds as figures; times are medians of the steps after the first `skip`."""

        def warm(name: str, of: str = "") -> list[float]:
            return [value for one in rounds for value in (one[of] if of else one)[name][self.skip :]]

        lengths, seconds = warm("response_tokens"), warm("step_s")
        wanted, most = self.work["mean_tokens"] or self.work["response_tokens"], LUCK if self.work["mean_tokens"] else 0.0
        if abs(statistics.mean(lengths) / wanted - 1.0) > most:
            raise SystemExit(f"vs-trl: responses of {statistics.mean(lengths):.1f} tokens in the mean, not {wanted}: unequal work")
        largest = max(rounds, key=lambda one: one["peak"]["pss"])
        return {
            "tokens_per_s": self.work["batch"] * sum(lengths) / sum(seconds),
            "response_tokens": statistics.mean(lengths),
            "step_s": statistics.median(seconds),
            "phases": {phase: statistics.median(warm(phase, "phases")) for phase in rounds[0]["phases"]},
            "steps": len(warm("step_s")),
            "start_and_end_s": statistics.median(one["wall_s"] - sum(one["step_s"]) for one in rounds),
            "peak_mib": largest["peak"]["pss"],
            "peak_by_process": largest["peak"]["by_process"],
            "reverse_kl": [rounds[0]["reverse_kl"][0], rounds[0]["reverse_kl"][-1]],
        }


def _prompt(row: int, length: int) -> str:
    return f"{row:0{length - 1}d}="


def lengthy_model(folder: Path, seed: int, sizes: dict[str, Any], mean_tokens: int | None, vocabulary: int | None) -> Path:
    """A new model that ends with the same probability after every token, or never: one channel of the residual stream is constant, and
    only the end token's row reads it, and nothing else."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from raysys.config.runs import NewModel
    from raysys.models.scratch import EOS, SPECIALS, new_causal

    spec = NewModel(**sizes)
    weights = new_causal(spec, folder, seed) / "model.safetensors"
    state, end = load_file(weights), SPECIALS.index(EOS)
    rows, head = ("model.embed_tokens.weight", "lm_head.weight")
    if vocabulary:
        for name in (rows, head):
            dice = torch.Generator().manual_seed(seed)
            state[name] = torch.randn(vocabulary, state[name].shape[1], generator=dice) * spec.initializer_range
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}))
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0
    state[rows][:, 0] = 1.0
    state[head][:, 0] = 0.0
    state[head][end] = 0.0
    state[head][end, 0] = -NEVER
    save_file(state, weights, metadata={"format": "pt"})
    if mean_tokens:
        model = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.randint(3, len(state[head]), (8, 64), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            last = model.model(ids).last_hidden_state.flatten(0, 1)
            others = torch.logsumexp(last @ state[head].T, -1).mean()
        state[head][end, 0] = (others - math.log(mean_tokens - 1)) / last[:, 0].mean()
        save_file(state, weights, metadata={"format": "pt"})
    return folder


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return sum(int(shape[0] * (shape[1] if len(shape) > 1 else 1)) for shape in shapes)


def table(figures: dict[str, Any]) -> list[list[Any]]:
    """A row a model and side, then the largest processes of raysys."""
    header = ["model", "parameters", "side", "tokens/s", "step s", "generate s", "start and end s", "peak MiB", "reverse KL first", "last"]
    rows: list[list[Any]] = [header]
    for name, model in figures["models"].items():
        for side in ("raysys", "trl"):
            one = model[side]
            label = side if side == "raysys" else f"trl ({figures['generation']})"
            cells = [one["tokens_per_s"], one["step_s"], one["phases"]["generate"], one["start_and_end_s"], one["peak_mib"]]
            rows.append([name, model["parameters"], label, *cells, *one["reverse_kl"]])
        rows.append([name, "", "ratio", model["tokens_ratio"], "", "", "", model["memory_ratio"], "", ""])
        for role, part in sorted(model["raysys"]["peak_by_process"].items(), key=lambda item: -item[1]["pss"]):
            rows.append([name, "", f"memory of {role}", "", "", "", "", part["pss"], "", ""])
    if figures["why"]:
        print(f"TRL generates with transformers: {figures['why']}")
    return rows
