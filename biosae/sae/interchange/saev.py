"""saev (OSU NLP): one file, a line of JSON and then a state_dict. Release 0.1.0, and schemas 1 to 5 after it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from biosae.errors import FormatError, InputError
from biosae.sae.interchange.files import Tensors, licence_of, pickle_of, save_pickle, whole
from biosae.sae.interchange.weights import Weights

LONGEST_LINE = 2**20
SCHEMA = 5
PREBIAS_UNTIL = 1
"""Last schema whose code subtracted b_dec from the rows (it went on 2025-07-31, when the schema became 2)."""


def read(path: Path) -> Weights:
    """Weights of a file that ``saev.nn.dump`` wrote, by the rules of the code that wrote it."""
    file = path if path.is_file() else path / "sae.pt"
    try:
        with open(file, "rb") as stream:
            line, rest = stream.readline(LONGEST_LINE), stream.read()
        header = json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} does not begin with the line of JSON of saev ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise FormatError(f"{file}: the header should be a JSON object")
    schema = header.get("schema", 0)
    if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
        raise FormatError(f"{file} has schema {schema!r} of saev; this reader knows up to {SCHEMA}: update biosae")
    cfg = header.get("cfg") if schema else header
    if not isinstance(cfg, dict):
        raise FormatError(f"{file}: the header has no configuration")
    d = whole(cfg, "d_model" if "d_model" in cfg else "d_vit", file)
    m = whole(cfg, "d_sae", file) if "d_sae" in cfg else d * whole(cfg, "exp_factor", file)
    tensors = Tensors(pickle_of(rest, file), file)
    weights = Weights(
        "relu", np.ascontiguousarray(tensors.take("W_enc", (d, m)).T), tensors.take("W_dec", (m, d)),
        tensors.take("b_enc", (m,)), tensors.take("b_dec", (d,)),
    )  # fmt: skip
    if schema > PREBIAS_UNTIL:
        weights.subtract = np.zeros(d)
    activation, params = _activation(header, cfg, schema)
    notes = ["rows are taken as given: the mean and the scale of its data loader are not in the file"]
    if activation in ("TopK", "BatchTopK"):
        weights.rule, weights.k = "topk_signed", whole(params, "top_k", file) if "top_k" in params else 32
        if weights.k > m:
            weights.k = m
        if "activation.threshold" in tensors:
            weights.rule, weights.threshold = "batchtopk", np.asarray(tensors.number("activation.threshold"))
        elif activation == "BatchTopK":
            notes.append("its BatchTopK has no threshold: the k largest of each row, as the code of its time had it")
    elif activation != "Relu":
        raise FormatError(f"{file}: activation {activation!r} of saev is not known")
    tensors.finish()
    weights.origin = {
        "format": "saev", "library_version": header.get("lib"), "licence": licence_of(file.parent, header),
        "notes": notes, "config": {"schema": schema, "commit": header.get("commit"), **cfg},
    }  # fmt: skip
    return weights


def _activation(header: dict[str, Any], cfg: dict[str, Any], schema: int) -> tuple[str, dict[str, Any]]:
    found = cfg.get("activation")
    if isinstance(found, dict):
        params = found.get("params")
        return str(found.get("cls")), params if isinstance(params, dict) else {}
    if schema == 1 and header.get("cls") in ("TopK", "BatchTopK"):
        return header["cls"], cfg
    return "Relu", {}


# --------------------------------------------------------------------------------------------------------------- write


def write(weights: Weights, folder: Path) -> None:
    """Write ``sae.pt`` with a header of schema 5.

    Raises
    ------
    InputError
        If saev has nothing that gives the same codes and reconstructions.
    """
    kinds = {"relu": "Relu", "topk": "TopK", "topk_signed": "TopK", "batchtopk": "BatchTopK", "matryoshka": "BatchTopK"}
    if weights.rule not in kinds or weights.rowwise:
        what = f"rows with a scale of their own ({weights.rowwise})" if weights.rowwise else repr(weights.rule)
        raise InputError(f"saev has no counterpart of {what}; format='saelens' may have")
    if weights.rule == "topk":
        warnings.warn(
            "saev keeps the k largest pre-activations of a row even where they are negative: rows with fewer than k "
            "positive ones get negative codes there",
            stacklevel=3,
        )
    weights.subtracting(np.zeros_like(weights.bias))
    m, d = weights.shape
    tensors = {
        "W_dec": weights.decoder, "b_dec": weights.bias, "W_enc": weights.encoder.T, "b_enc": weights.encoder_bias,
    }  # fmt: skip
    kind, none = kinds[weights.rule], {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
    auxk = {"cls": "AuxK", "params": {"key": "auxk", "k_aux": 512, "alpha": 1 / 32}}
    params: dict[str, Any] = {"key": "relu", "sparsity": none, "aux": {"cls": "NoAux", "params": {"key": "no-aux"}}}
    if kind == "TopK":
        params = {"key": "top-k", "top_k": weights.k, "sparsity": none, "aux": auxk}
    if kind == "BatchTopK":
        params = {"key": "batch-top-k", "top_k": weights.k, "sparsity": none, "momentum": 0.1, "aux": auxk}
        tensors["activation.threshold"] = np.asarray(weights.threshold)
    cfg = {
        "d_model": d, "d_sae": m, "activation": {"cls": kind, "params": params}, "reinit_blend": 0.8,
        "reinit_enc_dec_tranpose": True, "remove_parallel_grads": True, "normalize_w_dec": False,
    }  # fmt: skip
    header = {"schema": SCHEMA, "cfg": cfg, "commit": "unknown", "lib": "written by biosae"}
    save_pickle(folder / "sae.pt", tensors, header=(json.dumps(header) + "\n").encode())
