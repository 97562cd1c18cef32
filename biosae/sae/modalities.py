"""Numbers about codes of two modalities: who uses a latent, does it mean the same in both, who belongs to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError


def modality_score(first: Any, second: Any) -> np.ndarray:
    """Share of the first modality in the use of each latent: E[z | first] / (E[z | first] + E[z | second]).

    Parameters
    ----------
    first, second
        Codes of rows of either modality, sparse or dense (n, m) and (n', m); rows need not be pairs. Signed codes
        count by their absolute values.

    Returns
    -------
    float64 (m,)
        1: used by the first modality only; 0: by the second only; 0.5: by both alike; NaN: by none.

    Notes
    -----
    After Costa et al. 2025, arXiv 2506.03093; the paper does not print the statistic, this is our reading. Codes of the
    two modalities must be in the same units, which those of ``group_sparse`` and ``vl_sae`` are.
    """
    first, second = _codes(first, second)
    mean = [np.asarray(abs(codes).mean(axis=0), np.float64).ravel() for codes in (first, second)]
    total = mean[0] + mean[1]
    return np.divide(mean[0], total, out=np.full(len(total), np.nan), where=total > 0)


def multimodal_monosemanticity(first: Any, second: Any, like_first: Any, like_second: Any) -> np.ndarray:
    """How alike are the rows of two modalities that activate a latent, judged by an independent encoder?

    Codes of each latent are brought to [0, 1] within each modality; with weights A_ij = a_i b_j / sum a_i b_j and
    S_ij the cosine of row i of the first and row j of the second modality in the other encoder, the score is
    sum_ij A_ij S_ij. For a modality against itself (``second is first`` and ``like_second is like_first``) i = j is
    left out.

    Parameters
    ----------
    first, second
        Codes, not negative, (n, m) and (n', m).
    like_first, like_second
        Rows of the independent encoder, (n, e) and (n', e); a zero row has cosine 0 with all.

    Returns
    -------
    float64 (m,)
        In [-1, 1]; 0 where no two rows activate the latent.

    Raises
    ------
    InputError
        For negative codes or shapes that do not fit.

    Notes
    -----
    Kaushik, Barch, Fanelli 2026, arXiv 2601.20028. S is never made: with unit rows u and v the sum is
    <sum_i a_i u_i, sum_j b_j v_j> / (sum a sum b), and without i = j (||sum a u||^2 - sum a^2 ||u||^2) /
    ((sum a)^2 - sum a^2).
    """
    same = second is first and like_second is like_first
    a, b = _codes(first, second)
    u, v = _unit(like_first), _unit(like_second)
    if len(u) != a.shape[0] or len(v) != b.shape[0] or u.shape[1] != v.shape[1]:
        raise InputError(
            f"codes of {a.shape[0]} and {b.shape[0]} rows need as many rows of one other encoder, found {u.shape} and "
            f"{v.shape}"
        )
    a, b = _unit_range(a), _unit_range(b)
    along = a.T @ u
    if same:
        squares = a.multiply(a)
        norm = np.square(np.linalg.norm(u, axis=1))
        found = np.square(along).sum(1) - squares.T @ norm
        total = np.square(_column_sums(a)) - _column_sums(squares)
        total[np.diff(a.indptr) < 2] = 0  # what is left there is rounding
    else:
        found = np.einsum("me,me->m", along, b.T @ v)
        total = _column_sums(a) * _column_sums(b)
    return np.divide(found, total, out=np.zeros_like(found), where=total > 0)


def zero_shot_scores(rows: Any, classes: Any, row_codes: Any, class_codes: Any, *, alpha: float = 1.0) -> np.ndarray:
    """How well each row of one modality fits each class given in the other: cos(x, y) + alpha cos(z_x, z_y).

    Parameters
    ----------
    rows, classes
        Aligned embeddings, (n, d) and (c, d).
    row_codes, class_codes
        Their codes, sparse or dense (n, m) and (c, m).
    alpha
        Weight of the codes; 0 is the usual zero-shot rule.

    Returns
    -------
    float64 (n, c)
        The class of a row is the argmax of its row. A zero row or a row without codes has cosine 0.

    Notes
    -----
    Shen, Sun, Huang, Wang 2025, arXiv 2510.21323.
    """
    x, y = _unit(rows), _unit(classes)
    if x.shape[1] != y.shape[1]:
        raise InputError(
            f"rows have {x.shape[1]} features and classes {y.shape[1]}; align the tables first (Alignment)"
        )
    a, b = _codes(row_codes, class_codes)
    if a.shape[0] != len(x) or b.shape[0] != len(y):
        raise InputError(f"{len(x)} rows and {len(y)} classes, but codes of {a.shape[0]} and {b.shape[0]}")
    return x @ y.T + alpha * (_unit_sparse(a) @ _unit_sparse(b).T).toarray()


def _codes(first: Any, second: Any) -> tuple[scipy.sparse.csc_matrix, scipy.sparse.csc_matrix]:
    found = tuple(scipy.sparse.csc_matrix(codes, dtype=np.float64) for codes in (first, second))
    if found[0].shape[1] != found[1].shape[1]:
        raise InputError(
            f"codes have {found[0].shape[1]} and {found[1].shape[1]} latents; both must come from one dictionary"
        )
    return found


def _unit(rows: Any) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2:
        raise InputError(f"expected a table (rows, features), found shape {rows.shape}")
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)


def _unit_sparse(codes: scipy.sparse.csc_matrix) -> scipy.sparse.csr_matrix:
    norm = np.sqrt(np.asarray(codes.multiply(codes).sum(axis=1)).ravel())
    return scipy.sparse.diags(np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)) @ codes


def _column_sums(codes: scipy.sparse.csc_matrix) -> np.ndarray:
    return np.asarray(codes.sum(axis=0)).ravel()


def _unit_range(codes: scipy.sparse.csc_matrix) -> scipy.sparse.csc_matrix:
    """Columns brought to [0, 1]: (a - min) / (max - min); columns that are constant become 0."""
    codes = codes.copy()
    codes.eliminate_zeros()
    if codes.nnz and codes.data.min() < 0:
        raise InputError("the multimodal monosemanticity score is for codes that are not negative")
    low = codes.min(axis=0).toarray().ravel()  # above 0 only in columns without zeros, so sparsity is kept
    spread = codes.max(axis=0).toarray().ravel() - low
    column = np.repeat(np.arange(codes.shape[1]), np.diff(codes.indptr))
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    codes.data = (codes.data - low[column]) * scale[column]
    codes.eliminate_zeros()
    return codes
