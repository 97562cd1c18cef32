"""Late interaction: similarity of two bags of vectors, such as the patches of two slides."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError

BLOCK = 2**22
"""Similarities held at once."""


def maxsim(
    queries: Any, documents: Any, *, query_bags: Any = None, document_bags: Any = None, normalise: bool = True
) -> Any:
    """MaxSim: for each vector of the query the most similar one of the document, summed.

    ``score(Q, D) = sum_i max_j <q_i, d_j>`` with vectors of unit length. It is not symmetric; adding vectors to D never
    lowers it where D is not empty; score(Q, Q) = |Q| where no vector is zero.

    Parameters
    ----------
    queries, documents
        Embeddings or codes, (n_q, d) and (n_d, d), dense or sparse.
    query_bags, document_bags
        Bag of each row (sample, slide), (n_q,) and (n_d,), in any order. None: all rows are one bag.
    normalise
        Bring vectors to unit length first; a zero vector stays zero.

    Returns
    -------
    float, or ndarray (query bags, document bags)
        Bags in sorted order of their labels. A document without vectors scores 0.

    Raises
    ------
    InputError
        If shapes do not fit.

    References
    ----------
    Khattab and Zaharia 2020, ColBERT, arXiv 2004.12832.
    """
    Q, D = _vectors(queries, normalise), _vectors(documents, normalise)
    if Q.shape[1] != D.shape[1]:
        raise InputError(
            f"queries have {Q.shape[1]} columns, documents {D.shape[1]}; use one encoder and one dictionary"
        )
    n_query, of_query = _bags(query_bags, Q.shape[0])
    n_document, of_document = _bags(document_bags, D.shape[0])
    scores = np.zeros((n_query, n_document))
    for b in range(n_document):
        bag = D[np.flatnonzero(of_document == b)].T
        if not bag.shape[1]:
            continue
        step = max(1, BLOCK // bag.shape[1])
        for start in range(0, Q.shape[0], step):
            product = Q[start : start + step] @ bag
            best = product.max(axis=1)
            best = best.toarray().ravel() if scipy.sparse.issparse(best) else best
            scores[:, b] += np.bincount(of_query[start : start + step], best, n_query)
    return float(scores[0, 0]) if query_bags is None and document_bags is None else scores


def _vectors(rows: Any, normalise: bool) -> Any:
    rows = rows.tocsr().astype(np.float64) if scipy.sparse.issparse(rows) else np.asarray(rows, np.float64)
    if rows.ndim != 2:
        raise InputError(f"a bag is a table (vectors, d), found shape {rows.shape}")
    if not normalise:
        return rows
    sparse = scipy.sparse.issparse(rows)
    square = np.asarray(rows.multiply(rows).sum(1)).ravel() if sparse else np.square(rows).sum(1)
    factor = 1 / np.sqrt(np.where(square > 0, square, 1))
    return (scipy.sparse.diags(factor) @ rows).tocsr() if sparse else rows * factor[:, None]


def _bags(labels: Any, n: int) -> tuple[int, np.ndarray]:
    if labels is None:
        return 1, np.zeros(n, np.int64)
    names, code = np.unique(np.asarray(labels), return_inverse=True)
    if len(code) != n:
        raise InputError(f"{len(code)} bag labels for {n} rows")
    return len(names), code
