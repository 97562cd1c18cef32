"""The two parts of a replication: by a column, dealt by patient, or a second cohort; and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, StatisticsError
from biosae.stats.adjust import is_categorical
from biosae.stats.nested import in_memory

MANY_VALUES = 10  # a number with more distinct values is stratified by its median
NEAR = 0.999
"""Cosine above which two embeddings count as of the same image."""
_BLOCK = 4096


def discovery_part(
    obs: pd.DataFrame, *, by: str | None, stratify: Sequence[str] = (), share: float = 0.6, random_state: int = 0
) -> np.ndarray:
    """Deal whole groups to the discovery part, stratum by stratum.

    Parameters
    ----------
    obs
        Table of samples.
    by
        Column of groups that are never cut. None deals single samples.
    stratify
        Columns to balance, jointly. A group takes its most frequent value (the first in sorted order on a tie); numbers
        with more than 10 values are averaged over the group and cut at their median; a missing value is a value.
    share
        Of the groups, 0 to 1. Fractions owed by one stratum are carried to the next, so that the whole comes within one
        group of ``share``; a stratum of two groups or more has at least one in each part.
    random_state
        Seed. The outcome depends on it and on the names of the groups, not on the order of rows.

    Returns
    -------
    ndarray
        bool (n,), True for discovery.

    Raises
    ------
    InputError
        For a share outside 0 to 1, unknown columns or samples without a group.
    StatisticsError
        If there are fewer than 2 groups.
    """
    if not 0 < share < 1:
        raise InputError(f"discovery_share={share}; it must lie between 0 and 1")
    missing = [c for c in ([by] if by else []) + list(stratify) if c not in obs]
    if missing:
        raise InputError(f"{missing[0]!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
    names = pd.Series(obs.index if by is None else obs[by].to_numpy(object), index=obs.index)
    if names.isna().any():
        raise InputError(f"{int(names.isna().sum())} samples have no {by!r}; give each a group, or drop them")
    names = names.astype(str)
    levels = sorted(names.unique())
    if len(levels) < 2:
        raise StatisticsError(f"there is one {by or 'sample'}; discovery and replication need at least two")
    stratum = pd.Series("", index=levels)
    for column in stratify:
        stratum = stratum + "\0" + _level(obs[column], names).reindex(levels)
    rng = np.random.default_rng(random_state)
    chosen: list[str] = []
    owed = 0.0
    for _, members in stratum.groupby(stratum, sort=True):
        shuffled = rng.permutation(members.index.to_numpy(object))
        wanted = len(shuffled) * share + owed
        taken = int(np.clip(np.floor(wanted + 0.5), *((1, len(shuffled) - 1) if len(shuffled) > 1 else (0, 1))))
        owed = wanted - taken
        chosen += list(shuffled[:taken])
    if not 0 < len(chosen) < len(levels):
        chosen = levels[: len(levels) // 2]
    return names.isin(set(chosen)).to_numpy()


def _level(column: pd.Series, names: pd.Series) -> pd.Series:
    """Stratum of each group by one column."""
    if not is_categorical(column) and column.nunique() > MANY_VALUES:
        means = column.astype(float).groupby(names.to_numpy()).mean()
        return pd.Series(np.where(means.isna(), "missing", means > means.median()), index=means.index).astype(str)
    values = column.astype("string").fillna("missing").astype(str).to_numpy()
    counts = pd.DataFrame({"group": names.to_numpy(), "value": values}).value_counts().reset_index()
    counts = counts.sort_values(["count", "value"], ascending=[False, True]).drop_duplicates("group")
    return counts.set_index("group")["value"]


def part(adata: Any, split: str, value: str | Sequence[str]) -> Any:
    """Samples whose ``split`` is one of the values.

    Raises
    ------
    InputError
        If there is no such column.
    StatisticsError
        If no sample has the value.
    """
    if split not in adata.obs:
        raise InputError(
            f"{split!r} is not a column of obs; make one with biosae.data.split, pass split=None to deal patients to "
            "the parts here, or give a second AnnData"
        )
    values = [value] if isinstance(value, str) else list(value)
    mask = adata.obs[split].astype(str).isin([str(v) for v in values]).to_numpy()
    if not mask.any():
        raise StatisticsError(
            f"no sample has {split} {value!r}; there are: {', '.join(sorted(map(str, adata.obs[split].unique())))}"
        )
    return adata[mask]


def second_cohort(adata: Any, replication: Any, split: str, discovery: str | Sequence[str] | None) -> tuple[Any, Any]:
    """The discovery rows and another cohort of the same latents.

    Raises
    ------
    InputError
        If the latents or the decoders of the two differ.
    """
    if list(map(str, replication.var_names)) != list(map(str, adata.var_names)):
        raise InputError("the second cohort has other latents; encode it with the same SAE")
    first = adata if discovery is None else part(adata, split, discovery)
    other = in_memory(replication)
    decoders = [a.varm["decoder"] for a in (first, other) if "decoder" in a.varm]
    if len(decoders) == 2 and not np.array_equal(np.asarray(decoders[0]), np.asarray(decoders[1])):
        raise InputError(
            "the two cohorts were encoded with different SAEs (their decoders differ); encode both with one"
        )
    return first, other


def disjoint(adata: Any, split: str, discovery: str | Sequence[str], replication: Any) -> tuple[Any, Any]:
    """Two parts by a column, without a sample in both.

    Raises
    ------
    StatisticsError
        If a part is empty or the parts share samples.
    """
    first, other = part(adata, split, discovery), part(adata, split, replication)
    shared = set(first.obs_names) & set(other.obs_names)
    if shared:
        raise StatisticsError(f"{len(shared)} samples are in both parts; choose discovery and replication apart")
    return first, other


def dealt_by(obs: pd.DataFrame, *, unit: str, groups: str, assume_independent: bool) -> str | None:
    """Column that must not be cut by a split: the groups, or the units where these hold several groups.

    Raises
    ------
    StatisticsError
        If nothing says which samples are independent.
    """
    units = unit not in ("sample", groups) and unit in obs
    if groups not in obs:
        if not units and not assume_independent:
            raise StatisticsError(
                f"obs has no {groups!r} column, so a split could put one patient into both parts. Name the column with "
                "groups=, or pass assume_independent=True"
            )
        return unit if units else None
    if units:
        pairs = obs[[unit, groups]].astype(str).drop_duplicates()
        if pairs[groups].is_unique and not pairs[unit].is_unique:
            return unit
    return groups


def groups_shared(first: Any, other: Any, groups: str, other_groups: str) -> int | None:
    """Number of groups in both parts; None where one of them has no such column."""
    if groups not in first.obs or other_groups not in other.obs:
        return None
    return len(set(first.obs[groups].dropna().astype(str)) & set(other.obs[other_groups].dropna().astype(str)))


def near_duplicates(first: Any, other: Any) -> int:
    """Samples of the second part whose embedding has a cosine above 0.999 with one of the first part.

    Raises
    ------
    InputError
        If a part has no ``obsm["embedding"]``.
    """
    if "embedding" not in first.obsm or "embedding" not in other.obsm:
        raise InputError('near duplicates are looked for in obsm["embedding"]; encode with keep_embedding=True')
    A, B = (_unit_rows(np.asarray(a.obsm["embedding"], dtype=np.float32)) for a in (first, other))
    found = 0
    for start in range(0, len(B), _BLOCK):
        closest = np.full(min(_BLOCK, len(B) - start), -1.0)
        for at in range(0, len(A), _BLOCK):
            closest = np.maximum(closest, (B[start : start + _BLOCK] @ A[at : at + _BLOCK].T).max(axis=1))
        found += int((closest > NEAR).sum())
    return found


def _unit_rows(X: np.ndarray) -> np.ndarray:
    return X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-30)
