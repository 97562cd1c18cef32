"""Looking once at every file of a table: several at a time, with progress, failures listed and counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from biosae.data.failures import FailureLog
from biosae.data.items import ReadError
from biosae.data.samples import Samples
from biosae.settings import settings

_Found = tuple[str, Any, tuple[str, str] | None]  # sample id, what was found, (reason, detail) if it failed

_CHUNK = 16  # most rows that a worker gets at once
_PATIENCE = 2.0  # s of work before workers, whose start takes as long, are worth it


def scan(
    samples: Samples,
    look: Callable[[Mapping[str, Any]], Any],
    *,
    n_jobs: int | None,
    max_failures: float,
    failures: str | os.PathLike | None,
    stage: str,
    unit: str,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Apply ``look`` to every row, in ``n_jobs`` processes (-1: one a core); None starts alone and calls
    ``settings.n_jobs`` of them when it takes longer than seconds.

    Parameters
    ----------
    samples
        Rows to look at; ``look`` gets each as the reader would (``row["path"]`` is resolved).
    look
        Picklable; raises :class:`~biosae.data.items.ReadError` for a file that cannot be used.
    failures
        ``failures.csv`` to write to; None writes none.
    stage, unit
        Names for the log and for the progress bar.

    Returns
    -------
    found
        Sample id to what ``look`` returned, in row order, failed rows left out.
    lost
        ``[item, stage, reason, detail]`` of each failed row.

    Raises
    ------
    TooManyFailuresError
        If more than ``max_failures`` of the rows fail.
    """
    from tqdm.auto import tqdm

    found: dict[str, Any] = {}
    lost: list[list[str]] = []
    log = FailureLog(failures, stage=stage, total=len(samples), max_failures=max_failures)
    with tqdm(total=len(samples), desc=stage, unit=unit, disable=not settings.progress) as bar:
        for name, value, why in _looked(samples, look, n_jobs):
            if why is None:
                found[name] = value
            else:
                lost.append([name, stage, *why])
                log.add(name, *why)
            bar.update()
    return found, lost


def _looked(samples: Samples, look: Callable[[Mapping[str, Any]], Any], n_jobs: int | None) -> Iterator[_Found]:
    """What was found, row by row and in their order."""
    from joblib import Parallel, delayed, effective_n_jobs

    begun, i = time.monotonic(), 0
    jobs = effective_n_jobs((settings.n_jobs if n_jobs is None else n_jobs) or 1)
    while i < len(samples) and (jobs == 1 or (n_jobs is None and time.monotonic() - begun < _PATIENCE)):
        yield from _look(samples.select(slice(i, i + 1)), look)
        i += 1
    rest = len(samples) - i
    if not rest:
        return
    size = max(1, min(_CHUNK, rest // (4 * jobs)))
    parts = [slice(a, a + size) for a in range(i, len(samples), size)]
    for done in Parallel(n_jobs=jobs, return_as="generator")(delayed(_look)(samples.select(p), look) for p in parts):
        yield from done


def _look(samples: Samples, look: Callable[[Mapping[str, Any]], Any]) -> list[_Found]:
    out = []
    for i, name in enumerate(samples.ids):
        try:
            out.append((name, look(samples.row(i)), None))
        except ReadError as error:
            out.append((name, None, (error.reason, error.detail)))
    return out
