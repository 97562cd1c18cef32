"""What coders that are not trained by gradient share: how rows reach them, what is kept, and products by row."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError, nearest
from biosae.sae import checkpoint
from biosae.sae.coder import CHUNK, Coder, stacked
from biosae.sae.rows import Held, Rows
from biosae.sae.solvers import nn_lasso, omp
from biosae.sae.stream import Stream

SCALINGS = ("centre", "none")
MEASURED_ROWS = 2**18
"""Rows on which quality is measured at most."""
MEASURED_BLOCK = 2048
FEWEST_COLUMNS = 32
"""Columns of a product at least: with few of them its last bits depend on where in the block a row stands."""
PIVOTS = 100
"""Exchanges of block principal pivoting before a row is left to active sets."""


class Direct(Coder):
    """A coder whose dictionary is chosen or solved for: ``fit`` as a whole, linear decoding z D + b, and its files.

    A subclass gives ``validate``, ``_learn(rows, held)``, which sets ``decoder_`` and ``bias_``, and ``_codes``. Its
    settings include ``validation`` and ``random_state``.
    """

    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Direct:
        """Fit to embeddings.

        Parameters
        ----------
        X
            (n, d): array, tensor, data frame, chunks, or :class:`biosae.Embeddings` (read in blocks).
        y
            Ignored.
        groups
            Label (patient) of each row or sample; whole groups are held out for validation. None: the ``patient``
            column of the embeddings if there is one.

        Raises
        ------
        InputError
            For NaN, infinity, sparse or too little input, or an invalid setting.
        """
        self.validate()
        rows = Rows(X)
        seed = self.random_state
        self.random_state_ = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        held = Held.draw(rows, groups=groups, share=self.validation, rng=np.random.default_rng(self.random_state_))
        self.n_features_in_ = rows.d
        self._learn(rows, held)
        self.n_latents_ = len(self.decoder_)
        self._keep_rows(rows, held)
        self._measure(_measured(rows, self.random_state_), held)
        return self

    def validate(self) -> None:
        """Check every setting; ``InputError`` names the first that is wrong."""
        raise NotImplementedError

    def _learn(self, rows: Rows, held: Held) -> None:
        """Set ``decoder_`` (m, d) float32 and ``bias_`` (d,) float32 from the rows that are not held out."""
        raise NotImplementedError

    def _centre(self, rows: Rows, held: Held) -> np.ndarray:
        """Bias that the setting ``normalise`` asks for: the mean of the training rows, summed in float64, or 0."""
        total, n = np.zeros(rows.d), 0
        if self.normalise == "centre":
            for x in training_blocks(rows, held):
                total, n = total + x.sum(0, dtype=np.float64), n + len(x)
        return (total / max(n, 1)).astype(np.float32)

    def _decode(self, z: Any, x: np.ndarray | None) -> np.ndarray:
        return np.asarray(z @ self.decoder_, np.float32) + self.bias_

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"W_dec": self.decoder_, "b_dec": self.bias_}

    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        m, d = self.n_latents_, self.n_features_in_
        self.decoder_ = checkpoint.shaped(tensors, "W_dec", (m, d))
        self.bias_ = checkpoint.shaped(tensors, "b_dec", (d,))

    def _check(
        self,
        *,
        choices: dict[str, tuple] | None = None,
        whole: Iterable[tuple[str, int]] = (),
        shares: Iterable[str] = ("validation",),
        positive: Iterable[str] = (),
    ) -> None:
        """Check settings: members of a list, whole numbers from a least one up (or None), shares, positive numbers."""
        for name, valid in (choices or {}).items():
            if getattr(self, name) not in valid:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {nearest(getattr(self, name), valid)}")
        for name, least in whole:
            value = getattr(self, name)
            if value is not None and not (_is_number(value, whole=True) and value >= least):
                raise InputError(f"{name}={value!r} must be a whole number >= {least}")
        for name in shares:
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{name}={value!r} is a share and must lie in [0, 1)")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < np.inf):
                raise InputError(f"{name}={value!r} must be a positive number")


def _is_number(value: Any, *, whole: bool = False) -> bool:
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool)


def training_rows(rows: Rows, held: Held, count: int, seed: int) -> np.ndarray:
    """Up to ``count`` different training rows in random order, float32 (<= count, d)."""
    return Stream(rows, held=held, batch_size=1, seed=seed).sample(count, seed)


def training_blocks(rows: Rows, held: Held) -> Iterator[np.ndarray]:
    """Training rows from first to last in blocks, float32."""
    for start, x in rows.blocks():
        keep = ~held.mask(start, start + len(x))
        if keep.any():
            yield x[keep]


def products(x: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """x atoms^T, float32 (n, m), in blocks of :data:`biosae.sae.coder.CHUNK` rows: each row by itself."""
    m = len(atoms)
    padded = np.zeros((max(m, FEWEST_COLUMNS), atoms.shape[1]), np.float32)
    padded[:m] = atoms
    weights, out = torch.from_numpy(padded).T, np.empty((len(x), m), np.float32)
    for start in range(0, len(x), CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(x[start : start + CHUNK], np.float32))
        n = len(part)
        if n < CHUNK:
            part = torch.cat([part, torch.zeros(CHUNK - n, part.shape[1])])
        out[start : start + n] = (part @ weights)[:n, :m].numpy()
    return out


def unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows at unit length, float32, and their lengths, float64; a zero row stays zero."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return (rows / np.where(norms > 0, norms, 1)[:, None]).astype(np.float32), norms


def nonnegative_codes(x: np.ndarray, atoms: np.ndarray, k: int | None) -> scipy.sparse.csr_matrix:
    """Codes z >= 0 of least ||x - z D||^2, csr_matrix float32 (n, m); with ``k`` at most k a row, chosen greedily.

    Exact, by block principal pivoting from the atoms of positive correlation (Kim and Park 2011, SIAM Journal on
    Scientific Computing 33), which is fast where most atoms are active; where atoms depend on each other and this does
    not end, by active sets (:func:`biosae.sae.solvers.nn_lasso`).
    """
    if k is not None:
        return omp(x, atoms, k=k)
    kernels, parts = importlib.import_module("biosae.sae.kernels.pivot"), []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK].astype(np.float64)
        z, done = np.zeros((len(part), len(atoms))), np.zeros(len(part), bool)
        kernels.pivot(part, atoms.astype(np.float64), PIVOTS, z, done)
        if not done.all():
            z[~done] = nn_lasso(part[~done], atoms, penalty=0.0).toarray()
        parts.append(scipy.sparse.csr_matrix(z.astype(np.float32)))
    codes = stacked(parts)
    codes.eliminate_zeros()
    return codes


def _measured(rows: Rows, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """``(start, rows)`` blocks on which quality is measured: all rows, or 2**18 of a longer table."""
    if rows.n is None or rows.n <= MEASURED_ROWS:
        yield from rows.blocks()
        return
    starts = np.arange(0, rows.n, MEASURED_BLOCK)
    chosen = np.random.default_rng(seed).choice(starts, MEASURED_ROWS // MEASURED_BLOCK, replace=False)
    for start in np.sort(chosen).tolist():
        yield start, rows.read(start, min(start + MEASURED_BLOCK, rows.n)).float().numpy()
