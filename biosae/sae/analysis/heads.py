"""Dictionaries of attention outputs: which head and which source token a latent reads from.

The dictionary is trained on the head outputs before the output projection, side by side: ``zcat = [z_1 ... z_H]`` with
``z_h[dst] = sum_src A_h[dst, src] v_h[src]``. A latent's pre-activation is linear in zcat, so it splits exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from biosae.errors import InputError

BY = ("both", "head", "source")


def head_outputs(pattern: Any, values: Any) -> np.ndarray:
    """Head outputs side by side, zcat (n_dst, n_heads * d_head), float64.

    Parameters
    ----------
    pattern
        Attention after softmax, (n_heads, n_dst, n_src); 0 where a source is masked.
    values
        Value vectors, (n_src, n_values, d_head). With grouped queries there are fewer value heads than heads; head h
        reads value head h // (n_heads / n_values).

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    A, v = _checked(pattern, values)
    return np.einsum("hts,shd->thd", A, v).reshape(A.shape[1], -1)


def feature_attribution(pattern: Any, values: Any, direction: Any, *, by: str = "both") -> np.ndarray:
    """Direct feature attribution: what each head and source adds to a latent's pre-activation.

    ``A_h[dst, src] v_h[src] . w[h]``. Summed over heads and sources it is zcat . w, so that the pre-activation is
    that sum plus b_enc - b_dec . w.

    Parameters
    ----------
    pattern, values
        As for :func:`head_outputs`.
    direction
        Encoder row of the latent, (n_heads * d_head,).
    by
        ``both`` (n_dst, n_heads, n_src), ``head`` (n_dst, n_heads) or ``source`` (n_dst, n_src).

    Raises
    ------
    InputError
        If shapes do not fit.

    References
    ----------
    Kissane et al. 2024, Interpreting attention layer outputs with sparse autoencoders, arXiv 2406.17759.
    """
    if by not in BY:
        raise InputError(f"by={by!r} is not known; valid: {', '.join(BY)}")
    A, v = _checked(pattern, values)
    w = np.asarray(direction, np.float64)
    if w.shape != (v.shape[1] * v.shape[2],):
        raise InputError(
            f"direction has shape {w.shape}; {v.shape[1]} heads of {v.shape[2]} need ({v.shape[1] * v.shape[2]},)"
        )
    along = np.einsum("shd,hd->hs", v, w.reshape(v.shape[1:]))
    return np.einsum({"both": "hts,hs->ths", "head": "hts,hs->th", "source": "hts,hs->ts"}[by], A, along)


def head_parts(zcat: Any, direction: Any, *, n_heads: int) -> np.ndarray:
    """Attribution by head alone, zcat_h . w[h], (n, n_heads): for encoders that give no attention maps.

    Parameters
    ----------
    zcat
        Head outputs side by side, (n, n_heads * d_head).
    direction
        Encoder row of the latent, (n_heads * d_head,).

    Raises
    ------
    InputError
        If the width is not a multiple of ``n_heads``.
    """
    z, w = np.asarray(zcat, np.float64), np.asarray(direction, np.float64)
    if z.ndim != 2 or w.shape != (z.shape[1],):
        raise InputError(f"zcat (n, width) and direction (width,) have shapes {z.shape} and {w.shape}")
    _width(z.shape[1], n_heads)
    return np.einsum("nhd,hd->nh", z.reshape(len(z), n_heads, -1), w.reshape(n_heads, -1))


def head_shares(decoder: Any, *, n_heads: int) -> np.ndarray:
    """Share of each head in the atoms, by norm: ||d_i[h]|| / sum_h' ||d_i[h']||.

    Parameters
    ----------
    decoder
        Atoms of a dictionary of head outputs, (m, n_heads * d_head).

    Returns
    -------
    ndarray (m, n_heads)
        Rows sum to 1; NaN for an atom that is zero.

    Raises
    ------
    InputError
        If the width is not a multiple of ``n_heads``.
    """
    D = np.asarray(decoder, np.float64)
    if D.ndim != 2:
        raise InputError(f"atoms must be a table (m, width), found shape {D.shape}")
    _width(D.shape[1], n_heads)
    norms = np.linalg.norm(D.reshape(len(D), n_heads, -1), axis=2)
    total = norms.sum(1, keepdims=True)
    return np.where(total > 0, norms / np.where(total > 0, total, 1), np.nan)


def _width(width: int, n_heads: int) -> None:
    if n_heads < 1 or width % n_heads:
        raise InputError(f"a width of {width} is not made of {n_heads} heads; give the encoder's number of heads")


def _checked(pattern: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    A, v = np.asarray(pattern, np.float64), np.asarray(values, np.float64)
    if A.ndim != 3 or v.ndim != 3 or A.shape[2] != len(v) or not v.shape[1] or A.shape[0] % v.shape[1]:
        raise InputError(
            f"pattern (heads, dst, src) and values (src, value heads, d_head) have shapes {A.shape} and {v.shape}; the "
            "number of heads must be a multiple of that of value heads"
        )
    return A, np.repeat(v, A.shape[0] // v.shape[1], axis=1)
