"""One target against the columns of one source: gates, the method, its rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from biosae.stats.adjust import MAX_R2, MAX_VIF, share_explained
from biosae.stats.correlation import Columns, moments, n_active, rank_target
from biosae.stats.frame import Target
from biosae.stats.inference import FEW
from biosae.stats.kernels import kernels
from biosae.stats.methods import METHODS, by_size
from biosae.stats.nested import indicator, largest
from biosae.stats.problem import Problem
from biosae.stats.schemes import Scheme, within
from biosae.stats.sources import Source
from biosae.stats.spatial import spatial
from biosae.stats.status import STATUS, TESTED

_NAMES = np.array(list(STATUS), dtype=object)
_CODE = {name: code for code, name in enumerate(STATUS)}
_TESTED = np.isin(list(STATUS), TESTED)


@dataclass(frozen=True)
class Options:
    """What ``associate`` was asked for, the same for all targets."""

    n_permutations: int
    random_state: int
    permute: str
    pooling: str
    n_fits: int
    aggregate: str
    min_active: int
    min_active_groups: int
    unit: str
    remark: str


def screen(
    source: Source, V: Columns, cache: dict, target: Target, method: str, options: Options,
    peers: Sequence[np.ndarray], place: int,
) -> dict[str, Any]:  # fmt: skip
    """Columns of the table, each (m,) or one value for all rows."""
    m = V.shape[1]
    problem = Problem(
        V, target.y, len(target.classes), target.C, target.strata, target.groups, np.zeros(m, bool),
        target.units_blocks, target.offset, target.event, options.n_permutations, options.random_state,
        options.permute, options.pooling, options.n_fits, cache, peers, place,
    )  # fmt: skip
    status, too_few = _status(source, problem, target, method, options)
    problem.testable = _TESTED[status]
    if too_few:
        problem.n_permutations = 0
    elif options.permute != "auto":
        problem.scheme = _scheme(cache, target, options)
    none = np.full(m, np.nan)
    out: dict[str, Any] = dict.fromkeys(("estimate", "ci_low", "ci_high", "statistic", "p", "p_maxt", "p_side"), none)
    inference = ""
    if not np.isin(status, (_CODE["one_class"], _CODE["too_small"])).all():
        found = METHODS[method].run(problem)
        dead, constant = status == _CODE["dead"], status == _CODE["constant"]
        identified = status != _CODE["unidentifiable"]
        estimate = np.where(identified, found.estimate, np.nan)
        still = {"auroc": (0.5, 0.5), "wilcoxon": (np.nan, 0.0)}.get(method, (np.nan, np.nan))
        estimate = np.where(dead, still[0], np.where(constant, still[1], estimate))
        varies = (not too_few) & identified & ~dead & ~constant
        p, p_maxt, how = found.inference.p, found.inference.p_maxt, found.inference.how
        p_side = none if found.inference.p_side is None else found.inference.p_side
        # no variance between groups to test with
        status = np.where(_TESTED[status] & np.isnan(p), _CODE["too_sparse"], status)
        if target.sizes is not None and target.n_units > 3 and (method != "welch" or largest(options.aggregate)):
            again = by_size(problem, method, target.sizes)
            p, p_maxt = np.maximum(p, again.p), np.maximum(p_maxt, again.p_maxt)
            p_side = none if again.p_side is None else np.maximum(p_side, again.p_side)
            how += f"; not below the p adjusted for samples a unit ({again.how})"
            status = np.where(_TESTED[status] & np.isnan(p), _CODE["unidentifiable"], status)
        tested = _TESTED[status]
        out = {
            "estimate": estimate,
            "ci_low": np.where(varies, found.low, np.nan),
            "ci_high": np.where(varies, found.high, np.nan),
            "statistic": np.where(tested, found.inference.statistic, np.nan),
            "p": np.where(tested, np.minimum(p, 1.0), np.nan),
            "p_maxt": np.where(tested, np.minimum(p_maxt, 1.0), np.nan),
            "p_side": np.where(tested, p_side, np.nan),
            **found.extra,
        }
        maxt = options.n_permutations and found.inference.how_maxt
        inference = how + (f"; max-T: {found.inference.how_maxt}" if maxt else "") + options.remark
    out |= {
        "latent": _labels(cache, source), "method": method, "status": _NAMES[status], "n_samples": len(target.samples),
        "n_groups": target.groups.n, "effect": METHODS[method].effect, "source": source.name, "unit": options.unit,
    }  # fmt: skip
    if "n_units" not in out:
        out["n_units"] = target.n_units
    elif target.unit_codes is None:
        out["n_samples"] = out["n_units"]
    two = len(target.classes) == 2
    ends = two or (METHODS[method].target == "ordered" and bool(target.classes))
    out["contrast"] = f"{target.classes[-1]} over {target.classes[0]}" if ends else ""
    out["inference"] = np.full(m, "", dtype=object)
    out["inference"][~np.isnan(out["p"])] = inference
    return out


def _scheme(cache: dict, target: Target, options: Options) -> Scheme:
    """The rearrangement that the user named; kept with its draws for the other targets of the same samples."""
    if target.parts is None:
        return Scheme("between groups")
    if "scheme" not in cache or cache["scheme"][0] is not target.parts:
        made = within(target.parts) if target.xy is None else spatial(target.xy, target.parts)
        cache["scheme"] = (target.parts, made)
    return cache["scheme"][1]


def _labels(cache: dict, source: Source) -> np.ndarray:
    if "names" not in cache:
        cache["names"] = np.array(source.names, dtype=object)
    return cache["names"]


def table_of(parts: list[dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """One table of all parts, in their order, with the columns ``names``; what a part does not have is NaN there."""
    sizes = [len(part["latent"]) for part in parts]
    ends = np.cumsum(sizes)
    columns: dict[str, np.ndarray] = {}
    for name in names:
        values = [np.asarray(part[name]).dtype for part in parts if name in part]
        whole = len(values) == len(parts) and len(parts) > 0
        if any(v.kind in "OU" for v in values):
            kind: Any = object
        else:
            kind = np.result_type(*values) if whole else np.float64
        column = np.empty(ends[-1], kind) if whole else np.full(ends[-1], np.nan, kind)
        for part, size, end in zip(parts, sizes, ends):
            if name in part:
                column[end - size : end] = part[name]
        columns[name] = column
    return pd.DataFrame(columns, copy=False)


def _status(source: Source, problem: Problem, target: Target, method: str, options: Options) -> tuple[np.ndarray, bool]:
    """Status code of each column, and whether there are fewer than 3 groups."""
    n, m = problem.V.shape
    G = target.groups.n
    y = target.y if target.offset is None else target.y / np.exp(target.offset)  # a rate
    if n == 0 or not np.ptp(y) or (target.event is not None and not target.event.any()):
        return np.full(m, _CODE["one_class"]), False
    status = np.full(m, _CODE["few_groups" if 3 <= G < FEW else "ok"])
    active, ss, firing_groups = _activity(problem)
    if source.name == "latent":
        sparse = firing_groups < min(options.min_active_groups, G)
        if options.unit == "sample" or target.groups.codes is not None:
            sparse |= active < options.min_active
        status[sparse] = _CODE["too_sparse"]
    too_few = G < 3
    if too_few:
        status[status != _CODE["too_sparse"]] = _CODE["too_few_groups"]
    small = n < 3
    if target.C is not None:
        own = problem.projection(rank=method == "spearman")
        if share_explained(rank_target(y) if method == "spearman" else y, own.Q) > MAX_R2:
            status[:] = _CODE["unidentifiable"]
        with np.errstate(divide="ignore", invalid="ignore"):
            status[own.ss < own.total / MAX_VIF] = _CODE["unidentifiable"]
        small |= n - own.Q.shape[1] - 1 < 1
    status[(ss == 0) & (active > 0)] = _CODE["constant"]
    status[active == 0] = _CODE["dead"]
    if small:
        status[:] = _CODE["too_small"]
    return status, too_few


def _activity(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in which each column is not 0, its sum of squares, and groups in which it is not 0."""
    codes, V = problem.groups.codes, problem.V
    if "activity" not in problem.cache:
        active = n_active(V)
        firing = active
        if codes is not None and hasattr(V, "indptr"):
            firing = kernels().groups_firing(V, codes, problem.groups.n)
        elif codes is not None:
            firing = ((indicator(codes, problem.groups.n) @ (V != 0).astype(np.float64)) > 0).sum(axis=0)
        problem.cache["activity"] = (active, moments(V)[1], firing)
    return problem.cache["activity"]
