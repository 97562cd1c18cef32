"""Nearest items by sparse codes or embeddings: exact, in blocks, with rules about what may not be found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.search import approximate
from biosae.search.rows import (
    group_names,
    prepared,
    same_space,
    sides,
    sorted_csr,
    space,
    unnamed,
    unpack,
)

METRICS = ("cosine", "dot", "euclidean", "jaccard")
QUERY_BLOCK, CORPUS_BLOCK = 512, 16_384
"""Queries and rows whose products are held at a time where vectors are dense."""


@dataclass
class Neighbours:
    """Rankings of a corpus, one a query, best first."""

    rows: np.ndarray
    """Row of the corpus, int64 (queries, n); -1 where fewer than n items were allowed."""
    scores: np.ndarray
    """Similarity, float64 (queries, n), higher is nearer; NaN where ``rows`` is -1."""
    query_ids: np.ndarray
    """Id of each query (its row number where queries have no ids)."""
    ids: np.ndarray
    """Id of each row of the corpus."""
    metric: str

    def to_frame(self) -> pd.DataFrame:
        """One line a hit: ``query``, ``rank`` (from 1), ``sample_id``, ``score``."""
        query, place = np.nonzero(self.rows >= 0)
        found = self.rows[query, place]
        return pd.DataFrame({
            "query": self.query_ids[query], "rank": place + 1, "sample_id": self.ids[found],
            "score": self.scores[query, place],
        })  # fmt: skip


class Index:
    """Rows of codes or embeddings, ready to be asked for the nearest.

    Parameters
    ----------
    data
        AnnData of :func:`biosae.encode`, :class:`biosae.Embeddings` with one row a sample, a data frame (its index
        holds the ids), or a matrix (n, m), sparse or dense.
    use_rep
        What of an AnnData is compared: ``"X"`` (the codes) or a key of ``obsm`` such as ``"embedding"``.
    metric
        ``"cosine"`` (0 where a row is zero), ``"dot"``, ``"euclidean"`` (the score is minus the distance,
        ``sqrt(|q|^2 + |x|^2 - 2 q x)``), or ``"jaccard"`` of which latents fire (0 where neither row has any).
    obs
        Table of the rows of a matrix; its index holds their ids (unless it only counts the rows).
    faiss
        None: exact. For millions of embeddings a faiss factory string (``"HNSW32"``, ``"IVF4096,Flat"``), or a faiss
        index that already holds these rows in this order, of unit length for cosine. Candidates are then faiss's,
        scores and order among them exact. Sparse codes need none: their exact search touches only rows that share a
        latent with the query.

    Notes
    -----
    Sparse rows are kept as posting lists of latents in tiles of 8,192 rows; a query adds up the lists of its own
    latents. Dense rows are screened by a matrix product, whose rounding is bounded by
    ``(d + 2) eps |q| |x|``; every row that could still be among the best gets its score anew. In both cases a score
    is a float64 sum in ascending order of columns, equal scores are ordered by row, and neither blocks nor threads
    change a bit: it is the ranking of brute force.

    Raises
    ------
    InputError
        For an unknown metric or representation, values that are not finite, or a table that does not fit.
    """

    def __init__(
        self, data: Any, *, use_rep: str = "X", metric: str = "cosine", obs: pd.DataFrame | None = None,
        faiss: Any = None,
    ) -> None:  # fmt: skip
        if metric not in METRICS:
            raise InputError(f"metric={metric!r} is unknown; {nearest(metric, METRICS)}")
        self.metric, self.use_rep = metric, use_rep
        matrix, self.obs = unpack(data, use_rep, obs)
        self._matrix, self._space = prepared(matrix, metric), space(data, use_rep)
        self.n, self.n_features = self._matrix.shape
        self.ids = self.obs.index.to_numpy()
        if self.obs.index.has_duplicates:
            raise InputError("ids of the rows are not unique; give every row its own id")
        self._norm, self._side = sides(self._matrix, metric)
        self._faiss = None
        if faiss is not None:
            self._faiss = approximate.build_or_check(faiss, self._matrix, self._norm, metric)
        elif sp.issparse(self._matrix):
            self._lists = _posting_lists(self._matrix)

    def search(
        self, queries: Any = None, *, n: int = 10, exclude: str | Sequence[str] = (), obs: pd.DataFrame | None = None
    ) -> Neighbours:
        """The n nearest rows of each query.

        Parameters
        ----------
        queries
            None: every row of the index. Ids (one, or a sequence): those rows. Or new items: AnnData, Embeddings, or a
            matrix with the columns of the index.
        n
            Neighbours wanted.
        exclude
            Columns of ``obs``, such as ``"patient"``, ``"slide"``, ``"site"``: a row that has the query's value in any
            of them is not found. 3, 3.0 and "3" are one value. A row with the query's own id is never found.
        obs
            Table of a query matrix, for ids and ``exclude``.

        Raises
        ------
        InputError
            If an id or column is unknown, a column of ``exclude`` has missing values, or columns differ in number.
        IdentityError
            If queries and index are codes of different dictionaries, or embeddings of different encoders.
        """
        if int(n) < 1:
            raise InputError(f"n={n}: ask for at least one neighbour")
        exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        vectors, table, known = self._queries(queries, obs)
        if vectors.shape[1] != self.n_features:
            raise InputError(
                f"queries have {vectors.shape[1]} columns, the index {self.n_features}; use one encoder and dictionary"
            )
        groups, of_query = self._groups(table, exclude, own=known)
        norm, side = sides(vectors, self.metric)
        n = min(int(n), self.n)
        scores = np.full((vectors.shape[0], n), np.nan)
        rows = np.full((vectors.shape[0], n), -1, np.int64)
        if vectors.shape[0] and n:
            if self._faiss is not None:
                self._by_faiss(vectors, norm, side, groups, of_query, scores, rows)
            elif sp.issparse(self._matrix):
                self._by_lists(vectors, side, groups, of_query, scores, rows)
            else:
                self._by_blocks(vectors, norm, side, groups, of_query, scores, rows)
        return Neighbours(rows, scores, table.index.to_numpy(), self.ids, self.metric)

    def vectors(self, queries: Any = None) -> Any:
        """Rows of the index, or of queries as :meth:`search` takes them, in the form in which they are compared."""
        return self._queries(queries, None)[0]

    @property
    def faiss(self) -> Any:
        """The faiss index; None where the search is exact."""
        return self._faiss

    def _queries(self, queries: Any, obs: pd.DataFrame | None) -> tuple[Any, pd.DataFrame, bool]:
        """Vectors and table of the queries, and whether their ids mean anything."""
        if queries is None:
            return self._matrix, self.obs, True
        if isinstance(queries, str) or not (hasattr(queries, "shape") and len(queries.shape) == 2):
            wanted = np.atleast_1d(np.asarray(queries, dtype=object))
            if any(isinstance(name, (bool, np.bool_, float, np.floating)) for name in wanted):
                raise InputError("queries are ids, or a table (rows, columns): a single vector is vector[None]")
            at = self.obs.index.get_indexer(wanted)
            if (at < 0).any():
                name = wanted[at < 0][0]
                raise InputError(f"{name!r} is not among the {self.n} rows; {nearest(name, self.ids[:1000])}")
            return self._matrix[at], self.obs.iloc[at], True
        matrix, table = unpack(queries, self.use_rep, obs)
        same_space(self._space, space(queries, self.use_rep))
        vectors = prepared(matrix, self.metric)
        if sp.issparse(self._matrix):
            vectors = sorted_csr(sp.csr_matrix(vectors))
        elif sp.issparse(vectors):
            vectors = vectors.toarray()
        return vectors, table, not isinstance(table.index, pd.RangeIndex)

    def _groups(self, table: pd.DataFrame, exclude: Sequence[str], own: bool) -> tuple[np.ndarray, np.ndarray]:
        """Group of each row and of each query under every rule, as numbers that mean the same in both."""
        ours, theirs = [], []
        columns: list[tuple[Any, Any]] = [(self.obs.index, table.index)] if own else []
        for name in exclude:
            for where, frame in (("index", self.obs), ("queries", table)):
                if name not in frame:
                    raise InputError(
                        f"exclude={name!r}: the table of the {where} has no such column; {nearest(name, frame.columns)}"
                    )
                if missing := int(unnamed(frame[name]).sum()):
                    raise InputError(
                        f"exclude={name!r}: {missing} rows of the {where} have no value there, so nobody can say that "
                        "they are of another group; drop these rows or fill the column"
                    )
            columns.append((group_names(self.obs[name]), group_names(table[name])))
        for here, there in columns:
            codes = pd.factorize(np.concatenate([np.asarray(here, object), np.asarray(there, object)]))[0]
            ours.append(codes[: self.n])
            theirs.append(codes[self.n :])
        shape = (len(columns), -1) if columns else (0, 0)
        return np.asarray(ours, np.int64).reshape(shape), np.asarray(theirs, np.int64).reshape(shape)

    def _by_lists(self, vectors: Any, side: Any, groups: Any, of_query: Any, scores: Any, rows: Any) -> None:
        from biosae.search import kernels

        queries = (vectors.indptr.astype(np.int64), vectors.indices.astype(np.int64), vectors.data)
        filled = kernels.sparse_search(
            *self._lists, self._side, self.n, queries, side, METRICS.index(self.metric), groups, of_query, scores, rows
        )
        kernels.unheap(scores, rows, filled)

    def _by_blocks(
        self, vectors: Any, norm: Any, side: Any, groups: Any, of_query: Any, scores: Any, rows: Any
    ) -> None:
        from biosae.search import kernels

        single = vectors.dtype == np.float32 and self._matrix.dtype == np.float32
        facts = np.finfo(np.float32 if single else np.float64)
        slack = (self.n_features + 2) * float(facts.eps)
        tiny = self.n_features * float(facts.tiny)
        filled = np.zeros(len(vectors), np.int64)
        for a in range(0, len(vectors), QUERY_BLOCK):
            q = slice(a, a + QUERY_BLOCK)
            barred = np.ascontiguousarray(of_query[:, q])
            for first in range(0, self.n, CORPUS_BLOCK):
                with np.errstate(all="ignore"):  # what overflows here is scored exactly
                    screen = vectors[q] @ self._matrix[first : first + CORPUS_BLOCK].T
                kernels.dense_search(
                    screen, slack, tiny, self._matrix, self._side, self._norm, first, vectors[q], side[q], norm[q],
                    METRICS.index(self.metric), groups, barred, scores[q], rows[q], filled[q],
                )  # fmt: skip
        kernels.unheap(scores, rows, filled)

    def _by_faiss(self, vectors: Any, norm: Any, side: Any, groups: Any, of_query: Any, scores: Any, rows: Any) -> None:
        """Ask faiss for more and more until n allowed rows are there; score and order those exactly."""
        from biosae.search import kernels

        n = rows.shape[1]
        asked = approximate.rows_for(vectors, norm, self.metric)
        waiting, fetch = np.arange(len(vectors)), min(self.n, 2 * n + 1)
        while len(waiting):
            found = self._faiss.search(np.ascontiguousarray(asked[waiting]), fetch)[1].astype(np.int64)
            for rule, own in zip(groups, of_query):
                found[(found >= 0) & (rule[found] == own[waiting, None])] = -1
            done = (found >= 0).sum(1) >= n
            done |= fetch >= self.n
            q = waiting[done]
            exact = kernels.pair_scores(
                found[done], self._matrix, self._side, vectors[q], side[q], METRICS.index(self.metric)
            )
            order = np.lexsort((found[done], -exact), axis=1)[:, :n]  # NaN comes last
            scores[q], rows[q] = np.take_along_axis(exact, order, 1), np.take_along_axis(found[done], order, 1)
            waiting, fetch = waiting[~done], min(self.n, 4 * fetch)


def neighbours(
    data: Any, queries: Any = None, *, n: int = 10, exclude: str | Sequence[str] = (), use_rep: str = "X",
    metric: str = "cosine", faiss: Any = None,
) -> Neighbours:  # fmt: skip
    """The n nearest rows of each query, in one call: ``Index(data, ...).search(queries, ...)``; see there.

    Examples
    --------
    >>> near = neighbours(sp.csr_matrix([[1.0, 0], [0, 1], [1, 1], [2, 0]]), n=2)
    >>> near.rows[0].tolist(), near.scores[0].round(3).tolist()
    ([3, 2], [1.0, 0.707])
    """
    return Index(data, use_rep=use_rep, metric=metric, faiss=faiss).search(queries, n=n, exclude=exclude)


def _posting_lists(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries by tile, then latent, then row: ``ptr`` (tiles, m + 1), row within the tile, value."""
    from biosae.search.kernels import TILE

    ptr, local, value, held = [], [], [], 0
    for first in range(0, matrix.shape[0], TILE):
        columns = matrix[first : first + TILE].tocsc()
        ptr.append(columns.indptr.astype(np.int64) + held)
        local.append(columns.indices.astype(np.int32))
        value.append(columns.data)
        held += columns.nnz
    if not ptr:
        return np.zeros((0, matrix.shape[1] + 1), np.int64), np.zeros(0, np.int32), matrix.data
    return np.stack(ptr), np.concatenate(local), np.concatenate(value)
