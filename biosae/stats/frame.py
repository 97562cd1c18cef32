"""From an AnnData of samples to problems of units: rows with a label, units, independent groups, strata, covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from biosae.errors import InputError, StatisticsError
from biosae.stats import chunks
from biosae.stats.adjust import column_of, design, is_categorical, refuse_dates
from biosae.stats.correlation import Columns, as_columns
from biosae.stats.inference import Groups
from biosae.stats.nested import codes_of, is_chunked, largest, pool, unit_values
from biosae.stats.schemes import needs_variation
from biosae.stats.sources import Source

MAX_GRADES = 20
"""Whole numbers of more distinct values are measurements, not grades."""


@dataclass
class Target:
    """One target on the units that have it."""

    y: np.ndarray
    classes: list[str]
    samples: np.ndarray
    unit_codes: np.ndarray | None
    n_units: int
    groups: Groups
    C: np.ndarray | None
    strata: np.ndarray | None
    units_blocks: np.ndarray | None
    key: bytes
    strata_left_out: int = 0
    offset: np.ndarray | None = None
    event: np.ndarray | None = None
    table: pd.DataFrame | None = None
    """Covariates of the units, before they become columns of ``C``."""
    ordered: bool = False
    """Classes have an order: an ordered category, or whole numbers of at most :data:`MAX_GRADES` values."""
    sizes: np.ndarray | None = None
    """Samples a unit, where units are pooled and differ in it."""
    parts: np.ndarray | None = None
    """Group or slide of every unit within which a scheme of permutation rearranges; None moves groups as wholes."""
    xy: np.ndarray | None = None
    """Places of the units on their slide, for shifts of whole slides."""


@dataclass
class _Units:
    """Units of a set of samples, and everything about them but the target."""

    key: bytes
    part: pd.DataFrame
    table: pd.DataFrame
    unit_codes: np.ndarray | None
    n_units: int
    codes: np.ndarray | None
    n_groups: int
    C: np.ndarray | None
    strata: np.ndarray | None
    blocks: np.ndarray | None
    offset: np.ndarray | None
    sizes: np.ndarray | None


@dataclass
class Frame:
    """Which rows are units, and which units are independent of each other.

    Raises
    ------
    StatisticsError
        Where independence is neither known nor claimed, or units cut across groups.
    InputError
        For absent or incomplete columns.
    """

    adata: Any
    unit: str
    groups: str = "patient"
    covariates: Sequence[str] = ()
    strata: str | None = None
    blocks: str | None = None
    assume_independent: bool = False
    aggregate: str = "mean"
    exposure: str | None = None
    event: str | None = None
    counts: bool = False
    unit_of: np.ndarray | None = field(init=False, default=None)
    group_of: np.ndarray | None = field(init=False, default=None)
    _pooled: dict = field(init=False, default_factory=dict)
    _known: dict[bytes, _Units] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        obs = self.adata.obs
        for name in map(column_of, self.covariates):
            if name in obs:
                refuse_dates(obs[name], name, role="covariate")
        if self.unit != "sample":
            self.unit_of = codes_of(obs, self.unit)[0]
        if self.assume_independent:
            return
        if self.groups in obs:
            self.group_of = codes_of(obs, self.groups)[0]
        elif self.groups != "patient":
            raise InputError(f"groups={self.groups!r} is not a column of obs")
        elif self.unit == "sample":
            raise StatisticsError(
                "obs has no 'patient' column, so nothing says which samples are independent. Name the patient column "
                "when reading the table, give unit= or groups= a column whose values are independent (slide, donor), "
                "or pass assume_independent=True, which is written into the result"
            )

    def target(self, name: str) -> Target:
        """The target on units that have it, with everything else cut to the same rows.

        With strata, those with fewer than 4 units or a single value of the target are left out: they carry no
        information on an association within strata.
        """
        obs = self.adata.obs
        for other in (self.exposure, self.event):
            if other is not None and other not in obs:
                raise InputError(f"{other!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
        if name not in obs:
            raise InputError(f"target {name!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
        column = obs[name]
        refuse_dates(column, name, role="target")
        if not is_categorical(column) and np.isinf(column.to_numpy(np.float64, na_value=np.nan)).any():
            raise InputError(f"target {name!r} holds infinite values")
        target = self._target(name, np.flatnonzero(column.notna().to_numpy()))
        if target.strata is None:
            return target
        names = np.unique(target.strata)
        useful = [s for s in names if (target.strata == s).sum() >= 4 and np.ptp(target.y[target.strata == s])]
        if len(useful) == len(names):
            return target
        kept = np.isin(target.strata, useful)
        samples = target.samples[kept if target.unit_codes is None else kept[target.unit_codes]]
        if len(samples):
            shorter = self._target(name, samples)
            shorter.strata_left_out = len(names) - len(useful)
            return shorter
        target.y, target.strata_left_out = np.zeros_like(target.y), len(names)  # nothing varies within any stratum
        return target

    def _units(self, samples: np.ndarray) -> _Units:
        """What these samples say whatever the target is; kept for targets that have a value in the same samples."""
        key = samples.tobytes()
        if key in self._known:
            return self._known[key]
        obs = self.adata.obs
        part = obs if len(samples) == len(obs) else obs.iloc[samples]
        if self.unit_of is None:
            unit_codes, n_units, table = None, len(samples), part
            group_of = None if self.group_of is None else self.group_of[samples]
        else:
            levels, unit_codes = np.unique(self.unit_of[samples], return_inverse=True)
            n_units = len(levels)
            table = pd.DataFrame(index=range(n_units))
            adjusting = dict.fromkeys(map(column_of, self.covariates))
            for other in [
                *adjusting,
                *([self.strata] if self.strata else []),
                *([self.blocks] if self.blocks else []),
            ]:
                if other not in part:
                    raise InputError(f"{other!r} is not a column of obs; columns: {', '.join(map(str, obs.columns))}")
                source = part[other] if other in adjusting else part[other].astype("string").astype(object)
                table[other] = unit_values(source, unit_codes, n_units, name=other, unit=self.unit)
            group_of = (
                None if self.group_of is None else self._group_of_units(unit_codes, n_units, self.group_of[samples])
            )
        levels, codes = (None, None) if group_of is None else np.unique(group_of, return_inverse=True)
        singletons = group_of is None or len(levels) == n_units
        sizes = None if unit_codes is None else np.bincount(unit_codes).astype(np.float64)
        if len(self._known) > 3:
            self._known.clear()
        self._known[key] = _Units(
            key, part, table, unit_codes, n_units, None if singletons else codes,
            n_units if singletons else len(levels),
            design(table, self.covariates) if self.covariates else None,
            codes_of(table, self.strata)[0] if self.strata else None,
            codes_of(table, self.blocks)[0] if self.blocks else None,
            self._offset(part, unit_codes) if self.counts else None,
            None if sizes is None or len(sizes) == 0 or not np.ptp(sizes) else sizes,
        )  # fmt: skip
        return self._known[key]

    def _target(self, name: str, samples: np.ndarray) -> Target:
        column = self.adata.obs[name]
        column = column if len(samples) == len(column) else column.iloc[samples]
        u = self._units(samples)
        if u.unit_codes is None:
            numeric = not is_categorical(column)
            y, classes = encode_classes(column.to_numpy(np.float64), column) if numeric else labels_of(column)
        else:
            values = unit_values(column, u.unit_codes, u.n_units, name=name, unit=self.unit)
            if self.counts and not is_categorical(column):
                values = np.bincount(u.unit_codes, weights=column.to_numpy(np.float64), minlength=u.n_units)
            y, classes = encode_classes(values, column)
        if self.counts and not is_categorical(column):
            classes = []  # 0 and 1 are counts too
        groups = Groups(u.codes, u.n_groups, u.codes is None or _constant(u.codes, u.n_groups, y))
        if u.blocks is not None and groups.codes is not None:
            if not groups.constant:
                raise StatisticsError(
                    f"blocks={self.blocks!r}: target {name!r} varies within {self.groups}s, whose signs are flipped as "
                    "wholes, so blocks have no part in it; leave blocks out"
                )
            if not _constant(groups.codes, groups.n, u.blocks):
                raise StatisticsError(
                    f"blocks={self.blocks!r} cuts across {self.groups}s; a {self.groups} must lie in one block"
                )
        event = None
        if self.event is not None:
            event = self._event(name, column, u, y)
        return Target(
            y, classes, samples, u.unit_codes, u.n_units, groups, u.C, u.strata, u.blocks, u.key,
            offset=u.offset, event=event, table=u.table, ordered=_ordered(y, column), sizes=u.sizes,
        )  # fmt: skip

    def _event(self, name: str, column: pd.Series, u: _Units, y: np.ndarray) -> np.ndarray:
        table = u.table
        if u.unit_codes is not None:
            _one_outcome(u.part, (name, self.event), u.unit_codes, u.n_units, unit=self.unit)
            own = unit_values(u.part[self.event], u.unit_codes, u.n_units, name=self.event, unit=self.unit)
            table = pd.DataFrame({self.event: own})
        event = _event(table, self.event)
        if not is_categorical(column) and not (y > 0).all():
            raise InputError(
                f"time {name!r} is not above 0 in {int((~(y > 0)).sum())} rows; it is counted from entry to the "
                "event or the end of observation. Leave those rows out"
            )
        return event

    def _offset(self, part: pd.DataFrame, unit_codes: np.ndarray | None) -> np.ndarray:
        """Logarithm of each unit's exposure; without a column every sample counts as one."""
        exposure = np.ones(len(part)) if self.exposure is None else positive(part, self.exposure)
        if unit_codes is not None:
            exposure = np.bincount(unit_codes, weights=exposure)
        return np.log(exposure)

    def _group_of_units(self, unit_codes: np.ndarray, n_units: int, group_of: np.ndarray) -> np.ndarray | None:
        if _nested(unit_codes, group_of):
            out = np.zeros(n_units, dtype=np.int64)
            out[unit_codes] = group_of
            return out
        if _nested(group_of, unit_codes):
            return None  # units are larger than groups
        raise StatisticsError(
            f"units {self.unit!r} cut across {self.groups}s: some {self.groups}s have rows in several units and some "
            f"units hold several {self.groups}s. Use unit='sample' or unit={self.groups!r}"
        )

    def parts(self, target: Target, permute: str, name: str) -> np.ndarray | None:
        """Parts within which ``permute`` rearranges units; sets ``xy`` for ``"spatial"``. None moves groups as wholes.

        Raises
        ------
        InputError
            Where ``blocks`` or pooled units do not go with the scheme, or places are missing.
        StatisticsError
            Where the scheme has nothing to rearrange.
        """
        if permute == "between":
            if not target.groups.constant:
                raise StatisticsError(
                    f"permute='between': target {name!r} varies within {self.groups}s, so a {self.groups} has no value "
                    f"of its own to exchange; use permute='within', or unit={self.groups!r}"
                )
            return None
        if self.blocks:
            raise InputError(f"permute={permute!r} rearranges within {self.groups}s or slides; leave blocks= out")
        if permute == "spatial":
            return self._slides(target, name)
        if target.groups.codes is None:
            raise StatisticsError(
                f"permute='within': no two units share a {self.groups}, so there is nothing to rearrange within it; "
                "use permute='between', or unit='sample' with groups="
            )
        needs_variation(target.groups.codes, target.y, target=name, scheme=permute, part=self.groups)
        return target.groups.codes

    def _slides(self, target: Target, name: str) -> np.ndarray:
        if self.unit != "sample":
            raise InputError("permute='spatial' shifts the tiles of a slide: use unit='sample'")
        if "spatial" not in self.adata.obsm:
            raise InputError(
                "permute='spatial' needs the places of tiles in obsm['spatial'] (n, 2); without them use "
                "permute='within', which takes the tiles of a group as exchangeable"
            )
        key = ("slides", target.key)
        if key not in self._pooled:
            obs = self.adata.obs
            column = next((c for c in ("slide", self.groups) if c in obs), None)
            slides = np.zeros(len(obs), np.int64) if column is None else codes_of(obs, column)[0]
            xy = np.asarray(self.adata.obsm["spatial"], np.float64)[target.samples, :2]
            self._pooled[key] = (np.unique(slides[target.samples], return_inverse=True)[1], xy)
        slides, target.xy = self._pooled[key]
        needs_variation(slides, target.y, target=name, scheme="spatial", part="slide")
        return slides

    def columns(self, source: Source, target: Target) -> Columns:
        """Features of a source on the target's units, pooled if units are not samples; kept for targets with equal
        rows.
        """
        key = (source.name, source.columns and source.columns.start, target.key)
        if key not in self._pooled:
            self._pooled = {k: v for k, v in self._pooled.items() if k[0] != source.name}
            self._pooled[key] = (as_columns(self._rows(source, target)), {})
        return self._pooled[key]

    def _rows(self, source: Source, target: Target) -> Any:
        how = self.aggregate if source.name == "latent" or largest(self.aggregate) else "mean"
        rows = None if len(target.samples) == self.adata.n_obs else target.samples
        if is_chunked(source.X):
            if target.unit_codes is None:
                return chunks.columns_of(source.X, source.columns, rows=rows)
            return chunks.pool_rows(source.X, target.unit_codes, target.n_units, how=how, rows=rows)
        X = source.X if rows is None else source.X[rows]
        return X if target.unit_codes is None else pool(X, target.unit_codes, target.n_units, how=how)


def positive(obs: pd.DataFrame, name: str) -> np.ndarray:
    """Exposures (n,), all above 0.

    Raises
    ------
    InputError
        For missing, infinite or non-positive values.
    """
    values = pd.to_numeric(obs[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise InputError(
            f"exposure {name!r} is missing, infinite or not above 0 in {int(bad.sum())} rows; leave them out"
        )
    return values


def _one_outcome(obs: pd.DataFrame, names: tuple[str, str], unit_codes: np.ndarray, n_units: int, *, unit: str) -> None:
    """Time and event must be one pair a unit: a mean of times is the time of nobody."""
    pairs = pd.DataFrame({"unit": unit_codes, "time": obs[names[0]].to_numpy(), "event": obs[names[1]].to_numpy()})
    several = int((pairs.drop_duplicates().groupby("unit").size() > 1).sum())
    if several:
        raise StatisticsError(
            f"{names[0]!r} or {names[1]!r} has several values within {several} of the {n_units} units {unit!r}: a "
            f"{unit} has one time and one end. Correct the table, or use unit='sample' (or a finer unit)"
        )


def _ordered(y: np.ndarray, column: pd.Series) -> bool:
    if is_categorical(column):
        return isinstance(column.dtype, pd.CategoricalDtype) and bool(column.cat.ordered)
    return bool((y == np.round(y)).all()) and len(pd.unique(y)) <= MAX_GRADES


def _event(obs: pd.DataFrame, name: str) -> np.ndarray:
    values = pd.to_numeric(obs[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if not np.isin(values, (0.0, 1.0)).all():
        raise InputError(f"event {name!r} must be 1 (event) or 0 (censored) in every row that has the time")
    return values


def _nested(inner: np.ndarray, outer: np.ndarray) -> bool:
    """Every value of ``inner`` occurs with one value of ``outer``."""
    pairs = np.unique(np.column_stack([inner, outer]), axis=0)
    return len(pairs) == len(np.unique(inner))


def _constant(codes: np.ndarray, n_groups: int, y: np.ndarray) -> bool:
    """``y`` has one value within every group."""
    first = np.empty(n_groups, y.dtype)
    first[codes[::-1]] = y[::-1]
    return bool((first[codes] == y).all())


def labels_of(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Labels without gaps as codes of their sorted (or the category's own) order, with the classes' names."""
    codes, values = pd.factorize(column.to_numpy() if column.dtype == bool else column)
    present = [str(v) for v in values]
    if isinstance(column.dtype, pd.CategoricalDtype):
        known = set(present)
        classes = [str(c) for c in column.cat.categories if str(c) in known]
    else:
        classes = sorted(set(present))
    place = {c: i for i, c in enumerate(classes)}
    return np.array([place[v] for v in present], np.float64)[codes], classes or [""]


def encode_classes(values: np.ndarray, column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Numbers as they are; labels as codes of their sorted (or the category's own) order, with the classes' names.

    Numbers that are all 0 or 1, with both present, are two classes.
    """
    if not is_categorical(column):
        y = values.astype(np.float64)
        return y, (["0", "1"] if len(y) and ((y == 0) | (y == 1)).all() and np.ptp(y) > 0 else [])
    if isinstance(column.dtype, pd.CategoricalDtype):
        return labels_of(pd.Series(pd.Categorical(values, categories=column.cat.categories)))
    return labels_of(pd.Series(values, dtype=object))
