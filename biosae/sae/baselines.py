"""What every sparse method should be held against: PCA, ICA, k-means, NMF and dictionary learning of scikit-learn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError, nearest, require
from biosae.sae import checkpoint
from biosae.sae.coder import sparse_rows
from biosae.sae.direct import Direct, nonnegative_codes, products, training_rows, unit
from biosae.sae.rows import Held, Rows
from biosae.sae.solvers import omp

FEW_LATENTS = 256
"""Latents where none are asked for and the width of the rows sets no limit."""
NEGATIVE = ("error", "shift", "rectify")


@dataclass(frozen=True)
class Kind:
    """One method: the class of scikit-learn that fits it, and what its codes are."""

    module: str
    estimator: str
    atoms: Callable[[Any], np.ndarray]
    """Atoms (m, d) of the fitted estimator, of any length."""
    codes: str
    """``linear``, ``nearest``, ``nonnegative`` or ``omp``."""
    settings: dict[str, Any]
    latents: str = "n_components"
    """What the estimator calls m."""
    within: bool = False
    """Whether there are at most min(n, d) latents."""
    encoder: Callable[[Any], np.ndarray] | None = None
    """Rows (m, d) whose products with x are codes of those atoms, for ``linear``."""


METHODS = {
    "pca": Kind(
        "sklearn.decomposition", "PCA", lambda e: e.components_, "linear", {}, within=True,
        encoder=lambda e: e.components_,
    ),
    "ica": Kind(
        "sklearn.decomposition", "FastICA", lambda e: e.mixing_.T, "linear",
        {"whiten": "unit-variance", "max_iter": 500}, within=True, encoder=lambda e: e.components_,
    ),
    "kmeans": Kind(
        "sklearn.cluster", "MiniBatchKMeans", lambda e: e.cluster_centers_, "nearest", {"n_init": 3}, "n_clusters"
    ),
    "nmf": Kind("sklearn.decomposition", "MiniBatchNMF", lambda e: e.components_, "nonnegative", {}),
    "dictionary": Kind("sklearn.decomposition", "MiniBatchDictionaryLearning", lambda e: e.components_, "omp", {}),
}  # fmt: skip


@dataclass(eq=False)
class Baseline(Direct):
    """A classical decomposition behind the contract of an SAE: x - b ~ z D, with unit atoms D and sparse codes z.

    scikit-learn finds the dictionary; codes are computed here, each row by itself, and nothing of scikit-learn is in
    the saved folder. Codes are in the units of the embedding.

    | method | b | atoms | code of a row |
    | --- | --- | --- | --- |
    | ``pca`` | mean | principal axes | products with the axes, both signs |
    | ``ica`` | mean | columns of the mixing matrix | sources times the length of their column, both signs |
    | ``kmeans`` | mean | from the mean to the centres | one latent: the nearest centre, at its distance |
    | ``nmf`` | 0 or least values | non-negative components | non-negative least squares, exact |
    | ``dictionary`` | mean | learnt atoms | orthogonal matching pursuit of k atoms, both signs |

    Attributes
    ----------
    k_ : int or None
        Most latents a row, None for all.

    References
    ----------
    Pedregosa et al. 2011, JMLR 12 (scikit-learn). ICA: Hyvarinen and Oja 2000. k-means: Sculley 2010. NMF: Lefevre,
    Bach and Fevotte 2011. Dictionary learning: Mairal et al. 2009.
    """

    method: str = "pca"
    """``pca``, ``ica``, ``kmeans``, ``nmf`` or ``dictionary``."""
    n_latents: int | None = None
    """Number of latents m. None: min(n, d) for ``pca`` and ``ica``, which cannot have more, else at most 256."""
    k: int | None = None
    """Latents a row. ``pca``, ``ica``: the k codes of largest magnitude are kept as they are (None: all). ``nmf``: k
    chosen greedily (None: all that lower the error). ``dictionary``: atoms of the pursuit (None: d / 8, between 4 and
    32). ``kmeans``: always 1."""
    _: KW_ONLY
    negative: str = "error"
    """What ``nmf`` does with values below 0: ``error``; ``shift``: the least training value of each feature becomes 0
    (and the bias), new rows are cut there; ``rectify``: they count as 0."""
    options: dict[str, Any] | None = None
    """Further arguments of the scikit-learn class, such as ``{"alpha": 0.5}`` of ``dictionary``."""
    max_rows: int = 65_536
    """Rows that are fitted, at random; all are held in memory."""
    validation: float = 0.1
    """Share of the rows held out (whole groups where groups are known); 0 holds out nothing."""
    random_state: int | None = None
    """Seed. None: drawn from the system and kept in ``random_state_``."""

    _state = ("k",)

    def validate(self) -> None:
        """Check every setting; ``InputError`` names the first that is wrong."""
        self._check(
            choices={"method": tuple(METHODS), "negative": NEGATIVE},
            whole=(("n_latents", 1), ("k", 1), ("max_rows", 1), ("random_state", 0)),
        )
        if self.method == "kmeans" and self.k not in (None, 1):
            raise InputError(f"k={self.k!r}: a row belongs to one cluster; leave k out for method='kmeans'")

    def _learn(self, rows: Rows, held: Held) -> None:
        kind = METHODS[self.method]
        x = training_rows(rows, held, self.max_rows, self.random_state_)
        self.bias_ = self._least(x) if self.method == "nmf" else x.mean(0, dtype=np.float64).astype(np.float32)
        x = self._ready(x)
        limit = min(x.shape) if kind.within else len(x)
        m = self.n_latents or (limit if kind.within else min(FEW_LATENTS, limit))
        if m > limit:
            raise InputError(
                f"n_latents={m}: {self.method} of {len(x)} training rows with {rows.d} features has at most {limit}"
            )
        self.k_ = {"nearest": 1, "omp": self.k or min(32, max(4, rows.d // 8))}.get(kind.codes, self.k)
        if not np.any(x):  # all rows are the bias
            self.decoder_ = np.zeros((m, rows.d), np.float32)
            self._encoder = self.decoder_
            return
        fitted = self._estimator(kind, m).fit(x)
        if not np.isfinite(kind.atoms(fitted)).all():
            raise InputError(f"{kind.estimator} of scikit-learn gave atoms that are not finite; lower n_latents={m}")
        self.decoder_, lengths = unit(kind.atoms(fitted))
        lengths = lengths[:, None]
        if kind.codes == "linear":
            self._encoder = (kind.encoder(fitted) * lengths).astype(np.float32)
        else:
            self._encoder = (self.decoder_ * lengths).astype(np.float32)

    def _estimator(self, kind: Kind, m: int) -> Any:
        made = getattr(require(kind.module, extra="all"), kind.estimator)
        known = set(inspect.signature(made).parameters) - {kind.latents, "random_state"}
        given = self.options or {}
        for name in given:
            if name not in known:
                raise InputError(f"options: {kind.estimator} has no {name!r}; {nearest(name, sorted(known))}")
        return made(**{kind.latents: m, "random_state": self.random_state_ % 2**32, **kind.settings, **given})

    def _least(self, x: np.ndarray) -> np.ndarray:
        """Bias of NMF, and the check that there is nothing below it."""
        below = int((x < 0).sum())
        if self.negative == "error" and below:
            raise InputError(
                f"nmf needs values >= 0, {below / x.size:.1%} of these are negative; choose negative='shift' (each "
                "feature from its least value), negative='rectify' (negative values count as 0), or another method"
            )
        return x.min(0) if self.negative == "shift" else np.zeros(x.shape[1], np.float32)

    def _ready(self, x: np.ndarray) -> np.ndarray:
        x = x - self.bias_
        return np.maximum(x, 0) if self.method == "nmf" else x

    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        u, codes = self._ready(x), METHODS[self.method].codes
        if codes == "omp":
            return omp(u, self.decoder_, k=self.k_, rule="abs")
        if codes == "nonnegative":
            return nonnegative_codes(u, self.decoder_, self.k_)
        scores = products(u, self._encoder)
        if codes == "linear":
            return _largest(scores, self.k_)
        squares = np.square(self._encoder).sum(1)
        best = np.argmax(scores - squares / 2, axis=1)
        return _compressed(np.sqrt(squares)[best, None], best[:, None], len(squares))

    def _tensors(self) -> dict[str, np.ndarray]:
        return {**super()._tensors(), "W_enc": self._encoder}

    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        super()._restore(tensors, config, device)
        self._encoder = checkpoint.shaped(tensors, "W_enc", self.decoder_.shape)


def _largest(z: np.ndarray, k: int | None) -> scipy.sparse.csr_matrix:
    """The k codes of largest magnitude of each row; of equal ones those of lower index."""
    if k is None or k >= z.shape[1]:
        return sparse_rows(torch.from_numpy(z))
    chosen = np.sort(np.argsort(-np.abs(z), axis=1, kind="stable")[:, :k], axis=1)
    return _compressed(np.take_along_axis(z, chosen, 1), chosen, z.shape[1])


def _compressed(values: np.ndarray, columns: np.ndarray, m: int) -> scipy.sparse.csr_matrix:
    """csr_matrix (n, m) of the same number of entries in each row, without those that are 0."""
    n, count = columns.shape
    codes = scipy.sparse.csr_matrix(
        (values.ravel().astype(np.float32), columns.ravel(), np.arange(n + 1) * count), shape=(n, m)
    )
    codes.eliminate_zeros()
    return codes
