"""biosae: what a frozen biomedical encoder sees, whether it is biology or the scanner, and whether it holds elsewhere.

Names are loaded on first use, so that ``import biosae`` stays fast and imports neither torch nor scanpy.
"""

from __future__ import annotations

import importlib
from typing import Any

from biosae.settings import settings as settings  # rebinds the submodule's name to the settings object

__version__ = "0.1.0"

# public name -> (module, attribute); attribute None means the module itself
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "data": ("biosae.data", None),
    "read": ("biosae.read", None),
    "encoders": ("biosae.encoders", None),
    "embeddings": ("biosae.embeddings", None),
    "sae": ("biosae.sae", None),
    "stats": ("biosae.stats", None),
    "interpret": ("biosae.interpret", None),
    "search": ("biosae.search", None),
    "export": ("biosae.export", None),
    "atlas": ("biosae.atlas", None),
    "pl": ("biosae.pl", None),
    "pipeline": ("biosae.pipeline", None),
    "errors": ("biosae.errors", None),
    "Samples": ("biosae.data.samples", "Samples"),
    "Embeddings": ("biosae.embeddings.store", "Embeddings"),
    "encode": ("biosae.latents", "encode"),
    "report": ("biosae.reports", "report"),
}

__all__ = sorted([*_PUBLIC, "settings"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'biosae' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
