"""Decode every item once, to know what is really there."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.samples import ReadError, Samples
from biosae.files import hash_file
from biosae.settings import settings

_CHUNK = 64
COLUMNS = ["width", "height", "blank", "file_sha256", "pixels_sha256", "reason", "detail"]


def _examine(samples: Samples) -> list[dict[str, Any]]:
    """Size, hashes or the reason of failure of each item."""
    found = []
    for i in range(len(samples)):
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        try:
            image = samples[i]
        except ReadError as error:
            row.update(reason=error.reason, detail=error.detail)
        else:
            file = samples.file(i)
            pixels = hashlib.sha256(repr(image.shape).encode())
            pixels.update(np.ascontiguousarray(image))
            row.update(
                width=image.shape[1],
                height=image.shape[0],
                blank=bool((image == image[0, 0]).all()),
                file_sha256=None if file is None else hash_file(file),
                pixels_sha256=pixels.hexdigest(),
            )
        found.append(row)
    return found


def read_all(samples: Samples, *, n_jobs: int) -> pd.DataFrame:
    """One row a sample (index ``sample_id``): size, hashes of the file and of the decoded pixels, or why it failed.

    Columns are ``COLUMNS``; ``blank`` says that all pixels are equal. Sets of fewer than 128 items are read in this
    process, larger ones in ``n_jobs`` of them.
    """
    from joblib import Parallel, delayed
    from tqdm.auto import tqdm

    bare = Samples(samples.obs, samples.reader, roles=samples.roles, root=samples.root)
    parts = [bare.select(slice(a, a + _CHUNK)) for a in range(0, len(samples), _CHUNK)]
    workers = Parallel(n_jobs=min(n_jobs, max(1, len(parts) // 2)), return_as="generator")
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(samples), desc="audit", unit="image", disable=not settings.progress) as bar:
        for done in workers(delayed(_examine)(part) for part in parts):
            rows += done
            bar.update(len(done))
    return pd.DataFrame(rows, index=samples.ids, columns=COLUMNS)
