"""A second table, row by row beside the embeddings: gradients, targets, or another modality of the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from biosae.errors import InputError
from biosae.sae.normalise import Normaliser, inverse
from biosae.sae.rows import BLOCK, Rows

KINDS = ("gradient", "target", "modality")


class Joined:
    """Two tables as one, for the stream: rows ``[x | y]``, for ``modality`` ``[x | y | has_x | has_y]``.

    Parameters
    ----------
    X
        Embeddings (n, d).
    Y
        (n, d2), of the same rows in the same order. Where both are ``Embeddings`` or data frames with an index of their
        own, the sample ids must agree; an array has none.
    kind
        One of :data:`KINDS`. For ``modality`` rows of Y, or of X, that are NaN throughout are absent: they become 0 and
        their ``has`` column is 0.

    Raises
    ------
    InputError
        If the numbers of rows or the sample ids differ, a gradient has another width than X, or a row has neither
        modality.
    """

    def __init__(self, X: Any, Y: Any, kind: str) -> None:
        self.kind = kind
        self.tables = [_Table(X, partly=kind == "modality"), _Table(Y, partly=kind == "modality")]
        first, second = self.tables
        if first.n != second.n:
            raise InputError(f"the partner table has {second.n} rows, X has {first.n}; give one row for each row of X")
        if first.ids is not None and second.ids is not None and not np.array_equal(first.ids, second.ids):
            raise InputError(
                "X and its partner hold other samples, or the same in another order: select() embeddings alike, "
                "reindex() a data frame; to_numpy() says that rows belong together by their position"
            )
        if kind == "gradient" and first.d != second.d:
            raise InputError(f"gradients have {second.d} columns, the embeddings have {first.d}")
        self.widths = (first.d, second.d)
        self.shape = (first.n, sum(self.widths) + 2 * (kind == "modality"))
        self.dtype = np.dtype(np.float32)
        self.identity, self.fingerprint = first.identity, first.fingerprint
        known = [t for t in self.tables if t.obs is not None]
        known = next((t for t in known if "patient" in t.obs.columns), known[0] if known else first)
        self.obs, self.tokens_per_sample = known.obs, known.tokens  # whichever says who the rows are of

    def __getitem__(self, which: Any) -> np.ndarray:
        parts = [table[which] for table in self.tables]
        if self.kind != "modality":
            return np.concatenate(parts, axis=1)
        has = []
        for part in parts:
            absent = np.isnan(part).all(axis=1)
            part[absent] = 0
            has.append(~absent[:, None])
        if not (has[0] | has[1]).all():
            raise InputError("a row has neither modality (NaN throughout in both tables); leave it out")
        return np.concatenate([*parts, *has], axis=1, dtype=np.float32)

    def blocks(self, rows: int = BLOCK) -> Iterator[np.ndarray]:
        """Joined rows from first to last."""
        for start in range(0, self.shape[0], rows):
            yield self[start : start + rows]


class _Table:
    """Float32 rows of an array or of stored embeddings."""

    def __init__(self, X: Any, *, partly: bool) -> None:
        index = getattr(getattr(X, "obs", X), "index", None)
        named = hasattr(index, "map") and not hasattr(index, "step")  # not a list's method, nor 0, 1, 2 ...
        if partly and not callable(getattr(X, "blocks", None)):
            X = np.asarray(X, np.float32)
            rows = Rows(np.where(np.isnan(X).all(axis=1, keepdims=True), 0, X))
            self.source = X
        else:
            rows = Rows(X)
            self.source = rows.source
        if rows.n is None:
            raise InputError("chunks cannot be matched to a second table; pass two tables")
        self.n, self.d, self.obs, self.tokens = rows.n, rows.d, rows.obs, rows.tokens
        self.ids = np.repeat(np.asarray(index.map(str), dtype=object), self.tokens) if named else None
        self.identity, self.fingerprint = rows.identity, rows.fingerprint

    def __getitem__(self, which: Any) -> np.ndarray:
        found = self.source[which]
        if isinstance(found, torch.Tensor):
            found = found.float().numpy()
        return np.array(found, np.float32)


@dataclass
class Scalings:
    """The scaling of each table of joined rows, behind the interface of one :class:`Normaliser`."""

    kind: str
    widths: tuple[int, int]
    parts: tuple[Normaliser, Normaliser | None]
    """Gradients follow the scaling of the rows: None."""

    @classmethod
    def fit(
        cls, mode: str, blocks: Callable[[], Iterable[np.ndarray]], *, kind: str, widths: tuple[int, int]
    ) -> Scalings:
        """The same mode for both tables, each from the rows that it has; ``blocks`` starts one pass through them."""
        first = Normaliser.fit(mode, (_own(b, widths, 0) for b in blocks()))
        second = None if kind == "gradient" else Normaliser.fit(mode, (_own(b, widths, 1) for b in blocks()))
        return cls(kind, widths, (first, second))

    @property
    def offset(self) -> dict[str, Any]:
        """What is said about the first table."""
        return self.parts[0].offset

    @property
    def rowwise(self) -> str | None:
        """Whether any table has a scale for each row."""
        return next((p.rowwise for p in self.parts if p is not None and p.rowwise), None)

    def ready(self, x: np.ndarray) -> np.ndarray:
        """Joined raw rows after the row-wise parts."""
        return np.concatenate(
            [
                part if scaling is None else scaling.ready(part)
                for part, scaling in zip(split(x, self.widths), (*self.parts, None), strict=True)
            ],
            axis=1,
        )

    def apply(self, u: torch.Tensor) -> torch.Tensor:
        """Joined rows for training; absent rows are 0."""
        x, y, has = split(u, self.widths)
        x = self.parts[0].apply(x)
        y = gradients(self.parts[0], y) if self.parts[1] is None else self.parts[1].apply(y)
        if self.kind == "modality":
            x, y = x * has[:, :1], y * has[:, 1:]
        return torch.cat([x, y, has], dim=1)


def gradients(scaling: Normaliser, g: torch.Tensor) -> torch.Tensor:
    """Gradients by raw rows (n, d) as gradients by rows y = c (x - mean) W, but for the factor c: g W^-T."""
    if scaling.whiten is None:
        return g
    return g @ torch.from_numpy(inverse(scaling.whiten)).T.to(g)


def _own(block: np.ndarray, widths: tuple[int, int], table: int) -> np.ndarray:
    """The rows that one table has."""
    *parts, has = split(block, widths)
    return parts[table][has[:, table] > 0] if has.shape[1] else parts[table]


def split(rows: Any, widths: tuple[int, int]) -> tuple[Any, Any, Any]:
    """The columns of joined rows: x (n, d), y (n, d2), and the rest (n, 0) or, of modalities, has (n, 2)."""
    d, end = widths[0], sum(widths)
    return rows[:, :d], rows[:, d:end], rows[:, end:]
