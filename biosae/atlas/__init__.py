"""A page to look at every latent of a run, doubt it, and name it."""

from biosae.atlas.page import build

__all__ = ["build"]
