"""Samples: a table, a way to read item i, checks, splits, synthetic cohorts with planted truth; public data sets."""

from biosae.data.failures import FailureLog, read_failures
from biosae.data.fetch import fetch, verify
from biosae.data.items import READERS, ReadError
from biosae.data.manifests import Manifest, info
from biosae.data.manifests import table as list
from biosae.data.phantom import nuclei, phantom
from biosae.data.samples import Samples
from biosae.data.splits import split

__all__ = [
    "READERS",
    "FailureLog",
    "Manifest",
    "ReadError",
    "Samples",
    "fetch",
    "info",
    "list",
    "nuclei",
    "phantom",
    "read_failures",
    "split",
    "verify",
]
