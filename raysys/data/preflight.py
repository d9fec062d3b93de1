"""What can be known of data and tokenizers before any actor starts. Plain Python and pyarrow: Ray is not up yet."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from raysys.config.parts import Data
from raysys.data.files import open_files
from raysys.data.procedural import Mixture, check
from raysys.data.rows import BadRow, BadRows, Row
from raysys.data.sources import UnitReader
from raysys.data.stream import encoder_for
from raysys.data.text import Encoder, context_length, load_tokenizer
from raysys.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SCANNED = 100_000
"""Rows of a file that are looked at; the ones behind are judged as they come."""
TRIED = 64
"""Rows made of each procedural domain."""
_TOGETHER = 1024

Found = tuple[str, Row | BadRow]
"""Where a row is, and what it is."""


def preflight(
    data: Data,
    tokenizer: str | None,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int,
    domains: Collection[str] | None = None,
    supervised: bool = False,
    shared: int | None = None,
    check_verifier: Callable[[str], None] | None = None,
) -> BadRows:
    """Checks a run's data.

    Args:
        data: which source.
        tokenizer: Hugging Face folder or id; None where the run makes its own, then nothing is said about lengths.
        max_prompt_tokens, max_response_tokens: rows beyond are bad rows.
        domains: tags that have a teacher, `default` for rows without a tag; None: any tag will do.
        supervised: rows also need an answer.
        shared: rows with ids from here on are unusable; None: all ids will do.
        check_verifier: raises DataError for a verifier that it does not know.

    Returns:
        The unusable rows among those looked at, fewer than `data.max_bad_share`.

    Raises:
        ConfigError: data set missing or empty, no tokenizer, unknown task, a configured domain without a teacher, lengths beyond the
            model's context.
        DataError: too many unusable rows; a row with an unknown tag, with none where there is no default teacher, with an id used
            before, or with an unknown verifier. Each names the row.
    """
    if tokenizer is not None:
        check_context(tokenizer, max_prompt_tokens, max_response_tokens)
    encoder = None if tokenizer is None else encoder_for(data, tokenizer, max_prompt_tokens, max_response_tokens, supervised, shared)
    report = BadRows(data.max_bad_share)
    seen: dict[str, str] = {}
    foreign = 0
    verifiers: set[str] = set()
    for where, row in _encoded(_procedural(data, domains) if data.source is not None else _of_files(data), encoder):
        if isinstance(row, BadRow):
            report.add(where, str(row))
            continue
        report.good()
        foreign += supervised and encoder is not None and row.response_ids is not None and not encoder.takes(row)
        _check_tag(row, domains)
        if (first := seen.setdefault(row.id, row.where)) != row.where:
            raise DataError(
                f"{row.where}: id '{row.id}' is used before, at {first}", "ids must be unique; leave the column out to have them made"
            )
        if check_verifier is not None and row.verifier not in verifiers:
            _check_verifier(row, check_verifier)
            verifiers.add(row.verifier)
    report.check(complete=True)
    if foreign:
        log.warning("%d of %d rows have response_ids of another tokenizer than the run's: their text is encoded", foreign, report.seen)
    if report.seen == report.bad:
        named = "; ".join(report.examples[:5])
        raise ConfigError(f"data.path={data.path} has no usable row" + (f": {named}" if named else ", only blank lines"), "check data.path")
    return report


def _procedural(data: Data, domains: Collection[str] | None) -> Iterator[Found]:
    assert data.source is not None
    check(data.source)
    for domain, task in data.source.domains.items():
        if task.weight and domains is not None and domain not in domains:
            raise ConfigError(
                f"data.source.domains.{domain}: unknown domain tag '{domain}', there is no teacher for it",
                f"teachers has {', '.join(sorted(domains))}; add teachers.{domain} or drop the domain",
            )
    for stream in Mixture(data.source, 0, data.shuffle, data.context_field).streams.values():
        for _ in range(min(TRIED, data.source.size or TRIED)):
            row, _ = stream.next()
            yield row.where, row


def _of_files(data: Data) -> Iterator[Found]:
    files = open_files(data.path or "")
    reader = UnitReader(files, None, data)
    rows = itertools.chain.from_iterable(reader.parsed(unit) for unit in files.units)
    return ((where, row) for where, row in itertools.islice(rows, SCANNED) if row is not None)


def _encoded(found: Iterable[Found], encoder: Encoder | None) -> Iterator[Found]:
    """Rows that do not encode become bad rows; many at once, because that is what tokenizers are fast at."""
    if encoder is None:
        yield from found
        return
    found = iter(found)
    while together := list(itertools.islice(found, _TOGETHER)):
        results = iter(encoder.encode([row for _, row in together if isinstance(row, Row)]))
        for where, row in together:
            result = next(results) if isinstance(row, Row) else row
            yield where, result if isinstance(result, BadRow) else row


def _check_tag(row: Row, domains: Collection[str] | None) -> None:
    if domains is None or (row.domain or "default") in domains:
        return
    what = f"unknown domain tag '{row.domain}'" if row.domain else "no domain tag, and there is no default teacher"
    raise DataError(f"{row.where}: {what}", f"teachers has {', '.join(sorted(domains))}; add a teacher or correct the data")


def _check_verifier(row: Row, check_verifier: Callable[[str], None]) -> None:
    try:
        check_verifier(row.verifier)
    except DataError as error:
        raise DataError(f"{row.where}: {error.message}", error.remedy) from None


def check_context(folder: str, prompt: int, response: int) -> None:
    """Raises ConfigError: prompt and response do not fit the model's window together."""
    limit = context_length(folder)
    if limit is not None and prompt + response > limit:
        raise ConfigError(
            f"max_prompt_tokens={prompt} and max_response_tokens={response} together exceed the {limit} tokens that {folder} can hold",
            "lower one of them",
        )


def check_vocabularies(folders: Mapping[str, str], shared_prefix: bool | None = None) -> None:
    """Student, teachers and reference must mean the same by a token id. Ids without a token (padding of embeddings) do not count.

    Args:
        folders: what a model is called in the config ("student", "teachers.add") to its Hugging Face folder or id.
        shared_prefix: compare only ids that both have; None: the job has no such choice.

    Raises:
        ConfigError: a folder is missing or holds no model or no tokenizer; two vocabularies differ, with the first id that does.
    """
    first: tuple[str, dict[int, str]] | None = None
    known: dict[str, dict[int, str]] = {}
    for label, folder in folders.items():
        if folder not in known:
            known[folder] = _vocabulary(label, folder)
        if first is None:
            first = (label, known[folder])
        elif known[folder] is not first[1]:
            _compare(*first, label, known[folder], shared_prefix)


def _vocabulary(label: str, folder: str) -> dict[int, str]:
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{label}={folder} holds no config.json", "give a Hugging Face folder; an export may be unfinished")
    try:
        return {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
    except ConfigError as error:
        raise ConfigError(f"{label}: {error.message}", error.remedy) from None


def shared_ids(folders: Collection[str]) -> int:
    """How many ids, from 0 on, all these tokenizers have."""
    return 1 + min(max(_vocabulary(folder, folder)) for folder in folders)


def _compare(one: str, vocabulary: Mapping[int, str], other: str, theirs: Mapping[int, str], shared_prefix: bool | None) -> None:
    if shared_prefix:
        both = min(max(vocabulary), max(theirs)) + 1
        vocabulary, theirs = ({number: table[number] for number in table if number < both} for table in (vocabulary, theirs))
    if vocabulary == theirs:
        return
    number = min(number for number in vocabulary.keys() | theirs.keys() if vocabulary.get(number) != theirs.get(number))
    mine, its = (repr(table[number]) if number in table else "no token" for table in (vocabulary, theirs))
    raise ConfigError(
        f"{one} and {other} have different vocabularies: id {number} is {mine} in {one} and {its} in {other}",
        "all models of a run must share one tokenizer"
        + ("; vocabulary=shared_prefix allows that one has more ids behind the other's last" if shared_prefix is False else ""),
    )
