"""Latents and SAEs in the formats of other tools."""

from __future__ import annotations

from biosae.export.latents import FORMATS, write
from biosae.export.licence import Terms, inherited, terms
from biosae.export.model import write_model
from biosae.export.shareable import pseudonyms, shareable

__all__ = ["FORMATS", "Terms", "inherited", "pseudonyms", "shareable", "terms", "write", "write_model"]
