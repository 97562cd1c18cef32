"""Read every item once, to know what is really there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.files import hash_file
from biosae.settings import settings

_CHUNK = 64


def _image(samples: Samples, i: int, image: np.ndarray) -> dict[str, Any]:
    return {
        "width": image.shape[1], "height": image.shape[0], "blank": bool((image == image[0, 0]).all()),
        "pixels_sha256": _hash(image),
    }  # fmt: skip


def _signal(samples: Samples, i: int, signal: np.ndarray) -> dict[str, Any]:
    """A channel is flat if all its known values are equal; a signal is blank if every channel is flat or unknown."""
    known = np.isfinite(signal)
    low = np.where(known, signal, np.inf).min(axis=1, initial=np.inf)
    high = np.where(known, signal, -np.inf).max(axis=1, initial=-np.inf)
    if samples.rate is not None:
        seconds = signal.shape[1] / samples.rate
    else:
        seconds = float(samples.obs["duration"].iloc[i]) if "duration" in samples.obs else np.nan
    return {
        "n_channels": signal.shape[0], "n_times": signal.shape[1],
        "seconds": seconds, "missing_share": float(1 - known.mean()) if signal.size else 1.0,
        "n_flat": int((low == high).sum()), "blank": bool((low >= high).all()),
        "values_sha256": _hash(np.where(known, signal + np.float32(0), np.float32(np.nan))),
    }  # fmt: skip


def _vector(samples: Samples, i: int, vector: np.ndarray) -> dict[str, Any]:
    known = vector[np.isfinite(vector)]
    return {
        "length": len(vector), "n_not_finite": len(vector) - len(known),
        "blank": bool(len(known) == 0 or (known == known[0]).all()), "values_sha256": _hash(vector + np.float32(0)),
    }  # fmt: skip


# kind of item -> (what is looked at, its columns); "blank" and the hash stand in all of them
_LOOKS: dict[str, tuple[Callable[[Samples, int, np.ndarray], dict[str, Any]], tuple[str, ...]]] = {
    "image": (_image, ("width", "height", "blank", "file_sha256", "pixels_sha256")),
    "signal": (
        _signal,
        ("n_channels", "n_times", "seconds", "missing_share", "n_flat", "blank", "file_sha256", "values_sha256"),
    ),
    "features": (_vector, ("length", "n_not_finite", "blank", "file_sha256", "values_sha256")),
}


def columns(item: str) -> list[str]:
    """Columns of :func:`read_all` for a kind of item."""
    return [*_LOOKS[item][1], "reason", "detail"]


def hash_column(item: str) -> str:
    """The column that holds the hash of the decoded values."""
    return _LOOKS[item][1][-1]


def _hash(values: np.ndarray) -> str:
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


def _examine(samples: Samples, own_file: list[bool]) -> list[dict[str, Any]]:
    """What an item is, or the reason of failure, of each item."""
    look, _ = _LOOKS[samples.item]
    found = []
    for i in range(len(samples)):
        row: dict[str, Any] = dict.fromkeys(columns(samples.item))
        try:
            item = samples[i]
        except ReadError as error:
            row.update(reason=error.reason, detail=error.detail)
        else:
            row.update(look(samples, i, item))
            file = samples.file(i) if own_file[i] else None
            if file is not None and file.is_file():
                row["file_sha256"] = hash_file(file)
        found.append(row)
    return found


def read_all(samples: Samples, *, n_jobs: int) -> pd.DataFrame:
    """One row a sample (index ``sample_id``): size, hashes of the file and of the decoded values, or why it failed.

    Columns are :func:`columns`; ``blank`` says that all values are equal. ``file_sha256`` is missing where several
    items come from one file. Sets of fewer than 128 items are read in this process, larger ones in ``n_jobs`` of them
    (-1: one a core).
    """
    from joblib import Parallel, delayed, effective_n_jobs
    from tqdm.auto import tqdm

    bare = Samples(samples.obs, samples.reader, roles=samples.roles, root=samples.root)
    own = np.zeros(len(samples), bool)
    if "path" in samples.obs:
        own = ~samples.obs["path"].duplicated(keep=False).to_numpy()
    starts = range(0, len(samples), _CHUNK)
    workers = Parallel(n_jobs=min(effective_n_jobs(n_jobs), max(1, len(starts) // 2)), return_as="generator")
    tasks = (delayed(_examine)(bare.select(slice(a, a + _CHUNK)), own[a : a + _CHUNK].tolist()) for a in starts)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(samples), desc="audit", unit=samples.item, disable=not settings.progress) as bar:
        for done in workers(tasks):
            rows += done
            bar.update(len(done))
    return pd.DataFrame(rows, index=samples.ids, columns=columns(samples.item))
