"""Cross-modal weights of latents, and data filtering by them (SAE-V).

A latent has a high weight if the tokens of two modalities that activate it most lie in the same direction. A sample
scores the sum of the weights of the latents that are active in both of its modalities.

Source: Lou, Li, Ji, Yang 2025, ICML, arXiv 2502.17514, with the released code (saev-2025/SAELens-V).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from biosae.errors import InputError

KINDS = ("silent", "first", "second", "rare", "both")
"""What a latent can be: never active; active in one modality only; in both, but in one on fewer than ``top_k`` of the
tokens looked at; in both, with a weight."""


@dataclass(frozen=True)
class CrossModal:
    """Weights of latents.

    Attributes
    ----------
    weight : float64 (m,)
        Mean cosine of the hidden states of the two modalities, in [-1, 1]; NaN for latents that have none.
    kind : str (m,)
        One of :data:`KINDS`; only ``both`` has a weight.
    """

    weight: np.ndarray
    kind: np.ndarray


@dataclass
class _Best:
    """The most activating tokens of each latent in one modality: entries sorted by latent, then by falling value."""

    latent: np.ndarray
    value: np.ndarray
    row: np.ndarray
    """Row of ``hidden``; -1 for entries behind the first ``top_k``, whose hidden states are not needed."""
    hidden: np.ndarray | None = None

    @classmethod
    def empty(cls) -> _Best:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))

    def add(self, codes: scipy.sparse.csr_matrix, hidden: np.ndarray, *, keep: int, top_k: int) -> None:
        """Take in tokens; of equal values the earlier token stands first."""
        new = codes.tocoo()
        n_old = 0 if self.hidden is None else len(self.hidden)
        latent = np.concatenate([self.latent, new.col.astype(np.int64)])
        value = np.concatenate([self.value, new.data])
        row = np.concatenate([self.row, new.row.astype(np.int64) + n_old])
        latent, value, row, rank = _ranked(latent, value, row)
        near = rank < keep
        latent, value, row, rank = latent[near], value[near], row[near], rank[near]
        used, row = np.unique(np.where(rank < top_k, row, -1), return_inverse=True)
        if len(used) and used[0] == -1:
            used, row = used[1:], row - 1
        table = hidden if self.hidden is None else np.concatenate([self.hidden, hidden])
        self.latent, self.value, self.row, self.hidden = latent, value, row, table[used]

    def direction(self, n_latents: int) -> np.ndarray:
        """Sum of the unit hidden states of the first ``top_k`` tokens of each latent, float64 (m, d)."""
        hidden = self.hidden.astype(np.float64)
        norm = np.linalg.norm(hidden, axis=1, keepdims=True)
        unit = np.divide(hidden, norm, out=np.zeros_like(hidden), where=norm > 0)
        near = self.row >= 0
        pick = scipy.sparse.csr_matrix(
            (np.ones(near.sum()), (self.latent[near], self.row[near])), shape=(n_latents, len(unit))
        )
        return pick @ unit


def cross_modal_weights(
    batches: Iterable[tuple[Any, Any, Any]], *, top_k: int = 5, joint: int | None = 30, per_token: int | None = 50
) -> CrossModal:
    """Weight omega of each latent: do the tokens of both modalities that activate it most look alike?

    With T_j and V_j the ``top_k`` most activating tokens of latent j in the two modalities and h the hidden states,
    omega_j = mean over T_j x V_j of cos(h_t, h_v); a zero hidden state has cosine 0 with everything.

    Parameters
    ----------
    batches
        ``(codes, hidden, modality)`` for some tokens each, in any order and number: codes, sparse or dense (n, m), not
        negative; the hidden states that were encoded, (n, d), in a space that both modalities share; 0 for the first
        and 1 for the second modality, (n,). Memory is bounded by 2 m ``top_k`` hidden states, however many tokens come.
    top_k
        Tokens of each modality that are compared.
    joint
        Tokens of both modalities together among which the ``top_k`` of each must lie, as in the released code. With
        many more tokens of one modality than of the other (patches and words) nearly all latents are then said to be of
        one modality; None looks at each modality by itself, as the paper writes it.
    per_token
        Only this many largest latents of a token count; None: all.

    Returns
    -------
    CrossModal

    Raises
    ------
    InputError
        For codes that are negative or of different widths, lengths that differ, or no tokens at all.

    Notes
    -----
    The released code also lists latents of value 0 where a token has fewer than ``per_token`` active ones; here a
    latent counts for a token only where it is active.
    """
    if top_k < 1 or (joint is not None and joint < 2 * top_k):
        raise InputError(f"top_k must be at least 1 and joint at least 2 top_k, found top_k={top_k}, joint={joint}")
    keep = top_k if joint is None else joint
    best, n_latents = (_Best.empty(), _Best.empty()), None
    for codes, hidden, modality in batches:
        codes, modality = _checked(codes, modality, n_latents)
        n_latents = codes.shape[1]
        hidden = np.asarray(hidden, np.float32)
        if hidden.ndim != 2 or len(hidden) != codes.shape[0]:
            raise InputError(f"codes have {codes.shape[0]} rows, hidden states have shape {hidden.shape}")
        if per_token is not None:
            codes = _largest(codes, per_token)
        for which, found in enumerate(best):
            mine = modality == which
            if mine.any():
                found.add(codes[mine], hidden[mine], keep=keep, top_k=top_k)
    if n_latents is None:
        raise InputError("no tokens were given; batches must hold at least one")
    counts = _counts(best, n_latents, joint)
    kind = np.full(n_latents, "silent", dtype="<U6")
    kind[(counts[0] > 0) & (counts[1] == 0)] = "first"
    kind[(counts[0] == 0) & (counts[1] > 0)] = "second"
    kind[(counts > 0).all(0)] = "rare"
    both = (counts >= top_k).all(0)
    kind[both] = "both"
    weight = np.full(n_latents, np.nan)
    if both.any():
        first, second = (found.direction(n_latents)[both] for found in best)
        weight[both] = np.einsum("md,md->m", first, second) / top_k**2
    return CrossModal(weight, kind)


def sample_scores(batches: Iterable[tuple[Any, Any, Any]], weight: Any, *, delta: float = 0.0) -> dict[str, np.ndarray]:
    """Score of each sample: the sum of the weights of the latents active in both of its modalities.

    score_s = sum of omega_j over {j : z_tj > delta for a token t of s of the first and one of the second modality};
    latents without a weight add nothing.

    Parameters
    ----------
    batches
        ``(codes, modality, sample)`` for all tokens of some samples: codes (n, m), 0 or 1 (n,), names or numbers of the
        samples (n,). The tokens of a sample come in one batch.
    weight
        (m,), from :func:`cross_modal_weights`; NaN where there is none.
    delta
        A latent is active above this value. The released code takes 1 for activations of norm sqrt(d); codes of
        biosae are in the units of the embedding, so the default asks only that they are active.

    Returns
    -------
    dict of arrays, one entry a sample, in the order of their first tokens
        ``sample``; ``score``; ``n_shared``, latents active in both modalities; ``n_weighted``, those of them that have
        a weight; ``l0`` and ``l1``, mean active latents and mean sum of codes of a token: the simpler rankings that
        the score is compared with.

    Raises
    ------
    InputError
        For a sample in two batches, codes that are negative or do not fit the weights, or lengths that differ.
    """
    weight = np.asarray(weight, np.float64)
    known = np.isfinite(weight)
    value = np.where(known, weight, 0.0)
    seen: set[Any] = set()
    parts: list[dict[str, np.ndarray]] = []
    for codes, modality, sample in batches:
        codes, modality = _checked(codes, modality, len(weight))
        sample = np.asarray(sample)
        if sample.shape != modality.shape:
            raise InputError(f"{len(modality)} tokens, but samples of shape {sample.shape}")
        names, first, number = np.unique(sample, return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        number, names = place[number], names[order]
        again = seen.intersection(names.tolist())
        if again:
            raise InputError(f"sample {next(iter(again))!r} comes in two batches; give all of its tokens in one")
        seen.update(names.tolist())
        active = codes > delta
        shared = None
        for which in (0, 1):
            mine = np.flatnonzero(modality == which)
            gather = scipy.sparse.csr_matrix(
                (np.ones(len(mine)), (number[mine], mine)), shape=(len(names), len(modality))
            )
            found = (gather @ active) > 0
            shared = found if shared is None else shared.multiply(found)
        shared = scipy.sparse.csr_matrix(shared, dtype=np.float64)
        tokens = np.bincount(number, minlength=len(names))
        parts.append(
            {
                "sample": names,
                "score": shared @ value,
                "n_shared": np.diff(shared.indptr),
                "n_weighted": (shared @ known.astype(float)).astype(np.int64),
                "l0": np.bincount(number, np.diff(codes.indptr), len(names)) / tokens,
                "l1": np.bincount(number, np.asarray(codes.sum(1)).ravel(), len(names)) / tokens,
            }
        )
    if not parts:
        raise InputError("no samples were given; batches must hold at least one")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def best_samples(scores: Any, *, share: float) -> np.ndarray:
    """The int(n share) samples of the highest scores, bool (n,); of equal scores the earlier sample is kept.

    Raises
    ------
    InputError
        If the share is not in (0, 1] or a score is not finite.
    """
    if not 0 < share <= 1:
        raise InputError(f"share must be above 0 and at most 1, found {share!r}")
    order = _falling(scores)
    kept = np.zeros(len(order), dtype=bool)
    kept[order[: int(len(order) * share)]] = True
    return kept


def score_quarters(scores: Any) -> np.ndarray:
    """Quarter of each sample by falling score, int64 (n,): 0 the best, 3 the worst; borders at int(n q / 4)."""
    order = _falling(scores)
    quarter = np.empty(len(order), np.int64)
    quarter[order] = np.searchsorted([len(order) * q // 4 for q in (1, 2, 3)], np.arange(len(order)), side="right")
    return quarter


def _falling(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise InputError("scores must be one finite number for each sample")
    return np.argsort(-scores, kind="stable")


def _counts(best: tuple[_Best, _Best], n_latents: int, joint: int | None) -> np.ndarray:
    """Tokens of each modality that are looked at, int64 (2, m)."""
    latent = np.concatenate([found.latent for found in best])
    value = np.concatenate([found.value for found in best])
    which = np.repeat([0, 1], [len(found.latent) for found in best])
    latent, _, which, rank = _ranked(latent, value, which)
    near = rank < (len(rank) if joint is None else joint)
    return np.stack([np.bincount(latent[near & (which == w)], minlength=n_latents) for w in (0, 1)])


def _ranked(latent: np.ndarray, value: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, ...]:
    """Entries sorted by latent and falling value (ties in their order), and the rank of each in its latent."""
    order = np.lexsort((-value, latent))
    latent = latent[order]
    starts = np.flatnonzero(np.r_[True, latent[1:] != latent[:-1]]) if len(latent) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(latent)])
    return latent, value[order], other[order], np.arange(len(latent)) - np.repeat(starts, lengths)


def _largest(codes: scipy.sparse.csr_matrix, count: int) -> scipy.sparse.csr_matrix:
    """The ``count`` largest entries of each row."""
    if not codes.nnz or np.diff(codes.indptr).max() <= count:
        return codes
    entries = codes.tocoo()
    row, value, column, rank = _ranked(entries.row, entries.data, entries.col)
    near = rank < count
    return scipy.sparse.csr_matrix((value[near], (row[near], column[near])), shape=codes.shape)


def _checked(codes: Any, modality: Any, n_latents: int | None) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    codes = scipy.sparse.csr_matrix(codes, dtype=np.float32)
    codes.eliminate_zeros()
    modality = np.asarray(modality)
    if n_latents is not None and codes.shape[1] != n_latents:
        raise InputError(
            f"codes have {codes.shape[1]} latents, expected {n_latents}; all must come from one dictionary"
        )
    if codes.nnz and not codes.data.min() > 0:
        raise InputError("cross-modal weights are for codes that are not negative")
    if modality.shape != (codes.shape[0],) or not np.isin(modality, (0, 1)).all():
        raise InputError(f"modality must be 0 or 1 for each of the {codes.shape[0]} tokens")
    return codes, modality.astype(np.int64)
