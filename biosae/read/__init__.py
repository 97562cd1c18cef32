"""Readers of tables, folders and files of every modality; each returns :class:`biosae.Samples`.

What the readers' packages bring (OpenSlide, pydicom, MNE ...) is imported where it is used.
"""

from __future__ import annotations

from biosae.read.e4 import e4
from biosae.read.images import images
from biosae.read.tiles import tiles
from biosae.read.wear import on_body, sleep_wake

__all__ = ["e4", "images", "on_body", "sleep_wake", "tiles"]
