"""Checkpoints of other libraries: read them as an SAE, write an SAE for them. One module a format."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biosae.errors import BiosaeError, FormatError, InputError, nearest
from biosae.sae.estimator import SAE
from biosae.sae.interchange import weights as common
from biosae.sae.interchange.files import pickle_of


@dataclass(frozen=True)
class Format:
    """What one format looks like from outside."""

    files: tuple[str, ...]
    """Names that a folder of it holds."""
    takes: tuple[str, ...] = ()
    """Arguments of ``read`` for what its files lack."""
    writes: bool = True
    keys: tuple[str, ...] = ()
    """Names in a torch file, any of which only this format has."""


FORMATS = {
    "saelens": Format(("cfg.json", "sae_weights.safetensors"), ("scale",)),
    "sparsify": Format(("cfg.json", "sae.safetensors")),
    "histoscope": Format(("model.pt", "metadata.json"), ("threshold",), writes=False, keys=("b_pre",)),
    "dictionary_learning": Format(
        ("ae.pt",), keys=("group_sizes", "mag_bias", "gate_bias", "bias", "decoder.bias", "W_enc", "k")
    ),
    "sail": Format(("last.ckpt",), writes=False, keys=("state_dict",)),
    "saev": Format(()),
    "overcomplete": Format((), ("architecture", "k", "threshold"), keys=("dictionary.multiplier",)),
}
"""Formats, in the order in which a folder is compared with them."""
TORCH = (".pt", ".pth", ".ckpt", ".bin")


def read(path: str | os.PathLike, *, format: str = "auto", device: str = "auto", **missing: Any) -> SAE:
    """SAE from a checkpoint of another library, with the codes and reconstructions that the library itself gives.

    Nothing in the files is executed: pickles are read with ``weights_only=True``.

    Parameters
    ----------
    path
        Folder, or file, that the library wrote.
    format
        ``saelens``, ``dictionary_learning``, ``sparsify``, ``overcomplete``, ``saev``, ``histoscope``, ``sail``;
        ``auto``: by the names in the folder and in the file.
    device
        As for :meth:`biosae.sae.SAE.load`.
    **missing
        What the files of some formats lack: ``scale`` (``saelens``: factor of the rows in training), ``architecture``,
        ``k``, ``threshold`` (``overcomplete``), ``threshold`` (``histoscope`` with ``batchtopk``).

    Returns
    -------
    SAE
        Fitted. ``provenance_["read_from"]`` holds format, library version, licence, configuration and notes;
        ``identity_`` is None, as a checkpoint does not say which embeddings it is of; ``metrics_`` are empty and
        ``density_`` is NaN until you measure them (``evaluate``).

    Raises
    ------
    FormatError
        If files are absent, damaged, hostile, or hold what has no counterpart here; the message says which.
    InputError
        For an unknown format, or an argument that the format does not take, or needs.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist; give a folder or file that another library wrote")
    if format == "auto":
        format = detect(path)
    if format not in FORMATS:
        raise InputError(f"format={format!r} is not known; {nearest(format, ('auto', *FORMATS))}")
    for name in missing:
        if name not in FORMATS[format].takes:
            takes = ", ".join(FORMATS[format].takes) or "no such argument"
            raise InputError(f"read(..., format={format!r}) does not take {name!r}; it takes {takes}")
        _check(name, missing[name])
    try:
        weights = _module(format).read(path, **missing)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, BiosaeError):
            raise
        raise FormatError(
            f"{path} is not as {format} writes it: a value has the wrong type ({error}); the file is damaged or not of "
            "this format"
        ) from error
    return common.build(weights, device=device)


def write(sae: SAE, folder: str | os.PathLike, *, format: str) -> None:
    """Write an SAE so that another library reads it and gives the same codes and reconstructions.

    Not carried over: metrics, history, density, identity, patients seen in training, and settings of training. Keep
    the folder that ``save`` writes.

    Parameters
    ----------
    sae
        Fitted.
    folder
        Made if absent; files of the same names are replaced.
    format
        ``saelens``, ``dictionary_learning``, ``sparsify``, ``overcomplete`` or ``saev``.

    Raises
    ------
    InputError
        For an unknown format, or if that library has nothing that gives the same codes; the message says why.
    """
    known = [name for name, form in FORMATS.items() if form.writes]
    if format not in known:
        raise InputError(f"format={format!r} cannot be written; {nearest(format, known)}")
    weights = common.of(sae)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _module(format).write(weights, folder)


def _check(name: str, value: Any) -> None:
    """Raise ``InputError`` for an argument in place of what a file lacks that makes no sense."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    good = {"k": isinstance(value, int) and number and value >= 1, "architecture": isinstance(value, str)}
    if value is not None and not good.get(name, number):
        raise InputError(f"{name}={value!r} makes no sense: k is a whole number >= 1, threshold and scale are numbers")


def detect(path: Path) -> str:
    """Format of a folder or file.

    Raises
    ------
    FormatError
        If it is none that is known, or the folder holds several candidates.
    """
    if path.is_dir():
        for name, form in FORMATS.items():
            if form.files and all((path / file).is_file() for file in form.files):
                return name
        if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
            raise FormatError(f"{path} looks like a folder of biosae; open it with biosae.sae.load")
        found = [file for file in sorted(path.iterdir()) if file.suffix in TORCH and file.is_file()]
        if len(found) == 1:
            return detect(found[0])
        raise FormatError(
            f"{path} is no checkpoint that is known ({len(found)} torch files): give the file, or format=; formats: "
            f"{', '.join(FORMATS)}"
        )
    if path.suffix == ".safetensors":
        for name, form in FORMATS.items():
            if path.name in form.files:
                return name
    if path.suffix in TORCH:
        with open(path, "rb") as stream:
            if stream.read(1) == b"{":
                return "saev"
        if (path.parent / "metadata.json").is_file() and path.name == "model.pt":
            return "histoscope"
        keys = pickle_of(path, path)
        for name in ("overcomplete", "sail", "histoscope", "dictionary_learning"):
            if any(key in keys for key in FORMATS[name].keys):
                return name
    raise FormatError(f"{path} is no checkpoint that is known; formats: {', '.join(FORMATS)}")


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
