"""Quantisation: bits by layer, codes layer after layer, a checkpoint that vLLM serves, and what is left of the model.

Layers are scored by Ray tasks, each from its own shards. One actor then goes through the model; what it knows lies in files, so that a
run that was killed goes on at the layer it hit.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysys.assembly import Hardware
from raysys.checks import local_or_id
from raysys.compression.calibration import token_windows, warnings
from raysys.config.quantising import BY_WEIGHTS, FOLDS, QuantizeConfig, Windows
from raysys.data.text import context_length
from raysys.errors import ConfigError, DeadlineError
from raysys.files import append_json, read_json_lines, write_json, write_shared_json
from raysys.quantising_served import serve
from raysys.quantising_work import Quantiser, Work, facts_of, facts_options, known_of, unembedding_of
from raysys.report.live import Live
from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress
from raysys.runtime import compute_environment, get, waits

if TYPE_CHECKING:
    from raysys.compression.shards import Checkpoint
    from raysys.job import Session

log = logging.getLogger("raysys")

MAP = "layer_map.json"
"""Bits, scores and their components by layer, in a run's folder."""


def check_quantize(config: QuantizeConfig) -> None:
    """The checkpoint's headers, its shapes against the groups, the windows, and the shared folder. Raises ConfigError or DataError."""
    if config.shared is not None:
        try:
            Path(config.shared).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"shared={config.shared} cannot be made: {error.strerror}", "name a folder that runs may write to") from None
    checkpoint = _opened(config)
    _check_groups(config, checkpoint)
    for key, part in _windows(config):
        limit = context_length(str(checkpoint.folder))
        if limit is not None and part.length > limit:
            raise ConfigError(f"{key}.length={part.length} exceeds the {limit} tokens that {config.model} holds", f"lower {key}.length")
        windows = token_windows(part, str(checkpoint.folder), config.seed, key, in_order=key == "evaluation")
        if key == "evaluation" and not (windows.starts < windows.lengths).any():
            raise ConfigError(f"evaluation.length={part.length} ends each window before its answer begins", "raise evaluation.length")


def run_quantize(config: QuantizeConfig, session: Session) -> None:
    """Scores, bits, layers, files, perplexity."""
    hardware = Hardware.choose(config, config.dtype, 1)
    checkpoint = _opened(config)
    calibration, held_out = (_read(config, checkpoint, key, part) for key, part in _both(config))
    progress = {"step": 0, "phase": "score"}
    with Live(session.folder, session.job, lambda: _status(session, progress)):
        if (family := checkpoint.config.get("model_type")) not in FOLDS and config.corrects(folds=False):
            log.info("d2quant.correction: a %s has no place for it, so it is left out of the file and kept for evaluation", family)
        bits = _allocated(config, checkpoint, session)
        if checkpoint.experts and len(set(bits)) > 1:
            log.info(
                "experts of layers with other widths: vLLM reads export/, stock transformers needs dequantised/ (keep_dequantised=true)"
            )
        about = _about(config, calibration.digest if calibration is not None else None)
        work = Work(config, checkpoint.folder, session.folder, bits, calibration, held_out, hardware.device, hardware.dtype, about)
        progress["phase"] = "train"
        with _quantiser(config, work, hardware) as ask:
            _layers(config, session, bits, ask, progress)
            told = ask("finish", "deadlines.checkpoint", config.deadlines.checkpoint)
            progress["phase"] = "evaluate"
            probe = None
            if config.served and config.check_export:
                log.info(ask("load_export", "deadlines.checkpoint", config.deadlines.checkpoint))
                probe = ask("probe", "deadlines.checkpoint", config.deadlines.checkpoint)
            _evaluate(config, session, ask, told)
            ask("close", "deadlines.checkpoint", config.deadlines.checkpoint)
        if probe is not None:  # the actor is gone: on one GPU there is room for an engine now
            log.info(serve(config, session.folder, hardware, probe))
    session.ledger.finish(len(bits))
    log.info("weights: %s", session.folder / ("export" if config.served else "dequantised"))


# -- before


def _opened(config: QuantizeConfig) -> Checkpoint:
    """The checkpoint, fetched if it has a hub's name. Raises ConfigError: see `Checkpoint.open`."""
    from raysys.compression.shards import Checkpoint

    return Checkpoint.open(_fetched(local_or_id(config.model)))


def _fetched(model: str) -> str:
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except Exception as error:  # of the network, of the hub, of the name: each has errors of its own
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model={model} is no folder, and a hub does not give it: {told}", "give a Hugging Face folder") from None


def _check_groups(config: QuantizeConfig, checkpoint: Checkpoint) -> None:
    for name, (_, columns) in checkpoint.shapes.items():
        if columns % config.group_size:
            raise ConfigError(
                f"{config.model}: {name} has {columns} inputs, which groups of group_size={config.group_size} do not divide",
                "set group_size to a divisor",
            )
    if config.rotation:
        from raysys.compression.rotated import check

        check(checkpoint)
    if config.rotation and checkpoint.tied:
        log.info("the embedding of %s is its unembedding too: rotation needs two, so the file will have a head of its own", config.model)


def _both(config: QuantizeConfig) -> Sequence[tuple[str, Windows | None]]:
    return ("calibration", config.calibration), ("evaluation", config.evaluation)


def _windows(config: QuantizeConfig) -> list[tuple[str, Windows]]:
    return [(key, part) for key, part in _both(config) if part is not None]


def _read(config: QuantizeConfig, checkpoint: Checkpoint, key: str, part: Windows | None) -> Any:
    if part is None:
        return None
    windows = token_windows(part, str(checkpoint.folder), config.seed, key, in_order=key == "evaluation")
    widest = max(columns for _, columns in checkpoint.shapes.values()) if key == "calibration" else 0
    for line in warnings(windows, part.samples, widest, key):
        log.warning(line)
    log.info("%s: %d windows, %d tokens, digest %s", key, len(windows), windows.tokens, windows.digest[:12])
    return windows


def _about(config: QuantizeConfig, calibration: str | None) -> dict[str, Any]:
    """What the file's metadata say of how it was made."""
    names = ("method", "bits", "allocation", "low", "high", "group_size", "rotation", "seed")
    return {name: getattr(config, name) for name in names} | {
        "model": Path(config.model).name if Path(local_or_id(config.model)).is_dir() else config.model,
        "calibration_digest": calibration,
        "correction": "none",
        "gptq": config.gptq.model_dump() if config.method != "rtn" else None,
        "d2quant": config.d2quant.model_dump() if config.method == "d2quant" else None,
    }


# -- which layers get more


def _allocated(config: QuantizeConfig, checkpoint: Checkpoint, session: Session) -> list[int]:
    """Bits by layer, written down with what they rest on. A run that goes on takes what it wrote."""
    from raysys.compression.sensitivity import bits as spend
    from raysys.compression.sensitivity import judge, sizes_of

    path, layers = session.folder / MAP, checkpoint.layers
    if path.is_file():
        return list(json.loads(path.read_text())["bits"])
    record: dict[str, Any] = {"allocation": config.allocation, "scores": None, "series": None}
    if config.allocation == "uniform":
        bits = [int(config.bits)] * layers
    else:
        facts = _facts(config, checkpoint, session) if config.allocation in BY_WEIGHTS else [{}] * layers
        judged = judge(config.allocation, facts, seed=config.seed)
        bits = spend(judged.scores, sizes_of(checkpoint), config.bits, config.low, config.high)
        if judged.parts:
            record |= {"scores": judged.scores, "series": judged.parts}
    log.info("bits by layer: %s", " ".join(map(str, bits)))
    if (average := sum(bits) / layers) < config.bits - 1e-9:
        log.info("whole layers cannot meet bits=%g on average exactly; %.4g is used", config.bits, average)
    write_json(path, {"bits": bits} | record)
    return bits


def _facts(config: QuantizeConfig, checkpoint: Checkpoint, session: Session) -> list[dict[str, float]]:
    """What tasks find out about the layers' weights; kept in files, so that none is asked twice, nor by another run that shares them."""
    import ray

    shared = known_of(checkpoint, config, config.allocation, **facts_options(config))
    folder = shared or session.folder / "ledger" / "facts"
    paths = [folder / f"{i:05d}.json" for i in range(checkpoint.layers)]
    waiting = [i for i, path in reversed(list(enumerate(paths))) if not path.is_file()]
    if waiting:
        log.info("%s: looking at the weights of %d layers", config.allocation, len(waiting))
        settings: Any = {"num_cpus": 1, "max_retries": 2, "runtime_env": {"env_vars": compute_environment(config.threads)}}
        limit = config.deadlines.score
        basis = ray.remote(**settings)(unembedding_of).remote(checkpoint, config)
        get(basis, timeout=limit, actor="the unembedding's task", operation="score", knob="deadlines.score")
        task, running = ray.remote(**settings)(facts_of), dict[Any, int]()
        while waiting or running:
            while waiting and len(running) < (config.scoring_tasks or checkpoint.layers):
                i = waiting.pop()
                running[task.remote(checkpoint, i, config, basis)] = i
            ready, _ = ray.wait(list(running), num_returns=1, timeout=limit)
            if not ready:
                raise DeadlineError("a scoring task", "score", limit, "deadlines.score")
            found = get(ready[0], timeout=limit, actor="a scoring task", operation="score", knob="deadlines.score")
            write_shared_json(paths[running.pop(ready[0])], found)
    return [json.loads(path.read_text()) for path in paths]


# -- the actor


@contextmanager
def _quantiser(config: QuantizeConfig, work: Work, hardware: Hardware) -> Iterator[Any]:
    """Asks the actor, with a deadline: `ask(method, knob, seconds, *arguments)`."""
    import ray

    place: dict[str, Any] = {"num_gpus": 1} if hardware.device == "gpu" else {"num_cpus": 1}
    place["runtime_env"] = {"env_vars": compute_environment(config.threads)}
    actor: Any = ray.remote(**place)(Quantiser).remote(work)

    def ask(method: str, knob: str, seconds: float, *arguments: Any) -> Any:
        return get(getattr(actor, method).remote(*arguments), timeout=seconds, actor="the quantiser", operation=method, knob=knob)

    try:
        ask("start", "deadlines.start", config.deadlines.start)
        yield ask
    finally:
        ray.kill(actor)


def _layers(config: QuantizeConfig, session: Session, bits: Sequence[int], ask: Any, progress: dict[str, Any]) -> None:
    """One line of metrics a layer; those of finished layers are written again."""
    done = ask("records", "deadlines.checkpoint", config.deadlines.checkpoint)
    if done:
        log.info("resumed: %d of %d layers are finished", len(done), len(bits))
    shown, records = Progress(len(bits)), list[dict[str, Any]]()
    with MetricsWriter(session.folder, session.job, session.folder.name) as metrics:
        for i in range(len(bits)):
            fresh = i >= len(done)
            began = time.monotonic()
            record = ask("layer", "deadlines.train", config.deadlines.train, i) if fresh else done[i]
            seconds = record.get("seconds", time.monotonic() - began)
            line = {"step": i, "version": 0, "layer_bits": bits[i]} | {key: value for key, value in record.items() if key != "seconds"}
            line["loss"] = record.get("error_after", record.get("weight_error"))
            line["seconds"] = {"quantise": seconds, "total": seconds}
            metrics.write(line)
            progress["step"] = i + 1
            if fresh:
                session.ledger.committed = session.ledger.step + i + 1  # a restart has something to go on from
                shown.show(line)
            records.append(record)
    if told := scarcity(records):
        log.warning(told)


def scarcity(records: Sequence[Mapping[str, Any]]) -> str | None:
    """What a person should know of experts that few calibration tokens reached, by what `Pipeline.layer` told; None: there are none."""
    experts, scarce, rounded = (sum(one.get(key, 0) for one in records) for key in ("experts", "experts_scarce", "experts_rounded"))
    if not scarce:
        return None
    return (
        f"{scarce} of {experts} experts have fewer calibration tokens than inputs and are held closer to rounding (gptq.expert_damp), "
        f"{rounded} of them have none and are rounded to nearest; more calibration.samples would reach them"
    )


def _evaluate(config: QuantizeConfig, session: Session, ask: Any, told: Mapping[str, Any]) -> None:
    """Perplexity of the model before and after, with the sizes of both files; what is on record is not measured again."""
    path = session.folder / "evaluation.jsonl"
    known = {record["label"] for _, record in read_json_lines(path)}
    for label, sizes in told["models"].items():
        if label in known:
            continue
        measures = dict(sizes)
        if config.evaluation is not None:
            measures = ask("perplexity", "deadlines.train", config.deadlines.train, label) | measures
        append_json(path, {"step": 0, "label": label, "mean": 0.0, "domains": {}, "measures": measures})
        log.info("%s: %s", label, "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measures.items()))


def _status(session: Session, progress: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"run": session.folder.name, "submission_id": session.submission_id, "waits": waits(), "trainers": ["quantiser"]}
    return facts | dict(progress)
