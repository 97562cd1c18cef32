"""Frozen encoders: a catalogue of facts, loading that cannot end in random weights, layers, pooling and tokens.

Names are loaded on first use; ``import biosae.encoders`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC: dict[str, tuple[str, str]] = {
    "list": ("biosae.encoders.catalog", "table"),
    "info": ("biosae.encoders.catalog", "info"),
    "check": ("biosae.encoders.checking", "check"),
    "load": ("biosae.encoders.loading", "load"),
    "Encoder": ("biosae.encoders.base", "Encoder"),
    "EncoderInfo": ("biosae.encoders.catalog", "EncoderInfo"),
    "EncoderCheck": ("biosae.encoders.checking", "EncoderCheck"),
    "Preprocess": ("biosae.encoders.preprocess", "Preprocess"),
    "SignalPreprocess": ("biosae.encoders.signals", "SignalPreprocess"),
    "SignalEncoder": ("biosae.encoders.signals", "SignalEncoder"),
    "fingerprint": ("biosae.encoders.base", "fingerprint"),
    "massive_activations": ("biosae.encoders.massive", "massive_activations"),
    "massive_values": ("biosae.encoders.massive", "massive_values"),
    "text_tower": ("biosae.encoders.text", "text_tower"),
    "embed": ("biosae.embeddings.extract", "embed"),
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'biosae.encoders' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
