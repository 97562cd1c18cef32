"""Damaged WFDB files through the reader: each file of a record in turn, the others healthy."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from fuzzing import fuzz

import biosae as bs

pytest.importorskip("wfdb")


def read(path: str) -> None:
    """Put the damaged file in its place in a healthy record and read windows and beats of it."""
    damaged = Path(path)
    healthy = damaged.parent / "healthy"
    with tempfile.TemporaryDirectory(dir=damaged.parent) as folder:
        shutil.copytree(healthy, folder, dirs_exist_ok=True)
        shutil.copyfile(damaged, Path(folder) / (damaged.parent / "target").read_text())
        header = next(healthy.glob("*.hea"))
        table = pd.DataFrame({"path": [header.name], "who": ["p"]})
        ways = [{"window": 2.0, "rate": 100.0}] + ([{"beats": True}] if any(healthy.glob("*.atr")) else [])
        if header.stem == "mixedsignals":  # 249.89 Hz has no small ratio to 100 Hz
            ways = [{"window": 2.0, "channels": ["II", "III", "V"]}]
        for way in ways:
            samples = bs.read.wfdb(
                table, patient="who", root=folder, units="mV", unit=None, columns=["age", "sex"], n_jobs=1,
                max_failures=1.0, **way,
            )  # fmt: skip
            for i in range(len(samples)):
                assert samples[i].ndim == 2


def healthy(folder: Path, header: Path, keep: tuple[str, ...]) -> Path:
    """A folder ``healthy`` with one record; only files of these endings."""
    place = folder / "healthy"
    place.mkdir()
    for file in header.parent.glob(f"{header.stem}*"):
        if file.suffix in keep:
            shutil.copyfile(file, place / file.name)
    return place


RECORDS = {
    "hea": ("ecg_cpsc2021_af", "data_101_6", (".hea", ".dat", ".atr"), ".hea"),
    "hea_mat": ("ecg_cinc2021", "E07501", (".hea", ".mat"), ".hea"),
    "hea_flac": ("ecg_wfdb_formats", "mixedsignals", (".hea", ".dat"), ".hea"),
    "dat16": ("ecg_cpsc2021_af", "data_101_6", (".hea", ".dat", ".atr"), ".dat"),
    "dat212": ("ecg_wfdb_formats", "100_3chan", (".hea", ".dat"), ".dat"),
    "mat": ("ecg_cinc2021", "E07501", (".hea", ".mat"), ".mat"),
    "flac": ("ecg_wfdb_formats", "flacformats", (".hea", ".d0", ".d1", ".d2"), ".d1"),
    "flac24": ("ecg_wfdb_formats", "flacformats", (".hea", ".d0", ".d1", ".d2"), ".d2"),
    "flac_long": ("ecg_wfdb_formats", "mixedsignals", (".hea", ".dat"), "_e.dat"),
    "atr": ("ecg_cpsc2021_af", "data_101_6", (".hea", ".dat", ".atr"), ".atr"),
    "binformats": ("ecg_wfdb_formats", "binformats", (".hea", *(f".d{i}" for i in range(10))), ".hea"),
}


def faults(shared: Path, folder: Path, kind: str, n: int) -> list[str]:
    pack, name, keep, target = RECORDS[kind]
    place = healthy(folder, shared / "data" / pack / "records" / f"{name}.hea", keep)
    seed = place / f"{name}{target}"
    (folder / "target").write_text(seed.name)
    return fuzz("test_fuzz_wfdb:read", [seed], folder, n=n)


@pytest.mark.parametrize("kind", ["hea", "flac", "atr"])
def test_few_damaged_files(kind: str, shared: Path, tmp_path: Path) -> None:
    assert faults(shared, tmp_path, kind, 10) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECORDS)
def test_500_damaged_files(kind: str, shared: Path, tmp_path: Path) -> None:
    assert faults(shared, tmp_path, kind, 500) == []
