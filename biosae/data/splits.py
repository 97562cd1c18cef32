"""Train, validation and test parts that never cut a patient (or any other group)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from biosae.data.samples import Samples
from biosae.errors import InputError, StatisticsError, nearest

N_CATEGORIES = 10  # a number with more distinct values than this is stratified by quantile
N_BINS = 4


def split(
    samples: Samples,
    *,
    by: str | None = "patient",
    stratify: str | None = None,
    test: float = 0.2,
    val: float = 0.0,
    random_state: int = 0,
    assume_independent: bool = False,
) -> Samples:
    """Assign every sample to ``train``, ``val`` or ``test`` so that no group is cut.

    Groups are dealt to the parts within each stratum, so that the shares of *groups* come as near to ``test`` and
    ``val`` as whole groups allow, with at least one group of each stratum in each part. The outcome depends on the
    names of the groups and on ``random_state``, not on the order of the rows.

    Parameters
    ----------
    samples
        The samples.
    by
        Column whose values are the groups: a role or any column. ``None`` splits single samples, and needs
        ``assume_independent=True``.
    stratify
        Column to balance. A group takes the most frequent value among its samples (the first in sorted order on a
        tie). Numbers with more than 10 distinct values are averaged per group and cut at quartiles of the groups.
    test, val
        Shares of groups, ``test > 0``, ``val >= 0``, ``test + val < 1``.
    random_state
        Seed.
    assume_independent
        Says that single samples are independent of each other (only with ``by=None``).

    Returns
    -------
    New samples with ``obs["split"]``; a ``split`` column that was there before is replaced.

    Raises
    ------
    StatisticsError
        If the groups are unknown, or a stratum has fewer groups than there are parts.
    InputError
        For wrong shares, unknown columns or samples without a group.

    Examples
    --------
    >>> samples = bs.data.split(samples, by="patient", stratify="label", test=0.2)  # doctest: +SKIP
    """
    if not (test > 0 and val >= 0 and test + val < 1):
        raise InputError(f"test={test}, val={val}: need test > 0, val >= 0 and test + val < 1")
    groups = _groups(samples, by, assume_independent)
    strata = _strata(samples, groups, stratify)
    rng = np.random.default_rng(random_state)
    shares = {"test": test, "val": val} if val > 0 else {"test": test}
    part = {}
    owed = dict.fromkeys(shares, 0.0)
    for stratum, members in strata.groupby(strata, sort=True):
        n_groups = len(members)
        if n_groups < len(shares) + 1:
            where = f"{stratify} = {stratum!r} has" if stratify else "there are"
            raise StatisticsError(
                f"{where} {n_groups} group(s) of {by or 'sample'!r}, fewer than the {len(shares) + 1} parts. Merge "
                "rare classes, stratify by something else, or set val=0"
            )
        shuffled = rng.permutation(members.index.to_numpy())
        taken = 0
        for left, (name, share) in zip(range(len(shares), 0, -1), shares.items()):
            wanted = n_groups * share + owed[name]
            n = int(np.clip(np.floor(wanted + 0.5), 1, n_groups - taken - left))
            owed[name] = wanted - n
            part.update(dict.fromkeys(shuffled[taken : taken + n], name))
            taken += n
        part.update(dict.fromkeys(shuffled[taken:], "train"))
    return samples.with_obs(split=groups.map(part).to_numpy(object))


def _groups(samples: Samples, by: str | None, assume_independent: bool) -> pd.Series:
    obs = samples.obs
    if by is None:
        if not assume_independent:
            raise StatisticsError(
                "by=None splits single samples, so images of one patient can fall on both sides. Pass by= a column of "
                "groups, or assume_independent=True if the samples are independent"
            )
        return pd.Series(obs.index, index=obs.index)
    if by == "patient" and samples.roles["patient"] is None:
        raise StatisticsError(
            "the patient of these samples is unknown, so a split could leak. Pass by= a column of groups that belong "
            "together (slide, case, near-duplicate group), or by=None with assume_independent=True"
        )
    if by not in obs:
        raise InputError(f"no column {by!r} to split by; {nearest(by, obs.columns)}")
    if obs[by].isna().any():
        raise InputError(f"{int(obs[by].isna().sum())} samples have no {by!r}; give each a group, or drop them")
    return obs[by].astype(object)


def _strata(samples: Samples, groups: pd.Series, stratify: str | None) -> pd.Series:
    """Stratum of each group, indexed by group in sorted order."""
    if stratify is None:
        return pd.Series("all", index=_sorted(groups.unique()))
    if stratify not in samples.obs:
        raise InputError(f"no column {stratify!r} to stratify by; {nearest(stratify, samples.obs.columns)}")
    values = samples.obs[stratify]
    if values.isna().any():
        raise InputError(f"{int(values.isna().sum())} samples have no {stratify!r}; drop them, or fill in a class")
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if numeric and values.nunique() > N_CATEGORIES:
        means = values.astype(float).groupby(groups).mean()
        means = means.loc[_sorted(means.index)]
        return pd.qcut(means, N_BINS, labels=False, duplicates="drop").astype(str)
    pairs = (
        pd.DataFrame({"group": groups.to_numpy(), "value": values.astype(str).to_numpy()}).value_counts().reset_index()
    )
    pairs = pairs.sort_values(["count", "value"], ascending=[False, True]).drop_duplicates("group")
    majority = pairs.set_index("group")["value"]
    return majority.loc[_sorted(majority.index)]


def _sorted(names: pd.Index | np.ndarray) -> list:
    return sorted(names, key=str)
