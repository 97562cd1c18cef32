"""The public estimator: fit on embeddings, sparse codes out, exact round trip through a folder."""

from __future__ import annotations

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
from biosae.sae import checkpoint, distributed, output
from biosae.sae.config import Plan, SAEConfig
from biosae.sae.fitting import fit_many, partial_fit
from biosae.sae.metrics import Quality
from biosae.sae.model import SparseAutoencoder
from biosae.sae.normalise import Normaliser
from biosae.sae.rows import Held, Rows
from biosae.sae.sparse_ops import kernels
from biosae.settings import resolve_device

CHUNK = 256
"""Rows of every encoder product; a short last chunk is padded, so that a row's code never depends on its company."""
STATE = (
    "k", "batch_size", "n_steps", "learning_rate", "aux_k", "dead_after", "random_state", "metrics", "history",
    "validation", "identity", "fingerprint", "training_groups", "groups_salt", "provenance",
)  # fmt: skip
"""Fitted attributes (without their ``_``) that ``config.json`` holds."""
OFFSET = ("offset_to_spread", "largest_mean_ratio", "largest_variance_share")
"""Numbers of :func:`biosae.sae.normalise.offset_report` that are told with the metrics."""
UNSAVED = ("callbacks", "checkpoint", "parallel")
"""Settings of one run on one machine."""


class SAE(SAEConfig):
    """Sparse autoencoder of embeddings.

    ``z = activation((x - b) W_enc^T + b_enc)`` and ``x_hat = z D + b`` with non-negative sparse codes z (n, m),
    unit-norm atoms D (m, d) and bias b (d,). A code is in the units of the embedding: latent j with value z moves the
    reconstruction by z along its atom. Parameters are those of :class:`biosae.sae.config.SAEConfig`.

    Attributes
    ----------
    decoder_ : ndarray (m, d), float32
        Atoms, in the encoder's own space (for ``layernorm``: the space of layer-normalised rows).
    bias_ : ndarray (d,)
        Reconstruction of an empty code.
    n_features_in_, n_latents_, k_, batch_size_, n_steps_, learning_rate_, aux_k_, dead_after_, random_state_
        Numbers used, given or chosen.
    metrics_ : dict
        Quality on the training rows (see :meth:`biosae.sae.metrics.Quality.summary`), and ``fvu_val``, ``l0_val``,
        ``n_rows_val`` on the held-out rows (NaN and 0 where none could be held out).
    density_ : ndarray (m,)
        Share of training rows in which each latent is active.
    history_ : list of dict
        ``step, loss, fvu, l0, dead, lr`` of about 50 batches.
    validation_ : dict
        How rows were held out: ``by`` (``row``, ``sample``, ``patient``, ``groups``), ``n_groups``, ``n_rows``.
    identity_, fingerprint_ : dict or None, str or None
        Encoder, layer and preprocessing of the embeddings, where they are known.
    training_groups_ : tuple of str
        Salted SHA-256 of the groups (patients) trained on; ask with :meth:`trained_on`.

    References
    ----------
    ReLU + L1: Bricken et al. 2023. TopK and AuxK: Gao et al. 2024, arXiv 2406.04093. BatchTopK: Bussmann et al. 2024,
    arXiv 2412.06410.
    """

    _trainer = None  # goes on in partial_fit; not part of the estimator's state

    def fit(self, X: Any, y: Any = None, *, groups: Any = None) -> SAE:
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

        Raises
        ------
        InputError
            For NaN, infinity, sparse or too little input, or an invalid setting.
        """
        return fit_many([self], X, groups=groups)[0]

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
        return scipy.sparse.vstack([self._codes(x) for _, x in rows.blocks()], format="csr", dtype=np.float32)

    def set_output(self, *, transform: str | None = None) -> SAE:
        """Choose what ``transform`` returns: ``default`` (csr_matrix), ``pandas`` (sparse columns) or ``polars``.

        Columns are the latents' names; pandas keeps the index of a data frame that was passed in. polars has no sparse
        columns: a table of more than 2 GiB is refused. None changes nothing.
        """
        if transform is not None:
            self._sklearn_output_config = {"transform": output.check(transform)}
        return self

    def inverse_transform(self, Z: Any, *, like: Any = None) -> np.ndarray:
        """Reconstructions z D + b, float32 (n, d), without making sparse codes dense.

        Parameters
        ----------
        Z
            Codes, (n, m), sparse or dense.
        like
            The embeddings that the codes came from; needed by ``normalise="layernorm"`` only, whose row means and
            deviations are not in the codes.

        Raises
        ------
        InputError
            If Z does not have m columns, or ``like`` is needed and absent.
        """
        self._check_fitted()
        Z = Z.tocsr() if scipy.sparse.issparse(Z) else np.asarray(Z, np.float32)
        if Z.ndim != 2 or Z.shape[1] != self.n_latents_:
            raise InputError(f"codes have shape {Z.shape}; this SAE has {self.n_latents_} latents (columns)")
        if not self.normaliser_.rowwise:
            return self._decode(Z, None)
        if like is None:
            raise InputError("with normalise='layernorm' pass like=X: row means and deviations are not in the codes")
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
            z = self._codes(x)
            quality.update(x, self._decode(z, x), z)
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
            If the SAE was fitted without groups, so that nobody can know.
        """
        self._check_fitted()
        if not self.training_groups_:
            raise InputError("this SAE was fitted without patients or groups; which ones it has seen is not recorded")
        known = set(self.training_groups_)
        return np.asarray([self._hash_group(str(name)) in known for name in names], dtype=bool)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``log.csv`` (docs/file-formats.md), over an existing save.

        Of processes that trained together (``parallel``) the first one writes; in the others this does nothing.
        """
        self._check_fitted()
        if not distributed.writes(self.parallel):
            return
        m, identity = self._model, self.identity_ or {}
        tensors = {name: value.detach().cpu().numpy() for name, value in m.state_dict().items()}
        tensors |= {
            "mean": self.normaliser_.mean.astype(np.float64),
            "scale": np.float64(self.normaliser_.scale),
            "density": self.density_,
        }
        if self.normaliser_.whiten is not None:
            tensors["whiten"] = self.normaliser_.whiten
        config = {
            "params": {n: v for n, v in self.get_params().items() if n not in UNSAVED},
            "n_latents": self.n_latents_,
            "n_features": self.n_features_in_,
            "rowwise": self.normaliser_.rowwise,
            "ends": m.ends,
            "licence": identity.get("licence"),
            "derivatives_restricted": identity.get("derivatives_restricted"),
            "offset": self.offset_,
            **{name: getattr(self, f"{name}_") for name in STATE},
        }
        checkpoint.write(folder, tensors, config)
        checkpoint.write_log(folder, self.history_)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, device: str = "auto") -> SAE:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FormatError
            If the folder is incomplete, corrupt, foreign or of a newer version.
        """
        tensors, config = checkpoint.read(folder)
        try:
            sae = cls().set_params(**config["params"])
            sae.validate()
            for name in STATE:
                setattr(sae, f"{name}_", config[name])
            sae.training_groups_ = tuple(sae.training_groups_)
            sae.n_features_in_, sae.n_latents_ = config["n_features"], config["n_latents"]
            sae.normaliser_ = Normaliser(
                tensors["mean"],
                float(tensors["scale"]),
                config["rowwise"],
                tensors.get("whiten"),
                config.get("offset", {}),
            )
            sae.offset_ = sae.normaliser_.offset
        except (KeyError, TypeError, InputError) as error:
            raise FormatError(f"{os.fspath(folder)}/config.json is incomplete or inconsistent ({error})") from None
        sae.density_ = tensors["density"]
        model = SparseAutoencoder(
            sae.n_features_in_, sae.n_latents_, architecture=sae.architecture, k=sae.k_, ends=config.get("ends"),
            bandwidth=sae.bandwidth,
        )  # fmt: skip
        model.load_state_dict({k: torch.from_numpy(tensors[k].copy()) for k in model.state_dict()})
        sae._keep_model(model.to(_device(device)))
        return sae

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_trainer"}

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model")

    def __sklearn_tags__(self) -> Any:
        utils = importlib.import_module("sklearn.utils")  # asked for by scikit-learn alone, which is then loaded
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(preserves_dtype=[]),
        )

    # ------------------------------------------------------------------------------------------------ internal

    def _keep_plan(self, plan: Plan, seed: int, n_features: int) -> None:
        self.n_features_in_, self.n_latents_, self.k_ = n_features, plan.n_latents, plan.k
        self.batch_size_, self.n_steps_, self.learning_rate_ = plan.batch_size, plan.n_steps, plan.learning_rate
        self.aux_k_, self.dead_after_, self.random_state_ = plan.aux_k, plan.dead_after, seed

    def _keep_model(self, model: SparseAutoencoder) -> None:
        self._model = model.eval().requires_grad_(False)
        self.decoder_ = model.W_dec.detach().cpu().numpy().copy()
        self.bias_ = model.b_dec.detach().cpu().numpy().copy()

    def _quality(self) -> Quality:
        """Empty sums; the bias of a layer-normalised model is not in the space of the rows, 0 stands for it."""
        return Quality(self.bias_ * (not self.normaliser_.rowwise), self.n_latents_)

    def _keep_fit(
        self,
        model: SparseAutoencoder,
        normaliser: Normaliser,
        rows: Rows,
        held: Held,
        history: list[dict[str, float]],
        *,
        went_on: bool,
    ) -> None:
        """Everything learnt but the metrics; ``model`` is folded. ``went_on``: groups seen before stay seen."""
        self.normaliser_, self.identity_, self.fingerprint_ = normaliser, rows.identity, rows.fingerprint
        self.history_, self.offset_ = history, normaliser.offset
        self._keep_model(model)
        self.validation_ = {"by": held.by, "n_groups": held.n_groups, "n_rows": len(held)}
        if not went_on:
            self.groups_salt_ = hashlib.sha256(self.decoder_.tobytes()).hexdigest()[:32]
        groups = {self._hash_group(g) for g in held.training_groups}
        if went_on:  # if the groups of any part are unknown, nobody can say which were never seen
            groups = groups | set(self.training_groups_) if groups and self.training_groups_ else set()
        self.training_groups_ = tuple(sorted(groups))
        device = next(model.parameters()).device.type
        self.provenance_ = provenance.record(seed=self.random_state_, threads=torch.get_num_threads(), device=device)

    def _measure(self, blocks: Iterable[tuple[int, np.ndarray]], held: Held) -> None:
        seen, unseen = self._quality(), self._quality()
        for start, x in blocks:
            z = self._codes(x)
            x_hat, out = self._decode(z, x), held.mask(start, start + len(x))
            for quality, part in ((seen, ~out), (unseen, out)):
                if part.any():
                    quality.update(x[part], x_hat[part], z[part])
        offset = {name: self.offset_[name] for name in OFFSET if name in self.offset_}
        self.metrics_, self.density_ = seen.summary() | offset, seen.density
        val = unseen.summary() if unseen.n else {"fvu": float("nan"), "l0": float("nan"), "n_rows": 0}
        self.metrics_ |= {f"{name}_val": val[name] for name in ("fvu", "l0", "n_rows")}

    @torch.no_grad()
    def _codes(self, x: np.ndarray) -> scipy.sparse.csr_matrix:
        """Codes of float32 rows (n, d)."""
        model, u = self._model, self.normaliser_.ready(x)
        device = model.b_dec.device
        ops = kernels("auto" if self.backend == "dense" else self.backend, device)
        counts, columns, values = [np.zeros(1, np.int64)], [], []
        for start in range(0, len(u), CHUNK):
            part = u[start : start + CHUNK]
            padded = np.zeros((CHUNK, u.shape[1]), np.float32)
            padded[: len(part)] = part
            centred = torch.from_numpy(padded).to(device) - model.b_dec
            if self.architecture == "topk":
                codes = ops.select_topk(centred, model.W_enc, model.b_enc, model.k)
            else:
                codes = ops.select_above(centred, model.W_enc, model.b_enc, model.threshold)
            codes = codes.keep((codes.values > 0) & (codes.rows() < len(part)))
            counts.append(codes.indptr.diff()[: len(part)].cpu().numpy())
            columns.append(codes.indices.cpu().numpy())
            values.append(codes.values.cpu().numpy())
        data = (np.concatenate(values), np.concatenate(columns), np.cumsum(np.concatenate(counts)))
        return scipy.sparse.csr_matrix(data, shape=(len(u), self.n_latents_))

    def _decode(self, z: Any, x: np.ndarray | None) -> np.ndarray:
        """Reconstructions float32 (n, d); ``x``: the rows, whose row-wise scaling is undone."""
        return self.normaliser_.restore(np.asarray(z @ self.decoder_, np.float32) + self.bias_, x)

    def _rows(self, X: Any) -> Rows:
        self._check_fitted()
        return self._check_rows(Rows(X))

    def _check_rows(self, rows: Rows) -> Rows:
        """The rows, if they are of the kind that this SAE was fitted to."""
        if self.fingerprint_ and rows.fingerprint and rows.fingerprint != self.fingerprint_:
            ours, theirs = self.identity_ or {}, rows.identity or {}
            keys = [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
            if "encoder" in keys:  # then everything else follows from it
                keys = ["encoder"]
            differ = "; ".join(f"{k}: trained on {ours.get(k)!r}, given {theirs.get(k)!r}" for k in keys)
            raise IdentityError(
                f"these embeddings are not of the kind this SAE was fitted to ({differ}); embed the samples with the "
                "same encoder, layer, pooling and preprocessing, or fit a new SAE"
            )
        if rows.d != self.n_features_in_:
            raise InputError(
                f"X has {rows.d} features, but {type(self).__name__} is expecting {self.n_features_in_} features as "
                "input: these rows come from another encoder or layer than the training rows; embed with that one, or "
                "fit a new SAE"
            )
        return rows

    def _check_fitted(self) -> None:
        if not hasattr(self, "_model"):
            raise NotFittedError("this SAE is not fitted yet: call fit(X) first, or SAE.load(folder)")

    def _hash_group(self, name: str) -> str:
        return hashlib.sha256(f"{self.groups_salt_}:{name}".encode()).hexdigest()


def _device(name: str) -> torch.device:
    return torch.device(resolve_device(name))
