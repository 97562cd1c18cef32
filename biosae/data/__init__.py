"""Samples: a table, a way to read item i, checks, splits, and synthetic cohorts with planted truth."""

from biosae.data.failures import FailureLog, read_failures
from biosae.data.phantom import nuclei, phantom
from biosae.data.samples import READERS, ReadError, Samples
from biosae.data.splits import split

__all__ = ["READERS", "FailureLog", "ReadError", "Samples", "nuclei", "phantom", "read_failures", "split"]
