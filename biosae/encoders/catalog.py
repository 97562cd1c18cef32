"""The named encoders and the facts about them, read from ``catalog.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Channel means and standard deviations (red, green, blue, on the 0..1 scale) that have a name."""
PREPROCESSING = ("size", "mean", "std", "interpolation", "crop_pct")
"""Fields of an entry that say how an image becomes the network's input."""
LIBRARIES = ("timm", "open_clip", "biosae")
"""Libraries that biosae loads itself; entries of another library are facts only."""


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about one encoder. A value of None is not known.

    ``catalog.toml`` explains every field and marks those that no source confirms (``unconfirmed``).
    """

    name: str
    domain: str = "unknown"
    library: str = "timm"
    source: str = ""
    arch: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    hub_args: dict[str, Any] = field(default_factory=dict)
    width: int | None = None
    depth: int | None = None
    patch: int | None = None
    prefix: int | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    mpp: float | None = None
    pool: str = "head"
    licence: str = "unknown"
    gated: bool = False
    derivatives_restricted: bool | None = None
    needs_remote_code: bool = False
    sha256: str | None = None
    timm_pinned: str | None = None
    instead: str | None = None
    note: str | None = None
    facts: str = ""
    unconfirmed: tuple[str, ...] = ()

    @property
    def repository(self) -> str | None:
        """Repository on the hub (``organisation/name``), or None."""
        return self.source.removeprefix("hf-hub:") if self.source.startswith("hf-hub:") else None


def canonical(name: str) -> str:
    """Catalogue spelling of a name: lower case, hyphens.

    >>> canonical("MobileNetV2_ImageNet")
    'mobilenetv2-imagenet'
    """
    return str(name).strip().lower().replace("_", "-")


def _entry(name: str, values: dict[str, Any]) -> EncoderInfo:
    values = dict(values)
    for i, key in enumerate(("mean", "std")):
        if isinstance(values.get(key), str):
            values[key] = STATISTICS[values[key]][i]
        elif key in values:
            values[key] = tuple(float(v) for v in values[key])
    values["unconfirmed"] = tuple(values.get("unconfirmed", ()))
    return EncoderInfo(name=name, **values)


@cache
def catalogue() -> dict[str, EncoderInfo]:
    """Every entry of ``catalog.toml``, by name."""
    with open(Path(__file__).with_name("catalog.toml"), "rb") as stream:
        return {name: _entry(name, values) for name, values in tomllib.load(stream).items()}


def info(name: str) -> EncoderInfo:
    """Facts about a named encoder; nothing is loaded.

    Parameters
    ----------
    name
        Catalogue name; case does not matter, and ``_`` counts as ``-``.

    Raises
    ------
    InputError
        If the catalogue has no such name; the message gives the nearest one.
    """
    entries = catalogue()
    key = canonical(name)
    if key not in entries:
        raise InputError(f"no encoder is named {name!r}; {nearest(key, sorted(entries))}")
    return entries[key]


def table(domain: str | None = None) -> pd.DataFrame:
    """The catalogue as a table, one row an encoder (index ``name``).

    Parameters
    ----------
    domain
        Keep only this domain (``"pathology"``, ``"general"``, ``"ecology"``).

    Returns
    -------
    pandas.DataFrame
        The fields of :class:`EncoderInfo` without the constructor arguments, and ``loadable`` (False for entries that
        are facts only).

    Raises
    ------
    InputError
        If no entry has that domain.
    """
    import pandas as pd

    entries = [e for e in catalogue().values() if domain in (None, e.domain)]
    if not entries:
        raise InputError(f"no domain {domain!r}; {nearest(str(domain), {e.domain for e in catalogue().values()})}")
    names = [f.name for f in fields(EncoderInfo) if f.name not in ("args", "hub_args")]
    rows = [{n: getattr(e, n) for n in names} for e in entries]
    frame = pd.DataFrame(rows).set_index("name")
    frame.insert(2, "loadable", [e.library in LIBRARIES and not e.needs_remote_code for e in entries])
    return frame
