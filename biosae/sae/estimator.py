"""The public estimator: fit on embeddings, sparse codes out, exact round trip through a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse
import torch

from biosae import provenance
from biosae.errors import IdentityError, InputError
from biosae.sae import checkpoint, distributed, saved
from biosae.sae.coder import CHUNK, Coder, sparse_rows, stacked
from biosae.sae.config import Plan, SAEConfig
from biosae.sae.fitting import fit_many, partial_fit
from biosae.sae.methods import options_of
from biosae.sae.methods.base import Method
from biosae.sae.metrics import Quality
from biosae.sae.model import SparseAutoencoder
from biosae.sae.normalise import Normaliser, inverse
from biosae.sae.partner import Joined, Scalings, gradients, split
from biosae.sae.rows import Held, Rows
from biosae.sae.sparse_ops import kernels

OFFSET = ("offset_to_spread", "largest_mean_ratio", "largest_variance_share")
"""Numbers of :func:`biosae.sae.normalise.offset_report` that are told with the metrics."""


class SAE(Coder, SAEConfig):
    """Sparse autoencoder of embeddings.

    ``z = activation((x - b) W_enc^T + b_enc)`` and ``x_hat = z D + b`` with sparse codes z (n, m), unit-norm atoms D
    (m, d) and bias b (d,), unless the page of the architecture (docs/methods) says otherwise. A code is in the units of
    the embedding: latent j with value z moves the reconstruction by z along its atom. Parameters are those of
    :class:`biosae.sae.config.SAEConfig`.

    Attributes
    ----------
    decoder_ : ndarray (m, d), float32
        Atoms, in the encoder's own space (for ``layernorm``: the space of layer-normalised rows). What a latent adds to
        the reconstruction by one unit of its code; of ``polysae`` its linear part.
    bias_ : ndarray (d,)
        Reconstruction of an empty code.
    n_features_in_, n_latents_, k_, batch_size_, n_steps_, learning_rate_, aux_k_, dead_after_, random_state_
        Numbers used, given or chosen.
    metrics_ : dict
        Quality on the training rows (see :meth:`biosae.sae.metrics.Quality.summary`), and ``fvu_val``, ``l0_val``,
        ``n_rows_val`` on the held-out rows (NaN and 0 where none could be held out).
    density_ : ndarray (m,)
        Share of training rows in which each latent is active.
    seconds_ : float
        Time of the steps of the last ``fit``, without reading rows.
    history_ : list of dict
        ``step, loss, fvu, l0, dead, lr`` of about 50 batches.
    validation_ : dict
        How rows were held out: ``by`` (``row``, ``sample``, ``patient``, ``groups``), ``n_groups``, ``n_rows``.
    identity_, fingerprint_ : dict or None, str or None
        Encoder, layer and preprocessing of the embeddings, where they are known.
    partner_features_ : int
        Columns of the second table; 0 without one.
    partner_identity_, partner_fingerprint_ : dict or None, str or None
        As ``identity_`` and ``fingerprint_``, of the second table.
    training_groups_ : tuple of str
        Salted SHA-256 of the groups (patients) trained on; ask with :meth:`trained_on`.

    References
    ----------
    ReLU + L1: Bricken et al. 2023. TopK and AuxK: Gao et al. 2024, arXiv 2406.04093. BatchTopK: Bussmann et al. 2024,
    arXiv 2412.06410.
    """

    _trainer = None  # goes on in partial_fit; not part of the estimator's state
    _unsaved = ("callbacks", "checkpoint", "parallel")
    _state = ("k", "batch_size", "n_steps", "learning_rate", "aux_k", "dead_after", "history")

    def fit(self, X: Any, y: Any = None, *, groups: Any = None, partner: Any = None) -> SAE:
        """Fit to embeddings.

        Parameters
        ----------
        X
            (n, d): array, tensor or data frame, or :class:`biosae.Embeddings` (read in blocks).
        y
            Ignored.
        groups
            Label (patient) of each row or sample; whole groups are held out for validation. None: the ``patient``
            column of the embeddings if there is one.

        partner
            Second table with one row for each row of X, for the architectures that take one: gradients (``gsae``),
            targets (``transcoder``) or another modality (``vl_sae``, ``group_sparse``; rows of NaN are absent).

        Raises
        ------
        InputError
            For NaN, infinity, sparse or too little input, or an invalid setting.
        """
        return fit_many([self], X, groups=groups, partner=partner)[0]

    def partial_fit(self, X: Any, y: Any = None) -> SAE:
        """One pass over the rows of X in shuffled batches, at a constant learning rate, from where the model stands.

        The first call fixes scaling, start and all numbers that are chosen from the data (give ``n_latents``, ``k`` and
        ``learning_rate`` where that first part is small). Later calls go on with the same optimiser; after ``fit`` or
        ``load`` a new optimiser starts from the fitted weights. Nothing is held out, and ``metrics_`` are of the rows
        of the last call.

        Raises
        ------
        InputError, IdentityError
            As for :meth:`fit`; also for rows of another encoder or width than before.
        """
        return partial_fit(self, X)

    def codes(self, X: Any, *, partner: Any = None, table: int = 0) -> scipy.sparse.csr_matrix:
        """Codes as csr_matrix (n, m), whatever :meth:`set_output` says; otherwise as :meth:`transform`.

        Parameters
        ----------
        X
            Embeddings (n, d), or with ``table=1`` rows of the second modality (n, d2).
        partner
            Gradients (n, d) of the rows, where the architecture weighs latents by them (``gsae``).
        table
            1: X is of the second modality.

        Raises
        ------
        InputError
            If the architecture takes no such table.
        """
        self._check_fitted()
        kind = self._model.partner if isinstance(self._model, Method) else None
        if partner is None and table == 0:
            return super().codes(X)
        if partner is not None:
            if kind != "gradient" or table:
                raise InputError(f"codes of architecture={self.architecture!r} take no partner table")
            self._check_rows(Rows(X))
            return stacked(self._codes(x) for _, x in Rows(Joined(X, partner, kind)).blocks())
        return stacked(self._codes(x, table=1) for _, x in self._second(X, table).blocks())

    def inverse_transform(self, Z: Any, *, like: Any = None, table: int = 0) -> np.ndarray:
        """Reconstructions, float32 (n, d); with ``table=1`` in the space of the second modality.

        See :meth:`biosae.sae.coder.Coder.inverse_transform`. A ``transcoder`` gives its target, and ``like`` is the
        table of targets.
        """
        self._check_fitted()
        if table == 0 and not (self._out_table and self._needs_rows):
            return super().inverse_transform(Z, like=like)
        if table not in (0, 1) or (table and not self._two_modalities):
            raise InputError(f"table={table!r}: architecture={self.architecture!r} has no such table to reconstruct")
        Z = self._check_codes(Z)
        if not self.partner_normaliser_.rowwise:
            return self._decode(Z, None, 1)
        if like is None:
            raise InputError("with this scaling pass like=, the rows that are rebuilt: the codes lack their scales")
        rows = self._check_partner(Rows(like))
        if rows.n != Z.shape[0]:
            raise InputError(f"like has {rows.n} rows, the codes have {Z.shape[0]}")
        return np.concatenate([self._decode(Z[start : start + len(x)], x, 1) for start, x in rows.blocks()])

    def evaluate(self, X: Any, *, partner: Any = None, table: int = 0) -> dict[str, float]:
        """All quality numbers on X: see :meth:`biosae.sae.metrics.Quality.summary`.

        ``partner``: the targets, which a ``transcoder`` is measured on. ``table=1``: X are rows of the second modality.
        """
        self._check_fitted()
        if table:
            rows = self._second(X, table)
            quality = Quality(self._outside(1)[1] * (not self.partner_normaliser_.rowwise), self.n_latents_)
            for _, x in rows.blocks():
                z = self._codes(x, table=1)
                quality.update(x, self._decode(z, x, 1), z)
            return quality.summary()
        if self._out_table == 0:
            return super().evaluate(X)
        if partner is None:
            raise InputError("a transcoder is measured on its targets: evaluate(X, partner=Y)")
        self._check_rows(Rows(X))
        quality = self._quality()
        for _, row in Rows(Joined(X, partner, "target")).blocks():
            self._update(quality, row)
        return quality.summary()

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``log.csv`` (docs/file-formats.md), over an existing save.

        Of processes that trained together (``parallel``) the first one writes; in the others this does nothing.
        """
        self._check_fitted()
        if distributed.writes(self.parallel):
            super().save(folder)
            checkpoint.write_log(folder, self.history_)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_trainer"}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def _check_fitted(self) -> None:
        super()._check_fitted()
        self._check_made()

    def _check_made(self) -> None:
        """Refuse an architecture or options that the fitted model was not made with; its ``late`` ones may change."""
        architecture, options = self._made
        same = self.architecture == architecture and self.is_method == (options is not None)
        if same and options is not None:
            now = options_of(self.architecture, self.options)
            same = replace(now, **{name: getattr(options, name) for name in self._model.late}) == options
        if not same:
            given = "" if options is None else f", {options}"
            raise InputError(
                f"the fitted model has architecture={architecture!r}{given}; the settings now are "
                f"architecture={self.architecture!r}, options={self.options!r}: set them back, fit again without "
                "warm_start, or clone the SAE to start anew"
            )

    # ------------------------------------------------------------------------------------------------ internal

    @property
    def additive(self) -> bool:
        """Whether a latent adds its code times its atom to the reconstruction of the embedding itself."""
        return not isinstance(self._model, Method) or (self._model.affine and self._out_table == 0)

    @property
    def _out_table(self) -> int:
        return int(isinstance(self._model, Method) and self._model.partner == "target")

    @property
    def _needs_rows(self) -> bool:
        return bool(self._scaling(self._out_table).rowwise)

    def _second(self, X: Any, table: int) -> Rows:
        """Rows of the second modality."""
        if table != 1 or not self._two_modalities:
            raise InputError(f"table={table!r}: architecture={self.architecture!r} has no such table of rows to encode")
        return self._check_partner(Rows(X))

    def _check_partner(self, rows: Rows) -> Rows:
        """The rows, if they are of the kind that the second table was."""
        if rows.d != self.partner_features_:
            raise InputError(f"these rows have {rows.d} features, the second table had {self.partner_features_}")
        if self.partner_fingerprint_ and rows.fingerprint not in (None, self.partner_fingerprint_):
            raise IdentityError(
                f"these embeddings are not of the kind of the second table: trained on {self.partner_identity_}, given "
                f"{rows.identity}; without table=1 rows are taken for the first table"
            )
        return rows

    @property
    def _two_modalities(self) -> bool:
        return isinstance(self._model, Method) and self._model.partner == "modality"

    def _scaling(self, table: int) -> Normaliser:
        return self.partner_normaliser_ if table else self.normaliser_

    def _keep_plan(self, plan: Plan, seed: int, n_features: int) -> None:
        self.n_features_in_, self.n_latents_, self.k_ = n_features, plan.n_latents, plan.k
        self.batch_size_, self.n_steps_, self.learning_rate_ = plan.batch_size, plan.n_steps, plan.learning_rate
        self.aux_k_, self.dead_after_, self.random_state_ = plan.aux_k, plan.dead_after, seed

    def _keep_model(self, model: SparseAutoencoder | Method, scaling: Normaliser | Scalings) -> None:
        self._model = model.eval().requires_grad_(False)
        self._made = self.architecture, options_of(self.architecture, self.options) if self.is_method else None
        two = isinstance(scaling, Scalings)
        self.normaliser_, self.partner_normaliser_ = scaling.parts if two else (scaling, None)
        self.partner_features_ = scaling.widths[1] if two else 0
        self.offset_ = self.normaliser_.offset
        if isinstance(model, Method):
            self.decoder_, self.bias_ = self._outside(self._out_table)
        else:
            self.decoder_ = model.W_dec.detach().cpu().numpy().copy()
            self.bias_ = model.b_dec.detach().cpu().numpy().copy()

    def _keep_fit(
        self,
        model: SparseAutoencoder | Method,
        scaling: Normaliser | Scalings,
        rows: Rows,
        held: Held,
        history: list[dict[str, float]],
        *,
        went_on: bool,
    ) -> None:
        """Everything learnt but the metrics. ``went_on``: groups seen before stay seen."""
        self.history_ = history
        self._keep_model(model, scaling)
        self._keep_rows(rows, held, went_on=went_on)
        second = getattr(rows.source, "tables", (None, None))[1]
        self.partner_identity_ = getattr(second, "identity", None)
        self.partner_fingerprint_ = getattr(second, "fingerprint", None)
        device = next(model.parameters()).device.type
        self.provenance_ = provenance.record(seed=self.random_state_, threads=torch.get_num_threads(), device=device)

    def _measure(self, blocks: Iterable[tuple[int, np.ndarray]], held: Held) -> None:
        super()._measure(blocks, held)
        self.metrics_ |= {name: self.offset_[name] for name in OFFSET if name in self.offset_}

    def _update(self, quality: Quality, x: np.ndarray) -> None:
        """Add rows, or joined rows, to the sums; what a table lacks is left out."""
        target = x
        if x.shape[1] != self.n_features_in_:
            x, target, has = split(x, (self.n_features_in_, x.shape[1] - self.n_features_in_))
            if self._model.partner == "modality":
                x, _, has = split(np.hstack([x, target]), (self.n_features_in_, self.partner_features_))
                x = x[has[:, 0] > 0]
            if not self._out_table:
                target = x
        z = self._codes(x)
        quality.update(target, self._decode(z, target), z)

    @torch.no_grad()
    def _codes(self, x: np.ndarray, *, table: int = 0) -> scipy.sparse.csr_matrix:
        """Codes of float32 rows (n, d), or (n, 2 d) with their gradients."""
        if isinstance(self._model, Method):
            return self._method_codes(x, table)
        model, u = self._model, self.normaliser_.ready(x)
        device = model.b_dec.device
        ops = kernels("auto" if self.backend == "dense" else self.backend, device)
        counts, columns, values = [np.zeros(1, np.int64)], [], []
        for part, n in _padded(u):
            centred = part.to(device) - model.b_dec
            if self.architecture == "topk":
                codes = ops.select_topk(centred, model.W_enc, model.b_enc, model.k)
            else:
                codes = ops.select_above(centred, model.W_enc, model.b_enc, model.threshold)
            codes = codes.keep((codes.values > 0) & (codes.rows() < n))
            counts.append(codes.indptr.diff()[:n].cpu().numpy())
            columns.append(codes.indices.cpu().numpy())
            values.append(codes.values.cpu().numpy())
        data = (np.concatenate(values), np.concatenate(columns), np.cumsum(np.concatenate(counts)))
        return scipy.sparse.csr_matrix(data, shape=(len(u), self.n_latents_))

    def _method_codes(self, x: np.ndarray, table: int) -> scipy.sparse.csr_matrix:
        model, scaling = self._model, self._scaling(table)
        if model.late:
            given = options_of(self.architecture, self.options)
            model.options = replace(model.options, **{name: getattr(given, name) for name in model.late})
        device = next(model.parameters()).device
        d = self.partner_features_ if table else self.n_features_in_
        parts = [scipy.sparse.csr_matrix((0, self.n_latents_), dtype=np.float32)]
        for part, n in _padded(np.concatenate([scaling.ready(x[:, :d]), x[:, d:]], axis=1)):
            part = part.to(device)
            y = scaling.apply(part[:, :d])
            if x.shape[1] > d:
                y = torch.cat([y, gradients(scaling, part[:, d:])], dim=1)
            z = model.encode(y, table=table)[:n]
            parts.append(sparse_rows(z / scaling.scale if self._in_units else z))
        return stacked(parts)

    @property
    def _in_units(self) -> bool:
        """Whether codes are given in units of the embedding, not of the normalised rows."""
        return self._model.homogeneous and self._model.partner != "modality"

    def _decode(self, z: Any, x: np.ndarray | None, table: int | None = None) -> np.ndarray:
        """Reconstructions float32 (n, d); ``x``: the rows, whose row-wise scaling is undone."""
        table = self._out_table if table is None else table
        scaling = self._scaling(table)
        if isinstance(self._model, Method) and not self._model.affine:
            return scaling.restore(self._decode_through(z, table), x)
        decoder, bias = (self.decoder_, self.bias_) if table == self._out_table else self._outside(table)
        return scaling.restore(np.asarray(z @ decoder, np.float32) + bias, x)

    @torch.no_grad()
    def _decode_through(self, z: Any, table: int) -> np.ndarray:
        """Reconstructions by the model's own decoder, in the space of the rows."""
        device, parts = next(self._model.parameters()).device, []
        for start in range(0, max(z.shape[0], 1), CHUNK):
            part = z[start : start + CHUNK]
            part = torch.from_numpy(np.asarray(part.toarray() if scipy.sparse.issparse(part) else part, np.float32))
            part = part * self._scaling(0).scale if self._in_units else part
            parts.append(self._model.decode(part.to(device), table=table).cpu().numpy())
        return self._raw(np.concatenate(parts), table)

    def _raw(self, y: np.ndarray, table: int) -> np.ndarray:
        """Normalised points (n, d) in the space of the rows, float32."""
        scaling = self._scaling(table)
        y = y.astype(np.float64)
        if scaling.whiten is not None:
            y = y @ inverse(scaling.whiten)
        return (y / scaling.scale + scaling.mean).astype(np.float32)

    @torch.no_grad()
    def _outside(self, table: int) -> tuple[np.ndarray, np.ndarray]:
        """Atoms (m, d) per unit of the codes that ``codes`` gives, and the bias (d,), in the space of the rows."""
        model, scaling = self._model, self._scaling(table)
        atoms = model.atoms(table=table).detach().cpu().numpy().astype(np.float64)
        if scaling.whiten is not None:
            atoms = atoms @ inverse(scaling.whiten)
        unit = self.normaliser_.scale if self._in_units else 1.0
        empty = torch.zeros(1, self.n_latents_, device=next(model.parameters()).device)
        bias = self._raw(model.decode(empty, table=table).cpu().numpy(), table)[0]
        return (atoms * (unit / scaling.scale)).astype(np.float32), bias

    def _tensors(self) -> dict[str, np.ndarray]:
        return saved.tensors(self._model, (self.normaliser_, self.partner_normaliser_))

    def _facts(self) -> dict[str, Any]:
        partner = self.partner_normaliser_
        return {
            "rowwise": self.normaliser_.rowwise,
            "ends": getattr(self._model, "ends", None),
            "offset": self.offset_,
            "partner_features": self.partner_features_,
            "partner_rowwise": None if partner is None else partner.rowwise,
            "partner_identity": self.partner_identity_,
            "partner_fingerprint": self.partner_fingerprint_,
        }

    def _restore(self, tensors: dict[str, np.ndarray], config: dict[str, Any], device: torch.device) -> None:
        self.validate()
        self.partner_identity_ = config.get("partner_identity")
        self.partner_fingerprint_ = config.get("partner_fingerprint")
        shape = {"n_features": self.n_features_in_, "n_latents": self.n_latents_, "k": self.k_}
        model, scaling = saved.restored(self, tensors, config, **shape)
        self._keep_model(model.to(device), scaling)


def _padded(u: np.ndarray) -> Iterator[tuple[torch.Tensor, int]]:
    """Rows in chunks of :data:`biosae.sae.coder.CHUNK`, the last one filled with zeros, and how many are rows."""
    for start in range(0, len(u), CHUNK):
        part = u[start : start + CHUNK]
        padded = np.zeros((CHUNK, u.shape[1]), np.float32)
        padded[: len(part)] = part
        yield torch.from_numpy(padded), len(part)
