"""DICOM: values against arithmetic written out here and against pydicom; encodings; what must not come through."""

from __future__ import annotations

import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import biosae as bs
from biosae.data import ReadError, Samples
from biosae.errors import InputError, TooManyFailuresError

pydicom = pytest.importorskip("pydicom", reason="comes with the extra 'dicom'")
from pydicom import encaps, uid  # noqa: E402
from pydicom.datadict import DicomDictionary  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402

from biosae.read import dicom_codecs, dicom_file, dicom_tags  # noqa: E402
from biosae.read.dicom import COLUMNS as DICOM_COLUMNS  # noqa: E402

RNG = np.random.default_rng(0)
WORDS = {1: "OB", 8: "OB"}


def dataset(pixels: np.ndarray, *, syntax: str = uid.ExplicitVRLittleEndian, frames: int | None = None, **elements):
    """A data set of these pixels, ``(H, W)``, ``(H, W, 3)`` or with frames in front."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    shape = pixels.shape[1:] if frames else pixels.shape
    ds.Rows, ds.Columns, ds.SamplesPerPixel = shape[0], shape[1], shape[2] if len(shape) == 3 else 1
    ds.PhotometricInterpretation = "RGB" if ds.SamplesPerPixel == 3 else "MONOCHROME2"
    if ds.SamplesPerPixel == 3:
        ds.PlanarConfiguration = 0
    if frames:
        ds.NumberOfFrames = frames
    if pixels.dtype.kind == "f":
        ds.BitsAllocated = 8 * pixels.dtype.itemsize
        setattr(ds, "FloatPixelData" if pixels.dtype.itemsize == 4 else "DoubleFloatPixelData", pixels.tobytes())
    else:
        ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        order = "<" if syntax != uid.ExplicitVRBigEndian else ">"
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        ds.add_new("PixelData", WORDS.get(ds.BitsAllocated, "OW"), data + b"\0" * (len(data) % 2))
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def write(path, ds: Dataset):
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        ds["PixelData"].is_undefined_length = True
        ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path


def picture(path, *, frame: int = 0, **options) -> np.ndarray:
    samples = bs.read.dicom(path, patient=None, n_jobs=1, max_failures=0, **options)
    image = samples[frame]
    if samples.obs["photometric"].iloc[0].startswith("MONO"):
        assert (image == image[:, :, :1]).all()
        return image[:, :, 0]
    return image


def reason(path, **options) -> tuple[str, str]:
    """Reason and detail of one file's failure, beside a sound file, at the scan or when it is read."""
    good = dataset(np.zeros((4, 2, 2), np.uint16), frames=4, WindowCenter=["1"] * 3, WindowWidth=["9"] * 3)
    write(path.parent / "good", good)
    table = pd.DataFrame({"path": [path.name, "good"]})
    samples = bs.read.dicom(table, patient=None, root=path.parent, n_jobs=1, max_failures=0.5, **options)
    if len(samples.failures):
        (row,) = samples.failures.itertuples()
        assert row.item == path.name
        return row.reason, row.detail
    with pytest.raises(ReadError) as caught:
        samples[0]
    return caught.value.reason, caught.value.detail


# -- the stages, one after the other -------------------------------------------------------------------------------


def by_hand(stored, slope, intercept, center, width, function, inverted):
    """PS3.3 C.11.1 and C.11.2 for one value at a time."""
    out = np.empty(stored.shape, int)
    for at, value in np.ndenumerate(stored):
        x = float(value) * slope + intercept
        if function == "LINEAR":
            if x <= center - 0.5 - (width - 1) / 2:
                y = 0.0
            elif x > center - 0.5 + (width - 1) / 2:
                y = 255.0
            else:
                y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
        elif function == "LINEAR_EXACT":
            y = min(max(((x - center) / width + 0.5) * 255, 0.0), 255.0)
        else:
            y = 255 / (1 + math.exp(-4 * (x - center) / width))
        out[at] = math.floor(y + 0.5)
    return 255 - out if inverted else out


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "uint8"])
def test_rescale_window_and_inversion(tmp_path, function, photometric, dtype):
    limits = np.iinfo(dtype)
    stored = RNG.integers(max(limits.min, -3000), min(limits.max, 5000), (9, 7), dtype=dtype)
    ds = dataset(
        stored, PhotometricInterpretation=photometric, RescaleSlope="1.5", RescaleIntercept="-100.25",
        WindowCenter="40.5", WindowWidth="400", VOILUTFunction=function,
    )  # fmt: skip
    path = write(tmp_path / "a.dcm", ds)
    expected = by_hand(stored, 1.5, -100.25, 40.5, 400, function, photometric == "MONOCHROME1")
    np.testing.assert_array_equal(picture(path), expected)
    values, unit = bs.read.dicom_values(path)
    assert values.dtype == np.float32 and unit is None
    np.testing.assert_array_equal(values, (stored * 1.5 - 100.25).astype(np.float32))


def test_the_window_may_be_chosen(tmp_path):
    stored = RNG.integers(0, 4096, (8, 6), dtype=np.uint16)
    path = write(tmp_path / "a.dcm", dataset(stored, WindowCenter=["1000", "2000"], WindowWidth=["500", "3000"]))
    for k, (center, width) in enumerate([(1000, 500), (2000, 3000)]):
        expected = by_hand(stored, 1, 0, center, width, "LINEAR", False)
        np.testing.assert_array_equal(picture(path, window=("file", k)), expected)
        np.testing.assert_array_equal(picture(path, window=(center, width)), expected)
    obs = bs.read.dicom(path, patient=None, window=("file", 1)).obs
    assert obs[["voi", "window_center", "window_width"]].iloc[0].tolist() == ["window", 2000, 3000]
    low, high = int(stored.min()), int(stored.max())
    expected = np.floor((stored - low) / (high - low) * 255 + 0.5)
    np.testing.assert_array_equal(picture(path, window="full"), expected)
    low, high = np.percentile(stored, [10, 90])
    expected = np.floor(np.clip((stored - low) / (high - low), 0, 1) * 255 + 0.5)
    np.testing.assert_array_equal(picture(path, window=("percentile", 10, 90)), expected)
    assert reason(path, window=("file", 2))[0] == "missing"


def test_without_a_window_the_whole_range_is_shown_and_padding_does_not_count(tmp_path):
    stored = np.array([[-2000, 0, 100], [50, 100, -2000]], dtype=np.int16)
    path = write(tmp_path / "a.dcm", dataset(stored, PixelPaddingValue=-2000, RescaleSlope="2", RescaleIntercept="1"))
    np.testing.assert_array_equal(picture(path), [[0, 0, 255], [128, 255, 0]])
    values, _ = bs.read.dicom_values(path)
    np.testing.assert_array_equal(values, np.array([[np.nan, 1, 201], [101, 201, np.nan]], np.float32))
    ds = dataset(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=0)
    np.testing.assert_array_equal(picture(write(tmp_path / "b.dcm", ds)), [[0, 0, 255], [0, 255, 0]])
    eight = np.array([[0, 10, 100]], np.uint8)
    np.testing.assert_array_equal(picture(write(tmp_path / "c.dcm", dataset(eight))), eight)
    ds = dataset(eight, BitsStored=7, HighBit=6)
    np.testing.assert_array_equal(picture(write(tmp_path / "d.dcm", ds)), np.floor(eight / 127 * 255 + 0.5))
    flat = write(tmp_path / "e.dcm", dataset(np.full((4, 4), 700, np.uint16)))
    assert (picture(flat) == 0).all()


def test_windows_that_have_no_width(tmp_path):
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3)
    one = write(tmp_path / "a.dcm", dataset(stored, WindowCenter="3", WindowWidth="1"))
    np.testing.assert_array_equal(picture(one), [[0, 0, 0], [255, 255, 255]])  # x <= 2.5 is black
    zero = write(tmp_path / "b.dcm", dataset(stored, WindowCenter="3", WindowWidth="0"))
    assert reason(zero) == (
        "unsupported",
        "b.dcm: a window without width, or of an unknown function; pass window='full'",
    )
    assert picture(zero, window="full").max() == 255


def lut(descriptor, data, **more):
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if descriptor[1] < 0 else "US", descriptor)
    item.add_new("LUTData", "OW", np.asarray(data, "<u2").tobytes())
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


def test_modality_and_voi_tables(tmp_path):
    stored = np.array([[-20, -10, -5], [0, 3, 90]], np.int16)
    table = RNG.integers(0, 1024, 10).astype(int)
    ds = dataset(stored, ModalityLUTSequence=[lut([10, -10, 10], table, ModalityLUTType="OD")])
    ds.VOILUTSequence = [lut([1024, 0, 12], np.arange(1024) * 4), lut([1024, 0, 10], np.arange(1024)[::-1])]
    ds.WindowCenter, ds.WindowWidth = "100", "100"  # a table goes before a window
    path = write(tmp_path / "a.dcm", ds)
    units = table[np.clip(stored + 10, 0, 9)]
    values, unit = bs.read.dicom_values(path)
    np.testing.assert_array_equal(values, units)
    assert unit == "OD"
    np.testing.assert_array_equal(picture(path), np.floor(units * 4 / 4095 * 255 + 0.5))
    np.testing.assert_array_equal(picture(path, window=("file", 1)), np.floor((1023 - units) / 1023 * 255 + 0.5))
    assert bs.read.dicom(path, patient=None).obs["voi"].iloc[0] == "lut"
    ds.ModalityLUTSequence = [lut([10, -10, 10], table[:5])]
    assert reason(write(tmp_path / "b.dcm", ds))[0] == "truncated"


def test_float_pixels(tmp_path):
    for dtype in ("float32", "float64"):
        stored = np.array([[0.0, 0.25, 1.0], [np.nan, 0.5, -99.0]], dtype)
        ds = dataset(stored, **{f"{'Double' * (dtype == 'float64')}FloatPixelPaddingValue": -99.0})
        path = write(tmp_path / "a.dcm", ds)
        np.testing.assert_array_equal(picture(path), [[0, 64, 255], [0, 128, 0]])
        np.testing.assert_array_equal(
            bs.read.dicom_values(path)[0], np.array([[0, 0.25, 1], [np.nan, 0.5, np.nan]], np.float32)
        )


def test_units(tmp_path):
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3)

    def unit(**elements):
        return bs.read.dicom_values(write(tmp_path / "a.dcm", dataset(stored, **elements)))[1]

    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    assert unit(Modality="CT", **rescale) == "HU"
    assert unit(Modality="MR", **rescale) is None
    assert unit(Modality="MR", **rescale, RescaleType="US") is None
    assert unit(Modality="PT", **rescale, Units="BQML") == "BQML"
    assert unit(Modality="CT") is None
    path = write(tmp_path / "d.dcm", dataset(stored, Modality="RTDOSE", DoseGridScaling="0.5", DoseUnits="GY"))
    values, gray = bs.read.dicom_values(path)
    assert gray == "GY" and values.max() == 2.5


# -- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
@pytest.mark.parametrize(
    "syntax",
    ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"],
)
def test_uncompressed_values_come_back(tmp_path, dtype, syntax):
    limits = np.iinfo(dtype)
    stored = RNG.integers(limits.min, limits.max, (3, 5, 7), dtype=dtype, endpoint=True)
    path = write(tmp_path / "a", dataset(stored, syntax=getattr(uid, syntax), frames=3))
    for i in range(3):
        np.testing.assert_array_equal(bs.read.dicom_values(path, frame=i)[0], stored[i].astype(np.float32))
    assert len(bs.read.dicom(path, patient=None)) == 3


def encapsulated(stored: np.ndarray, syntax: str, encode, *, bits: int, table: bool = True, pieces: int = 1) -> Dataset:
    ds = dataset(stored, syntax=syntax, frames=len(stored), BitsStored=bits, HighBit=bits - 1)
    encoded = [encode(frame) for frame in stored]
    ds.PixelData = encaps.encapsulate(encoded, fragments_per_frame=pieces, has_bot=table)
    return ds


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("table", [True, False])
def test_lossless_compression_gives_the_values_back(tmp_path, pieces, table):
    imagecodecs = pytest.importorskip("imagecodecs", reason="comes with the extra 'dicom'")
    smooth = (np.add.outer(np.arange(40), np.arange(48))[None] * [[[5]], [[9]], [[2]]]).astype(np.uint16)
    stored = smooth + RNG.integers(0, 9, smooth.shape, dtype=np.uint16)
    ways = {
        uid.JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="J2K"),
        uid.JPEGLSLossless: imagecodecs.jpegls_encode,
        uid.JPEGLosslessSV1: lambda a: imagecodecs.jpeg_encode(a, lossless=True, predictor=1, bitspersample=12),
    }
    for syntax, encode in ways.items():
        ds = encapsulated(stored, syntax, encode, bits=12, table=table, pieces=pieces)
        path = write(tmp_path / f"{syntax}.dcm", ds)
        for i in range(3):
            np.testing.assert_array_equal(bs.read.dicom_values(path, frame=i)[0], stored[i], err_msg=str(syntax))
    ds = dataset(stored, frames=3)
    ds.compress(uid.RLELossless)
    path = write(tmp_path / "rle.dcm", ds)
    np.testing.assert_array_equal(bs.read.dicom_values(path, frame=2)[0], stored[2])


def test_colour_jpeg_by_what_the_stream_says_not_the_header(tmp_path):
    rows, columns = np.mgrid[:64, :48]
    rgb = np.stack([4 * rows, 5 * columns, 250 - 2 * (rows + columns)], axis=2).astype(np.uint8)

    def jpeg(adobe: bool) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(rgb).save(stream, "JPEG", quality=95, subsampling=0, keep_rgb=adobe)
        return stream.getvalue()

    for stated in ("YBR_FULL_422", "RGB"):
        for adobe in (False, True):  # Pillow writes RGB under Adobe's marker, else YCbCr under JFIF's
            ds = dataset(rgb, syntax=uid.JPEGBaseline8Bit, PhotometricInterpretation=stated)
            ds.PixelData = encaps.encapsulate([jpeg(adobe)])
            out = picture(write(tmp_path / "a.dcm", ds))
            assert np.abs(out.astype(int) - rgb).mean() < 2, (stated, adobe)


def test_planes_ybr_and_deep_colour(tmp_path):
    rgb = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(picture(write(tmp_path / "a.dcm", dataset(rgb))), rgb)
    planes = dataset(rgb, PlanarConfiguration=1, PixelData=np.moveaxis(rgb, 2, 0).tobytes())
    np.testing.assert_array_equal(picture(write(tmp_path / "b.dcm", planes)), rgb)
    ybr = pydicom.pixels.convert_color_space(rgb, "RGB", "YBR_FULL")
    out = picture(write(tmp_path / "c.dcm", dataset(ybr, PhotometricInterpretation="YBR_FULL")))
    back = pydicom.pixels.convert_color_space(ybr, "YBR_FULL", "RGB")
    assert np.abs(out.astype(int) - back).max() <= 1
    twelve = RNG.integers(0, 4096, (6, 8, 3), dtype=np.uint16)
    out = picture(write(tmp_path / "d.dcm", dataset(twelve, BitsStored=12, HighBit=11)))
    np.testing.assert_array_equal(out, np.floor(twelve / 4095 * 255 + 0.5))
    grey = np.repeat(np.arange(0, 240, 5, np.uint8).reshape(6, 8, 1), 3, axis=2)
    halved = np.stack([grey[:, ::2, 0], grey[:, 1::2, 0], np.full((6, 4), 128), np.full((6, 4), 128)], axis=2)
    ds = dataset(grey, PhotometricInterpretation="YBR_FULL_422", PixelData=halved.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(picture(write(tmp_path / "e.dcm", ds)), grey)


def palette(n: int, first: int, bits: int, tables: list[np.ndarray], segmented: bool = False) -> dict:
    out = {}
    for colour, data in zip(("Red", "Green", "Blue"), tables):
        out[f"{colour}PaletteColorLookupTableDescriptor"] = [n % 65536, first, bits]
        keyword = f"{'Segmented' * segmented}{colour}PaletteColorLookupTableData"
        out[keyword] = np.asarray(data, "<u2" if bits == 16 else "u1").tobytes()
    return out


def test_palettes(tmp_path):
    stored = RNG.integers(0, 256, (5, 9), dtype=np.uint8)
    tables = [RNG.integers(0, 256, 64) for _ in range(3)]
    expected = np.stack([t[np.clip(stored.astype(int) - 20, 0, 63)] for t in tables], axis=2)
    for bits, factor in ((8, 1), (16, 257)):
        ds = dataset(
            stored, PhotometricInterpretation="PALETTE COLOR", **palette(64, 20, bits, [t * factor for t in tables])
        )
        np.testing.assert_array_equal(picture(write(tmp_path / "a.dcm", ds)), expected)
    # segments: three entries as they are, then a line of 61 to a last value
    segments = [[0, 3, *(t[:3] * 257), 1, 61, int(t[63]) * 257] for t in tables]
    ds = dataset(stored, PhotometricInterpretation="PALETTE COLOR", **palette(64, 0, 16, segments, segmented=True))
    out = picture(write(tmp_path / "b.dcm", ds))
    theirs = pydicom.pixels.apply_color_lut(stored, ds)
    assert np.abs(out.astype(int) - theirs / 257).max() <= 1
    with pytest.raises(ReadError, match="PALETTE COLOR has no values"):
        bs.read.dicom_values(tmp_path / "b.dcm")


def test_bits_that_do_not_fill_their_bytes(tmp_path):
    mask = RNG.random((3, 5, 7)) > 0.5  # 35 bits a frame: frames begin within bytes
    ds = dataset(mask.astype(np.uint8), frames=3, BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelData = np.packbits(mask.ravel(), bitorder="little").tobytes()
    path = write(tmp_path / "a.dcm", ds)
    for i in range(3):
        np.testing.assert_array_equal(picture(path, frame=i), mask[i] * 255)
    stored = RNG.integers(-2048, 2048, (4, 6)).astype(np.int16)
    left = dataset(stored << 4, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(bs.read.dicom_values(write(tmp_path / "b.dcm", left))[0], stored)
    dirty = (stored & 0x0FFF | 0x5000).astype(np.int16)  # what lies above the stored bits is not part of the value
    right = dataset(dirty, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(bs.read.dicom_values(write(tmp_path / "c.dcm", right))[0], stored)


# -- frames --------------------------------------------------------------------------------------------------------


def group(**sequences):
    item = Dataset()
    for keyword, elements in sequences.items():
        inner = Dataset()
        for name, value in elements.items():
            setattr(inner, name, value)
        setattr(item, keyword, [inner])
    return item


def enhanced(stored: np.ndarray) -> Dataset:
    ds = dataset(stored, frames=len(stored))
    ds.SharedFunctionalGroupsSequence = [
        group(
            PixelMeasuresSequence={"PixelSpacing": ["0.5", "0.25"]},
            FrameVOILUTSequence={"WindowCenter": "100", "WindowWidth": "200"},
        )
    ]
    ds.PerFrameFunctionalGroupsSequence = [
        group(
            PixelValueTransformationSequence={
                "RescaleSlope": str(i + 1),
                "RescaleIntercept": "-10",
                "RescaleType": "HU",
            }
        )
        for i in range(len(stored))
    ]
    own = {"WindowCenter": "0", "WindowWidth": "50", "VOILUTFunction": "LINEAR_EXACT"}
    ds.PerFrameFunctionalGroupsSequence[2].FrameVOILUTSequence = group(FrameVOILUTSequence=own).FrameVOILUTSequence
    return ds


def test_each_frame_has_its_own_rescale_and_window(tmp_path):
    stored = RNG.integers(0, 90, (3, 5, 7), dtype=np.uint16)
    path = write(tmp_path / "a.dcm", enhanced(stored))
    samples = bs.read.dicom(path, patient=None)
    assert samples.ids.tolist() == ["a.dcm#0", "a.dcm#1", "a.dcm#2"]
    windows = [(100, 200, "LINEAR")] * 2 + [(0, 50, "LINEAR_EXACT")]
    for i, (center, width, function) in enumerate(windows):
        np.testing.assert_array_equal(
            samples[i][:, :, 1], by_hand(stored[i], i + 1, -10, center, width, function, False)
        )
        values, unit = bs.read.dicom_values(path, frame=i)
        np.testing.assert_array_equal(values, stored[i].astype(float) * (i + 1) - 10)
        assert unit == "HU"
    assert samples.obs["window_center"].tolist() == [100, 100, 0]
    assert samples.obs[["spacing_row_mm", "spacing_col_mm"]].iloc[1].tolist() == [0.5, 0.25]
    for frames, wanted in (("first", [0]), ("middle", [1]), (2, [2])):
        assert bs.read.dicom(path, patient=None, frames=frames).obs["frame"].tolist() == wanted
    assert reason(path, frames=3) == ("missing", "a.dcm: no frame 3; the file has 3, counted from 0")


def test_spacing_says_what_it_is(tmp_path):
    stored = np.zeros((2, 2), np.uint16)

    def spacing(**elements):
        obs = bs.read.dicom(write(tmp_path / "a.dcm", dataset(stored, **elements)), patient=None).obs
        return obs[["spacing_row_mm", "spacing_col_mm", "spacing_source"]].iloc[0].tolist()

    assert spacing(ImagerPixelSpacing=["0.2", "0.1"]) == [0.2, 0.1, "ImagerPixelSpacing"]
    both = {"ImagerPixelSpacing": ["0.2", "0.1"], "PixelSpacing": ["0.15", "0.1"]}
    assert spacing(**both)[2] == "PixelSpacing"
    assert spacing(**both, PixelSpacingCalibrationType="GEOMETRY")[2] == "PixelSpacing (GEOMETRY)"
    assert np.isnan(spacing(PixelSpacing=["0", "0"])[0]) and np.isnan(spacing()[0])


# -- real files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zoo(shared):
    folder = shared / "data" / "dicom_zoo"
    return folder, pd.read_csv(folder / "manifest.csv", index_col="sample_id")


@pytest.fixture(scope="module")
def read_zoo(zoo, tmp_path_factory):
    folder, _ = zoo
    log = tmp_path_factory.mktemp("zoo") / "failures.csv"
    return bs.read.dicom(folder, patient=None, max_failures=1, n_jobs=1, failures=log), log


@pytest.mark.filterwarnings("ignore:Expected explicit VR")
def test_every_real_file_ends_as_expected(zoo, read_zoo):
    _, manifest = zoo
    samples, log = read_zoo
    lost = samples.failures.set_index("item")
    logged = pd.read_csv(log, index_col="item")
    assert len(manifest) == 56 and logged.index.tolist() == lost.index.tolist()
    for name, row in manifest.iterrows():
        if row["path"] in lost.index:
            reason, detail = lost.loc[row["path"], ["reason", "detail"]]
            assert row["path"].rsplit("/")[-1] in detail
            ended = "no_pixels" if reason == "no_image" else "error"
        else:
            mine = np.flatnonzero(samples.obs["path"] == row["path"])
            assert len(mine) == max(1, row["frames"])
            try:
                images = [samples[int(i)] for i in mine]
                assert all(i.shape == (row["rows"], row["columns"], 3) for i in images)
                ended = "pixels"
            except ReadError as error:
                ended = "error" if row["path"].rsplit("/")[-1] in error.detail and error.reason == "unreadable" else "?"
        assert ended == row["expect"], name


@pytest.mark.filterwarnings("ignore")
def test_real_files_agree_with_pydicom(zoo, read_zoo):
    folder, manifest = zoo
    samples, _ = read_zoo
    compared = 0
    for path in manifest.loc[manifest["expect"] == "pixels", "path"]:
        ds = pydicom.dcmread(folder / path)
        first = int(np.flatnonzero(samples.obs["path"] == path)[0])
        theirs = pydicom.pixels.pixel_array(ds, index=0)
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            theirs = pydicom.pixels.apply_color_lut(theirs, ds)
            theirs = theirs / 257 if theirs.dtype == np.uint16 else theirs
        if ds.SamplesPerPixel == 3 or ds.PhotometricInterpretation == "PALETTE COLOR":
            theirs = theirs / 257 if theirs.dtype == np.uint16 else theirs
            assert np.abs(samples[first].astype(float) - theirs).max() <= 1, path
            compared += 1
            continue
        units = pydicom.pixels.apply_modality_lut(theirs, ds)
        dose = float(ds.get("DoseGridScaling", 1))
        padding = theirs == ds.get("PixelPaddingValue", math.inf)
        mine, _ = bs.read.dicom_values(folder / path)
        np.testing.assert_allclose(mine[~padding], (units * dose)[~padding].astype(np.float32), rtol=1e-6, err_msg=path)
        if "WindowWidth" in ds or "VOILUTSequence" in ds:
            shown = pydicom.pixels.apply_voi_lut(units, ds).astype(float)
            if "VOILUTSequence" in ds:
                low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
            else:
                span = [-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1]
                span = span if ds.PixelRepresentation else [0, 2**ds.BitsStored - 1]
                low, high = (s * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0)) for s in span)
            shown = (shown - low) / (high - low) * 255
            shown = 255 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown
            assert np.abs(samples[first][:, :, 0] - shown).max() <= 0.5 + 1e-6, path
        compared += 1
    assert compared == (manifest["expect"] == "pixels").sum()


# -- what must not come through ------------------------------------------------------------------------------------

SECRET = "SECRETXYZ"


def planted() -> Dataset:
    """Every element of the dictionary that holds text, a name or a date says something that must not be seen again."""
    ds = dataset(RNG.integers(0, 99, (4, 4), dtype=np.uint16))
    kept = {"Manufacturer", "ManufacturerModelName"}  # these two are copied, and say so
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if not keyword or keyword in kept or tag >> 16 in (0, 2, 0xFFFC) or tag >> 16 >= 0x7FE0:
            continue
        if vr in ("PN", "LO", "SH", "LT", "ST", "UT", "UC"):
            ds.add_new(tag, vr, SECRET)
        elif vr in ("DA", "DT") and keyword not in ds:
            ds.add_new(tag, vr, "19590304")
    ds.AccessionNumber = ds.PatientID = SECRET
    private = ds.private_block(0x0011, "MAKER", create=True)
    private.add_new(0x01, "LO", SECRET)
    return ds


@pytest.mark.filterwarnings("ignore")
def test_identifiers_never_reach_tables_files_or_messages(tmp_path, capfd, caplog):
    folder, log = tmp_path / "in", tmp_path / "failures.csv"
    folder.mkdir()
    sound, broken = planted(), planted()
    write(folder / "a.dcm", sound)
    broken.add_new("Rows", "US", 0)
    broken["Rows"].VR = "LO"
    broken["Rows"].value = SECRET
    write(folder / "b.dcm", broken)
    for i, number in enumerate(("RescaleSlope", "WindowCenter", "NumberOfFrames", "PixelSpacing")):
        ds = planted()
        ds.add_new(number, "LO", SECRET)  # a name where a number belongs must not be quoted in the error
        write(folder / f"c{i}.dcm", ds)
    data = (folder / "a.dcm").read_bytes()
    (folder / "d.dcm").write_bytes(data[: len(data) - 20])
    (folder / "e.dcm").write_bytes(data[: len(data) // 2])
    allowed = ("PatientSex", "PatientAge", "KVP", "ImageType", "SliceThickness")
    samples = bs.read.dicom(
        folder, patient="tag:PatientID", slide="tag:StudyInstanceUID", site="tag:InstitutionName", tags=allowed,
        n_jobs=1, max_failures=1, failures=log,
    )  # fmt: skip
    assert len(samples) == 2 and len(samples.failures) == 6 and samples.obs["spacing_source"].isna().all()
    samples.save(tmp_path / "s.parquet")
    facts = [
        samples.obs.to_csv(), samples.failures.to_csv(), str(samples.meta), str(samples.reader.spec()), repr(samples),
        log.read_text(), str(samples.audit()), "".join(capfd.readouterr()), caplog.text,
        (tmp_path / "s.parquet").read_bytes().decode("latin-1"),
    ]  # fmt: skip
    for text in facts:
        assert SECRET not in text and "19590304" not in text
    assert samples.obs["patient"].iloc[0] == samples.obs["site"].iloc[0]  # equal secrets: the same hash, never the text


# keywords of the basic profile of PS3.15, table E.1-1, that are no sequences
PROFILE = """
    AccessionNumber AcquisitionComments AcquisitionDate AcquisitionDateTime AcquisitionProtocolDescription AdmissionID
    AdmittingDiagnosesDescription Allergies BranchOfService CassetteID ClinicalTrialProtocolID ClinicalTrialSiteName
    ClinicalTrialSubjectID CommentsOnThePerformedProcedureStep ContentCreatorName ContentDate ContrastBolusAgent
    CountryOfResidence CurrentPatientLocation DateOfSecondaryCapture DerivationDescription DetectorID
    DeviceSerialNumber FrameComments FrameOfReferenceUID GantryID GeneratorID GPSLatitude GPSLongitudeRef
    ImageComments InstitutionAddress InstitutionName InstitutionalDepartmentName IssuerOfPatientID LastMenstrualDate
    MedicalAlerts MedicalRecordLocator MilitaryRank NameOfPhysiciansReadingStudy Occupation OperatorsName
    OtherPatientIDs OtherPatientNames PatientAddress PatientBirthDate PatientBirthName PatientComments PatientID
    PatientInsurancePlanCodeSequence PatientMotherBirthName PatientName PatientReligiousPreference PatientSexNeutered
    PatientState PatientTelephoneNumbers PerformedProcedureStepDescription PerformedStationName
    PerformingPhysicianName PhysiciansOfRecord PlateID ProtocolName ReasonForStudy ReferringPhysicianName
    RegionOfResidence RequestedProcedureDescription RequestingPhysician RequestingService ResponsiblePerson SeriesDate
    SeriesDescription SeriesInstanceUID SeriesTime SOPInstanceUID StationName StudyComments StudyDate StudyDescription
    StudyID StudyInstanceUID StudyTime TextComments TimezoneOffsetFromUTC XRayDetectorID XRaySourceID
"""


def test_identifying_tags_are_refused(tmp_path):
    path = write(tmp_path / "a.dcm", planted())
    for keyword in PROFILE.split():
        with pytest.raises(InputError):
            bs.read.dicom(path, patient=None, tags=[keyword])
    with pytest.raises(InputError, match="deidentify=False"):
        bs.read.dicom(path, patient=None, tags=["PatientName"])
    with pytest.raises(InputError, match="did you mean 'PatientSex'"):
        bs.read.dicom(path, patient=None, tags=["PatientSexx"])
    with pytest.raises(InputError, match="no single value"):
        bs.read.dicom(path, patient=None, tags=["OtherPatientIDsSequence"], deidentify=False)
    obs = bs.read.dicom(path, patient=None, tags=["PatientName"], deidentify=False).obs
    assert obs["PatientName"].iloc[0] == SECRET
    for keyword in dicom_tags.SAFE_TEXT:
        assert keyword not in PROFILE.split() and keyword in {entry[4] for entry in DicomDictionary.values()}


def test_ages_and_other_tags(tmp_path):
    def tags(**elements):
        ds = dataset(np.zeros((2, 2), np.uint8), **elements)
        return bs.read.dicom(write(tmp_path / "a.dcm", ds), patient=None, tags=list(elements)).obs.iloc[0]

    for age, years in (("072Y", 72), ("018M", 1.5), ("095Y", 90), ("104W", 728 / 365.25)):
        assert tags(PatientAge=age)["PatientAge"] == pytest.approx(years)
    row = tags(KVP="120", ImageType=["ORIGINAL", "PRIMARY"], InstanceNumber="7", ImageOrientationPatient=list("100010"))
    assert row["KVP"] == 120 and row["ImageType"] == "ORIGINAL\\PRIMARY" and row["InstanceNumber"] == 7
    assert row["ImageOrientationPatient"] == "1\\0\\0\\0\\1\\0"


def test_pseudonyms(tmp_path):
    stored = np.zeros((2, 2), np.uint8)
    for name, patient in (("a", "P1"), ("b", "P1 "), ("c", "P2"), ("d", "")):
        write(tmp_path / name, dataset(stored, PatientID=patient))

    def patients(**options):
        samples = bs.read.dicom(tmp_path, patient="tag:PatientID", n_jobs=1, max_failures=0.3, **options)
        assert samples.failures["reason"].tolist() == ["missing"] and "no PatientID" in samples.failures["detail"][0]
        return samples.obs["patient"].tolist()

    one, other = patients(), patients()
    assert one[0] == one[1] != one[2] and not set(one) & set(other)
    assert patients(salt="x") == patients(salt="x") != patients(salt="y")
    with pytest.raises(InputError, match="is no keyword"):
        bs.read.dicom(tmp_path, patient="tag:Patient")


# -- sources -------------------------------------------------------------------------------------------------------


def test_folders_tables_and_single_files(tmp_path):
    folder = tmp_path / "exam"
    (folder / "sub").mkdir(parents=True)
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    write(folder / "sub" / "IM0001", dataset(stored, Manufacturer="Maker", ManufacturerModelName="One"))
    write(folder / "b.IMA", dataset(np.stack([stored, stored + 1]), frames=2))
    (folder / "README.md").write_text("not an image, nor a DICOM file, but long enough to be looked at " * 5)
    (folder / "DICOMDIR").write_bytes((folder / "b.IMA").read_bytes())
    samples = bs.read.dicom(folder, patient=None, scanner="model", n_jobs=1)
    assert samples.ids.tolist() == ["b.IMA#0", "b.IMA#1", "sub/IM0001"]
    assert samples.obs["scanner"].tolist()[2] == "One" and samples.obs["folder"].tolist()[2] == "sub"
    table = pd.DataFrame({"case": ["x", "y"], "file": ["sub/IM0001", "b.IMA"], "finding": [1, 0]})
    table.to_csv(folder / "t.csv", index=False)
    samples = bs.read.dicom(folder / "t.csv", patient="case", label="finding", path="file")
    assert samples.obs["patient"].tolist() == ["x", "y", "y"] and samples.obs["label"].tolist() == [1, 0, 0]
    samples = bs.read.dicom(table, patient="case", path="file", id="case", root=folder)
    assert samples.ids.tolist() == ["x", "y#0", "y#1"]
    assert {*DICOM_COLUMNS, "path"} >= set(
        bs.read.dicom(folder, patient=None).obs.drop(columns="folder", errors="ignore")
    )
    for column in DICOM_COLUMNS:  # said before the files, which are not there, are looked for
        with pytest.raises(InputError, match=f"column '{column}', which this reader fills"):
            bs.read.dicom(table.assign(**{column: "a", "file": "none.dcm"}), patient="case", path="file", root=folder)
    with pytest.raises(InputError, match="patient="):
        bs.read.dicom(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no DICOM file"):
        bs.read.dicom(tmp_path / "nothing", patient=None)
    for wrong in ("auto", (1,), (40, 0), ("percentile", 5), ("percentile", 90, 10), ("file", -1), ()):
        with pytest.raises(InputError, match="window="):
            bs.read.dicom(folder, patient=None, window=wrong)
    for wrong in ("last", None, 1.5, -1, True):
        with pytest.raises(InputError, match="frames="):
            bs.read.dicom(folder, patient=None, frames=wrong)


def test_files_without_the_preamble(tmp_path):
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)
    data = write(tmp_path / "a.dcm", dataset(stored)).read_bytes()
    (tmp_path / "b").write_bytes(data[132:])
    np.testing.assert_array_equal(bs.read.dicom_values(tmp_path / "b")[0], stored)
    assert len(bs.read.dicom(tmp_path, patient=None, n_jobs=1)) == 2
    assert len(bs.read.dicom(tmp_path, patient=None, n_jobs=1, force=False)) == 1
    with pytest.raises(ReadError, match="force=True"):
        bs.read.dicom_values(tmp_path / "b", force=False)


def test_round_trip_pickling_and_threads(tmp_path):
    stored = RNG.integers(0, 90, (3, 5, 7), dtype=np.uint16)
    write(tmp_path / "a.dcm", enhanced(stored))
    samples = bs.read.dicom(tmp_path, patient=None, window=("percentile", 1, 99), n_jobs=1)
    expected = [samples[i] for i in range(3)]
    samples.save(tmp_path / "s.parquet")
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301 - made here
    for other in (Samples.load(tmp_path / "s.parquet"), copy):
        assert other.fingerprint == samples.fingerprint and other.reader.spec() == samples.reader.spec()
        np.testing.assert_array_equal([other[i] for i in range(3)], expected)
    with ThreadPoolExecutor(4) as pool:
        for i, image in enumerate(pool.map(lambda i: samples[i % 3], range(60))):
            np.testing.assert_array_equal(image, expected[i % 3])
    two = bs.read.dicom(tmp_path, patient=None, window=("percentile", 1, 99), n_jobs=2)
    pd.testing.assert_frame_equal(two.obs, samples.obs)
    other = bs.read.dicom(tmp_path, patient=None, window="full", n_jobs=1)
    assert other.fingerprint != samples.fingerprint


# -- broken and missing --------------------------------------------------------------------------------------------


def test_every_way_to_be_broken(tmp_path):
    stored = np.arange(12, dtype=np.uint16).reshape(3, 4)

    def ends(**elements):
        return reason(write(tmp_path / "x.dcm", dataset(stored, **elements)))[0]

    assert ends(Rows=65535, Columns=65535) == "unsupported"
    assert ends(Rows=6000, Columns=6000) == "truncated"
    assert ends(NumberOfFrames=2**31 - 1) == "truncated"
    assert ends(Rows=0) == "unreadable"
    assert ends(BitsStored=17) == "unreadable"
    assert ends(SamplesPerPixel=3) == "unreadable"
    assert ends(PhotometricInterpretation="HSV") == "unsupported"
    assert ends(RescaleSlope="0", RescaleIntercept="1") == "unreadable"
    assert ends(SOPClassUID=dicom_file.WHOLE_SLIDE) == "unsupported"
    (tmp_path / "empty.dcm").write_bytes(b"")
    assert reason(tmp_path / "empty.dcm")[0] == "empty"
    (tmp_path / "text.dcm").write_text("nothing of the kind " * 30)
    assert reason(tmp_path / "text.dcm")[0] == "unreadable"
    table = pd.DataFrame({"path": ["x.dcm", "gone.dcm"]})
    write(tmp_path / "x.dcm", dataset(stored))
    with pytest.raises(TooManyFailuresError):
        bs.read.dicom(table, patient=None, root=tmp_path, n_jobs=1)
    samples = bs.read.dicom(table, patient=None, root=tmp_path, n_jobs=1, max_failures=0.5)
    assert samples.failures["reason"].tolist() == ["missing"]
    report = dataset(stored, SOPClassUID=uid.EncapsulatedPDFStorage)
    del report.PixelData
    assert reason(write(tmp_path / "pdf.dcm", report)) == (
        "no_image", "pdf.dcm: no image in this file: it is an encapsulated document (PDF, STL, CDA ...)"
    )  # fmt: skip


def test_compressed_streams_are_looked_at_before_a_decoder_sees_them(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs", reason="comes with the extra 'dicom'")
    frame = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    streams = {
        uid.JPEG2000Lossless: imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="J2K"),
        uid.JPEGBaseline8Bit: imagecodecs.jpeg_encode(frame),
        uid.JPEGLSLossless: imagecodecs.jpegls_encode(frame),
    }
    for syntax, stream in streams.items():
        ds = dataset(frame, syntax=syntax)
        for damage, expected in ((stream[: len(stream) // 2], "truncated"), (b"\0" * 40 + b"\xff\xd9", "unreadable")):
            ds.PixelData = encaps.encapsulate([damage])
            assert reason(write(tmp_path / "a.dcm", ds))[0] == expected
        ds.PixelData = encaps.encapsulate([stream])
        ds.Rows = 32
        kind, detail = reason(write(tmp_path / "b.dcm", ds))
        assert kind == "unreadable" and "64 x 64 pixels" in detail and "32 x 64" in detail
        ds.Rows, ds.NumberOfFrames = 64, 2
        assert reason(write(tmp_path / "c.dcm", ds))[0] == "truncated"


def test_a_deflated_bomb_is_not_inflated(tmp_path, monkeypatch):
    ds = dataset(np.zeros((512, 1024), np.uint16), syntax=uid.DeflatedExplicitVRLittleEndian)
    path = write(tmp_path / "a.dcm", ds)
    assert path.stat().st_size < 10_000
    assert picture(path).shape == (512, 1024)
    monkeypatch.setattr(dicom_file, "MAX_INFLATED", 2**19)
    kind, detail = reason(path)
    assert kind == "unsupported" and "inflates" in detail
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:-200])
    assert reason(path)[0] == "truncated"


def test_missing_decoders_are_named_the_free_ones_first(zoo, monkeypatch):
    folder, manifest = zoo
    from pydicom.pixels.common import CoderBase

    monkeypatch.setattr(CoderBase, "available_plugins", property(lambda self: ()))
    dicom_codecs.decoder.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no installed decoder") as warned:
            samples = bs.read.dicom(folder, patient=None, n_jobs=1, max_failures=1)
    finally:
        dicom_codecs.decoder.cache_clear()
    texts = [str(w.message) for w in warned if "left out" in str(w.message)]
    assert any(t.startswith("3 files were left out: no installed decoder for JPEG Lossless, Non") for t in texts)
    lossless = next(t for t in texts if "JPEG-LS" in t)
    assert "pip install 'biosae[dicom]' brings imagecodecs" in lossless
    assert lossless.index("pyjpegls") < lossless.index("python-gdcm") < lossless.index("pylibjpeg-libjpeg (GPL)")
    lost = samples.failures
    assert (lost.loc[lost["detail"].str.contains("no installed decoder"), "reason"] == "unsupported").all()
    compressed = manifest[(manifest["compressed"] == True) & (manifest["expect"] == "pixels")]  # noqa: E712
    assert set(compressed["path"]) <= set(lost["item"])
    assert not set(manifest.loc[(manifest["expect"] == "pixels") & (manifest["compressed"] == False), "path"]) & set(  # noqa: E712
        lost["item"]
    )
