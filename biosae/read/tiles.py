"""Tiles: patches of one size and one resolution, cut from slides."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from biosae.data.failures import MAX_FAILURES
from biosae.data.samples import Samples
from biosae.read.decode import ImageReader
from biosae.read.table import image_samples

if TYPE_CHECKING:
    import pandas as pd


def tiles(
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
    size: int | tuple[int, int] | None = None,
    page: int | None = None,
    max_failures: float = MAX_FAILURES,
    failures: str | os.PathLike | None = None,
) -> Samples:
    """Samples from a table or a folder of tiles.

    As :func:`biosae.read.images`, whose parameters hold here too, with two differences: a tile whose size is not
    ``size`` is a ``wrong_size`` failure, and an unknown ``mpp`` is warned about, because encoders of tissue are trained
    at one resolution.

    Parameters
    ----------
    source, patient, slide, site, scanner, label, split, path, id, root, page, max_failures, failures
        See :func:`biosae.read.images`.
    mpp
        Micrometres per pixel: one number, or the name of a column. About 0.5 is 20x, 0.25 is 40x.
    size
        Size in pixels that every tile must have: one number for squares or ``(width, height)``. ``None`` does not
        check; the audit then says which sizes there are.

    Raises
    ------
    InputError, TooManyFailuresError
        See :func:`biosae.read.images`.

    Examples
    --------
    >>> samples = bs.read.tiles("tiles.csv", patient="case", site="centre", mpp=0.5, size=256)  # doctest: +SKIP
    """
    roles = {
        "patient": patient, "slide": slide, "site": site, "scanner": scanner, "label": label, "split": split,
        "path": path,
    }  # fmt: skip
    reader = ImageReader(size=size, page=page)
    samples = image_samples(
        source, reader, roles=roles, id=id, mpp=mpp, root=root, max_failures=max_failures, failures=failures,
        stage="read/tiles", meta={"noun": "tile"},
    )  # fmt: skip
    if mpp is None and "mpp" not in samples.obs:
        warnings.warn(
            "the resolution of these tiles is unknown: pass mpp= (micrometres per pixel), so that it can be compared "
            "with what an encoder expects",
            stacklevel=2,
        )
    return samples
