"""Damaged image files, through ``bs.read.images`` end to end: whole images, crops and masks."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import fuzz
from PIL import Image

import biosae as bs
from biosae.data import ReadError

KINDS = {
    "jpg": [{"quality": 90}, {"quality": 90, "progressive": True}],
    "png": [{}],
    "tif": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_deflate"}],
    "webp": [{"lossless": True}, {"quality": 80}],
    "bmp": [{}],
}


def read_all(path: str) -> None:
    """An image whole, its mask (the same file), and a crop of it, as a user would read them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = pd.DataFrame({"path": [path], "mask": [path]})
        samples = bs.read.images(table, patient=None)
        for read in (samples.__getitem__, samples.mask):
            with suppress(ReadError):
                assert read(0).ndim in (2, 3)
        boxes = pd.DataFrame({"path": [path], "x": [3], "y": [4], "width": [10], "height": [11]})
        crops = bs.read.images(table, patient=None, boxes=boxes)
        assert crops[0].shape[2] == 3


def seeds(folder: Path, kind: str) -> list[Path]:
    """Small healthy files of one kind, one for each way of packing."""
    rows, columns = np.mgrid[:48, :40]
    rgb = np.stack([5 * rows, 6 * columns, 2 * (rows + columns)], axis=2).astype(np.uint8)
    found = []
    for i, options in enumerate(KINDS[kind]):
        found.append(folder / f"seed{i}.{kind}")
        Image.fromarray(rgb).save(found[-1], **options)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_damaged_files_of_each_kind(kind, tmp_path):
    assert fuzz("test_fuzz_images:read_all", seeds(tmp_path, kind), tmp_path, n=30) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_damaged_files_of_each_kind(kind, tmp_path):
    assert fuzz("test_fuzz_images:read_all", seeds(tmp_path, kind), tmp_path, n=500) == []
