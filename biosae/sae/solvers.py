"""Sparse codes of rows on a given dictionary, without the encoder: pursuits and the non-negative LASSO.

Each function takes rows X (n, d) from which the bias is already subtracted and atoms D (m, d), and returns codes z
(n, m) such that z D is near X. Atoms are brought to unit length for the choice; the codes belong to the atoms as given.
Every row is solved by itself in float64, so that its code does not depend on the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError, NotFittedError, nearest
from biosae.sae import checkpoint
from biosae.sae.coder import STATE, Coder
from biosae.sae.normalise import ROWWISE, Normaliser
from biosae.sae.rows import Held, Rows

RULES = ("relu", "signed", "abs")
SOLVERS = ("omp", "mp", "gradient", "lasso")
GRAM_BYTES = 2**28
"""Size of the table of atom products up to which it is held; beyond, products are made when they are needed."""
ROWS = 256
"""Rows whose dense codes are held at once."""
SEARCHED_ROWS = 2048
"""Rows on which a penalty is searched for."""
GAP = 1e-6
"""Duality gap at which the LASSO ends, as a share of ||x||^2 / 2."""


def matching_pursuit(X: Any, atoms: Any, *, k: Any, rule: str = "relu", tol: float = 0.0) -> scipy.sparse.csr_matrix:
    """Matching pursuit: k times, project the residual on one atom and subtract.

    ``j = argmax_j <d_j, r>, c = <d_j, r>, z_j += c, r -= c d_j``, starting from r = x. The norm of the residual never
    rises: ||r'||^2 = ||r||^2 - c^2. An atom may be taken again, so that a row has at most k active atoms.

    Parameters
    ----------
    X
        Rows minus the bias, (n, d).
    atoms
        Dictionary, (m, d); a zero atom is never chosen.
    k
        Steps, one number or one a row, (n,).
    rule
        ``relu``: a row ends when no correlation is positive, codes are >= 0; ``signed``: the largest correlation is
        taken even where it is negative; ``abs``: the largest magnitude, codes have both signs.
    tol
        A row ends when ||r|| <= tol ||x||.

    Returns
    -------
    csr_matrix (n, m), float32

    Raises
    ------
    InputError
        If shapes do not fit, a number is not finite, or an option is not known.

    References
    ----------
    Mallat and Zhang 1993, IEEE Transactions on Signal Processing 41. As an encoder: Costa et al. 2025, arXiv
    2506.03093.
    """
    code = RULES.index(_known("rule", rule, RULES))
    return _solve(X, atoms, k, tol, lambda kernels, x, U, G, rows, z: kernels.match(x, U, G, rows["k"], tol, code, z))


def omp(X: Any, atoms: Any, *, k: Any, rule: str = "relu", tol: float = 0.0) -> scipy.sparse.csr_matrix:
    """Orthogonal matching pursuit: after each choice all chosen coefficients are fitted anew.

    ``j = argmax_j <d_j, r>`` among atoms not yet chosen; ``z = argmin ||x - z D||`` over the chosen atoms, with z >= 0
    (non-negative least squares, exact); r = x - z D.

    Parameters
    ----------
    X, atoms, tol
        As for :func:`matching_pursuit`.
    k
        Atoms chosen at most, one number or one a row; some may get the coefficient 0.
    rule
        ``relu``: codes are >= 0, a row ends when no correlation is positive; ``abs``: the largest magnitude is chosen,
        plain least squares.

    Returns
    -------
    csr_matrix (n, m), float32

    Raises
    ------
    InputError
        As :func:`matching_pursuit`.

    References
    ----------
    Pati, Rezaiifar and Krishnaprasad 1993, Asilomar Conference; Bruckstein, Elad and Zibulevsky 2008, IEEE Transactions
    on Information Theory 54 (non-negative). Lawson and Hanson 1974, chapter 23.
    """
    signed = _known("rule", rule, ("relu", "abs")) == "abs"

    def run(kernels: Any, x: np.ndarray, U: np.ndarray, G: np.ndarray, rows: dict, z: np.ndarray) -> None:
        kernels.refit(x, U, G, rows["k"], tol, signed, np.zeros(len(x)), -1.0, z, np.zeros(len(x)))

    return _solve(X, atoms, k, tol, run)


def gradient_pursuit(
    X: Any, atoms: Any, *, k: Any, active: str = "nonzero", tol: float = 0.0
) -> scipy.sparse.csr_matrix:
    """Gradient pursuit with non-negative codes: one gradient step on the active atoms after each choice.

    ``p = D r``; argmax_j p_j joins the active set; ``g = p`` there and 0 elsewhere; ``c = g D``;
    ``z = max(z + <c, r> / <c, c> g, 0)``. A row whose gradient vanishes ends (released code divides by zero there).

    Parameters
    ----------
    X, atoms, tol
        As for :func:`matching_pursuit`.
    k
        Steps, one number or one a row, such as the row's number of latents in the SAE.
    active
        ``nonzero``: atoms whose coefficient fell to 0 leave the active set (Engels et al.); ``ever``: they stay
        (dictionary_learning).

    Returns
    -------
    csr_matrix (n, m), float32

    Raises
    ------
    InputError
        As :func:`matching_pursuit`.

    References
    ----------
    Blumensath and Davies 2008, IEEE Transactions on Signal Processing 56; Engels, Riggs and Tegmark 2024, arXiv
    2410.14670.
    """
    keep = _known("active", active, ("nonzero", "ever")) == "ever"
    return _solve(
        X, atoms, k, tol, lambda kernels, x, U, G, rows, z: kernels.gradient(x, U, G, rows["k"], tol, keep, z)
    )


def nn_lasso(
    X: Any, atoms: Any, *, penalty: Any, relative: bool = False, gap: float = GAP, return_gap: bool = False
) -> Any:
    """Non-negative LASSO: argmin over z >= 0 of ||x - z D||^2 / 2 + penalty sum_j z_j ||d_j||.

    Solved by active sets: the atom with the largest correlation joins, all coefficients are fitted anew under the
    penalty (Lawson and Hanson with <d_j, x> - penalty for <d_j, x>), until the duality gap or all violations are gone.
    With ``penalty=0`` this is non-negative least squares.

    Parameters
    ----------
    X, atoms
        As for :func:`matching_pursuit`.
    penalty
        One number or one a row, in the units of the rows.
    relative
        The penalty is a share of the row's largest correlation with an atom, at which the code becomes zero.
    gap
        Duality gap at which a row ends, as a share of ||x||^2 / 2; 0: run to the end.
    return_gap
        Also return the gap of each row, (n,).

    Returns
    -------
    csr_matrix (n, m), float32, or (csr_matrix, ndarray)

    Raises
    ------
    InputError
        As :func:`matching_pursuit`.

    References
    ----------
    Tibshirani 1996; Osborne, Presnell and Turlach 2000, IMA Journal of Numerical Analysis 20 (active sets).
    """
    if not gap >= 0:
        raise InputError(f"gap={gap!r} must be a number >= 0")
    gaps: list[np.ndarray] = []

    def run(kernels: Any, x: np.ndarray, U: np.ndarray, G: np.ndarray, rows: dict, z: np.ndarray) -> None:
        weight, reached = rows["penalty"], np.zeros(len(x))
        if relative:
            weight = weight * np.maximum((x @ U.T).max(1, initial=0), 0)
        kernels.refit(x, U, G, rows["k"], 0.0, False, weight, gap, z, reached)
        gaps.append(reached)

    m = len(np.asarray(atoms))
    codes = _solve(X, atoms, max(m, 1), 0.0, run, penalty=penalty)
    return (codes, np.concatenate(gaps) if gaps else np.zeros(0)) if return_gap else codes


def _known(name: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise InputError(f"{name}={value!r} is not known; {nearest(value, valid)}")
    return value


def _solve(
    X: Any, atoms: Any, k: Any, tol: float, run: Callable[..., None], *, penalty: Any = 0.0
) -> scipy.sparse.csr_matrix:
    X, atoms = np.asarray(X), np.asarray(atoms)
    if X.ndim != 2 or atoms.ndim != 2 or X.shape[1] != atoms.shape[1]:
        raise InputError(f"rows (n, d) and atoms (m, d) must have one width, found shapes {X.shape} and {atoms.shape}")
    if not (np.isfinite(X).all() and np.isfinite(atoms).all()):
        raise InputError("rows and atoms must be finite; embed the samples that hold NaN or infinity again")
    if not tol >= 0:
        raise InputError(f"tol={tol!r} must be a number >= 0")
    per_row = {"k": _per_row("k", k, len(X), whole=True), "penalty": _per_row("penalty", penalty, len(X))}
    U, lengths = _unit(atoms)
    G = U @ U.T if len(U) ** 2 * U.itemsize <= GRAM_BYTES else np.zeros((0, 0))
    kernels, parts = _kernels(), []
    for start in range(0, len(X), ROWS):
        x = np.ascontiguousarray(X[start : start + ROWS], np.float64)
        z = np.zeros((len(x), len(U)))
        if len(U):
            run(kernels, x, U, G, {name: v[start : start + ROWS] for name, v in per_row.items()}, z)
        parts.append(scipy.sparse.csr_matrix((z / lengths).astype(np.float32)))
    if not parts:
        return scipy.sparse.csr_matrix((0, len(U)), dtype=np.float32)
    return scipy.sparse.vstack(parts, format="csr", dtype=np.float32)


def _per_row(name: str, value: Any, n: int, *, whole: bool = False) -> np.ndarray:
    given = np.asarray(value)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != n):
        raise InputError(f"{name} must be one number or one for each of the {n} rows, found shape {given.shape}")
    if given.dtype.kind not in ("iu" if whole else "iuf") or not (np.isfinite(given).all() and (given >= 0).all()):
        raise InputError(f"{name} must be {'whole numbers' if whole else 'numbers'} >= 0, found {value!r}")
    return np.array(np.broadcast_to(given, n), np.int64 if whole else np.float64)


def _unit(atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Atoms at unit length, float64, and their lengths; zero atoms stay zero and count as length 1."""
    atoms = np.ascontiguousarray(atoms, np.float64)
    lengths = np.linalg.norm(atoms, axis=1)
    lengths[lengths < 1e-12] = 1.0
    return atoms / lengths[:, None], lengths


def _kernels() -> Any:
    """The kernels; where numba compiles them, with as many threads as torch has."""
    kernels = importlib.import_module("biosae.sae.kernels.pursuit")
    if hasattr(kernels.match, "py_func"):
        importlib.import_module("biosae.sae.kernels.numba_select").threads()
    return kernels


@dataclass(eq=False)
class Pursuit(Coder):
    """The dictionary of a trained coder, with codes from a solver instead of its encoder.

    ``Pursuit(sae, solver="omp", k=8).fit(X)`` learns nothing from X when ``sae`` is fitted: it takes over atoms, bias
    and what is known of their training, and measures itself on X. It can then be used, saved and loaded like any coder.

    Attributes
    ----------
    k_ : int
        Steps or atoms a row.
    penalty_ : float or None
        Share of each row's largest correlation that the LASSO uses.
    normaliser_ : Normaliser
        The row-wise scaling of the coder, if it has one.
    """

    coder: Any = None
    """A fitted coder with linear decoding; one that is not fitted yet (None: ``SAE()``) is fitted to X first."""
    solver: str = "omp"
    """``omp``, ``mp`` (matching pursuit), ``gradient`` or ``lasso``; see the functions of :mod:`biosae.sae.solvers`."""
    k: int | None = None
    """Steps or atoms a row at most (``lasso``: atoms a row on average). None: that of the coder."""
    _: KW_ONLY
    rule: str = "relu"
    """Of ``mp`` and ``omp``: ``relu``, ``abs``, and for ``mp`` also ``signed``."""
    tol: float = 0.0
    """Share of ||x|| at which the residual of a row is small enough; not used by ``lasso``."""
    penalty: float | None = None
    """Of ``lasso``, as a share of each row's largest correlation with an atom. None: so that k atoms a row are active
    on average."""

    _unsaved = ("coder",)
    _state = ("k", "penalty")

    def validate(self) -> None:
        """Check every setting; ``InputError`` names the first that is wrong."""
        _known("solver", self.solver, SOLVERS)
        _known("rule", self.rule, RULES if self.solver == "mp" else ("relu", "abs"))
        if self.k is not None and not (isinstance(self.k, int | np.integer) and self.k >= 1):
            raise InputError(f"k={self.k!r} must be a whole number >= 1")
        if not self.tol >= 0:
            raise InputError(f"tol={self.tol!r} must be a number >= 0")
        if self.penalty is not None and not 0 <= self.penalty <= 1:
            raise InputError(f"penalty={self.penalty!r} is a share of the largest correlation and must lie in [0, 1]")

    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Pursuit:
        """Take over the dictionary and measure it on X.

        Parameters
        ----------
        X
            Embeddings (n, d) of the kind the coder was fitted to.
        y
            Ignored.
        groups
            Passed to the coder, if it is fitted here.

        Raises
        ------
        InputError
            If the coder's decoding is not linear, or a setting is wrong.
        """
        self.validate()
        coder = self.coder
        if coder is None:
            coder = importlib.import_module("biosae.sae.estimator").SAE()
        if not isinstance(coder, Coder):
            raise NotFittedError(f"Pursuit needs a coder of biosae.sae, got a {type(coder).__name__}")
        if not coder.__sklearn_is_fitted__():
            coder = type(coder)(**coder.get_params()).fit(X, groups=groups)
        self._take_over(coder)
        rows = coder._rows(X)
        self._check_linear(coder, next(x for _, x in rows.blocks(64)))
        used = coder.metrics_.get("l0", 1.0)
        self.k_ = min(int(self.k or getattr(coder, "k_", None) or max(1, round(used))), self.n_latents_)
        self.penalty_ = self._search(rows) if self.solver == "lasso" and self.penalty is None else self.penalty
        self._measure(rows.blocks(), Held())
        return self

    def _take_over(self, coder: Coder) -> None:
        for name in STATE:
            if name != "metrics":
                setattr(self, f"{name}_", getattr(coder, f"{name}_"))
        self.n_features_in_, self.n_latents_ = coder.n_features_in_, coder.n_latents_
        self.decoder_ = np.ascontiguousarray(coder.decoder_, np.float32)
        self.bias_ = np.ascontiguousarray(coder.bias_, np.float32)
        normaliser = getattr(coder, "normaliser_", None)
        self._set_scaling(normaliser.rowwise if normaliser is not None else None)

    def _set_scaling(self, rowwise: str | None) -> None:
        self.normaliser_ = Normaliser(np.zeros(self.n_features_in_), 1.0, rowwise)
        self._needs_rows = rowwise is not None

    def _check_linear(self, coder: Coder, x: np.ndarray) -> None:
        z = scipy.sparse.random(len(x), self.n_latents_, density=min(1.0, 8 / self.n_latents_), format="csr", rng=0)
        z = z.astype(np.float32) * np.float32(np.abs(x).mean() or 1)
        ours, theirs = self._decode(z, x), coder._decode(z, x)
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * max(np.abs(ours).max(), 1e-30)):
            raise InputError(
                f"the codes of this {type(coder).__name__} are not decoded as z D + b; a pursuit knows no other way"
            )

    def _search(self, rows: Rows) -> float:
        """Share of the largest correlation that leaves k atoms a row on average."""
        step = max(1, -(-(rows.n or SEARCHED_ROWS) // SEARCHED_ROWS))
        taken = [x[::step] for _, x in rows.blocks()]
        s = self.normaliser_.ready(np.concatenate(taken)[:SEARCHED_ROWS]) - self.bias_
        low, high = -4.0, 0.0  # log10
        for _ in range(14):
            middle = (low + high) / 2
            active = nn_lasso(s, self.decoder_, penalty=10**middle, relative=True, gap=1e-4).nnz / len(s)
            low, high = (low, middle) if active < self.k_ else (middle, high)
        return float(10**high)

    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        s = self.normaliser_.ready(x).astype(np.float64) - self.bias_
        if self.solver == "mp":
            return matching_pursuit(s, self.decoder_, k=self.k_, rule=self.rule, tol=self.tol)
        if self.solver == "omp":
            return omp(s, self.decoder_, k=self.k_, rule=self.rule, tol=self.tol)
        if self.solver == "gradient":
            return gradient_pursuit(s, self.decoder_, k=self.k_, tol=self.tol)
        return nn_lasso(s, self.decoder_, penalty=self.penalty_, relative=True)

    def _decode(self, z: Any, x: np.ndarray | None) -> np.ndarray:
        return self.normaliser_.restore(np.asarray(z @ self.decoder_, np.float32) + self.bias_, x)

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"W_dec": self.decoder_, "b_dec": self.bias_}

    def _facts(self) -> dict[str, Any]:
        return {"rowwise": self.normaliser_.rowwise}

    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        m, d = self.n_latents_, self.n_features_in_
        self.decoder_ = checkpoint.shaped(tensors, "W_dec", (m, d))
        self.bias_ = checkpoint.shaped(tensors, "b_dec", (d,))
        if config["rowwise"] not in (None, *ROWWISE):
            raise ValueError(f"unknown scaling of rows {config['rowwise']!r}")
        self._set_scaling(config["rowwise"])
