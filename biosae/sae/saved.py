"""A fitted model and its scalings as the tensors of a file, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from biosae.sae import checkpoint
from biosae.sae.config import SAEConfig
from biosae.sae.methods import method, options_of
from biosae.sae.methods.base import Method
from biosae.sae.model import SparseAutoencoder
from biosae.sae.normalise import Normaliser
from biosae.sae.partner import Scalings


def tensors(model: SparseAutoencoder | Method, scalings: tuple[Normaliser, Normaliser | None]) -> dict[str, np.ndarray]:
    """Tensors of a model and of the scalings of its table, or two (docs/file-formats.md)."""
    prefix = "model." if isinstance(model, Method) else ""
    found = {prefix + name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    for prefix, scaling in zip(("", "partner_"), scalings, strict=True):
        if scaling is not None:
            found[f"{prefix}mean"] = scaling.mean.astype(np.float64)
            found[f"{prefix}scale"] = np.float64(scaling.scale)
            if scaling.whiten is not None:
                found[f"{prefix}whiten"] = scaling.whiten
    return found


def restored(
    settings: SAEConfig,
    found: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    n_features: int,
    n_latents: int,
    k: int,
) -> tuple[SparseAutoencoder | Method, Normaliser | Scalings]:
    """Model and scaling from :func:`tensors` and the facts of ``config.json``.

    Raises
    ------
    FormatError
        If a tensor is missing or has another shape than the settings say.
    """
    m, d = n_latents, n_features
    widths = (d, config.get("partner_features", 0))
    scaling = _scaling(found, "", d, config["rowwise"], config.get("offset", {}))
    if not settings.is_method:
        model = SparseAutoencoder(
            d, m, architecture=settings.architecture, k=k, ends=config.get("ends"), bandwidth=settings.bandwidth
        )
        shapes = {"W_enc": (m, d), "b_enc": (m,), "W_dec": (m, d), "b_dec": (d,)}
        shapes["threshold"] = (m,) if settings.architecture == "jumprelu" else ()
        parts = {name: checkpoint.shaped(found, name, shape).copy() for name, shape in shapes.items()}
        model.load_state_dict({name: torch.from_numpy(part) for name, part in parts.items()})
        return model, scaling
    options = options_of(settings.architecture, settings.options)
    model = method(settings.architecture)(d, m, k=k, options=options, n_partner=widths[1])
    _fill(model, found)
    if model.partner in ("target", "modality"):
        second = _scaling(found, "partner_", widths[1], config["partner_rowwise"], {})
        return model, Scalings(model.partner, widths, (scaling, second))
    if model.partner == "gradient" and widths[1]:
        return model, Scalings(model.partner, widths, (scaling, None))
    return model, scaling


def _scaling(
    tensors: dict[str, np.ndarray], prefix: str, d: int, rowwise: str | bool | None, offset: dict[str, Any]
) -> Normaliser:
    """Scaling of one table from a file."""
    whiten = checkpoint.shaped(tensors, f"{prefix}whiten", (d, d)) if f"{prefix}whiten" in tensors else None
    mean = checkpoint.shaped(tensors, f"{prefix}mean", (d,))
    return Normaliser(mean, float(checkpoint.shaped(tensors, f"{prefix}scale", ())), rowwise, whiten, offset)


def _fill(model: Method, tensors: dict[str, np.ndarray]) -> None:
    """Put the tensors of a file into an empty method; buffers may have sizes of their own."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in model.state_dict():
        key = f"model.{name}"
        shape = shapes.get(name, tensors[key].shape if key in tensors else ())
        value = torch.from_numpy(checkpoint.shaped(tensors, key, shape).copy())
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in shapes:
            getattr(module, leaf).data = value
        else:
            setattr(module, leaf, value)
