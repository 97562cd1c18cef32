"""What a scanner does to a stained section: stain vectors, gamma, blur and JPEG, each with a chosen strength."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

# Reference haematoxylin and eosin directions in natural-log optical density (Macenko et al., ISBI 2009).
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
WHITE = 245.0


@dataclass(frozen=True)
class Scanner:
    """How one scanner departs from the reference.

    Attributes
    ----------
    haematoxylin, eosin
        Shift of the stain's direction in optical density (R, G, B); the shifted vector is scaled back to length 1.
    gamma
        Exponent on the transmitted light; 1 is none.
    blur
        Standard deviation of the Gaussian blur, in pixels.
    jpeg
        JPEG quality from 1 to 100; None stores the pixels without loss.
    """

    haematoxylin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    eosin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gamma: float = 1.0
    blur: float = 0.0
    jpeg: int | None = None

    def scaled(self, strength: float) -> Scanner:
        """The same scanner with its departure from the reference multiplied by ``strength`` (0 gives the reference)."""
        if strength == 0:
            return Scanner()
        return Scanner(
            haematoxylin=tuple(strength * v for v in self.haematoxylin),
            eosin=tuple(strength * v for v in self.eosin),
            gamma=self.gamma**strength,
            blur=strength * self.blur,
            jpeg=None if self.jpeg is None else int(np.clip(round(100 - strength * (100 - self.jpeg)), 10, 100)),
        )


# Four scanners that differ in all four respects. They stand for no product.
SCANNERS = (
    Scanner(haematoxylin=(0.07, -0.03, -0.07), eosin=(-0.04, 0.02, 0.03), gamma=0.90, blur=0.35, jpeg=92),
    Scanner(haematoxylin=(-0.05, 0.02, 0.05), eosin=(0.08, -0.03, -0.06), gamma=1.12, blur=0.75, jpeg=65),
    Scanner(haematoxylin=(0.02, 0.05, -0.03), eosin=(-0.02, 0.05, -0.06), gamma=1.05, blur=0.55, jpeg=80),
    Scanner(haematoxylin=(-0.02, -0.06, 0.08), eosin=(0.05, -0.05, 0.05), gamma=0.97, blur=0.15, jpeg=75),
)


def scan(haematoxylin: np.ndarray, eosin: np.ndarray, scanner: Scanner) -> np.ndarray:
    """Turn two stain concentration maps into the RGB image that a scanner would store.

    Transmitted light follows Beer-Lambert, ``I = white * exp(-(h * H + e * E)) ** gamma`` with unit stain vectors ``H``
    and ``E``; then blur, rounding to 8 bits and JPEG (4:2:0 chroma), in this order.

    Parameters
    ----------
    haematoxylin, eosin
        Concentration maps ``(height, width)``, optical density along the unit stain vector.
    scanner
        The scanner.

    Returns
    -------
    numpy.ndarray
        ``uint8 (height, width, 3)``.
    """
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    stains = STAINS + np.array([scanner.haematoxylin, scanner.eosin])
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    density = haematoxylin[..., None] * stains[0] + eosin[..., None] * stains[1]
    light = WHITE * np.exp(-scanner.gamma * density)
    if scanner.blur > 0:
        light = gaussian_filter(light, (scanner.blur, scanner.blur, 0), mode="nearest")
    image = np.clip(np.rint(light), 0, 255).astype(np.uint8)
    if scanner.jpeg is None:
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=scanner.jpeg, subsampling=2)
    with Image.open(buffer) as stored:
        return np.asarray(stored.convert("RGB"))
