"""Embeddings: an ``(n_rows, d)`` matrix on disk or in memory, its samples, and where it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biosae.embeddings.shards import open_shard, read_finished
from biosae.errors import InputError

_POOLS = ("mean", "max")


class _Shards:
    """Rows of several shard files as one matrix; files are mapped on first use and after unpickling."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], dim: int, dtype: str) -> None:
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.shards = [s for s in shards if s["rows"]]
        self.ends = np.cumsum([s["rows"] for s in self.shards], dtype=np.int64)
        self.shape = (int(self.ends[-1]) if len(self.ends) else 0, dim)
        self._maps: dict[int, np.memmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def _map(self, number: int) -> np.memmap:
        if number not in self._maps:
            shard = self.shards[number]
            self._maps[number] = open_shard(
                self.folder / shard["file"], rows=shard["rows"], dim=self.shape[1], dtype=self.dtype
            )
        return self._maps[number]

    def span(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows ``start`` to ``stop`` into ``out``."""
        number = int(np.searchsorted(self.ends, start, side="right"))
        at = start
        while at < stop:
            first = self.ends[number] - self.shards[number]["rows"]
            end = min(stop, self.ends[number])
            out[at - start : end - start] = self._map(number)[at - first : end - first]
            at, number = int(end), number + 1

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the given rows into ``out``, reading each shard once and in ascending order."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        bounds = np.searchsorted(ascending, self.ends)
        begin = 0
        for number, end in enumerate(bounds):
            if end > begin:
                first = self.ends[number] - self.shards[number]["rows"]
                out[order[begin:end]] = self._map(number)[ascending[begin:end] - first]
            begin = end


class _Memory:
    """The same two operations on an array in memory."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype

    def span(self, start: int, stop: int, out: np.ndarray) -> None:
        out[:] = self.data[start:stop]

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        out[:] = self.data[rows]


class Embeddings:
    """Matrix of embeddings, one row a sample (pooled) or one row a token, never held in memory as a whole.

    Open a folder with :meth:`open`, or wrap an array with :meth:`from_array`. Indexing by rows returns float32 copies.

    Attributes
    ----------
    obs : pandas.DataFrame
        One row a **sample** (index ``sample_id``): the samples' table, role columns included.
    identity : dict or None
        Encoder, weights hash, layer, pooling, preprocessing; None if unknown.
    roles : dict
        Role (patient, slide, ...) to the user's column name.
    mpp : float or None
        Micrometres per pixel of the samples.
    tokens_per_sample : int
        Rows of each sample: 1 if pooled. Row r belongs to sample ``r // tokens_per_sample``.
    grid : tuple of int or None
        Rows and columns of the token grid; token t lies at ``divmod(t, columns)``.
    provenance : dict
        Contents of ``provenance.json``; empty for an array.
    dtype : numpy.dtype
        How the numbers are stored (float16 or float32). What indexing returns is always float32.

    Examples
    --------
    >>> emb = Embeddings.from_array(np.eye(4, dtype=np.float32))
    >>> emb.shape, emb[2].tolist()
    ((4, 4), [0.0, 0.0, 1.0, 0.0])
    """

    def __init__(
        self,
        source: _Shards | _Memory,
        obs: pd.DataFrame,
        *,
        identity: Mapping[str, Any] | None,
        tokens_per_sample: int,
        grid: Sequence[int] | None,
        provenance: Mapping[str, Any],
        chosen: np.ndarray | None = None,
    ) -> None:
        self._source, self._chosen = source, chosen  # chosen: positions of the samples within the source, or all
        self.obs = obs
        self.identity = None if identity is None else dict(identity)
        self.tokens_per_sample = int(tokens_per_sample)
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.provenance = dict(provenance)

    # -- where they come from ------------------------------------------------------------------------------------

    @classmethod
    def open(cls, folder: str | os.PathLike, *, verify: bool = False) -> Embeddings:
        """Open a folder written by :func:`biosae.embeddings.embed`; reads no shard until rows are asked for.

        Parameters
        ----------
        folder
            ``out/<encoder>/<layer>``.
        verify
            Also check the SHA-256 of every file (reads everything once). Sizes are always checked.

        Raises
        ------
        FormatError
            If the folder is unfinished, not ours, or a file is absent, truncated or altered; it says what to do.
        """
        folder = Path(folder).absolute()
        facts, obs = read_finished(folder, verify=verify)
        source = _Shards(folder, facts["shards"], facts["dim"], facts["dtype"])
        return cls(
            source,
            obs,
            identity=facts["identity"],
            tokens_per_sample=facts["tokens_per_sample"],
            grid=facts["grid"],
            provenance=facts,
        )

    @classmethod
    def from_array(
        cls,
        X: np.ndarray,
        *,
        obs: pd.DataFrame | None = None,
        identity: Mapping[str, Any] | None = None,
        tokens_per_sample: int = 1,
        grid: Sequence[int] | None = None,
    ) -> Embeddings:
        """Embeddings of an array in memory.

        Parameters
        ----------
        X
            ``(n_samples * tokens_per_sample, d)``, finite numbers; float16 and float32 are kept, others become float32.
        obs
            One row a sample, index = unique sample ids; by default ids ``sample_0000000`` and so on.
        identity
            The encoder's identity, if known.
        tokens_per_sample, grid
            Rows of each sample, and their grid ``(rows, columns)``.

        Raises
        ------
        InputError
            If shapes, ids or numbers do not fit together.
        """
        X = np.asarray(X)
        if X.dtype not in (np.float16, np.float32):
            X = X.astype(np.float32)
        if X.ndim != 2:
            raise InputError(f"X has shape {X.shape}; embeddings are (n_rows, d)")
        n, rest = divmod(X.shape[0], tokens_per_sample)
        if rest:
            raise InputError(f"{X.shape[0]} rows cannot be divided into samples of {tokens_per_sample} tokens")
        if grid is not None and int(np.prod(grid)) != tokens_per_sample:
            raise InputError(f"a grid of {tuple(grid)} does not hold tokens_per_sample={tokens_per_sample}")
        if not np.isfinite(X).all():
            raise InputError("X holds NaN or infinity; drop those rows first")
        if obs is None:
            obs = pd.DataFrame(index=pd.Index([f"sample_{i:07d}" for i in range(n)], name="sample_id"))
        if len(obs) != n:
            raise InputError(f"obs has {len(obs)} rows, X has {n} samples")
        if not obs.index.is_unique:
            raise InputError("the index of obs must hold unique sample ids; set it with obs.set_index(...)")
        obs = obs.set_axis(obs.index.map(str).rename("sample_id"), axis=0)
        return cls(_Memory(X), obs, identity=identity, tokens_per_sample=tokens_per_sample, grid=grid, provenance={})

    # -- size and facts ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.n_samples * self.tokens_per_sample

    @property
    def n_samples(self) -> int:
        """Number of samples (rows of ``obs``)."""
        return len(self.obs)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_rows, d)``."""
        return len(self), self._source.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """How the numbers are stored; what is returned is float32."""
        return self._source.dtype

    @property
    def roles(self) -> dict[str, str | None]:
        """Role to the user's column name, as the samples had it."""
        return dict(self.provenance.get("roles", {}))

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the samples, or None."""
        return self.provenance.get("mpp")

    @property
    def fingerprint(self) -> str | None:
        """Hash of ``identity`` (see :func:`biosae.encoders.fingerprint`); None if unknown."""
        if self.identity is None:
            return None
        from biosae.encoders import fingerprint

        return fingerprint(self.identity)

    def __repr__(self) -> str:
        tokens = "" if self.tokens_per_sample == 1 else f" x {self.tokens_per_sample} tokens"
        name = "unknown encoder"
        if self.identity is not None:
            name = f"{self.identity.get('encoder')}, {self.identity.get('layer')}, {self.identity.get('pool')}"
        return f"Embeddings: {self.n_samples} samples{tokens}, d = {self.shape[1]}, {self.dtype}; {name}"

    # -- rows ----------------------------------------------------------------------------------------------------

    def __getitem__(self, rows: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        """Rows as a float32 copy: ``(d,)`` for an int, ``(k, d)`` for a slice, an int array or a mask of rows."""
        n = len(self)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(n)
            return self._span(start, max(start, stop)) if step == 1 else self._take(np.arange(start, stop, step))
        index = np.asarray(rows)
        if index.dtype == bool:
            if index.shape != (n,):
                raise IndexError(f"a mask of shape {index.shape} for {n} rows")
            index = np.flatnonzero(index)
        if index.size == 0:
            index = index.astype(np.int64)
        if index.ndim > 1 or not np.issubdtype(index.dtype, np.integer):
            raise IndexError("rows are chosen by an int, a slice, a 1-D int array or a mask; ids go to select()")
        flat = np.atleast_1d(index).astype(np.int64)
        if flat.size and (flat.min() < -n or flat.max() >= n):
            raise IndexError(f"row {flat.min() if flat.min() < -n else flat.max()} of {n}")
        found = self._take(np.where(flat < 0, flat + n, flat))
        return found[0] if index.ndim == 0 else found

    def blocks(self, rows: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate ``(first row, float32 array of up to rows rows)`` in order."""
        if rows < 1:
            raise InputError(f"rows={rows} must be at least 1")
        for start in range(0, len(self), rows):
            yield start, self._span(start, min(start + rows, len(self)))

    def array(self) -> np.ndarray:
        """Every row at once, float32 ``(n_rows, d)``: needs ``4 * n_rows * d`` bytes."""
        return self._span(0, len(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array().astype(dtype or np.float32, copy=False)

    def pooled(self, how: str = "mean") -> np.ndarray:
        """One vector a sample: the mean or maximum over its tokens, float32 ``(n_samples, d)``."""
        if how not in _POOLS:
            raise InputError(f"how={how!r}; valid: {', '.join(map(repr, _POOLS))}")
        T, d = self.tokens_per_sample, self.shape[1]
        out = np.empty((self.n_samples, d), np.float32)
        step = max(1, 65536 // T)
        for start, block in self.blocks(step * T):
            tokens = block.reshape(-1, T, d)
            out[start // T : start // T + len(tokens)] = (
                tokens.max(axis=1) if how == "max" else tokens.mean(axis=1, dtype=np.float64)
            )
        return out

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as they are stored, (stop - start, d) in ``dtype``."""
        out = np.empty((stop - start, self.shape[1]), self.dtype)
        self._fill_span(start, stop, out)
        return out

    def _span(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.shape[1]), np.float32)
        self._fill_span(start, stop, out)
        return out

    def _take(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), self.shape[1]), np.float32)
        self._fill_rows(rows, out)
        return out

    def _fill_span(self, start: int, stop: int, out: np.ndarray) -> None:
        if self._chosen is None:
            self._source.span(start, stop, out)
        else:
            self._fill_rows(np.arange(start, stop), out)

    def _fill_rows(self, rows: np.ndarray, out: np.ndarray) -> None:
        if self._chosen is not None:
            sample, token = np.divmod(rows, self.tokens_per_sample)
            rows = self._chosen[sample] * self.tokens_per_sample + token
        self._source.take(rows, out)

    # -- subsets -------------------------------------------------------------------------------------------------

    def select(self, which: Sequence | np.ndarray | pd.Series) -> Embeddings:
        """Embeddings of some samples (all their tokens), as a view: nothing is copied or written.

        Parameters
        ----------
        which
            Boolean mask over samples (a Series is aligned by id), sample ids in the wanted order, or positions.

        Raises
        ------
        InputError
            If ids are unknown or repeat, or the mask has another length.
        """
        at = self._positions(which)
        obs = self.obs.iloc[at]
        if not obs.index.is_unique:
            raise InputError(f"sample {obs.index[obs.index.duplicated()][0]!r} was asked for twice")
        return Embeddings(
            self._source,
            obs,
            identity=self.identity,
            tokens_per_sample=self.tokens_per_sample,
            grid=self.grid,
            provenance=self.provenance,
            chosen=at if self._chosen is None else self._chosen[at],
        )

    def _positions(self, which: Sequence | np.ndarray | pd.Series) -> np.ndarray:
        ids = self.obs.index
        if isinstance(which, pd.Series) and which.dtype == bool:
            if not which.index.is_unique or not ids.isin(which.index).all():
                raise InputError("the mask's index does not hold every sample id once; pass an array to go by position")
            which = which.reindex(ids)
        array = np.asarray(which)
        if array.dtype == bool:
            if array.shape != (len(ids),):
                raise InputError(f"the mask has shape {array.shape}, there are {len(ids)} samples")
            return np.flatnonzero(array)
        if array.size == 0 or np.issubdtype(array.dtype, np.integer):
            at = array.astype(np.int64)
            if at.size and (at.min() < -len(ids) or at.max() >= len(ids)):
                raise InputError(f"positions must lie within the {len(ids)} samples")
            return np.where(at < 0, at + len(ids), at)
        at = ids.get_indexer(array)
        if (at < 0).any():
            raise InputError(f"{(at < 0).sum()} ids are not among the samples, e.g. {str(array[at < 0][0])!r}")
        return at
