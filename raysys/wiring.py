"""Wires the rooms together: which rooms each job needs, started side by side, closed whatever happens.

This and `jobs/` are the only places, with `loop.py` and `cli.py`, that know more than one room.
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
from raysys.checks import check_evaluate, check_generate, check_gopd, check_sft, local_or_id
from raysys.colocate import SHARE, TurningPusher, TurningTrainer, lodger
from raysys.config.runs import EvaluateConfig, EvaluationPart, GenerateConfig, GopdConfig, Run, SftConfig
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import ConfigError
from raysys.evaluation.during import Evaluator, NoEvaluation
from raysys.generation.run import generate
from raysys.job import Session
from raysys.loop import Evaluates, Parts, train
from raysys.report.live import Live
from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.recorded import Recorder, Replay, Takes
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.runtime import get, may_grow
from raysys.scoring.group import ScorerGroup
from raysys.scoring.verifiers import score
from raysys.supervised import DataSource, NoPush, NoScorers
from raysys.training.group import TrainerGroup
from raysys.training.objectives import GopdObjective, Objective, SftObjective
from raysys.watching import Usage, status
from raysys.weights.ipc import IpcReceiver
from raysys.weights.nccl import NcclReceiver
from raysys.weights.push import Pusher
from raysys.weights.receive import SharedMemoryReceiver

log = logging.getLogger("raysys")

__all__ = ["check_evaluate", "check_generate", "check_gopd", "check_sft", "run_evaluate", "run_generate", "run_gopd", "run_sft"]


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


# -- jobs


def run_gopd(config: GopdConfig, session: Session) -> None:
    """On-policy distillation: rollouts, scorers and trainer side by side, then the loop."""
    if config.rollout.generate_only:
        _generate_only(config, session)
        return
    engines = 0 if config.rollout.replay or config.colocate else config.rollout.fewest * config.rollout.tensor_parallel
    hardware = Hardware.choose(config, config.trainer.dtype, engines + config.scoring.ranks + config.trainer.ranks)
    student, objective = local_or_id(config.student), GopdObjective.of(config)
    with ExitStack() as stack:
        trainer = stack.enter_context(_trainer(config, student, objective, hardware, session.folder))
        member = lodger(trainer) if config.colocate else Member
        pool = None if config.rollout.replay else stack.enter_context(_pool(config, student, hardware, session.folder, member))
        scorers = stack.enter_context(_scorers(config, student, hardware))
        starts = {"trainer": trainer.start, "scorer": scorers.start} | ({"rollout": pool.start} if pool else {})
        if config.colocate:
            start_all(trainer=starts.pop("trainer"))  # the engines live where it is
        start_all(**starts)
        if pool is None:
            source, weights, evaluator = Replay(Path(str(config.rollout.replay))), NoPush(), NoEvaluation()
            resume(session, trainer, source)
        else:
            source = _on_policy(config, session, pool, student, stack)
            pusher = _pusher(config, trainer, pool, student)
            resume(session, trainer, source)
            pusher.push(session.ledger.step)
            weights = Pushes(TurningPusher(pusher, pool) if config.colocate else pusher)
            evaluator = _evaluator(config, session, pool, trainer, student, before=None)
        usage = Usage(pool, config)
        metrics = _metrics(config, session, stack, usage)
        turning = TurningTrainer(trainer, pool) if config.colocate and pool is not None else trainer
        parts = Parts(source, scorers, objective, turning, weights, session.ledger, evaluator, metrics)
        stack.enter_context(Live(session.folder, session.job, lambda: status(config, session, parts, pool, source)))
        finish(config, session, parts, trainer, max_age=config.max_age)
        log.info(usage.summary())


def _generate_only(config: GopdConfig, session: Session) -> None:
    """The source alone, for as many steps as the run would have."""
    student = local_or_id(config.student)
    hardware = Hardware.choose(config, config.trainer.dtype, config.rollout.fewest * config.rollout.tensor_parallel)
    with ExitStack() as stack:
        pool = stack.enter_context(_pool(config, student, hardware, session.folder))
        pool.start()
        source = _on_policy(config, session, pool, student, stack)
        for step in range(config.steps):
            source.take(config.batch, 0)
            log.info("step %d/%d recorded in %s", step + 1, config.steps, config.rollout.record)
    session.ledger.finish(config.steps)


def _on_policy(config: GopdConfig, session: Session, pool: RolloutPool, student: str, stack: ExitStack) -> Takes:
    stream = PromptStream(config.data, student, config.seed, config.max_prompt_tokens, config.max_response_tokens)
    stack.callback(_tell_bad_rows, stream)
    source = OnPolicySource(
        stream,
        pool,
        config.samples,
        Sampling(
            temperature=config.rollout.temperature, top_p=config.rollout.top_p, max_tokens=config.max_response_tokens, seed=config.seed
        ),
        order=config.rollout.order,
        buffer_bytes=config.rollout.buffer_mib << 20,
        dead_letter=session.ledger.dead_letter,
        max_dead_letters=config.rollout.max_dead_letters,
    )
    return Recorder(source, Path(config.rollout.record)) if config.rollout.record else source


def _tell_bad_rows(stream: PromptStream) -> None:
    for line in stream.report().lines():
        log.info(line)


def _scorers(config: GopdConfig, student: str, hardware: Hardware) -> ScorerGroup:
    return ScorerGroup(
        config.scoring,
        teachers={tag: local_or_id(folder) for tag, folder in config.teachers.items()},
        reference=local_or_id(config.reference) if config.reference and config.reward_scale != 1 else None,
        reward_scale=config.reward_scale,
        tokenizer_folder=student,
        temperature=config.rollout.temperature,
        device=hardware.device,
        dtype=hardware.dtype,
        deadlines=config.deadlines,
    )


def run_sft(config: SftConfig, session: Session) -> None:
    """Supervised fine-tuning: the same loop with data as its source, no scorers, and a push only where an evaluation needs one."""
    hardware = Hardware.choose(config, config.trainer.dtype, config.trainer.ranks + (config.rollout.fewest if config.evaluation else 0))
    student = local_or_id(config.student) if config.student else _new_model(config, session.folder)
    objective = SftObjective()
    with ExitStack() as stack:
        trainer = stack.enter_context(_trainer(config, student, objective, hardware, session.folder))
        pool = stack.enter_context(_pool(config, student, hardware, session.folder)) if config.evaluation else None
        start_all(trainer=trainer.start, **({"rollout": pool.start} if pool else {}))
        stream = PromptStream(config.data, student, config.seed, config.max_prompt_tokens, config.max_response_tokens, supervised=True)
        source = DataSource(stream)
        resume(session, trainer, source)
        evaluator: Evaluates = NoEvaluation()
        if pool is not None:
            evaluator = _evaluator(config, session, pool, trainer, student, before=_pusher(config, trainer, pool, student).push)
        parts = Parts(source, NoScorers(), objective, trainer, NoPush(), session.ledger, evaluator, _metrics(config, session, stack))
        finish(config, session, parts, trainer, max_age=0)
        _tell_bad_rows(stream)


def run_evaluate(config: EvaluateConfig, session: Session) -> None:
    """Evaluates each checkpoint in turn; one already on record is not repeated."""
    hardware = Hardware.choose(config, "auto", config.rollout.fewest * config.rollout.tensor_parallel)
    for label, folder in config.models.items():
        model = local_or_id(folder)
        with _pool(config, model, hardware, session.folder) as pool:
            pool.start()
            evaluator = _evaluator(config, session, pool, None, model, before=None, label=label)
            evaluator.run(0)
    session.ledger.finish(0)


def run_generate(config: GenerateConfig, session: Session) -> None:
    """Teachers' answers as data to train on; one teacher's engines at a time."""
    hardware = Hardware.choose(config, "auto", config.rollout.fewest * config.rollout.tensor_parallel)
    generate(config, session, hardware.device, hardware.dtype)


# -- the pieces they share


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


def finish(config: GopdConfig | SftConfig, session: Session, parts: Parts, trainer: TrainerGroup, max_age: int) -> None:
    """The loop, then the export and the mark that the run is done."""
    end = train(parts, steps=config.steps, batch=config.batch, max_age=max_age, checkpoint_every=config.checkpoint_every)
    trainer.export(str(session.folder / "export"))
    session.ledger.finish(end)
    log.info("weights: %s", session.folder / "export")


def _pool(
    config: GopdConfig | SftConfig | EvaluateConfig, model: str, hardware: Hardware, folder: Path, member: type[Member] = Member
) -> RolloutPool:
    spec = RolloutSpec(
        model=model,
        device=hardware.device,
        dtype=hardware.dtype,
        max_model_len=config.max_prompt_tokens + config.max_response_tokens,
        log_dir=str(folder),
        config=config.rollout,
        sleeps=getattr(config, "colocate", False),
        receiver=_receiver(config, hardware),
    )
    return RolloutPool(config.rollout, spec, config.deadlines, member=member)


def _trainer(config: GopdConfig | SftConfig, student: str, objective: Objective, hardware: Hardware, folder: Path) -> TrainerGroup:
    return TrainerGroup(
        config.trainer,
        model=student,
        objective=objective,
        learning_rate=config.learning_rate,
        steps=config.steps,
        seed=config.seed,
        temperature=config.rollout.temperature if isinstance(config, GopdConfig) else 1.0,
        device=hardware.device,
        dtype=hardware.dtype,
        deadlines=config.deadlines,
        log_dir=str(folder),
        share=SHARE if getattr(config, "colocate", False) else 1.0,
    )


def _receiver(config: Any, hardware: Hardware) -> type[SharedMemoryReceiver]:
    """How engines take weights. Raises ConfigError for a way from GPU to GPU without GPUs."""
    weights = getattr(config, "weights", None)
    if weights is None or weights.backend not in ("nccl", "ipc"):
        return SharedMemoryReceiver
    if hardware.device != "gpu":
        raise ConfigError(f"weights.backend={weights.backend} needs GPUs", "use auto or shared_memory")
    return NcclReceiver if weights.backend == "nccl" else IpcReceiver


def _pusher(config: GopdConfig | SftConfig, trainer: TrainerGroup, pool: RolloutPool, student: str) -> Pusher:
    pusher = Pusher(trainer, pool, config.weights, config.deadlines, engine_ranks=config.rollout.tensor_parallel)
    pool.admit = pusher.catch_up
    return pusher


def _metrics(config: GopdConfig | SftConfig, session: Session, stack: ExitStack, usage: Usage | None = None) -> Any:
    writer = stack.enter_context(MetricsWriter(session.folder, session.job, session.folder.name))
    progress = Progress(config.steps)

    class Both:
        def write(self, record: dict[str, Any]) -> None:
            if usage is not None:
                record["seconds"] |= usage.lap(record["seconds"])
            writer.write(record)
            progress.show(record)

    return Both()


def _evaluator(
    config: GopdConfig | SftConfig | EvaluateConfig,
    session: Session,
    pool: RolloutPool,
    trainer: TrainerGroup | None,
    tokenizer: str,
    before: Callable[[int], Any] | None,
    label: str | None = None,
) -> Any:
    part = config.evaluation
    if part is None:
        return NoEvaluation()
    prompts = held_out(part, tokenizer, config)
    sampling = Sampling(
        temperature=part.temperature, top_p=1.0, max_tokens=config.max_response_tokens, seed=config.seed, greedy=part.samples == 1
    )
    decoder = Decoder(tokenizer)
    return Evaluator(
        generate=lambda rows: pool.generate(rows, sampling),
        prompts=prompts,
        decode=decoder.texts,
        score=score,
        folder=session.folder,
        steps=getattr(config, "steps", 0),
        every=getattr(config, "evaluate_every", None),
        samples=part.samples,
        stop_at=getattr(config, "stop_at", None),
        export=None if trainer is None else trainer.export,
        before=before,
        label=label,
        facts={"split": part.data.source.split if part.data.source else part.data.path, "model": tokenizer},
    )


def held_out(part: EvaluationPart, tokenizer: str, config: Any) -> Batch:
    """The evaluation's prompts, each repeated `samples` times."""
    stream = PromptStream(part.data, tokenizer, config.seed, config.max_prompt_tokens, config.max_response_tokens)
    domains = len(part.data.source.domains) if part.data.source else 1
    return stream.take(part.rows * domains).repeat(part.samples)


def _new_model(config: SftConfig, folder: Path) -> str:
    import ray

    start = folder / "start"

    def make() -> None:  # in a task, so that the driver never imports torch
        from raysys.models.scratch import new_causal

        new_causal(config.new_model, start, config.seed)

    if not (start / "config.json").is_file():
        get(
            ray.remote(num_cpus=1)(make).remote(),
            timeout=config.deadlines.start,
            actor="model maker",
            operation="new_model",
            knob="deadlines.start",
        )
    return str(start)
