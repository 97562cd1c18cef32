"""What a latent means: examples, maps, concepts, explanations, stress tests, names."""

from __future__ import annotations

from biosae.interpret.examples import examples

__all__ = ["examples"]
