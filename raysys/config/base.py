"""Frozen, typed run configs: YAML plus `key=value`, one clear error, identity apart from placement.

Imports neither torch nor ray nor vllm, so a config can be checked anywhere in a fraction of a second.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from raysys.errors import ConfigError

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", re.ASCII)
"""What YAML 1.1 reads as text and people mean as a number: 1e-3."""


def placed(default: Any = ..., **kwargs: Any) -> Any:
    """A field that says where or how fast the run goes, not what is learned: a resume may change it."""
    return Field(default, json_schema_extra={"placement": True}, **kwargs)


class Config(BaseModel):
    """Base of every config: immutable, unknown keys refused, no silent conversion of text or true and false to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic alone would take true for 1, "12" for 12 and "no" for false."""
        _check_kind(value, cls.model_fields[info.field_name or ""].annotation)
        return value

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """The config of a YAML file with `key=value` overrides on top (nested keys with dots).

        A file may start from another with the key `base: other.yaml` (relative to itself).

        Raises:
            ConfigError: missing file, bad YAML, unknown key (with the nearest right one), wrong type, impossible combination.
        """
        values = read_yaml(Path(path)) if path is not None else {}
        for override in overrides:
            set_key(values, override)
        return cls.parse(values, source=str(path or "command line"))

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """Validates plain values. See `load` for the errors."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, issue) for issue in error.errors()) + f" [in {source}]") from None

    def identity(self) -> dict[str, Any]:
        """Flat `{dotted key: value}` of everything that decides what is learned."""
        return dict(_flat(self, "", identity_only=True))

    def fingerprint(self) -> str:
        """Hash of `identity()`; equal for two runs that learn the same thing."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, with its `base:` file underneath. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist", "check --config")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(values).__name__}")
    base = values.pop("base", None)
    return values if base is None else merge(read_yaml(path.parent / base), values)


def merge(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, mappings merged key by key."""
    result = dict(under)
    for key, value in over.items():
        known = result.get(key)
        result[key] = merge(known, value) if isinstance(known, dict) and isinstance(value, Mapping) else value
    return result


def set_key(values: dict[str, Any], override: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML (`null`, numbers, lists work)."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{override}' is not key=value", "write e.g. steps=20 or rollout.workers=2")
    try:
        value = _scalar(text)
    except yaml.YAMLError:
        value = text
    inner, last = parent_of(values, key)
    inner[last] = value


def parent_of(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds the nested `key`, made where there is none (or null) yet, and the key's last part."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    return values, last


def _scalar(text: str) -> Any:
    # YAML 1.1 reads 1e-3 as text; people mean a number, unless they quote it.
    return float(text) if _EXPONENT.fullmatch(text.strip()) else yaml.safe_load(text)


def _check_kind(value: Any, annotation: Any) -> None:
    """Raises ValueError for text where a number or true and false are wanted, and for those where a number is; in lists and maps too."""
    kinds = set(_kinds(annotation))
    plain = kinds & {int, float, bool}
    wanted = "integer" if int in plain else "number" if float in plain else "boolean"
    if isinstance(value, bool) and plain and bool not in plain:
        raise ValueError(f"Input should be a valid {wanted}")
    if isinstance(value, str) and plain and str not in kinds and not (float in plain and _EXPONENT.fullmatch(value)):
        raise ValueError(f"Input should be a valid {wanted}, not text")
    if isinstance(value, (list, tuple, dict)):
        for parts in (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                _check_kind(part, parts[-1])


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a field takes, without their bounds."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _kinds(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from _kinds(part)
    elif origin is typing.Literal:
        yield from map(type, parts)
    else:
        yield annotation


def _explain(cls: type[BaseModel], issue: Any) -> str:
    key = ".".join(str(part) for part in issue["loc"]) or "config"
    if issue["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, _all_keys(cls), n=1, cutoff=0.5)
        hint = f", did you mean '{nearest[0]}'?" if nearest else ""
        return f"unknown key '{key}'{hint}"
    message = issue["msg"].removeprefix("Value error, ")
    shown = issue.get("input")
    return f"{key}: {message}" + (f", got {shown!r}" if isinstance(shown, (str, int, float, bool, type(None))) and key != "config" else "")


def _all_keys(cls: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in cls.model_fields.items():
        keys.append(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _all_keys(kind, f"{prefix}{name}.")
    return keys


def _flat(config: BaseModel, prefix: str, identity_only: bool):
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if identity_only and isinstance(extra, dict) and extra.get("placement"):
            continue
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.", identity_only)
        elif isinstance(value, dict):
            for key, entry in sorted(value.items()):
                plain = entry.model_dump(mode="json") if isinstance(entry, BaseModel) else entry
                yield f"{prefix}{name}.{key}", plain
        else:
            yield prefix + name, value
