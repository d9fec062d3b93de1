"""Everything about a run's models and data that can be known before any actor starts."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from raysys import search_agent
from raysys.config.agents import QuestionsConfig, SearchAgentConfig
from raysys.config.corpora import Corpus
from raysys.config.parallel import check_parallel
from raysys.config.parts import Data
from raysys.config.pretraining import LocalTextConfig, MoeModel, PretrainMoeConfig
from raysys.config.runs import EvaluateConfig, GenerateConfig, GopdConfig, HpdConfig, SftConfig
from raysys.data.corpus import plan_units
from raysys.data.preflight import check_context, check_vocabularies, preflight, shared_ids
from raysys.data.prepare import world_of
from raysys.data.text import identity, load_tokenizer
from raysys.errors import ConfigError, DataError
from raysys.evaluation.harness import check_harness
from raysys.job import RUNS_VARIABLE, lasting
from raysys.pretraining_points import Storage
from raysys.rollout.recorded import Replay
from raysys.scoring import verifiers

log = logging.getLogger("raysys")


def check_gopd(config: GopdConfig) -> None:
    """Everything about models and data that can be known without a cluster. Raises ConfigError or DataError."""
    student = local_or_id(config.student)
    frozen = {f"teachers.{tag}": local_or_id(folder) for tag, folder in config.teachers.items()}
    if config.reference is not None and config.reward_scale != 1:
        frozen["reference"] = local_or_id(config.reference)
    check_vocabularies({"student": student} | frozen)
    if config.rollout.record:
        recording(config.rollout.record, "rollout.record")
    if config.rollout.replay:
        Replay(recording(config.rollout.replay, "rollout.replay"))
    _check_data(config.data, student, config.max_prompt_tokens, config.max_response_tokens, set(config.teachers))
    if config.evaluation is not None:
        _check_data(config.evaluation.data, student, config.max_prompt_tokens, config.max_response_tokens, None)


def check_search_agent(config: SearchAgentConfig) -> None:
    """As `check_gopd`; the search service must answer, too."""
    student = local_or_id(config.student)
    check_vocabularies({"student": student})
    check_context(student, config.max_prompt_tokens, config.max_response_tokens)
    _check_data(config.data, student, config.max_prompt_tokens, config.max_response_tokens, None)
    if config.evaluation is not None:
        _check_data(config.evaluation.data, student, config.max_prompt_tokens, config.max_response_tokens, None)
    if config.search.corpus is not None and not Path(config.search.corpus).is_file():
        raise ConfigError(f"search.corpus={config.search.corpus} is no file", "check the path")
    if config.search.url is not None:
        asyncio.run(search_agent.reachable(search_agent.settings_of(config)))


def check_questions(config: QuestionsConfig) -> None:
    """Raises ConfigError: a question file is missing, or there is no such world."""
    world_of(config)
    for path in [*config.files.train, *config.files.test] if config.files else []:
        if not Path(path).is_file():
            raise ConfigError(f"question file {path} is no file", "check files.train and files.test")


def check_sft(config: SftConfig) -> None:
    """As `check_gopd`. A model that the run makes itself has nothing to check but its data."""
    student = local_or_id(config.student) if config.student else None
    words = config.new_model.words
    if student is None and words is not None and not Path(words).is_file():
        raise ConfigError(f"new_model.words={words} does not exist", "jobs/questions.py writes a words.json")
    _check_data(config.data, student, config.max_prompt_tokens, config.max_response_tokens, None, supervised=True)
    if config.evaluation is not None:
        _check_data(config.evaluation.data, student, config.max_prompt_tokens, config.max_response_tokens, None)


def check_hpd(config: HpdConfig) -> None:
    """As `check_gopd`."""
    student = local_or_id(config.student)
    folders = {"student": student} | {f"teachers.{tag}": local_or_id(folder) for tag, folder in config.teachers.items()}
    check_vocabularies(folders, shared_prefix=config.vocabulary == "shared_prefix")
    domains, shared = set(config.teachers) if config.loss != "sft" else None, shared_vocabulary(config)
    _check_data(config.data, student, config.max_prompt_tokens, config.max_response_tokens, domains, supervised=True, shared=shared)
    if config.evaluation is not None:
        _check_data(config.evaluation.data, student, config.max_prompt_tokens, config.max_response_tokens, None)


def check_local_text(config: LocalTextConfig) -> None:
    """Nothing that could be wrong."""


def check_pretrain_moe(config: PretrainMoeConfig) -> None:
    """Tokenizer, sources, where resume points go, and the folder that the run starts from; warns of what can run but hardly should.

    Raises:
        ConfigError, DataError: something of it cannot be used.
    """
    vocabulary = vocabulary_of(config)
    if config.storage is not None:
        Storage.of(Path("run"), config.storage).check()
    for label, source in found_here(config.data).sources.items():
        plan_units(source, label, config.data.unit_bytes, config.data.longest_row)
    for warning in filter(None, (sized(config).flat_router(), config.not_exported())):
        log.warning(warning)
    if config.start is None:
        return
    ids = sized(config).model.vocabulary or 0
    if ids < vocabulary:
        raise ConfigError(
            f"start={config.start} has {ids} token ids, the tokenizer {config.data.tokenizer} has {vocabulary}",
            "take the tokenizer that belongs to the model",
        )


def vocabulary_of(config: PretrainMoeConfig) -> int:
    """Rows of the embedding. Raises ConfigError for fewer than the tokenizer has tokens."""
    tokens, asked = len(load_tokenizer(local_or_id(config.data.tokenizer))), config.model.vocabulary
    if asked is not None and asked < tokens:
        raise ConfigError(
            f"model.vocabulary={asked} is smaller than the tokenizer of {config.data.tokenizer}, which has {tokens} tokens",
            "raise it, leave it out, or take the tokenizer that belongs to the model",
        )
    return asked or tokens


def found_here(data: Corpus) -> Corpus:
    """With absolute paths for what is a file or folder here: tasks and workers have other working directories."""
    sources = {
        label: source if "://" in source.path else source.model_copy(update={"path": _absolute(source.path)})
        for label, source in data.sources.items()
    }
    cache = data.cache if data.cache is None or "://" in data.cache else _absolute(data.cache)
    return data.model_copy(update={"sources": sources, "tokenizer": local_or_id(data.tokenizer), "cache": cache})


def _absolute(path: str) -> str:
    return str(here(path).absolute())


def here(path: str) -> Path:
    """The path as it is found here: `runs/...` is where this process's runs are kept."""
    parts = Path(path).parts
    return Path(os.environ[RUNS_VARIABLE], *parts[1:]) if parts[:1] == ("runs",) and os.environ.get(RUNS_VARIABLE) else Path(path)


def sized(config: PretrainMoeConfig) -> PretrainMoeConfig:
    """With `model` as it is in the folder that the run starts from, and no `start` any more.

    Raises:
        ConfigError: there is no such folder, it is no Qwen3-MoE model, or its experts cannot be split as asked.
    """
    if config.start is None:
        return config
    from raysys.models.moe_files import shape_of_moe

    folder = local_or_id(config.start)
    try:
        shape = shape_of_moe(Path(folder))
    except ConfigError as error:
        raise ConfigError(f"start={config.start}: {error.message}", error.remedy) from None
    check_parallel(config.trainer.zero_stage, config.trainer.expert_parallel, config.trainer.fewest, shape.experts)
    model = MoeModel(**{name: getattr(shape, name) for name in MoeModel.model_fields})
    return config.model_copy(update={"model": model, "start": None})


def shared_vocabulary(config: HpdConfig) -> int | None:
    """Ids that all models share, where the run goes by those."""
    if config.vocabulary == "same":
        return None
    return shared_ids([local_or_id(folder) for folder in (config.student, *config.teachers.values())])


def check_evaluate(config: EvaluateConfig) -> None:
    """As `check_gopd`."""
    if not config.models:
        raise ConfigError("models is empty", "name at least one checkpoint: models.student=FOLDER")
    models = {f"models.{label}": local_or_id(folder) for label, folder in config.models.items()}
    for label, folder in models.items():
        check_vocabularies({label: folder})
    if config.harness is not None:
        check_harness(config.harness)
    if config.evaluation is not None:
        _check_data(config.evaluation.data, next(iter(models.values())), config.max_prompt_tokens, config.max_response_tokens, None)


def check_generate(config: GenerateConfig) -> None:
    """As `check_gopd`. Teachers need not share a tokenizer: each reads its own rows, and the data say whose token ids they hold."""
    teachers = {f"teachers.{tag}": local_or_id(folder) for tag, folder in config.teachers.items()}
    for label, folder in teachers.items():
        check_vocabularies({label: folder})
        check_context(folder, config.max_prompt_tokens, config.max_response_tokens)

    def check_verifier(verifier: str) -> None:
        verifiers.check(verifier)
        if config.keep == "correct" and not verifier:
            raise DataError("keep=correct, but the row has nothing to judge its answers by", "give it an `answer`, or set keep=all")

    first = next(iter(teachers.values()))
    alike = len({identity(load_tokenizer(folder)) for folder in set(teachers.values())}) == 1
    preflight(
        config.data,
        first if alike else None,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        domains=set(config.teachers),
        check_verifier=check_verifier,
    )


def _check_data(
    data: Data,
    tokenizer: str | None,
    prompt: int,
    response: int,
    domains: set[str] | None,
    supervised: bool = False,
    shared: int | None = None,
) -> None:
    preflight(
        data,
        tokenizer,
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        domains=domains,
        supervised=supervised,
        shared=shared,
    )


def recording(folder: str, key: str) -> Path:
    """Where recorded samples lie, found as a run's own folder is. Raises ConfigError naming `key` where they would be lost."""
    return lasting(here(folder), key)


def local_or_id(folder: str) -> str:
    """An absolute path for a folder that is here (actors have other working directories), else the hub id as it is.

    `runs/...` is looked for where this process's runs are kept. Raises ConfigError for a path that leads nowhere.
    """
    path = here(folder)
    if path.exists():
        return str(path.absolute())
    if folder.startswith(("/", ".", "~", "runs/")):
        raise ConfigError(f"model folder {folder} does not exist", "`bash cluster/quickstart.sh` makes those of the example configs")
    return folder
