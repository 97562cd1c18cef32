"""Readers of tables, folders and image files; each returns :class:`biosae.Samples`."""

from biosae.read.images import images
from biosae.read.tiles import tiles

__all__ = ["images", "tiles"]
