"""Where a result came from: versions, hashes, seeds, licences. One record that every noun carries and extends."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

PACKAGES = (
    "biosae", "numpy", "scipy", "pandas", "torch", "torchvision", "timm", "open-clip-torch", "anndata", "scanpy",
    "scikit-learn", "statsmodels", "matplotlib", "pyarrow", "pillow", "safetensors",
)  # fmt: skip


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package (None where absent), without importing any of them."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def record(**extra: Any) -> dict[str, Any]:
    """Provenance record: software versions, Python and platform, and what the caller adds.

    There is no clock time, host name or user name in it, so that two runs of the same work give the same bytes and
    no identifier leaves the machine. Times go to the run's ``log.csv``.
    """
    return {"versions": versions(), "python": platform.python_version(), "system": platform.system(), **extra}
