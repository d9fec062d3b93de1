"""What the jobs are put together from: the rooms as a config asks for them, started side by side, and the way from the loop to the export.

With `wiring.py` the only place that knows more than one room.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from raysys.batch import Batch
from raysys.checks import local_or_id, shared_vocabulary
from raysys.colocate import SHARE, TurningPusher
from raysys.config.agents import SearchAgentConfig
from raysys.config.runs import EvaluateConfig, EvaluationPart, GopdConfig, HpdConfig, Run, SftConfig
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import ConfigError
from raysys.evaluation.during import Evaluator, NoEvaluation
from raysys.job import Session
from raysys.loop import Parts, train
from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress
from raysys.rollout.environment import EpisodeSpec
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.runtime import get, may_grow
from raysys.scoring.group import ScorerGroup
from raysys.scoring.verifiers import score
from raysys.training.group import TrainerGroup
from raysys.training.objectives import Objective
from raysys.watching import Trains, Usage, shares_its_gpus
from raysys.weights.ipc import IpcReceiver
from raysys.weights.nccl import NcclReceiver
from raysys.weights.push import Pusher
from raysys.weights.receive import SharedMemoryReceiver

log = logging.getLogger("raysys")


@dataclass(frozen=True)
class Hardware:
    """What the cluster offers and what the run therefore uses."""

    device: str
    dtype: str

    @classmethod
    def choose(cls, config: Run, wanted_dtype: str, gpus_needed: int) -> Hardware:
        """Picks GPU or CPU. Raises ConfigError when the run asks for more GPUs than the cluster has and it cannot grow."""
        import ray

        have = int(ray.cluster_resources().get("GPU", 0))
        device = ("gpu" if have else "cpu") if config.device == "auto" else config.device
        if config.device == "auto" and not have and may_grow():
            log.warning("no node has a GPU now, so the run takes CPUs; device=gpu would wait for the nodes that this cluster can add")
        if device == "gpu" and gpus_needed > have and not may_grow():
            raise ConfigError(
                f"the run needs {gpus_needed} GPUs, the cluster has {have} "
                "(rollout.workers x rollout.tensor_parallel + scoring.ranks + trainer.ranks)",
                "lower one of these keys, or set device=cpu",
            )
        dtype = wanted_dtype if wanted_dtype != "auto" else "bfloat16" if device == "gpu" else "float32"
        return cls(device, dtype)


class Pushes:
    """The pusher as the loop sees it: what a step's record keeps of a push."""

    def __init__(self, pusher: Pusher | TurningPusher):
        self._pusher = pusher

    def push(self, version: int) -> dict[str, Any]:
        result = self._pusher.push(version)
        return {"parity_gap": result.parity_gap, "fingerprint": result.fingerprint}


def start_all(**starts: Callable[[], Any]) -> None:
    """Starts rooms side by side (imports dominate). Raises the first failure when it comes; the others keep nobody from leaving."""
    ended: SimpleQueue[Exception | None] = SimpleQueue()

    def run(start: Callable[[], Any]) -> None:
        try:
            start()
            ended.put(None)
        except Exception as error:
            ended.put(error)

    log.info("starting %s", ", ".join(starts))
    for name, start in starts.items():
        threading.Thread(target=run, args=(start,), name=f"start-{name}", daemon=True).start()
    for _ in starts:
        error = ended.get()  # each start has deadlines of its own
        if error is not None:
            raise error


def resume(session: Session, trainer: TrainerGroup, source: Any) -> None:
    """Back to the newest resume point, if there is one."""
    point = session.ledger.resume_point
    if point is None:
        return
    trainer.load(str(point / "trainer"))
    source.restore(session.ledger.cursor() or {}, session.ledger.backlog(), session.ledger.step)
    log.info("resumed at step %d from %s", session.ledger.step, point)


def finish(config: Trains, session: Session, parts: Parts, trainer: TrainerGroup, max_age: int) -> None:
    """The loop, then the export and the mark that the run is done."""
    end = train(parts, steps=config.steps, batch=config.batch, max_age=max_age, checkpoint_every=config.checkpoint_every)
    trainer.export(str(session.folder / "export"))
    session.ledger.finish(end)
    log.info("weights: %s", session.folder / "export")


def open_pool(
    config: Trains | EvaluateConfig,
    model: str,
    hardware: Hardware,
    folder: Path,
    member: type[Member] = Member,
    episodes: EpisodeSpec | None = None,
) -> RolloutPool:
    spec = RolloutSpec(
        model=model,
        device=hardware.device,
        dtype=hardware.dtype,
        max_model_len=config.max_prompt_tokens + config.max_response_tokens,
        log_dir=str(folder),
        config=config.rollout,
        sleeps=getattr(config, "colocate", False),
        receiver=receiver_for(config, hardware),
        episodes=episodes,
    )
    return RolloutPool(config.rollout, spec, config.deadlines, member=member)


def open_trainer(config: Trains, student: str, objective: Objective, hardware: Hardware, folder: Path) -> TrainerGroup:
    return TrainerGroup(
        config.trainer,
        model=student,
        objective=objective,
        learning_rate=config.learning_rate,
        steps=config.trainer.schedule_steps or config.steps,
        seed=config.seed,
        temperature=temperature(config),
        device=hardware.device,
        dtype=hardware.dtype,
        deadlines=config.deadlines,
        log_dir=str(folder),
        share=SHARE if shares_its_gpus(config) else 1.0,
        vocabulary=shared_vocabulary(config) if isinstance(config, HpdConfig) else None,
    )


def receiver_for(config: Any, hardware: Hardware) -> type[SharedMemoryReceiver]:
    """How engines take weights. Raises ConfigError for a way from GPU to GPU without GPUs."""
    weights = getattr(config, "weights", None)
    if weights is None or weights.backend not in ("nccl", "ipc"):
        return SharedMemoryReceiver
    if hardware.device != "gpu":
        raise ConfigError(f"weights.backend={weights.backend} needs GPUs", "use auto or shared_memory")
    return NcclReceiver if weights.backend == "nccl" else IpcReceiver


def open_pusher(config: Trains, trainer: TrainerGroup, pool: RolloutPool, student: str) -> Pusher:
    pusher = Pusher(trainer, pool, config.weights, config.deadlines, engine_ranks=config.rollout.tensor_parallel)
    pool.admit = pusher.catch_up
    return pusher


def open_metrics(config: Trains, session: Session, stack: ExitStack, usage: Usage | None = None) -> Any:
    writer = stack.enter_context(MetricsWriter(session.folder, session.job, session.folder.name))
    progress = Progress(config.steps)

    class Both:
        def write(self, record: dict[str, Any]) -> None:
            if usage is not None:
                record["seconds"] |= usage.lap(record["seconds"])
            writer.write(record)
            progress.show(record)

    return Both()


def open_evaluator(
    config: Trains | EvaluateConfig,
    session: Session,
    pool: RolloutPool,
    trainer: TrainerGroup | None,
    tokenizer: str,
    before: Callable[[int], Any] | None,
    label: str | None = None,
    judge: Callable[[str, str, str, str], float] = score,
    measure: Callable[[Batch], dict[str, float]] | None = None,
    headline: str | None = None,
) -> Any:
    part = config.evaluation
    if part is None:
        return NoEvaluation()
    prompts = held_out(part, tokenizer, config)
    sampling = Sampling(
        temperature=part.temperature,
        top_p=part.top_p or 1.0,
        max_tokens=config.max_response_tokens,
        seed=config.seed,
        greedy=part.samples == 1,
    )
    decoder = Decoder(tokenizer)
    return Evaluator(
        generate=lambda rows: pool.generate(rows, sampling),
        prompts=prompts,
        decode=decoder.texts,
        score=judge,
        folder=session.folder,
        steps=getattr(config, "steps", 0),
        every=getattr(config, "evaluate_every", None),
        samples=part.samples,
        stop_at=getattr(config, "stop_at", None),
        export=None if trainer is None else trainer.export,
        before=before,
        examples=getattr(config, "examples", 5),
        label=label,
        measure=measure,
        headline=headline,
        facts={"split": part.data.source.split if part.data.source else part.data.path, "model": tokenizer},
    )


def held_out(part: EvaluationPart, tokenizer: str, config: Any) -> Batch:
    """The evaluation's prompts, each repeated `samples` times. Data with fewer rows than asked for give what they have, once."""
    limits = config.max_prompt_tokens, config.max_response_tokens
    stream = PromptStream(part.data, tokenizer, config.seed, *limits, deadline=config.deadlines.start)
    domains = len(part.data.source.domains) if part.data.source else 1
    taken = stream.take(part.rows * domains)
    first = [row for row, name in enumerate(taken.strings("prompt_id")) if name.endswith("@0")]
    if len(first) < len(taken):
        log.info("evaluation.data has %d rows, %d were asked for (evaluation.rows): each is asked once", len(first), len(taken))
        taken = taken.take(first)
    return taken.repeat(part.samples)


def make_model(config: SftConfig, folder: Path) -> str:
    import ray

    start, spec = folder / "start", config.new_model
    if spec.words is not None:  # as the driver sees it: a task runs elsewhere
        spec = spec.model_copy(update={"words": str(Path(spec.words).absolute())})

    def make() -> None:  # in a task, so that the driver never imports torch
        from raysys.models.scratch import new_causal

        new_causal(spec, start, config.seed)

    if not (start / "config.json").is_file():
        get(
            ray.remote(num_cpus=1)(make).remote(),
            timeout=config.deadlines.start,
            actor="model maker",
            operation="new_model",
            knob="deadlines.start",
        )
    return str(start)


def open_scorers(config: GopdConfig | HpdConfig, student: str, hardware: Hardware, host: TrainerGroup | None = None) -> ScorerGroup:
    reference, scale = (config.reference, config.reward_scale) if isinstance(config, GopdConfig) else (None, 1.0)
    return ScorerGroup(
        config.scoring,
        teachers={tag: local_or_id(folder) for tag, folder in config.teachers.items()},
        reference=local_or_id(reference) if reference and scale != 1 else None,
        reward_scale=scale,
        tokenizer_folder=student,
        temperature=temperature(config),
        device=hardware.device,
        dtype=hardware.dtype,
        deadlines=config.deadlines,
        vocabulary=shared_vocabulary(config) if isinstance(config, HpdConfig) else None,
        rewards=isinstance(config, GopdConfig),  # what data are right is known before
        host=host,
        share=SHARE if host else 1.0,
    )


def temperature(config: Trains) -> float:
    """What divides the logits of student and teachers: that of the rollouts, or the one that distillation on data names."""
    if isinstance(config, (GopdConfig, SearchAgentConfig)):
        return config.rollout.temperature
    return config.temperature if isinstance(config, HpdConfig) else 1.0


def tell_bad_rows(stream: PromptStream) -> None:
    for line in stream.report().lines():
        log.info(line)
