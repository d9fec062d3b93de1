"""Rows of JSONL and Parquet files, streamed by Ray Data in a fixed order.

Ray tasks read, parse, template and encode; the reader names each bad row by file and line. Any path that pyarrow's
file systems know will do: local, s3://, gs://, hf://; a file, a folder or a glob.
"""

from __future__ import annotations

import glob
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.config.parts import Data
from raysys.data.text import encode_answers, load_tokenizer, render
from raysys.errors import DataError

SHUFFLE_WINDOW = 65_536
"""Rows held to shuffle an epoch; a data set smaller than this is shuffled completely."""
_OUTPUT = ("id", "domain", "prompt_ids", "teacher_prompt_ids", "answer", "verifier", "metadata", "response_ids", "problem")


@dataclass
class BadRows:
    """Counts of what could not be used, with the first few by name."""

    good: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        self.bad += 1
        self.reasons[why.partition(":")[0]] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {why}")

    def check(self, share: float, least: int = 100) -> None:
        """Raises DataError when more than `share` of at least `least` rows were bad."""
        seen = self.good + self.bad
        if seen >= least and self.bad > share * seen:
            raise DataError(f"{self.bad} of {seen} rows are unusable: {'; '.join(self.examples)}", "mend the file, or raise data.max_bad_share")

    def lines(self) -> list[str]:
        """What a person should know of it; empty when all was well."""
        if not self.bad:
            return []
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return [f"data: {self.bad} of {self.good + self.bad} rows left out ({reasons}); first: {'; '.join(self.examples)}"]


@dataclass(frozen=True)
class Encoding:
    """How text rows become token rows. Travels to Ray's tasks."""

    tokenizer: str
    data: Data
    max_prompt_tokens: int
    max_response_tokens: int
    supervised: bool

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Ray Data batch of raw rows to encoded rows; a row that cannot be used carries its `problem`."""
        raws = batch["text"] if "text" in batch else _records(batch)
        rows = [self.encode(raw) for raw in raws]
        return {"path": [str(path) for path in batch["path"]]} | {name: [row[name] for row in rows] for name in _OUTPUT}

    def encode(self, raw: str | Mapping[str, Any]) -> dict[str, Any]:
        """One row; never raises for what the row holds."""
        row: dict[str, Any] = {name: "" for name in _OUTPUT} | {"prompt_ids": [], "teacher_prompt_ids": [], "response_ids": []}
        try:
            values = json.loads(raw) if isinstance(raw, str) else dict(raw)
        except json.JSONDecodeError as error:
            return row | {"problem": f"invalid JSON: {error.msg} at column {error.colno}"}
        problem = _shape_problem(values, self.supervised)
        if problem:
            return row | {"problem": problem}
        tokenizer = load_tokenizer(self.tokenizer)
        try:
            row["prompt_ids"] = render(tokenizer, values["prompt"], self.data.enable_thinking)
            if self.data.context_field is not None:
                row["teacher_prompt_ids"] = render(tokenizer, self._with_context(values), self.data.enable_thinking)
        except (ValueError, TypeError, KeyError) as error:
            return row | {"problem": f"prompt cannot be rendered: {error}"}
        answer = values.get("answer")
        row |= {name: str(values[name]) for name in ("id", "domain", "verifier") if values.get(name) is not None}
        row["answer"] = "" if answer is None else str(answer)
        row["verifier"] = row["verifier"] or (self.data.default_verifier if answer is not None else "")
        metadata = values.get("metadata")
        row["metadata"] = metadata if isinstance(metadata, str) else json.dumps(metadata) if metadata is not None else ""
        if self.supervised:
            row["response_ids"] = encode_answers(tokenizer, [row["answer"]])[0]
        return row | {"problem": self._length_problem(row)}

    def _length_problem(self, row: Mapping[str, Any]) -> str:
        if not len(row["prompt_ids"]):
            return "empty prompt"
        if len(row["prompt_ids"]) > self.max_prompt_tokens:
            return f"prompt too long: {len(row['prompt_ids'])} tokens, max_prompt_tokens is {self.max_prompt_tokens}"
        if len(row["response_ids"]) > self.max_response_tokens:
            return f"answer too long: {len(row['response_ids'])} tokens, max_response_tokens is {self.max_response_tokens}"
        return ""

    def _with_context(self, values: Mapping[str, Any]) -> Any:
        """The prompt as the teacher reads it: its last user turn with the context put in."""
        context, prompt = values[self.data.context_field or ""], values["prompt"]
        template = self.data.context_template
        if isinstance(prompt, str):
            return template.replace("{context}", str(context)).replace("{prompt}", prompt)
        messages = [dict(message) for message in prompt]
        last = max(i for i, message in enumerate(messages) if message.get("role") == "user")
        messages[last]["content"] = template.replace("{context}", str(context)).replace("{prompt}", messages[last]["content"])
        return messages


def _records(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in batch if name != "path"]
    return [{name: _plain(batch[name][i]) for name in names} for i in range(len(batch["path"]))]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _shape_problem(values: Any, supervised: bool) -> str:
    if not isinstance(values, Mapping):
        return f"not an object: {type(values).__name__}"
    prompt = values.get("prompt")
    if prompt is None:
        return "no prompt"
    messages = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    well_formed = messages and all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in prompt)
    if not isinstance(prompt, str) and not well_formed:
        return f"prompt is neither text nor chat messages: {type(prompt).__name__}"
    if supervised and values.get("answer") is None:
        return "no answer"
    return ""


class FileRows:
    """Encoded rows of a file source, epoch by epoch, in an order that depends on (seed, epoch) only."""

    def __init__(self, encoding: Encoding, seed: int):
        self._encoding, self._seed = encoding, seed
        self.bad = BadRows()

    def epoch(self, number: int) -> Iterator[dict[str, Any]]:
        """Good rows of one pass; each has `row_id`. Raises DataError when there is none or too many are bad."""
        rows = self._read()
        if self._encoding.data.shuffle:
            rows = shuffled(rows, random.Random(f"{self._seed}/{number}"), SHUFFLE_WINDOW)
        empty = True
        for row in rows:
            empty = False
            yield row
        self.bad.check(self._encoding.data.max_bad_share, least=1)
        if empty:
            raise DataError(f"data.path={self._encoding.data.path} has no usable row: {'; '.join(self.bad.examples) or 'it is empty'}")

    def _read(self) -> Iterator[dict[str, Any]]:
        counters: Counter[str] = Counter()
        bad = BadRows()
        if not self.bad.good + self.bad.bad:  # the first pass counts; later ones see the same rows
            self.bad = bad
        for batch in self._dataset().iter_batches(batch_size=1024, batch_format="pyarrow"):
            for row in batch.to_pylist():
                counters[row["path"]] += 1
                where = f"{row['path']}:{counters[row['path']]}"
                if row["problem"]:
                    bad.add(where, row["problem"])
                    bad.check(self._encoding.data.max_bad_share)
                    continue
                bad.good += 1
                yield row | {"row_id": row["id"] or f"{row['path'].rpartition('/')[2]}:{counters[row['path']]}"}

    def _dataset(self) -> Any:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        path = self._encoding.data.path or ""
        more: dict[str, Any] = {"include_paths": True, "override_num_blocks": _blocks(path)}
        if is_parquet(path):
            raw = ray.data.read_parquet(path, **more)
        else:  # as text: one bad line must not spoil its file
            raw = ray.data.read_text(path, drop_empty_lines=False, **more)
        return raw.map_batches(self._encoding, batch_size=1024, batch_format="numpy")


def _blocks(path: str) -> int | None:
    """Read tasks: one a 32 MiB of local files (Ray's own choice starts a process a task, dozens for a small file), Ray's choice elsewhere."""
    if "://" in path:
        return None
    found = [file for name in glob.glob(path) for file in (Path(name).iterdir() if Path(name).is_dir() else [Path(name)])]
    return max(1, sum(file.stat().st_size for file in found) >> 25)


def is_parquet(path: str) -> bool:
    """By its name, or for a local folder by what lies in it."""
    if path.endswith((".parquet", ".pq")):
        return True
    return "://" not in path and Path(path).is_dir() and any(Path(path).glob("*.parquet"))


def shuffled(rows: Iterator[Any], rng: random.Random, window: int) -> Iterator[Any]:
    """Rows in random order through a window: each step gives one of the held rows and takes the next in."""
    held: list[Any] = []
    for row in rows:
        if len(held) < window:
            held.append(row)
            continue
        at = rng.randrange(window)
        yield held[at]
        held[at] = row
    rng.shuffle(held)
    yield from held
