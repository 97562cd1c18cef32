"""Readers of items of NIfTI images: slices, and what is made of an atlas' regions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.read.handles import Handles
from biosae.read.volumes import PLANES, Regions, Volume, connectivity, load_atlas, open_volume, plane

_OPENED: dict[str | None, Handles] = {}


def _opened(path: str, space_unit: str | None) -> Volume:
    if space_unit not in _OPENED:
        _OPENED.setdefault(space_unit, Handles(partial(open_volume, space_unit=space_unit), size=2))
    return _OPENED[space_unit].get(path)


class NiftiSlices:
    """Reader of slices: row ``slice`` of ``plane`` of ``volume``, from black at ``limit_low`` to white at
    ``limit_high``."""

    item = "image"
    columns = ("plane", "slice", "volume", "limit_low", "limit_high")

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """The slice, ``uint8 (H, W, 3)``; rows and columns as :func:`biosae.read.volumes.plane` says."""
        volume = _opened(row["path"], "mm")
        t, axis, index = int(row["volume"]), PLANES[row["plane"]], int(row["slice"])
        if t >= volume.n_volumes or index >= volume.shape[axis]:
            raise ReadError("wrong_size", f"the image has {volume.shape} voxels and {volume.n_volumes} volumes now")
        values = volume.scaled(plane(volume.raw(t), row["plane"], index))
        grey = to_grey(values, float(row["limit_low"]), float(row["limit_high"]))
        return np.repeat(grey[:, :, None], 3, axis=2)

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {"kind": "nifti_slices"}


def to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``round(255 (v - low) / (high - low))`` held between 0 and 255, ``uint8``; NaN is 0, and so is all if
    ``high <= low``."""
    if not high > low:
        return np.zeros(values.shape, dtype=np.uint8)
    with np.errstate(all="ignore"):
        share = (np.clip(values, low, high) - low) / (high - low)
    return np.rint(255 * np.nan_to_num(share, nan=0.0)).astype(np.uint8)


class NiftiRegions:
    """Reader of regional means: a vector of a 3-D map, the series of a 4-D image, or their correlations.

    Parameters
    ----------
    as_
        ``"scalars"``, ``"regions"`` or ``"connectivity"``.
    atlas, atlas_sha256
        File of the labels, and its hash when the samples were made.
    values, names
        Labels of the regions and their names, in order.
    fisher, space_unit
        As :func:`biosae.read.nifti` takes them.
    rate
        Volumes a second (Hz) of every image, None where they differ.
    """

    def __init__(
        self, *, as_: str, atlas: str, atlas_sha256: str, values: list[int], names: list[str], fisher: bool = False,
        space_unit: str | None = None, rate: float | None = None,
    ) -> None:  # fmt: skip
        self.as_, self.atlas, self.atlas_sha256 = as_, atlas, atlas_sha256
        self.values, self.names, self.fisher, self.space_unit = list(values), list(names), fisher, space_unit
        self.rate = rate
        self.item = "signal" if as_ == "regions" else "features"
        self.columns = ("volume",) if as_ == "scalars" else ("start", "duration", "tr")
        self.unit = "au" if as_ == "regions" else None
        self.channels = tuple(names) if as_ == "regions" else ()

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """``float32 (R,)``, ``(R, T)`` or ``(R (R - 1) / 2,)``; NaN for regions without a voxel, and for correlations
        of a constant series."""
        volume = _opened(row["path"], self.space_unit)
        key = (self.atlas_sha256, tuple(self.values))
        if volume.kept.get("regions") != key:
            volume.kept = {"regions": key, "grid": self.grid(volume)}
        grid = volume.kept["grid"]
        if self.as_ == "scalars":
            t = int(row["volume"])
            if t >= volume.n_volumes:
                raise ReadError("missing", f"no volume {t}; the image has {volume.n_volumes}")
            return grid.means(volume, t).astype(np.float32)
        if "series" not in volume.kept:
            volume.kept["series"] = grid.series(volume)
        return self.window(volume.kept["series"], float(row["start"]), float(row["duration"]), float(row["tr"]))

    def window(self, series: np.ndarray, start: float, duration: float, tr: float) -> np.ndarray:
        """What is asked for of a part of the series."""
        first, n = round(start / tr), round(duration / tr)
        if first + n > series.shape[1]:
            raise ReadError("too_short", f"volumes {first} to {first + n} of {series.shape[1]}")
        part = series[:, first : first + n]
        return (part if self.as_ == "regions" else connectivity(part, fisher=self.fisher)).astype(np.float32)

    def grid(self, volume: Volume) -> Regions:
        """The regions on the image's grid.

        Raises
        ------
        ReadError
            If the image's place is unknown or no region lies in it, or the atlas is gone or another one.
        """
        if volume.placed == "none":
            raise ReadError("unsupported", "neither sform nor qform is stated: the image's place in space is unknown")
        atlas = load_atlas(self.atlas, self.atlas_sha256, self.space_unit)
        found = Regions(*atlas, self.values, volume.shape, volume.affine)
        if not found.counts.any():
            raise ReadError(
                "unsupported", "no region of the atlas lies in the image; are both in one space (MNI, say)?"
            )
        return found

    def value_names(self) -> list[str]:
        """Names of the values of a vector: regions, or pairs of them (``a ~ b``)."""
        if self.as_ != "connectivity":
            return list(self.names)
        return [f"{a} ~ {b}" for i, a in enumerate(self.names) for b in self.names[i + 1 :]]

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {
            "kind": "nifti_regions", "as_": self.as_, "atlas": self.atlas, "atlas_sha256": self.atlas_sha256,
            "values": self.values, "names": self.names, "fisher": self.fisher, "space_unit": self.space_unit,
            "rate": self.rate,
        }  # fmt: skip
