"""Latents that fire on a domain and on nothing without meaning, and whether the domain hangs on their directions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import special, stats

from biosae.errors import InputError, StatisticsError
from biosae.interpret.resampled import over_patients
from biosae.interpret.stress_probes import controls_of, folds, linear_probe
from biosae.stats.features import decoder, embedding, positions
from biosae.stats.nested import codes_of, in_memory

RELAXED = 0.1
"""Highest rate on inputs without meaning if none passes ``max_rate``."""
NORM_SD = 3.0
"""An embedding norm further than this from the target's is outside of what the encoder is made for."""
MIN_FAMILIES = 2


def specific(
    target: Any, random: Mapping[str, Any], *, min_rate: float = 0.5, max_rate: float = 0.05, keep: int = 10,
    groups: str = "patient", random_state: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Latents that fire on a target domain and not on inputs without meaning.

    ``r_T(j) = P(z_j != 0 | target)`` and ``r_R(j)``, the largest rate over the families of random inputs; the specific
    set is ``{j: r_T >= min_rate, r_R <= max_rate}``, of which the ``keep`` with the largest mean code (signed codes:
    mean size) on the target.
    If it is empty, ``max_rate`` is relaxed to 0.1 once. Rates are shares of rows; encode with ``tokens=None`` or
    ``tokens="fraction_active"`` for shares of tokens (codes averaged over many tokens are hardly ever 0).

    Parameters
    ----------
    target
        Latents of the domain (rows of one site, species, label), (n, m).
    random
        Name of a family -> latents of inputs without meaning by the same dictionary, see
        :func:`biosae.interpret.altered`. Two families or more.
    min_rate, max_rate, keep
        As above; defaults of Wong, Sajjad and Siddique.
    groups
        Column of patients, for the interval of ``rate_target`` of the latents that are kept.
    random_state
        Seed of the resamples.

    Returns
    -------
    DataFrame
        A row a latent, in the order of the table: ``latent, rate_target, rate_low, rate_high, mean_target,
        rate_random`` (largest of the valid families), ``rate_random_high`` (upper bound of its 95 % interval, exact
        binomial, inputs independent), ``rate:<family>`` for each family, ``rank`` (1 is first; missing for those
        outside the set), ``specific``, ``n_patients, n_samples, status, reason``. ``attrs["families"]``: of each
        family its rows and inputs, median norm of its embeddings in standard deviations from the target's, and status
        (``ok``, ``invalid_null``, or ``not_checked`` where embeddings were not kept). ``attrs["max_rate"]`` is what was
        used. With fewer than two valid families nothing is specific and ``status`` is ``refused``.

    Raises
    ------
    InputError
        For fewer than two families, or tables of another dictionary.

    References
    ----------
    Wong, Sajjad and Siddique 2026, arXiv 2604.03532; families for images and signals are definitions of this package.
    """
    if len(random) < MIN_FAMILIES:
        raise InputError(f"{len(random)} families of random inputs: give two or more, a latent must be silent on all")
    target = in_memory(target)
    names = pd.Index(target.var_names.astype(str))
    rate, mean = _rates(target), np.asarray(target.X.mean(axis=0), dtype=np.float64).ravel()
    out = pd.DataFrame({"latent": names, "rate_target": rate, "rate_low": np.nan, "rate_high": np.nan,
                        "mean_target": mean})  # fmt: skip
    families, rates = [], {}
    for name, table in random.items():
        if not names.equals(pd.Index(table.var_names.astype(str))):
            raise InputError(f"family {name!r} has other latents; encode it with the same dictionary")
        table = in_memory(table)
        rates[name] = _rates(table)
        far = _norm_distance(target, table)
        status = "not_checked" if np.isnan(far) else "invalid_null" if abs(far) > NORM_SD else "ok"
        inputs = table.obs["sample_id"].nunique() if "sample_id" in table.obs else table.n_obs  # or rows are tokens
        families.append({"family": name, "n_rows": table.n_obs, "n_inputs": inputs, "norm_sd": far, "status": status})
        out[f"rate:{name}"] = rates[name]
    valid = [f["family"] for f in families if f["status"] != "invalid_null"]
    sizes = {f["family"]: f["n_inputs"] for f in families}
    out["rate_random"] = np.max([rates[f] for f in valid], axis=0) if valid else np.nan
    out["rate_random_high"] = np.max([_upper(rates[f], sizes[f]) for f in valid], axis=0) if valid else np.nan
    out["rank"], out["specific"] = pd.array([pd.NA] * len(out), dtype="Int64"), False
    out["n_samples"], out["status"], out["reason"] = target.n_obs, "ok", ""
    grouped = groups in target.obs
    codes = codes_of(target.obs, groups)[0] if grouped else np.arange(target.n_obs)
    out["n_patients"] = len(np.unique(codes)) if grouped else 0
    out.attrs = {"families": pd.DataFrame(families), "max_rate": max_rate, "min_rate": min_rate}
    if len(valid) < MIN_FAMILIES:
        out["status"] = "refused"
        out["reason"] = (
            f"{len(valid)} families have embeddings of a norm within {NORM_SD:g} SD of the target's, two are needed"
        )
        return out
    chosen = np.flatnonzero((rate >= min_rate) & (out["rate_random"] <= max_rate))
    if not len(chosen):
        out.attrs["max_rate"] = max(RELAXED, max_rate)
        chosen = np.flatnonzero((rate >= min_rate) & (out["rate_random"] <= out.attrs["max_rate"]))
        out["status"] = "relaxed" if len(chosen) else "empty"
        out["reason"] = (
            f"no latent passes max_rate={max_rate:g}"
            + ("; the set is of " if len(chosen) else ", nor ")
            + f"{out.attrs['max_rate']:g}"
        )
    if any(f["status"] == "not_checked" for f in families):
        out["reason"] = [f"{r}; " * bool(r) + "norms of embeddings were not compared: none kept" for r in out["reason"]]
    size = np.asarray(abs(sp.csr_matrix(target.X)).mean(axis=0), dtype=np.float64).ravel()
    strength = rate if _pooled(target) == "fraction_active" else size
    chosen = chosen[np.argsort(-strength[chosen], kind="stable")][:keep]
    out.loc[chosen, "rank"], out.loc[chosen, "specific"] = np.arange(1, len(chosen) + 1), True
    if not grouped:
        out["reason"] = [f"{r}; " * bool(r) + f"no column {groups!r}: no interval over patients" for r in out["reason"]]
        return out
    for j in chosen:
        fires = _fires(target, int(j))
        number = over_patients(lambda w, f=fires: w @ f / w.sum(), codes, random_state=random_state, what="the rate")
        out.loc[j, ["rate_low", "rate_high"]] = number.low, number.high
        if number.reason:
            out.loc[j, "reason"] = "; ".join(filter(None, (out.loc[j, "reason"], number.reason)))
    return out


def _pooled(adata: Any) -> str:
    return str(adata.uns.get("biosae", {}).get("tokens", "none"))


def _rates(adata: Any) -> np.ndarray:
    """Share of rows, or of tokens where codes are that share, in which each latent fires."""
    X = sp.csr_matrix(adata.X, dtype=np.float64)
    if _pooled(adata) == "fraction_active":
        return np.asarray(X.mean(axis=0)).ravel()
    return np.bincount(X.indices[X.data != 0], minlength=X.shape[1]) / max(X.shape[0], 1)


def _fires(adata: Any, j: int) -> np.ndarray:
    column = np.asarray(sp.csr_matrix(adata.X[:, [j]]).todense(), dtype=np.float64).ravel()
    return column if _pooled(adata) == "fraction_active" else (column != 0).astype(float)


def _upper(rate: np.ndarray, n: int) -> np.ndarray:
    """Upper bound of the exact 95 % interval of a share of ``n`` inputs."""
    hits = np.rint(rate * n)
    return np.where(hits < n, stats.beta.ppf(0.975, hits + 1, np.maximum(n - hits, 1e-9)), 1.0)


def _norm_distance(target: Any, random: Any) -> float:
    """Median norm of random embeddings less the mean of the target's, in standard deviations of the target's; NaN where
    embeddings were not kept.
    """
    if any("embedding" not in table.obsm for table in (target, random)):
        return float("nan")
    norms = np.linalg.norm(embedding(target), axis=1)
    spread = norms.std()
    gap = float(np.median(np.linalg.norm(embedding(random), axis=1)) - norms.mean())
    return gap / spread if spread > 1e-6 * norms.mean() else (0.0 if abs(gap) < 1e-6 * norms.mean() else np.inf)


def project_out(x: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Directional ablation ``x' = x - x Q Q^T``, Q an orthonormal basis of the span of ``directions``.

    >>> project_out(np.array([[2.0, 1.0]]), np.array([[0.6, 0.8]])).round(6).tolist()
    [[0.8, -0.6]]

    Parameters
    ----------
    x
        Embeddings (n, d).
    directions
        Rows (k, d); those that depend on others, or are 0, add nothing.

    Raises
    ------
    InputError
        If widths differ.
    """
    x, directions = np.asarray(x, dtype=np.float64), np.atleast_2d(np.asarray(directions, dtype=np.float64))
    if directions.shape[1] != x.shape[1]:
        raise InputError(f"directions have {directions.shape[1]} numbers, embeddings {x.shape[1]}")
    length = np.linalg.norm(directions, axis=1)
    unit = directions[length > 0] / length[length > 0, None]
    if not len(unit):
        return x.copy()
    _, size, basis = np.linalg.svd(unit, full_matrices=False)
    basis = basis[size > 1e-10 * size[0]]
    return x - (x @ basis.T) @ basis


@dataclass(frozen=True)
class Ablation:
    """What projecting out the directions of a set of latents does to the domains."""

    domain: str
    latents: tuple[str, ...]
    specificity: float
    """Rise of the target's loss less the largest rise of another domain's, in nats."""
    low: float
    high: float
    n_patients: int
    n_samples: int
    status: str
    reason: str
    random: np.ndarray = field(repr=False)
    """The same of sets of random latents of like number and density (n_random,)."""
    domains: pd.DataFrame = field(repr=False)
    """``domain, loss, loss_ablated, rise, n_patients, n_samples``."""

    @property
    def beyond_random(self) -> float:
        """Share of the random sets whose specificity is smaller."""
        return float((self.random < self.specificity).mean()) if len(self.random) else float("nan")


def ablate_directions(
    adata: Any, latents: Sequence[str], column: str, domain: str, *, n_random: int = 20, groups: str = "patient",
    random_state: int = 0,
) -> Ablation:  # fmt: skip
    """Does a probe lose one domain, and only this one, when the span of some decoder rows is projected out?

    A logistic probe of ``column`` is fitted on the embeddings of some patients; on the others its loss ``-log p(own
    domain)`` is measured on ``x`` and on ``x - Q Q^T x``. Specificity is the mean rise over rows of the target domain
    less the largest mean rise of another domain. Sets of random latents of equal number and like density are the
    control.

    Parameters
    ----------
    adata
        Latents with ``obsm["embedding"]`` (n, d) and ``varm["decoder"]`` (m, d).
    latents
        Set whose directions are projected out.
    column, domain
        Column of ``obs`` and its value that is the target (a scanner, site, species).
    n_random
        Random sets.
    groups
        Column of patients; probes are read on patients left out, intervals are over patients.
    random_state
        Seed.

    Raises
    ------
    InputError
        For unknown names, no latents, or absent embeddings.
    StatisticsError
        If a domain has fewer than 2 patients, so that it cannot be read on patients left out.
    """
    adata = in_memory(adata)
    for name in (column, groups):
        if name not in adata.obs:
            raise InputError(f"{name!r} is not a column of obs; columns: {', '.join(map(str, adata.obs.columns))}")
    if not len(latents):
        raise InputError("no latents to project out")
    at = positions(adata, latents)
    adata = adata[adata.obs[column].notna().to_numpy()]
    y, levels = pd.factorize(adata.obs[column].astype(str), sort=True)
    levels = [str(v) for v in levels]
    if str(domain) not in levels:
        raise InputError(f"{column!r} has no value {domain!r}; values: {', '.join(levels[:20])}")
    codes = codes_of(adata.obs, groups)[0]
    held = {name: len(np.unique(codes[y == c])) for c, name in enumerate(levels)}
    if len(levels) < 2 or min(held.values()) < 2:
        said = ", ".join(f"{name} {n}" for name, n in held.items())
        raise StatisticsError(f"every domain needs 2 patients to be read on patients left out; patients: {said}")
    x, atoms = embedding(adata).astype(np.float64), decoder(adata).astype(np.float64)
    rng = np.random.default_rng(random_state)
    sets = [at, *(_like(adata, at, rng) for _ in range(n_random))]
    splits = folds(y, codes, random_state)
    before, after = np.full(len(y), np.nan), np.full((len(sets), len(y)), np.nan)
    for train, test in splits:
        w, b = linear_probe(x[train], y[train])
        before[test] = _loss(x[test] @ w + b, y[test])
        for s, chosen in enumerate(sets):
            after[s, test] = _loss(project_out(x[test], atoms[chosen]) @ w + b, y[test])
    used = np.isfinite(before)
    rise = np.nan_to_num(after - before)
    wanted = levels.index(str(domain))

    def gap(weight: np.ndarray, of: int = 0) -> float:
        with np.errstate(invalid="ignore"):
            means = np.array([weight[own] @ rise[of, own] / weight[own].sum() for own in members])
        return float(means[wanted] - np.delete(means, wanted).max())

    members = [np.flatnonzero(used & (y == c)) for c in range(len(levels))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        number = over_patients(
            gap, codes, classes=y, used=used, random_state=random_state, what="the specificity", bounded=False
        )
        others = np.array([gap(used.astype(float), s) for s in range(1, len(sets))])
    table = pd.DataFrame([{
        "domain": name, "loss": before[own].mean(), "loss_ablated": after[0, own].mean(), "rise": rise[0, own].mean(),
        "n_patients": len(np.unique(codes[own])), "n_samples": len(own),
    } for name, own in zip(levels, members)])  # fmt: skip
    return Ablation(
        str(domain), tuple(map(str, latents)), number.score, number.low, number.high, number.n_patients,
        number.n_samples, number.status, number.reason, others, table,
    )  # fmt: skip


def _loss(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    return special.logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]


def _like(adata: Any, at: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many other latents, each of a density near that of one of the set."""
    out: list[int] = []
    for j in at:
        near = [k for k in controls_of(adata, int(j), rng) if k not in out and k not in at]
        if near:
            out.append(int(near[0]))
    return np.array(out, dtype=int)
