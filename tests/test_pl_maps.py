"""Figures of maps: each code at its place, in its colour, on the item that it belongs to."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from biosae import pl
from biosae.errors import InputError
from biosae.interpret import SlideMap, TokenMap
from biosae.pl.gallery import read_picture
from biosae.pl.heatmap import coloured

GREY = np.full((60, 80, 3), 128, np.uint8)


def image_map(values, **facts) -> TokenMap:
    facts = {"box": (10.0, 0.0, 70.0, 60.0), "kind": "image", "item": GREY, **facts}
    return TokenMap(np.asarray(values, np.float32), latent="L0007", sample_id="Doe-1", **facts)


@functools.cache
def drawn(figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def pixel(ax, x, y) -> np.ndarray:
    """Colour drawn at a place of the axes."""
    pixels = drawn(ax.figure)
    px, py = ax.transData.transform((x, y))
    return pixels[pixels.shape[0] - 1 - int(py), int(px)]


def test_codes_are_as_opaque_as_they_are_large_and_say_their_sign():
    colours = coloured(np.array([0.0, 1, 2, 4, -2, np.nan]), 2.0, opaque=0.8)
    np.testing.assert_allclose(colours[:, 3], [0, 0.4, 0.8, 0.8, 0.8, 0])
    np.testing.assert_allclose(colours[2, :3], to_rgb(pl.PALETTE["vermilion"]))
    np.testing.assert_allclose(colours[4, :3], to_rgb(pl.PALETTE["blue"]))


def test_a_heat_map_colours_the_token_that_fires_and_leaves_the_rest_of_the_image():
    ax = pl.heatmap(image_map([[0, 3], [0, 0]]))
    red, _, blue = pixel(ax, 55, 15)
    assert red > blue + 60
    for x, y in ((25, 15), (25, 45), (55, 45), (75, 15)):  # silent tokens, and beside the grid
        assert np.abs(pixel(ax, x, y) - 128).max() <= 2
    assert ax.get_title(loc="left") == "L0007: active in 1 of 4 tokens, highest 3.00"
    assert ax.get_xlim() == (0, 80) and ax.get_ylim() == (60, 0)


def test_no_name_of_a_sample_is_written():
    ax = pl.heatmap(image_map([[1.0]]))
    texts = [t.get_text() for a in ax.figure.axes for t in [*a.texts, a.title, a._left_title, a.xaxis.label]]
    assert not any("Doe" in text for text in texts)


def test_signed_codes_have_both_colours_and_a_bar_from_below():
    ax = pl.heatmap(image_map([[-2, 1]], box=(0.0, 0.0, 80.0, 60.0)))
    assert pixel(ax, 20, 30)[2] > pixel(ax, 20, 30)[0]
    assert pixel(ax, 60, 30)[0] > pixel(ax, 60, 30)[2]
    assert ax.figure.axes[1].get_ylim() == (-2, 2)
    assert "highest 1.00, lowest −2.00" in ax.get_title(loc="left")


def test_one_limit_makes_images_comparable():
    weak, strong = (pl.heatmap(image_map([[v]]), limit=10.0) for v in (1.0, 10.0))
    assert pixel(weak, 40, 30)[2] > pixel(strong, 40, 30)[2] + 50
    with pytest.raises(InputError, match="limit=0"):
        pl.heatmap(image_map([[1.0]]), limit=0)


def test_a_silent_map_and_one_without_samples_are_drawn():
    ax = pl.heatmap(image_map(np.zeros((2, 2))))
    assert "active in 0 of 4 tokens" in ax.get_title(loc="left")
    alone = pl.heatmap(image_map([[0, 1, 0]], box=(0.0, 0.0, 3.0, 1.0), item=None, kind=None))
    assert alone.get_xlim() == (0, 3)


def signal_map(values, **facts) -> TokenMap:
    t = np.arange(400) / 100
    item = np.stack([np.sin(7 * t), np.cos(5 * t), 0.2 * t]).astype(np.float32)
    values = np.asarray(values, np.float32)
    facts = {"item": item, "channels": ("I", "II", "V1"), "rate": 100.0, "unit": "mV", "kind": "signal", **facts}
    return TokenMap(values, box=(0.0, 0.0, 4.0, float(len(values))), latent="L0001", sample_id="r", **facts)


def tinted(ax, x, y) -> bool:
    red, _, blue = pixel(ax, x, y)
    return bool(red > blue + 30)


def test_a_strip_colours_the_time_that_fires_behind_all_channels():
    ax = pl.strip(signal_map([[0, 0, 5, 0]]), start=100.0)
    assert ax.get_xlim() == (100, 104)
    low, high = sorted(ax.get_ylim())
    for y in np.linspace(low, high, 9)[1:-1]:
        assert sum(tinted(ax, x, y) for x in (102.1, 102.3, 102.5, 102.7)) >= 2  # traces lie over it
        assert not any(tinted(ax, x, y) for x in (100.5, 101.9, 103.1))


def test_a_strip_of_leads_colours_the_lead_that_fires():
    ax = pl.strip(signal_map([[0, 3], [0, 0]], rows=("V1", "I")))
    at = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks()))
    gap = at["I"] - at["II"]
    assert tinted(ax, 3.01, at["V1"] - 0.4 * gap) and tinted(ax, 3.01, at["V1"] + 0.4 * gap)
    assert not tinted(ax, 3.01, at["II"] - 0.4 * gap) and not tinted(ax, 3.01, at["I"] + 0.4 * gap)


def test_rows_that_are_no_channels_are_not_lost():
    by_place = pl.strip(signal_map([[0, 3], [0, 0], [0, 0]], rows=("0", "1", "2")))  # one row a channel, unnamed
    at = dict(zip([t.get_text() for t in by_place.get_yticklabels()], by_place.get_yticks()))
    assert tinted(by_place, 3.01, at["I"] + 0.4 * (at["I"] - at["II"]))
    with pytest.raises(InputError, match="rows"):
        pl.strip(signal_map([[0, 3], [0, 0]], rows=("0", "1")))


def test_a_recording_is_grey_where_there_is_no_window():
    ax = pl.strip(signal_map([[0, np.nan, 4, 0]], item=None))
    assert np.ptp(pixel(ax, 1.5, 0)) <= 2 and 200 < pixel(ax, 1.5, 0)[0] < 240
    assert (pixel(ax, 0.5, 0) == 255).all() and tinted(ax, 2.5, 0)
    assert "active in 1 of 3 steps" in ax.get_title(loc="left")


def test_maps_go_to_the_figure_of_their_kind():
    with pytest.raises(InputError, match=r"pl\.strip"):
        pl.heatmap(signal_map([[1]]))
    with pytest.raises(InputError, match=r"pl\.heatmap"):
        pl.strip(image_map([[1]]))


def test_a_slide_has_its_codes_in_micrometres(tmp_path):
    from slide_files import write_pyramid

    path = write_pyramid(tmp_path / "s.tiff", np.full((400, 600, 3), 128, np.uint8), mpp=0.5)
    values = np.array([[0, 4], [np.nan, 0]], np.float32)
    codes = SlideMap(values, (100.0, 40.0, 200.0, 140.0), 50.0, 50.0, "L0002", "a", 3, 1)
    ax = pl.slide(codes, source=path)
    assert ax.get_xlim() == (0, 300) and ax.get_ylim() == (200, 0)
    assert tinted(ax, 175, 65) and not tinted(ax, 125, 65) and not tinted(ax, 250, 65)
    assert ax.get_title(loc="left") == "L0002: active in 1 of 3 tiles, highest 4.00"
    part = pl.slide(codes, source=path, region=(150.0, 20.0, 400.0, 120.0))
    assert part.get_xlim() == (150, 300) and part.get_ylim() == (120, 20)
    assert tinted(part, 175, 65) and not tinted(part, 175, 100)
    alone = pl.slide(codes)
    assert (pixel(alone, 125, 115) == 255).all() and 220 < pixel(alone, 125, 65)[0] < 250


def test_a_gallery_of_slides_shows_the_slides_themselves(tmp_path):
    from slide_files import picture, write_pyramid

    import biosae as bs

    for name in ("a", "b"):
        write_pyramid(tmp_path / f"{name}.tiff", picture(600, 400, seed=ord(name)), mpp=0.5)
    samples = bs.read.wsi(tmp_path, patient=None, tile=64, mpp=1.0, tissue=None)
    emb = bs.Embeddings.from_array(np.eye(len(samples), dtype=np.float32), obs=samples.obs)
    sae = bs.sae.Baseline("pca", n_latents=2, random_state=0).fit(emb)
    slides = bs.stats.aggregate(bs.encode(sae, emb), by="slide")
    shown = [
        read_picture(samples, name)
        for name in bs.interpret.examples(slides, "L0000", kinds=("top", "bottom"))["sample_id"]
    ]
    assert [p.shape for p in shown] == [(200, 300, 3)] * 2
    expected = picture(600, 400, seed=ord("a")).reshape(200, 2, 300, 2, 3).mean(axis=(1, 3))
    assert min(np.abs(p - expected).max() for p in shown) < 2
    assert read_picture(samples, "c") == "not in samples"
    fig = pl.gallery(slides, "L0000", samples=samples, kinds=("top",), n=2)
    said = fig._suptitle.get_text()
    assert "of 2 slides" in said and "number under each slide" in said and "tile" not in said


def test_captions_say_what_an_item_is(tmp_path):
    from PIL import Image

    import biosae as bs
    from biosae.data.items import noun_of
    from biosae.pl.gallery import noun

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    photos = bs.read.images(tmp_path, patient=None)
    tiles = bs.read.tiles(tmp_path, patient=None, mpp=0.5)
    tiles.save(tmp_path / "tiles.parquet")
    assert (noun(photos), noun(tiles), noun(None)) == ("image", "tile", "sample")
    assert noun(bs.data.Samples.load(tmp_path / "tiles.parquet").select([0])) == "tile"
    assert photos.fingerprint == tiles.fingerprint  # a word is not part of what the items are
    assert noun(bs.data.phantom(n_patients=1, n_tiles=1)) == "tile"
    table = photos.obs.assign(modality="DX")
    assert noun_of({"kind": "dicom"}, "image", table, {}) == "radiograph"
    assert noun_of({"kind": "dicom"}, "image", table.assign(modality="MR"), {}) == "image"
    windows = photos.obs.iloc[[0, 0]].assign(recording="r")
    assert noun_of({"kind": "signal"}, "signal", windows, {}) == "recording window"
    assert noun_of({"kind": "signal"}, "signal", windows.assign(recording=["r", "s"]), {}) == "recording"
    adata = bs.encode(
        bs.sae.Baseline("pca", n_latents=1).fit(np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)),
        bs.Embeddings.from_array(np.ones((1, 3), np.float32), obs=photos.obs),
    )
    fig = pl.gallery(adata, "L0000", samples=photos, kinds=("top",), n=1)
    said = fig._suptitle.get_text()
    assert "number under each image" in said


def test_the_title_of_a_gallery_is_not_cut_off():
    from synthetic_run import FakeSamples, make_latents

    adata = make_latents()
    samples = FakeSamples(adata.obs)
    samples.noun = "recording window"
    fig = pl.gallery(adata, "L0003", samples=samples, n=2, kinds=("top",))
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    box = fig._suptitle.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
