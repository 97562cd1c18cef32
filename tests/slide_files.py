"""Whole slides with known pixels, made for the tests: TIFF pyramids, Aperio files, DICOM series."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, *, seed: int = 0) -> np.ndarray:
    """Smooth coloured tissue with fine grain on pale glass: the right half is tissue. ``uint8 (height, width, 3)``."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    glass = np.full((height, width, 3), 242.0)
    tissue = np.stack(
        [150 + 40 * np.sin(columns / 9), 70 + 30 * np.cos(rows / 7), 140 + 30 * np.sin((rows + columns) / 11)], axis=2
    )
    out = np.where((columns >= width // 2)[:, :, None], tissue, glass) + rng.normal(0, 2, (height, width, 3))
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def halved(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks of ``factor``; what is left over at the edges is dropped."""
    height, width = (n // factor for n in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def write_pyramid(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | None = 0.25,
    factors: tuple[int, ...] = (2, 4),
    tile: int | None = 64,
    subifds: bool = False,
    description: str | None = None,
    **options,
) -> Path:
    """A tiled TIFF with levels; the scale in its resolution tags (centimetres)."""
    import tifffile

    shape = None if tile is None else (tile, tile)
    options = {"tile": shape, "photometric": "rgb", "metadata": None, "compression": "deflate", **options}
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, subifds=len(factors) if subifds else 0, description=description, **scale, **options)
        for factor in factors:
            tiff.write(halved(pixels, factor), subfiletype=1, **options)
    return path


def write_aperio(path: Path, pixels: np.ndarray, *, mpp: float = 0.499, tile: int = 64, **options) -> Path:
    """A TIFF that OpenSlide takes for Aperio's."""
    height, width = pixels.shape[:2]
    text = f"Aperio Image Library v11.2.1 \r\n{width}x{height} (64x64) JPEG/RGB Q=95|AppMag = 20|MPP = {mpp}|User = u7"
    return write_pyramid(path, pixels, mpp=None, factors=(), tile=tile, description=text,
                         **{"compression": "jpeg", **options})  # fmt: skip


def write_dicom(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: tuple[float, float] = (0.25, 0.25),
    tile: tuple[int, int] = (64, 48),
    syntax: str = "jpeg",
    sparse: bool = False,
    series: str = "1.2.3.4",
    number: int = 1,
    kind: str = "VOLUME",
) -> Path:
    """One level of a DICOM slide; ``tile`` is (width, height), ``mpp`` (x, y). A sparse one leaves out the first frame
    and lists the others backwards."""
    import imagecodecs
    import pydicom
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.sequence import Sequence

    (height, width), (w, h) = pixels.shape[:2], tile
    across, down = -(-width // w), -(-height // h)
    padded = np.pad(pixels, ((0, down * h - height), (0, across * w - width), (0, 0)), constant_values=255)
    places = [(c * w, r * h) for r in range(down) for c in range(across)]
    if sparse:
        places = places[:0:-1]
    tiles = [padded[y : y + h, x : x + w] for x, y in places]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta.MediaStorageSOPInstanceUID = f"{series}.{number}"
    syntaxes = {"jpeg": "1.2.840.10008.1.2.4.50", "jpeg2000": "1.2.840.10008.1.2.4.90", "none": "1.2.840.10008.1.2.1"}
    meta.TransferSyntaxUID = syntaxes[syntax]
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    d.SOPClassUID, d.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    d.StudyInstanceUID, d.SeriesInstanceUID, d.Modality, d.InstanceNumber = "1.2.3", series, "SM", number
    d.FrameOfReferenceUID = "1.2.9"
    d.PatientName, d.PatientID, d.Manufacturer = "Secret^Name", "MRN-77", "Maker"
    d.ImageType = ["DERIVED" if number > 1 else "ORIGINAL", "PRIMARY", kind, "RESAMPLED" if number > 1 else "NONE"]
    d.Rows, d.Columns, d.NumberOfFrames = h, w, len(tiles)
    d.TotalPixelMatrixColumns, d.TotalPixelMatrixRows = width, height
    d.SamplesPerPixel, d.PlanarConfiguration, d.BitsAllocated, d.BitsStored, d.HighBit = 3, 0, 8, 8, 7
    d.PixelRepresentation = 0
    d.PhotometricInterpretation = {"jpeg": "YBR_FULL_422", "jpeg2000": "YBR_RCT", "none": "RGB"}[syntax]
    d.DimensionOrganizationType = "TILED_SPARSE" if sparse else "TILED_FULL"
    d.TotalPixelMatrixFocalPlanes = 1
    measures = Dataset()
    measures.PixelSpacing = [mpp[1] / 1000, mpp[0] / 1000]
    measures.SliceThickness = 0.001
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    d.SharedFunctionalGroupsSequence = Sequence([shared])
    optical = Dataset()
    optical.OpticalPathIdentifier, optical.ObjectiveLensPower = "1", 40
    d.OpticalPathSequence = Sequence([optical])
    d.NumberOfOpticalPaths = 1
    if sparse:
        groups = []
        for x, y in places:
            place, group = Dataset(), Dataset()
            place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = x + 1, y + 1
            group.PlanePositionSlideSequence = Sequence([place])
            groups.append(group)
        d.PerFrameFunctionalGroupsSequence = Sequence(groups)
    if syntax == "none":
        d.PixelData = b"".join(t.tobytes() for t in tiles) + b"\0" * (sum(t.size for t in tiles) % 2)
    else:
        encode = jpeg if syntax == "jpeg" else lambda t: imagecodecs.jpeg2k_encode(t, level=0, codecformat="j2k")
        d.PixelData = encapsulate([encode(np.ascontiguousarray(t)) for t in tiles])
        d["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(path, d, enforce_file_format=True)
    return path


def jpeg(pixels: np.ndarray) -> bytes:
    """A JPEG of high quality without subsampled colour."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=97, subsampling=0)
    return stream.getvalue()
