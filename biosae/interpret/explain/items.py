"""Items an explanation is written from, and items it is scored on: disjoint patients, quantiles, hard negatives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest

QUANTILES = 10
NEIGHBOURS = 10
"""Latents with the highest Jaccard index of firing, in whose items the co-firing negatives are looked for."""
LEAST_GROUPS = 3
TAILS = {"+": 1.0, "-": -1.0}
IDENTIFIER = re.compile(
    r"(patient|subject|participant|donor|animal|case|specimen|block|section|slide|scan|image|sample|recording|record|"
    r"sequence|study|visit|accession)_(id|number|name)|patient|slide|recording|sequence|mrn",
    re.IGNORECASE,
)
"""Columns of ``obs`` that hold names of people or things."""
PATHS = re.compile(r"(.*_)?(path|file|filename)", re.IGNORECASE)
DUPLICATE = 0.045
"""Two items are near-duplicates if their embeddings lie closer than this share of the median distance to the mean: of
items at that distance, a cosine of 0.999."""
LEAST_WIDTH = 32
"""In embeddings of fewer numbers different items may lie as close, so near-duplicates are not looked for."""
COLUMNS = ["latent", "tail", "part", "kind", "sample_id", "group", "activation", "level"]


@dataclass(frozen=True)
class Items:
    """Chosen items and what they were chosen from.

    Attributes
    ----------
    table : DataFrame
        One row an item: ``latent, tail`` (``+``, and ``-`` for the negative end of signed codes), ``part``
        (``write``, ``score``), ``kind`` (``active``; of silent items ``random``, ``near``, ``cofiring``),
        ``sample_id, group, activation, level`` (0 to 10: ``ceil(10 a / a_max)``, a_max of the writing items).
    latents : DataFrame
        One row a latent and tail: ``status``, ``n_active_write``, ``n_active_score``, ``n_groups_write``,
        ``n_groups_score`` (groups in which it fires), ``prevalence`` (share of the scoring patients' items in which it
        fires).
    write_ids, score_ids : frozenset of str
        Samples of the two parts.
    identifiers : frozenset of str
        Names of samples, groups, patients, slides, recordings and files in lower case, which no prompt may hold.
    near_duplicates : frozenset of str or None
        Scoring samples that nearly repeat a writing one (a scan taken twice, one person under two names, blank tiles).
        No question is asked of them; they count in ``prevalence``. None: ``obsm["embedding"]`` is absent, or narrower
        than :data:`LEAST_WIDTH`, so nobody looked.
    """

    table: pd.DataFrame
    latents: pd.DataFrame
    write_ids: frozenset[str]
    score_ids: frozenset[str]
    identifiers: frozenset[str]
    near_duplicates: frozenset[str] | None

    def of(self, latent: str, tail: str, part: str, kind: str | None = None) -> pd.DataFrame:
        """Rows of one latent and tail in one part."""
        rows = self._parts.get((latent, tail, part))
        if rows is None:
            return self.table.iloc[:0]
        return rows if kind is None else rows[rows["kind"] == kind]

    @cached_property
    def _parts(self) -> dict[tuple, pd.DataFrame]:
        return dict(iter(self.table.groupby(["latent", "tail", "part"], sort=False)))

    @property
    def scored(self) -> list[tuple[str, str]]:
        """Latents and tails that have enough items."""
        ok = self.latents[self.latents["status"] == "ok"]
        return list(zip(ok["latent"], ok["tail"]))


def choose(
    adata: Any,
    *,
    latents: Sequence[str] | None = None,
    n_write: int = 40,
    n_score: int = 50,
    n_hard: int = 10,
    min_active: int = 200,
    floor: float = 0.0,
    share: float = 0.5,
    groups: str = "patient",
    assume_independent: bool = False,
    random_state: int = 0,
) -> Items:
    """Items from which explanations are written and items on which they are scored, of disjoint patients.

    Patients are dealt once, for all latents. In each part, active items are drawn equally from ten quantiles of
    activation (``n // 10`` each), silent ones at random; patients take turns, so that none fills a sample. Two further
    kinds of silent items are harder: ``near`` are those whose embedding is most similar (cosine, centred) to the mean
    of the active ones, ``cofiring`` those in which most of the ten latents are active that share most active items with
    this one (Jaccard). Scoring items that nearly repeat a writing item (:data:`DUPLICATE`) are not drawn.

    Parameters
    ----------
    adata : AnnData of shape (n_samples, m)
        Latents, a row a sample; ``obsm["embedding"]`` for ``near``.
    latents
        Names; None: all. Publish the scores of all, not of a chosen few.
    n_write, n_score
        Active items in each part; the same number of silent ones is drawn at random.
    n_hard
        Scoring items of each harder kind.
    min_active
        A latent (end of a latent) that is active in fewer samples is not scored, which is not a score of 0.
    floor
        A sample is active if the activation is above this share of the highest one of the writing samples, else it is
        silent. Where codes of many tokens are pooled, a latent is above 0 in nearly every sample, and 0.3 says more
        (the share from which tokens are highlighted).
    share
        Of the patients, for writing.
    groups
        Column of independent groups.
    assume_independent
        True: every row is its own group; only where rows are known to be independent.
    random_state
        Seed.

    Raises
    ------
    StatisticsError
        If the groups are unknown and independence is not said aloud, or fewer than 3 groups are in a part.
    InputError
        For rows that are tokens or share a name, unknown latents or impossible numbers.

    References
    ----------
    Paulo, Mallen, Juang, Belrose 2024, arXiv 2410.13928, for quantiles and numbers. The released code draws writing and
    scoring examples from one pool; here patients are disjoint.
    """
    obs = adata.obs
    if "sample_id" in obs and obs["sample_id"].duplicated().any():
        raise InputError(
            "these rows are tokens: pass codes pooled to samples here, and the tokens as tokens= to trials"
        )
    if not 0 <= floor < 1:
        raise InputError(f"floor={floor!r} is a share of the highest activation: from 0 to below 1")
    if not 0 < share < 1 or n_write < QUANTILES or n_score < QUANTILES or n_hard < 0:
        raise InputError(f"share must lie between 0 and 1, n_write and n_score be at least {QUANTILES}, n_hard not < 0")
    names = list(adata.var_names) if latents is None else [str(name) for name in latents]
    unknown = [name for name in names if name not in adata.var_names]
    if unknown:
        raise InputError(f"no latent {unknown[0]!r}; {nearest(unknown[0], adata.var_names)}")
    group = _groups(obs, groups, assume_independent)
    rng = np.random.default_rng(random_state)
    ids = (obs["sample_id"] if "sample_id" in obs else pd.Series(obs.index)).astype(str).to_numpy()
    if len(np.unique(ids)) < len(ids):
        name, n = next(iter(pd.Series(ids).value_counts().items()))
        raise InputError(f"{name!r} names {n} rows; items are told apart by name: call adata.obs_names_make_unique()")
    known = group[group != ""]
    dealt = rng.permutation(np.unique(known))
    writing = set(dealt[: round(share * len(dealt))])
    in_write = np.array([g in writing for g in group]) & (group != "")
    in_score = ~in_write & (group != "")
    for part, inside in (("writing", in_write), ("scoring", in_score)):
        n = len(np.unique(group[inside]))
        if n < LEAST_GROUPS:
            raise StatisticsError(
                f"{len(dealt)} values of {groups!r} leave {n} for {part}, and {LEAST_GROUPS} are needed in each part; "
                "take more patients, or another share"
            )
    codes = sp.csc_matrix(adata.X)
    signed = codes.nnz > 0 and codes.data.min() < 0
    embedding = adata.obsm.get("embedding")
    wide = embedding is not None and embedding.shape[1] >= LEAST_WIDTH
    repeated = _repeats(embedding, in_write, in_score) if wide else np.zeros(len(obs), bool)
    asked = in_score & ~repeated
    pool = _Pool(_active(codes, in_write, floor, signed), codes.shape[1], embedding, group, np.flatnonzero(asked))
    rows, facts = [], []
    for name in names:
        j = adata.var_names.get_loc(name)
        for tail in TAILS if signed else ("+",):
            a = TAILS[tail] * codes[:, [j]].toarray().ravel()
            seed = np.random.default_rng([random_state, j, tail == "-"])
            top = float(max(a[in_write].max(), 0.0))
            fires = a > floor * top
            fact = _fact(fires, pool.group, in_write, asked, min_active)
            fact["prevalence"] = (fires & in_score).sum() / in_score.sum()
            facts.append({"latent": name, "tail": tail, **fact})
            if fact["status"] != "ok":
                continue
            for part, inside, n in (("write", in_write, n_write), ("score", asked, n_score)):
                active = pool.quantiles(a, np.flatnonzero(inside & fires), n, seed)
                chosen = {"active": active, "random": pool.turns(np.flatnonzero(inside & ~fires), seed)[:n]}
                if part == "score" and n_hard:
                    chosen |= pool.hard(j, fires, active, chosen["random"], n_hard, seed)
                for kind, which in chosen.items():
                    rows += [
                        (name, tail, part, kind, ids[i], group[i], max(float(a[i]), 0.0), level(max(a[i], 0.0), top))
                        for i in which
                    ]
    return Items(
        pd.DataFrame(rows, columns=COLUMNS),
        pd.DataFrame(facts),
        frozenset(ids[in_write]),
        frozenset(ids[in_score]),
        identifiers(obs, groups),
        frozenset(ids[repeated]) if wide else None,
    )


def level(activation: Any, top: float) -> Any:
    """``ceil(10 a / a_max)``, at most 10.

    >>> level(0.0, 2.0), level(0.01, 2.0), level(1.0, 2.0), level(5.0, 2.0)
    (0, 1, 5, 10)
    """
    found = np.minimum(np.ceil(10 * np.asarray(activation, float) / top), 10).astype(int)
    return int(found) if found.ndim == 0 else found


def identifiers(obs: pd.DataFrame, groups: str) -> frozenset[str]:
    """Names of rows, groups, patients, slides, recordings and files of at least 3 characters, in lower case."""
    found = set(obs.index.astype(str))
    for name in obs:
        if name == groups or IDENTIFIER.fullmatch(str(name)):
            found |= set(obs[name].dropna().astype(str).unique())
        elif PATHS.fullmatch(str(name)):
            paths = [PurePath(path) for path in obs[name].dropna().astype(str).unique()]
            found |= {word for path in paths for word in (str(path), path.name, path.stem)}
    return frozenset(word.lower() for word in found if len(word) > 2)


def _repeats(embedding: Any, in_write: np.ndarray, in_score: np.ndarray) -> np.ndarray:
    """Scoring rows that are near-duplicates of a writing row, bool (n,)."""
    X = np.asarray(embedding, np.float32)
    X = X - X.mean(axis=0)
    square = (X**2).sum(axis=1)
    A, least = X[in_write], DUPLICATE**2 * float(np.median(square))
    out = np.zeros(len(X), bool)
    for rows in np.array_split(np.flatnonzero(in_score), max(1, int(in_score.sum()) * len(A) // 2**24)):
        near = square[in_write] + square[rows, None] - 2 * X[rows] @ A.T
        out[rows] = near.min(axis=1) < least
    return out


def _active(codes: sp.csc_matrix, in_write: np.ndarray, floor: float, signed: bool) -> sp.csc_matrix:
    """Which latents are active in which rows, float32 (n, m); of signed codes their negative ends beside it."""
    ends = []
    for sign in TAILS.values() if signed else (1.0,):
        end = (sign * codes).maximum(0).tocsc()
        top = end[in_write].max(axis=0).toarray().ravel()
        end.data = (end.data > floor * np.repeat(top, np.diff(end.indptr))).astype(np.float32)
        end.eliminate_zeros()
        ends.append(end)
    return sp.hstack(ends, format="csc")


def _groups(obs: pd.DataFrame, column: str, assume_independent: bool) -> np.ndarray:
    """Group of every row as text; empty where unknown."""
    from biosae.stats.nested import require_groups

    if assume_independent:
        return np.arange(len(obs)).astype(str)
    require_groups(obs, column)
    return np.array(["" if pd.isna(v) else str(v) for v in obs[column]])


def _fact(
    fires: np.ndarray, group: np.ndarray, in_write: np.ndarray, asked: np.ndarray, min_active: int
) -> dict[str, Any]:
    n = {part: int((fires & inside).sum()) for part, inside in (("write", in_write), ("score", asked))}
    g = {part: len(np.unique(group[fires & inside])) for part, inside in (("write", in_write), ("score", asked))}
    silent = min(int((~fires & in_write).sum()), int((~fires & asked).sum()))
    if not fires.any():
        status = "dead"
    elif n["write"] + n["score"] < min_active or min(n.values()) < QUANTILES or silent < QUANTILES:
        status = "too_sparse"
    elif min(g.values()) < LEAST_GROUPS:
        status = "too_few_groups"
    else:
        status = "ok"
    return {
        "status": status, "n_active_write": n["write"], "n_active_score": n["score"], "n_groups_write": g["write"],
        "n_groups_score": g["score"],
    }  # fmt: skip


class _Pool:
    """Draws from rows: in turns of the groups, from quantiles, and the hardest silent ones of the scoring rows."""

    def __init__(
        self, active: sp.csc_matrix, m: int, embedding: Any, group: np.ndarray, score: np.ndarray
    ) -> None:  # fmt: skip
        self.m, self.group, self.score = m, np.unique(group, return_inverse=True)[1], score
        self.binary = active[score].tocsc()
        self.n_fires = np.asarray(self.binary.sum(axis=0)).ravel()
        self.unit = None
        if embedding is not None:
            rows = np.asarray(embedding)[score]
            rows = rows - rows.mean(axis=0)
            self.unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def turns(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows in random order in which the first of every group come before the second of any."""
        rows = rng.permutation(rows)
        place = pd.Series(self.group[rows]).groupby(self.group[rows]).cumcount().to_numpy()
        return rows[np.argsort(place, kind="stable")]

    def quantiles(self, a: np.ndarray, rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """``n // 10`` rows of each of ten quantiles of activation, highest first."""
        order = rows[np.argsort(-a[rows], kind="stable")]
        parts = [self.turns(part, rng)[: n // QUANTILES] for part in np.array_split(order, QUANTILES)]
        chosen = np.concatenate(parts)
        return chosen[np.argsort(-a[chosen], kind="stable")]

    def hard(
        self, j: int, fires: np.ndarray, active: np.ndarray, random: np.ndarray, n: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Silent scoring rows nearest to the active ones, and those in which the latent's neighbours are active."""
        taken = np.isin(self.score, random) | fires[self.score]
        found = {}
        if self.unit is not None:
            centre = self.unit[np.isin(self.score, active)].mean(axis=0)
            closeness = np.where(taken, -np.inf, self.unit @ centre)
            found["near"] = self._best(closeness, n, rng)
            taken = taken | np.isin(self.score, found["near"])
        own = fires[self.score].astype(np.float32)
        both = self.binary.T @ own
        jaccard = both / np.maximum(self.n_fires + own.sum() - both, 1)
        jaccard[j :: self.m] = 0  # its other end is no neighbour
        near = np.argsort(-jaccard, kind="stable")[:NEIGHBOURS]
        near = near[jaccard[near] > 0]
        count = np.asarray(self.binary[:, near].sum(axis=1)).ravel() if len(near) else np.zeros(len(self.score))
        found["cofiring"] = self._best(np.where(taken | (count == 0), -np.inf, count), n, rng)
        return found

    def _best(self, score: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
        """Rows of the highest finite scores; among equal ones patients take turns."""
        value = dict(zip(self.score.tolist(), score.tolist()))
        rows = self.turns(self.score[np.isfinite(score)], rng)
        return rows[np.argsort([-value[i] for i in rows.tolist()], kind="stable")][:n]
