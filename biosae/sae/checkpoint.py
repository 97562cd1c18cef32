"""A fitted coder on disk: ``model.safetensors`` (tensors) and ``config.json`` (the rest, with the tensors' hash)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from biosae.errors import FormatError
from biosae.files import atomic_path, hash_file, read_json, write_json

FORMAT = "biosae-sae"
VERSION = 3
"""2 added ``whiten``, thresholds of latents and the name of the row-wise scaling; 3 the ``class`` of the coder and
further architectures. Files of 1 and 2 are read."""


def write(
    folder: str | os.PathLike,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    header: dict[str, str] | None = None,
) -> None:
    """Write both files, each atomically; ``config.json`` comes last and holds the SHA-256 of the tensors.

    ``header``: text for the header of the tensors' file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.safetensors"
    arrays = {name: torch.from_numpy(np.asarray(value, order="C")) for name, value in tensors.items()}
    write_tensors(model, arrays, header)
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, "sha256": hash_file(model), **config})


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with the permissions of other new files."""
    with atomic_path(file) as temporary:
        mode = temporary.stat().st_mode  # the library makes a new file that only its owner may read
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=header)
        temporary.chmod(mode)


def write_log(folder: str | os.PathLike, history: list[dict[str, float]]) -> None:
    """Write the history of a training as ``log.csv``, atomically; nothing where there is none yet."""
    if history:
        names = list(history[-1])
        lines = [",".join(names), *(",".join(f"{row[name]:.9g}" for name in names) for row in history)]
        with atomic_path(Path(folder) / "log.csv") as temporary:
            temporary.write_text("\n".join(lines) + "\n")


def read(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read and check both files.

    Raises
    ------
    FormatError
        If a file is absent, corrupt, of another kind, of a newer version, or the two do not belong together.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FormatError(
            f"{folder} holds no SAE (no config.json); give the folder that save() or 'biosae train' wrote"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{folder / 'config.json'} is not of a biosae SAE (its format is not {FORMAT!r})")
    version = config.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise FormatError(
            f"{folder} has format version {version!r}; this biosae reads up to {VERSION}: update biosae to open it"
        )
    model = folder / "model.safetensors"
    if not model.is_file():
        raise FormatError(f"{model} does not exist; copy the whole folder again, or fit and save again")
    if hash_file(model) != config.get("sha256"):
        raise FormatError(
            f"{model} does not match the sha256 in config.json; it is corrupt, or the two files are not of one save: "
            "copy the folder again, or fit and save again"
        )
    try:
        tensors = safetensors.numpy.load_file(model)
    except Exception as error:  # safetensors has one error type, numpy others
        raise FormatError(f"{model} is not a readable safetensors file ({error})") from None
    return tensors, config


def shaped(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor ``name``, which must have this shape.

    Raises
    ------
    FormatError
        If it is absent or has another shape.
    """
    found = tensors[name].shape if name in tensors else "nothing"
    if found != shape:
        raise FormatError(f"model.safetensors: tensor {name!r} should have shape {shape}, found {found}")
    return tensors[name]
