"""Whole slides: pixels against whole levels and OpenSlide, scales against written tags, tissue by its definition."""

from __future__ import annotations

import colorsys
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from slide_files import halved, picture, write_aperio, write_dicom, write_pyramid

import biosae as bs
from biosae.data import ReadError
from biosae.errors import InputError, TooManyFailuresError
from biosae.read import tissue as tissues
from biosae.read.slide_dicom import DicomSlide
from biosae.read.slide_tiff import TiffSlide
from biosae.read.slides import level_downsamples, open_slide, region, stated_size, thumbnail
from biosae.read.wsi import SlideTileReader

PIXELS = picture(400, 300)


def read(source, **options):
    return bs.read.wsi(source, **{"patient": None, "n_jobs": 1, "tissue": None, "tile": 64, **options})


def reason(call, *arguments, **options) -> str:
    with pytest.raises(ReadError) as caught:
        call(*arguments, **options)
    return caught.value.reason


def at(samples, i):
    return tuple(samples.obs[["x", "y"]].iloc[i])


# -- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subifds", [False, True])
def test_tiles_of_a_level_are_its_crops(tmp_path, subifds):
    path = write_pyramid(tmp_path / "a.tif", PIXELS, subifds=subifds)
    for mpp, level, factor in ((0.25, 0, 1), (0.5, 1, 2), (1.0, 2, 4)):
        whole = halved(PIXELS, factor) if factor > 1 else PIXELS
        samples = read(path, mpp=mpp, tile=40)
        assert (samples.obs["level"] == level).all() and samples.mpp == mpp
        assert len(samples) == (whole.shape[1] // 40) * (whole.shape[0] // 40)
        for i in range(len(samples)):
            x, y = (v // factor for v in at(samples, i))
            np.testing.assert_array_equal(samples[i], whole[y : y + 40, x : x + 40])


@pytest.mark.parametrize(("mpp", "step"), [(0.5, 128), (0.4, 102.4), (0.375, 96), (1.1, 281.6)])
def test_resampled_tiles_are_crops_of_the_resampled_slide(tmp_path, mpp, step):
    samples = read(write_pyramid(tmp_path / "a.tif", PIXELS, factors=()), mpp=mpp)
    image = Image.fromarray(PIXELS)
    for i in range(len(samples)):
        x, y = at(samples, i)
        whole = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS, box=(x, y, x + step, y + step)))
        assert np.abs(samples[i].astype(int) - whole).max() <= 1
    if step == round(step):  # corners lie on pixels: one resampled slide holds all the tiles
        n_x, n_y = int(400 // step), int(300 // step)
        box = (0, 0, n_x * step, n_y * step)
        whole = np.asarray(image.resize((64 * n_x, 64 * n_y), Image.Resampling.LANCZOS, box=box))
        for i in range(len(samples)):
            x, y = (round(v / step * 64) for v in at(samples, i))
            assert np.abs(samples[i].astype(int) - whole[y : y + 64, x : x + 64]).max() <= 1


def test_flat_colours_and_means_survive_resampling(tmp_path):
    flat = np.full((256, 256, 3), (200, 100, 50), np.uint8)
    samples = read(write_pyramid(tmp_path / "a.tif", flat, factors=()), mpp=0.77, tile=32)
    assert all((samples[i] == (200, 100, 50)).all() for i in range(len(samples)))
    stripes = np.repeat(np.tile(np.array([0, 255], np.uint8), 128)[None, :, None], 256, axis=0).repeat(3, axis=2)
    grey = read(write_pyramid(tmp_path / "b.tif", stripes, factors=()), mpp=2.0, tile=16)[0]
    assert np.abs(grey[:, 2:].astype(int) - 127).max() <= 1  # not aliased: at 2 um/px stripes of 0.5 um are grey


def test_the_level_is_the_coarsest_that_is_fine_enough(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", PIXELS)
    for mpp, level in ((0.25, 0), (0.3, 0), (0.496, 1), (0.49, 0), (0.75, 1), (1.0, 2), (1.3, 2)):
        assert set(read(path, mpp=mpp, tile=16).obs["level"]) == {level}
    with pytest.raises(InputError, match=r"finest level has 0\.25 um/px.*upsample=True"):
        read(path, mpp=0.2)
    doubled = read(path, mpp=0.125, upsample=True)
    assert len(doubled) == 12 * 9 and doubled[0].shape == (64, 64, 3)
    assert len(read(path, mpp=0.247)) == 6 * 4  # within the tolerance: no pixel is invented
    np.testing.assert_array_equal(read(path, mpp=0.247)[0], PIXELS[:64, :64])


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", PIXELS, mpp=(0.25, 0.5), syntax="none")
    samples = read(path, mpp=0.5)
    assert tuple(samples.obs[["slide_mpp_x", "slide_mpp_y"]].iloc[0]) == (0.25, 0.5)
    assert samples.obs["x"].unique().tolist() == [0, 128, 256] and samples.obs["y"].unique().tolist() == [
        0,
        64,
        128,
        192,
    ]
    expected = Image.fromarray(PIXELS).resize((64, 64), Image.Resampling.LANCZOS, box=(128, 64, 256, 128))
    assert np.abs(samples["a.dcm_x128_y64"].astype(int) - np.asarray(expected)).max() <= 1
    row = samples.obs.loc["a.dcm_x128_y64"]
    assert (row["x_um"], row["y_um"]) == (192 * 0.25, 96 * 0.5)
    with pytest.raises(InputError, match="implausible"):
        read(write_dicom(tmp_path / "b.dcm", PIXELS, mpp=(0.25, 0.8), series="1.9"), mpp=0.8)


def test_grid_overlap_and_edges(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", PIXELS, factors=())
    dropped = read(path, mpp=0.25, overlap=16)
    assert dropped.obs["x"].unique().tolist() == list(range(0, 400 - 64 + 1, 48))
    assert dropped.obs["y"].unique().tolist() == list(range(0, 300 - 64 + 1, 48))
    padded = read(path, mpp=0.25, edge="pad")
    assert len(padded) == 7 * 5
    last = padded["a.tif_x384_y256"]
    np.testing.assert_array_equal(last[:44, :16], PIXELS[256:, 384:])
    assert (last[44:] == 255).all() and (last[:, 16:] == 255).all()
    covered = read(path, mpp=0.25, edge="pad", overlap=16)
    assert covered.obs["x"].max() + 64 >= 400 > covered.obs["x"].max() + 16
    half = read(path, mpp=0.5, edge="pad")["a.tif_x384_y256"]
    assert (half[26:] == 255).all() and (half[:, 12:] == 255).all() and (half[:20, :6] < 200).any()
    np.testing.assert_allclose(dropped.obs["x_um"], (dropped.obs["x"] + 32) * 0.25)
    np.testing.assert_allclose(dropped.obs["y_um"], (dropped.obs["y"] + 32) * 0.25)


def test_only_the_touched_tiles_are_decoded(tmp_path, monkeypatch):
    path = write_pyramid(tmp_path / "a.tif", PIXELS, factors=())
    slide, decoded = TiffSlide(path), []
    original = TiffSlide._tile
    monkeypatch.setattr(TiffSlide, "_tile", lambda self, *key: decoded.append(key) or original(self, *key))
    np.testing.assert_array_equal(slide.read(70, 70, 0, 60, 50), PIXELS[70:120, 70:130])
    assert sorted(decoded) == [(0, 8), (0, 9)]
    slide.close()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "jpeg2000", "compressionargs": {"level": 0}},
        {"compression": "zstd"},
        {"compression": None},
        {"tile": None, "rowsperstrip": 7},
        {"byteorder": ">", "bigtiff": True},
    ],
)
def test_containers_of_tiff_give_the_pixels_back(tmp_path, options):
    import tifffile

    container = {k: options.pop(k) for k in ("byteorder", "bigtiff") if k in options}
    settings = {"tile": (64, 64), "photometric": "rgb", "metadata": None, "resolution": (2e4, 2e4),
                "resolutionunit": "CENTIMETER", **options}  # fmt: skip
    with tifffile.TiffWriter(tmp_path / "a.tif", **container) as tiff:
        tiff.write(PIXELS, **settings)
    slide = open_slide(tmp_path / "a.tif")
    assert slide.scales == (("tiff.Resolution", (0.5, 0.5)),) and slide.backend == "tifffile"
    np.testing.assert_array_equal(slide.read(0, 0, 0, 400, 300), PIXELS)
    np.testing.assert_array_equal(slide.read(301, 7, 0, 99, 200), PIXELS[7:207, 301:400])
    slide.close()


def test_kinds_of_pixels(tmp_path):
    import tifffile

    grey16 = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    grey = np.rint(grey16 / 257).astype(np.uint8)
    palette = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    alpha = np.dstack([PIXELS[:64, :64], np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))])
    a = alpha[:, :, 3:] / 255
    cases = {
        "grey16": (grey16, {"photometric": "minisblack"}, np.repeat(grey[:, :, None], 3, 2)),
        "white0": (grey, {"photometric": "miniswhite"}, np.repeat(255 - grey[:, :, None], 3, 2)),
        "palette": (grey, {"photometric": "palette", "colormap": palette}, (palette[:, grey] >> 8).transpose(1, 2, 0)),
        "alpha": (alpha, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, alpha[:, :, :3] * a + 255 * (1 - a)),
    }
    for name, (pixels, options, expected) in cases.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, tile=(32, 32), metadata=None, **options)
        slide = open_slide(tmp_path / f"{name}.tif")
        assert np.abs(slide.read(0, 0, 0, 64, 64) - expected).max() <= 0.51, name
        slide.close()
    tifffile.imwrite(tmp_path / "float.tif", grey.astype(np.float32), metadata=None)
    tifffile.imwrite(tmp_path / "planes.tif", PIXELS.transpose(2, 0, 1).copy(), photometric="rgb",
                     planarconfig="separate", metadata=None)  # fmt: skip
    channels = PIXELS.transpose(2, 0, 1).copy()  # of which the first alone would pass for a grey slide
    tifffile.imwrite(tmp_path / "channels.ome.tif", channels, photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([PIXELS] * 2), photometric="rgb", metadata=None)
    turned = [(274, "H", 1, 3, True)]  # the tag Orientation: the first pixel is the last that is shown
    tifffile.imwrite(tmp_path / "turned.tif", PIXELS, photometric="rgb", metadata=None, extratags=turned)
    for name in ("float", "planes", "channels.ome", "stack", "turned"):
        assert reason(open_slide, tmp_path / f"{name}.tif") == "unsupported", name


# -- other implementations ---------------------------------------------------------------------------------------


def test_pyramid_as_openslide_reads_it(shared):
    openslide = pytest.importorskip("openslide")
    path = shared / "data" / "wsi_small" / "boxes_pyramid.tiff"
    theirs, ours = openslide.OpenSlide(path), open_slide(path)
    assert ours.backend == "tifffile" and ours.levels == theirs.level_dimensions
    for level, size in enumerate(ours.levels):
        whole = np.asarray(theirs.read_region((0, 0), level, size))[:, :, :3]
        np.testing.assert_array_equal(ours.read(0, 0, level, *size), whole)
    assert ours.downsamples == (1, 2, 4, 8)
    ours.close()


@pytest.mark.parametrize(("syntax", "tolerance"), [("none", 0), ("jpeg2000", 0), ("jpeg", 12)])
@pytest.mark.parametrize("sparse", [False, True])
def test_dicom(tmp_path, syntax, tolerance, sparse):
    path = write_dicom(tmp_path / "a.dcm", PIXELS, syntax=syntax, sparse=sparse, mpp=(0.25, 0.25))
    slide = open_slide(path)
    assert slide.backend == "pydicom" and slide.levels == ((400, 300),) and slide.objective == 40
    assert slide.scales[0][0] == "dicom.PixelSpacing" and slide.scales[0][1] == pytest.approx((0.25, 0.25))
    expected = PIXELS.astype(int)
    if sparse:
        expected[:48, :64] = 255
    whole = slide.read(0, 0, 0, 400, 300)
    assert np.abs(whole - expected).max() <= tolerance
    np.testing.assert_array_equal(slide.read(70, 33, 0, 100, 90), whole[33:123, 70:170])
    slide.close()


@pytest.mark.parametrize("syntax", ["jpeg", "jpeg2000", "none"])
def test_dicom_as_openslide_reads_it(tmp_path, syntax):
    openslide = pytest.importorskip("openslide")
    for number, factor in ((1, 1), (2, 2), (3, 4)):
        pixels = PIXELS if factor == 1 else halved(PIXELS, factor)
        write_dicom(tmp_path / f"{number}.dcm", pixels, syntax=syntax, number=number, mpp=(0.25 * factor,) * 2)
    write_dicom(tmp_path / "label.dcm", PIXELS[:48, :64], number=4, kind="LABEL")
    write_dicom(tmp_path / "other.dcm", PIXELS, number=9, series="5.6.7")
    theirs, ours = openslide.OpenSlide(tmp_path / "1.dcm"), open_slide(tmp_path / "2.dcm")
    assert ours.levels == theirs.level_dimensions == ((400, 300), (200, 150), (100, 75))
    assert ours.scales[0][1] == pytest.approx((float(theirs.properties["openslide.mpp-x"]),) * 2)
    for level, size in enumerate(ours.levels):
        whole = np.asarray(theirs.read_region((0, 0), level, size))[:, :, :3].astype(int)
        assert np.abs(ours.read(0, 0, level, *size) - whole).max() <= 1
    ours.close()
    theirs.close()
    (tmp_path / "alone").mkdir()
    for number in (1, 2, 3, "label"):
        name = f"{number}.dcm"
        (tmp_path / "alone" / name).write_bytes((tmp_path / name).read_bytes())
    folder = read(pd.DataFrame({"path": ["alone"]}), root=tmp_path, mpp=0.5)
    np.testing.assert_array_equal(folder["alone_x128_y0"], read(tmp_path / "2.dcm", mpp=0.5)["2.dcm_x128_y0"])
    shutil.rmtree(tmp_path / "alone")
    samples = read(tmp_path, mpp=0.5)
    assert samples.obs["path"].unique().tolist() == ["1.dcm", "other.dcm"]
    assert samples.obs.groupby("path")["level"].first().tolist() == [1, 0]


def test_an_aperio_file_as_openslide_reads_it(shared):
    openslide = pytest.importorskip("openslide")
    path = shared / "data" / "wsi_small" / "cmu1_small_region.svs"
    samples = bs.read.wsi(path, patient=None, mpp=0.499, n_jobs=1)
    slide = openslide.OpenSlide(path)
    assert samples.obs["slide_mpp_x"].unique().tolist() == [0.499]
    assert samples.obs["mpp_source"].unique().tolist() == ["openslide.mpp"]
    assert len(samples) > 20 and (samples.obs["tissue_share"] >= 0.5).all()
    for i in range(len(samples)):
        theirs = np.asarray(slide.read_region(tuple(int(v) for v in at(samples, i)), 0, (256, 256)))[:, :, :3]
        np.testing.assert_array_equal(samples[i], theirs)
    facts = samples.meta["slides"]["cmu1_small_region.svs"]
    assert (facts["width"], facts["height"], facts["vendor"], facts["objective"]) == (2220, 2967, "aperio", 20)
    private = (
        slide.properties["aperio.User"],
        slide.properties["aperio.ScanScope ID"],
        slide.properties["aperio.Date"],
    )
    said = json.dumps(samples.meta) + samples.obs.to_csv()
    assert not any(p in said for p in private)


# -- scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((40000, 40000), "CENTIMETER", 0.25),
        ((101600, 101600), "INCH", 0.25),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((300, 300), "INCH", None),
        ((40000, 40000), "NONE", None),
        (None, None, None),
    ],
)
def test_resolution_tags(tmp_path, resolution, unit, expected):
    import tifffile

    scale = {} if resolution is None else {"resolution": resolution, "resolutionunit": unit}
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, tile=(64, 64), photometric="rgb", metadata=None, **scale)
    if expected is None:
        with pytest.raises(InputError, match=r"no_unit.*slide_mpp="):
            read(tmp_path / "a.tif", mpp=0.25)
    else:
        obs = read(tmp_path / "a.tif", mpp=0.25).obs
        assert obs["slide_mpp_x"].iloc[0] == pytest.approx(expected)
        assert set(obs["mpp_source"]) == {"tiff.Resolution"}


def test_ome_scale_comes_before_the_tags(tmp_path):
    import tifffile

    metadata = {"axes": "YXS", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    tifffile.imwrite(tmp_path / "a.ome.tif", PIXELS, tile=(64, 64), photometric="rgb", metadata=metadata, ome=True,
                     resolution=(1e4, 1e4), resolutionunit="CENTIMETER")  # fmt: skip
    slide = open_slide(tmp_path / "a.ome.tif")
    assert slide.scales == (("ome.PhysicalSize", (0.25, 0.25)), ("tiff.Resolution", (1.0, 1.0)))
    slide.close()


def test_tags_of_a_vendor_file_that_has_no_key(tmp_path):
    text = "Aperio Image Library v11.2.1 \r\n400x300 (64x64) JPEG/RGB Q=95|AppMag = 20"
    for resolution, scales in ((2e4, (("tiff.Resolution", (0.5, 0.5)),)), (96, ())):
        path = write_pyramid(tmp_path / "a.svs", PIXELS, mpp=None, factors=(), compression="jpeg", description=text,
                             resolution=(resolution,) * 2, resolutionunit="CENTIMETER")  # fmt: skip
        slide = open_slide(path)
        assert slide.backend == "openslide" and slide.scales == scales
        slide.close()


def test_order_of_what_states_the_scale(tmp_path):
    write_pyramid(tmp_path / "a.tif", PIXELS, mpp=0.25)
    write_aperio(tmp_path / "b.svs", PIXELS, mpp=0.5)
    table = pd.DataFrame({"path": ["a.tif", "b.svs"], "mpp": [np.nan, 0.45], "scale": [0.3, np.nan]})

    def sources(frame, **options):
        obs = read(frame, root=tmp_path, mpp=0.6, **options).obs
        return [tuple(v) for v in obs.groupby("path")[["mpp_source", "slide_mpp_x"]].first().to_numpy()]

    bare = table[["path"]]
    assert sources(bare) == [("tiff.Resolution", 0.25), ("openslide.mpp", 0.5)]
    assert sources(table) == [("tiff.Resolution", 0.25), ("column mpp", 0.45)]
    assert sources(table, slide_mpp="scale") == [("column scale", 0.3), ("openslide.mpp", 0.5)]
    assert sources(table, slide_mpp=0.4) == [("argument", 0.4)] * 2
    assert set(read(table, root=tmp_path, mpp=0.6).obs["mpp"]) == {0.6}
    for wrong in (table.assign(mpp=[-1, 1]), table.assign(mpp=["x", "1"])):
        with pytest.raises(InputError, match="must hold positive numbers"):
            read(wrong, root=tmp_path)
    with pytest.raises(InputError, match="did you mean 'scale'"):
        read(table, root=tmp_path, slide_mpp="scales")


def test_no_pixel_is_read_before_every_scale_is_known(tmp_path, monkeypatch):
    write_pyramid(tmp_path / "a.tif", PIXELS)
    write_pyramid(tmp_path / "b.tif", PIXELS, mpp=None)
    looked = []
    monkeypatch.setattr(TiffSlide, "read", lambda self, *a: looked.append(a))
    with pytest.raises(TooManyFailuresError, match=r"1 of 2 slides cannot be used.*b\.tif: no_unit"):
        read(tmp_path, mpp=0.5)
    assert looked == []


@given(st.integers(300, 9000), st.integers(300, 9000), st.sampled_from([2, 4, 8, 16, 3]))
def test_downsamples_of_rounded_levels_are_whole(width, height, factor):
    for rounding in (np.floor, np.ceil):
        level = (int(rounding(width / factor)), int(rounding(height / factor)))
        assert level_downsamples(((width, height), level)) == (1.0, factor)


# -- tissue ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=2, max_size=40).filter(lambda c: sum(x > 0 for x in c) >= 2))
@hypothesis_settings(deadline=None)
def test_otsu_minimises_the_variance_within_classes(counts):
    values = np.repeat(np.arange(len(counts)), counts)

    def within(t):
        low, high = values[values <= t], values[values > t]
        return sum(len(v) * v.var() for v in (low, high) if len(v))

    ours = tissues.otsu(np.array(counts))
    assert within(ours) == pytest.approx(min(within(t) for t in range(len(counts) - 1)), abs=1e-6)


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_saturation_is_that_of_hsv(rgb):
    ours = tissues.saturation(np.array([[rgb]], np.uint8))[0, 0]
    theirs = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[1] if max(rgb) > 25 else 0
    assert abs(ours - 255 * theirs) <= 0.5 + 1e-9


def planted(tmp_path, mpp=2.0):
    """2.4 x 2.0 mm with 1 mm2 of tissue that has a hole of 0.04 mm2 and one of 0.0016; and a speck of 0.0016 mm2."""
    rng = np.random.default_rng(0)
    pixels = np.full((1000, 1200, 3), 240.0)
    pixels[200:700, 100:600] = (160, 60, 140)
    pixels[300:400, 200:300] = 240
    pixels[500:520, 200:220] = 240
    pixels[100:120, 1000:1020] = (160, 60, 140)
    pixels[900:1000, 1100:1200] = 8  # a black corner that was not scanned, with coloured noise
    pixels = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
    return write_pyramid(tmp_path / "planted.tif", pixels, mpp=mpp, factors=(4,))


def test_planted_tissue_is_found(tmp_path):
    found = bs.read.tissue_mask(planted(tmp_path))
    assert found.mask.shape == found.thumbnail.shape[:2] == (250, 300) and found.mpp == (8.0, 8.0)
    assert found.area == pytest.approx(1.0 - 0.04, rel=0.01)
    truth = np.zeros((250, 300), bool)
    truth[50:175, 25:150] = True
    truth[75:100, 50:75] = False
    assert (found.mask == truth).mean() > 0.999
    kept = bs.read.tissue_mask(planted(tmp_path), least_area=0)
    assert kept.area == pytest.approx(1.0 - 0.04 - 0.0016 + 0.0016, rel=0.01) and kept.mask[27, 252]
    assert found.mask[125:130, 50:55].all() and not kept.mask[126:129, 51:54].any() and not found.mask[27, 252]


def test_a_share_is_the_area_of_a_box_that_is_tissue(tmp_path):
    found = bs.read.tissue_mask(planted(tmp_path))
    fine = found.mask.repeat(4, axis=0).repeat(4, axis=1)  # pixels of level 0
    rng = np.random.default_rng(1)
    x, y = rng.integers(-20, 1190, 50), rng.integers(-20, 990, 50)
    share = tissues.tissue_share(found, x, y, 37, 61)
    for i in range(50):
        box = fine[max(0, y[i]) : y[i] + 61, max(0, x[i]) : x[i] + 37]
        assert share[i] == pytest.approx(box.sum() / (37 * 61), abs=1e-9)


def test_tiles_are_where_the_tissue_is(tmp_path):
    path = planted(tmp_path)
    samples = bs.read.wsi(path, patient=None, tile=50, mpp=2.0, n_jobs=1)
    x, y = samples.obs["x"], samples.obs["y"]
    inside = x.between(100, 550) & y.between(200, 650)
    hole = x.between(200, 250) & y.between(300, 350)
    assert len(samples) == 100 - 4 and inside.all() and not hole.any()
    everything = read(path, tile=50, mpp=2.0)
    assert len(everything) == 24 * 20 and everything.obs["tissue_share"].isna().all()
    strict = bs.read.wsi(path, patient=None, tile=60, mpp=2.0, n_jobs=1, min_tissue=0.99)
    assert 0 < len(strict) < 0.96e6 / 120**2 and (strict.obs["tissue_share"] >= 0.99).all()


def test_a_slide_without_tissue_is_listed_and_does_not_count_as_failed(tmp_path):
    glass = np.clip(240 + np.random.default_rng(0).normal(0, 3, (300, 400, 3)), 0, 255).astype(np.uint8)
    write_pyramid(tmp_path / "glass.tif", glass)
    with pytest.raises(InputError, match=r"glass\.tif: no_tissue"):
        bs.read.wsi(tmp_path, patient=None, tile=64, mpp=0.5, n_jobs=1)
    write_pyramid(tmp_path / "tissue.tif", PIXELS)
    with pytest.warns(UserWarning, match="1 of 2 slides give no tile"):
        samples = bs.read.wsi(tmp_path, patient=None, tile=64, mpp=0.5, n_jobs=1, failures=tmp_path / "failures.csv")
    assert samples.failures[["item", "reason"]].to_numpy().tolist() == [["glass.tif", "no_tissue"]]
    assert pd.read_csv(tmp_path / "failures.csv")["item"].tolist() == ["glass.tif"]


# -- tables, failures, storage -----------------------------------------------------------------------------------


def cohort(tmp_path):
    for i in range(3):
        write_pyramid(tmp_path / f"s{i}.tif", picture(400, 300, seed=i))
    table = pd.DataFrame({
        "path": [f"s{i}.tif" for i in range(3)], "case": ["p1", "p1", "p2"], "block": ["A", "B", "C"],
        "centre": ["x", "y", "y"], "key": ["k0", "k1", "k2"],
    })  # fmt: skip
    table.to_csv(tmp_path / "slides.csv", index=False)
    return tmp_path / "slides.csv"


def test_roles_and_ids(tmp_path):
    path = cohort(tmp_path)
    samples = read(path, patient="case", slide="block", site="centre", mpp=0.5)
    assert samples.obs.groupby("slide")["patient"].first().tolist() == ["p1", "p1", "p2"]
    assert samples.ids[0] == "A_x0_y0" and samples.roles["slide"] == "block" and samples.roles["mpp"] == "mpp"
    assert set(samples.obs["centre"]) == {"x", "y"} and samples.obs.index.is_unique
    assert read(path, patient="case", slide="block", id="key", mpp=0.5).ids[-1].startswith("k2_x")
    unnamed = read(path, patient="case", mpp=0.5)
    assert unnamed.obs["slide"].unique().tolist() == ["s0.tif", "s1.tif", "s2.tif"]
    with pytest.raises(InputError, match=r"several files are of slide 'x'|several files are of slide 'y'"):
        read(path, patient="case", slide="centre", mpp=0.5)
    assert read(path, patient="case", slide="centre", id="key", mpp=0.5).ids.is_unique
    with pytest.raises(InputError, match="patient"):
        bs.read.wsi(path)
    with pytest.raises(InputError, match="column 'level', which this reader fills"):
        read(pd.read_csv(path).assign(level=1), root=tmp_path, patient="case")


@pytest.mark.parametrize(
    "wrong",
    [{"tile": 0}, {"tile": 9000}, {"overlap": 64}, {"overlap": -1}, {"mpp": 0}, {"mpp": "mpp"}, {"tissue": "hsv"},
     {"edge": "keep"}, {"min_tissue": 2}, {"slide_mpp": -1}, {"max_failures": 5}],
)  # fmt: skip
def test_senseless_settings_are_refused(tmp_path, wrong):
    write_pyramid(tmp_path / "a.tif", PIXELS)
    with pytest.raises(InputError, match=next(iter(wrong))):
        read(tmp_path / "a.tif", **wrong)


def test_round_trip_pickle_threads_and_processes(tmp_path):
    path = cohort(tmp_path)
    samples = bs.read.wsi(path, patient="case", slide="block", tile=64, mpp=0.4, n_jobs=1)
    images = [samples[i] for i in range(len(samples))]
    samples.save(tmp_path / "tiles.parquet")
    loaded = bs.Samples.load(tmp_path / "tiles.parquet")
    pd.testing.assert_frame_equal(loaded.obs, samples.obs)
    assert loaded.fingerprint == samples.fingerprint and loaded.mpp == 0.4 and loaded.meta == samples.meta
    assert loaded.reader.spec() == {"kind": "wsi", "tile": 64, "mpp": 0.4}
    copy = pickle.loads(pickle.dumps(loaded))  # noqa: S301
    order = np.random.default_rng(0).permutation(np.arange(len(samples)).repeat(3))
    with ThreadPoolExecutor(4) as pool:
        for i, image in zip(order, pool.map(lambda i: copy[int(i)], order)):
            np.testing.assert_array_equal(image, images[i])
    parallel = bs.read.wsi(path, patient="case", slide="block", tile=64, mpp=0.4, n_jobs=2)
    pd.testing.assert_frame_equal(parallel.obs, samples.obs)
    shifted = bs.read.wsi(path, patient="case", slide="block", tile=64, mpp=0.4, n_jobs=1, overlap=8)
    assert shifted.fingerprint != samples.fingerprint


def test_broken_files_end_in_typed_errors(tmp_path):
    for kind, write in (("svs", write_aperio), ("tif", write_pyramid), ("dcm", write_dicom)):
        folder = tmp_path / kind
        folder.mkdir()
        data = write(folder / f"whole.{kind}", PIXELS).read_bytes()
        cut = folder / f"cut.{kind}"
        cut.write_bytes(data[: len(data) * 2 // 3])
        (folder / f"whole.{kind}").unlink()
        assert reason(open_slide, cut) == "truncated", kind
        cut.write_bytes(b"")
        assert reason(open_slide, cut) == "empty"
        cut.write_bytes(bytes(1000))
        assert reason(open_slide, cut) == "empty"
        cut.write_bytes(b"no slide at all " * 100)
        assert reason(open_slide, cut) == "unsupported"
        assert reason(open_slide, folder / "gone") == "missing"


def test_one_broken_tile_does_not_spoil_the_others(tmp_path):
    path = write_aperio(tmp_path / "a.svs", PIXELS)
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\xd8", len(data) // 2)
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    samples = read(path, mpp=0.499, min_tissue=0)
    outcomes = []
    for i in range(len(samples)):
        try:
            outcomes.append(samples[i].shape == (64, 64, 3))
        except ReadError as error:
            outcomes.append(error.reason)
    assert outcomes.count("unreadable") == 1 and outcomes.count(True) == len(samples) - 1


def test_a_jpeg_that_states_a_huge_size_is_not_decoded(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", PIXELS, factors=(), compression="jpeg")
    data = path.read_bytes()
    at_sof = data.find(b"\xff\xc0", data.find(b"\xff\xd8"))
    assert stated_size(data[data.find(b"\xff\xd8") :]) == (64, 64)
    path.write_bytes(data[: at_sof + 5] + b"\xff\xfe\xff\xfe" + data[at_sof + 9 :])
    slide = TiffSlide(path)
    assert reason(slide.read, 0, 0, 0, 400, 300) == "unreadable"
    slide.close()


def test_a_region_too_large_to_read_at_once_is_refused(tmp_path):
    class Vast:
        levels = ((100_000, 100_000),)
        downsamples = (1.0,)

    assert reason(region, Vast(), 0, (0.0, 0.0, 1e5, 1e5), (256, 256)) == "unsupported"


def test_thumbnail_in_blocks_is_the_mean_over_areas(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2400, 4200, 3), dtype=np.uint8)
    slide = TiffSlide(write_pyramid(tmp_path / "a.tif", pixels, factors=(), tile=256, compression=None))
    whole = halved(pixels, 40)
    assert np.abs(thumbnail(slide, (105, 60)).astype(int) - whole).max() <= 1
    slide.close()


def test_dicom_that_must_be_refused(tmp_path):
    import pydicom

    path = write_dicom(tmp_path / "a.dcm", PIXELS)
    for name, change, expected in [
        ("layout", {"DimensionOrganizationType": None}, "unsupported"),
        ("class", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "unsupported"),
        ("frames", {"NumberOfFrames": 3}, "unreadable"),
        ("depth", {"BitsAllocated": 16}, "unsupported"),
        ("label", {"ImageType": ["ORIGINAL", "PRIMARY", "LABEL", "NONE"]}, "no_image"),
        ("size", {"TotalPixelMatrixColumns": 2**31 - 1}, "unreadable"),
    ]:
        header = pydicom.dcmread(path)
        for tag, value in change.items():
            if value is None:
                delattr(header, tag)
            else:
                setattr(header, tag, value)
        (tmp_path / name).mkdir()
        pydicom.dcmwrite(tmp_path / name / "b.dcm", header)
        assert reason(DicomSlide, tmp_path / name / "b.dcm") == expected, name
    (tmp_path / "two").mkdir()
    write_dicom(tmp_path / "two" / "a.dcm", PIXELS, series="1.1")
    write_dicom(tmp_path / "two" / "b.dcm", PIXELS, series="1.2")
    assert reason(open_slide, tmp_path / "two") == "unsupported"


def test_real_pack(shared):
    pack = shared / "data" / "wsi_small"
    table = pd.read_csv(pack / "manifest.csv").drop(columns="mpp")
    samples = bs.read.wsi(table, root=pack, patient=None, tile=8, mpp=0.499, tissue=None, n_jobs=1, max_failures=1)
    assert samples.obs.groupby("slide").size().to_dict() == {"cmu1_small_region": 277 * 370, "small": 4}
    assert dict(zip(samples.failures["item"], samples.failures["reason"])) == {
        "boxes_pyramid": "no_unit",  # 72 dots an inch
        "smalltif": "no_unit",  # 96 dots an inch
        "small_wsi": "unsupported",  # 42 frames, and no word of where they lie
        "unopenable": "unsupported",  # compression 52479
        "unreadable": "unreadable",
    }
    stated = table[table["sample_id"].isin(["boxes_pyramid", "smalltif"])]
    tiles = bs.read.wsi(stated, root=pack, patient=None, tile=50, mpp=1.0, slide_mpp=0.5, tissue=None, n_jobs=1)
    assert tiles.obs.groupby("slide").size().to_dict() == {"boxes_pyramid": 3 * 2, "smalltif": 6 * 4}
    assert tiles.obs.groupby("slide")["level"].first().to_dict() == {"boxes_pyramid": 1, "smalltif": 0}
    facts = tiles.meta["slides"]
    assert {k: (v["width"], v["height"]) for k, v in facts.items()} == {
        "boxes_pyramid": (300, 250), "smalltif": (640, 480),
    }  # fmt: skip


# -- what is made of it ------------------------------------------------------------------------------------------


def test_places_of_tiles_reach_the_latents(tmp_path):
    samples = read(write_pyramid(tmp_path / "a.tif", PIXELS), mpp=0.5)
    rng = np.random.default_rng(0)
    obs = samples.obs.sample(frac=1, random_state=0)
    emb = bs.Embeddings.from_array(rng.normal(size=(len(obs), 8)).astype(np.float32), obs=obs)

    class Positive:  # stands in for an SAE
        decoder_ = np.eye(8, dtype=np.float32)

        def codes(self, X):
            return sp.csr_matrix(np.maximum(X.array(), 0))

    adata = bs.encode(Positive(), emb)
    spatial = adata.obsm["spatial"]
    assert spatial.dtype == np.float64 and spatial.shape == (len(obs), 2)
    for name, place in zip(adata.obs_names, spatial):
        x, y = (int(part[1:]) for part in name.rsplit("_", 2)[1:])
        assert tuple(place) == ((x + 64) * 0.25, (y + 64) * 0.25)
    plain = bs.Embeddings.from_array(emb.array(), obs=obs.drop(columns=["x_um"]))
    assert "spatial" not in bs.encode(Positive(), plain).obsm


def test_picture_of_the_tissue(tmp_path):
    from matplotlib.collections import PolyCollection

    path = planted(tmp_path)
    samples = bs.read.wsi(path, patient=None, tile=50, mpp=2.0, n_jobs=1)
    ax = bs.pl.tissue(path, tiles=samples)
    squares = next(c for c in ax.collections if isinstance(c, PolyCollection))
    assert len(squares.get_paths()) == len(samples)
    corners = {tuple(p.vertices[0]) for p in squares.get_paths()}
    assert corners == set(zip(samples.obs["x"].astype(float), samples.obs["y"].astype(float)))
    (bar,) = ax.lines
    assert np.ptp(bar.get_xdata()) * 2.0 == pytest.approx(500) and ax.texts[0].get_text() == "500 µm"
    assert "0.96 mm²" in ax.get_title(loc="left") and "96 tiles" in ax.get_title(loc="left")
    bs.pl.save(ax, tmp_path / "figure")
    assert (tmp_path / "figure.pdf").stat().st_size > 1000
    other = write_pyramid(tmp_path / "other.tif", PIXELS)
    with pytest.raises(InputError, match="holds no tile"):
        bs.pl.tissue(other, tiles=samples)


def test_reader_of_a_changed_slide_says_so(tmp_path):
    path = write_pyramid(tmp_path / "a.tif", PIXELS, factors=())
    row = {"path": str(path), "x": 0, "y": 0, "level": 3, "slide_mpp_x": 0.25, "slide_mpp_y": 0.25}
    assert reason(SlideTileReader(tile=64, mpp=0.5), row) == "wrong_size"
