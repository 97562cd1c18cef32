"""Bytes of an image file -> ``uint8`` RGB (or the labels of a mask), or a :class:`~biosae.data.ReadError`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from biosae.data.items import ReadError
from biosae.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
MAX_BYTES = 2**30
_ZERO_TAIL = 64  # so many zero bytes do not end a healthy compressed stream
_PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _BITS, _COMPRESSION = 262, 284, 339, 258, 259  # TIFF tags
_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"adobe.xmp")  # where a PNG may keep its orientation


class ImageReader:
    """Reader of image files, one file a sample.

    Parameters
    ----------
    size
        Expected size in pixels, ``(width, height)`` or one number for squares; another size is a ``wrong_size``
        error. ``None`` accepts any size.
    page
        Page of multi-page files, counted from 0. ``None`` refuses files with several pages.
    """

    def __init__(self, *, size: int | tuple[int, int] | None = None, page: int | None = None) -> None:
        self.size = _checked_size(size)
        self.page = page

    def __call__(self, row: Mapping[str, Any]) -> np.ndarray:
        """Decode ``row["path"]``: ``uint8 (H, W, 3)``."""
        return decode(row["path"], size=self.size, page=self.page)

    def mask(self, row: Mapping[str, Any]) -> np.ndarray:
        """Part labels of ``row["mask"]``, ``uint8`` or ``uint16 (H, W)``; see :func:`mask_of`."""
        return mask_of(row, page=self.page)

    def spec(self) -> dict[str, Any]:
        """Settings that rebuild this reader."""
        return {"kind": "image", "size": None if self.size is None else list(self.size), "page": self.page}


def decode(
    source: bytes | str | os.PathLike, *, size: int | tuple[int, int] | None = None, page: int | None = None
) -> np.ndarray:
    """Decode a JPEG, PNG, TIFF, WebP or BMP to RGB.

    EXIF (and TIFF) orientation is applied. Grey, palette, 1-bit and CMYK become RGB; colour profiles are ignored.
    Transparency is composited on white. 16-bit values are scaled over the full range of the type: grey is rounded
    (``round(v / 257)``, 65535 -> 255), colour keeps the high byte (``v // 256``), which is at most one level from it.

    Parameters
    ----------
    source
        The file's bytes, or its path.
    size
        Expected ``(width, height)`` after orientation, one number for squares, or None.
    page
        Page of a multi-page file, from 0; None refuses such files.

    Returns
    -------
    ``uint8 (H, W, 3)``, RGB.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable``, ``unsupported`` or ``wrong_size``.
    """
    size = _checked_size(size)
    data = source if isinstance(source, bytes) else _read(source)
    kind = _kind(data)
    cut = _cut_short(data, kind)
    if cut:
        raise ReadError("truncated", cut)
    rgb = _guarded(io.BytesIO(data), kind, page, _rgb)
    height, width = rgb.shape[:2]
    if size is not None and (width, height) != size:
        raise ReadError("wrong_size", f"{width} x {height} pixels instead of {size[0]} x {size[1]}")
    return rgb


def image_size(path: str | os.PathLike, *, page: int | None = None) -> tuple[int, int]:
    """Width and height in pixels that :func:`decode` will give, from the file's header alone.

    Raises
    ------
    ReadError
        As :func:`decode`, as far as the header shows it.
    """
    data = _read(path)  # from memory: a damaged length makes a file's read() allocate it
    return _guarded(io.BytesIO(data), _kind(data), page, lambda image: _shown_size(image, data))


def decode_mask(source: bytes | str | os.PathLike, *, page: int | None = None) -> np.ndarray:
    """Decode a file of part labels: whole numbers, as they are stored.

    PNG, TIFF, BMP and lossless WebP; palette files give the numbers of the palette's entries, 1-bit files 0 and 1,
    colour files must have three equal channels. The orientation is applied, nothing is scaled.

    Returns
    -------
    ``uint8 (H, W)``, or ``uint16`` for files of 16 bits.

    Raises
    ------
    ReadError
        As :func:`decode`; ``unsupported`` for JPEG (its compression alters labels), for colours and fractions.
    """
    data = source if isinstance(source, bytes) else _read(source)
    kind = _kind(data)
    if kind == "JPEG":
        raise ReadError("unsupported", "JPEG alters labels at their edges; store masks as PNG")
    cut = _cut_short(data, kind)
    if cut:
        raise ReadError("truncated", cut)
    return _guarded(io.BytesIO(data), kind, page, _labels)


def mask_of(row: Mapping[str, Any], *, page: int | None = None) -> np.ndarray:
    """Labels of ``row["mask"]``, checked to be of the size of the image ``row["path"]`` as it is shown.

    Raises
    ------
    ReadError
        ``missing`` where the row names no mask, ``wrong_size`` if the sizes differ, ``unsupported`` if the image is
        stored turned and nothing tells whether its mask is too, else as :func:`decode_mask`.
    """
    if not isinstance(row["mask"], str):
        raise ReadError("missing", "this sample has no mask")
    mask, image = _read(row["mask"]), _read(row["path"])
    labels = decode_mask(mask)
    turn, stored = _guarded(io.BytesIO(image), _kind(image), page, lambda opened: _placed(opened, image))
    width, height = _shown(turn, stored)
    if labels.shape != (height, width):
        raise ReadError(
            "wrong_size",
            f"the mask has {labels.shape[1]} x {labels.shape[0]} pixels, its image {width} x {height}; they must agree",
        )
    if (turn or 1) != 1 and labels.shape == stored[::-1]:  # both would fit: as stored, and as shown
        said = _guarded(io.BytesIO(mask), _kind(mask), None, lambda opened: _placed(opened, mask)[0])
        if said is None:
            raise ReadError(
                "unsupported",
                f"the image is stored turned (orientation {turn}) and its mask states none: turn the image's pixels "
                f"and drop its orientation, or state the mask's: 1 if it was drawn on the image as shown, {turn} if on "
                "the pixels as stored",
            )
    return labels


def _guarded(stream: Any, kind: str, page: int | None, use: Callable[[Image.Image], Any]) -> Any:
    """Open an image and use it; whatever a decoder raises becomes a ReadError."""
    tolerated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(stream, formats=FORMATS) as image:
            _seek(image, page)
            return use(image)
    except (ReadError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ReadError("unsupported", f"too many pixels for a whole-image read ({error})") from None
    except Image.UnidentifiedImageError:
        what = " of this sample type or number of channels; convert it to 8- or 16-bit grey or RGB"
        raise ReadError(
            "unsupported" if kind == "TIFF" else "unreadable", f"cannot read a {kind} file{what * (kind == 'TIFF')}"
        ) from None
    except Exception as error:  # decoders raise many types on damaged files; none may end a long run
        text = f"{kind}: {error}"
        truncated = any(word in text.lower() for word in ("truncated", "could not create decoder object"))
        raise ReadError("truncated" if truncated else "unreadable", text) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerated


def _kind(data: bytes) -> str:
    kind = _sniff(data)
    if kind is None:
        raise ReadError("unsupported", f"not a JPEG, PNG, TIFF, WebP or BMP file (begins with {data[:8]!r})")
    return kind


def _checked_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, np.integer)) else tuple(size)
    if len(pair) != 2 or any(int(s) != s or s < 1 for s in pair):
        raise InputError(f"size={size!r} must be (width, height) in pixels, or one number for squares")
    return int(pair[0]), int(pair[1])


def _read(path: str | os.PathLike) -> bytes:
    path = Path(path)
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MAX_BYTES:
            raise ReadError(
                "unsupported", f"{n_bytes / 2**30:.1f} GiB is no tile or single image; cut it into tiles first"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        hint = "; its name holds backslashes, write / instead" if "\\" in str(path) and os.sep == "/" else ""
        raise ReadError("missing", f"no file {path}{hint}") from None
    except OSError as error:
        raise ReadError("unreadable", f"{error.strerror or error}: {path}") from None
    if not data.strip(b"\0"):
        raise ReadError("empty", f"{len(data)} bytes, all zero" if data else "0 bytes")
    return data


def _sniff(data: bytes) -> str | None:
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else None
    magics = {
        b"\xff\xd8": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"BM": "BMP",
        b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    }  # fmt: skip
    return next((kind for magic, kind in magics.items() if data.startswith(magic)), None)


def _cut_short(data: bytes, kind: str) -> str | None:
    """What shows that a file is incomplete, including a tail of zeros that decoders take for data; None if nothing."""
    if kind == "PNG" and b"IEND" not in data:
        return "PNG without its end"
    if kind == "JPEG" and data.endswith(b"\0\0") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        return "JPEG whose end is zeros"
    if kind == "WEBP":
        stated = int.from_bytes(data[4:8], "little") + 8
        if len(data) < stated:
            return f"WebP of {len(data)} bytes instead of {stated}"
        if data.endswith(bytes(_ZERO_TAIL)):
            return "WebP whose end is zeros"
    if kind == "TIFF" and data[2:3] != b"+" and data[3:4] != b"+":
        directory = int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
        if directory >= len(data):
            return f"TIFF of {len(data)} bytes whose directory begins at byte {directory}"
    return None


def _seek(image: Image.Image, page: int | None) -> None:
    n_pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # an MPO's first picture is the photograph
    if page is None and n_pages > 1:
        raise ReadError("unsupported", f"{image.format} with {n_pages} pages; pass page=0 to read the first")
    if page is not None and not 0 <= page < n_pages:
        raise ReadError("missing", f"no page {page}; the file has {n_pages}")
    if n_pages > 1:
        image.seek(page)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ReadError(
            "unsupported", f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS"
        )


def _check_kind(image: Image.Image) -> None:
    """Refuse files whose values Pillow would misread, or that have no natural scale to 8 bits."""
    if image.format == "TIFF":
        tags = image.tag_v2
        if set(np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1))) - {1, 4}:
            raise ReadError("unsupported", "TIFF of floats or signed numbers has no natural scale; store 8 or 16 bits")
        bits = int(np.max(tags.get(_BITS, 1)))
        if tags.get(_PLANAR) == 2 and bits == 16 and tags.get(_COMPRESSION, 1) == 1 and image.mode != "I;16":
            raise ReadError("unsupported", "uncompressed 16-bit TIFF with separate colour planes; store it interleaved")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ReadError("unsupported", f"{image.format} with 32-bit values has no natural scale; store 8 or 16 bits")


def _rgb(image: Image.Image) -> np.ndarray:
    _check_kind(image)
    return _to_rgb(image)


def _shown_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Width and height once the orientation is applied."""
    return _shown(*_placed(image, data))


def _shown(turn: int | None, stored: tuple[int, int]) -> tuple[int, int]:
    return stored[::-1] if turn in (5, 6, 7, 8) else stored


def _placed(image: Image.Image, data: bytes) -> tuple[int | None, tuple[int, int]]:
    """Orientation, None if the file states none, and width and height as stored."""
    size = image.size
    if image.format == "TIFF":  # its own size may or may not be turned yet, by version of Pillow
        turn, size = image.tag_v2.get(_ORIENTATION), (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT])
    elif image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        turn = None  # looking for it would decode the image
    else:
        turn = image.getexif().get(_ORIENTATION)
    return turn, (int(size[0]), int(size[1]))


def _labels(image: Image.Image) -> np.ndarray:
    _check_kind(image)
    raw = image.tile[0][3] if image.tile else ""
    stored = raw if isinstance(raw, str) else str(raw[0] if raw else "")  # Pillow's word for how pixels are stored
    image.load()
    image = ImageOps.exif_transpose(image)
    values = np.asarray(image)
    if image.mode in ("1", "L"):
        values = _unscaled(values.astype(np.uint8), stored.partition(";")[2], 1 if image.mode == "1" else 255)
    if image.mode in ("RGB", "RGBA", "LA") and values.ndim == 3:
        colours = values[:, :, : 1 if image.mode == "LA" else 3]
        if not (colours == colours[:, :, :1]).all():
            raise ReadError("unsupported", "a mask of colours; store one whole number a pixel (grey or palette PNG)")
        values = colours[:, :, 0]
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ReadError("unsupported", f"a mask in colour mode {image.mode!r}; store one whole number a pixel")
    if image.mode.startswith("I"):
        return values.astype(np.uint16)
    return values.astype(np.uint8)


def _unscaled(values: np.ndarray, stored: str, top: int) -> np.ndarray:
    """Undo what Pillow does to grey values for the eye: ``I`` inverts where white is zero, 2 and 4 bits become 8."""
    values = top - values if "I" in stored else values
    return values // {"2": 85, "4": 17}.get(stored[:1], 1)


def _to_rgb(image: Image.Image) -> np.ndarray:
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32)
        if white_is_zero:  # Pillow inverts 8-bit images only
            grey = 65535 - grey
        grey = ((grey + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return np.array(image.convert("RGB"))
    except ValueError:
        raise ReadError("unsupported", f"cannot turn colour mode {image.mode!r} into RGB") from None
