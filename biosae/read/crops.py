"""Boxes within images: tables and detector files of boxes -> rows of crops, and the reader that cuts them out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.errors import InputError, nearest
from biosae.read.decode import decode, image_size, mask_of
from biosae.read.handles import Handles
from biosae.read.table import load_table

# form of a box -> names of its four columns
BOX_FORMATS: dict[str, tuple[str, str, str, str]] = {
    "xywh": ("x", "y", "width", "height"),
    "xyxy": ("x_min", "y_min", "x_max", "y_max"),
    "cxcywh": ("x_center", "y_center", "width", "height"),
}
COLUMNS = ("box_x", "box_y", "box_width", "box_height")
_IMAGE_COLUMNS = ("sample_id", "path", "file")  # where a table of boxes names its image, in order of preference


class CropReader:
    """Reader of rectangles of image files: ``box_x, box_y, box_width, box_height`` in whole pixels of the image as it
    is shown (orientation applied).

    The last decoded image of each thread is kept, so crops of one image that follow each other cost one decoding.

    Parameters
    ----------
    page
        Page of multi-page files, counted from 0. ``None`` refuses files with several pages.
    """

    columns = COLUMNS

    def __init__(self, *, page: int | None = None) -> None:
        self.page = page

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """Crop of ``row["path"]``: ``uint8 (box_height, box_width, 3)``."""
        return _cut(_images(self.page).get(row["path"]).pixels, row)

    def mask(self, row: Mapping[str, Any]) -> np.ndarray:
        """Part labels of the same crop, ``uint8`` or ``uint16 (box_height, box_width)``."""
        return _cut(mask_of(row, page=self.page), row)

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {"kind": "crop", "page": self.page}


class _Decoded:
    """A decoded image as :class:`~biosae.read.handles.Handles` keeps it."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def close(self) -> None:
        """Nothing is open."""


class _Open:
    """``decode`` of one page, picklable."""

    def __init__(self, page: int | None) -> None:
        self.page = page

    def __call__(self, path: str) -> _Decoded:
        return _Decoded(decode(path, page=self.page))


_OPENED: dict[int | None, Handles] = {}


def _images(page: int | None) -> Handles:
    return _OPENED.setdefault(page, Handles(_Open(page), size=1))


def _cut(values: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
    x, y, width, height = (int(row[c]) for c in COLUMNS)
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > values.shape[1] or y + height > values.shape[0]:
        shown = f"{values.shape[1]} x {values.shape[0]} pixels"
        raise ReadError("wrong_size", f"a box of {width} x {height} at ({x}, {y}) does not lie in {shown}")
    return values[y : y + height, x : x + width].copy()


# -- tables of boxes ---------------------------------------------------------------------------------------------------


def box_table(
    source: str | os.PathLike | pd.DataFrame,
    *,
    box_format: str,
    relative: bool | None,
    min_confidence: float | None,
    box_image: str | None,
) -> tuple[pd.DataFrame, bool]:
    """Boxes as columns ``_image`` (its id or path), ``_number`` (of the box in its image, before any is left out),
    ``_left, _top, _right, _bottom`` (float), then the table's other columns; and whether edges are shares of the sides.

    Raises
    ------
    InputError
        If columns are absent, a number is no number, a box has no area, or pixels and shares cannot be told apart.
    """
    if box_format not in BOX_FORMATS:
        raise InputError(f"box_format={box_format!r}; {nearest(box_format, BOX_FORMATS)}")
    if isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".json":
        if relative is False or box_format != "xywh":
            raise InputError("boxes of a detector's JSON are shares of the image, x y width height: drop box_format=")
        if min_confidence is None:
            raise InputError(
                "a detector's file lists boxes down to a confidence of nearly 0; pass min_confidence= (0.2 is usual "
                "for MegaDetector 5, 0.8 for version 4)"
            )
        table, box_image, relative = _detections(Path(source)), "file", True
    else:
        table, _ = load_table(source, text=[*_IMAGE_COLUMNS, *([box_image] if box_image else [])])
    key = box_image or next((c for c in _IMAGE_COLUMNS if c in table), None)
    if key is None or key not in table:
        raise InputError(f"no column names the image of a box; pass box_image=. {nearest(str(key), table.columns)}")
    number = table.groupby(key).cumcount()
    if min_confidence is not None:
        if "confidence" not in table:
            raise InputError(f"min_confidence= needs a column 'confidence'; {nearest('confidence', table.columns)}")
        table = table[pd.to_numeric(table["confidence"], errors="coerce") >= min_confidence]
    if table.empty:
        raise InputError("there is no box; check the file, or lower min_confidence")
    boxes, relative = _edges(table, key, box_format, relative)
    boxes.insert(1, "_number", number.loc[boxes.index])
    return boxes.reset_index(drop=True), relative


def _edges(table: pd.DataFrame, key: str, box_format: str, relative: bool | None) -> tuple[pd.DataFrame, bool]:
    columns = list(BOX_FORMATS[box_format])
    if not set(columns) <= set(table):
        fits = [f for f, c in BOX_FORMATS.items() if set(c) <= set(table)]
        hint = f"pass box_format={fits[0]!r}" if fits else f"rename yours; there are {', '.join(map(repr, table))}"
        raise InputError(f"box_format={box_format!r} needs the columns {', '.join(columns)}; {hint}")
    numbers = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    bad = ~np.isfinite(numbers).all(axis=1)
    if bad.any():
        raise InputError(f"{bad.sum()} boxes hold no numbers, first in row {int(np.argmax(bad))}; drop or repair them")
    if relative is None:
        relative = _told_apart(numbers)
    a, b, c, d = numbers.T
    if box_format == "xyxy":
        edges = (a, b, c, d)
    elif box_format == "cxcywh":
        edges = (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    else:
        edges = (a, b, a + c, b + d)
    boxes = pd.DataFrame(dict(zip(("_left", "_top", "_right", "_bottom"), edges)), index=table.index)
    flat = (boxes["_right"] <= boxes["_left"]) | (boxes["_bottom"] <= boxes["_top"])
    if flat.any():
        hint = "" if box_format == "xyxy" else "; are they corners (box_format='xyxy')?"
        raise InputError(f"{flat.sum()} boxes have no area, first in row {int(flat.idxmax())}{hint}")
    boxes.insert(0, "_image", table[key].map(_posix))
    return pd.concat([boxes, table.drop(columns=[*columns, key])], axis=1), relative


def _told_apart(numbers: np.ndarray) -> bool:
    """True for shares, False for pixels; refuses what could be either."""
    if numbers.max() > 2:
        return False
    if numbers.min() >= 0 and numbers.max() <= 1 and (numbers % 1 != 0).any():
        return True
    raise InputError("the boxes could be pixels or shares of the image; pass relative=True or relative=False")


def _posix(name: Any) -> str:
    text = str(name).replace("\\", "/")
    return str(PurePosixPath(text)) if text else text


def _detections(path: Path) -> pd.DataFrame:
    """Boxes of a MegaDetector output file (format of batch processing): ``file, class, confidence`` and the box."""
    try:
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        names = found.get("detection_categories", {})
        rows = [
            (image["file"], names.get(str(d["category"]), str(d["category"])), float(d["conf"]), *map(float, d["bbox"]))
            for image in found["images"]
            for d in image.get("detections") or []
        ]
        return pd.DataFrame(rows, columns=["file", "class", "confidence", *BOX_FORMATS["xywh"]])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no MegaDetector output ({type(error).__name__}: {error})") from None


# -- rows of crops -----------------------------------------------------------------------------------------------------


def match_images(boxes: pd.DataFrame, obs: pd.DataFrame, path: str) -> pd.Series:
    """Id of the image of each box, by id or by path; missing where there is none.

    Raises
    ------
    InputError
        If no box belongs to an image, or paths that occur twice would decide.
    """
    by_id = boxes["_image"].where(boxes["_image"].isin(obs.index))
    if by_id.notna().any():
        return by_id
    paths = obs[path].map(_posix)
    found = boxes["_image"].isin(paths)
    if not found.any():
        raise InputError(
            f"no box belongs to an image: boxes name {boxes['_image'].iloc[0]!r}, images are {str(obs.index[0])!r} in "
            f"{paths.iloc[0]!r}; pass box_image= the column with ids or paths"
        )
    paths = paths[paths.isin(boxes["_image"])]
    if paths.duplicated().any():
        raise InputError("several samples have the path of a box; name images by their ids in the table of boxes")
    return boxes["_image"].map(pd.Series(paths.index, index=paths))


class Size:
    """Width and height of a row's image; picklable, for :func:`biosae.read.scan.scan`."""

    def __init__(self, page: int | None) -> None:
        self.page = page

    def __call__(self, row: Mapping[str, Any]) -> tuple[int, int]:
        return image_size(row["path"], page=self.page)


def crop_rows(
    boxes: pd.DataFrame,
    sizes: Mapping[str, tuple[int, int]],
    *,
    relative: bool,
    pad: float,
    square: bool,
    box_id: str | None,
) -> tuple[pd.DataFrame, list[list[str]]]:
    """Rows of crops (index: crop id) with ``image_id``, whole pixels, ``box_clipped`` and the boxes' own columns.

    Parameters
    ----------
    boxes
        As :func:`box_table`, ``_image`` holding ids of images.
    sizes
        Id of an image to its width and height.

    Returns
    -------
    rows
        Crops that have a pixel in their image.
    lost
        ``[item, stage, reason, detail]`` of boxes outside their image.
    """
    size = np.array([sizes[i] for i in boxes["_image"]], dtype=float)
    edges = boxes[["_left", "_top", "_right", "_bottom"]].to_numpy(float)
    if relative:
        edges = edges * np.tile(size, 2)
    names = _crop_ids(boxes, box_id)
    outside = (edges[:, 0] >= size[:, 0]) | (edges[:, 1] >= size[:, 1]) | (edges[:, 2] <= 0) | (edges[:, 3] <= 0)
    lost = [
        [names[i], "read/boxes", "wrong_size",
         f"box {_shown(edges[i])} lies outside an image of {size[i, 0]:g} x {size[i, 1]:g} px"]
        for i in np.flatnonzero(outside)
    ]  # fmt: skip
    over = np.maximum(-edges[:, :2], edges[:, 2:] - size).max(axis=1)
    first, last = _grown(edges, size, pad, square)
    rows = pd.DataFrame({"image_id": boxes["_image"].to_numpy(object)}, index=pd.Index(names, dtype=object))
    for axis, letter in enumerate(("x", "y")):
        rows[f"box_{letter}"] = first[:, axis]
    rows["box_width"], rows["box_height"] = (last - first).T
    rows["box_clipped"] = over > 0.5
    for column in boxes.columns[6:]:
        rows[column] = boxes[column].to_numpy()
    if box_id is not None:
        rows = rows.drop(columns=box_id)
    return rows[~outside], lost


def _grown(edges: np.ndarray, size: np.ndarray, pad: float, square: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and last (exclusive) whole pixel of each box, grown by a share, made square, and held in the image."""
    low, high = edges[:, :2], edges[:, 2:]
    low, high = low - pad * (high - low), high + pad * (high - low)
    if not square:
        first, last = np.floor(low + 1e-6), np.ceil(high - 1e-6)
        first, last = np.clip(first, 0, size - 1), np.clip(last, 1, size)
        return first.astype(np.int64), np.maximum(last, first + 1).astype(np.int64)
    side = np.minimum(np.ceil((high - low).max(axis=1) - 1e-6), size.min(axis=1)).clip(1)[:, None]
    first = np.clip(np.round((low + high - side) / 2), 0, size - side)
    return first.astype(np.int64), (first + side).astype(np.int64)


def _crop_ids(boxes: pd.DataFrame, box_id: str | None) -> list[str]:
    if box_id is None:
        return [f"{i}#{k}" for i, k in zip(boxes["_image"], boxes["_number"])]
    if box_id not in boxes:
        raise InputError(f"no column {box_id!r} for the ids of boxes; {nearest(box_id, boxes.columns[6:])}")
    return boxes[box_id].map(str).tolist()


def _shown(edges: Sequence[float]) -> str:
    return "({:.4g}, {:.4g}) to ({:.4g}, {:.4g})".format(*edges)
