"""Raw rounds -> one number a contestant."""

from __future__ import annotations

from statistics import median
from typing import Any

FIELDS = ("wall", "cpu", "cores", "memory", "anonymous", "peak", "setup", "others")


def medians(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contestant -> medians over the rounds that count; with none, ``status`` says why."""
    found: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(r["contestant"] for r in records):
        mine = [r for r in records if r["contestant"] == label]
        good = [r for r in mine if r.get("counts")]
        if good:
            found[label] = {name: median(r[name] for r in good) for name in FIELDS}
            found[label] |= {"status": "ok", "rounds": len(good), "rejected": len(mine) - len(good)}
            if "batch" in good[0]:
                found[label]["batch"] = good[0]["batch"]
            found[label] |= {"version": good[0].get("version")}
        else:
            ran = any(r["status"] == "ok" for r in mine)
            found[label] = {"status": "no quiet round" if ran else mine[-1]["status"], "rejected": len(mine)}
    return found


def speed(found: dict[str, dict[str, Any]], label: str) -> float | None:
    """Rows a second, or None."""
    one = found.get(label, {})
    return one["batch"] / one["wall"] if one.get("status") == "ok" else None
