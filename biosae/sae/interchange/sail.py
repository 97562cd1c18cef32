"""SAIL (a study of BiomedParse and DINOv3 embeddings): a Lightning checkpoint ``*.ckpt`` of a Matryoshka SAE."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from biosae.errors import FormatError
from biosae.sae.interchange.files import Tensors, licence_of, pickle_of
from biosae.sae.interchange.weights import Weights


def read(path: Path) -> Weights:
    """Weights of a checkpoint of that study. Codes are max(0, a - theta), as in its evaluation."""
    file = path if path.is_file() else path / "last.ckpt"
    loaded = pickle_of(file, file)
    state = loaded.get("state_dict")
    if not isinstance(state, dict) or "model.inference_threshold" not in state:
        raise FormatError(f"{file} is no checkpoint of SAIL (no model.inference_threshold in its state_dict)")
    settings = loaded.get("hyper_parameters")
    settings = settings if isinstance(settings, dict) else {}
    tensors = Tensors({str(key).removeprefix("model."): value for key, value in state.items()}, file)
    encoder = tensors.take("encoder.weight", (None, None))
    m, d = encoder.shape
    tied = "decoder.weight" not in tensors
    decoder = encoder if tied else np.ascontiguousarray(tensors.take("decoder.weight", (d, m)).T)
    weights = Weights("matryoshka", encoder, decoder, tensors.take("encoder.bias", (m,)), tensors.take("bias", (d,)))
    threshold, count = tensors.number("inference_threshold"), tensors.number("_threshold_count")
    if threshold < 0 or count < 1:
        raise FormatError(f"{file} has no inference threshold: that model was not trained, or it is damaged")
    weights.threshold = np.asarray(threshold)
    tensors.drop(["_threshold_sum"])
    tensors.finish()
    sizes, ks = settings.get("dictionary_sizes"), settings.get("k_values")
    weights.options = {"shrink": True, "tied": tied}
    if _rising(sizes, m) and _counts(ks, sizes):
        weights.k, weights.ends = ks[-1], tuple(sizes)
        weights.options |= {"prefixes": [size / m for size in sizes], "level_k": list(ks)}
    plain = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, list, type(None)))}
    weights.origin = {
        "format": "sail", "library_version": None, "licence": licence_of(file.parent, settings),
        "notes": ["rows must have unit length, as in that study"], "config": plain,
    }  # fmt: skip
    return weights


def _rising(sizes: object, m: int) -> bool:
    whole = isinstance(sizes, list) and all(isinstance(size, int) and size > 0 for size in sizes)
    return whole and bool(sizes) and sizes == sorted(set(sizes)) and sizes[-1] == m


def _counts(ks: object, sizes: list[int]) -> bool:
    whole = isinstance(ks, list) and len(ks) == len(sizes) and all(isinstance(k, int) and k > 0 for k in ks)
    return whole and all(k <= size for k, size in zip(ks, sizes, strict=True))
