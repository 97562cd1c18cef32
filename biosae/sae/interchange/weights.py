"""What checkpoints of all libraries are brought to and written from: one encoder, one rule, one decoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from biosae import provenance
from biosae.errors import FormatError, InputError
from biosae.sae.config import resolve
from biosae.sae.estimator import SAE
from biosae.sae.methods.base import Method
from biosae.sae.methods.plain import Plain
from biosae.sae.normalise import inverse
from biosae.settings import resolve_device

MODES = {None: "none", "layernorm": "layernorm", "layernorm_std": "layernorm", "l2": "l2"}
"""Row-wise scaling of a file to the setting ``normalise``."""
SOME_ROWS = 65_536
"""Rows for which the numbers of a later training are chosen; those of the first one are unknown."""
ONE_THRESHOLD = ("batchtopk", "matryoshka")
WRITABLE = (
    "relu", "topk", "topk_signed", "abstopk", "batchtopk", "matryoshka", "jumprelu", "threshold", "gated", "mp",
)  # fmt: skip
"""Architectures that have a form in other libraries."""


@dataclass
class Weights:
    """a = (u - subtract) encoder^T + encoder_bias, z = rule(a), u_hat = z decoder + bias; u is the row as scaled.

    Codes are those of the library, atoms have any length.
    """

    rule: str
    """Architecture of :class:`biosae.sae.SAE`."""
    encoder: np.ndarray
    """(m, d), float32; for ``mp`` the atoms again."""
    decoder: np.ndarray
    """(m, d), float32."""
    encoder_bias: np.ndarray
    """(m,), float64; of ``gated`` the bias of the gates."""
    bias: np.ndarray
    """(d,), float64."""
    subtract: np.ndarray | None = None
    """(d,), float64; None: the same as ``bias``."""
    k: int | None = None
    threshold: np.ndarray | None = None
    """(m,) or (): codes are open above it."""
    ends: tuple[int, ...] | None = None
    """Of ``matryoshka``."""
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """``r_mag`` and ``b_mag`` of ``gated``."""
    rowwise: str | None = None
    """Key of :data:`biosae.sae.normalise.ROWWISE`; None: u is the row itself."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where it comes from, for the record: ``format``, ``library_version``, ``licence``, ``notes``."""

    @property
    def shape(self) -> tuple[int, int]:
        """m and d."""
        return self.encoder.shape

    def subtracting(self, point: np.ndarray) -> Weights:
        """Change, in place, to the encoder biases with which ``point`` (d,) may be subtracted from u; same codes."""
        now = self.bias if self.subtract is None else self.subtract
        shift = self.encoder @ (np.asarray(point, np.float64) - now)
        self.encoder_bias = self.encoder_bias + shift
        if self.rule == "gated":
            self.extra["b_mag"] = self.extra["b_mag"] + np.exp(self.extra["r_mag"]) * shift
        self.subtract = np.asarray(point, np.float64)
        return self

    def rescaled(self, factor: float) -> Weights:
        """Change, in place, to weights that read v = u / factor: rows of a library that scales u by ``factor``."""
        self.encoder = (self.encoder * factor).astype(np.float32)
        self.decoder = (self.decoder / factor).astype(np.float32)
        self.bias = self.bias / factor
        if self.subtract is not None:
            self.subtract = self.subtract / factor
        return self

    def lengths_to_codes(self, lengths: np.ndarray) -> Weights:
        """Change, in place, to codes that are ``lengths`` (m,) times as large, and atoms that much shorter."""
        self.encoder = (self.encoder * lengths[:, None]).astype(np.float32)
        self.decoder = (self.decoder / lengths[:, None]).astype(np.float32)
        self.encoder_bias = self.encoder_bias * lengths
        return self


def build(weights: Weights, *, device: str = "auto") -> SAE:
    """The SAE that gives these codes and reconstructions.

    Its ``identity_`` is None, ``metrics_`` are empty and ``density_`` is NaN: the rows that it was trained on are not
    in a checkpoint. ``n_steps_`` is 0.

    Raises
    ------
    FormatError
        If k or a threshold makes no sense for these weights.
    """
    m, d = weights.shape
    if weights.k is not None and not 1 <= weights.k <= m:
        raise FormatError(f"k = {weights.k} of the checkpoint must lie between 1 and the {m} latents; it is damaged")
    if weights.rule != "mp":
        weights.subtracting(weights.bias)
    sae = SAE(
        weights.rule, m, weights.k, normalise=MODES[weights.rowwise], options=weights.options or None,
        prefixes=tuple(end / m for end in weights.ends) if weights.ends and not weights.options else None,
    )  # fmt: skip
    sae._keep_plan(resolve(sae, max(SOME_ROWS, m), d), 0, d)
    sae.n_steps_ = 0
    tensors = {
        "W_enc": weights.encoder, "b_enc": weights.encoder_bias, "W_dec": weights.decoder, "b_dec": weights.bias,
        **weights.extra,
    }  # fmt: skip
    if weights.rule in ("jumprelu", *ONE_THRESHOLD):
        shape = (m,) if weights.rule == "jumprelu" else ()
        tensors["threshold"] = np.broadcast_to(np.maximum(weights.threshold, 0), shape)
    if weights.options.get("tied") or weights.rule == "mp":
        del tensors["W_enc"]
    if weights.rule == "mp":
        del tensors["b_enc"]
    if not sae.is_method and weights.rule not in ("jumprelu", *ONE_THRESHOLD):
        tensors["threshold"] = np.zeros(())
    prefix = "model." if sae.is_method else ""
    tensors = {prefix + name: np.array(value, np.float32, order="C") for name, value in tensors.items()}
    tensors |= {"mean": np.zeros(d), "scale": np.float64(1)}
    facts = {"rowwise": weights.rowwise, "ends": weights.ends, "offset": {}, "partner_rowwise": None}
    sae._restore(tensors, facts, torch.device(resolve_device(device)))
    sae.identity_ = sae.fingerprint_ = None
    sae.validation_ = {"by": None, "n_groups": 0, "n_rows": 0}
    sae.training_groups_, sae.groups_salt_ = (), hashlib.sha256(sae.decoder_.tobytes()).hexdigest()[:32]
    sae.metrics_, sae.history_, sae.density_ = {}, [], np.full(m, np.nan)
    sae.provenance_ = provenance.record(read_from=weights.origin)
    return sae


def of(sae: SAE) -> Weights:
    """The weights of a fitted SAE, in the space of its rows (as scaled row by row).

    Raises
    ------
    InputError
        If it has no form as one linear encoder, one rule and one linear decoder.
    NotFittedError
        Before ``fit``, ``load`` or ``read``.
    """
    if not isinstance(sae, SAE):
        raise InputError(
            f"only an SAE can be written for other libraries, not a {type(sae).__name__}; use save(folder)"
        )
    sae._check_fitted()
    model, scaling = sae._model, sae.normaliser_
    if sae.architecture not in WRITABLE or sae.partner_features_:
        raise InputError(
            f"architecture={sae.architecture!r} has no counterpart in other libraries (those that have one: "
            f"{', '.join(WRITABLE)}); keep it with save(folder)"
        )
    folded = not isinstance(model, Method)
    scale, mean = (1.0, np.zeros(sae.n_features_in_)) if folded else (scaling.scale, scaling.mean)
    whiten = None if folded else scaling.whiten
    options = {} if folded else vars(model.options)
    if sae.architecture == "mp" and (whiten is not None or options["solver"] != "mp"):
        raise InputError("matching pursuit of whitened rows or with solver='omp' has no counterpart; use save(folder)")
    unit = 1.0 if folded or not sae._in_units else scale
    state = {name: value.detach().cpu().double().numpy() for name, value in model.state_dict().items()}
    encoder = state.get("W_enc", state["W_dec"])
    point = state["b_dec"] if not isinstance(model, Plain) or model.options.pre_bias else np.zeros_like(state["b_dec"])
    if whiten is not None:
        encoder, point = encoder @ whiten.T, point @ inverse(whiten)
    weights = Weights(
        rule=sae.architecture,
        encoder=(encoder * (scale / unit)).astype(np.float32),
        decoder=sae.decoder_,
        encoder_bias=state.get("b_enc", np.zeros(len(encoder))) / unit,
        bias=sae.bias_.astype(np.float64),
        subtract=mean + point / scale,
        k=sae.k_,
        ends=getattr(model, "ends", None),
        options=dict(options),
        rowwise=scaling.rowwise,
        origin={"format": "biosae"},
    )
    if weights.rule in ("jumprelu", "threshold", *ONE_THRESHOLD):
        weights.threshold = state["threshold"] / unit
    if weights.rule == "threshold":  # open at the threshold: the number below it is what must be exceeded
        weights.rule = "jumprelu"
        weights.threshold = below(weights.threshold)
    if weights.rule == "gated":
        weights.extra = {"r_mag": state["r_mag"], "b_mag": state["b_mag"] / unit}
    if weights.rule in ONE_THRESHOLD and options.get("shrink"):
        weights.rule, weights.encoder_bias = "relu", weights.encoder_bias - weights.threshold
    if weights.rule == "mp":
        weights.options["tolerance"] = options["tolerance"] / scale
        weights.options["steps"] = options["steps"] or sae.k_
    return weights


def below(threshold: np.ndarray) -> np.ndarray:
    """The float32 below each threshold t: a >= t is a > below(t) for float32 numbers a."""
    return np.nextafter(np.asarray(threshold, np.float32), np.float32(-np.inf)).astype(np.float64)
