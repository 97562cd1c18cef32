"""Embeddings: samples through a frozen encoder, into a folder of memory-mapped shards that a killed job can resume."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"Embeddings": "biosae.embeddings.store", "embed": "biosae.embeddings.extract"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'biosae.embeddings' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
