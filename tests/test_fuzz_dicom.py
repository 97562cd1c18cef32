"""Damaged DICOM files of every encoding, through the reader function and its items: typed errors or pictures."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from fuzzing import fuzz

import biosae as bs
from biosae.data import ReadError

SEEDS = (
    "CT_small", "MR_small_RLE", "SC_rgb_jpeg", "MR_small_jp2klossless", "image_dfl", "emri_small",
    "MR_small_jpeg_ls_lossless", "JPGExtended", "OBXXXX1A_rle_2frame", "MR_small_bigendian", "rtdose", "explicit_VR-UN",
    "SC_ybr_full_422_uncompressed", "examples_ybr_color", "liver_1frame", "JPEG2000", "JPEG-LL", "bad_sequence",
)  # fmt: skip
TAGS = ("PatientSex", "PatientAge", "KVP", "ImageType", "SoftwareVersions", "PixelPaddingValue")


def read_all(path: str) -> None:
    """What a user does with a file: list it, then look at its frames and, where they have such, their values."""
    samples = bs.read.dicom(path, patient=None, slide="tag:SeriesInstanceUID", tags=TAGS, max_failures=1, n_jobs=1)
    broken = []
    for i in range(len(samples)):
        try:
            picture = samples[i]
        except ReadError as error:
            broken.append(error)
            continue
        assert picture.shape == (samples.obs["rows"].iloc[i], samples.obs["columns"].iloc[i], 3)
    grey = samples.obs["photometric"].iloc[-1].startswith("MONOCHROME")
    with nullcontext() if grey else suppress(ReadError):  # colours have no values
        bs.read.dicom_values(path, frame=len(samples) - 1)
    if broken:
        raise broken[0]


def seeds(shared: Path) -> list[Path]:
    return [shared / "data" / "dicom_zoo" / "files" / f"{name}.dcm" for name in SEEDS]


def test_a_few_damaged_files(shared, tmp_path):
    assert fuzz("test_fuzz_dicom:read_all", seeds(shared), tmp_path, n=36) == []


@pytest.mark.slow
def test_many_damaged_files(shared, tmp_path):
    assert fuzz("test_fuzz_dicom:read_all", seeds(shared), tmp_path, n=500) == []
