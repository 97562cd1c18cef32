"""Running a list of stages, each skipped when what determines it and what it wrote are unchanged."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biosae import __version__
from biosae.errors import FormatError
from biosae.files import hash_file, hash_json, read_json, write_json

LOG_COLUMNS = ("stage", "state", "seconds", "cpu_seconds", "peak_rss_mb")


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes
    ----------
    name
        Unique within the run; also the name of its record.
    inputs
        Everything that determines the outputs, as plain values (parameters, content hashes, keys of earlier stages).
    outputs
        Files, relative to the run folder, that exist when the stage is done. For a folder name the file written last.
    work
        Does the work.
    """

    name: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[], None]

    @property
    def key(self) -> str:
        """Hash of the inputs and of the package's version, which stands for the code."""
        return hash_json({"stage": self.name, "version": __version__, "inputs": self.inputs})


def state_of(stage: Stage, folder: Path) -> str:
    """``"done"``, or why the stage must run: it is new, its inputs changed, or an output is missing or changed."""
    record_path = _record_path(stage, folder)
    if not record_path.exists():
        return "new"
    try:
        record = read_json(record_path)
    except FormatError:
        return "record unreadable"
    if record.get("key") != stage.key:
        return "inputs changed"
    for name in stage.outputs:
        path = folder / name
        if not path.exists():
            return f"output missing: {name}"
        if record.get("outputs", {}).get(name) != hash_file(path):
            return f"output changed: {name}"
    return "done"


def run_stages(
    stages: Iterable[Stage], folder: Path, *, dry_run: bool = False, say: Callable[[str], None] = print
) -> dict[str, str]:
    """Run the stages in order; a stage whose record and outputs still hold is skipped.

    A stage's record is written after its outputs, so that a kill at any moment repeats at most one stage.

    Returns
    -------
    dict
        Stage name -> ``"skipped"``, ``"ran"``, or with ``dry_run`` the reason why it would run.
    """
    stages = list(stages)
    outcome: dict[str, str] = {}
    for i, stage in enumerate(stages, start=1):
        state = state_of(stage, folder)
        head = f"[{i}/{len(stages)}] {stage.name}"
        if state == "done":
            outcome[stage.name] = "skipped"
            say(f"{head}: unchanged, skipped")
            continue
        if dry_run:
            outcome[stage.name] = state
            say(f"{head}: would run ({state})")
            continue
        say(f"{head}: running ({state})")
        _record_path(stage, folder).unlink(missing_ok=True)
        reset_peak_memory()
        wall, cpu = time.perf_counter(), _cpu_seconds()
        stage.work()
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
        _log(folder / "log.csv", (stage.name, "ran", f"{wall:.2f}", f"{cpu:.2f}", f"{peak_memory_mb():.0f}"))
        outputs = {name: hash_file(folder / name) for name in stage.outputs}
        write_json(_record_path(stage, folder), {"key": stage.key, "outputs": outputs, "inputs": stage.inputs})
        outcome[stage.name] = "ran"
        say(f"{head}: done in {wall:.1f} s")
    return outcome


def _record_path(stage: Stage, folder: Path) -> Path:
    return folder / "stages" / (stage.name.replace("/", "__").replace(" ", "_") + ".json")


def _log(path: Path, row: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(LOG_COLUMNS)
        writer.writerow(row)


def _cpu_seconds() -> float:
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def reset_peak_memory() -> None:
    """Start a new peak-memory measurement where the system can (Linux); elsewhere it counts from process start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MiB since :func:`reset_peak_memory`, its workers not counted."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)
