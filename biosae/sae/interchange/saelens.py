"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``. Releases 3 to 6."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from biosae.errors import FormatError, InputError
from biosae.files import write_json
from biosae.sae.checkpoint import write_tensors
from biosae.sae.interchange.files import Tensors, config_of, licence_of, safetensors_of, torched, whole
from biosae.sae.interchange.weights import ONE_THRESHOLD, Weights

WRITTEN = "6.54.12"
"""Release whose layout is written; older ones of 6 read all but ``abstopk`` and ``matching_pursuit``."""
OLD = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
ROWWISE = {"none": None, "layer_norm": "layernorm_std", "constant_norm_rescale": "l2"}
FACTORS = {"expected_average_only_in": "a factor", "covariance_whitening": "a whitening matrix"}
TRAINED = ("batchtopk", "matryoshka_batchtopk")
REFUSED = {
    "transcoder": "predicts another layer", "skip_transcoder": "predicts another layer",
    "jumprelu_transcoder": "predicts another layer", "jumprelu_skip_transcoder": "predicts another layer",
    "temporal": "codes a row from the rows before it",
}  # fmt: skip


def read(path: Path, *, scale: float | None = None) -> Weights:
    """Weights of a folder that SAELens wrote.

    ``scale``: the factor that rows were multiplied by in training, for ``normalize_activations``
    ``expected_average_only_in`` where no ``activation_scaler.json`` lies beside the weights.
    """
    folder = path if path.is_dir() else path.parent
    cfg = {OLD.get(key, key): value for key, value in config_of(folder / "cfg.json").items()}
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    architecture = cfg.get("architecture", "standard")
    activation = cfg.get("activation_fn", "relu")
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    if architecture in REFUSED:
        raise FormatError(f"{folder}: an SAELens {architecture!r} {REFUSED[architecture]}; it is no SAE of one table")
    if architecture not in READERS:
        raise FormatError(f"{folder}: SAELens architecture {architecture!r} is not known; known: {', '.join(READERS)}")
    if activation not in ("relu", "topk"):
        raise FormatError(f"{folder}: activation {activation!r} of SAELens has no counterpart here")
    d, m = whole(cfg, "d_in", folder), whole(cfg, "d_sae", folder)
    file = folder / "sae_weights.safetensors"
    tensors = Tensors(safetensors_of(file), file)
    weights = READERS[architecture](tensors, cfg, metadata, d, m)
    _finetuned(tensors, weights, m)
    tensors.finish()
    if not cfg.get("apply_b_dec_to_input", True):
        weights.subtract = np.zeros(d)
        if weights.rule == "mp":
            weights.bias = np.zeros(d)
    notes = _scaling(folder, cfg, weights, scale)
    version = metadata.get("sae_lens_version") or cfg.get("sae_lens_version") or cfg.get("sae_lens_training_version")
    weights.origin = {
        "format": "saelens",
        "library_version": version,
        "licence": licence_of(folder, cfg, metadata),
        "notes": notes,
        "config": {key: value for key, value in cfg.items() if key not in ("device", "dtype")},
    }
    return weights


def _linear(tensors: Tensors, rule: str, d: int, m: int, **more: Any) -> Weights:
    bias = tensors.take("b_gate" if rule == "gated" else "b_enc", (m,))
    encoder, decoder = tensors.take("W_enc", (d, m)).T, tensors.take("W_dec", (m, d))
    return Weights(rule, np.ascontiguousarray(encoder), decoder, bias, tensors.take("b_dec", (d,)), **more)


def _standard(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    return _linear(tensors, "relu", d, m)


def _k(cfg: dict[str, Any], tensors: Tensors) -> int:
    given = cfg.get("activation_fn_kwargs")
    return whole(given if isinstance(given, dict) and "k" in given else cfg, "k", tensors.name)


def _topk(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    rule = "abstopk" if cfg.get("architecture") == "abstopk" else "topk"
    weights = _linear(tensors, rule, d, m, k=_k(cfg, tensors))
    return _by_length(weights) if cfg.get("rescale_acts_by_decoder_norm") else weights


def _by_length(weights: Weights) -> Weights:
    """Codes are taken times the length of their atom, and atoms at unit length."""
    return weights.lengths_to_codes(np.maximum(np.linalg.norm(weights.decoder.astype(np.float64), axis=1), 1e-8))


def _jumprelu(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    weights = _linear(tensors, "jumprelu", d, m)
    if "log_threshold" in tensors:
        weights.threshold = np.exp(tensors.take("log_threshold", (m,)))
    else:
        weights.threshold = tensors.take("threshold", (m,))
    details = metadata.get("training_architecture_details")
    one = metadata.get("training_architecture") in TRAINED and np.ptp(weights.threshold) == 0
    if one and isinstance(details, dict):
        _trained(weights, details)
    return weights


def _trained(weights: Weights, details: dict[str, Any]) -> None:
    """One threshold for all latents: what was trained as BatchTopK, with its k and its prefixes."""
    weights.rule, weights.threshold = "batchtopk", np.asarray(weights.threshold).flat[0]
    k, widths, m = details.get("k"), details.get("matryoshka_widths"), len(weights.encoder)
    if isinstance(k, (int, float)) and 1 <= k <= m:
        weights.k = round(k)
    if isinstance(widths, list) and widths and all(isinstance(w, int) and 1 <= w <= m for w in widths):
        weights.rule, weights.ends = "matryoshka", tuple(sorted({*widths, m}))


def _batchtopk(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    """A checkpoint of training; SAELens makes a JumpReLU SAE of it in the end."""
    weights = _linear(tensors, "batchtopk", d, m)
    weights.threshold = np.asarray(tensors.number("topk_threshold"))
    _trained(weights, cfg)
    return _by_length(weights) if cfg.get("rescale_acts_by_decoder_norm", True) else weights


def _gated(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    weights = _linear(tensors, "gated", d, m)
    weights.extra = {"r_mag": tensors.take("r_mag", (m,)), "b_mag": tensors.take("b_mag", (m,))}
    return weights


def _pursuit(tensors: Tensors, cfg: dict, metadata: dict, d: int, m: int) -> Weights:
    atoms = tensors.take("W_dec", (m, d))
    steps = d if cfg.get("max_iterations") is None else whole(cfg, "max_iterations", tensors.name)
    tolerance = cfg.get("residual_threshold", 0.01)
    if not isinstance(tolerance, (int, float)):
        raise FormatError(f"{tensors.name}: residual_threshold should be a number, found {tolerance!r}")
    options = {
        "rule": "positive", "steps": steps, "tolerance": max(0.0, float(tolerance)),
        "stop_at_repeat": bool(cfg.get("stop_on_duplicate_support", True)),
    }  # fmt: skip
    return Weights("mp", atoms, atoms, np.zeros(m), tensors.take("b_dec", (d,)), k=min(steps, m), options=options)


READERS = {
    "standard": _standard, "topk": _topk, "abstopk": _topk, "jumprelu": _jumprelu, "gated": _gated,
    "batchtopk": _batchtopk, "matryoshka_batchtopk": _batchtopk, "matching_pursuit": _pursuit,
}  # fmt: skip


def _finetuned(tensors: Tensors, weights: Weights, m: int) -> None:
    """Factor of each code in the decoder, of releases before 6."""
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        if key in tensors:
            weights.decoder = (weights.decoder * tensors.take(key, (m,))[:, None]).astype(np.float32)


def _scaling(folder: Path, cfg: dict[str, Any], weights: Weights, scale: float | None) -> list[str]:
    """Fold the scaling of rows, or keep its name; what must be told of it."""
    mode, notes = cfg.get("normalize_activations") or "none", []
    if mode is True:
        mode = "expected_average_only_in"
    if mode not in (*ROWWISE, *FACTORS):
        raise FormatError(f"{folder}: normalize_activations={mode!r} is not known")
    if scale is not None and mode != "expected_average_only_in":
        raise InputError(f"scale={scale!r} is for normalize_activations='expected_average_only_in', not {mode!r}")
    if mode in ROWWISE:
        weights.rowwise = ROWWISE[mode]
        if weights.rowwise == "l2":  # rows of length sqrt(d)
            _rescale(weights, weights.shape[1] ** 0.5)
    elif (folder / "activation_scaler.json").is_file():
        _fold(folder, config_of(folder / "activation_scaler.json"), weights)
        notes.append(f"{mode}: folded into the weights from activation_scaler.json; it reads rows as they are")
    elif scale is not None:
        if not scale > 0:
            raise InputError(f"scale={scale!r} must be positive")
        _rescale(weights, scale)
        notes.append(f"{mode}: folded into the weights with scale={scale!r}; it reads rows as they are")
    else:
        notes.append(f"{mode}: trained on rows scaled by {FACTORS[mode]} that is not in the checkpoint; as in SAELens, "
                     "rows are taken as they are given")  # fmt: skip
        warnings.warn(
            f"{folder} was trained on rows that were scaled by {FACTORS[mode]}, which the checkpoint does not hold. "
            "Codes are right where that was folded into the weights before they were published; otherwise scale rows "
            "the same way, or pass scale=",
            stacklevel=5,
        )
    if cfg.get("reshape_activations", "none") != "none":
        notes.append(f"reshape_activations={cfg['reshape_activations']!r}: give rows with their heads in one axis")
    return notes


def _rescale(weights: Weights, factor: float) -> None:
    weights.rescaled(factor)
    if weights.rule == "mp":  # the pursuit is in the space of its atoms: coefficients and tolerance change instead
        raise FormatError("matching pursuit on rows that SAELens scales is not supported: its atoms need unit length")


def _fold(folder: Path, scaler: dict[str, Any], weights: Weights) -> None:
    """Rows were y = (s x - mean) M."""
    factor = scaler.get("scaling_factor")
    if scaler.get("has_whitening"):
        file = folder / "activation_whitening.safetensors"
        tensors, d = Tensors(safetensors_of(file), file), weights.shape[1]
        matrix, back = tensors.take("matrix", (d, d)), tensors.take("inverse_matrix", (d, d))
        mean = tensors.take("mean", (d,))
        matrix, back = matrix.astype(np.float64), back.astype(np.float64)
        subtract = weights.bias if weights.subtract is None else weights.subtract
        weights.encoder = (weights.encoder @ matrix.T).astype(np.float32)
        weights.decoder = (weights.decoder @ back).astype(np.float32)
        weights.subtract, weights.bias = subtract @ back + mean, weights.bias @ back + mean
    if factor is not None:
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise FormatError(f"{folder}/activation_scaler.json: scaling_factor={factor!r} must be positive")
        _rescale(weights, float(factor))


# --------------------------------------------------------------------------------------------------------------- write


def write(weights: Weights, folder: Path) -> None:
    """Write ``cfg.json`` and ``sae_weights.safetensors`` as SAELens 6 reads them.

    Raises
    ------
    InputError
        If SAELens has nothing that gives the same codes and reconstructions.
    """
    m, d = weights.shape
    if weights.rule == "topk_signed":
        raise InputError("SAELens sets negative codes of a top-k to 0; codes of 'topk_signed' would change")
    if weights.rule == "mp" and (weights.options["rule"] != "positive" or weights.rowwise):
        raise InputError("SAELens knows matching pursuit with rule='positive' on rows without scaling only")
    rowwise = weights.rowwise
    if rowwise == "layernorm":
        warnings.warn(
            "SAELens undoes layer normalisation with the row's deviation, not with deviation + 1e-5: codes are equal, "
            "reconstructions differ by 1e-5 of the layer-normalised ones",
            stacklevel=3,
        )
    if rowwise == "l2":
        weights.rescaled(d**-0.5)
    name = {mode: key for key, mode in ROWWISE.items()} | {"layernorm": "layer_norm"}
    trained = {"sae_lens_version": WRITTEN, "sae_lens_training_version": None, "written_by": "biosae"}
    cfg: dict[str, Any] = {
        "d_in": d, "d_sae": m, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": name[rowwise], "reshape_activations": "none", "metadata": trained,
    }  # fmt: skip
    tensors = {"W_dec": weights.decoder, "b_dec": weights.bias}
    if weights.rule == "mp":
        options = weights.options
        cfg |= {
            "architecture": "matching_pursuit", "residual_threshold": options["tolerance"],
            "max_iterations": options["steps"], "stop_on_duplicate_support": options["stop_at_repeat"],
        }  # fmt: skip
    else:
        weights.subtracting(weights.bias)
        tensors |= {"W_enc": weights.encoder.T, "b_enc": weights.encoder_bias}
    if weights.rule in ("topk", "abstopk"):
        cfg |= {"architecture": weights.rule, "k": weights.k, "rescale_acts_by_decoder_norm": False}
    elif weights.rule == "gated":
        cfg["architecture"] = "gated"
        tensors |= {"b_gate": tensors.pop("b_enc"), **weights.extra}
    elif weights.rule == "relu":
        cfg["architecture"] = "standard"
    elif weights.rule != "mp":
        cfg["architecture"] = "jumprelu"
        tensors["threshold"] = np.broadcast_to(weights.threshold, (m,))
        if weights.rule in ONE_THRESHOLD:
            details: dict[str, Any] = {"k": weights.k}
            if weights.rule == "matryoshka" and weights.ends:
                details["matryoshka_widths"] = list(weights.ends)
            trained |= {
                "training_architecture": TRAINED["matryoshka_widths" in details],
                "training_architecture_details": details,
            }
    write_tensors(folder / "sae_weights.safetensors", torched(tensors))
    write_json(folder / "cfg.json", cfg)
