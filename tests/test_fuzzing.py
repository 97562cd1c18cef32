"""The harness for damaged files finds what it is there to find."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fuzzing import fuzz

from biosae.errors import InputError


def picky(path: str) -> None:
    """A reader that takes nothing but the file ``good`` as it was written."""
    if Path(path).read_bytes() != b"good file of 64 bytes".ljust(64):
        raise InputError("not good")


def careless(path: str) -> None:
    """A reader that crashes, hangs, runs out of memory or raises errors of its own on files that begin otherwise."""
    head = Path(path).read_bytes()[:1]
    if head == b"c":
        os.abort()
    if head == b"h":
        time.sleep(60)
    if head == b"m":
        bytearray(2**33)
    if head == b"e":
        raise ValueError("an error of its own")


def write(path: Path, text: bytes) -> Path:
    path.write_bytes(text.ljust(64))
    return path


def test_damaged_files_may_be_refused_and_healthy_ones_may_not(tmp_path: Path) -> None:
    good = write(tmp_path / "good.x", b"good file of 64 bytes")
    assert fuzz("test_fuzzing:picky", [good], tmp_path, n=20) == []
    bad = write(tmp_path / "bad.x", b"bad")
    (fault,) = fuzz("test_fuzzing:picky", [good, bad], tmp_path, n=20)
    assert fault == "01_healthy.x: healthy, but InputError: not good"


def test_crashes_hangs_memory_and_foreign_errors_are_faults(tmp_path: Path) -> None:
    seeds = [write(tmp_path / f"{head}.x", head.encode()) for head in "oceh"] + [write(tmp_path / "m.x", b"m")]
    found = fuzz("test_fuzzing:careless", seeds, tmp_path, n=0, seconds=2, memory=2**31)
    assert [fault[:2] for fault in found] == ["01", "02", "03", "04"]
    assert "the process ended with -6" in found[0] and found[1].endswith("ValueError: an error of its own")
    assert "the process ended with 1" in found[2] and "MemoryError" in found[3]
