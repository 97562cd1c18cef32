"""``failures.csv``: what could not be done, item by item, shared by every stage that works through many items."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from biosae.errors import InputError, TooManyFailuresError
from biosae.files import write_table

COLUMNS = ("item", "stage", "reason", "detail")
MAX_FAILURES = 0.05


def read_failures(path: str | os.PathLike) -> Any:
    """Table of failures (columns ``item, stage, reason, detail``, all strings); empty if there is no file.

    A last line that a killed run left half-written is dropped.
    """
    import pandas as pd

    path = Path(path)
    rows = []
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        complete = text[: text.rfind("\n") + 1]
        rows = [row for row in csv.reader(io.StringIO(complete, newline="")) if len(row) == len(COLUMNS)][1:]
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)


class FailureLog:
    """Collects failed items of one stage in a ``failures.csv`` and stops the stage when they are too many.

    Rows of other stages in the same file stay. Each failure is on disk before :meth:`add` returns.

    Parameters
    ----------
    path
        The CSV file; written only once something fails (an older file is rewritten without this stage's rows). None
        keeps no file.
    stage
        Name of the stage, for example ``"embed"``.
    total
        Items that the stage was asked to do: the denominator of the share.
    max_failures
        Largest share of failed items, 0 to 1, that is still acceptable. 0 stops at the first failure, 1 never.
    resume
        Keep and count the rows that an interrupted run of this stage left.

    Examples
    --------
    >>> log = FailureLog("runs/study/failures.csv", stage="embed", total=len(samples))  # doctest: +SKIP
    >>> try:  # doctest: +SKIP
    ...     image = samples[i]
    ... except ReadError as error:
    ...     log.add(samples.ids[i], error.reason, error.detail)
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        *,
        stage: str,
        total: int,
        max_failures: float = MAX_FAILURES,
        resume: bool = False,
    ) -> None:
        if not 0 <= max_failures <= 1:
            raise InputError(f"max_failures={max_failures} must be a share between 0 and 1 (0.05 allows 5 %)")
        self.path = None if path is None else Path(path)
        self.stage, self.total, self.max_failures = stage, total, max_failures
        self.reasons: dict[str, str] = {}
        self._first: list[str] = []
        if self.path is not None and self.path.is_file():
            old = read_failures(self.path)
            mine = old["stage"] == stage
            if resume:
                self.reasons = dict(zip(old.loc[mine, "item"], old.loc[mine, "reason"]))
            write_table(self.path, old if resume else old[~mine])

    def __len__(self) -> int:
        return len(self.reasons)

    def __contains__(self, item: str) -> bool:
        return item in self.reasons

    def add(self, item: str, reason: str, detail: str = "") -> None:
        """Record one failed item (once), then check the share.

        Raises
        ------
        TooManyFailuresError
            If more than ``max_failures * total`` items have failed.
        """
        if item not in self.reasons:
            self.reasons[item] = reason
            if len(self._first) < 3:
                self._first.append(f"{item}: {reason}: {detail}")
            if self.path is not None:
                self._append(item, reason, detail)
        self.check()

    def check(self) -> None:
        """Raise :class:`TooManyFailuresError` if too many items have failed."""
        if len(self) > self.max_failures * self.total:
            counts = {r: list(self.reasons.values()).count(r) for r in sorted(set(self.reasons.values()))}
            shown = ", ".join(f"{n} {reason}" for reason, n in counts.items())
            raise TooManyFailuresError(
                f"stage {self.stage!r} stopped: {len(self)} of {self.total} items failed ({shown}), more than "
                f"max_failures={self.max_failures:g} allows. {self._where()}. Repair or drop them, or "
                "raise max_failures if this loss is acceptable"
            )

    def _where(self) -> str:
        if self.path is not None:
            return f"They are listed in {self.path}"
        more = "; ..." * (len(self) > len(self._first))
        return f"{'; '.join(self._first)}{more}. Pass failures='failures.csv' to have them listed"

    def _append(self, item: str, reason: str, detail: str) -> None:
        line = io.StringIO(newline="")
        writer = csv.writer(line, lineterminator="\n")
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.writerow(COLUMNS)
        writer.writerow([item, self.stage, reason, " ".join(str(detail).split())])
        with open(self.path, "a", encoding="utf-8", newline="") as stream:
            stream.write(line.getvalue())
