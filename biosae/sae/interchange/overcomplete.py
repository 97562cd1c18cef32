"""Overcomplete: the state_dict of one of its models in a torch file. Release 0.3.

The library has no file format. A state_dict lacks k and the running threshold of BatchTopK, and does not tell some
classes apart: these are arguments.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from biosae.errors import FormatError, InputError
from biosae.files import write_json
from biosae.sae.interchange.files import Tensors, licence_of, pickle_of, save_pickle
from biosae.sae.interchange.weights import Weights, below

ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "mp", "omp")
FIRST, LAST = "encoder.final_block.0.weight", "encoder.final_block.0.bias"


def read(
    path: Path, *, architecture: str | None = None, k: int | None = None, threshold: float | None = None
) -> Weights:
    """Weights of a state_dict.

    ``architecture``: ``relu``, ``topk``, ``batchtopk``, ``jumprelu``, ``mp`` or ``omp``; None: ``jumprelu`` where there
    are thresholds, ``batchtopk`` with ``threshold``, else ``topk`` with ``k``. ``threshold``: ``running_threshold`` of
    the model.
    """
    file = path if path.is_file() else path / "sae.pt"
    tensors = Tensors(pickle_of(file, file), file)
    if "Q" in tensors:
        raise FormatError(f"{file} is of a QSAE, whose codes are quantised and not sparse; it is not supported")
    if "encoder.final_block.1.weight" in tensors or tensors.some("encoder.mlp_blocks"):
        raise FormatError(f"{file} has an encoder of several layers or with normalisation, not a linear one")
    rule = architecture or _rule(tensors, k, threshold)
    if rule not in ARCHITECTURES:
        raise InputError(f"architecture={rule!r} is not known for overcomplete; one of {', '.join(ARCHITECTURES)}")
    if rule in ("topk", "mp", "omp") and k is None:
        raise InputError(f"{file}: a state_dict of overcomplete does not hold k; pass k=")
    if rule == "batchtopk" and threshold is None:
        raise InputError(f"{file}: pass threshold=float(sae.running_threshold); it is not part of a state_dict")
    atoms = _atoms(tensors)
    m, d = atoms.shape
    zeros, notes = np.zeros(d), []
    if rule in ("mp", "omp"):
        options = {"solver": "omp"} if rule == "omp" else {"rule": "signed"}
        weights = Weights("mp", atoms, atoms, np.zeros(m), zeros, k=k, options=options)
    else:
        encoder, bias = _encoder(tensors, atoms)
        weights = Weights(rule, encoder, atoms, bias, zeros, k=k)
        if rule == "jumprelu":
            weights.threshold = below(np.exp(tensors.take("thresholds", (m,))))
        if rule == "batchtopk":
            weights.threshold = below(threshold)
            notes.append("its top_k counted a whole batch")
    tensors.finish(f" for architecture={rule!r}")
    weights.origin = {
        "format": "overcomplete", "library_version": None, "licence": licence_of(file.parent), "notes": notes,
        "config": {"architecture": rule, "k": k, "threshold": threshold},
    }  # fmt: skip
    return weights


def _rule(tensors: Tensors, k: int | None, threshold: float | None) -> str:
    if "thresholds" in tensors:
        return "jumprelu"
    if threshold is not None:
        return "batchtopk"
    if not tensors.some("encoder."):
        raise InputError(f"{tensors.name} has no encoder: pass architecture='mp' or 'omp', and k=")
    if k is not None:
        return "topk"
    raise InputError(
        f"{tensors.name}: a state_dict of overcomplete does not tell which class it is of. Pass k= (TopKSAE), "
        "threshold= (BatchTopKSAE: float(sae.running_threshold)) or architecture='relu' (SAE)"
    )


def _atoms(tensors: Tensors) -> np.ndarray:
    """Dictionary as the library fuses it in eval mode, from atoms as they were stored."""
    if "dictionary.C" in tensors:
        points = tensors.take("dictionary.C", (None, None))
        d = points.shape[1]
        shares = tensors.take("dictionary.W", (None, len(points)))
        atoms = shares.astype(np.float64) @ points + tensors.take("dictionary.Relax", (len(shares), d))
    else:
        atoms = tensors.take("dictionary._weights", (None, None))
    return (atoms * np.exp(tensors.number("dictionary.multiplier"))).astype(np.float32)


def _encoder(tensors: Tensors, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    m, d = atoms.shape
    if FIRST in tensors:
        return tensors.take(FIRST, (m, d)), tensors.take(LAST, (m,))
    if "encoder.weight" in tensors:
        encoder = tensors.take("encoder.weight", (m, d))
    elif tensors.some("encoder.tied_to"):
        tensors.drop(tensors.some("encoder.tied_to"))
        encoder = atoms.copy()
    else:
        raise FormatError(f"{tensors.name} has no linear encoder that is known")
    return encoder, tensors.take("encoder.bias", (m,)) if "encoder.bias" in tensors else np.zeros(m)


# --------------------------------------------------------------------------------------------------------------- write

CLASSES = {
    "relu": "SAE", "topk": "TopKSAE", "batchtopk": "BatchTopKSAE", "matryoshka": "BatchTopKSAE", "jumprelu": "JumpSAE",
}  # fmt: skip


def write(weights: Weights, folder: Path) -> None:
    """Write ``sae.pt`` (state_dict) and ``config.json`` with the arguments of the class that it belongs to.

    Raises
    ------
    InputError
        If reconstructions have a bias, which no model of the library has, or the rule has no counterpart.
    """
    if weights.rule not in CLASSES or weights.rowwise:
        what = f"rows with a scale of their own ({weights.rowwise})" if weights.rowwise else repr(weights.rule)
        raise InputError(f"overcomplete has no counterpart of {what}; format='saelens' may have")
    if np.abs(weights.bias).max() > 0:
        raise InputError(
            "models of overcomplete have no bias in their reconstructions, this SAE has one: nothing that the library "
            "loads would give its reconstructions. Write format='saelens'"
        )
    weights.subtracting(np.zeros_like(weights.bias))
    m, d = weights.shape
    tensors = {
        FIRST: weights.encoder, LAST: weights.encoder_bias, "dictionary._weights": weights.decoder,
        "dictionary.multiplier": np.asarray(0.0),
    }  # fmt: skip
    config = {
        "class": CLASSES[weights.rule], "input_shape": d, "nb_concepts": m,
        "dictionary_params": {"normalization": "identity"},
    }  # fmt: skip
    if weights.rule == "topk":
        config["top_k"] = weights.k
    above = None if weights.threshold is None else np.nextafter(np.float32(weights.threshold), np.float32(np.inf))
    if weights.rule in ("batchtopk", "matryoshka"):
        config["running_threshold"] = float(above)
    if weights.rule == "jumprelu":
        if (weights.threshold <= 0).any():
            raise InputError("JumpSAE of overcomplete stores the logarithm of thresholds; one of them is 0")
        tensors["thresholds"] = np.log(above.astype(np.float64))
    save_pickle(folder / "sae.pt", tensors)
    write_json(folder / "config.json", config)
