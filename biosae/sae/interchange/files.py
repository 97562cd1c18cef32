"""Reading files that others wrote: configurations, safetensors, pickles of tensors only. Any may be hostile."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from biosae.errors import FormatError
from biosae.files import atomic_path, read_json

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a configuration; real ones have a few thousand."""
SEPARATE = (
    "It may be damaged, or hold more than tensors, which could run code when read and is never loaded here. Where you "
    "trust it, load it with its own library and save the state_dict alone: torch.save(model.state_dict(), 'sae.pt')"
)


def config_of(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    FormatError
        If the file is absent, too large or not a JSON object.
    """
    if path.is_file() and path.stat().st_size > LARGEST_CONFIG:
        raise FormatError(f"{path} has {path.stat().st_size} bytes; no configuration is that large")
    try:
        config = read_json(path)
    except (RecursionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not valid JSON ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} should hold a JSON object, not a {type(config).__name__}")
    return config


def safetensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file.

    Raises
    ------
    FormatError
        If it is absent or damaged.
    """
    if not path.is_file():
        raise FormatError(f"{path} does not exist; copy the whole folder of the checkpoint")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # safetensors has one error type, torch others
        raise FormatError(f"{path} is not a readable safetensors file ({error})") from None


def pickle_of(source: Path | bytes, name: os.PathLike | str) -> dict[str, Any]:
    """Dict in a torch file, read with ``weights_only=True``: nothing in the file is executed.

    Raises
    ------
    FormatError
        If it is damaged, holds no dict, or anything but tensors, numbers, text and containers of them.
    """
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        found = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, torch and Python errors, by what was damaged
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise FormatError(f"{name} could not be read ({type(error).__name__}: {reason}). {SEPARATE}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{name} holds a {type(found).__name__}, not a state_dict. {SEPARATE}")
    return dict(found)


class Tensors:
    """Named tensors of one file, taken one by one; what is left in the end is refused."""

    def __init__(self, tensors: dict[str, Any], name: os.PathLike | str) -> None:
        self.tensors, self.name = dict(tensors), name

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def some(self, prefix: str) -> list[str]:
        """Names that begin like this."""
        return [key for key in self.tensors if str(key).startswith(prefix)]

    def take(self, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """A finite tensor of this shape (None: any length), float64, or float32 where it has two axes.

        Raises
        ------
        FormatError
            If it is absent, of another shape, not of numbers, or holds NaN or infinity.
        """
        if key not in self.tensors:
            raise FormatError(f"{self.name} has no tensor {key!r}; it holds {self._listed()}")
        value = self.tensors.pop(key)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
            raise FormatError(f"{self.name}: {key!r} should be a dense tensor")
        found = tuple(value.shape)
        if len(found) != len(shape) or any(want not in (None, has) for want, has in zip(shape, found, strict=True)):
            raise FormatError(f"{self.name}: tensor {key!r} should have shape {shape}, found {found}")
        if 0 in found or value.is_complex() or value.device.type != "cpu":
            raise FormatError(f"{self.name}: tensor {key!r} of shape {found} and dtype {value.dtype} holds no weights")
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise FormatError(f"{self.name}: tensor {key!r} claims {value.numel()} numbers that the file does not hold")
        numbers = value.detach().to(torch.float32 if len(found) > 1 else torch.float64).numpy()
        if not np.isfinite(numbers).all():
            raise FormatError(f"{self.name}: tensor {key!r} holds NaN or infinity")
        return numbers

    def number(self, key: str) -> float:
        """A tensor without axes, as a number."""
        return float(self.take(key, ()))

    def drop(self, keys: Iterable[str]) -> None:
        """Leave these tensors out: they have no part in codes or reconstructions."""
        for key in keys:
            self.tensors.pop(key, None)

    def finish(self, why: str = "") -> None:
        """Refuse what nobody took: it could change the codes.

        Raises
        ------
        FormatError
            That names the tensors.
        """
        if self.tensors:
            raise FormatError(
                f"{self.name} holds tensors that this reader does not know ({self._listed()}){why}; ignoring them "
                "could give other codes than the library's"
            )

    def _listed(self) -> str:
        names = sorted(map(str, self.tensors))
        return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") or "nothing else"


def whole(config: dict[str, Any], key: str, name: Any) -> int:
    """A whole number of a configuration.

    Raises
    ------
    FormatError
        If it is absent or not a whole number >= 1.
    """
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{name}: {key!r} should be a whole number >= 1, found {value!r}")
    return value


def licence_of(folder: Path, *configs: dict[str, Any]) -> str | None:
    """Licence that a configuration, or the header of the model card README.md, states; None where none does."""
    for config in configs:
        for key in ("license", "licence"):
            if isinstance(config.get(key), str):
                return config[key]
    card = folder / "README.md"
    if card.is_file():
        head = card.read_bytes()[:LARGEST_CONFIG].decode(errors="replace").split("\n---", 1)[0]
        found = re.search(r"^licen[sc]e:\s*(\S.*?)\s*$", head, re.MULTILINE) if head.startswith("---") else None
        if found:
            return found.group(1)
    return None


def save_pickle(path: Path, tensors: dict[str, np.ndarray], header: bytes = b"") -> None:
    """Write a state_dict as torch does, atomically, behind ``header``."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(header)
        torch.save(torched(tensors), stream)


def torched(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """float32 tensors; whole numbers stay what they are."""
    return {
        name: torch.from_numpy(np.array(v, order="C", dtype=v.dtype if v.dtype.kind == "i" else np.float32))
        for name, v in ((name, np.asarray(value)) for name, value in tensors.items())
    }
