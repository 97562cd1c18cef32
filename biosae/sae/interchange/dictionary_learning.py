"""dictionary_learning: a folder with ``ae.pt`` (state_dict) and ``config.json``, or ``ae.pt`` alone. Release 0.1.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from biosae.errors import FormatError, InputError
from biosae.files import write_json
from biosae.sae.interchange.files import Tensors, config_of, licence_of, pickle_of, save_pickle
from biosae.sae.interchange.weights import ONE_THRESHOLD, Weights

UNIT = {"rtol": 1e-5, "atol": 1e-8}
"""Within this of 1 the library takes lengths of atoms for 1."""


def read(path: Path) -> Weights:
    """Weights of a folder, or of a state_dict, that dictionary_learning wrote."""
    file = path / "ae.pt" if path.is_dir() else path
    config: dict[str, Any] = {}
    if (file.parent / "config.json").is_file():
        config = config_of(file.parent / "config.json")
    trainer = config.get("trainer") if isinstance(config.get("trainer"), dict) else {}
    tensors = Tensors(pickle_of(file, file), file)
    kind = trainer.get("dict_class") or _kind(tensors)
    if kind not in READERS:
        raise FormatError(f"{file}: dictionary class {kind!r} is not known; known: {', '.join(READERS)}")
    weights = READERS[kind](tensors, trainer)
    tensors.finish()
    weights.origin = {
        "format": "dictionary_learning",
        "library_version": None,
        "licence": licence_of(file.parent, config, trainer),
        "notes": weights.origin.get("notes", []),
        "config": {"dict_class": kind, **{key: value for key, value in trainer.items() if key != "device"}},
    }
    return weights


def _kind(tensors: Tensors) -> str:
    """Class of a state_dict without a configuration, by its names."""
    if "group_sizes" in tensors:
        return "MatryoshkaBatchTopKSAE"
    if "r_mag" in tensors:
        return "GatedAutoEncoder"
    if "bias" in tensors:
        return "AutoEncoder"
    if "decoder.bias" in tensors:
        return "AutoEncoderNew"
    if "W_enc" in tensors and "threshold" in tensors:
        return "JumpReluAutoEncoder"
    if "k" in tensors:
        raise FormatError(
            f"{tensors.name} is of a TopK or of a BatchTopK SAE, which only config.json beside it tells; copy it too"
        )
    raise FormatError(f"{tensors.name} is of no dictionary class that is known")


def _layers(tensors: Tensors, rule: str, encoder_bias: str | None, bias: str) -> Weights:
    """Of the classes with ``nn.Linear`` layers."""
    encoder = tensors.take("encoder.weight", (None, None))
    m, d = encoder.shape
    decoder = np.ascontiguousarray(tensors.take("decoder.weight", (d, m)).T)
    biases = np.zeros(m) if encoder_bias is None else tensors.take(encoder_bias, (m,))
    return Weights(rule, encoder, decoder, biases, tensors.take(bias, (d,)))


def _matrices(tensors: Tensors, rule: str) -> Weights:
    """Of the classes with ``W_enc`` (d, m)."""
    encoder = np.ascontiguousarray(tensors.take("W_enc", (None, None)).T)
    m, d = encoder.shape
    decoder, biases = tensors.take("W_dec", (m, d)), tensors.take("b_enc", (m,))
    return Weights(rule, encoder, decoder, biases, tensors.take("b_dec", (d,)))


def _autoencoder(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    """The library brings atoms to unit length when it loads one, and codes with them."""
    weights = _layers(tensors, "relu", "encoder.bias", "bias")
    lengths = np.linalg.norm(weights.decoder.astype(np.float64), axis=1)
    if np.allclose(lengths, 1, **UNIT):
        return weights
    if not lengths.all():
        raise FormatError(f"{tensors.name}: an atom has length 0; the library divides by it")
    return weights.lengths_to_codes(lengths)


def _autoencoder_new(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights = _layers(tensors, "relu", "encoder.bias", "decoder.bias")
    weights.subtract = np.zeros_like(weights.bias)
    return weights


def _gated(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights = _layers(tensors, "gated", "gate_bias", "decoder_bias")
    m = len(weights.encoder)
    weights.extra = {"r_mag": tensors.take("r_mag", (m,)), "b_mag": tensors.take("mag_bias", (m,))}
    return weights


def _jumprelu(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights = _matrices(tensors, "jumprelu")
    weights.threshold = tensors.take("threshold", (len(weights.encoder),))
    weights.subtract = np.zeros_like(weights.bias)
    return weights


def _topk(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights = _layers(tensors, "topk", "encoder.bias", "b_dec")
    weights.k = _k(tensors, trainer)
    tensors.drop(["threshold"])  # for another rule, that the library does not use by default
    return weights


def _batchtopk(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    return _thresholded(_layers(tensors, "batchtopk", "encoder.bias", "b_dec"), tensors, trainer)


def _matryoshka(tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights = _thresholded(_matrices(tensors, "matryoshka"), tensors, trainer)
    sizes = tensors.take("group_sizes", (None,))
    if (sizes < 1).any() or sizes.sum() != len(weights.encoder):
        m = len(weights.encoder)
        raise FormatError(f"{tensors.name}: group_sizes {sizes.tolist()} do not add up to {m} latents")
    weights.ends = tuple(int(end) for end in sizes.cumsum())
    return weights


def _thresholded(weights: Weights, tensors: Tensors, trainer: dict[str, Any]) -> Weights:
    weights.k, weights.threshold = _k(tensors, trainer), np.asarray(tensors.number("threshold"))
    if weights.threshold < 0:
        weights.origin["notes"] = ["no threshold was estimated in training: every positive latent is active"]
    return weights


def _k(tensors: Tensors, trainer: dict[str, Any]) -> int:
    k = tensors.number("k")
    if not k.is_integer() or trainer.get("k", k) != k:
        raise FormatError(f"{tensors.name} has k = {k:g}, config.json k = {trainer.get('k')!r}; not of one save")
    return int(k)


READERS = {
    "AutoEncoder": _autoencoder, "AutoEncoderNew": _autoencoder_new, "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu, "AutoEncoderTopK": _topk, "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- write


def write(weights: Weights, folder: Path) -> None:
    """Write ``ae.pt`` and ``config.json``.

    Raises
    ------
    InputError
        If the library has nothing that gives the same codes and reconstructions.
    """
    if weights.rule not in WRITERS or weights.rowwise:
        what = f"rows with a scale of their own ({weights.rowwise})" if weights.rowwise else repr(weights.rule)
        raise InputError(f"dictionary_learning has no counterpart of {what}; format='saelens' may have")
    kind, tensors = WRITERS[weights.rule](weights)
    m, d = weights.shape
    trainer = {"dict_class": kind, "activation_dim": d, "dict_size": m, "written_by": "biosae"}
    if "k" in tensors:
        trainer["k"] = weights.k
    save_pickle(folder / "ae.pt", tensors)
    write_json(folder / "config.json", {"trainer": trainer})


def _to_layers(weights: Weights, bias: str, encoder_bias: str) -> dict[str, np.ndarray]:
    weights.subtracting(weights.bias)
    return {
        bias: weights.bias, "encoder.weight": weights.encoder, encoder_bias: weights.encoder_bias,
        "decoder.weight": weights.decoder.T,
    }  # fmt: skip


def _write_relu(weights: Weights) -> tuple[str, dict[str, np.ndarray]]:
    if np.allclose(np.linalg.norm(weights.decoder.astype(np.float64), axis=1), 1, **UNIT):
        return "AutoEncoder", _to_layers(weights, "bias", "encoder.bias")
    weights.subtracting(np.zeros_like(weights.bias))  # AutoEncoder would change codes to those of unit atoms
    return "AutoEncoderNew", {
        "encoder.weight": weights.encoder, "encoder.bias": weights.encoder_bias, "decoder.weight": weights.decoder.T,
        "decoder.bias": weights.bias,
    }  # fmt: skip


def _write_gated(weights: Weights) -> tuple[str, dict[str, np.ndarray]]:
    tensors = _to_layers(weights, "decoder_bias", "gate_bias")
    return "GatedAutoEncoder", tensors | {"r_mag": weights.extra["r_mag"], "mag_bias": weights.extra["b_mag"]}


def _write_jumprelu(weights: Weights) -> tuple[str, dict[str, np.ndarray]]:
    weights.subtracting(np.zeros_like(weights.bias))
    return "JumpReluAutoEncoder", {
        "W_enc": weights.encoder.T, "b_enc": weights.encoder_bias, "W_dec": weights.decoder, "b_dec": weights.bias,
        "threshold": weights.threshold,
    }  # fmt: skip


def _write_topk(weights: Weights) -> tuple[str, dict[str, np.ndarray]]:
    tensors = _to_layers(weights, "b_dec", "encoder.bias")
    threshold = weights.threshold if weights.rule in ONE_THRESHOLD else -1.0
    kind = "BatchTopKSAE" if weights.rule in ONE_THRESHOLD else "AutoEncoderTopK"
    return kind, tensors | {"k": np.asarray(weights.k, np.int32), "threshold": np.asarray(threshold)}


def _write_matryoshka(weights: Weights) -> tuple[str, dict[str, np.ndarray]]:
    if not weights.ends:
        return _write_topk(weights)
    weights.subtracting(weights.bias)
    return "MatryoshkaBatchTopKSAE", {
        "W_enc": weights.encoder.T, "b_enc": weights.encoder_bias, "W_dec": weights.decoder, "b_dec": weights.bias,
        "k": np.asarray(weights.k, np.int32), "threshold": np.asarray(weights.threshold),
        "group_sizes": np.diff(weights.ends, prepend=0).astype(np.int64),
    }  # fmt: skip


WRITERS = {
    "relu": _write_relu, "gated": _write_gated, "jumprelu": _write_jumprelu, "topk": _write_topk,
    "batchtopk": _write_topk, "matryoshka": _write_matryoshka,
}  # fmt: skip
