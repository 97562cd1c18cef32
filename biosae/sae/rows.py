"""What ``fit`` and ``transform`` accept as rows, behind one small interface; and which rows are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError

BLOCK = 4096
"""Rows of one block when reading through."""
IN_MEMORY = 2 * 1024**3
"""Bytes of float32 rows up to which a table is held in memory for training."""
MOST_HELD = 200_000
"""Rows held out at most where no groups are known."""
NOT_FINITE = {torch.float16: 0xF800, torch.bfloat16: 0xFF00, torch.float32: 0xFF000000}
"""Number types that rows keep (others become float32), and the least value of the bits of NaN or infinity without
their sign, that is, shifted by one."""


class Rows:
    """Rows (n, d) of an array, tensor, data frame, an object with ``.shape``, ``.blocks()`` and ``[a:b]``, or chunks.

    Chunks are (n_i, d) arrays or tensors that a list, a ``DataLoader`` or a callable without arguments gives again at
    every pass; how many rows they have is not known.

    Attributes
    ----------
    n : int or None
        Number of rows; None for chunks.
    d : int
        Number of features.
    dtype : torch.dtype
        float16, bfloat16 or float32: in which the rows lose nothing that float32 would keep.

    Raises
    ------
    InputError
        If the input is sparse, not two-dimensional, not numeric, empty, or an iterator that can be read only once.
    """

    def __init__(self, X: Any) -> None:
        self.stored = callable(getattr(X, "blocks", None)) and hasattr(X, "shape")
        self._chunks = None if self.stored else _chunks(X)
        if self._chunks is not None:
            first = next((chunk for _, chunk in self.pieces()), None)
            if first is None:
                raise InputError("found no rows in these chunks; a minimum of 1 is required")
            self.source, shape, self.dtype = None, tuple(first.shape), first.dtype
        else:
            self.source = X if self.stored else _as_array(X)
            shape, self.dtype = tuple(self.source.shape), _kept(getattr(self.source, "dtype", None))
        if len(shape) != 2:
            hint = (
                ". Reshape your data: X.reshape(-1, 1) for one feature, X.reshape(1, -1) for one row"
                if len(shape) == 1
                else ""
            )
            raise InputError(f"expected a table (rows, features), found shape {shape}{hint}")
        self.n, self.d = None if self._chunks else int(shape[0]), int(shape[1])
        if shape[0] == 0 or shape[1] == 0:
            raise InputError(
                f"found {shape[0]} row(s) and {shape[1]} feature(s) (shape={shape}) while a minimum of 1 is required."
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
        if self._chunks is not None:
            for start, chunk in self.pieces():
                yield start, chunk.float().numpy()
        else:
            for start in range(0, self.n, rows):
                yield start, self.read(start, min(start + rows, self.n)).float().numpy()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` as they are stored, or as float32, checked to be finite."""
        raw = getattr(self.source, "raw", None) if self.stored else None
        block = _tensor(raw(start, stop) if raw else self.source[start:stop])
        return _checked(block, lambda bad: self._name(start + bad))

    def take(self, index: np.ndarray) -> np.ndarray:
        """Rows by number as float32, checked to be finite."""
        if self.stored:
            order = np.argsort(index, kind="stable")  # a memory map likes rising row numbers
            block = np.empty((len(index), self.d), np.float32)
            block[order] = self.source[index[order]]
        else:
            block = self.source[index]
        return _checked(_tensor(block), lambda bad: self._name(int(index[bad]))).float().numpy()

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """One pass through the chunks: number of the first row, and the rows, checked.

        Raises
        ------
        InputError
            If a chunk is not a table of the same width and number type as the first, or holds NaN or infinity.
        """
        start, like = 0, None
        for number, chunk in enumerate(self._chunks()):
            if isinstance(chunk, list | tuple) and len(chunk) and getattr(chunk[0], "ndim", 0) == 2:
                chunk = chunk[0]  # a DataLoader gives (rows, ...)
            rows = _tensor(_as_array(chunk))
            what = (tuple(rows.shape[1:]), rows.dtype)
            like = like or what
            if rows.ndim != 2 or what != like:
                raise InputError(
                    f"chunk {number} has shape {tuple(rows.shape)} and holds {rows.dtype}; every chunk must be a table "
                    f"(rows, features) with the width and number type of the first: {like[0]}, {like[1]}"
                )
            if len(rows):
                yield start, _checked(rows, lambda bad, number=number: f"{bad} of chunk {number}")
            start += len(rows)

    def _name(self, row: int) -> str:
        index = getattr(self.obs, "index", None)
        return f"{row} ({index[row // self.tokens]})" if index is not None else str(row)


def bits(rows: torch.Tensor) -> np.ndarray:
    """The same memory as unsigned integers of the same width; numpy has no bfloat16 and is slow with float16."""
    array = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return array.view(np.dtype(f"u{array.itemsize}"))


def _checked(rows: torch.Tensor, name: Callable[[int], str]) -> torch.Tensor:
    limit, step, found = NOT_FINITE[rows.dtype], max(1, 2**18 // max(rows.shape[1], 1)), []
    for start in range(0, len(rows), step):
        unsigned = np.left_shift(bits(rows[start : start + step]), 1)
        if unsigned.max(initial=0) >= limit:
            found += (start + np.flatnonzero(unsigned.max(1) >= limit)).tolist()
    if found:
        shown = ", ".join(map(name, found[:5])) + (" ..." if len(found) > 5 else "")
        raise InputError(
            f"NaN or infinity in {len(found)} of the {len(rows)} rows just read, first at row {shown}; embed these "
            "samples again or leave them out"
        )
    return rows


def _kept(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype if dtype in NOT_FINITE else torch.float32
    return torch.float16 if dtype == np.float16 else torch.float32


def _tensor(block: Any) -> torch.Tensor:
    """Contiguous tensor of a kept number type; shares memory where it can."""
    if not isinstance(block, torch.Tensor):
        block = np.asarray(block)
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(block, np.float16 if block.dtype == np.float16 else np.float32)
        block = torch.from_numpy(block if block.flags.writeable else block.copy())
    return block.to(_kept(block.dtype)).contiguous()


def _as_array(X: Any) -> np.ndarray | torch.Tensor:
    """Numbers of ``X`` on the CPU; a tensor only where numpy lacks its type."""
    if scipy.sparse.issparse(X) or (isinstance(X, torch.Tensor) and X.layout != torch.strided):
        raise InputError("sparse input is not supported: an SAE reads dense embeddings; pass X.toarray()")
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        if X.dtype == torch.bfloat16:
            return X
        X = X.numpy()
    array = np.asarray(X)
    if array.dtype.kind == "c":
        raise InputError("Complex data not supported: an SAE reads real numbers")
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"X holds values that are not numbers ({error}); pass numeric columns only") from None
    return array


def _chunks(X: Any) -> Callable[[], Iterator] | None:
    """What starts a pass through chunks; None if ``X`` is one table."""
    if hasattr(X, "shape") or hasattr(X, "__array__"):
        return None
    if isinstance(X, list | tuple):
        return (lambda: iter(X)) if len(X) and getattr(X[0], "ndim", 0) == 2 else None
    if hasattr(X, "__next__"):
        raise InputError(
            "a generator can be read only once, training reads it every epoch; pass a callable that starts a new one: "
            "fit(lambda: chunks(...)), or a list of arrays"
        )
    if callable(X):
        if X() is X():
            raise InputError("this callable gives the same iterator again; it must start a new one at every call")
        return lambda: iter(X())
    return (lambda: iter(X)) if isinstance(X, Iterable) and not isinstance(X, str | bytes | Mapping) else None


# ------------------------------------------------------------------------------------------------------- held out


@dataclass(frozen=True)
class Held:
    """Rows held out for validation: some units (samples or rows) of ``size`` consecutive rows each.

    Attributes
    ----------
    units : ndarray of int64
        Ascending numbers of the units; unit u is the rows ``u * size`` to ``(u + 1) * size``.
    size : int
        Rows of a unit.
    by : str
        What was kept together: ``groups``, ``patient``, ``sample`` or ``row``.
    n_groups : int
        How many groups (or samples) are held out; 0 by ``row``.
    training_groups : frozenset of str
        Names of the groups trained on; empty by ``row`` and ``sample``.
    """

    units: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    size: int = 1
    by: str = "row"
    n_groups: int = 0
    training_groups: frozenset[str] = frozenset()

    @classmethod
    def draw(cls, rows: Rows, *, groups: Any = None, share: float, rng: np.random.Generator) -> Held:
        """About ``share`` of the rows: whole groups where they are known, else rows spread over the table.

        Given ``groups`` come first, then the ``patient`` column of a stored table, then, for token rows, the sample;
        missing labels form one group of their own. Nothing is held out of chunks. Memory goes with the number of
        samples, and without groups with the number of rows held out, at most 200,000.

        Raises
        ------
        InputError
            If ``groups`` has neither one entry a row nor one entry a sample.
        """
        if rows.n is None:
            if groups is not None:
                raise InputError("groups cannot be matched to chunks, whose rows are not known; pass one table")
            return cls()
        groups, by = _given_groups(rows, groups)
        if groups is None:
            wanted = 0 if share == 0 or rows.n < 20 else min(max(1, round(share * rows.n)), MOST_HELD)
            return cls(spread(rows.n, wanted, rng))
        if by == "sample":
            units = np.flatnonzero(_choose(np.full(len(groups), rows.tokens), share, rng))
            return cls(units, rows.tokens, by, len(units))
        names, code = _coded(groups)
        size = 1 if len(code) == rows.n else rows.tokens
        if len(code) * size != rows.n:
            raise InputError(f"groups has {len(code)} entries for {rows.n} rows")
        chosen = _choose(np.bincount(code, minlength=len(names)) * size, share, rng)
        units = np.flatnonzero(chosen[code])
        return cls(units, size, by, int(chosen.sum()), frozenset(names[~chosen]))

    def __len__(self) -> int:
        return len(self.units) * self.size

    def rows(self, which: np.ndarray) -> np.ndarray:
        """Row numbers of the held-out rows number ``which``."""
        unit, rest = np.divmod(which, self.size)
        return self.units[unit] * self.size + rest

    def before(self, row: np.ndarray) -> np.ndarray:
        """How many rows are held out before each of these row numbers."""
        unit, rest = np.divmod(row, self.size)
        whole = np.searchsorted(self.units, unit)
        return whole * self.size + rest * (np.searchsorted(self.units, unit, side="right") > whole)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Which of the rows ``start`` to ``stop`` are held out, bool (stop - start,)."""
        units = np.arange(start // self.size, -(-stop // self.size))
        first, last = np.searchsorted(self.units, (units[0], units[-1] + 1)) if len(units) else (0, 0)
        held = np.repeat(np.isin(units, self.units[first:last]), self.size)
        skip = start % self.size
        return held[skip : skip + stop - start]


def spread(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of the numbers 0 to n - 1, ascending: a random one out of each of ``count`` equal stretches."""
    count = min(count, n)
    if count == 0:
        return np.zeros(0, np.int64)
    edges = np.arange(count + 1, dtype=np.int64) * n // count
    return rng.integers(edges[:-1], edges[1:])


def row_groups(rows: Rows, groups: Any) -> np.ndarray | None:
    """Group of each row as text, (n,), by the rule of :meth:`Held.draw`; None where every row stands for itself.

    Raises
    ------
    InputError
        If ``groups`` has neither one entry a row nor one entry a sample.
    """
    groups, _ = _given_groups(rows, groups)
    if groups is None:
        return None
    names = np.asarray([str(g) for g in groups], dtype=object)
    if len(names) not in (rows.n, rows.n // rows.tokens):
        raise InputError(f"groups has {len(names)} entries for {rows.n} rows")
    return np.repeat(names, rows.n // len(names))


def _given_groups(rows: Rows, groups: Any) -> tuple[Any, str]:
    """Groups and what they are: those given, else the ``patient`` column of a store, else (tokens) the sample."""
    if groups is not None:
        return groups, "groups"
    if rows.obs is not None and "patient" in getattr(rows.obs, "columns", ()):
        return rows.obs["patient"], "patient"
    return (range(rows.n // rows.tokens), "sample") if rows.tokens > 1 else (None, "row")


def _coded(groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sorted names of groups (as text), and each entry's position among them."""
    seen: dict[str, int] = {}
    code = np.fromiter((seen.setdefault(str(g), len(seen)) for g in groups), np.int64)
    names = np.asarray(list(seen), dtype=object)
    order = np.argsort(names)
    position = np.empty(len(names), np.int64)
    position[order] = np.arange(len(names))
    return names[order], position[code]


def _choose(counts: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Boolean (groups,): those held out, taken in random order within twice the share; one group always stays."""
    chosen, left, n = np.zeros(len(counts), bool), len(counts), counts.sum()
    if share == 0 or n < 20:
        return chosen
    wanted, total = max(1, round(share * n)), 0
    for g in rng.permutation(len(counts)):
        if total >= wanted or left < 2:
            break
        if total + counts[g] <= 2 * wanted:
            chosen[g] = True
            total, left = total + counts[g], left - 1
    return chosen
