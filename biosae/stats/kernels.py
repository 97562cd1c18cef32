"""Which kernels work through sparse columns: numba's where it is there, else those in numpy and scipy."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType


@cache
def kernels() -> ModuleType:
    """The module with the functions of :mod:`biosae.stats.kernels_numpy`, which says what each computes."""
    found = importlib.util.find_spec("numba") is not None
    return importlib.import_module(f"biosae.stats.kernels_{'numba' if found else 'numpy'}")
