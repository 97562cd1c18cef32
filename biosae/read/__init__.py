"""Readers of tables, folders and files of every modality; each returns :class:`biosae.Samples`.

What the readers' packages bring (OpenSlide, pydicom, MNE ...) is imported where it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from biosae.read.dicom import dicom, dicom_values
from biosae.read.e4 import e4
from biosae.read.edf import edf
from biosae.read.images import images
from biosae.read.nifti import nifti
from biosae.read.signals import record
from biosae.read.tiles import tiles
from biosae.read.tissue import tissue_mask
from biosae.read.wear import on_body, sleep_wake
from biosae.read.wfdb import LEADS, wfdb
from biosae.read.wsi import wsi

__all__ = [
    "LEADS",
    "dicom",
    "dicom_values",
    "e4",
    "edf",
    "features",
    "images",
    "nifti",
    "on_body",
    "record",
    "sleep_wake",
    "tiles",
    "tissue_mask",
    "wfdb",
    "wsi",
]


def __getattr__(name: str) -> Any:
    """``features`` comes from the room of embeddings, which stands above this one."""
    if name != "features":
        raise AttributeError(f"module 'biosae.read' has no attribute {name!r}")
    return importlib.import_module("biosae.embeddings.features").features
