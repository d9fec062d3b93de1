"""Wires the rooms together: which rooms each job needs, started side by side, closed whatever happens.

This and `jobs/` are the only places, with `loop.py` and `cli.py`, that know more than one room.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import ExitStack
from functools import partial

from raysys.agent_transcripts import Transcripts
from raysys.agent_watch import Watched, history, measured
from raysys.assembly import (
    Hardware,
    Pushes,
    finish,
    make_model,
    open_evaluator,
    open_metrics,
    open_pool,
    open_pusher,
    open_scorers,
    open_trainer,
    resume,
    start_all,
    tell_bad_rows,
)
from raysys.checks import (
    check_evaluate,
    check_generate,
    check_gopd,
    check_hpd,
    check_local_text,
    check_pretrain_moe,
    check_questions,
    check_search_agent,
    check_sft,
    local_or_id,
    recording,
    shared_vocabulary,
)
from raysys.colocate import TurningPusher, TurningTrainer, lodger
from raysys.config.agents import QuestionsConfig, SearchAgentConfig
from raysys.config.parts import Weights
from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, HpdConfig, SftConfig
from raysys.data.prepare import write_questions
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.evaluation.during import NoEvaluation
from raysys.evaluation.harness import run_harness
from raysys.generation.run import generate
from raysys.job import Session
from raysys.loop import Evaluates, Parts
from raysys.pretraining import run_local_text, run_pretrain_moe
from raysys.quantising import check_quantize, run_quantize
from raysys.report.live import Live
from raysys.rollout.engine import quantised, revision, stop_ids
from raysys.rollout.members import Member
from raysys.rollout.pool import RolloutPool
from raysys.rollout.recorded import Recorder, Replay, Takes
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import Sampling
from raysys.search_agent import Judge, episodes_of, finder, own_search, text_reward
from raysys.supervised import DataSource, Doubts, NoPush, NoScorers
from raysys.training.calibrated import CalibAdvObjective
from raysys.training.hybrid import HpdObjective
from raysys.training.objectives import GopdObjective, Objective, SftObjective
from raysys.training.stored import StoredModels
from raysys.watching import Usage, scorer_ranks, shares_its_gpus, status
from raysys.weights.push import Pusher

log = logging.getLogger("raysys")

__all__ = [
    "check_evaluate",
    "check_generate",
    "check_gopd",
    "check_hpd",
    "check_local_text",
    "check_pretrain_moe",
    "check_quantize",
    "check_questions",
    "check_search_agent",
    "check_sft",
    "run_evaluate",
    "run_generate",
    "run_gopd",
    "run_hpd",
    "run_local_text",
    "run_pretrain_moe",
    "run_quantize",
    "run_questions",
    "run_search_agent",
    "run_sft",
]


def run_gopd(config: GopdConfig, session: Session) -> None:
    """On-policy distillation: rollouts, scorers and trainer side by side, then the loop."""
    if config.rollout.generate_only:
        _generate_only(config, session)
        return
    engines = 0 if config.rollout.replay or config.colocate else config.rollout.fewest * config.rollout.tensor_parallel
    hardware = Hardware.choose(config, config.trainer.dtype, engines + config.scoring.ranks + config.trainer.ranks)
    student, objective = local_or_id(config.student), GopdObjective.of(config)
    with ExitStack() as stack:
        trainer = stack.enter_context(open_trainer(config, student, objective, hardware, session.folder))
        member = lodger(trainer) if config.colocate else Member
        pool = None if config.rollout.replay else stack.enter_context(open_pool(config, student, hardware, session.folder, member))
        scorers = stack.enter_context(open_scorers(config, student, hardware))
        live = stack.enter_context(Live(session.folder, session.job, lambda: status(config, session, None, pool, None)))
        starts = {"trainer": trainer.start, "scorer": scorers.start} | ({"rollout": pool.start} if pool else {})
        if config.colocate:
            start_all(trainer=starts.pop("trainer"))  # the engines live where it is
            trainer.release_cache()  # and measure what is free there
        start_all(**starts)
        if pool is None:
            source, weights, evaluator = Replay(recording(str(config.rollout.replay), "rollout.replay")), NoPush(), NoEvaluation()
            resume(session, trainer, source)
        else:
            source = _on_policy(config, session, pool, student, stack)
            pusher = open_pusher(config, trainer, pool, student)
            resume(session, trainer, source)
            pusher.push(session.ledger.step)
            weights = Pushes(TurningPusher(pusher, pool) if config.colocate else pusher)
            evaluator = open_evaluator(config, session, pool, trainer, student, before=None)
        usage = Usage(pool, config)
        metrics = open_metrics(config, session, stack, usage)
        turning = TurningTrainer(trainer, pool) if config.colocate and pool is not None else trainer
        parts = Parts(source, scorers, objective, turning, weights, session.ledger, evaluator, metrics)
        live.shows(lambda: status(config, session, parts, pool, source))
        finish(config, session, parts, trainer, max_age=config.max_age)
        log.info(usage.summary())


def run_search_agent(config: SearchAgentConfig, session: Session) -> None:
    """GRPO on episodes that search: rollouts and trainer side by side, rewards from what the episodes say of themselves."""
    engines = config.rollout.fewest * config.rollout.tensor_parallel
    hardware = Hardware.choose(config, config.trainer.dtype, engines + config.trainer.ranks)
    student, objective = local_or_id(config.student), CalibAdvObjective.of(config)
    with ExitStack() as stack:
        search = stack.enter_context(own_search(config))
        trainer = stack.enter_context(open_trainer(config, student, objective, hardware, session.folder))
        pool = stack.enter_context(open_pool(config, student, hardware, session.folder, episodes=episodes_of(config, search)))
        live = stack.enter_context(Live(session.folder, session.job, lambda: status(config, session, None, pool, None)))
        start_all(trainer=trainer.start, rollout=pool.start)
        source = _on_policy(config, session, pool, student, stack)
        pusher = open_pusher(config, trainer, pool, student)
        resume(session, trainer, source)
        pusher.push(session.ledger.step)
        evaluator = open_evaluator(config, session, pool, trainer, student, before=None, judge=text_reward, measure=measured, headline="f1")
        usage = Usage(pool, config)
        metrics = open_metrics(config, session, stack, usage)
        transcripts = Transcripts(session.folder, Decoder(student), objective, config.steps)
        watched = Watched(objective, metrics, history(session.folder), config.stop_on_collapse, transcripts)
        parts = Parts(source, Judge(), watched, trainer, Pushes(pusher), session.ledger, evaluator, watched)
        live.shows(lambda: status(config, session, parts, pool, source))
        finish(config, session, parts, trainer, max_age=config.max_age)
        log.info(usage.summary())


def run_questions(config: QuestionsConfig, session: Session) -> None:
    """Questions, corpus and transcripts as files in the run's folder."""
    for name, count in write_questions(config, session.folder, lambda corpus: finder(corpus, config.topk)).items():
        log.info("%7d lines in %s", count, session.folder / name)
    session.ledger.finish(0)


def _generate_only(config: GopdConfig, session: Session) -> None:
    """The source alone, for as many steps as the run would have."""
    student = local_or_id(config.student)
    hardware = Hardware.choose(config, config.trainer.dtype, config.rollout.fewest * config.rollout.tensor_parallel)
    with ExitStack() as stack:
        pool = stack.enter_context(open_pool(config, student, hardware, session.folder))
        pool.start()
        source = _on_policy(config, session, pool, student, stack)
        for step in range(config.steps):
            source.take(config.batch, 0)
            log.info("step %d/%d recorded in %s", step + 1, config.steps, config.rollout.record)
    session.ledger.finish(config.steps)


def _on_policy(config: GopdConfig | SearchAgentConfig, session: Session, pool: RolloutPool, student: str, stack: ExitStack) -> Takes:
    limits = config.max_prompt_tokens, config.max_response_tokens
    stream = PromptStream(config.data, student, config.seed, *limits, deadline=config.deadlines.start)
    stack.callback(tell_bad_rows, stream)
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
    return Recorder(source, recording(config.rollout.record, "rollout.record")) if config.rollout.record else source


def run_sft(config: SftConfig, session: Session) -> None:
    """Supervised fine-tuning: the same loop with data as its source, no scorers, and a push only where an evaluation needs one."""
    student = local_or_id(config.student) if config.student else make_model(config, session.folder)
    _on_data(config, session, student, SftObjective())


def run_hpd(config: HpdConfig, session: Session) -> None:
    """Distillation on data: as `run_sft`, with a teacher that scores the data's tokens and the trainer's draws."""
    _on_data(config, session, local_or_id(config.student), HpdObjective.of(config))


def _on_data(config: SftConfig | HpdConfig, session: Session, student: str, objective: Objective) -> None:
    """The loop with Ray Data as its source, and scorers where the objective has a teacher."""
    engines = config.rollout.fewest * config.rollout.tensor_parallel if config.evaluation else 0
    scoring, lodging = scorer_ranks(config), shares_its_gpus(config)
    hardware = Hardware.choose(config, config.trainer.dtype, config.trainer.ranks + engines + (0 if lodging else scoring))
    with ExitStack() as stack:
        trainer = stack.enter_context(open_trainer(config, student, objective, hardware, session.folder))
        pool = stack.enter_context(open_pool(config, student, hardware, session.folder)) if config.evaluation else None
        live = stack.enter_context(Live(session.folder, session.job, lambda: status(config, session, None, pool, None)))
        scorers = NoScorers()
        starts = {"trainer": trainer.start} | ({"rollout": pool.start} if pool else {})
        if scoring and isinstance(config, HpdConfig):
            scorers = stack.enter_context(open_scorers(config, student, hardware, trainer if lodging else None))
            starts["scorer"] = scorers.start
        streams: list[PromptStream] = []
        starts["data"] = partial(_open_data, config, session, student, streams)
        if lodging:
            start_all(trainer=starts.pop("trainer"))  # the scorers live where it is
            trainer.release_cache()
        start_all(**starts)
        (stream,) = streams
        source = DataSource(stream)
        resume(session, trainer, source)
        evaluator: Evaluates = NoEvaluation()
        if pool is not None:
            evaluator = open_evaluator(config, session, pool, trainer, student, before=open_pusher(config, trainer, pool, student).push)
        usage = Usage(pool, config)
        metrics = Doubts(open_metrics(config, session, stack, usage))
        parts = Parts(source, scorers, objective, trainer, NoPush(), session.ledger, evaluator, metrics)
        live.shows(lambda: status(config, session, parts, pool, source))
        finish(config, session, parts, trainer, max_age=0)
        log.info(usage.summary())
        tell_bad_rows(stream)


def _open_data(config: SftConfig | HpdConfig, session: Session, student: str, into: list[PromptStream]) -> None:
    """The rows; reading them begins, unless the run goes on at another place."""
    shared = shared_vocabulary(config) if isinstance(config, HpdConfig) else None
    limits = config.max_prompt_tokens, config.max_response_tokens
    deadline = config.deadlines.start
    into.append(PromptStream(config.data, student, config.seed, *limits, supervised=True, deadline=deadline, shared=shared))
    if session.ledger.resume_point is None:
        into[0].prefetch()


def run_evaluate(config: EvaluateConfig, session: Session) -> None:
    """Evaluates each checkpoint in turn; one already on record is not repeated. Models of one architecture share their engines."""
    hardware = Hardware.choose(config, "auto", config.rollout.fewest * config.rollout.tensor_parallel)
    models = {label: local_or_id(folder) for label, folder in config.models.items()}
    if config.harness is not None:
        run_harness(config, config.harness, models, session.folder, hardware.device, hardware.dtype)
    for _, alike in itertools.groupby(models.items(), key=_kin) if config.evaluation is not None else ():
        _evaluate_alike(config, session, hardware, dict(alike))
    session.ledger.finish(0)


def _kin(model: tuple[str, str]) -> tuple[object, ...]:
    """Equal for labels and folders whose weights fit the same engine; a quantised model is on its own."""
    label, folder = model
    return revision(folder), stop_ids(folder), label if quantised(folder) else ""


def _evaluate_alike(config: EvaluateConfig, session: Session, hardware: Hardware, models: dict[str, str]) -> None:
    """Engines start with the first model and get the weights of the others, with the proofs of every push."""
    with ExitStack() as stack:
        pool = stack.enter_context(open_pool(config, next(iter(models.values())), hardware, session.folder))
        stored = stack.enter_context(StoredModels(hardware.dtype, config.deadlines))
        start_all(rollout=pool.start, **({"weights": stored.start} if len(models) > 1 else {}))
        for number, (label, model) in enumerate(models.items()):
            if number:
                stored.read(model)
                pusher = Pusher(stored, pool, Weights(), config.deadlines, engine_ranks=config.rollout.tensor_parallel)
                pusher.push(number)
                pool.admit = pusher.catch_up
            open_evaluator(config, session, pool, None, model, before=None, label=label).run(0)


def run_generate(config: GenerateConfig, session: Session) -> None:
    """Teachers' answers as data to train on; one teacher's engines at a time."""
    hardware = Hardware.choose(config, "auto", config.rollout.fewest * config.rollout.tensor_parallel)
    generate(config, session, hardware.device, hardware.dtype)
