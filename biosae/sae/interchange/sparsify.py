"""sparsify (EleutherAI): a folder with ``cfg.json`` and ``sae.safetensors``. Release 1."""

from __future__ import annotations

from pathlib import Path

from biosae.errors import FormatError, InputError
from biosae.files import write_json
from biosae.sae.checkpoint import write_tensors
from biosae.sae.interchange.files import Tensors, config_of, licence_of, safetensors_of, torched, whole
from biosae.sae.interchange.weights import Weights

REFUSED = {
    "transcode": "predicts the output of a module from its input",
    "skip_connection": "adds a linear map of the row to the reconstruction",
    "signed": "ranks latents by size, in a way that differs between releases",
}


def read(path: Path) -> Weights:
    """Weights of a folder that sparsify wrote."""
    folder = path if path.is_dir() else path.parent
    cfg = config_of(folder / "cfg.json")
    for key, why in REFUSED.items():
        if cfg.get(key):
            raise FormatError(f"{folder}: {key}=true of sparsify {why}; it is not supported")
    if cfg.get("activation", "topk") != "topk":
        raise FormatError(f"{folder}: activation={cfg['activation']!r} of sparsify has no counterpart; only 'topk' has")
    d, k = whole(cfg, "d_in", folder), whole(cfg, "k", folder)
    m = whole(cfg, "num_latents", folder) if cfg.get("num_latents") else d * whole(cfg, "expansion_factor", folder)
    file = folder / "sae.safetensors"
    tensors = Tensors(safetensors_of(file), file)
    weights = Weights(
        "topk", tensors.take("encoder.weight", (m, d)), tensors.take("W_dec", (m, d)),
        tensors.take("encoder.bias", (m,)), tensors.take("b_dec", (d,)), k=k,
    )  # fmt: skip
    tensors.finish()
    weights.origin = {
        "format": "sparsify", "library_version": None, "licence": licence_of(folder, cfg), "notes": [], "config": cfg,
    }  # fmt: skip
    return weights


def write(weights: Weights, folder: Path) -> None:
    """Write ``cfg.json`` and ``sae.safetensors``.

    Raises
    ------
    InputError
        For anything but ``topk`` on rows without a scale of their own.
    """
    if weights.rule != "topk" or weights.rowwise:
        raise InputError(
            f"sparsify knows top-k SAEs of rows as they are; this one is {weights.rule!r}"
            + (f" with rows scaled one by one ({weights.rowwise})" if weights.rowwise else "")
            + "; format='saelens' may have a counterpart"
        )
    weights.subtracting(weights.bias)
    m, d = weights.shape
    write_tensors(
        folder / "sae.safetensors",
        torched({
            "encoder.weight": weights.encoder, "encoder.bias": weights.encoder_bias, "W_dec": weights.decoder,
            "b_dec": weights.bias,
        }),
    )  # fmt: skip
    cfg = {
        "activation": "topk", "expansion_factor": max(1, m // d), "normalize_decoder": True, "num_latents": m,
        "k": weights.k, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d,
    }  # fmt: skip
    write_json(folder / "cfg.json", cfg)
