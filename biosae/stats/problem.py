"""What a method of ``associate`` is given and gives back: one target on its units, the columns, the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from biosae.stats import effects
from biosae.stats.correlation import Columns, rank_columns, rank_target
from biosae.stats.inference import Block, Groups, Inference, block, member
from biosae.stats.kernels import kernels
from biosae.stats.projection import Batch, Projection, batch
from biosae.stats.schemes import Scheme


@dataclass
class Problem:
    """One target against the columns of one source, rows without a label left out, aggregated to units."""

    V: Columns
    y: np.ndarray
    """Numbers, or integer class codes."""
    n_classes: int
    """0 for a numeric target."""
    C: np.ndarray | None
    strata: np.ndarray | None
    groups: Groups
    testable: np.ndarray
    units_blocks: np.ndarray | None = None
    offset: np.ndarray | None = None
    """Logarithm of the exposure (area, hours) of every unit, for counts."""
    event: np.ndarray | None = None
    """1 where the time ``y`` of a unit ended in the event, 0 where it was censored."""
    n_permutations: int = 0
    random_state: int = 0
    permute: str = "auto"
    pooling: str = "fixed"
    n_fits: int = 50
    cache: dict = field(default_factory=dict)
    """Ranked columns a stratum, projections and products, shared between targets that have the same rows."""
    peers: Sequence[np.ndarray] = ()
    """Targets of the same rows and method, this one among them, whose products are made together."""
    place: int = 0
    """Of this target among its peers."""
    scheme: Scheme | None = None
    """The rearrangement that the user named with ``permute``; None for ``"auto"``."""

    def options(self) -> dict:
        names = ("units_blocks", "n_permutations", "random_state", "testable", "scheme")
        return {name: getattr(self, name) for name in names}

    def ranked(self, key: str, V: Columns) -> Columns:
        if key not in self.cache:
            if V is self.V and sp.issparse(V):
                self.cache[key] = sp.csc_matrix((kernels().ranks(V, self.order()), V.indices, V.indptr), shape=V.shape)
            else:
                self.cache[key] = rank_columns(V)
        return self.cache[key]

    def order(self) -> np.ndarray:
        """Places of the sparse columns' entries by value, for ranks and for DeLong's components."""
        if "order" not in self.cache:
            self.cache["order"] = kernels().order(self.V)
        return self.cache["order"]

    def delong(self) -> np.ndarray:
        """Variance of the AUROC of every sparse column (m,), or the sum of squared influence of groups; all peers at
        once.
        """
        found = self.cache.get("delong")
        if found is None or found[0] is not self.peers:
            labels = np.column_stack([y == 1 for y in self.peers]).astype(np.uint8)
            if self.groups.codes is not None:
                made = kernels().delong_groups(self.V, self.order(), labels, self.groups.codes, self.groups.n)
            else:
                n1 = labels.sum(axis=0, dtype=np.float64)
                n0 = len(labels) - n1
                one, zero = kernels().delong(self.V, self.order(), labels)
                with np.errstate(divide="ignore", invalid="ignore"):
                    made = one / (n1 - 1) / n0**2 / n1 + zero / (n0 - 1) / n1**2 / n0
                made[:, (n1 < 2) | (n0 < 2)] = np.nan
            found = self.cache["delong"] = (self.peers, made)
        return found[1][:, self.place]

    def blocks(self, *, rank: bool) -> list[Block]:
        """One block a stratum; ranks are taken within the stratum."""
        if self.strata is None and len(self.peers) and self.peers[self.place] is self.y:
            return [member(np.arange(len(self.y)), self._batch(rank), self.place)]
        out = []
        for s in [None] if self.strata is None else np.unique(self.strata):
            rows = np.arange(len(self.y)) if s is None else np.flatnonzero(self.strata == s)
            y = self.y[rows].astype(np.float64)
            V = self.V if s is None else effects.rows_of(self.V, rows)
            if rank:
                V, y = self.ranked(f"rank {s}", V), rank_target(y)
            elif s is not None and not sp.issparse(V):
                V = V - V.mean(axis=0)
            out.append(block(rows, V, y, None if self.C is None else self.C[rows]))
        return out

    def projection(self, *, rank: bool) -> Projection:
        """The columns, or their ranks, off the covariates."""
        key = ("projection", rank)
        if key not in self.cache or self.cache[key].C is not self.C:
            self.cache[key] = Projection(self.ranked("rank None", self.V) if rank else self.V, self.C)
        return self.cache[key]

    def _batch(self, rank: bool) -> Batch:
        """Products of all peers with the columns (or their ranks), made once."""
        ys = self.cache.get(("peers", rank))
        if ys is None or ys[0] is not self.peers:
            made = batch(self.projection(rank=rank), [rank_target(y) if rank else y for y in self.peers])
            ys = self.cache["peers", rank] = (self.peers, made)
        return ys[1]


@dataclass
class Result:
    """What a method found, each array (m,)."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    inference: Inference
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """Heterogeneity over strata."""


@dataclass(frozen=True)
class Method:
    """A row of the method table."""

    run: Callable[[Problem], Result]
    effect: str
    null: float
    target: str
    """``numeric``, ``two`` classes, ``classes``, ``any`` (numeric or two classes), or ``ordered`` (an ordered category,
    or whole numbers of at most 20 values)."""
    covariates: bool = False
    strata: bool = False
    counts: bool = False
    """The target is a count: added up over the samples of a unit, with the logarithm of an exposure as offset."""
    event: bool = False
    """The target is a time, and needs the column that says whether it ended in the event."""
