"""Values for the page: small, plain, and never able to end the script tag that holds them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
LEVELS = 127
"""Steps of a quantised code on either side of 0."""


def script_json(value: Any) -> str:
    """JSON that may stand inside a script tag: no character of it can end the tag or begin another.

    >>> script_json({"label": "</script>"})
    '{"label":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(_ESCAPES.get(c, c) for c in text) if any(c in text for c in _ESCAPES) else text


def number(value: Any, *, digits: int = 4) -> float | int | None:
    """A number with ``digits`` significant digits; None for what is missing or infinite.

    >>> number(0.123456), number(float("nan")), number(12.0)
    (0.1235, None, 12)
    """
    value = float(value) if value is not None else math.nan
    if not math.isfinite(value):
        return None
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def numbers(values: Iterable[Any], *, digits: int = 4) -> list[float | int | None]:
    """Each of them as :func:`number`."""
    return [number(v, digits=digits) for v in values]


def texts(values: Iterable[Any]) -> tuple[list[str], list[int]]:
    """Distinct texts in order of their first appearance, and for each value its place among them (-1: missing)."""
    known: dict[str, int] = {}
    at = []
    for value in values:
        missing = value is None or (isinstance(value, float) and math.isnan(value)) or value == ""
        at.append(-1 if missing else known.setdefault(str(value), len(known)))
    return list(known), at


def bytes_text(array: np.ndarray) -> str:
    """Bytes of an array, little-endian in C order, as base64."""
    array = np.ascontiguousarray(array)
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode()


def quantised(values: np.ndarray, scale: float) -> np.ndarray:
    """Codes as int8 in steps of ``scale / 127``; a code that is not 0 does not become 0.

    Parameters
    ----------
    values : ndarray
    scale : float
        Largest absolute value that can be written.
    """
    if scale <= 0:
        return np.zeros(values.shape, np.int8)
    steps = np.rint(values / scale * LEVELS)
    steps = np.where((steps == 0) & (values != 0), np.sign(values), steps)
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8)
