"""Names of channels and units of signals: one spelling, conversions, bipolar derivations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from biosae.errors import InputError, nearest

# unit -> (dimension, factor to the dimension's base unit)
UNITS: dict[str, tuple[str, float]] = {
    "V": ("voltage", 1.0), "mV": ("voltage", 1e-3), "uV": ("voltage", 1e-6), "nV": ("voltage", 1e-9),
    "S": ("conductance", 1.0), "mS": ("conductance", 1e-3), "uS": ("conductance", 1e-6),
    "T": ("field", 1.0), "fT": ("field", 1e-15), "T/m": ("gradient", 1.0), "fT/cm": ("gradient", 1e-13),
    "g": ("acceleration", 1.0), "m/s2": ("acceleration", 1 / 9.80665),
    "degC": ("temperature", 1.0), "bpm": ("rate", 1.0), "s": ("time", 1.0), "ms": ("time", 1e-3),
    "mmHg": ("pressure", 1.0), "%": ("share", 1.0), "au": ("arbitrary", 1.0),
}  # fmt: skip
_UNIT_NAMES = {u.lower(): u for u in UNITS if u not in ("mV", "mS", "S", "s", "ms")}
_TYPES = "eeg|ecg|ekg|eog|emg|erg|meg|seeg|ecog|pol"
_SYNONYMS = {"t3": "t7", "t4": "t8", "t5": "p7", "t6": "p8", "mlii": "ii", "ml2": "ii", "mli": "i", "mliii": "iii"}


@lru_cache(maxsize=1024)
def canonical_unit(unit: str | None) -> str | None:
    """One spelling of a unit; None for what is no known unit.

    >>> canonical_unit("µV"), canonical_unit("uv"), canonical_unit("mV"), canonical_unit("NU")
    ('uV', 'uV', 'mV', None)
    """
    text = (unit or "").strip().replace("µ", "u").replace("μ", "u").replace("²", "2").replace("^2", "2")
    text = {
        "microV": "uV",
        "microvolt": "uV",
        "microvolts": "uV",
        "mv": "mV",
        "°C": "degC",
        "C": "degC",
        "deg C": "degC",
    }.get(text, text)
    return text if text in UNITS else _UNIT_NAMES.get(text.lower())


@lru_cache(maxsize=1024)
def factor(have: str, want: str) -> float:
    """Number by which values in one unit are multiplied to be in another.

    >>> factor("mV", "uV")
    1000.0

    Raises
    ------
    InputError
        If a unit is unknown, or they measure different things.
    """
    for unit in (have, want):
        if unit not in UNITS:
            raise InputError(f"no unit {unit!r}; {nearest(unit, UNITS)}")
    if UNITS[have][0] != UNITS[want][0]:
        raise InputError(f"{have} ({UNITS[have][0]}) cannot be turned into {want} ({UNITS[want][0]})")
    ratio = UNITS[have][1] / UNITS[want][1]
    return float(np.float64(f"{ratio:.15g}"))


@lru_cache(maxsize=4096)
def canonical_channel(name: str) -> str:
    """Key under which two spellings of an electrode or lead are the same.

    The type (``EEG``, ``ECG`` ...) in front, a common reference behind (``-REF``, ``-LE``, ``-Ref``), dots, blanks and
    case do not matter; the older names T3 T4 T5 T6 are T7 T8 P7 P8, and MLII is II, on both sides of a difference.

    >>> canonical_channel("EEG Fp1-REF"), canonical_channel("Fc5."), canonical_channel("T3-T5")
    ('fp1', 'fc5', 't7-p7')
    """
    key = re.sub(rf"^({_TYPES})[\s:_]+", "", str(name).strip().lower())
    key = re.sub(r"[\s_-]+(ref|le|avg|re)$", "", key)
    key = re.sub(r"[.\s_]+", "", key)
    return "-".join(_SYNONYMS.get(part, part) for part in key.split("-"))


def _type(name: str) -> str | None:
    """Type that stands in front of a name (``EOG 1`` is not ``EEG 1``), None if there is none."""
    found = re.match(rf"^({_TYPES})[\s:_]+", str(name).strip().lower())
    return found.group(1).replace("ekg", "ecg") if found else None


def is_trigger(name: str) -> bool:
    """Whether a channel of this name holds event codes and no signal.

    >>> is_trigger("Status"), is_trigger("STI 014"), is_trigger("Fz")
    (True, True, False)
    """
    return (
        re.fullmatch(r"(status|stim?[\s_]*\d*|trig(ger)?|events?|event marker|markers?)", name.strip().lower())
        is not None
    )


def find_channels(wanted: Sequence[str], present: Sequence[str]) -> list[tuple[int, int | None]]:
    """Where wanted channels stand among those of a record: ``(plus, minus)``, minus None for a channel as it is.

    ``"Fp1-F7"`` is a channel of this name where there is one, else the difference of two.

    Raises
    ------
    InputError
        If one is absent or its name fits several channels; the message lists what there is.
    """
    return list(_find(tuple(wanted), tuple(present)))


@lru_cache(maxsize=256)  # asked anew for every window
def _find(wanted: tuple[str, ...], present: tuple[str, ...]) -> tuple[tuple[int, int | None], ...]:
    keys = [canonical_channel(p) for p in present]

    def one(name: str) -> int | None:
        if name in present:
            at = [i for i, p in enumerate(present) if p == name]
        else:
            key = canonical_channel(name)
            kind = _type(name)
            at = [i for i, k in enumerate(keys) if k == key and (kind is None or _type(present[i]) in (None, kind))]
        if len(at) > 1:
            raise InputError(
                f"{name!r} fits {len(at)} channels ({', '.join(repr(present[i]) for i in at)}); use a full name"
            )
        return at[0] if at else None

    found: list[tuple[int, int | None]] = []
    for name in wanted:
        at = one(name)
        if at is not None:
            found.append((at, None))
            continue
        for cut in (i for i, letter in enumerate(name) if letter == "-"):
            plus, minus = one(name[:cut]), one(name[cut + 1 :])
            if plus is not None and minus is not None:
                found.append((plus, minus))
                break
        else:
            raise InputError(f"no channel {name!r}; {nearest(name, present)}")
    return tuple(found)
