"""One settings object: folders, verbosity, workers, seed, device, network.

Every field can be set in Python (``biosae.settings.offline = True``) or by an environment variable
(``BIOSAE_OFFLINE=1``, ``BIOSAE_CACHE_DIR=...``), read once when the package is first used.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from biosae.errors import InputError, nearest

_TRUE = {"1", "true", "yes", "on"}


def _cache_home() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home()))
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


@dataclass
class Settings:
    """Package-wide settings. Unknown names are errors that name the nearest valid one."""

    cache_dir: Path = field(default_factory=lambda: _cache_home() / "biosae")
    """Where downloaded weights and data sets are kept."""
    data_dir: Path = field(default_factory=lambda: Path("data"))
    """Where data sets named by a manifest are looked for."""
    weights_dirs: tuple[Path, ...] = ()
    """Folders searched for encoder weights by name, before any hub (``BIOSAE_WEIGHTS_DIRS``, os.pathsep-joined)."""
    n_jobs: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    """Worker processes for decoding."""
    random_state: int = 0
    """Seed used where a function's ``random_state`` is left at its default by the command line."""
    device: str = "auto"
    """``auto`` (CUDA, then Apple MPS, then CPU) or a torch device string."""
    offline: bool = field(default_factory=lambda: os.environ.get("HF_HUB_OFFLINE", "0").lower() in _TRUE)
    """True forbids every download."""
    progress: bool = True
    """Show progress bars."""

    def __setattr__(self, name: str, value: object) -> None:
        names = [f.name for f in fields(self)]
        if name not in names:
            raise InputError(f"biosae has no setting {name!r}; {nearest(name, names)}")
        if name in ("cache_dir", "data_dir"):
            value = Path(value).expanduser()
        if name == "weights_dirs":
            folders = [value] if isinstance(value, str | os.PathLike) else value
            value = tuple(Path(p).expanduser() for p in folders)
        object.__setattr__(self, name, value)

    @classmethod
    def from_environment(cls) -> Settings:
        """Defaults overridden by ``BIOSAE_<FIELD>`` variables."""
        found: dict[str, object] = {}
        for f in fields(cls):
            raw = os.environ.get(f"BIOSAE_{f.name.upper()}")
            if raw is None:
                continue
            if f.name in ("n_jobs", "random_state"):
                try:
                    found[f.name] = int(raw)
                except ValueError:
                    raise InputError(f"BIOSAE_{f.name.upper()}={raw!r} is not a whole number") from None
            elif f.name in ("offline", "progress"):
                found[f.name] = raw.lower() in _TRUE
            elif f.name == "weights_dirs":
                found[f.name] = tuple(Path(p) for p in raw.split(os.pathsep) if p)
            else:
                found[f.name] = raw
        return cls(**found)


settings = Settings.from_environment()


def resolve_device(device: str | None = None) -> str:
    """A torch device that can be used: None and ``"auto"`` mean ``settings.device``, and if that too is ``"auto"``,
    ``"cuda"``, ``"mps"`` or ``"cpu"``, whichever is there first.

    Raises
    ------
    InputError
        If there is no such device on this machine.
    """
    import torch

    device = str(settings.device if device in (None, "auto") else device)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, usable in present.items() if usable)
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"device={device!r}; {nearest(device, ('auto', *present, 'cuda:0'))}") from None
    if not present.get(kind, True):
        raise InputError(f"device={device!r}, but torch finds no usable {kind} device here; use 'auto' or 'cpu'")
    return device
