"""Looking once at every file of a table: several at a time, with progress, failures listed and counted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from biosae.data.failures import FailureLog
from biosae.data.samples import ReadError, Samples
from biosae.settings import settings

_CHUNK = 16


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
    """Apply ``look`` to every row, in ``n_jobs`` processes.

    Parameters
    ----------
    samples
        Rows to look at; ``look`` gets each as the reader would (``row["path"]`` is resolved).
    look
        Picklable; raises :class:`~biosae.data.samples.ReadError` for a file that cannot be used.
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
    from joblib import Parallel, delayed
    from tqdm.auto import tqdm

    n_jobs = settings.n_jobs if n_jobs is None else n_jobs
    parts = [range(a, min(a + _CHUNK, len(samples))) for a in range(0, len(samples), _CHUNK)]
    workers = Parallel(n_jobs=max(1, min(n_jobs, len(parts))), return_as="generator")
    found: dict[str, Any] = {}
    lost: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(failures) if failures is not None else Path(scratch) / "failures.csv"
        log = FailureLog(place, stage=stage, total=len(samples), max_failures=max_failures)
        with tqdm(total=len(samples), desc=stage, unit=unit, disable=not settings.progress) as bar:
            for done in workers(delayed(_look)(samples.select(part), look) for part in parts):
                for name, value, why in done:
                    if why is None:
                        found[name] = value
                    else:
                        lost.append([name, stage, *why])
                        log.add(name, *why)
                bar.update(len(done))
    return found, lost


def _look(samples: Samples, look: Callable[[Mapping[str, Any]], Any]) -> list[tuple[str, Any, tuple[str, str] | None]]:
    out = []
    for i, name in enumerate(samples.ids):
        try:
            out.append((name, look(samples.row(i)), None))
        except ReadError as error:
            out.append((name, None, (error.reason, error.detail)))
    return out
