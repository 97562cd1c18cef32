"""The contract of everything that turns embeddings into sparse codes: one class, and how its kinds are opened."""

from __future__ import annotations

import abc
import hashlib
import importlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae import provenance
from biosae.errors import FormatError, IdentityError, InputError, NotFittedError
from biosae.sae import checkpoint, output
from biosae.sae.config import Settings
from biosae.sae.metrics import Quality
from biosae.sae.rows import Held, Rows
from biosae.settings import resolve_device

CHUNK = 256
"""Rows of every matrix product at inference; a short last chunk is padded, so that the code of a row never depends on
its company."""
CODERS = {
    "Baseline": "biosae.sae.baselines",
    "ITDA": "biosae.sae.itda",
    "Pursuit": "biosae.sae.solvers",
    "SAE": "biosae.sae.estimator",
    "SemiNMF": "biosae.sae.semi_nmf",
}
"""Kinds of coders that a folder may hold, and where they live."""
STATE = (
    "random_state", "metrics", "validation", "identity", "fingerprint", "training_groups", "groups_salt", "provenance",
)  # fmt: skip
"""Fitted attributes (without their ``_``) that ``config.json`` of every coder holds."""


class Coder(Settings, abc.ABC):
    """Anything with ``fit``, sparse codes and a dictionary: :class:`biosae.sae.SAE` and what is compared with it.

    A subclass is a dataclass of settings that gives ``fit`` (ending with :meth:`_keep_rows` and :meth:`_measure`),
    ``_codes``, ``_decode``, ``_tensors`` and ``_restore``, and after ``fit`` has the attributes below.

    Attributes
    ----------
    decoder_ : ndarray (m, d), float32
        Atoms, in the encoder's own space.
    bias_ : ndarray (d,)
        Reconstruction of an empty code.
    n_features_in_, n_latents_ : int
        d and m.
    metrics_ : dict
        Quality on the training rows, see :meth:`biosae.sae.metrics.Quality.summary`, and ``fvu_val``, ``l0_val``,
        ``n_rows_val`` on held-out rows (NaN and 0 where there are none).
    density_ : ndarray (m,)
        Share of training rows in which each latent is active.
    """

    _unsaved: tuple[str, ...] = ()
    """Settings of one run on one machine."""
    _state: tuple[str, ...] = ()
    """Fitted attributes beyond :data:`STATE` that ``config.json`` holds."""

    # ------------------------------------------------------------------------------------ what a subclass gives

    @abc.abstractmethod
    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Coder:
        """Fit to embeddings (n, d); see the subclass."""

    @abc.abstractmethod
    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        """Codes (n, m) of float32 rows (n, d): sorted indices, no stored zeros, each row by itself."""

    @abc.abstractmethod
    def _decode(self, z: Any, x: np.ndarray | None) -> np.ndarray:
        """Reconstructions float32 (n, d) of codes; ``x``: their rows, needed where :attr:`_needs_rows`."""

    @abc.abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """Arrays from which :meth:`_restore` makes the fitted coder again."""

    @abc.abstractmethod
    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        """Inverse of :meth:`_tensors` (and :meth:`_facts`); ``FormatError`` where a tensor is missing or misshapen."""

    def _facts(self) -> dict[str, Any]:
        """What ``config.json`` holds besides settings and :data:`STATE`."""
        return {}

    additive = True
    """Whether a latent adds its code times its atom to the reconstruction of the embedding itself."""
    _needs_rows = False
    """Whether reconstructions need the rows that the codes came from."""

    # ------------------------------------------------------------------------------------------------- contract

    def transform(self, X: Any) -> Any:
        """Codes of embeddings.

        Returns
        -------
        csr_matrix (n, m), float32 (or what :meth:`set_output` asks for)
            Sorted indices, no explicit zeros, in the units of the embedding. The code of a row does not depend on
            the other rows.

        Raises
        ------
        IdentityError
            If X comes from another encoder, layer or preprocessing than the training embeddings.
        InputError
            For NaN, infinity or another number of features.
        NotFittedError
            Before ``fit`` or ``load``.
        """
        codes = self.codes(X)
        container = output.wanted(self)
        if container == "default":
            return codes
        index = getattr(X, "index", None) if hasattr(X, "columns") else None
        return output.packed(codes, container, names=self.get_feature_names_out(), index=index)

    def fit_transform(self, X: Any, y: Any = None, *, groups: Any = None) -> Any:
        """``fit`` and then ``transform`` the same rows (training rows included)."""
        return self.fit(X, y, groups=groups).transform(X)

    def codes(self, X: Any) -> scipy.sparse.csr_matrix:
        """Codes as csr_matrix (n, m), whatever :meth:`set_output` says; otherwise as :meth:`transform`."""
        rows = self._rows(X)
        return stacked(self._codes(x) for _, x in rows.blocks())

    def set_output(self, *, transform: str | None = None) -> Coder:
        """Choose what ``transform`` returns: ``default`` (csr_matrix), ``pandas`` (sparse columns) or ``polars``.

        Columns are the latents' names; pandas keeps the index of a data frame that was passed in. polars has no sparse
        columns: a table of more than 2 GiB is refused. None changes nothing.
        """
        if transform is not None:
            self._sklearn_output_config = {"transform": output.check(transform)}
        return self

    def inverse_transform(self, Z: Any, *, like: Any = None) -> np.ndarray:
        """Reconstructions, float32 (n, d), without making sparse codes dense where decoding is linear.

        Parameters
        ----------
        Z
            Codes, (n, m), sparse or dense.
        like
            The embeddings that the codes came from; needed by ``normalise="layernorm"`` and ``"l2"`` only, whose row
            means and deviations are not in the codes.

        Raises
        ------
        InputError
            If Z does not have m columns, or ``like`` is needed and absent.
        """
        self._check_fitted()
        Z = self._check_codes(Z)
        if not self._needs_rows:
            return self._decode(Z, None)
        if like is None:
            raise InputError("with this scaling pass like=X: row means and deviations are not in the codes")
        rows = self._rows(like)
        if rows.n != Z.shape[0]:
            raise InputError(f"like has {rows.n} rows, the codes have {Z.shape[0]}")
        return np.concatenate([self._decode(Z[start : start + len(x)], x) for start, x in rows.blocks()])

    def score(self, X: Any, y: Any = None) -> float:
        """Minus the fraction of variance unexplained on X, about X's own mean (higher is better, 0 is best)."""
        return -self.evaluate(X)["fvu"]

    def evaluate(self, X: Any) -> dict[str, float]:
        """All quality numbers on X: see :meth:`biosae.sae.metrics.Quality.summary`."""
        rows = self._rows(X)
        quality = self._quality()
        for _, x in rows.blocks():
            self._update(quality, x)
        return quality.summary()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of latents: ``L0000``, ``L0001``, ..."""
        self._check_fitted()
        width = max(4, len(str(self.n_latents_ - 1)))
        return np.asarray([f"L{j:0{width}d}" for j in range(self.n_latents_)], dtype=object)

    def trained_on(self, names: Any) -> np.ndarray:
        """Which of these groups (patients) were among the training rows, bool (len(names),).

        Raises
        ------
        InputError
            If the coder was fitted without groups, so that nobody can know.
        """
        self._check_fitted()
        if not self.training_groups_:
            raise InputError(
                f"this {type(self).__name__} was fitted without patients or groups; which ones it has seen is not "
                "recorded"
            )
        known = set(self.training_groups_)
        return np.asarray([self._hash_group(str(name)) in known for name in names], dtype=bool)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` (docs/file-formats.md), over an existing save."""
        self._check_fitted()
        identity = self.identity_ or {}
        config = {
            "class": type(self).__name__,
            "params": {n: v for n, v in self.get_params().items() if n not in self._unsaved},
            "n_latents": self.n_latents_,
            "n_features": self.n_features_in_,
            "licence": identity.get("licence"),
            "derivatives_restricted": identity.get("derivatives_restricted"),
            **self._facts(),
            **{name: getattr(self, f"{name}_") for name in (*STATE, *self._state)},
        }
        checkpoint.write(folder, {**self._tensors(), "density": self.density_}, config)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, device: str = "auto") -> Coder:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FormatError
            If the folder is incomplete, corrupt, foreign, of a newer version, or holds another kind of coder.
        """
        coder = load(folder, device=device)
        if not isinstance(coder, cls):
            raise FormatError(f"{folder} holds a {type(coder).__name__}, not a {cls.__name__}; use biosae.sae.load")
        return coder

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "decoder_")

    def __sklearn_tags__(self) -> Any:
        utils = importlib.import_module("sklearn.utils")  # asked for by scikit-learn alone, which is then loaded
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(preserves_dtype=[]),
        )

    # ------------------------------------------------------------------------------------------------ internal

    def _quality(self) -> Quality:
        """Empty sums; where rows have a scale of their own the bias is not in their space, and 0 stands for it."""
        return Quality(self.bias_ * (not self._needs_rows), self.n_latents_)

    def _keep_rows(self, rows: Rows, held: Held, *, went_on: bool = False) -> None:
        """What is remembered of the training rows. ``went_on``: groups seen before stay seen."""
        self.identity_, self.fingerprint_ = rows.identity, rows.fingerprint
        self.validation_ = {"by": held.by, "n_groups": held.n_groups, "n_rows": len(held)}
        if not went_on:
            self.groups_salt_ = hashlib.sha256(self.decoder_.tobytes()).hexdigest()[:32]
        groups = {self._hash_group(g) for g in held.training_groups}
        if went_on:  # if the groups of any part are unknown, nobody can say which were never seen
            groups = groups | set(self.training_groups_) if groups and self.training_groups_ else set()
        self.training_groups_ = tuple(sorted(groups))
        self.provenance_ = provenance.record(seed=self.random_state_, threads=torch.get_num_threads())

    def _measure(self, blocks: Iterable[tuple[int, np.ndarray]], held: Held) -> None:
        """``metrics_`` and ``density_`` from ``(start, rows)`` blocks of the training table."""
        seen, unseen = self._quality(), self._quality()
        for start, x in blocks:
            out = held.mask(start, start + len(x))
            for quality, part in ((seen, ~out), (unseen, out)):
                if part.any():
                    self._update(quality, x[part])
        self.metrics_, self.density_ = seen.summary(), seen.density
        val = unseen.summary() if unseen.n else {"fvu": float("nan"), "l0": float("nan"), "n_rows": 0}
        self.metrics_ |= {f"{name}_val": val[name] for name in ("fvu", "l0", "n_rows")}

    def _update(self, quality: Quality, x: np.ndarray) -> None:
        """Add rows (n, d) to the sums."""
        z = self._codes(x)
        quality.update(x, self._decode(z, x), z)

    def _rows(self, X: Any) -> Rows:
        self._check_fitted()
        return self._check_rows(Rows(X))

    def _check_rows(self, rows: Rows) -> Rows:
        """The rows, if they are of the kind that this coder was fitted to."""
        name = type(self).__name__
        if self.fingerprint_ and rows.fingerprint and rows.fingerprint != self.fingerprint_:
            ours, theirs = self.identity_ or {}, rows.identity or {}
            keys = [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
            if "encoder" in keys:  # then everything else follows from it
                keys = ["encoder"]
            differ = "; ".join(f"{k}: trained on {ours.get(k)!r}, given {theirs.get(k)!r}" for k in keys)
            raise IdentityError(
                f"these embeddings are not of the kind this {name} was fitted to ({differ}); embed the samples with "
                f"the same encoder, layer, pooling and preprocessing, or fit a new {name}"
            )
        if rows.d != self.n_features_in_:
            raise InputError(
                f"X has {rows.d} features, but {name} is expecting {self.n_features_in_} features as "
                "input: these rows come from another encoder or layer than the training rows; embed with that one, or "
                f"fit a new {name}"
            )
        return rows

    def _check_codes(self, Z: Any) -> Any:
        Z = Z.tocsr() if scipy.sparse.issparse(Z) else np.asarray(Z, np.float32)
        if Z.ndim != 2 or Z.shape[1] != self.n_latents_:
            raise InputError(
                f"codes have shape {Z.shape}; this {type(self).__name__} has {self.n_latents_} latents (columns)"
            )
        return Z

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet: call fit(X) first, or biosae.sae.load(folder)"
            )

    def _hash_group(self, name: str) -> str:
        return hashlib.sha256(f"{self.groups_salt_}:{name}".encode()).hexdigest()


def load(folder: str | os.PathLike, *, device: str = "auto") -> Coder:
    """Open any fitted coder that ``save`` wrote: an SAE, ITDA, a baseline ...

    Parameters
    ----------
    folder
        With ``config.json`` and ``model.safetensors``.
    device
        ``auto``, ``cpu``, ``cuda``, ``mps`` or another torch device; for coders that torch computes.

    Raises
    ------
    FormatError
        If the folder is incomplete, corrupt, foreign or of a newer version.
    """
    tensors, config = checkpoint.read(folder)
    name = config.get("class", "SAE")  # files of format 2 hold nothing else
    if name not in CODERS:
        raise FormatError(f"{os.fspath(folder)} holds a {name!r}, which this biosae does not know: update biosae")
    kind = getattr(importlib.import_module(CODERS[name]), name)
    try:
        coder = kind().set_params(**config["params"])
        for attribute in (*STATE, *coder._state):
            setattr(coder, f"{attribute}_", config[attribute])
        coder.training_groups_ = tuple(coder.training_groups_)
        coder.n_features_in_, coder.n_latents_ = config["n_features"], config["n_latents"]
        coder._restore(tensors, config, torch.device(resolve_device(device)))
        coder.density_ = checkpoint.shaped(tensors, "density", (coder.n_latents_,))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{os.fspath(folder)}/config.json is incomplete or inconsistent ({error})") from None
    return coder


def stacked(parts: Iterable[scipy.sparse.csr_matrix]) -> scipy.sparse.csr_matrix:
    """Codes of blocks of rows as one csr_matrix, float32."""
    return scipy.sparse.vstack(list(parts), format="csr", dtype=np.float32)


def sparse_rows(z: torch.Tensor) -> scipy.sparse.csr_matrix:
    """Dense codes (n, m) as csr_matrix: sorted indices, no stored zeros."""
    codes = scipy.sparse.csr_matrix(z.detach().cpu().numpy().astype(np.float32, copy=False))
    codes.eliminate_zeros()
    return codes
