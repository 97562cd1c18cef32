"""What a method of ``associate`` is given and gives back: one target on its units, the columns, the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from biosae.stats import effects
from biosae.stats.correlation import Columns, rank_columns, rank_target
from biosae.stats.inference import Block, Groups, Inference, block


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
    """Ranked columns a stratum, shared between targets that have the same rows."""

    def options(self) -> dict:
        names = ("units_blocks", "n_permutations", "random_state", "testable")
        return {name: getattr(self, name) for name in names}

    def ranked(self, key: str, V: Columns) -> Columns:
        if key not in self.cache:
            self.cache[key] = rank_columns(V)
        return self.cache[key]

    def blocks(self, *, rank: bool) -> list[Block]:
        """One block a stratum; ranks are taken within the stratum."""
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
