"""Histoscope (a study of UNI embeddings): a folder with ``model.pt`` (state_dict) and ``metadata.json``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from biosae.errors import FormatError, InputError
from biosae.sae.interchange.files import Tensors, config_of, licence_of, pickle_of, whole
from biosae.sae.interchange.weights import Weights

RULES = {"relu": "relu", "topk": "topk_signed", "batchtopk": "batchtopk"}


def read(path: Path, *, threshold: float | None = None) -> Weights:
    """Weights of a folder of that study.

    ``threshold`` replaces its ``batchtopk``, whose codes depend on which rows are in a batch.
    """
    folder = path if path.is_dir() else path.parent
    metadata, file = config_of(folder / "metadata.json"), folder / "model.pt"
    settings, data = metadata.get("hyperparameters"), metadata.get("dataset_args")
    if not isinstance(settings, dict) or settings.get("activation", "relu") not in RULES:
        raise FormatError(f"{folder}/metadata.json has no hyperparameters with a known activation ({', '.join(RULES)})")
    rule = RULES[settings.get("activation", "relu")]
    if (rule == "batchtopk") != (threshold is not None):
        raise InputError(
            f"{folder}: activation 'batchtopk' of Histoscope keeps the k largest of a whole batch, also in evaluation, "
            "so that codes depend on other rows. Pass threshold= to have a rule for each row; for others leave it out"
        )
    d, m = whole(settings, "input_dim", folder), whole(settings, "hidden_dim", folder)
    loaded = pickle_of(file, file)
    tensors = Tensors({str(key).removeprefix("module."): value for key, value in loaded.items()}, file)
    encoder, tied = tensors.take("encoder.weight", (m, d)), bool(settings.get("tie_weights"))
    decoder = encoder if tied else np.ascontiguousarray(tensors.take("decoder.weight", (d, m)).T)
    biases = tensors.take("encoder.bias", (m,)) if rule == "relu" else np.zeros(m)
    bias = tensors.take("b_pre", (d,)) if settings.get("use_pre_bias") else np.zeros(d)
    tensors.finish()
    weights = Weights(rule, encoder, decoder, biases, bias)
    if rule != "relu":
        weights.k = min(m, whole(settings, "topk_k", folder))
    if rule == "topk_signed" and tied:
        weights.options = {"tied": True, "encoder_bias": False}
    if threshold is not None:
        weights.threshold = np.asarray(threshold)
    notes, data = [], data if isinstance(data, dict) else {}
    if data.get("zscore"):
        notes.append(
            "rows must be made as in that study: (x - mean) / (std + 1e-6) with emb_stats.pt of its training rows"
            + (", then unit length" if data.get("l2_normalize") else "")
        )
    elif data.get("l2_normalize"):
        weights.rowwise = "l2"
    weights.origin = {
        "format": "histoscope", "library_version": None, "licence": licence_of(folder, metadata), "notes": notes,
        "config": {**settings, "zscore": data.get("zscore"), "l2_normalize": data.get("l2_normalize")},
    }  # fmt: skip
    return weights
