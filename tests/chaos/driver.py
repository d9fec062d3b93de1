"""One attempt of a storm run, and with `--supervise` all of them: the real loop, ledger, source, pool, pusher and supervisor."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from raysys import supervise
from raysys.config.parts import Deadlines, Rollout, Weights
from raysys.config.runs import GopdConfig
from raysys.errors import InfrastructureError
from raysys.ledger import Ledger
from raysys.processes import die_with_parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-age", type=int, default=0)
    parser.add_argument("--order", default="first_ready")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--heartbeat", type=float, default=4.0)
    parser.add_argument("--patience", type=float, default=6.0, help="seconds for trainer, scorer and push")
    parser.add_argument("--device", default="cpu", help="gpu: an engine asks for a GPU that a node says it has")
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--release-after", type=float, default=None)
    parser.add_argument("--supervise", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    if options.supervise:
        command = [sys.executable, "-u", "-m", "tests.chaos.driver", *(one for one in arguments if one != "--supervise")]
        points = options.folder / "checkpoints"
        return supervise.supervise(
            command,
            8,  # a storm may hit the same few steps again and again
            lambda: sorted(path.name for path in points.glob("step_*")),
            lambda: options.folder / "ledger" / "pulse",
            options.heartbeat,
        )
    die_with_parent(supervise.supervisor())
    return attempt(options)


def attempt(options: argparse.Namespace) -> int:
    keys = [
        "student=s",
        "teachers.default=t",
        "data.path=p",
        f"batch={options.batch}",
        f"steps={options.steps}",
        f"max_age={options.max_age}",
    ]
    ledger = Ledger(options.folder, GopdConfig.load(None, keys), keep=2)
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    from raysys.evaluation.during import NoEvaluation
    from raysys.loop import Parts, train
    from raysys.report import live
    from raysys.rollout.pool import RolloutPool
    from raysys.rollout.source import OnPolicySource
    from raysys.rollout.spec import RolloutSpec, Sampling
    from raysys.weights.push import Pusher
    from tests.chaos.parts import StormEngine, StormScorers, StormTrainer
    from tests.fakes import FakeObjective, FakePrompts, FileMetrics

    live.EVERY_SECONDS = 0.3  # steps are short here
    deadlines = Deadlines(placement=60, start=60, generate=max(10.0, options.patience), push=options.patience, heartbeat=options.heartbeat)
    workers = int(options.workers) if options.workers.isdigit() else options.workers
    config = Rollout(workers=workers, max_sequences=options.seats, retries=20, restarts=10, release_after=options.release_after)
    spec = RolloutSpec("storm", options.device, "float32", 64, config, log_dir=str(options.folder))
    try:
        with supervise.beating(options.folder / "ledger" / "pulse"), RolloutPool(config, spec, deadlines, worker=StormEngine) as pool:
            pool.start()
            trainer = StormTrainer(options.max_age == 0, options.patience, options.folder / "pace")
            source = OnPolicySource(FakePrompts(), pool, 2, Sampling(max_tokens=6, seed=0), order=options.order)
            if ledger.resume_point is not None:
                trainer.load(str(ledger.resume_point / "trainer"))
                source.restore(ledger.cursor() or {}, ledger.backlog(), ledger.step)
            pusher = Pusher(trainer, pool, Weights(), deadlines)  # type: ignore[arg-type]
            pool.admit = pusher.catch_up
            pusher.push(ledger.step)

            class Pushes:
                def push(self, version: int) -> dict[str, object]:
                    return {"fingerprint": pusher.push(version).fingerprint}

            scorers, metrics = StormScorers(options.patience), FileMetrics(options.folder)
            parts = Parts(source, scorers, FakeObjective(), trainer, Pushes(), ledger, NoEvaluation(), metrics)  # type: ignore[arg-type]
            with live.Live(options.folder, "storm", lambda: {"phase": parts.watch.phase, "pool": pool.status(), "source": source.status()}):
                end = train(parts, steps=options.steps, batch=options.batch, max_age=options.max_age, checkpoint_every=2)
            trainer.save(str(options.folder / "export" / "trainer"))
            (options.folder / "recovered.json").write_text(json.dumps(source.counts()))
            ledger.finish(end)
        return 0
    except InfrastructureError as error:
        print(f"error: {error}", flush=True)
        return supervise.TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
