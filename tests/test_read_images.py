"""Decoding: every container and mode against arrays computed without it, and every way that a file can be broken."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile, PngImagePlugin

import biosae as bs
from biosae.data import ReadError, read_failures
from biosae.errors import InputError, TooManyFailuresError
from biosae.read.decode import ImageReader, decode

RNG = np.random.default_rng(0)
ROWS, COLUMNS = np.mgrid[:64, :48]
RGB = np.stack([4 * ROWS, 5 * COLUMNS, 2 * (ROWS + COLUMNS)], axis=2).astype(np.uint8)  # smooth: lossy formats keep it
NOISE = RNG.integers(0, 256, (48, 40, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (48, 40), dtype=np.uint16)
LOSSLESS = [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True}), ("BMP", {})]
LOSSY = [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"quality": 95})]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reason(data: bytes, **options) -> str:
    with pytest.raises(ReadError) as caught:
        decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_containers_give_the_pixels_back(kind, options):
    out = decode(encoded(Image.fromarray(NOISE), kind, **options))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, NOISE)


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_lossy_containers_stay_close(kind, options):
    out = decode(encoded(Image.fromarray(RGB), kind, **options))
    assert np.abs(out.astype(int) - RGB).mean() < 3


def test_grey_palette_and_one_bit():
    grey = NOISE[:, :, 0]
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[:, :, None], 3, 2))
    palette = Image.fromarray(RGB).quantize(32)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = grey > 127
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits), kind))[:, :, 1], bits * np.uint8(255))


def test_cmyk_follows_the_subtractive_formula():
    cmyk = np.concatenate([RGB, RGB[:, :, :1] // 2], axis=2)
    c = cmyk.astype(float)
    expected = (255 - c[:, :, :3]) * (255 - c[:, :, 3:]) / 255
    assert np.abs(decode(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF")) - expected).max() <= 1
    assert np.abs(decode(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95)) - expected).mean() < 3


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparency_is_composited_on_white(kind, options):
    alpha = RNG.integers(0, 256, (48, 40, 1), dtype=np.uint8)
    rgba = np.concatenate([NOISE, alpha], axis=2)
    a = alpha / 255
    expected = NOISE * a + 255 * (1 - a)
    out = decode(encoded(Image.fromarray(rgba), kind, **options))
    assert np.abs(out - expected).max() <= 1


def test_transparency_of_grey_and_palette():
    alpha = RNG.integers(0, 256, (48, 40), dtype=np.uint8)
    la = Image.merge("LA", [Image.fromarray(NOISE[:, :, 0]), Image.fromarray(alpha)])
    expected = NOISE[:, :, 0] * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(decode(encoded(la, "PNG"))[:, :, 2] - expected).max() <= 1
    palette = Image.fromarray(np.tile([0, 1], (4, 2)).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    out = decode(encoded(palette, "PNG", transparency=0))
    assert out[0].tolist() == [[255] * 3, [40, 50, 60]] * 2


def test_16_bit_grey_is_scaled_over_the_full_range():
    edge = np.array([[0, 128, 129, 32896, 65406, 65407, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(edge), "PNG"))[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]
    expected = np.round(GREY16 / 257).astype(np.uint8)
    for kind, options in [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]:
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(GREY16), kind, **options))[:, :, 0], expected)


def test_16_bit_files_of_another_writer():
    tifffile = pytest.importorskip("tifffile", reason="tifffile comes with the extra 'wsi'")
    colour = RNG.integers(0, 65536, (48, 40, 3), dtype=np.uint16)

    def written(array, **options):
        stream = io.BytesIO()
        tifffile.imwrite(stream, array, **options)
        return stream.getvalue()

    for order in "<>":
        grey = written(GREY16, byteorder=order)
        np.testing.assert_array_equal(decode(grey)[:, :, 0], np.round(GREY16 / 257).astype(np.uint8))
        interleaved = decode(written(colour, photometric="rgb", byteorder=order))
        np.testing.assert_array_equal(interleaved, colour // 256)
        assert np.abs(interleaved - np.round(colour / 257)).max() <= 1
        planes = np.moveaxis(colour, 2, 0)
        assert reason(written(planes, photometric="rgb", planarconfig="separate", byteorder=order)) == "unsupported"
    inverted = written(GREY16, photometric="miniswhite")
    np.testing.assert_array_equal(decode(inverted)[:, :, 0], np.round((65535 - GREY16) / 257).astype(np.uint8))
    for dtype in ("float32", "float64", "int16", "int8", "uint32", "int32"):
        assert reason(written(GREY16.astype(dtype))) == "unsupported"
    assert reason(written(RNG.integers(0, 255, (48, 40, 5), dtype=np.uint8), photometric="minisblack")) == "unsupported"


def test_16_bit_colour_png_of_another_writer():
    codecs = pytest.importorskip("imagecodecs", reason="imagecodecs comes with the extra 'wsi'")
    colour = RNG.integers(0, 65536, (48, 40, 3), dtype=np.uint16)
    np.testing.assert_array_equal(decode(bytes(codecs.png_encode(colour))), colour // 256)


TURNS = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    expected = TURNS[orientation](NOISE)
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]:
        np.testing.assert_array_equal(decode(encoded(Image.fromarray(NOISE), kind, exif=exif, **options)), expected)
    jpeg = decode(encoded(Image.fromarray(RGB), "JPEG", exif=exif, quality=95))
    assert np.abs(jpeg.astype(int) - TURNS[orientation](RGB)).mean() < 3
    grey = decode(encoded(Image.fromarray(GREY16), "PNG", exif=exif))
    np.testing.assert_array_equal(grey[:, :, 0], TURNS[orientation](np.round(GREY16 / 257).astype(np.uint8)))


@pytest.mark.parametrize(
    ("kind", "options"), [*LOSSY, ("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("BMP", {})]
)
@pytest.mark.parametrize("pixels", [RGB, NOISE], ids=["smooth", "noise"])
def test_no_cut_file_is_ever_taken_for_whole(kind, options, pixels):
    data = encoded(Image.fromarray(pixels), kind, **options)
    whole = decode(data)
    for share in np.linspace(0.02, 0.98, 33):
        part = data[: int(len(data) * share)]
        try:
            out = decode(part)
        except ReadError:
            continue
        np.testing.assert_array_equal(out, whole)  # then only what comes after the pixels was lost
    if kind != "BMP":
        assert reason(data[: int(len(data) * 0.7)]) == "truncated"


@pytest.mark.parametrize(("kind", "options"), [*LOSSY, ("PNG", {})])
def test_a_tail_of_zeros_is_not_data(kind, options):
    data = encoded(Image.fromarray(NOISE), kind, **options)
    for share in (0.5, 0.7, 0.9):
        keep = int(len(data) * share)
        assert reason(data[:keep] + bytes(len(data) - keep)) == "truncated"


def test_a_global_tolerance_of_truncation_is_not_obeyed(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(Image.fromarray(NOISE), "JPEG")
    assert reason(data[: len(data) // 2]) == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), [*LOSSY, *LOSSLESS])
def test_damaged_bytes_end_in_a_read_error_or_an_image(kind, options):
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(Image.fromarray(NOISE), kind, **options, **({} if kind == "BMP" else {"exif": exif}))
    rng = np.random.default_rng(5)
    n_refused = 0
    for _ in range(60):
        broken = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, min(len(broken), 400), 4)
        broken[places] = rng.integers(0, 256, 4)
        try:
            out = decode(broken.tobytes())
        except ReadError:
            n_refused += 1
        else:
            assert out.dtype == np.uint8 and out.shape[2] == 3
    assert n_refused > 0


def test_padding_and_trailers_after_the_image_are_harmless():
    data = encoded(Image.fromarray(NOISE), "JPEG")
    np.testing.assert_array_equal(decode(data + bytes(100)), decode(data))
    np.testing.assert_array_equal(decode(data + b"trailer \xff\xda"), decode(data))


def test_reasons(tmp_path, monkeypatch):
    png = encoded(Image.fromarray(NOISE), "PNG")
    empty, zeros, folder = tmp_path / "empty.png", tmp_path / "zeros.png", tmp_path / "folder.png"
    empty.touch()
    zeros.write_bytes(bytes(500))
    folder.mkdir()
    assert reason(tmp_path / "absent.png") == "missing"
    assert reason(empty) == "empty"
    assert reason(zeros) == "empty"
    assert reason(folder) == "unreadable"
    assert reason(b"once upon a time") == "unsupported"
    assert reason(png, size=(48, 40)) == "wrong_size"  # width and height exchanged
    assert decode(png, size=(40, 48)).shape == (48, 40, 3)
    broken = bytearray(png)
    broken[20] ^= 255  # in the header's width
    assert reason(bytes(broken)) == "unreadable"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert reason(png) == "unsupported"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(png) == "unsupported"


def test_decompression_bomb_in_a_text_chunk_is_an_error_of_the_item(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 100)
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 10_000, zip=True)
    assert reason(encoded(Image.fromarray(NOISE), "PNG", pnginfo=info)) == "unreadable"


def test_pages():
    pages = [Image.fromarray(NOISE), Image.fromarray(RGB)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert reason(data) == "unsupported"
    np.testing.assert_array_equal(decode(data, page=0), NOISE)
    np.testing.assert_array_equal(decode(data, page=1), RGB)
    assert reason(data, page=2) == "missing"


def test_read_error_and_reader_travel():
    error = pickle.loads(pickle.dumps(ReadError("truncated", "half")))  # noqa: S301
    assert (error.reason, error.detail, str(error)) == ("truncated", "half", "truncated: half")
    with pytest.raises(ValueError, match="did you mean 'truncated'"):
        ReadError("trunkated", "")
    reader = pickle.loads(pickle.dumps(ImageReader(size=5, page=1)))  # noqa: S301
    assert reader.spec() == {"kind": "image", "size": [5, 5], "page": 1}
    with pytest.raises(InputError, match="width, height"):
        ImageReader(size=(1, 2, 3))


# -- tables and folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a/1.png", "a/2.png", "b/1.PNG", "3.png", "b/._1.png", "b/notes.txt"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(NOISE + np.uint8(i)), "PNG"))
    return tmp_path / "images"


def table(folder, **columns):
    return pd.DataFrame({"path": ["a/1.png", "a/2.png", "b/1.PNG"], **columns})


def test_folder(folder):
    samples = bs.read.images(folder, patient=None)
    assert samples.ids.tolist() == ["3.png", "a/1.png", "a/2.png", "b/1.PNG"]
    assert "label" not in samples.obs
    np.testing.assert_array_equal(samples["b/1.PNG"], NOISE + np.uint8(2))
    named = bs.read.images(folder, patient=None, label="folder")
    assert named.obs["label"].tolist()[1:] == ["a", "a", "b"]
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="no file of a fitting kind"):
        bs.read.images(folder / "none", patient=None)


def test_types_survive_a_text_table(folder):
    text = (
        "sample_id,path,case,centre,n,m,x,flag,who\n"
        "007,a/1.png,01,1,3,1,0.5,True,ann\n008,a/2.png,01,2,4,,,False,\n009,b/1.PNG,1e2,2,5,2,1.5,True,bob\n"
    )
    (folder / "t.csv").write_text("\ufeff" + text, encoding="utf-8")
    (folder / "t.tsv").write_text(text.replace(",", "\t"))
    for name in ("t.csv", "t.tsv"):
        samples = bs.read.images(folder / name, patient="case", site="centre")
        obs = samples.obs
        assert samples.ids.tolist() == ["007", "008", "009"]
        assert obs["patient"].tolist() == ["01", "01", "1e2"]
        assert obs["site"].tolist() == ["1", "2", "2"]
        kinds = {c: str(obs[c].dtype) for c in ("n", "m", "x", "flag", "who")}
        assert kinds == {"n": "int64", "m": "Int64", "x": "float64", "flag": "bool", "who": "object"}
        assert obs["m"].isna().tolist() == [False, True, False]
        assert pd.isna(obs["who"].iloc[1])
        assert samples[0].shape == (48, 40, 3)


def test_what_is_missing_in_a_text_table_is_listed(folder):
    """``None`` is a class (no tumour) and ``N.A.`` a place; what the documentation lists is missing, in any column."""
    marks = ("", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "<NA>")
    rows = [f"{k},a/1.png,None,{mark},{mark}" for k, mark in enumerate(marks)]
    (folder / "t.csv").write_text(
        "\n".join(["id,path,grade,centre,n", *rows, "x,a/2.png,high,None,4", "y,a/2.png,low,N.A.,5"])
    )
    obs = bs.read.images(folder / "t.csv", patient=None, id="id", label="grade", site="centre").obs
    assert obs["label"].tolist() == ["None"] * len(marks) + ["high", "low"]
    assert obs["site"].isna().tolist() == [True] * len(marks) + [False, False]
    assert obs["site"].tolist()[-2:] == ["None", "N.A."]
    assert obs["n"].isna().sum() == len(marks) and obs["n"].tolist()[-2:] == [4, 5]


def test_a_parquet_column_may_be_called_index(folder):
    frame = pd.DataFrame({"index": ["u"], "path": [sorted(p.name for p in folder.iterdir())[0]]})
    frame.to_parquet(folder / "i.parquet")
    assert bs.read.images(folder / "i.parquet", patient=None, id="index").ids.tolist() == ["u"]


def test_parquet_and_frames_keep_types(folder):
    frame = table(folder, case=["x", "x", "y"], grade=pd.Categorical(["lo", "hi", "lo"], ["lo", "hi"], ordered=True))
    frame.to_parquet(folder / "t.parquet")
    for source, root in [(folder / "t.parquet", None), (frame, folder)]:
        samples = bs.read.images(source, patient="case", label="grade", root=root)
        assert samples.obs["grade"].dtype == frame["grade"].dtype == samples.obs["label"].dtype
        assert samples.ids.tolist() == frame["path"].tolist()
        np.testing.assert_array_equal(samples[1], NOISE + np.uint8(1))
    assert "patient" not in frame  # the caller's table is not touched


def test_absolute_paths_below_the_root_become_relative(folder):
    frame = table(folder)
    frame["path"] = [str(folder / p) for p in frame["path"]]
    there = bs.read.images(frame, patient=None, root=folder)
    assert there.obs["path"].tolist() == ["a/1.png", "a/2.png", "b/1.PNG"]
    assert there.fingerprint == bs.read.images(table(folder), patient=None, root=folder).fingerprint


def test_wrong_columns_name_the_nearest(folder):
    frame = table(folder, case_id=["x", "x", "y"])
    for wrong in ({"patient": "caseid"}, {"patient": None, "site": "caseid"}, {"patient": None, "id": "caseid"}):
        with pytest.raises(InputError, match="did you mean 'case_id'"):
            bs.read.images(frame, root=folder, **wrong)
    with pytest.raises(InputError, match="no column 'file'"):
        bs.read.images(frame, root=folder, patient=None, path="file")
    (folder / "semi.csv").write_text("path;case\na/1.png;x\n")
    with pytest.raises(InputError, match="separator"):
        bs.read.images(folder / "semi.csv", patient=None)
    with pytest.raises(InputError, match="no file or folder"):
        bs.read.images(folder / "absent.csv", patient=None)


def test_missing_files(folder):
    frame = pd.concat([table(folder), pd.DataFrame({"path": ["a/9.png"]})], ignore_index=True)
    with pytest.raises(TooManyFailuresError, match="1 of 4 files are missing"):
        bs.read.images(frame, patient=None, root=folder)
    with pytest.warns(UserWarning, match="1 of 4 files are missing"):
        samples = bs.read.images(frame, patient=None, root=folder, max_failures=0.5)
    with pytest.raises(ReadError, match="missing"):
        samples["a/9.png"]
    assert samples["a/1.png"].shape == (48, 40, 3)


@pytest.mark.filterwarnings("ignore:1 of 4 files are missing")
@pytest.mark.parametrize("name", ["images", "tiles"])
def test_missing_files_are_listed(folder, tmp_path, name):
    frame = pd.concat([table(folder), pd.DataFrame({"path": ["a/9.png"]})], ignore_index=True)
    options = {"patient": None, "root": folder, "mpp": 0.5, "failures": tmp_path / "failures.csv"}
    expected = [["a/9.png", f"read/{name}", "missing"]]
    samples = getattr(bs.read, name)(frame, max_failures=0.5, **options)
    assert len(samples) == 4
    assert samples.failures[["item", "stage", "reason"]].to_numpy().tolist() == expected
    assert read_failures(tmp_path / "failures.csv").equals(samples.failures)
    samples.save(tmp_path / "s.parquet")
    assert bs.Samples.load(tmp_path / "s.parquet").failures.equals(samples.failures)
    whole = getattr(bs.read, name)(frame[:3], **options)  # a new run replaces what the old one listed
    assert whole.failures.empty and read_failures(tmp_path / "failures.csv").empty
    with pytest.raises(TooManyFailuresError):
        getattr(bs.read, name)(frame, **options)
    assert read_failures(tmp_path / "failures.csv")["item"].tolist() == ["a/9.png"]


def test_tiles_check_size_and_ask_for_the_resolution(folder):
    with pytest.warns(UserWarning, match="pass mpp="):
        bs.read.tiles(table(folder), patient=None, root=folder)
    samples = bs.read.tiles(table(folder), patient=None, root=folder, mpp=0.5, size=256)
    assert samples.mpp == 0.5
    with pytest.raises(ReadError, match="40 x 48 pixels instead of 256 x 256"):
        samples[0]
    mixed = bs.read.tiles(table(folder, um=[0.5, 0.5, 0.25]), patient=None, root=folder, mpp="um")
    assert mixed.mpp is None
    assert mixed.obs["mpp"].tolist() == [0.5, 0.5, 0.25]
    assert mixed.select([0, 1]).mpp == 0.5
    for bad in (0, -1, float("nan"), True):
        with pytest.raises(InputError, match="mpp"):
            bs.read.tiles(table(folder), patient=None, root=folder, mpp=bad)


def test_real_tiles(shared):
    folder = shared / "data" / "her2st_spots"
    samples = bs.read.tiles(
        folder / "manifest.csv", patient="patient_id", slide="section_id", split="split", mpp=0.775, size=256
    )
    manifest = pd.read_csv(folder / "manifest.csv")
    assert samples.ids.tolist() == manifest["sample_id"].tolist()
    assert samples.obs["count_gene_KRT8"].tolist() == manifest["count_gene_KRT8"].tolist()
    expected = np.asarray(Image.open(folder / manifest["path"][5]).convert("RGB"))
    np.testing.assert_array_equal(samples[5], expected)
