"""Images of any size, one file a sample."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from biosae.data.failures import MAX_FAILURES
from biosae.data.samples import Samples
from biosae.errors import InputError
from biosae.read.crops import CropReader, Size, box_table, crop_rows, match_images
from biosae.read.decode import SUFFIXES, ImageReader
from biosae.read.scan import scan
from biosae.read.table import image_samples, record_table

if TYPE_CHECKING:
    import pandas as pd


def images(
    source: str | os.PathLike | pd.DataFrame,
    *,
    patient: str | None = ...,
    slide: str | None = None,
    sequence: str | None = None,
    site: str | None = None,
    location: str | None = None,
    scanner: str | None = None,
    collector: str | None = None,
    label: str | None = None,
    split: str | None = None,
    path: str = "path",
    mask: str | None = None,
    id: str | None = None,
    mpp: float | str | None = None,
    root: str | os.PathLike | None = None,
    page: int | None = None,
    parts: Mapping[int, str] | None = None,
    boxes: str | os.PathLike | pd.DataFrame | None = None,
    box_format: str = "xywh",
    relative: bool | None = None,
    min_confidence: float | None = None,
    box_image: str | None = None,
    box_id: str | None = None,
    pad: float = 0.0,
    square: bool = False,
    n_jobs: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Samples from a table or a folder of image files of any size (JPEG, PNG, TIFF, WebP, BMP), whole or cut by boxes.

    Nothing is decoded here; each file is opened when its sample is asked for. With ``boxes`` the headers of the images
    are read for their sizes.

    Parameters
    ----------
    source
        CSV, TSV or Parquet file, DataFrame, or a folder, which is searched with its subfolders and gives the columns
        ``path`` and ``folder`` (name of the file's own folder; pass ``label="folder"`` if that is the class).
    patient
        Column of the patient (animal, plant, donor): the unit that is independent of the others. Must be given;
        ``None`` says that it is unknown.
    slide, site, scanner, label, split
        Columns of these roles, if there are such. Columns of roles other than ``label`` are read as text.
    sequence
        Column of the burst or video that an image belongs to: images of one sequence are not independent.
    location, collector
        Columns of where an image was taken (camera, plot, herbarium) and by whom.
    path
        Column of the files' paths.
    mask
        Column of the files of part labels, one whole number a pixel; see ``samples.mask(i)``.
    id
        Column of unique sample ids. Default: the column ``sample_id``, else the path.
    mpp
        Micrometres per pixel: one number, or the name of a column.
    root
        Folder that relative paths start from. Default: the table's own folder; the current one for a DataFrame.
    page
        Page of multi-page files, from 0. None refuses such files.
    parts
        Names of the numbers in the masks, ``{1: "cytoplasm", 2: "nucleus"}``; kept in ``samples.meta["parts"]`` as
        name to number.
    boxes
        Table of boxes (as ``source``), one row a box, or the JSON file of MegaDetector: each box becomes a sample.
    box_format
        ``"xywh"`` (columns ``x, y, width, height``; x, y is the upper left corner), ``"xyxy"`` (``x_min, y_min, x_max,
        y_max``) or ``"cxcywh"`` (``x_center, y_center, width, height``, as YOLO writes).
    relative
        Whether boxes are shares of the image's sides (True) or pixels of the image as it is shown (False). None tells
        them apart where a number is above 2, or all are fractions between 0 and 1.
    min_confidence
        Boxes whose ``confidence`` is lower are left out. Must be given for the JSON of a detector.
    box_image
        Column of ``boxes`` with the id or the path of the image. Default: ``sample_id``, else ``path``, else ``file``.
    box_id
        Column of ``boxes`` with unique ids for the crops. Default ids: ``<image id>#<number of the box in its image>``.
    pad
        Share of its width and height by which a box is grown on each side.
    square
        Widen the shorter side; at the border the square is moved into the image, and made smaller only where it cannot
        fit.
    n_jobs
        Processes that read headers for ``boxes``; without boxes no file is opened here.
    max_failures
        Largest share of files (and of boxes) that may be absent or unusable, 0 to 1. Fewer give a warning.
    failures
        ``failures.csv`` to write: files that are absent; with ``boxes``, images whose header cannot be read.

    Returns
    -------
    Samples
        Files that are absent are in ``samples.failures``; their rows stay, and fail when they are read.
        With ``boxes``, one row a crop: the columns of its image, the columns of its box, ``image_id``, ``box_x, box_y,
        box_width, box_height`` (whole pixels of the image as it is shown) and ``box_clipped`` (it reached over the
        image's edge). Boxes that lie outside, and images that cannot be read, are in ``samples.failures`` and have no
        row; nor have images without a box.

    Raises
    ------
    InputError
        For absent columns, repeated ids, missing patients, columns that claim the same role, or boxes that cannot be
        understood.
    TooManyFailuresError
        If more files are absent than ``max_failures`` allows.

    Examples
    --------
    >>> samples = bs.read.images("photos", patient=None, label="folder")  # doctest: +SKIP
    >>> animals = bs.read.images(  # doctest: +SKIP
    ...     "photos", patient=None, boxes="megadetector.json", min_confidence=0.2, pad=0.1, square=True
    ... )
    """
    roles: dict[str, Any] = {
        "patient": patient, "slide": slide, "sequence": sequence, "site": site, "location": location,
        "scanner": scanner, "collector": collector, "label": label, "split": split, "path": path, "mask": mask,
    }  # fmt: skip
    meta = {"parts": _named_parts(parts, mask)} if parts is not None else {}
    if boxes is None:
        reader = ImageReader(page=page)
        return image_samples(
            source, reader, roles=roles, id=id, mpp=mpp, root=root, max_failures=max_failures, failures=failures,
            stage="read/images", meta=meta,
        )  # fmt: skip
    if not 0 <= pad < 100:
        raise InputError(f"pad={pad} must be a share of the box (0.1 grows it by a tenth on each side)")
    if isinstance(mpp, str):
        roles, mpp = {**roles, "mpp": mpp}, None
    obs, roles, root = record_table(source, roles=roles, id=id, root=root, suffixes=SUFFIXES)
    table, shares = box_table(
        boxes, box_format=box_format, relative=relative, min_confidence=min_confidence, box_image=box_image
    )
    obs.index = obs.index.map(str)
    ids = match_images(table, obs, roles["path"])
    lost = [
        [name, "read/boxes", "missing", "the table has no such image"] for name in table["_image"][ids.isna()].unique()
    ]
    table = table.assign(_image=ids)[ids.notna()]
    plain = Samples(
        obs.loc[obs.index.isin(table["_image"]), [roles["path"]]].rename(columns={roles["path"]: "path"}),
        ImageReader(page=page), roles={"patient": None}, root=root,
    )  # fmt: skip
    sizes, unread = scan(
        plain,
        Size(page),
        n_jobs=n_jobs,
        max_failures=max_failures,
        failures=failures,
        stage="read/images",
        unit="image",
    )
    table = table[table["_image"].isin(sizes)]
    rows, outside = crop_rows(table, sizes, relative=shares, pad=pad, square=square, box_id=box_id)
    lost += [*unread, *outside]
    if rows.empty:
        raise InputError("no box lies in an image; look at relative= and box_format=")
    if len(outside) > max_failures * len(table):
        raise InputError(
            f"{len(outside)} of {len(table)} boxes lie outside their image, e.g. {outside[0][0]}: {outside[0][3]}; "
            "look at relative= and box_format=, or raise max_failures"
        )
    if lost:
        warnings.warn(f"{len(lost)} images or boxes are not used (samples.failures), e.g. {lost[0]}", stacklevel=2)
    meta |= {"failures": lost, "images_without_box": int(len(obs) - table["_image"].nunique() - len(unread))}
    return Samples(_joined(obs, rows), CropReader(page=page), roles=roles, mpp=mpp, root=root, meta=meta)


def _joined(obs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of each crop's image, then its own."""
    clash = [c for c in rows if c in obs]
    if clash:
        raise InputError(f"the table of images has a column {clash[0]!r}, and so have the boxes; rename one")
    image = obs.loc[rows["image_id"]].set_axis(rows.index)
    for column in rows:
        image[column] = rows[column]
    return image.drop(columns="sample_id", errors="ignore")


def _named_parts(parts: Mapping[int, str], mask: str | None) -> dict[str, int]:
    if mask is None:
        raise InputError("parts= names the numbers in masks; pass mask= the column of the masks' files")
    named = {str(name): str(value) for value, name in parts.items()}  # a TOML or JSON file can only hold "1"
    if len(named) < len(parts) or not all(v.isdecimal() and int(v) <= 65535 for v in named.values()):
        raise InputError(f"parts={dict(parts)!r} must give different names to whole numbers from 0 to 65535")
    return {name: int(value) for name, value in named.items()}
