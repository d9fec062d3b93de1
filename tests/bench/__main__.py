"""`python -m tests.bench NAME --json OUT [key=value ...]`: runs one bench, prints its table, writes figures and facts of the machine.

A bench is a module of this folder (`gopd-step` is `gopd_step.py`) with

    DEFAULTS: dict[str, value]                 what `key=value` may change
    run(**settings) -> dict                    figures, JSON-able
    table(figures) -> list[list]               header row first
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.bench.machine import facts

HERE = Path(__file__).parent


def names() -> list[str]:
    """Benches of this folder: the modules that have a `run`."""
    return sorted(path.stem.replace("_", "-") for path in HERE.glob("*.py") if "\ndef run(" in path.read_text())


def settings(module: ModuleType, pairs: list[str]) -> dict[str, Any]:
    """The bench's defaults with `key=value` applied. Raises SystemExit on an unknown key."""
    values = dict(module.DEFAULTS)
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in values:
            raise SystemExit(f"unknown setting '{key}'; there are {', '.join(sorted(values))}")
        values[key] = yaml.safe_load(text)
    return values


def render(rows: list[list[Any]]) -> str:
    """A table in plain text, numbers to four digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Benches: " + ", ".join(names()))
    parser.add_argument("name", choices=names())
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_intermixed_args(arguments)
    module = importlib.import_module(f"tests.bench.{options.name.replace('-', '_')}")
    chosen = settings(module, options.settings)
    figures = module.run(**chosen)
    print(render(module.table(figures)))
    if options.json:
        record = {"bench": options.name, "settings": chosen, "machine": facts(), "figures": figures}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
