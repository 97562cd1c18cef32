"""FAST: rows of one instance (slide, recording, sample) after the other, mixed in a buffer of limited size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import InputError

if TYPE_CHECKING:
    from biosae.sae.rows import Rows

ROLES = ("slide", "recording", "patient")
"""Columns of a stored table that say what an instance is, the narrowest first."""


class HalfFull:
    """Places of a buffer: rows go in by instances; once it is full, half of them come out in random order.

    Parameters
    ----------
    capacity
        Rows from which the buffer counts as full. An instance goes in whole, so up to ``2 * capacity - 1`` places are
        in use if no instance has more than ``capacity`` rows.

    References
    ----------
    Li et al. 2025, arXiv 2506.07691 (FAST).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self._places = np.arange(2 * capacity)

    @property
    def full(self) -> bool:
        """Whether half must come out before more goes in."""
        return self.count >= self.capacity

    @property
    def used(self) -> np.ndarray:
        """Places in use."""
        return self._places[: self.count].copy()

    def put(self, rows: int) -> np.ndarray:
        """Places for ``rows`` new rows, at most ``capacity``."""
        self.count += rows
        return self._places[self.count - rows : self.count].copy()

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Places of ``capacity / 2`` rows (all, if the buffer is not full) drawn at random; they are free again."""
        rng.shuffle(self._places[: self.count])
        out = max(1, self.capacity // 2) if self.full else self.count
        self.count -= out
        return self._places[self.count : self.count + out].copy()


def bounds(rows: Rows, groups: Any = None) -> np.ndarray:
    """First rows of the instances of a table, and its length, ascending (instances + 1,).

    An instance is a run of consecutive rows with one label: of ``groups`` if given, else of the column ``slide``,
    ``recording`` or ``patient`` of a stored table (the first that is there), else the tokens of one sample.

    Raises
    ------
    InputError
        If there is nothing to tell instances by, or ``groups`` does not fit the rows.
    """
    labels = groups
    if labels is None:
        columns = getattr(rows.obs, "columns", ())
        name = next((role for role in ROLES if role in columns), None)
        labels = rows.obs[name] if name else range(rows.n // rows.tokens) if rows.tokens > 1 else None
    if labels is None:
        raise InputError(
            "order='fast' feeds one slide, recording or sample after the other and must know them: pass groups, or "
            "embeddings whose table has a column 'slide', 'recording' or 'patient'"
        )
    seen: dict[str, int] = {}
    code = np.fromiter((seen.setdefault(str(g), len(seen)) for g in labels), np.int64)
    size = 1 if len(code) == rows.n else rows.tokens
    if len(code) * size != rows.n:
        raise InputError(f"groups has {len(code)} entries for {rows.n} rows")
    return np.concatenate([[0], (np.flatnonzero(np.diff(code)) + 1) * size, [rows.n]])


def pieces(edges: np.ndarray, capacity: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of every instance once, in random order; those longer than the buffer in parts, in order."""
    for instance in rng.permutation(len(edges) - 1):
        start, stop = int(edges[instance]), int(edges[instance + 1])
        for at in range(start, stop, capacity):
            yield at, min(at + capacity, stop)


class InstanceError:
    """Squared error averaged within instances first, then over them: long instances weigh no more than short ones.

    ``MSE = 1/(N H) sum_i 1/L_i sum_j ||x_ij - x_hat_ij||^2`` over N instances of L_i rows of H features. Rows may come
    in any split into blocks.
    """

    def __init__(self, n_instances: int, n_features: int) -> None:
        self.n_features = n_features
        self.error, self.length = np.zeros(n_instances), np.zeros(n_instances, np.int64)

    def update(self, x: np.ndarray, x_hat: np.ndarray, instance: np.ndarray) -> None:
        """Add rows (n, H), their reconstructions and the number of each row's instance (n,)."""
        square = np.square(np.asarray(x, np.float64) - x_hat).sum(1)
        self.error += np.bincount(instance, square, len(self.error))
        self.length += np.bincount(instance, minlength=len(self.length))

    @property
    def mse(self) -> float:
        """The average; instances without rows do not count, NaN if there is none with rows."""
        some = self.length > 0
        if not some.any():
            return float("nan")
        return float((self.error[some] / self.length[some]).mean() / self.n_features)


def instance_mse(
    coder: Any, X: Any, *, groups: Any = None, special: Sequence[int] | np.ndarray | None = None
) -> dict[str, float]:
    """Reconstruction error averaged within each instance first, over all rows and over special tokens alone.

    Parameters
    ----------
    coder
        A fitted SAE or other coder.
    X
        Embeddings (n, d).
    groups
        Instance (slide, recording) of each row or sample; rows with one label are one instance wherever they stand.
        None: the columns ``slide``, ``recording`` or ``patient``, else the tokens of a sample.
    special
        Special tokens: a mask (n,), or the positions that class and register tokens have within a sample.

    Returns
    -------
    dict
        ``mse``, ``n_instances`` and, with ``special``, ``mse_special`` and ``n_special`` (rows).

    Raises
    ------
    InputError
        If instances cannot be told, or ``groups`` or ``special`` does not fit the rows.

    References
    ----------
    Li et al. 2025, arXiv 2506.07691: MSE and MSE_st of FAST.
    """
    rows = coder._rows(X)
    if rows.n is None:
        raise InputError("instances cannot be told in chunks; pass one table")
    if groups is None:
        code = np.repeat(*_runs(bounds(rows)))
    else:
        names = np.unique(np.asarray([str(g) for g in groups], dtype=object), return_inverse=True)[1]
        code = names if len(names) == rows.n else np.repeat(names, rows.tokens)
        if len(code) != rows.n:
            raise InputError(f"groups has {len(names)} entries for {rows.n} rows")
    chosen = None if special is None else _special(np.asarray(special), rows)
    everything, marked = (InstanceError(int(code.max()) + 1, rows.d) for _ in range(2))
    for start, x in rows.blocks():
        x_hat, part = coder._decode(coder._codes(x), x), code[start : start + len(x)]
        everything.update(x, x_hat, part)
        if chosen is not None:
            here = chosen[start : start + len(x)]
            marked.update(x[here], x_hat[here], part[here])
    found = {"mse": everything.mse, "n_instances": int((everything.length > 0).sum())}
    return found if chosen is None else found | {"mse_special": marked.mse, "n_special": int(marked.length.sum())}


def _runs(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(edges) - 1), np.diff(edges)


def _special(special: np.ndarray, rows: Rows) -> np.ndarray:
    """Mask (n,) of the special rows."""
    if special.dtype == bool:
        if special.shape != (rows.n,):
            raise InputError(
                f"the mask special has shape {special.shape}; it needs one entry for each of {rows.n} rows"
            )
        return special
    if special.size and not (special.min() >= 0 and special.max() < rows.tokens):
        raise InputError(f"special={special.tolist()} must be positions of tokens, 0 to {rows.tokens - 1}")
    return np.isin(np.arange(rows.n) % rows.tokens, special)
