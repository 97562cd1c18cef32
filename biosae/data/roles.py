"""Roles of columns (patient, slide, site, ...) and the canonical columns that hold them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from biosae.errors import InputError, nearest

ROLES = (
    "patient", "slide", "recording", "sequence", "site", "location", "scanner", "collector", "label", "split", "path",
    "mask", "mpp",
)  # fmt: skip
UNITS = ("patient", "slide", "recording", "sequence")  # what must not lie on two sides of a split
CONFOUNDERS = ("site", "location", "scanner", "collector")  # what a label could be mistaken for
ID_ROLES = tuple(r for r in ROLES if r not in ("label", "mpp"))  # always strings in their canonical column


def canonical_obs(obs: pd.DataFrame, roles: Mapping[str, str | None]) -> tuple[pd.DataFrame, dict[str, str | None]]:
    """Check a table and its roles; return a copy with the canonical role columns, and the roles in use.

    ``roles`` in the answer holds only the roles that a column fills, and ``patient`` always.
    """
    unknown = [r for r in roles if r not in ROLES]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no role; {nearest(unknown[0], ROLES)}")
    if "patient" not in roles:
        raise InputError("roles must name the patient column, or say that it is unknown: roles={'patient': None}")
    if not obs.columns.is_unique:
        raise InputError(f"two columns are called {obs.columns[obs.columns.duplicated()][0]!r}; rename one")
    if roles["patient"] is None and "patient" in obs:
        raise InputError(
            "the table has a column 'patient'; pass patient='patient', or rename the column if it is not that"
        )
    obs = obs.copy()
    obs.columns = obs.columns.map(str)
    obs.index = _checked_ids(obs.index)
    if "sample_id" in obs:
        if not (obs["sample_id"].astype(str) == obs.index).all():
            raise InputError("the column 'sample_id' differs from the ids; pass id='sample_id', or rename that column")
        obs = obs.drop(columns="sample_id")
    used: dict[str, str | None] = {"patient": None}
    for role in ROLES:
        column = roles.get(role) or (role if role in obs and role != "patient" else None)
        if column is None:
            continue
        if column not in obs:
            raise InputError(f"no column {column!r} for {role}; {nearest(column, obs.columns)}")
        values = _as_role(role, obs[column])
        if role != column and role in obs and not _as_role(role, obs[role]).equals(values):
            raise InputError(
                f"{role}={column!r}, but the table has another column {role!r} with other values; "
                f"pass {role}={role!r}, or rename that column"
            )
        obs[role] = values
        used[role] = column
    for role in ("patient", "path"):
        if used.get(role) is not None:
            _complete(role, used[role], obs[role])
    return obs, used


def _checked_ids(index: pd.Index) -> pd.Index:
    ids = index.map(str)
    if index.isna().any() or (ids == "").any():
        raise InputError("some sample ids are missing; give every row an id, or pass no id column to use the paths")
    if not ids.is_unique:
        twice = ids[ids.duplicated()].unique()
        shown = ", ".join(repr(i) for i in twice[:5])
        raise InputError(f"{len(twice)} sample ids occur more than once ({shown}); pass id= a column that is unique")
    return ids.rename("sample_id")


def _as_role(role: str, values: pd.Series) -> pd.Series:
    """Canonical form of a role's values: strings for names, float for mpp, as they are for labels."""
    if role == "mpp":
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        if not (numbers > 0).all():
            raise InputError(f"column {values.name!r} for mpp must hold positive numbers (micrometres per pixel)")
        return numbers
    if role not in ID_ROLES:
        return values
    missing = values.isna()
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")  # whole numbers that a missing value had turned into floats
    names = values.astype(object).map(str, na_action="ignore").where(~missing, np.nan)
    return names.mask(names == "", np.nan)


def _complete(role: str, column: str, values: pd.Series) -> None:
    missing = values.isna()
    if missing.any():
        shown = ", ".join(repr(i) for i in values.index[missing][:5])
        raise InputError(
            f"{int(missing.sum())} of {len(values)} rows have no {role} in column {column!r} (samples {shown}); "
            f"drop those rows, or give each its own {role}"
        )
