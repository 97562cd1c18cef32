"""Names for latents from a vocabulary of concepts: chosen on some patients, scored on others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, StatisticsError, nearest
from biosae.interpret.rows import groups_of
from biosae.stats import associate, bh

COLUMNS = (
    "latent", "concept", "score_naming", "second", "margin", "score", "ci_low", "ci_high", "p", "q", "rank",
    "mismatched", "n_active_naming", "n_units", "n_groups", "n_samples", "status",
)  # fmt: skip


def read_vocabulary(source: str | os.PathLike | Sequence[str]) -> list[str]:
    """Concepts of a text file (one a line, ``#`` begins a comment) or of a list, each once, in order.

    Raises
    ------
    InputError
        If the file is absent or there are fewer than two concepts.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"{path} does not exist; give a text file with one concept a line, or a list")
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = list(source)
        if any(not isinstance(line, str) for line in lines):
            raise InputError("concepts must be texts")
    found = list(dict.fromkeys(t for line in lines if (t := line.partition("#")[0].strip())))
    if len(found) < 2:
        raise InputError(f"{len(found)} concepts; a vocabulary needs at least two to choose between")
    return found


def concept_scores(
    emb: Any, vocabulary: str | os.PathLike | Sequence[str], tower: Any, *, templates: Sequence[str] = ("{}",)
) -> pd.DataFrame:
    """Cosine of every image with every concept, in the common space of an image-text model.

    Parameters
    ----------
    emb
        :class:`biosae.Embeddings` of the image tower of the same model, one row a sample (``layer=-1, pool="head"``).
        They need not be those that the SAE was trained on.
    vocabulary
        As in :func:`read_vocabulary`.
    tower
        :func:`biosae.encoders.text_tower`.
    templates
        Sentences around the concept, such as ``"an H&E image of {}"``.

    Returns
    -------
    DataFrame
        (samples, concepts), index ``sample_id``.

    Raises
    ------
    IdentityError
        If images and texts are of different models, or the embeddings are not the projected features.
    InputError
        If the embeddings have several rows a sample.
    """
    tower.check(emb)
    if emb.tokens_per_sample != 1:
        raise InputError("concepts are held against whole images: embed with pool='head'")
    concepts = read_vocabulary(vocabulary)
    texts = tower.embed(concepts, templates=templates)
    out = np.empty((emb.n_samples, len(concepts)), np.float32)
    for start, rows in emb.blocks():
        norm = np.linalg.norm(rows, axis=1, keepdims=True)
        out[start : start + len(rows)] = rows @ texts.T / np.where(norm > 0, norm, 1)
    return pd.DataFrame(out, index=emb.obs.index, columns=concepts)


def name_latents(
    adata: Any,
    scores: pd.DataFrame,
    *,
    latents: Sequence[str] | None = None,
    split: str = "split",
    naming: str = "train",
    held_out: str = "test",
    unit: str = "sample",
    groups: str | None = "patient",
    min_active: int = 10,
    random_state: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """The concept that goes best with each latent on naming samples, tested on held-out patients.

    On naming samples a latent takes the concept of highest Spearman correlation of its code with the concept's score.
    On held-out samples that one pair is tested once, through
    :func:`biosae.stats.associate`; nothing is chosen there.

    Parameters
    ----------
    adata
        Codes, a row a sample (:func:`biosae.encode` with pooled tokens).
    scores
        Samples by concepts, joined by id: :func:`concept_scores`, or any other measure of a concept's presence.
    latents
        Some latents; None: all.
    split, naming, held_out
        Column of ``obs`` and its values.
    unit, groups, **options
        Of :func:`biosae.stats.associate`, for the held-out test. No group may be in both parts.
    min_active
        Naming samples in which a latent must fire to be named.
    random_state
        Seed.

    Returns
    -------
    DataFrame
        A row a latent: ``latent, concept, score_naming`` (Spearman's rho), ``second`` (the next best concept),
        ``margin`` (rho less that of ``second``), ``score`` with ``ci_low, ci_high, p, q`` on held-out samples (q over
        the latents tested), ``rank`` of the concept among all concepts on held-out samples (1: still the best),
        ``mismatched`` (mean held-out rho of the concepts that other latents were given: the score of shuffled names),
        ``n_active_naming, n_units, n_groups, n_samples, status`` (that of the test; ``not_named``: fires in too few
        naming samples). ``attrs["biosae"]``: ``n_concepts``, ``median_rank`` and ``chance_rank`` ``(n_concepts + 1) /
        2``.

    Raises
    ------
    InputError
        If samples, columns or parts do not fit, or a score is missing.
    StatisticsError
        If groups lie in both parts.

    Notes
    -----
    Correlation, not the mean cosine, because some words are close to every image. A high score says that the concept's
    direction in the image-text model and the latent rise together, not that the latent means the concept: look at the
    examples. After the idea of Oikarinen and Weng 2023 (CLIP-Dissect), with the choice and the test on different
    patients.
    """
    obs = adata.obs
    if not scores.index.is_unique or not scores.columns.is_unique or scores.shape[1] < 2:
        raise InputError("scores need unique samples and at least two different concepts")
    absent = adata.obs_names.difference(scores.index)
    if len(absent):
        raise InputError(f"{len(absent)} samples have no concept scores, e.g. {str(absent[0])!r}")
    for name in sorted({"method", "controls", "correction"} & set(options)):
        raise InputError(f"name_latents takes no {name}: the held-out test is that of Spearman's rho, with q by BH")
    if latents is not None:
        latents = [latents] if isinstance(latents, str) else latents
        unknown = [name for name in latents if name not in adata.var_names]
        if unknown:
            raise InputError(f"no latent {unknown[0]!r}; {nearest(unknown[0], adata.var_names)}")
        adata = adata[:, list(latents)]
    if split not in obs:
        raise InputError(f"obs has no column {split!r}; {nearest(split, obs.columns)}")
    values = obs[split].astype(str).to_numpy()
    parts = {}
    for part, name in (("train", naming), ("test", held_out)):
        parts[part] = np.flatnonzero(values == name)
        if len(parts[part]) < 3:
            raise InputError(
                f"{len(parts[part])} samples have {split} {name!r}, at least 3 are needed; "
                f"{nearest(name, sorted(set(values)))}"
            )
    if groups is not None:
        groups_of(obs, groups, parts)
    table = scores.reindex(adata.obs_names).to_numpy(np.float64)
    if not np.isfinite(table).all():
        raise InputError("scores hold NaN or infinity; drop those samples or concepts")
    codes = sp.csr_matrix(adata.X, dtype=np.float64, copy=True)
    codes.eliminate_zeros()
    naming_rho = _spearman(codes[parts["train"]], table[parts["train"]])
    held_rho = _spearman(codes[parts["test"]], table[parts["test"]])
    active = np.diff(sp.csc_matrix(codes[parts["train"]]).indptr)
    named = np.flatnonzero((active >= min_active) & np.isfinite(naming_rho).any(1))
    if not len(named):
        raise StatisticsError(
            f"no latent fires in {min_active} naming samples; lower min_active or name with more samples"
        )
    order = np.argsort(-np.nan_to_num(naming_rho, nan=-2), axis=1, kind="stable")
    best, second = order[:, 0], order[:, 1]
    tests = _tested(adata, table, scores.columns, parts["test"], best, named, unit, groups, random_state, options)
    rows = [
        {"latent": name, "n_active_naming": n, "status": "not_named"}
        for name, n in zip(adata.var_names, active.tolist())
    ]
    for j in named:
        c, mine = best[j], held_rho[j]
        others = best[named][best[named] != c]
        known = np.isfinite(mine[c])
        rows[j] |= {
            "concept": scores.columns[c], "score_naming": naming_rho[j, c], "second": scores.columns[second[j]],
            "margin": naming_rho[j, c] - naming_rho[j, second[j]],
            "rank": 1 + (mine > mine[c]).sum() if known else np.nan,
            "mismatched": mine[others].mean() if known and len(others) else np.nan,
            "score": tests[j]["estimate"],
            **{k: tests[j][k] for k in ("ci_low", "ci_high", "p", "n_units", "n_groups", "n_samples", "status")},
        }  # fmt: skip
    out = pd.DataFrame(rows, columns=list(COLUMNS))
    out["q"] = bh(out["p"])
    out.attrs["biosae"] = {
        "n_concepts": scores.shape[1], "median_rank": float(out["rank"].median()),
        "chance_rank": (scores.shape[1] + 1) / 2, "unit": unit, "groups": groups, "n_named": len(named),
    }  # fmt: skip
    return out


def _spearman(codes: sp.csr_matrix, table: np.ndarray) -> np.ndarray:
    """Spearman's rho (m, c) of columns of codes (n, m) and scores (n, c); NaN where a column is constant."""
    from scipy.stats import rankdata

    from biosae.sae.labels import rank_codes

    ranks, spread = rank_codes(codes)
    other = rankdata(table, axis=0)
    other -= other.mean(0)
    norm = spread[:, None] * np.linalg.norm(other, axis=0)[None, :]
    return np.divide(ranks.T @ other, norm, out=np.full(norm.shape, np.nan), where=norm > 1e-12)


def _tested(
    adata: Any, table: np.ndarray, concepts: pd.Index, rows: np.ndarray, best: np.ndarray, named: np.ndarray, unit: str,
    groups: str | None, random_state: int, options: dict[str, Any],
) -> dict[int, pd.Series]:  # fmt: skip
    """The held-out test of every named latent with its own concept."""
    import anndata

    found = {}
    for c in np.unique(best[named]):
        mine = named[best[named] == c]
        obs = adata.obs.iloc[rows].assign(concept_score=table[rows, c])
        part = anndata.AnnData(sp.csr_matrix(adata.X)[rows][:, mine], obs=obs, var=adata.var.iloc[mine])
        given = {"groups": groups} if groups is not None else {"assume_independent": True}
        tests = associate(
            part, "concept_score", unit=unit, method="spearman", controls=False, random_state=random_state,
            **given, **options,
        ).set_index("latent")  # fmt: skip
        found |= {j: tests.loc[adata.var_names[j]] for j in mine}
    return found
