"""Kinds of items, the protocol of readers, and why an item could not be read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from biosae.errors import BiosaeError, FormatError, nearest

REASONS = (
    "missing", "empty", "truncated", "unreadable", "unsupported", "wrong_size",
    "no_image", "no_unit", "no_channel", "too_short", "gaps", "no_tissue",
)  # fmt: skip

# kind (``reader.spec()["kind"]``) -> constructor that takes the rest of the spec as keywords, or its "module:attribute"
READERS: dict[str, Callable[..., Reader] | str] = {
    "altered": "biosae.interpret.altered:AlteredReader",
    "image": "biosae.read.decode:ImageReader",
    "crop": "biosae.read.crops:CropReader",
    "phantom": "biosae.data.phantom:PhantomReader",
    "nifti_slices": "biosae.read.nifti_items:NiftiSlices",
    "nifti_regions": "biosae.read.nifti_items:NiftiRegions",
    "signal": "biosae.read.signals:SignalReader",
    "dicom": "biosae.read.dicom:DicomReader",
    "wsi": "biosae.read.wsi:SlideTileReader",
}


class ReadError(BiosaeError):
    """One item could not be read. ``reason`` is one of ``REASONS``; ``detail`` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is no reason of a ReadError; {nearest(reason, REASONS)}")
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


# kind of item -> (dtype, number of axes, what it is)
ITEMS: dict[str, tuple[type, int, str]] = {
    "image": (np.uint8, 3, "RGB image (height, width, 3)"),
    "signal": (np.float32, 2, "signal (channels, time)"),
    "features": (np.float32, 1, "vector (values,)"),
}
NOUNS = {"image": "images", "signal": "signals", "features": "vectors"}
# what one item is called: by its reader, else by its kind
_OF_READER = {"wsi": "tile", "phantom": "tile", "crop": "crop", "nifti_slices": "slice", "nifti_regions": "scan"}
_OF_KIND = {"image": "image", "signal": "recording window", "features": "vector"}
_RADIOGRAPHS = {"CR", "DX", "DR", "RG", "MG", "PX", "IO"}  # DICOM modalities


class Reader(Protocol):
    """What turns one row into an item; small and picklable, safe in threads.

    ``item`` is a key of ``ITEMS`` (``"image"`` where a reader does not say). A reader of signals also has ``rate`` (Hz,
    None if the rows differ), ``unit`` and ``channels`` (names). ``columns`` names the columns, besides ``path``, that
    say which item a row is (``start`` of a window, say); they are part of the samples' fingerprint.
    """

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """Item of the row; raises :class:`ReadError`. ``row["path"]`` is resolved."""

    def spec(self) -> dict[str, Any]:
        """JSON-ready settings: ``kind`` (a key of ``READERS``) and the constructor's keywords."""


def noun_of(spec: Mapping[str, Any], item: str, obs: Any, meta: Mapping[str, Any]) -> str:
    """What one item is called, in the singular."""
    if item == "image" and "modality" in obs and len(obs) and obs["modality"].isin(_RADIOGRAPHS).all():
        return "radiograph"
    if item == "signal" and "recording" in obs and obs["recording"].is_unique:
        return "recording"
    return str(meta.get("noun") or _OF_READER.get(spec.get("kind")) or _OF_KIND[item])


def make_reader(spec: Mapping[str, Any]) -> Reader:
    """Rebuild a reader from its ``spec()``, through ``READERS``."""
    options = dict(spec)
    kind = options.pop("kind")
    if kind not in READERS:
        raise FormatError(f"this biosae has no reader {kind!r}; {nearest(kind, READERS)}")
    constructor = READERS[kind]
    if isinstance(constructor, str):
        module, attribute = constructor.split(":")
        constructor = getattr(importlib.import_module(module), attribute)
    return constructor(**options)
