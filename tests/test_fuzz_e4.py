"""Damaged E4 sessions, from the reader function to every item: a typed error or valid data."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import fuzz

import biosae as bs
from biosae.read.e4_files import STREAMS

ORDER = (*STREAMS, "IBI", "tags")


def _session(folder: Path, seconds: int = 40) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, stream in STREAMS.items():
        n, columns = int(seconds * stream.rate), len(stream.channels)
        values = rng.integers(-60, 60, (n, columns)) if name == "ACC" else rng.uniform(31, 39, (n, columns)).round(3)
        head = [",".join(["1600000000.000000"] * columns), ",".join([f"{stream.rate:.6f}"] * columns)]
        (folder / f"{name}.csv").write_text("\n".join([*head, *(",".join(map(str, v)) for v in values)]) + "\n")
    beats = "\n".join(f"{t:.6f},0.8" for t in np.arange(2, seconds, 0.8))
    (folder / "IBI.csv").write_text(f"1600000000.000000, IBI\n{beats}\n")
    (folder / "tags.csv").write_text("1600000005.0\n1600000009.5\n")
    return folder


def read(path: str) -> None:
    """All windows of a session, with states and without; a file ``*.read`` says that data were given."""
    bs.settings.progress = False
    table = pd.DataFrame({"path": [path]})
    options = {"patient": None, "rate": 16, "window": 5, "trim": 1, "min_session": 0, "n_jobs": 1, "max_failures": 1}
    bs.read.e4(table, **options | {"states": ("wake", "sleep", "off"), "quality": False})
    samples = bs.read.e4(table, **options, states=None, crop=False)
    for i in range(min(len(samples), 20)):
        x = samples[i]
        if x.shape != (6, 80) or x.dtype != np.float32 or np.isinf(x).any():
            raise AssertionError(f"window {i} is {x.dtype} {x.shape}")
    Path(path + ".read").touch()


def read_folder(path: str) -> None:
    """A session of which the given file is one stream, by the number in front of its name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "session")
        shutil.copytree(Path(path).parent.parent / "seed", folder)
        shutil.copy(path, folder / f"{ORDER[int(Path(path).name[:2])]}.csv")
        read(str(folder))
    Path(path + ".read").touch()


def _archive(tmp_path: Path, compression: int) -> Path:
    target = tmp_path / f"{compression}.zip"
    with zipfile.ZipFile(target, "w", compression) as archive:
        for file in sorted(_session(tmp_path / "seed").iterdir()):
            archive.write(file, file.name)
    return target


def _run(read: str, seeds: list[Path], tmp_path: Path, n: int) -> tuple[int, int]:
    """Files read and files refused; every fault fails the test."""
    (tmp_path / "damaged").mkdir()
    assert fuzz(read, seeds, tmp_path / "damaged", n=n) == []
    good = len(list((tmp_path / "damaged").glob("??_????_*.read")))
    print(f"{read}: {n} files, {good} read, {n - good} typed errors, 0 faults")
    return good, n - good


def test_damaged_archives_quick(tmp_path: Path) -> None:
    _, refused = _run("test_fuzz_e4:read", [_archive(tmp_path, zipfile.ZIP_DEFLATED)], tmp_path, 27)
    assert refused


def test_damaged_streams_quick(tmp_path: Path) -> None:
    _session(tmp_path / "seed")
    read, refused = _run("test_fuzz_e4:read_folder", [tmp_path / "seed" / f"{n}.csv" for n in ORDER], tmp_path, 35)
    assert read and refused


@pytest.mark.slow
def test_damaged_archives(tmp_path: Path) -> None:
    seeds = [_archive(tmp_path, c) for c in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)]
    read, refused = _run("test_fuzz_e4:read", seeds, tmp_path, 500)
    assert read and refused


@pytest.mark.slow
def test_damaged_streams(tmp_path: Path) -> None:
    _session(tmp_path / "seed")
    read, refused = _run("test_fuzz_e4:read_folder", [tmp_path / "seed" / f"{n}.csv" for n in ORDER], tmp_path, 500)
    assert read and refused
