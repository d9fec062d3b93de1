"""What can be known of data and tokenizers before any actor starts. Plain Python and pyarrow; Ray is not up yet."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raysys.config.parts import Data
from raysys.data.procedural import check_source
from raysys.data.sources import BadRows, Encoding, is_parquet
from raysys.data.text import load_tokenizer
from raysys.errors import ConfigError

SCANNED = 20_000
"""Rows of a file that are looked at before the start; the others are judged as they come."""


def preflight(data: Data, tokenizer: str | None, *, max_prompt_tokens: int, max_response_tokens: int, domains: set[str] | None) -> None:
    """Checks a run's data.

    Args:
        tokenizer: folder or id of the student; None: it is made by the run, prompt lengths are not checked.
        domains: tags that have a teacher (`default` among them serves rows without a tag); None: any tag will do.

    Raises:
        ConfigError: missing or empty data set, unknown task, domain without a teacher, prompt and response longer than the model's context.
        DataError: too large a share of bad rows, named by file and line.
    """
    if tokenizer is not None:
        check_context(tokenizer, max_prompt_tokens + max_response_tokens)
    if data.source is not None:
        check_source(data.source)
        for name in data.source.domains:
            _check_domain(name, f"data.source.domains.{name}", domains)
        return
    encoding = None if tokenizer is None else Encoding(tokenizer, data, max_prompt_tokens, max_response_tokens, supervised=False)
    bad, ids = BadRows(), {}
    for where, raw in itertools.islice(read_plain(data.path or ""), SCANNED):
        values, problem = _parse(raw)
        if values is not None and not problem and encoding is not None:
            problem = encoding.encode(values)["problem"]
        if problem or values is None:
            bad.add(where, problem)
            continue
        bad.good += 1
        _check_domain(str(values.get("domain") or ""), where, domains)
        identity = values.get("id")
        if identity is not None and ids.setdefault(identity, where) != where:
            raise ConfigError(f"{where}: id {identity!r} is used before, at {ids[identity]}", "ids must be unique; leave them out to have them made")
    if not bad.good:
        raise ConfigError(f"data.path={data.path} has no usable row: {'; '.join(bad.examples) or 'it is empty'}", "check the file")
    bad.check(data.max_bad_share, least=1)


def _parse(raw: Any) -> tuple[dict[str, Any] | None, str]:
    if not isinstance(raw, str):
        return raw, ""
    try:
        values = json.loads(raw)
    except json.JSONDecodeError as error:
        return None, f"invalid JSON: {error.msg} at column {error.colno}"
    return (values, "") if isinstance(values, dict) else (None, f"not an object: {type(values).__name__}")


def _check_domain(tag: str, where: str, domains: set[str] | None) -> None:
    if domains is None or tag in domains or (not tag and "default" in domains):
        return
    what = f"domain '{tag}' has no teacher" if tag else "the row has no domain and there is no default teacher"
    raise ConfigError(f"{where}: {what}", f"teachers has: {', '.join(sorted(domains))}; add teachers.{tag or 'default'}")


def read_plain(path: str) -> Iterator[tuple[str, Any]]:
    """(`file:line`, raw row) of a JSONL or Parquet path; remote ones through pyarrow's file systems. Raises ConfigError when nothing is there."""
    import pyarrow.fs as filesystems
    import pyarrow.parquet as parquet

    if "://" in path:
        try:
            system, inner = filesystems.FileSystem.from_uri(path)
            infos = system.get_file_info(filesystems.FileSelector(inner)) if system.get_file_info(inner).type == filesystems.FileType.Directory else [system.get_file_info(inner)]
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.path={path} cannot be reached: {error}") from None
        files = [info.path for info in infos if info.type == filesystems.FileType.File]
    else:
        system = filesystems.LocalFileSystem()
        found = [str(entry) for entry in Path(path).iterdir()] if Path(path).is_dir() else glob.glob(path)
        files = [name for name in found if Path(name).is_file()]
    if not files:
        raise ConfigError(f"data.path={path} does not exist", "check data.path")
    for name in sorted(files):
        if is_parquet(name):
            number = itertools.count(1)
            with system.open_input_file(name) as file:
                for batch in parquet.ParquetFile(file).iter_batches():
                    yield from ((f"{name}:{next(number)}", row) for row in batch.to_pylist())
        else:
            with system.open_input_stream(name) as stream:
                for number, line in enumerate(_lines(stream), 1):
                    yield f"{name}:{number}", line


def _lines(stream: Any) -> Iterator[str]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", errors="replace")


def check_context(folder: str, tokens: int) -> None:
    """Raises ConfigError when prompt and response together exceed what the model was built for."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    limit = json.loads(path.read_text()).get("max_position_embeddings")
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"max_prompt_tokens + max_response_tokens = {tokens} exceeds the context of {folder}, which is {limit}", "lower one of the two keys"
        )


def check_vocabularies(folders: Mapping[str, str]) -> None:
    """Student, teachers and reference must share token ids: log-probs of ids mean nothing otherwise.

    Raises:
        ConfigError: a tokenizer is missing, or two differ; names the first id whose texts differ.
    """
    labels = list(folders)
    first = _vocabulary(folders[labels[0]])
    for label in labels[1:]:
        other = _vocabulary(folders[label])
        for token in sorted(first.keys() | other.keys()):
            if first.get(token) != other.get(token):
                raise ConfigError(
                    f"{labels[0]} and {label} have different vocabularies: id {token} is {first.get(token)!r} and {other.get(token)!r}",
                    "all models of a run must share a tokenizer",
                )


def _vocabulary(folder: str) -> dict[int, str]:
    if "/" in folder and Path(folder).is_absolute() and not Path(folder).is_dir():
        raise ConfigError(f"model folder {folder} does not exist")
    return {index: token for token, index in load_tokenizer(folder).get_vocab().items()}
