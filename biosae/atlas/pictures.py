"""Pictures of items, whole and small, in the largest size that the page's budget allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from biosae.errors import BiosaeError
from biosae.pl.gallery import read_picture
from biosae.settings import settings

SIDES = (224, 176, 144, 112, 88, 72)
"""Longer side of a picture, pixels, the first that fits."""
CHANNELS = 12
"""Channels that the picture of a signal has."""
_PROBED = 40
_QUALITY = 78
_TEXT = 4 / 3  # base64


def pictures(samples: Any, ids: Sequence[str], order: np.ndarray, *, budget: float) -> dict[str, Any]:
    """WebP pictures of items as base64, no more than ``budget`` bytes of text.

    Parameters
    ----------
    samples : biosae.Samples
    ids : sequence of str
        Names of the items.
    order : ndarray of int
        Which of them come first if not all fit.
    budget : float
        Bytes.

    Returns
    -------
    dict
        ``src`` (text or None for each id), ``why`` (for each without a picture the reason), ``side``, ``n_left_out``
        (for want of room).
    """
    side = _side(samples, [ids[i] for i in order], budget)
    src: list[str | None] = [None] * len(ids)
    why: dict[int, str] = {}
    spent, left_out = 0, 0
    wanted = [ids[i] for i in order]
    for at, found in zip(order, _read(samples, wanted, side)):
        if isinstance(found, str):
            why[int(at)] = found
        elif spent + len(found) * _TEXT > budget:
            why[int(at)], left_out = "no room in this page", left_out + 1
        else:
            spent += len(found) * _TEXT
            src[at] = base64.b64encode(found).decode()
    return {"src": src, "why": why, "side": side, "n_left_out": left_out}


def described(samples: Any, ids: Sequence[str]) -> str:
    """How large items are, in words: micrometres of images, seconds and channels of signals; empty where unknown."""
    shapes = set()
    for name in dict.fromkeys(ids[i] for i in (0, len(ids) // 2, -1)) if ids else ():
        try:
            shapes.add(np.asarray(samples[samples.obs.index.get_loc(name)]).shape[:2])
        except (BiosaeError, OSError, ValueError, KeyError):
            continue
    if len(shapes) != 1:
        return ""
    height, width = shapes.pop()
    kind = getattr(samples, "item", "image")
    if kind == "image" and getattr(samples, "mpp", None):
        return f"{width * samples.mpp:.3g} × {height * samples.mpp:.3g} µm"
    if kind != "signal":
        return ""
    names = [str(name) for name in getattr(samples, "channels", ())]
    shown = f"{', '.join(names[:CHANNELS])}, from above" if len(names) > 1 else "".join(names)
    left_out = f" (of {len(names)} channels)" if len(names) > CHANNELS else ""
    seconds = f"{width / samples.rate:.3g} s" if getattr(samples, "rate", None) else ""
    return "; ".join(text for text in (seconds, shown + left_out, "each on a scale of its own") if text)


def webp(image: np.ndarray, side: int) -> bytes:
    """An image as WebP, whole, its longer side at most ``side`` pixels."""
    from PIL import Image

    picture = Image.fromarray(np.asarray(image)).convert("RGB")
    scale = side / max(picture.size)
    if scale < 1:
        size = tuple(max(1, round(edge * scale)) for edge in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=_QUALITY, method=4)
    return buffer.getvalue()


def _side(samples: Any, ids: list[str], budget: float) -> int:
    """The largest side at which pictures of all items are expected to fit, from some of them."""
    if not ids:
        return SIDES[0]
    some = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, _PROBED).astype(int))]
    images = [image for name in some if not isinstance(image := read_picture(samples, name), str)]
    for side in SIDES:
        sizes = [len(webp(image, side)) for image in images] or [0]
        if np.mean(sizes) * _TEXT * 1.05 * len(ids) <= budget:
            return side
    return SIDES[-1]


def _read(samples: Any, ids: list[str], side: int) -> Iterator[bytes | str]:
    """Pictures, or reasons, in order. Images are read in threads; traces are drawn one after the other."""
    from tqdm.auto import tqdm

    def one(name: str) -> bytes | str:
        image = read_picture(samples, name)
        return image if isinstance(image, str) else webp(image, side)

    with ThreadPoolExecutor(4 if getattr(samples, "item", "image") == "image" else 1) as pool:
        yield from tqdm(pool.map(one, ids), total=len(ids), desc="pictures", disable=not settings.progress)
