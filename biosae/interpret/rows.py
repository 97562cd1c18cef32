"""What is held against codes: labels joined by id, two parts, and groups that are in one of them only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, StatisticsError, nearest


def joined(
    adata: Any, labels: pd.DataFrame, *, split: str = "split", train: str = "train", test: str = "test"
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, np.ndarray]]:
    """Rows' table, labels in the rows' order (float, NaN unknown), and row numbers of both parts."""
    obs = adata.obs
    if not isinstance(labels, pd.DataFrame) or not labels.shape[1]:
        raise InputError("labels must be a table with a column a class, such as that of token_parts")
    if not labels.index.is_unique or not labels.columns.is_unique:
        raise InputError("labels must have unique rows and columns")
    if not adata.obs_names.isin(labels.index).any():
        raise InputError(
            f"no row of the labels (such as {str(labels.index[0])!r}) is a row of the codes (such as "
            f"{str(adata.obs_names[0])!r}); make codes with tokens=None for labels of tokens"
        )
    try:
        labels = labels.reindex(adata.obs_names).astype(np.float64)
    except (TypeError, ValueError):
        raise InputError("labels must be shares from 0 to 1, or booleans; make a column for each class") from None
    if ((labels < 0) | (labels > 1.001)).to_numpy().any():
        raise InputError("labels must be shares from 0 to 1, or booleans")
    if split not in obs:
        raise InputError(
            f"obs has no column {split!r}; {nearest(split, obs.columns)}. bs.data.split makes one by patient"
        )
    values = obs[split].astype(str).to_numpy()
    parts = {}
    for part, name in (("train", train), ("test", test)):
        parts[part] = np.flatnonzero(values == name)
        if not len(parts[part]):
            raise InputError(f"no row has {split} {name!r}; {nearest(name, sorted(set(values)))}")
    return obs, labels, parts


def samples_of(obs: pd.DataFrame) -> pd.Series:
    """Sample of each row."""
    if "sample_id" in obs:
        return obs["sample_id"].astype(str)
    return pd.Series(obs.index.astype(str), index=obs.index, name="sample_id")


def groups_of(obs: pd.DataFrame, groups: str | None, parts: Mapping[str, np.ndarray]) -> pd.Series:
    """Independent group of each row, none of them in both parts."""
    if groups is None:
        found = samples_of(obs).rename("sample_id")
    elif groups in obs:
        if obs[groups].isna().any():
            raise InputError(f"{groups!r} is missing in {int(obs[groups].isna().sum())} rows; name another column")
        found = obs[groups].astype(str)
    else:
        raise InputError(
            f"obs has no column {groups!r}; {nearest(groups, obs.columns)}. With groups=None samples are resampled, "
            "which is right only where each is of another patient"
        )
    shared = set(found.iloc[parts["train"]]) & set(found.iloc[parts["test"]])
    if shared:
        raise StatisticsError(
            f"{len(shared)} values of {found.name!r} lie in both parts: the test rows are not held out; split by "
            f"{found.name} (bs.data.split)"
        )
    return found


def enough_groups(n: int) -> str:
    """Status of a result on n independent groups: ``ok``, ``few_groups`` (3 to 19), ``too_few_groups``."""
    return "too_few_groups" if n < 3 else "few_groups" if n < 20 else "ok"
