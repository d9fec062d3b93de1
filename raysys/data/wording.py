"""How a generated world is told, asked about and thought about, in either style."""

from __future__ import annotations

from raysys.data.geography import WITH_ARTICLE, City, Country, folded
from raysys.data.questions import Passage

DOCUMENT_CHARS, QUESTION_CHARS = 80, 60
"""What `short` stays below."""


class Prose:
    """How things are told to a language model."""

    @staticmethod
    def fits(document: Passage) -> bool:
        return True

    @staticmethod
    def name(name: str) -> str:
        return name

    @staticmethod
    def called(name: str) -> str:
        """The name within a sentence."""
        return f"the {name}" if name in WITH_ARTICLE else name

    @staticmethod
    def country(one: Country, neighbours: list[str]) -> str:
        borders = f"It shares land borders with {_joined(neighbours)}." if neighbours else "No other country borders it by land."
        if len(neighbours) == 1:
            borders = f"The only country that it borders by land is {neighbours[0]}."
        return (
            f"{'The ' if one.name in WITH_ARTICLE else ''}{one.name} belongs to {one.continent}. "
            f"About {one.population:,} people live on its {one.area:,} square kilometres. "
            f"Its capital is {one.capital}. People there pay with the {one.currency}, whose code is {one.currency_code}. {borders}"
        )

    @staticmethod
    def city(one: City, country: str) -> str:
        north = f"{abs(one.latitude):.1f} degrees {'north' if one.latitude >= 0 else 'south'}"
        east = f"{abs(one.longitude):.1f} degrees {'east' if one.longitude >= 0 else 'west'}"
        return f"{one.name} is a city in {country}. It has about {one.population:,} inhabitants and lies at {north} and {east}."

    asks = {
        "currency": "What is the currency of the country in which {} lies?",
        "capital": "What is the capital of the country in which {} lies?",
        "continent": "On which continent is the country in which {} lies?",
        "neighbour": "Which is the only country that borders the country in which {} lies?",
        "beyond": "What is the capital of the only country that borders {}?",
        "border": "What is the capital of the country that borders {} and whose currency is the {}?",
        "larger": "Which city has more inhabitants, {} or {}?",
    }
    sought = {
        "currency": ("{}", "currency of {}"),
        "capital": ("{}", "capital of {}"),
        "continent": ("{}", "continent to which {} belongs"),
        "neighbour": ("{}", "land borders of {}"),
        "beyond": ("land borders of {}", "capital of {}"),
        "border": ("land borders of {}", "capital of {}"),
    }
    told = dict.fromkeys(asks, "")
    pad = " "
    thoughts = {
        "city": ("First I look up in which country {first} lies.", "{first} lies in {second}. I read on there.", "So it is {answer}."),
        "country": ("First I look up the neighbours of {first}.", "{second} may be it. I read on there.", "So it is {answer}."),
        "larger": ("I look up both cities, {first} first.", "I know about {first}. Next is {second}.", "The larger one is {answer}."),
    }


class Short:
    """How things are told to a tiny model."""

    frame = frozenset(["Capital", "Money", "Continent", "City", "People", "Only", "Find", "Now", "Larger", "Doc", "Title"])
    """Capitalised words that are no names."""

    @staticmethod
    def fits(document: Passage) -> bool:
        contents = f'"{document.title}"\n{document.body}'
        return contents.isascii() and len(contents) < DOCUMENT_CHARS

    @staticmethod
    def name(name: str) -> str:
        return folded(name)

    @staticmethod
    def called(name: str) -> str:
        return name

    @staticmethod
    def country(one: Country, neighbours: list[str]) -> str:
        only = f" Only border: {neighbours[0]}." if len(neighbours) == 1 else ""
        return f"Capital {one.capital}. Money {one.currency}. Continent {one.continent}.{only}"

    @staticmethod
    def city(one: City, country: str) -> str:
        return f"City in {country}. People {one.population}."

    asks = {
        "currency": "Money of the country of {}?",
        "capital": "Capital of the country of {}?",
        "continent": "Continent of the country of {}?",
        "neighbour": "Only neighbour of the country of {}?",
        "beyond": "Capital of the only neighbour of {}?",
        "larger": "Larger: {} or {}?",
    }
    sought = {
        "currency": ("{}", "money {}"),
        "capital": ("{}", "capital {}"),
        "continent": ("{}", "continent {}"),
        "neighbour": ("{}", "border {}"),
        "beyond": ("border {}", "capital {}"),
    }
    told = {
        "currency": "Money",
        "capital": "Capital",
        "continent": "Continent",
        "neighbour": "Only border:",
        "beyond": "Capital",
        "larger": "Larger:",
    }
    """What a document says before the answer. Thought of first, it makes the answer something to be read off."""
    pad = ""
    thoughts = {
        "city": ("Find {first}.", "{first} is in {second}.", "{told} {answer}."),
        "country": ("Find {first}.", "{first} borders {second}.", "{told} {answer}."),
        "larger": ("Find {first}.", "Now {second}.", "{told} {answer}."),
    }


WORDINGS: dict[str, type[Prose | Short]] = {"prose": Prose, "short": Short}


def _joined(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
