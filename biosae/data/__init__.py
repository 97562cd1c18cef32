"""Samples: a table, a way to read item i, checks, splits, and synthetic cohorts with planted truth."""

from biosae.data.samples import READERS, ReadError, Samples

__all__ = ["READERS", "ReadError", "Samples"]
