"""Damaged EEG files through bs.read.edf and samples[i]: a typed error or valid data, nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from edf_files import write_edf, write_gdf
from fuzzing import fuzz

PACK = Path(__file__).resolve().parents[2] / "shared" / "data" / "eeg_formats" / "files"
# a damaged part -> the healthy header that names it and the other parts
PARTS = {
    ".eeg": ("test_NO.vhdr", "test_NO.vmrk"), ".vmrk": ("test_NO.vhdr", "test_NO.eeg"),
    ".vhdr": ("test_NO.eeg", "test_NO.vmrk"), ".fdt": ("test_raw_chanloc.set",),
}  # fmt: skip


def read_all(path: str) -> None:
    """Read one file to its end: as it is, and resampled in windows."""
    from biosae import settings

    settings.progress = False
    file = Path(path)
    if file.suffix not in PARTS:
        read_windows(file)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for other in PARTS[file.suffix]:
            (folder / other).symlink_to(PACK / other)
        stem = "test_raw_chanloc" if file.suffix == ".fdt" else "test_NO"
        shutil.copyfile(file, folder / (stem + file.suffix))
        read_windows(next(p for p in sorted(folder.iterdir()) if p.suffix in (".set", ".vhdr")))


def read_windows(file: Path) -> None:
    import biosae as bs
    from biosae.errors import BiosaeError
    from biosae.read.edf import open_edf

    table = pd.DataFrame({"path": [str(file)]})
    channels = [c.name for c in open_edf(file).header.channels]
    errors = []
    for options in ({"window": 1.0, "rate": 100.0, "channels": channels[:3]}, {"units": "uV", "quality": False}):
        try:
            samples = bs.read.edf(table, patient=None, n_jobs=1, **options)
        except BiosaeError as error:
            errors.append(error)
            continue
        for i in {0, len(samples) // 2, len(samples) - 1}:
            x = samples[i]
            assert x.dtype == np.float32
            assert x.shape[0] == len(samples.channels)
            assert not np.isinf(x).any()
    if len(errors) == 2:  # neither way
        raise errors[0]


@pytest.fixture
def seeds(shared, tmp_path) -> dict[str, list[Path]]:
    rng = np.random.default_rng(0)
    x = {"Fz": (rng.normal(0, 30, 2000), 200), "Cz": (rng.normal(0, 30, 2000), 200), "Resp": (np.zeros(100), 10)}
    marks = [(0.5, 1.0, "T1"), (3.0, 0.0, "T2")]
    made = tmp_path / "healthy"
    made.mkdir()
    numbers = {name: (values.astype(int), rate) for name, (values, rate) in x.items()}
    events = [(20, 769, 100), (400, 770, 100)]
    return {
        "EDF": [write_edf(made / "plain.edf", x)],
        "EDF+": [
            PACK / "test_utf8_annotations.edf",
            PACK / "subsecond_starttime.edf",
            write_edf(made / "gaps.edf", x, kind="EDF+D", onsets=[*range(5), *range(8, 13)], marks=marks),
        ],
        "BDF": [PACK / "test_bdf_stim_channel.bdf", write_edf(made / "plus.bdf", x, kind="BDF+C", marks=marks)],
        "GDF": [
            PACK / "test_1ch.gdf",
            write_gdf(made / "one.gdf", numbers, version="1.25", events=events),
            write_gdf(made / "two.gdf", numbers, events=events),
        ],
        "SET": [PACK / "test_raw_2021.set", PACK / "test_epochs_onefile.set", PACK / "test_raw_chanloc.fdt"],
        "BrainVision": [PACK / "test_NO.vhdr", PACK / "test_NO.vmrk", PACK / "test_NO.eeg"],
        "FIF": [PACK / "neuromag122_test_file-raw.fif"],
    }


def test_a_few_damaged_files_of_each_format(seeds, tmp_path):
    few = [files[0] for files in seeds.values()]
    assert fuzz("test_fuzz_edf:read_all", few, tmp_path, n=35) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["EDF", "EDF+", "BDF", "GDF", "SET", "BrainVision", "FIF"])
def test_500_damaged_files(seeds, tmp_path, format):
    assert fuzz("test_fuzz_edf:read_all", seeds[format], tmp_path, n=500) == []
