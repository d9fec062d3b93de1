"""Documents on their way in: what text must be, what is corrected in silence, and the account of what was left out."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raysys.data.rows import BadRow, BadRows

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_RETURN = re.compile("\r\n?")
_BINARY_SHARE = 0.01
"""Control characters among the others from which on this is no text."""


def clean(raw: bytes | str, last: bool = True) -> str:
    """The text of a document: valid Unicode in normal form C, line ends as `\\n`, no control characters but these and tabs, nothing
    white at its end. May be empty. `last=False`: more of the document follows elsewhere, so what is white at the end is inside of it.

    Raises:
        BadRow: not UTF-8, half surrogate pairs, or so many control characters that it is no text.
    """
    text = _decoded(raw)
    if "\r" in text:
        text = _RETURN.sub("\n", text)
    plain, removed = _CONTROL.subn("", text)
    if removed > 1 and removed > _BINARY_SHARE * len(text):
        raise BadRow(f"binary: {removed} of {len(text)} characters are control characters")
    text = unicodedata.normalize("NFC", plain)
    return text.rstrip() if last else text


def _decoded(raw: bytes | str) -> str:
    try:
        if isinstance(raw, bytes):
            return raw.decode("utf-8")
        raw.encode("utf-8")
        return raw
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise BadRow(f"not valid Unicode: half a surrogate pair at character {error.start}") from None


@dataclass
class Account:
    """What became of documents. Bad ones could not be read and are limited; dropped ones were left out on purpose."""

    bad: BadRows
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def new(cls, max_bad_share: float = 1.0) -> Account:
        return cls(BadRows(max_bad_share, key="data.max_bad_share"))

    def text(self, raw: bytes | str | BadRow, where: str, min_characters: int, last: bool = True) -> str | None:
        """The cleaned document, None where there is none to keep."""
        try:
            if isinstance(raw, BadRow):
                raise raw
            text = clean(raw, last)
        except BadRow as reason:
            self.bad.add(where, str(reason))
            return None
        self.bad.good()
        if len(text) < max(1, min_characters):
            self.dropped["shorter than min_characters" if text else "empty"] += 1
            return None
        self.kept += 1
        return text

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept, "dropped": dict(self.dropped), "bad": self.bad.state()}

    def add(self, state: Mapping[str, Any]) -> None:
        """Counts what another account (its `state`) has counted."""
        self.kept += state["kept"]
        self.dropped.update(state["dropped"])
        self.bad.absorb(state["bad"])

    def lines(self) -> list[str]:
        """For people; nothing when every document was kept."""
        left = [f"{count} documents were left out: {reason}" for reason, count in self.dropped.most_common()]
        return [*left, *self.bad.lines()]
