"""Results and the sections of pages that benchmarks write: whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def keep(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON."""
    _write(path, json.dumps(results, indent=1))


def insert(page: Path, name: str, text: str) -> None:
    """Put the text between ``<!-- name:begin -->`` and ``<!-- name:end -->``, at the end where there are none.

    Raises
    ------
    SystemExit
        If one marker stands without the other: what follows would be lost.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in old and end not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, found, rest = old.partition(begin)
    _inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page}: {begin} and {end} must both stand there, in this order")
    _write(page, f"{before}{begin}\n{text.strip()}\n{end}{after}")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
