"""Latents and SAEs in the formats of other tools."""
