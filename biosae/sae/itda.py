"""ITDA: a dictionary of the embeddings themselves, those that matching pursuit on the others reconstructs badly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae.errors import InputError
from biosae.sae import checkpoint
from biosae.sae.direct import SCALINGS, Direct, unit
from biosae.sae.rows import Held, Rows
from biosae.sae.solvers import _kernels, matching_pursuit, omp

SAME = 1 - 1e-6
"""Cosine, of either sign, above which two rows are the same atom."""
SMALLEST_NORM = 1e-9
"""By which the error of a row divides at least."""
ID_BYTES = 16
CODINGS = ("mp", "omp")


class Dictionary:
    """Atoms that grow batch by batch.

    A batch is treated in this order. While there are fewer atoms than features, its distinct rows join, the most
    frequent first, of equally frequent ones the earlier. All rows are then coded by matching pursuit (k steps, both
    signs), and each whose error is above ``tau`` joins, in order. ``err = mean over d of (x / ||x|| - x_hat /
    ||x_hat||)^2``, both norms at least 1e-9; as 2 (1 - cos) / d it lies between 0 and 4 / d. A row that is (or is
    minus) an atom or an earlier newcomer, |cos| > 1 - 1e-6, never joins, nor does a zero row.

    Parameters
    ----------
    d
        Features.
    k
        Steps of matching pursuit.
    tau
        Error above which a row joins.
    most
        Atoms at which it is full.
    """

    def __init__(self, d: int, *, k: int, tau: float, most: int) -> None:
        self.d, self.k, self.tau, self.most = d, k, tau, most
        self.atoms = np.zeros((0, d), np.float32)
        self.rows = np.zeros(0, np.int64)
        self._gram = np.zeros((0, 0))

    @property
    def full(self) -> bool:
        """Whether no more atoms are taken."""
        return len(self.atoms) >= self.most

    def add(self, x: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Treat a batch x (n, d) whose rows have these numbers; the error of each row that is not zero, in order."""
        u, norms = unit(x)
        u, x, number = u[norms > 0], x[norms > 0], number[norms > 0]
        if len(self.atoms) < self.d:
            self._join(u, number, _by_frequency(x), self.d - len(self.atoms))
        errors = self._errors(u)
        self._join(u, number, np.flatnonzero(errors > self.tau), len(u))
        return errors

    def _errors(self, u: np.ndarray) -> np.ndarray:
        """Errors of unit rows; they do not depend on the length of a row."""
        wide, z = u.astype(np.float64), np.zeros((len(u), len(self.atoms)))
        if len(u):
            kernels, steps = _kernels(), np.full(len(u), self.k)
            kernels.match(wide, self.atoms.astype(np.float64), self._gram, steps, 0.0, kernels.ABS, z)
        found = z @ self.atoms.astype(np.float64)
        found /= np.maximum(np.linalg.norm(found, axis=1), SMALLEST_NORM)[:, None]
        return np.square(wide - found).mean(1)

    def _join(self, u: np.ndarray, number: np.ndarray, order: np.ndarray, count: int) -> None:
        """Take up to ``count`` of the unit rows in this order, but none twice and no more than there is room for."""
        new: list[int] = []
        count = min(count, self.most - len(self.atoms))
        known = (np.abs(u[order] @ self.atoms.T) > SAME).any(1)
        order = order[~known]
        among = np.abs(u[order] @ u[order].T) > SAME
        taken = np.zeros(len(order), bool)
        for i, row in enumerate(order):
            if len(new) >= count:
                break
            if not (among[i] & taken).any():
                taken[i] = True
                new.append(int(row))
        if not new:
            return
        fresh, before = u[new], len(self.atoms)
        self.atoms, self.rows = np.concatenate([self.atoms, fresh]), np.concatenate([self.rows, number[new]])
        gram = np.empty((len(self.atoms), len(self.atoms)))
        gram[:before, :before] = self._gram
        gram[before:] = fresh.astype(np.float64) @ self.atoms.T.astype(np.float64)
        gram[:before, before:] = gram[before:, :before].T
        self._gram = gram


def _by_frequency(x: np.ndarray) -> np.ndarray:
    """Numbers of the first occurrences of distinct rows: the most frequent first, then the earliest."""
    whole = np.ascontiguousarray(x).view([("", x.dtype)] * x.shape[1]).ravel() if len(x) else np.zeros(0)
    _, first, counts = np.unique(whole, return_index=True, return_counts=True)
    return first[np.lexsort((first, -counts))]


@dataclass(eq=False)
class ITDA(Direct):
    """Inference-time decomposition of activations: atoms are embeddings of the data, codes come from a pursuit.

    x - b ~ z D with unit atoms D, each a row of the table, and codes of both signs by k steps of matching pursuit. The
    table is read once, batch by batch (:class:`Dictionary`); beside one batch, memory holds the atoms and their
    products, 4 m d + 8 m^2 bytes. Two dictionaries of the same samples, of different encoders or layers, are compared
    by which samples became atoms: :func:`jaccard`.

    Attributes
    ----------
    atom_ids_ : ndarray (m,) of str
        Hash of the sample (and token) that each atom is. Names of samples are not kept: the hash is salted with
        ``salt``, or with all sample ids of the table, so that nobody without these can look a name up.
    atom_rows_ : ndarray (m,), int64
        Row of each atom in the table that was fitted.
    salt_id_ : str
        Which salt: dictionaries with another one have no ids in common and cannot be compared.
    tau_ : float
        Threshold used.
    n_rows_read_ : int
        Rows looked at before the dictionary was full or the table at its end.

    References
    ----------
    Leask, Nanda and Al Moubayed 2025, ICML, arXiv 2505.17769. Matching pursuit: Mallat and Zhang 1993.
    """

    n_latents: int | None = None
    """Atoms at most; the table is read until there are so many. None: 8192."""
    k: int | None = None
    """Steps of the pursuit, and so active latents of a row at most. None: d / 8, between 4 and 32, as for an SAE."""
    _: KW_ONLY
    tau: float | None = None
    """Error above which a row becomes an atom, a mean over the d features: 2 (1 - cosine) / d of a row and its
    reconstruction. None: 0.2 / d, a cosine of 0.9. Above 4 / d nothing ever joins beyond the first d atoms."""
    coding: str = "mp"
    """How rows are coded with the finished dictionary: ``mp``, or ``omp``, slower and with less error at the same k."""
    batch_size: int = 512
    """Rows of a batch; within one, rows that are alike but not equal may all join."""
    shuffle: bool = True
    """Read batches of neighbouring rows in random order. False: in the order of the table."""
    normalise: str = "centre"
    """``centre``: the mean row is subtracted first; ``none``: as published, without a bias."""
    salt: str | None = None
    """Salt of the ids; give the same one to compare tables whose samples are not all the same. It is not saved."""
    validation: float = 0.1
    """Share of the rows held out (whole groups where groups are known); 0 holds out nothing."""
    random_state: int | None = None
    """Seed. None: drawn from the system and kept in ``random_state_``."""

    _unsaved = ("salt",)
    _state = ("k", "tau", "salt_id", "n_rows_read")

    def validate(self) -> None:
        """Check every setting; ``InputError`` names the first that is wrong."""
        self._check(
            choices={"coding": CODINGS, "normalise": SCALINGS, "shuffle": (True, False)},
            whole=(("n_latents", 1), ("k", 1), ("batch_size", 1), ("random_state", 0)),
            positive=("tau",),
        )

    def _learn(self, rows: Rows, held: Held) -> None:
        self.k_ = int(self.k or min(32, max(4, rows.d // 8)))
        self.tau_ = 0.2 / rows.d if self.tau is None else float(self.tau)
        self.bias_ = self._centre(rows, held)
        grown = Dictionary(rows.d, k=self.k_, tau=self.tau_, most=self.n_latents or 8192)
        self.n_rows_read_ = 0
        for x, number in self._batches(rows, held):
            grown.add(x - self.bias_, number)
            self.n_rows_read_ += len(x)
            if grown.full:
                break
        if not len(grown.atoms):
            raise InputError(
                f"all rows {'equal their mean' if self.normalise == 'centre' else 'are zero'}: there is nothing to "
                "decompose; check the embeddings"
            )
        self.decoder_, self.atom_rows_ = grown.atoms, grown.rows
        self.salt_id_, self.atom_ids_ = _ids(rows, grown.rows, self.salt)

    def _batches(self, rows: Rows, held: Held) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of training rows and their numbers."""
        if rows.n is None or not self.shuffle:
            pieces = rows.blocks(self.batch_size)
        else:
            starts = np.arange(0, rows.n, self.batch_size)
            np.random.default_rng(self.random_state_).shuffle(starts)
            pieces = ((s, rows.read(s, min(s + self.batch_size, rows.n)).float().numpy()) for s in starts.tolist())
        for start, x in pieces:
            keep = np.flatnonzero(~held.mask(start, start + len(x)))
            for part in range(0, len(keep), self.batch_size):  # chunks have a size of their own
                some = keep[part : part + self.batch_size]
                yield x[some], start + some

    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        if self.coding == "omp":
            return omp(x - self.bias_, self.decoder_, k=self.k_, rule="abs")
        return matching_pursuit(x - self.bias_, self.decoder_, k=self.k_, rule="abs")

    def _tensors(self) -> dict[str, np.ndarray]:
        ids = np.frombuffer(bytes.fromhex("".join(self.atom_ids_)), np.uint8).reshape(-1, ID_BYTES).copy()
        return {**super()._tensors(), "atom_ids": ids, "atom_rows": self.atom_rows_}

    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        super()._restore(tensors, config, device)
        ids = checkpoint.shaped(tensors, "atom_ids", (self.n_latents_, ID_BYTES))
        self.atom_ids_ = np.asarray([row.tobytes().hex() for row in ids])
        self.atom_rows_ = checkpoint.shaped(tensors, "atom_rows", (self.n_latents_,))


def _ids(rows: Rows, chosen: np.ndarray, salt: str | None) -> tuple[str, np.ndarray]:
    """Name of the salt, and a hash of the sample and token of each chosen row; without sample ids, of its number."""
    index = getattr(rows.obs, "index", None)
    if index is None:
        names, own = [f"row {r}" for r in chosen.tolist()], f"rows of an array of {rows.n}"
    else:
        names = [f"{index[r // rows.tokens]} token {r % rows.tokens}" for r in chosen.tolist()]
        own = hashlib.sha256("\0".join(sorted(map(str, index))).encode()).hexdigest()
    secret = own if salt is None else f"given: {salt}"
    ids = [hashlib.sha256(f"{secret}\0{name}".encode()).hexdigest()[: 2 * ID_BYTES] for name in names]
    return hashlib.sha256(f"salt\0{secret}".encode()).hexdigest()[:16], np.asarray(ids)


def jaccard(a: Any, b: Any) -> float:
    """How alike two dictionaries are in which samples became atoms: |A and B| / |A or B|; 1 where both are empty.

    Parameters
    ----------
    a, b
        Fitted :class:`ITDA` of the same samples, or several of them (one a layer), whose ids are then united.

    Returns
    -------
    float
        From 0 to 1. It falls when the dictionaries differ in size: compare at one ``n_latents``.

    Raises
    ------
    InputError
        If the ids were salted differently, so that they cannot agree.

    References
    ----------
    Leask, Nanda and Al Moubayed 2025, arXiv 2505.17769, section on model similarity.
    """
    models = [[m] if isinstance(m, ITDA) else list(m) for m in (a, b)]
    salts = {m.salt_id_ for side in models for m in side}
    if len(salts) > 1:
        raise InputError(
            "these dictionaries were fitted to different sets of samples, so their ids are salted differently; fit "
            "both to the same samples, or give both the same salt="
        )
    A, B = ({i for m in side for i in m.atom_ids_.tolist()} for side in models)
    return len(A & B) / len(A | B) if A | B else 1.0
