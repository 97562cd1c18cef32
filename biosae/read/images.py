"""Images of any size, one file a sample."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from biosae.data.failures import MAX_FAILURES
from biosae.data.samples import Samples
from biosae.read.decode import ImageReader
from biosae.read.table import image_samples

if TYPE_CHECKING:
    import pandas as pd


def images(
    source: str | os.PathLike | pd.DataFrame,
    *,
    patient: str | None = ...,
    slide: str | None = None,
    site: str | None = None,
    scanner: str | None = None,
    label: str | None = None,
    split: str | None = None,
    path: str = "path",
    id: str | None = None,
    mpp: float | str | None = None,
    root: str | os.PathLike | None = None,
    page: int | None = None,
    max_failures: float = MAX_FAILURES,
) -> Samples:
    """Samples from a table or a folder of image files of any size (JPEG, PNG, TIFF, WebP, BMP).

    Nothing is decoded here; each file is opened when its sample is asked for.

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
    path
        Column of the files' paths.
    id
        Column of unique sample ids. Default: the column ``sample_id``, else the path.
    mpp
        Micrometres per pixel: one number, or the name of a column.
    root
        Folder that relative paths start from. Default: the table's own folder; the current one for a DataFrame.
    page
        Page of multi-page files, from 0. None refuses such files.
    max_failures
        Largest share of files that may be absent, 0 to 1. Fewer give a warning.

    Raises
    ------
    InputError
        For absent columns, repeated ids, missing patients, or columns that claim the same role.
    TooManyFailuresError
        If more files are absent than ``max_failures`` allows.

    Examples
    --------
    >>> samples = bs.read.images("photos", patient=None, label="folder")  # doctest: +SKIP
    """
    roles = {
        "patient": patient, "slide": slide, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    reader = ImageReader(page=page)
    return image_samples(source, reader, roles=roles, id=id, mpp=mpp, root=root, max_failures=max_failures)
