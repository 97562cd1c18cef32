"""NIfTI volumes: checked headers, one volume at a time in RAS+ orientation, means of an atlas' regions."""

from __future__ import annotations

import gzip
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import InputError, require
from biosae.files import hash_file

SUFFIXES = (".nii", ".nii.gz", ".hdr")
MAX_VOXELS = 2**27  # of one volume
MAX_SIDE = 32767
MAX_VOLUMES = 10**6
MAX_OFFSET = 64 * 2**20  # bytes of header and extensions
DEFLATE = 1032  # the most bytes that one byte of a gzip file can become
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # -> axis of a RAS+ volume
_MM = {"mm": 1.0, "meter": 1e3, "micron": 1e-3}
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_MAGIC = {b"n+1\0": 348, b"ni1\0": 348, b"n+2\0": 540, b"ni2\0": 540}


class Volume:
    """An open NIfTI-1 or NIfTI-2 file; volumes are given in the axes closest to RAS+ (x to the right, y to the front,
    z to the top).

    Attributes
    ----------
    shape : tuple of int
        Voxels along x, y, z.
    n_volumes : int
        Volumes along the fourth axis, 1 for a 3-D image.
    affine : numpy.ndarray
        ``(4, 4)``, voxel to mm.
    spacing : numpy.ndarray
        Size of a voxel along x, y, z in mm.
    orientation : str
        Directions of the axes as the file has them, such as ``"LAS"``.
    oblique : float
        Largest angle between an axis of the volume and one of the world, in degrees.
    placed : str
        Where the affine comes from: ``"sform"``, ``"qform"``, or ``"none"`` (voxel sizes only; left and right unknown).
    tr : float or None
        Seconds between volumes; None where the header does not state a plausible one.
    stated_tr : str
        What the header says of it.
    kept : dict
        Room for what is worked out from the file and asked for again.
    """

    def __init__(self, path: str, space_unit: str | None) -> None:
        nib = require("nibabel", extra="data")
        head, image, packed = _files(path)
        raw = _header_bytes(head, packed)
        kind = _MAGIC.get(raw[344:348]) or _MAGIC.get(raw[4:8])
        if kind is None:
            raise ReadError("unsupported", "no NIfTI header (magic n+1, ni1, n+2 or ni2)")
        try:
            self._parse(nib, raw[:kind], kind, image is not None, space_unit)
        except (ReadError, MemoryError):
            raise
        except Exception as error:  # nibabel raises many types on damaged headers
            raise ReadError("unreadable", f"damaged NIfTI header ({type(error).__name__}: {error})") from None
        image = image or head
        size, needed = os.path.getsize(image), self._offset + self._bytes * self.n_volumes
        if needed > (size * DEFLATE if packed else size):
            raise ReadError(
                "truncated", f"the header asks for {needed} bytes, {os.path.basename(image)} has {size}; copy it again"
            )
        self._packed, self._name = packed, os.path.basename(image)
        self._stream = gzip.open(image) if packed else open(image, "rb")  # noqa: SIM115 (closed by close)
        self._held: tuple[int, np.ndarray] | None = None
        self.kept: dict[Any, Any] = {}

    def _parse(self, nib: Any, raw: bytes, kind: int, pair: bool, space_unit: str | None) -> None:
        classes = {
            (348, False): nib.Nifti1Header, (348, True): nib.nifti1.Nifti1PairHeader,
            (540, False): nib.Nifti2Header, (540, True): nib.nifti2.Nifti2PairHeader,
        }  # fmt: skip
        logger = logging.getLogger("nibabel.global")
        level, logger.disabled = logger.disabled, True
        try:
            header = classes[kind, pair].from_fileobj(io.BytesIO(raw))
        finally:
            logger.disabled = level
        shape = [int(n) for n in header.get_data_shape()]
        while len(shape) > 3 and shape[-1] == 1:
            shape.pop()
        if not 2 <= len(shape) <= 4:
            raise ReadError("unsupported", f"a shape of {tuple(shape)}; images have 3 axes, or 4 with time")
        space, n_volumes = (*shape, 1)[:3], shape[3] if len(shape) == 4 else 1
        if min(space) < 1 or n_volumes < 1:
            raise ReadError("unreadable", f"a shape of {tuple(shape)}")
        n_voxels = int(np.prod(space, dtype=object))
        if max(space) > MAX_SIDE or n_voxels > MAX_VOXELS or n_volumes > MAX_VOLUMES:
            raise ReadError(
                "unsupported", f"a shape of {tuple(shape)}: more than {MAX_VOXELS} voxels or {MAX_SIDE} a side"
            )
        self._dtype = header.get_data_dtype()
        if self._dtype.kind not in "iuf" or self._dtype.itemsize > 8:
            raise ReadError(
                "unsupported", f"values of type {self._dtype}; store whole or real numbers of up to 64 bits"
            )
        slope, inter = header.get_slope_inter()
        self._scale = (1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter))
        self._offset, self._bytes = int(header.get_data_offset()), n_voxels * self._dtype.itemsize
        if not 0 <= self._offset <= MAX_OFFSET:
            raise ReadError("unreadable", f"the header places the values at byte {self._offset}")
        unit, time_unit = header.get_xyzt_units()
        self._place(nib, header, space, _millimetres(unit, space_unit))
        self.n_volumes = n_volumes
        zooms = header.get_zooms()
        step = float(zooms[3]) if n_volumes > 1 else 0.0
        self.stated_tr = f"{step:g} {time_unit}"
        seconds = step * _SECONDS.get(time_unit, np.nan)
        self.tr = seconds if 0.01 <= seconds <= 60 else None

    def _place(self, nib: Any, header: Any, shape: tuple[int, ...], mm: float) -> None:
        """Orientation, and the affine of the volume turned to RAS+."""
        affine = np.diag([mm, mm, mm, 1.0]) @ np.asarray(header.get_best_affine(), dtype=np.float64)
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        if not np.isfinite(affine).all() or spacing.min() < 1e-6 or spacing.max() > 1e6:
            raise ReadError("unreadable", f"voxels of {spacing} mm")
        if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
            raise ReadError("unreadable", "an affine that makes a volume flat")
        codes = (int(header["sform_code"]), int(header["qform_code"]))
        self.placed = "sform" if codes[0] > 0 else "qform" if codes[1] > 0 else "none"
        self._turn = nib.orientations.io_orientation(affine)
        self.orientation = "".join(nib.orientations.ornt2axcodes(self._turn))
        self.affine = affine @ nib.orientations.inv_ornt_aff(self._turn, shape)
        self._stored = shape
        self.shape = tuple(int(shape[i]) for i in np.argsort(self._turn[:, 0]))
        self.spacing = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        self.oblique = float(np.degrees(nib.affines.obliquity(affine).max()))

    def raw(self, t: int) -> np.ndarray:
        """Volume ``t`` as stored, ``(x, y, z)`` in RAS+ order, before the header's slope and intercept."""
        if self._held is not None and self._held[0] == t:
            return self._held[1]
        self._held = None
        buffer = memoryview(bytearray(self._bytes))
        done = 0
        try:
            self._stream.seek(self._offset + t * self._bytes)
            while done < self._bytes:
                got = self._stream.readinto(buffer[done:])
                if not got:
                    raise ReadError("truncated", f"{self._name} ends in volume {t}")
                done += got
        except EOFError:
            raise ReadError("truncated", f"{self._name} ends in volume {t}") from None
        except (ReadError, MemoryError):
            raise
        except Exception as error:  # gzip, zlib and the file system
            raise ReadError("unreadable", f"{self._name}: {error}") from None
        values = np.frombuffer(buffer, dtype=self._dtype).reshape(self._stored, order="F")
        turned = _turned(values, self._turn)
        self._held = (t, turned)
        return turned

    def scaled(self, raw: np.ndarray) -> np.ndarray:
        """Stored values times the header's slope plus its intercept, float64."""
        with np.errstate(all="ignore"):
            return raw.astype(np.float64) * self._scale[0] + self._scale[1]

    def check_end(self) -> None:
        """Read a packed file to its end, where its check sum is; call after the last volume.

        Raises
        ------
        ReadError
            ``truncated`` or ``unreadable``.
        """
        if not self._packed:
            return
        try:
            self._stream.seek(self._offset + self.n_volumes * self._bytes)
            self._stream.read(2**20)
        except EOFError:
            raise ReadError("truncated", f"{self._name} lacks its end") from None
        except Exception as error:
            raise ReadError("unreadable", f"{self._name}: {error}") from None

    def close(self) -> None:
        """Let the file go."""
        self._stream.close()
        self._held = None


def _files(path: str) -> tuple[str, str | None, bool]:
    """File of the header, file of the values where that is another, and whether they are packed."""
    name = path.lower()
    packed = name.endswith(".gz")
    stem = path[:-3] if packed else path
    end = path[len(stem) :]
    if not os.path.isfile(path):
        raise ReadError("missing", f"no file {path}")
    if not os.path.getsize(path):
        raise ReadError("empty", "0 bytes")
    with open(path, "rb") as stream:
        if (stream.read(2) == b"\x1f\x8b") != packed:
            raise ReadError("unreadable", "its name ends in .gz and it is not packed, or the reverse; rename it")
    for one, other in ((".hdr", ".img"), (".img", ".hdr")):
        if stem.lower().endswith(one):
            twin = stem[: -len(one)] + (other if stem.endswith(one) else other.upper()) + end
            if not os.path.isfile(twin):
                raise ReadError("missing", f"no file {os.path.basename(twin)} beside {os.path.basename(path)}")
            return (path, twin, packed) if one == ".hdr" else (twin, path, packed)
    return path, None, packed


def _header_bytes(path: str, packed: bool) -> bytes:
    try:
        with gzip.open(path) if packed else open(path, "rb") as stream:
            raw = stream.read(540)
    except EOFError:
        raise ReadError("truncated", "the file ends in its header") from None
    except Exception as error:
        raise ReadError("unreadable", f"{os.path.basename(path)}: {error}") from None
    if len(raw) < 348:
        raise ReadError("truncated", f"{len(raw)} bytes are no NIfTI header")
    return raw


def _millimetres(stated: str, given: str | None) -> float:
    unit = given if stated == "unknown" else stated
    if unit is None:
        raise ReadError("no_unit", "the header states no unit of length; pass space_unit='mm' if it is that")
    return _MM[unit]


def _turned(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """A view whose axes are those of the world; ``turn`` is nibabel's table of (axis, flip)."""
    for axis, flip in enumerate(turn[:, 1]):
        if flip < 0:
            values = np.flip(values, axis)
    return values.transpose(np.argsort(turn[:, 0]))


def open_volume(path: str, *, space_unit: str | None = None) -> Volume:
    """Open a NIfTI file (``.nii``, ``.nii.gz``, or a pair ``.hdr`` and ``.img``).

    Parameters
    ----------
    path
        The file.
    space_unit
        Unit of length where the header states none: ``"mm"``, ``"meter"`` or ``"micron"``.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable``, ``unsupported`` or ``no_unit``.
    """
    if space_unit is not None and space_unit not in _MM:
        raise InputError(f"space_unit={space_unit!r}; valid: {', '.join(map(repr, _MM))}")
    try:
        return Volume(path, space_unit)
    except OSError as error:
        raise ReadError("unreadable", f"{os.path.basename(path)}: {error.strerror or error}") from None


def plane(values: np.ndarray, name: str, index: int) -> np.ndarray:
    """One plane of a RAS+ volume as it is looked at.

    Rows run downwards: from front to back (axial) or from top to bottom (coronal, sagittal). Columns run from the left
    of the body to its right (axial, coronal), or from back to front (sagittal).
    """
    return np.take(values, index, axis=PLANES[name]).T[::-1]


@lru_cache(maxsize=2)
def load_atlas(path: str, sha256: str, space_unit: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels of an atlas whose file has this hash, ``int32 (x, y, z)`` in RAS+ order, and its affine in mm.

    Raises
    ------
    ReadError
        If it cannot be read or is another file now, is 4-D, has no place in space, or holds other values than whole
        numbers.
    """
    if not os.path.isfile(path):
        raise ReadError("missing", f"no atlas {path}")
    if hash_file(path) != sha256:
        raise ReadError("unsupported", f"the atlas {path} has changed since these samples were made")
    with closing(open_volume(path, space_unit=space_unit)) as volume:
        if volume.n_volumes > 1:
            raise ReadError("unsupported", f"the atlas has {volume.n_volumes} volumes; give one 3-D volume of labels")
        if volume.placed == "none":
            raise ReadError("unsupported", "the atlas states neither sform nor qform: its place in space is unknown")
        values = volume.scaled(volume.raw(0))
        if not (np.abs(values) < 2**31).all() or (values != np.rint(values)).any():
            raise ReadError("unsupported", "the atlas holds other values than whole numbers; it must hold labels")
        return values.astype(np.int32), volume.affine


class Regions:
    """Voxels of an atlas' regions on the grid of an image.

    The label of a voxel is that of the atlas' nearest voxel in world coordinates, ``inv(A_atlas) A_image v``.

    Parameters
    ----------
    labels, atlas_affine
        As :func:`load_atlas` gives them.
    values
        Labels of the regions, in order.
    shape, affine
        Grid of the image.
    """

    def __init__(
        self, labels: np.ndarray, atlas_affine: np.ndarray, values: Sequence[int], shape: Sequence[int],
        affine: np.ndarray,
    ) -> None:  # fmt: skip
        from scipy.ndimage import affine_transform

        to_atlas = np.linalg.inv(atlas_affine) @ affine
        on_grid = affine_transform(
            labels, to_atlas[:3, :3], to_atlas[:3, 3], output_shape=tuple(shape), order=0, mode="grid-constant", cval=0
        )
        wanted = np.asarray(values, dtype=np.int64)
        order = np.argsort(wanted)
        flat = on_grid.ravel()
        place = np.minimum(np.searchsorted(wanted[order], flat), len(wanted) - 1)
        self._at = np.flatnonzero(wanted[order][place] == flat)
        self._region = order[place[self._at]]
        self.counts = np.bincount(self._region, minlength=len(wanted))

    def means(self, volume: Volume, t: int) -> np.ndarray:
        """Mean of each region in volume ``t``, float64; NaN voxels are left out, a region without a value is NaN."""
        values = volume.scaled(volume.raw(t).ravel()[self._at])
        known = np.isfinite(values)
        n = np.bincount(self._region, weights=known, minlength=len(self.counts))
        total = np.bincount(self._region, weights=np.where(known, values, 0.0), minlength=len(self.counts))
        with np.errstate(all="ignore"):
            return np.where(n > 0, total / n, np.nan)

    def series(self, volume: Volume) -> np.ndarray:
        """Means of all volumes, ``float64 (regions, volumes)``."""
        return np.stack(list(self._each(volume)), axis=1)

    def _each(self, volume: Volume) -> Iterator[np.ndarray]:
        for t in range(volume.n_volumes):
            yield self.means(volume, t)


def connectivity(series: np.ndarray, *, fisher: bool = False) -> np.ndarray:
    """Pearson correlations between regions: the upper triangle, row by row.

    Parameters
    ----------
    series
        ``(regions, T)``.
    fisher
        Give ``artanh(r)``, with ``|r|`` held at most ``1 - 1e-7``.

    Returns
    -------
    ``float64 (regions (regions - 1) / 2,)``; NaN wherever a region's series is constant or has a missing value.
    """
    series = np.asarray(series, dtype=np.float64)
    known = np.isfinite(series).all(axis=1)
    known[known] &= np.ptp(series[known], axis=1) > 0
    centred = np.where(known[:, None], series, 0.0)
    centred = centred / np.maximum(np.abs(centred).max(axis=1, keepdims=True), np.finfo(float).tiny)
    centred -= centred.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1))
    known &= norm > 0
    unit = centred / np.where(known, norm, 1.0)[:, None]
    r = np.clip(unit @ unit.T, -1.0, 1.0)
    r[~known] = np.nan
    r[:, ~known] = np.nan
    out = r[np.triu_indices(len(r), k=1)]
    return np.arctanh(np.clip(out, -1 + 1e-7, 1 - 1e-7)) if fisher else out
