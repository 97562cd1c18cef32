"""Damaged slides through the reader, from the table to the pixels: typed errors or pixels, never anything else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import fuzz
from slide_files import picture, write_aperio, write_dicom, write_pyramid

import biosae as bs
from biosae.data import ReadError


def read_slide(path: str) -> None:
    """Every tile of a slide, and its picture."""
    with tempfile.TemporaryDirectory() as alone:  # the files beside a DICOM slide would be taken for its levels
        read_tiles(shutil.copy(path, alone), tile=48, mpp=0.5, upsample=True)


def read_real(path: str) -> None:
    """As :func:`read_slide`, with the scale stated and a coarse grid."""
    read_tiles(path, tile=32, mpp=4.0, slide_mpp=0.5)


def read_tiles(path: str, *, tile: int, **options) -> None:
    """Forty tiles at most; an error of one is no reason to stop."""
    samples = bs.read.wsi(path, patient=None, tile=tile, min_tissue=0, edge="pad", n_jobs=1, **options)
    broken = []
    for i in range(min(len(samples), 40)):
        try:
            assert samples[i].shape == (tile, tile, 3)
        except ReadError as error:
            broken.append(error)
    if broken:
        raise broken[0]


def seed(kind: str, folder: Path) -> Path:
    """A healthy slide of a kind."""
    pixels = picture(200, 150)
    makers = {
        "svs": lambda p: write_aperio(p.with_suffix(".svs"), pixels),
        "pyramid": lambda p: write_pyramid(p.with_suffix(".tif"), pixels, compression="jpeg"),
        "generic": lambda p: write_pyramid(
            p.with_suffix(".tif"), pixels, factors=(), tile=None, compression="lzw", predictor=True, rowsperstrip=16
        ),
        "dicom": lambda p: write_dicom(p.with_suffix(".dcm"), pixels),
        "dicom_sparse": lambda p: write_dicom(p.with_suffix(".dcm"), pixels, sparse=True, syntax="jpeg2000"),
    }
    return makers[kind](folder / kind)


KINDS = ("svs", "pyramid", "generic", "dicom", "dicom_sparse")


def test_damaged_slides_quick(tmp_path):
    assert fuzz("test_fuzz_wsi:read_slide", [seed(k, tmp_path) for k in KINDS], tmp_path, n=30) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_slides(kind, tmp_path):
    assert fuzz("test_fuzz_wsi:read_slide", [seed(kind, tmp_path)], tmp_path, n=500) == []


@pytest.mark.slow
def test_damaged_real_slides(shared, tmp_path):
    pack = shared / "data" / "wsi_small"
    seeds = [pack / name for name in ("small.svs", "cmu1_small_region.svs", "smalltif.tif")]
    assert fuzz("test_fuzz_wsi:read_real", seeds, tmp_path, n=300) == []
