"""From an image to a network's input: rescale, resize, crop, normalise. Picklable, so that workers can run it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "area")
RESIZES = ("shorter", "squash", "crop")


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of one encoder, ``uint8 (H, W, 3)`` to ``float32 (3, h, w)``.

    Parameters
    ----------
    mean, std
        Per channel (red, green, blue), on the 0..1 scale: ``(x / 255 - mean) / std``.
    size
        Side of the square input in pixels; None keeps the image's own size.
    interpolation
        ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, or ``area`` (mean of the covered pixels where the image
        shrinks, bilinear where it grows).
    crop_pct
        The shorter side is resized to ``floor(size / crop_pct)``, then the centre is cropped to ``size``.
    resize
        ``"shorter"`` (as above), ``"squash"`` (both sides to ``size``; the aspect ratio is lost) or ``"crop"`` (the
        largest centred square, resized to ``size``).
    grey
        The network takes one channel: the luminance ``0.299 R + 0.587 G + 0.114 B`` rounded to whole grey values, which
        is the value itself where R = G = B. ``mean`` and ``std`` then count by their first value.
    tile_mpp, target_mpp
        Micrometres per pixel of the images given and of the images that the encoder was made for.
    match_mpp
        Rescale by ``tile_mpp / target_mpp`` so that the physical scale is the encoder's, and then only crop.
        Without it, ``size`` alone decides and the physical scale is whatever results.
    min_size
        Least side in pixels that the network takes.

    Notes
    -----
    Resizing is Pillow's, with its antialiasing, and the order of operations is that of torchvision's evaluation
    transform (Resize, CenterCrop, ToTensor, Normalize), so that both give the same numbers.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int | None = None
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    resize: str = "shorter"
    tile_mpp: float | None = None
    target_mpp: float | None = None
    match_mpp: bool = False
    min_size: int = 1
    grey: bool = False

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"no interpolation {self.interpolation!r}; {nearest(self.interpolation, INTERPOLATIONS)}")
        if self.resize not in RESIZES:
            raise InputError(f"no resize mode {self.resize!r}; {nearest(self.resize, RESIZES)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean and std need three values and std > 0; got {self.mean} and {self.std}")
        if self.size is not None and self.size < 1:
            raise InputError(f"size must be at least 1 px, got {self.size}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be in (0, 1], got {self.crop_pct}")
        for name in ("tile_mpp", "target_mpp"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be micrometres per pixel above 0, got {value}")
        if self.match_mpp and (self.tile_mpp is None or self.target_mpp is None):
            raise InputError(
                "match_mpp=True needs the tiles' micrometres per pixel (mpp=...) and an encoder whose own is known"
            )

    @property
    def rescale(self) -> float:
        """Factor by which sides are multiplied to reach the encoder's physical scale (1.0 where it is not matched)."""
        return self.tile_mpp / self.target_mpp if self.match_mpp else 1.0

    def mpp_of_input(self, width: int, height: int) -> float | None:
        """Micrometres per pixel of the network's input for an image of this size in pixels; None if unknown.

        For ``resize="squash"`` that of the geometric mean of both sides.
        """
        if self.tile_mpp is None or self.match_mpp or self.size is None:
            return self.target_mpp if self.match_mpp else self.tile_mpp
        if self.resize == "squash":
            return self.tile_mpp * math.sqrt(width * height) / self.size
        return self.tile_mpp * min(width, height) / self._shorter

    @property
    def _shorter(self) -> int:
        """What the shorter side is resized to."""
        return self.size if self.resize == "crop" else math.floor(self.size / self.crop_pct)

    def spec(self) -> dict[str, Any]:
        """Everything that determines the numbers for a tile of the encoder's own scale, as plain JSON values.

        The tiles' own mpp is not in it: two cohorts brought to the same physical scale share a specification.
        """
        values = asdict(self)
        for name in ("tile_mpp", "target_mpp", "match_mpp", "min_size"):
            del values[name]
        if not values["grey"]:
            del values["grey"]
        values["rescale_to_mpp"] = self.target_mpp if self.match_mpp else None
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """Preprocess one image.

        Parameters
        ----------
        image
            ``uint8 (H, W, 3)``, RGB.

        Returns
        -------
        torch.Tensor
            ``float32 (3, h, w)``, or ``(1, h, w)`` if ``grey``; ``h = w = size`` unless ``size`` is None.

        Raises
        ------
        InputError
            If the image is not ``uint8 (H, W, 3)``, or is too small for the network after rescaling.
        """
        import torch
        from PIL import Image

        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"an image must be uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}")
        picture = Image.fromarray(image)
        picture = self._resized(picture.convert("L") if self.grey else picture)
        if min(picture.size) < self.min_size:
            raise InputError(
                f"the image is {picture.width} x {picture.height} px after rescaling by {self.rescale:.3g}, and the "
                f"network needs {self.min_size}: give larger tiles, or size={self.min_size} or more to enlarge them"
            )
        values = np.array(picture).reshape(picture.height, picture.width, -1)
        pixels = torch.from_numpy(values).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean, std = (torch.tensor(v[: len(pixels)], dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)

    def coverage(self, part: np.ndarray) -> np.ndarray:
        """Which share of each pixel of the network's input a part of the image fills, by the same geometry.

        Parameters
        ----------
        part
            Boolean (H, W), aligned with the image.

        Returns
        -------
        ndarray
            ``float32 (h, w)`` from 0 to 1: the mean over the covered pixels where the image shrinks.
        """
        from PIL import Image

        part = np.asarray(part)
        if part.ndim != 2:
            raise InputError(f"a part of an image must be (H, W), got shape {part.shape}")
        alone = replace(self, interpolation="area")
        return np.asarray(alone._resized(Image.fromarray(part.astype(np.float32))), np.float32)

    def _resized(self, picture: Image) -> Image:
        if self.match_mpp and self.rescale != 1.0:
            picture = self._to(
                picture, max(1, round(picture.width * self.rescale)), max(1, round(picture.height * self.rescale))
            )
        if self.size is None:
            return picture
        if self.match_mpp:
            if min(picture.size) < self.size:
                need = self.size * self.target_mpp
                raise InputError(
                    f"at {self.target_mpp} um/px the tile has {min(picture.size)} px, and the encoder needs "
                    f"{self.size} ({need:.0f} um): give larger tiles, or match_mpp=False to enlarge them"
                )
        elif self.resize == "crop":
            side = min(picture.size)
            left, top = picture.width // 2 - side // 2, picture.height // 2 - side // 2
            picture = self._to(picture.crop((left, top, left + side, top + side)), self.size, self.size)
        elif self.resize == "squash":
            picture = self._to(picture, self.size, self.size)
        else:
            short, scale = min(picture.size), self._shorter
            long = int(scale * max(picture.size) / short)
            wide = picture.width > picture.height
            picture = self._to(picture, long if wide else scale, scale if wide else long)
        left, top = (round((side - self.size) / 2.0) for side in picture.size)
        return picture.crop((left, top, left + self.size, top + self.size))

    def _to(self, picture: Image, width: int, height: int) -> Image:
        from PIL.Image import Resampling

        if picture.size == (width, height):
            return picture
        method = self.interpolation
        if method == "area":
            method = "box" if width <= picture.width and height <= picture.height else "bilinear"
        return picture.resize((width, height), Resampling[method.upper()])
