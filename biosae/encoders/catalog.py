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
LIBRARIES = ("timm", "open_clip", "biosae", "braindecode", "torchxrayvision")
"""Libraries that biosae loads itself; entries of another library are facts only."""


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about one encoder. A value of None is not known.

    ``catalog.toml`` explains every field and marks those that no source confirms (``unconfirmed``).
    """

    name: str
    domain: str = "unknown"
    item: str = "image"
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
    rate: float | None = None
    unit: str | None = None
    channels: tuple[str, ...] | None = None
    n_channels: int | None = None
    seconds: float | None = None
    amplitude: str | None = None
    band: tuple[float, float] | None = None
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

    @property
    def loadable(self) -> bool:
        """Whether biosae can load it; other entries are facts only."""
        known = self.library in LIBRARIES and (self.library != "braindecode" or self.arch is not None)
        return known and not self.needs_remote_code


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
    for key in ("unconfirmed", "channels", "band"):
        if key in values:
            values[key] = tuple(values[key])
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


def table(
    domain: str | None = None,
    *,
    item: str | None = None,
    licence: str | None = None,
    gated: bool | None = None,
    loadable: bool | None = None,
) -> pd.DataFrame:
    """The catalogue as a table, one row an encoder (index ``name``); each argument keeps the entries that agree with
    it.

    Parameters
    ----------
    domain
        ``"pathology"``, ``"radiology"``, ``"EEG"``, ``"ECG"``, ``"wearable"``, ``"ecology"``, ``"general"``; case does
        not matter.
    item
        Kind of item that the encoder takes: ``"image"``, ``"signal"`` or ``"features"``.
    licence
        Part of the licence's name, such as ``"MIT"`` or ``"non-commercial"``; case does not matter.
    gated
        True: only those whose weights need an accepted licence; False: only the others.
    loadable
        True: only those that biosae loads; False: only entries that are facts.

    Returns
    -------
    pandas.DataFrame
        The fields of :class:`EncoderInfo` without the constructor arguments, and ``loadable``. Empty where nothing
        agrees.

    Raises
    ------
    InputError
        If no entry at all has that domain, item or licence.
    """
    import pandas as pd

    entries = list(catalogue().values())
    for key, value in (("domain", domain), ("item", item)):
        present = {getattr(e, key) for e in catalogue().values()}
        if value is not None and value.lower() not in {p.lower() for p in present}:
            raise InputError(f"no {key} {value!r}; {nearest(value, sorted(present))}")
        entries = [e for e in entries if value is None or getattr(e, key).lower() == value.lower()]
    if licence is not None:
        present = {e.licence for e in catalogue().values()}
        if not any(licence.lower() in p.lower() for p in present):
            raise InputError(f"no licence {licence!r}; {nearest(licence, sorted(present))}")
        entries = [e for e in entries if licence.lower() in e.licence.lower()]
    entries = [e for e in entries if gated in (None, e.gated) and loadable in (None, e.loadable)]
    names = [f.name for f in fields(EncoderInfo) if f.name not in ("args", "hub_args")]
    frame = pd.DataFrame([{n: getattr(e, n) for n in names} for e in entries], columns=names).set_index("name")
    frame.insert(3, "loadable", [e.loadable for e in entries])
    return frame
