"""What ``fit`` and ``transform`` accept as rows, behind one small interface: shape, blocks, rows by number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError

BLOCK = 16384
"""Rows of one block when reading through."""
IN_MEMORY = 2 * 1024**3
"""Bytes of float32 rows up to which a stored table is read into memory once for training."""


class Rows:
    """Rows (n, d) of an array, tensor, data frame, or an object with ``.shape``, ``.blocks()`` and ``[int_array]``.

    Raises
    ------
    InputError
        If the input is sparse, not two-dimensional, not numeric, or empty.
    """

    def __init__(self, X: Any) -> None:
        self.stored = callable(getattr(X, "blocks", None)) and hasattr(X, "shape")
        self.source = X if self.stored else _as_array(X)
        shape = tuple(self.source.shape)
        if len(shape) != 2:
            hint = (
                ". Reshape your data: X.reshape(-1, 1) for one feature, X.reshape(1, -1) for one row"
                if len(shape) == 1
                else ""
            )
            raise InputError(f"expected a table (rows, features), found shape {shape}{hint}")
        self.n, self.d = int(shape[0]), int(shape[1])
        if self.n == 0 or self.d == 0:
            raise InputError(
                f"found {self.n} row(s) and {self.d} feature(s) (shape={shape}) while a minimum of 1 is required."
            )
        self.identity: dict[str, Any] | None = (getattr(X, "identity", None) if self.stored else None) or None
        self.fingerprint: str | None = getattr(X, "fingerprint", None) if self.identity else None
        self.obs = getattr(X, "obs", None) if self.stored else None
        self.tokens = int(getattr(X, "tokens_per_sample", 1)) if self.stored else 1

    def blocks(self, rows: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """``(start, float32 rows)`` from first to last, each checked to be finite.

        Raises
        ------
        InputError
            That names the first rows holding NaN or infinity.
        """
        if self.stored:
            for start, block in self.source.blocks(rows):
                yield start, self._checked(block, np.arange(start, start + len(block)))
        else:
            for start in range(0, self.n, rows):
                block = self.source[start : start + rows]
                yield start, self._checked(block, np.arange(start, start + len(block)))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows by number as float32, checked to be finite."""
        if not self.stored:
            return self._checked(self.source[index], index)
        order = np.argsort(index, kind="stable")  # a memory map likes rising row numbers
        block = np.empty((len(index), self.d), np.float32)
        block[order] = self.source[index[order]]
        return self._checked(block, index)

    def _checked(self, block: Any, numbers: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(block, dtype=np.float32)
        if not np.isfinite(block.sum(dtype=np.float64)):
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                shown = ", ".join(self._name(int(r)) for r in numbers[bad][:5])
                more = " ..." if bad.sum() > 5 else ""
                raise InputError(
                    f"NaN or infinity in {int(bad.sum())} of the {len(block)} rows just read, first at row "
                    f"{shown}{more}; embed these samples again or leave them out"
                )
        return block

    def _name(self, row: int) -> str:
        index = getattr(self.obs, "index", None)
        return f"{row} ({index[row // self.tokens]})" if index is not None else str(row)


def _as_array(X: Any) -> np.ndarray:
    if scipy.sparse.issparse(X) or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise InputError("sparse input is not supported: an SAE reads dense embeddings; pass X.toarray()")
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        X = (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    array = np.asarray(X)
    if array.dtype.kind == "c":
        raise InputError("Complex data not supported: an SAE reads real numbers")
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"X holds values that are not numbers ({error}); pass numeric columns only") from None
    return array


def groups_of(rows: Rows, groups: Any) -> tuple[np.ndarray | None, str]:
    """Group label of each row as text, and what the groups are.

    Given ``groups`` come first; then the ``patient`` column of a stored table; then, for token rows, the sample.
    Missing labels form one group of their own.

    Raises
    ------
    InputError
        If ``groups`` has neither one entry a row nor one entry a sample.
    """
    what = "groups"
    if groups is None and rows.obs is not None and "patient" in getattr(rows.obs, "columns", ()):
        groups, what = rows.obs["patient"], "patient"
    if groups is None and rows.tokens > 1:
        groups, what = np.arange(rows.n // rows.tokens), "sample"
    if groups is None:
        return None, "row"
    labels = np.asarray([str(g) for g in groups], dtype=object)
    if len(labels) != rows.n and len(labels) * rows.tokens == rows.n:
        labels = np.repeat(labels, rows.tokens)
    if len(labels) != rows.n:
        raise InputError(f"groups has {len(labels)} entries for {rows.n} rows")
    return labels, what


def hold_out(n: int, labels: np.ndarray | None, share: float, rng: np.random.Generator) -> np.ndarray:
    """Boolean (n,): rows held out for validation, about ``share`` of them, whole groups where groups are known.

    Groups are taken in random order while the held-out part stays within twice the share; with few groups this may
    leave none, as no patient may lie on both sides.
    """
    held = np.zeros(n, bool)
    if share == 0 or n < 20:
        return held
    wanted = max(1, round(share * n))
    if labels is None:
        held[rng.permutation(n)[:wanted]] = True
        return held
    names, code, counts = np.unique(labels.astype(str), return_inverse=True, return_counts=True)
    chosen, total = [], 0
    for g in rng.permutation(len(names)):
        if total >= wanted or len(names) - len(chosen) < 2:
            break
        if total + counts[g] <= 2 * wanted:
            chosen.append(g)
            total += counts[g]
    return np.isin(code, chosen)
