"""The same on-policy distillation through raysys and through TRL's `DistillationTrainer`: response tokens a second and peak memory.

Same student, teacher, prompts, batch, number of updates, float32, CPU and threads. The end token of these models is never drawn, so
both sides generate the same number of tokens, which is checked; it is the case that suits generation in one padded block best.
raysys takes the reverse KL on the sampled tokens, TRL over the whole vocabulary (98 here, so that this costs nothing).

TRL (Apache-2.0) generates with a vLLM of its own process if it can. It cannot with float32 on CPU: the engine starts, and TRL's way of
giving it new weights fails, because vLLM packs linear weights there; TRL's server mode wants CUDA for the weights. `auto` tries once,
keeps the error as a figure, and goes on with transformers' `generate`. TRL lives in `.venv-trl`, made on first use: a few packages on top
of this environment's.

Memory is the proportional resident size (shared pages count once) of all processes of a side, Ray's own included, by what they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venv-trl"
PINS = ("trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0", "multiprocess==0.70.19", "xxhash==4.1.0")
SMALL = {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 64, "ffn_size": 768, "initializer_range": 0.06}
DEFAULTS: dict[str, Any] = {
    "models": {"quickstart": {}, "small": SMALL},
    "batch": 64,
    "prompt_tokens": 16,
    "response_tokens": 48,
    "steps": {"quickstart": 20, "small": 10},
    "skip": 2,
    "rounds": 1,
    "threads": 2,
    "learning_rate": 3.0e-4,
    "generation": "auto",
    "engine_dtype": "float32",
    "deadline": 600.0,
}
ROLES = {
    "ray::RolloutWorker": "rollout actor",
    "VLLM::": "engine core",
    "ray::ScorerWorker": "scorer",
    "ray::TrainerWorker": "trainer",
    "ray::": "other Ray workers and agents",
}
KINDS = {"Pss": "pss", "Pss_Anon": "own", "Pss_File": "files", "Pss_Shmem": "shared"}
NEVER = 1000.0
LOOKING = 30
"""The kernel walks all pages of a process to tell its share of them: of one core's time, one part in so many may go into that."""


def run(models: dict[str, dict[str, Any]], steps: dict[str, int], generation: str, **work: Any) -> dict[str, Any]:
    """Figures by model: each side's, and the ratios raysys / TRL.

    Args:
        models: name to sizes, keys of `raysys.config.runs.NewModel`.
        steps: updates of each model.
        generation: TRL's: `vllm`, `transformers`, or `auto`.
        work: the other keys of `DEFAULTS`. `rounds`: times that both sides run, in turns. `skip`: first steps that do not count.
            `engine_dtype`: of TRL's vLLM; null is what TRL leaves to vLLM, which is bfloat16. `deadline`: seconds that one side may take.
    """
    if generation not in ("auto", "vllm", "transformers"):
        raise SystemExit(f"vs-trl: generation={generation}, expected auto, vllm or transformers")
    python, figures, why = peer(), {}, ""
    for name, sizes in models.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), python, sizes, steps[name], **work)
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
        raise SystemExit(f"vs-trl: cannot install {' '.join(PINS)} into {PEER.name}: {_last_line(done.stderr)}")
    mark.write_text("\n".join(PINS) + "\n")
    return python


class Failed(RuntimeError):
    """A side ended with an error; says its last line."""


class Bench:
    """Both sides on one pair of models."""

    def __init__(self, folder: Path, python: Path, sizes: dict[str, Any], steps: int, **work: Any):
        self.folder, self.python, self.steps, self.work = folder, python, steps, work
        self.deadline, self.skip = work["deadline"], work["skip"]
        if steps <= self.skip:
            raise SystemExit(f"vs-trl: steps={steps} leaves nothing after skip={self.skip}")
        self.prompts = folder / "prompts.jsonl"
        lines = (json.dumps({"id": str(row), "prompt": _prompt(row, work["prompt_tokens"])}) for row in range(steps * work["batch"]))
        self.prompts.write_text("\n".join(lines) + "\n")
        context = work["prompt_tokens"] + work["response_tokens"]
        self.student, self.teacher = (endless_model(folder / name, seed, sizes | {"context": context}) for seed, name in enumerate("st"))
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
        seconds, peak = self._watched("raysys", command, ours)
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
            "scoring": {"threads": work["threads"]},
            "trainer": {"threads": work["threads"]},
            "checkpoint_every": 10**6,  # TRL saves nothing either
            "device": "cpu",
        }

    def _trl(self, vllm: bool, steps: int) -> dict[str, Any]:
        asked, out = self.folder / "trl.json", self.folder / "trl-figures.json"
        settings = {
            "student": str(self.student),
            "teacher": str(self.teacher),
            "prompts": str(self.prompts),
            "folder": str(self.folder / "trl"),
            "steps": steps,
            "vllm": vllm,
            "context": self.work["prompt_tokens"] + self.work["response_tokens"],
            "weight_decay": 0.01,  # the default of raysys' trainer
            **{key: self.work[key] for key in ("batch", "response_tokens", "learning_rate", "threads", "engine_dtype")},
        }
        asked.write_text(json.dumps(settings))
        command = [str(self.python), str(Path(__file__).with_name("trl_peer.py")), str(asked), str(out)]
        engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        seconds, peak = self._watched("TRL", command, {"OMP_NUM_THREADS": str(self.work["threads"]), **(engine if vllm else {})})
        found = json.loads(out.read_text())
        return {**found, "phases": {"generate": found["generate_s"]}, "wall_s": seconds, "peak": peak}

    def _watched(self, side: str, command: list[str], environment: dict[str, str]) -> tuple[float, dict[str, Any]]:
        """Seconds that a command took, and its processes at their largest. Raises Failed."""
        log = self.folder / f"{side}.log"
        base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        began = time.monotonic()
        with open(log, "w") as output:
            process = subprocess.Popen(command, env=base | environment, cwd=self.folder, stdout=output, stderr=output)
        try:
            with peak_memory(process.pid) as peak:
                code = process.wait(self.deadline)
        except subprocess.TimeoutExpired:
            raise Failed(f"{side} did not end within {self.deadline:g} s (deadline); {_last_line(log.read_text())}") from None
        finally:
            end(process)
        if code:
            raise Failed(f"{side} ended with {code}: {_last_line(log.read_text())}")
        return time.monotonic() - began, peak

    def _pool(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """One side's rounds as figures; times are medians of the steps after the first `skip`."""

        def warm(name: str, of: str = "") -> list[float]:
            return [value for one in rounds for value in (one[of] if of else one)[name][self.skip :]]

        if set(warm("response_tokens")) != {float(self.work["response_tokens"])}:
            raise SystemExit(
                f"vs-trl: responses of {min(warm('response_tokens'))} tokens, not {self.work['response_tokens']}: unequal work"
            )
        largest = max(rounds, key=lambda one: one["peak"]["pss"])
        seconds = statistics.median(warm("step_s"))
        return {
            "tokens_per_s": self.work["batch"] * self.work["response_tokens"] / seconds,
            "step_s": seconds,
            "phases": {phase: statistics.median(warm(phase, "phases")) for phase in rounds[0]["phases"]},
            "steps": len(warm("step_s")),
            "start_and_end_s": statistics.median(one["wall_s"] - sum(one["step_s"]) for one in rounds),
            "peak_mib": largest["peak"]["pss"],
            "peak_by_process": largest["peak"]["by_process"],
            "reverse_kl": [rounds[0]["reverse_kl"][0], rounds[0]["reverse_kl"][-1]],
        }


def _prompt(row: int, length: int) -> str:
    return f"{row:0{length - 1}d}="


def endless_model(folder: Path, seed: int, sizes: dict[str, Any]) -> Path:
    """A new model whose end token is never drawn: one channel of the residual stream is constant, and only that token's row reads it."""
    from safetensors.torch import load_file, save_file

    from raysys.config.runs import NewModel
    from raysys.models.scratch import EOS, SPECIALS, new_causal

    weights = new_causal(NewModel(**sizes), folder, seed) / "model.safetensors"
    state = load_file(weights)
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0
    state["model.embed_tokens.weight"][:, 0] = 1.0
    state["lm_head.weight"][:, 0] = 0.0
    state["lm_head.weight"][SPECIALS.index(EOS), 0] = -NEVER
    save_file(state, weights, metadata={"format": "pt"})
    return folder


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return sum(int(shape[0] * (shape[1] if len(shape) > 1 else 1)) for shape in shapes)


# -- processes


@contextlib.contextmanager
def peak_memory(pid: int, every: float = 0.25) -> Iterator[dict[str, Any]]:
    """Watches a process and its descendants; the dictionary then holds the largest sum and its parts, in MiB."""
    peak: dict[str, Any] = {"pss": 0.0, "by_process": {}}
    done = threading.Event()

    def watch() -> None:
        cost = 0.0
        while not done.wait(max(every, LOOKING * cost)):
            began = time.thread_time()
            found = memory(pid)
            cost = time.thread_time() - began
            total = sum(part["pss"] for part in found.values())
            if total > peak["pss"]:
                peak.update(pss=total, by_process=found)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def memory(pid: int) -> dict[str, dict[str, float]]:
    """MiB by what a process is: `pss`, and of it `own` (anonymous), `files` (mapped), `shared` memory; and the number of `processes`."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("processes", *KINDS.values()), 0.0))
    for one in family(pid):
        try:
            role, text = _role(one.cmdline()), Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except (psutil.Error, OSError):
            continue
        parts[role]["processes"] += 1
        for line in text.splitlines()[1:]:
            key, _, size = line.partition(":")
            if key in KINDS:
                parts[role][KINDS[key]] += int(size.split()[0]) / 1024
    return dict(parts)


def family(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _role(command: list[str]) -> str:
    line = " ".join(command)
    for start, role in ROLES.items():
        if line.startswith(start):
            return role
    if "gopd.py" in line:
        return "driver and supervisor"
    if "trl_peer.py" in line:
        return "trainer"
    return "Ray's daemons" if "/ray/" in line else "other"


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """Stops a side that still runs: first by asking, then all of it."""
    if process.poll() is not None:
        return
    members = family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    for one in members:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil compares start times: a later process with this id is left alone
            one.kill()
    process.wait(patience)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


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
