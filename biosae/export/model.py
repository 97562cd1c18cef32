"""A fitted dictionary as a folder for the Hugging Face hub: safetensors, configuration and a model card."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from biosae.errors import InputError
from biosae.export.licence import Terms, inherited
from biosae.export.shareable import redacted
from biosae.files import atomic_path

METRICS = {
    "fvu": "variance unexplained, training rows", "fvu_val": "variance unexplained, held-out rows",
    "l0": "active latents a row, training rows", "l0_val": "active latents a row, held-out rows",
    "dead_share": "share of latents that never fire", "n_rows": "training rows", "n_rows_val": "held-out rows",
}  # fmt: skip


def write_model(
    sae: Any,
    folder: str | os.PathLike,
    *,
    title: str | None = None,
    data: str | None = None,
    data_licence: str | None = None,
    licence: str | None = None,
    show_ids: bool = False,
) -> Path:
    """Write what ``biosae.sae.load`` opens, and a model card that hands on the encoder's licence and restrictions.

    Parameters
    ----------
    sae
        Fitted coder, or the folder that its ``save`` wrote.
    folder
        ``config.json``, ``model.safetensors`` and ``README.md`` are written there; files of these names are replaced.
    title
        Heading of the card.
    data, data_licence
        In a sentence, which samples it was fitted to; and their licence.
    licence
        The encoder's licence where none is recorded, see :func:`biosae.export.terms`.
    show_ids
        False leaves out the salted hashes of training patients: whoever guesses a patient's name could check it,
        because the salt is in the file. True keeps them, so that ``trained_on`` still works.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    NotFittedError
        If the coder is not fitted.
    InputError
        If ``licence`` differs from the recorded one.

    Notes
    -----
    Nothing is sent anywhere. ``model.safetensors`` states the terms in its header, ``config.json`` under ``licence``,
    ``derivatives_restricted`` and ``terms``.
    """
    from biosae.sae import checkpoint
    from biosae.sae import load as load_sae

    sae = load_sae(sae, device="cpu") if isinstance(sae, (str, os.PathLike)) else sae
    if not hasattr(sae, "save"):
        raise InputError(f"write_model got a {type(sae).__name__}; pass a fitted SAE or the folder of one")
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as saved:
        sae.save(saved)
        tensors, config = checkpoint.read(saved)
    held = inherited(config, licence=licence)
    config = redacted({k: v for k, v in config.items() if k not in ("format", "version", "sha256")})
    if not show_ids:
        config["training_groups"] = []
    config |= {
        "licence": held.licence, "derivatives_restricted": held.derivatives_restricted,
        "terms": held.to_dict(),
    }  # fmt: skip
    header = {
        "format": "pt", "library": "biosae", "licence": held.licence, "encoder": held.encoder,
        "derivatives_restricted": str(held.derivatives_restricted).lower(), "terms": held.statement,
    }  # fmt: skip
    checkpoint.write(folder, tensors, config, header=header)
    card = model_card(config, held, title=title, data=data, data_licence=data_licence)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    return folder


def model_card(
    config: dict[str, Any], inherited: Terms, *, title: str | None, data: str | None, data_licence: str | None
) -> str:
    """Markdown with the front matter of the Hugging Face hub."""
    identity = config.get("identity") or {}
    params, kind = config.get("params", {}), config["class"]
    method = str(params.get("architecture") or params.get("method") or kind)
    front: dict[str, Any] = {"license": inherited.hub_licence}
    if front["license"] == "other":
        front["license_name"] = "".join(c if c.isalnum() or c in ".-" else "-" for c in inherited.licence.casefold())
    front |= {
        "library_name": "biosae",
        "tags": ["sparse-autoencoder", "interpretability", "biomedical", kind.casefold()],
        "pipeline_tag": "feature-extraction",
    }
    if inherited.repository:
        repositories = inherited.repository.split(" and ")
        front |= {"base_model": repositories if len(repositories) > 1 else repositories[0]}
        front |= {"base_model_relation": "adapter"}
    if not inherited.may_be_passed_on or inherited.gated:
        front["extra_gated_prompt"] = inherited.statement
        front["extra_gated_fields"] = {"I have the right to use the encoder and accept its terms": "checkbox"}
    # a JSON value is a YAML value, and no text of the configuration can leave its quotes
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    n, d = config["n_latents"], config["n_features"]
    lines += [f"# {_line(title or f'{method}: {n} latents of {inherited.encoder}')}", ""]
    lines += [f"A sparse dictionary ({_code(kind)}, {_code(method)}): {n} latents of embeddings of width {d}.", ""]
    lines += ["## Licence and restrictions", "", _line(inherited.statement), ""]
    their = _line(data_licence) if data_licence else "not stated; it applies too"
    lines += [f"Data it was fitted to: {_line(data) if data else 'not stated'}. Their licence: {their}.", ""]
    if kind == "ITDA":
        lines += ["Every atom is the embedding of one training sample, so this file holds data of single patients.", ""]
    rows = {"encoder": inherited.encoder, "source": inherited.source}
    rows |= {k: identity.get(k) for k in ("layer", "pool", "norm", "precision", "mpp", "weights_sha256")}
    lines += ["## Embeddings that it takes", "", *_table(("", "value"), [(k, v) for k, v in rows.items() if v]), ""]
    measured = config.get("metrics") or {}
    numbers = [(f"{k}: {text}", measured[k]) for k, text in METRICS.items() if _finite(measured.get(k))]
    if numbers:
        lines += ["## Quality", "", *_table(("number", "value"), numbers), ""]
    lines += [
        "## Use", "",
        "```python", "import biosae as bs", "",
        'sae = bs.sae.load("this folder")',
        "codes = bs.encode(sae, embeddings)      # AnnData; refuses embeddings of another encoder or layer", "```", "",
        "## Limits", "",
        "For research, not for diagnosis. A latent is a direction in the encoder's space; what it means has to be "
        "shown on data of its own, with patients as units. Patients that it was fitted to are "
        + ("recorded as salted hashes." if config.get("training_groups") else "not recorded in this file."), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    cells = [(name, f"{v:.4g}" if isinstance(v, float) else str(v)) for name, v in rows]
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {_line(a)} | {_line(b)} |" for a, b in cells)]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(text: str) -> str:
    """Text in one line that is neither markup nor a cell border."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in " ".join(str(text).split()))


def _code(text: str) -> str:
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"
