"""A search agent's data as files: questions to train and to test on, the corpus, and transcripts to warm a model up with."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raysys.config.agents import QuestionFiles, QuestionsConfig
from raysys.data.questions import INSTRUCTION, Passage, Question, corpus_of, prompt_rows, read_questions, write_corpus
from raysys.data.world import KINDS, World, build_world, transcripts, words_of
from raysys.errors import DataError
from raysys.files import write_json, writing


def write_questions(config: QuestionsConfig, folder: Path, search: Callable[[Path], Callable[[str], Sequence[Passage]]]) -> dict[str, int]:
    """Writes `train.jsonl`, `test.jsonl`, `corpus.jsonl` and, of a world, `words.json` and what there is of `transcripts.jsonl`.

    Args:
        search: of a corpus file, the function from a query to what is found; transcripts show that.

    Returns:
        Lines of each.

    Raises:
        ConfigError, DataError: see `build_world`, `read_questions` and `write_corpus`; a question with an id used before.
    """
    instruction = INSTRUCTION if config.instruction is None else config.instruction
    world = world_of(config)
    if world is not None:
        counts = {"corpus.jsonl": write_corpus(folder / "corpus.jsonl", world.documents)}
    else:
        assert config.files is not None
        counts = {"corpus.jsonl": write_corpus(folder / "corpus.jsonl", corpus_of(_read(config.files, "train", "test")))}
    for side in ("train", "test"):
        rows = prompt_rows(_questions(world, config.files, side), instruction, config.messages)
        counts[f"{side}.jsonl"] = _write(folder / f"{side}.jsonl", rows)
    if world is not None:
        write_json(folder / "words.json", words_of(world))
    if world is not None and config.transcripts:
        find = search(folder / "corpus.jsonl")
        told = (instruction, config.opener, config.topk, config.messages)
        made = transcripts(world, config.seed, config.transcripts, *told, find=find, exchanged=config.exchanged)
        numbered = ({**row, "id": f"{row['id']}#{number}"} for number, row in enumerate(made))
        counts["transcripts.jsonl"] = _write(folder / "transcripts.jsonl", numbered)
    return counts


def world_of(config: QuestionsConfig) -> World | None:
    """The generated world that is asked for, None where it is question files. Raises ConfigError: see `build_world`."""
    part = config.world
    return None if part is None else build_world(config.seed, part.documents, part.questions, part.style, part.kinds or KINDS)


def _questions(world: World | None, files: QuestionFiles | None, side: str) -> Iterable[Question]:
    if world is not None:
        return world.train if side == "train" else world.test
    assert files is not None
    return _once(_read(files, side))


def _read(files: QuestionFiles, *sides: str) -> Iterator[Question]:
    paths = itertools.chain.from_iterable(getattr(files, side) for side in sides)
    return itertools.chain.from_iterable(read_questions(path, files.kind) for path in paths)


def _once(questions: Iterator[Question]) -> Iterator[Question]:
    seen: set[str] = set()
    for one in questions:
        if one.id in seen:
            raise DataError(
                f"the question id '{one.id}' is used twice", "ids must be unique among the files of train, and among those of test"
            )
        seen.add(one.id)
        yield one


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    draft, count = path.with_name(f".{path.name}.draft"), 0
    try:
        with writing(path), open(draft, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return count
