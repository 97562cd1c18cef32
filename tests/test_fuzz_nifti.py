"""Damaged NIfTI files, from the reader function to every item: a typed error or valid data."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import fuzz

import biosae as bs

AFFINE = np.array([[-3.0, 0, 0, 20], [0, 0, 2.5, -15], [0, 2, 0.2, -10], [0, 0, 0, 1]])


def _write(folder: Path, name: str, *, kind: str = "Nifti1Image", shape: tuple = (9, 8, 7), dtype=np.int16) -> Path:
    import nibabel as nib

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    image = getattr(nib, kind)(rng.normal(100, 30, shape).astype(dtype), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    if len(shape) == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], 2.0))
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, folder / name)
    return folder / name


def _atlas(folder: Path) -> Path:
    import nibabel as nib

    labels = np.zeros((9, 8, 7), np.int16)
    labels[:4], labels[5:] = 1, 2
    image = nib.Nifti1Image(labels, AFFINE)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / "atlas.nii")
    return folder / "atlas.nii"


def read_nii(path: str) -> None:
    """Slices, regional means, series and correlations; a file ``*.read`` says that data were given."""
    bs.settings.progress = False
    table = pd.DataFrame({"path": [path]})
    options = {"patient": None, "n_jobs": 1, "max_failures": 1}
    slices = bs.read.nifti(table, volume=0, plane="coronal", **options)
    for i in np.unique(np.linspace(0, len(slices) - 1, 12).astype(int)):
        image = slices[int(i)]
        if image.dtype != np.uint8 or image.ndim != 3:
            raise AssertionError(f"slice {i} is {image.dtype} {image.shape}")
    with tempfile.TemporaryDirectory() as scratch:
        atlas = _atlas(Path(scratch))
        kinds: list[tuple[dict, tuple]] = [({"as_": "scalars", "volume": 0}, (2,))]
        if "4d" in Path(path).name:
            kinds += [({"as_": "regions", "tr": 2.0}, (2,)), ({"as_": "connectivity", "window": 8, "tr": 2.0}, (1,))]
        for more, shape in kinds:
            samples = bs.read.nifti(table, atlas=atlas, **options, **more)
            if samples[0].dtype != np.float32 or samples[0].shape[:1] != shape:
                raise AssertionError(f"{more}: {samples[0].dtype} {samples[0].shape}")
    Path(path + ".read").touch()


def read_as(path: str) -> None:
    """Read a damaged file under the name that its folder is called: ``4d.nii``, ``4d.nii.gz``, ``pack.nii.gz`` (packed
    only now), ``pair.hdr`` or ``pair.img`` (the other one is healthy)."""
    name = Path(path).parent.name
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, name)
        if name.startswith("pair"):
            for seed in (Path(path).parent.parent / "seed").glob("pair.*"):
                shutil.copy(seed, scratch)
        data = Path(path).read_bytes()
        target.write_bytes(gzip.compress(data, 1) if name.startswith("pack") else data)
        read_nii(str(target))
    Path(path + ".read").touch()


SEEDS = {
    "4d.nii": ("4d.nii", {"shape": (9, 8, 7, 12)}),
    "3d.nii": ("3d.nii", {"dtype": np.float32}),
    "4d.nii.gz": ("4d.nii.gz", {"shape": (9, 8, 7, 12)}),
    "pack_4d.nii.gz": ("pack.nii", {"shape": (9, 8, 7, 12), "dtype": np.float64}),
    "two_4d.nii": ("two.nii", {"kind": "Nifti2Image", "shape": (9, 8, 7, 12)}),
    "pair.hdr": ("pair.hdr", {"kind": "Nifti1Pair"}),
    "pair.img": ("pair.img", {"kind": "Nifti1Pair"}),
}


def _run(name: str, tmp_path: Path, n: int) -> tuple[int, int]:
    """Files read and files refused; every fault fails the test."""
    seed, options = SEEDS[name]
    made = _write(tmp_path / "seed", seed, **options)
    (tmp_path / name).mkdir()
    assert fuzz("test_fuzz_nifti:read_as", [made], tmp_path / name, n=n) == []
    good = len(list((tmp_path / name).glob("??_????_*.read")))
    print(f"{name}: {n} files, {good} read, {n - good} typed errors, 0 faults")
    return good, n - good


@pytest.mark.parametrize("name", ["4d.nii", "4d.nii.gz"])
def test_damaged_images_quick(name: str, tmp_path: Path) -> None:
    read, refused = _run(name, tmp_path, 27)
    assert refused and (read or name.endswith(".gz"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SEEDS))
def test_damaged_images(name: str, tmp_path: Path) -> None:
    read, refused = _run(name, tmp_path, 500)
    assert refused and (read or name == "4d.nii.gz")  # its check sum tells nearly every damage
