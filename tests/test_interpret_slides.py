"""Maps of slides: squares against a painter, places against the reader of slides, files against what reads them."""

from __future__ import annotations

import json
import uuid
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from slide_files import picture, write_pyramid

import biosae as bs
from biosae.errors import InputError
from biosae.interpret import places, slide_map, slide_view, spatial_table, write_geojson


def on_slide(centres, codes, **obs) -> anndata.AnnData:
    codes = np.asarray(codes, np.float32).reshape(len(centres), -1)
    table = pd.DataFrame(obs, index=[f"t{i}" for i in range(len(centres))])
    out = anndata.AnnData(csr_matrix(codes), obs=table)
    out.var_names = [f"L{j:04d}" for j in range(codes.shape[1])]
    out.obsm["spatial"] = np.asarray(centres, float)
    return out


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A pyramid of 0.25 x 0.25 um pixels, its tiles of 64 px at 0.5 um/px, and a code that is the tile's redness."""
    path = write_pyramid(tmp_path_factory.mktemp("slides") / "one.tiff", picture(1000, 704), mpp=0.25, factors=(2, 4))
    samples = bs.read.wsi(path, patient=None, tile=64, mpp=0.5, tissue=None)
    codes = [samples[i][..., 0].mean() for i in range(len(samples))]
    obs = samples.obs.drop(columns=["patient"], errors="ignore")
    adata = on_slide(obs[["x_um", "y_um"]].to_numpy(), codes)
    adata.obs = obs
    return path, samples, adata


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), side=st.integers(1, 5))
def test_overlapping_squares_are_averaged_as_a_painter_would(seed, n, side):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 10, (n, 2))
    codes = rng.integers(-3, 4, n).astype(float)
    found = slide_map(on_slide(corner + side / 2, codes), "L0000", tile_um=side, pixel_um=1.0)
    low, high = corner.min(axis=0), corner.max(axis=0) + side
    total, count = np.zeros((2, *(high - low)[::-1]))
    for (x, y), code in zip(corner - low, codes):
        total[y : y + side, x : x + side] += code
        count[y : y + side, x : x + side] += 1
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.values, total / count, atol=1e-6)
    assert found.box == (*low, *high)
    assert (found.n_tiles, found.n_active) == (n, np.count_nonzero(codes))


def test_silent_tiles_are_exactly_zero():
    centres = [(x, y) for y in range(30) for x in range(30)]
    codes = np.where(np.arange(900) % 7, 0, np.random.default_rng(0).gamma(2, 1e3, 900))
    found = slide_map(on_slide(centres, codes), "L0000")
    assert np.count_nonzero(found.values) == np.count_nonzero(codes)
    np.testing.assert_allclose(found.values.ravel(), codes, rtol=1e-5)


def test_places_of_a_read_slide_are_those_of_its_reader(slide):
    _, samples, adata = slide
    where = places(adata)
    assert where["width_um"].iloc[0] == pytest.approx(64 * 0.5)
    np.testing.assert_allclose(where["x_um"] - where["width_um"] / 2, samples.obs["x"] * 0.25)
    np.testing.assert_allclose(where["y_um"] - where["height_um"] / 2, samples.obs["y"] * 0.25)


def test_the_map_of_a_read_slide_is_the_slide_itself(slide):
    path, _, adata = slide
    found = slide_map(adata, "L0000")
    pixels, box = slide_view(path, box=found.box, size=10_000)
    assert box == pytest.approx(found.box)
    tiles = pixels[..., 0].reshape(found.values.shape[0], 128, found.values.shape[1], 128).mean(axis=(1, 3))
    np.testing.assert_allclose(found.values, tiles, atol=1.0)


def test_a_view_is_the_mean_of_what_it_shows_whatever_level_and_block_it_is_read_from(slide, monkeypatch):
    path, *_ = slide
    whole = picture(1000, 704).astype(float)
    monkeypatch.setattr("biosae.interpret.slides._READ_AT_ONCE", 100)
    for size, factor in ((1000, 1), (500, 2), (250, 4), (125, 8), (5000, 1)):
        pixels, box = slide_view(path, size=size)
        assert pixels.shape[1] == 1000 // factor and box == (0, 0, 250, 176)
        expected = whole.reshape(704 // factor, factor, -1, factor, 3).mean(axis=(1, 3))
        assert np.abs(pixels - expected).max() < 2
    part, box = slide_view(path, box=(100, 50, 150, 500), size=10_000)
    assert box == (100, 50, 150, 176)
    np.testing.assert_array_equal(part, whole[200:, 400:600])
    with pytest.raises(InputError, match="beyond the slide"):
        slide_view(path, box=(300, 0, 400, 10))


def test_tokens_lie_within_their_tile_where_the_network_looked():
    spec = {"size": 80, "crop_pct": 1.0, "resize": "shorter", "rescale_to_mpp": 1.0}
    adata = on_slide(np.repeat([[50.0, 50.0], [150.0, 50.0]], 4, axis=0), np.arange(8), mpp=1.0)
    adata.obs["token_row"], adata.obs["token_col"] = [0, 0, 1, 1] * 2, [0, 1] * 4
    adata.uns["biosae"] = {"identity": {"preprocess": spec, "tile_mpp": 1.0}}
    where = places(adata, tile_um=100.0)
    assert (where[["width_um", "height_um"]] == 40).all(axis=None)  # 80 of 100 px in the middle, two tokens
    assert where["x_um"].tolist() == [30, 70, 30, 70, 130, 170, 130, 170]
    assert where["y_um"].tolist() == [30, 30, 70, 70] * 2
    found = slide_map(adata, "L0000", tile_um=100.0, pixel_um=20.0)
    expected = np.array([[0, 1, np.nan, 4, 5], [2, 3, np.nan, 6, 7]])
    # a token is two pixels wide, the strip between the tiles is two pixels as well
    np.testing.assert_array_equal(found.values[::2, [0, 2, 4, 5, 7]], expected)


def test_tokens_that_were_left_out_are_not_placed(slide):
    adata = on_slide(np.repeat([[50.0, 50.0], [150.0, 50.0]], 4, axis=0), np.arange(8))
    adata.obs["token_row"], adata.obs["token_col"] = [0, 0, 1, 1] * 2, [0, 1] * 4
    adata.uns["biosae"] = {"tokens_per_sample": 4}
    with pytest.raises(InputError, match="2 of 4 tokens"):
        places(adata[(adata.obs["token_row"] == 0).to_numpy()].copy())


def test_geojson_has_each_tile_at_its_pixels_with_its_codes(slide, tmp_path):
    _, samples, adata = slide
    path = tmp_path / "codes.geojson"
    assert write_geojson(path, adata, ["L0000"]) == len(samples)
    features = json.loads(path.read_text())["features"]
    assert len({uuid.UUID(f["id"]) for f in features}) == len(samples)
    for feature, (x, y), code in zip(features, samples.obs[["x", "y"]].to_numpy(), adata.X.toarray().ravel()):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring == [[x, y], [x + 128, y], [x + 128, y + 128], [x, y + 128], [x, y]]
        assert feature["properties"]["objectType"] == "tile"
        assert feature["properties"]["measurements"] == [{"name": "L0000", "value": pytest.approx(code)}]


def test_geojson_of_active_tiles_of_one_slide_names_nobody(tmp_path):
    adata = on_slide([(5, 5), (15, 5), (5, 5), (25, 5)], [[1, 0], [0, 0], [3, 0], [0, -2]], slide=["a", "a", "b", "a"],
                     patient=["Doe"] * 4)  # fmt: skip
    path = tmp_path / "a.geojson"
    assert write_geojson(path, adata, ["L0000", "L0001"], slide="a", slide_mpp=(0.5, 0.25), active_only=True) == 2
    text = path.read_text()
    assert "Doe" not in text
    ring = json.loads(text)["features"][1]["geometry"]["coordinates"][0]
    assert ring[0] == [40, 0] and ring[2] == [60, 40]
    values = [[m["value"] for m in f["properties"]["measurements"]] for f in json.loads(text)["features"]]
    assert values == [[1, 0], [0, -2]]


def test_scanpy_draws_the_spatial_table_on_the_slide(slide):
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    path, samples, adata = slide
    name = str(adata.obs["slide"].iloc[0])
    table = spatial_table(adata, slide=name, source=path, size=500)
    centre = samples.obs[["x", "y"]].to_numpy() + 64
    np.testing.assert_allclose(table.obsm["spatial"], centre)
    factors = table.uns["spatial"][name]["scalefactors"]
    assert factors["spot_diameter_fullres"] == pytest.approx(128)
    assert factors["tissue_hires_scalef"] == pytest.approx(0.5)
    assert table.uns["spatial"][name]["images"]["hires"].shape == (352, 500, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy recommends squidpy, which reads the same slots
        (ax,) = sc.pl.spatial(table, color="L0000", show=False)
    assert ax.images and ax.collections
    np.testing.assert_allclose(adata.obsm["spatial"], samples.obs[["x_um", "y_um"]])  # what was given is not changed


def test_geojson_is_placed_on_the_part_that_qupath_shows(tmp_path, monkeypatch):
    """QuPath cuts a slide to openslide.bounds and counts pixels from there (MIRAX, Leica)."""
    import biosae.read.slides as slides

    class Cropped:
        origin = (1000, 200)

        def close(self):
            pass

    monkeypatch.setattr(slides, "open_slide", lambda path: Cropped())
    adata = on_slide([(505, 105), (515, 105)], [1, 2])
    write_geojson(tmp_path / "a.geojson", adata, "L0000", slide_mpp=0.5, source="a.mrxs")
    ring = json.loads((tmp_path / "a.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    assert ring[0] == [0, 0] and ring[2] == [20, 20]


def test_a_slide_without_bounds_is_counted_from_its_corner(slide, tmp_path):
    path, samples, adata = slide
    write_geojson(tmp_path / "a.geojson", adata, "L0000", source=path)
    ring = json.loads((tmp_path / "a.geojson").read_text())["features"][0]["geometry"]["coordinates"][0]
    assert ring[0] == samples.obs[["x", "y"]].iloc[0].tolist()


def test_tiles_at_one_place_are_two_objects_and_codes_must_be_numbers(tmp_path):
    adata = on_slide([(5, 5), (5, 5), (15, 5)], [1, 2, 3])
    write_geojson(tmp_path / "a.geojson", adata, "L0000", slide_mpp=1.0)
    assert len({f["id"] for f in json.loads((tmp_path / "a.geojson").read_text())["features"]}) == 3
    adata.X.data[0] = np.nan
    with pytest.raises(InputError, match="not a number"):
        write_geojson(tmp_path / "b.geojson", adata, "L0000", slide_mpp=1.0)
    assert not (tmp_path / "b.geojson").exists()


def test_a_spatial_table_without_a_picture_has_the_scale_that_squidpy_asks_for(tmp_path):
    adata = on_slide([(5, 5), (15, 5)], [1, 2], slide=["ward 3/a"] * 2)
    table = spatial_table(adata, slide_mpp=0.5)
    factors = table.uns["spatial"]["ward 3_a"]["scalefactors"]  # HDF5 would take a/b for two levels
    assert factors == {"spot_diameter_fullres": 20.0, "tissue_hires_scalef": 1.0}
    table.write_h5ad(tmp_path / "t.h5ad")
    assert list(anndata.read_h5ad(tmp_path / "t.h5ad").uns["spatial"]) == ["ward 3_a"]


def test_a_spatial_table_is_read_back(slide, tmp_path):
    *_, adata = slide
    spatial_table(adata).write_h5ad(tmp_path / "table.h5ad")
    assert "spot_diameter_fullres" in str(anndata.read_h5ad(tmp_path / "table.h5ad").uns["spatial"])


def test_what_is_missing_or_ambiguous_is_named(tmp_path):
    two = on_slide([(5, 5), (15, 5)], [1, 2], slide=["a", "b"])
    with pytest.raises(InputError, match="2 slides; name one with slide=, such as 'a', 'b'"):
        slide_map(two, "L0000")
    with pytest.raises(InputError, match="no slide 'c'"):
        slide_map(two, "L0000", slide="c")
    with pytest.raises(InputError, match="pass tile_um="):
        slide_map(two, "L0000", slide="a")
    with pytest.raises(InputError, match="slide_mpp="):
        write_geojson(tmp_path / "x.geojson", two, "L0000", slide="a", tile_um=10)
    assert not (tmp_path / "x.geojson").exists()
    bare = on_slide([(5, 5), (15, 5)], [1, 2])
    with pytest.raises(InputError, match="too large; take pixel_um above"):
        slide_map(bare, "L0000", pixel_um=1e-4)
    with pytest.raises(InputError, match="no column 'slide'"):
        slide_map(bare, "L0000", slide="a")
    bare.obsm["spatial"][0] = np.nan
    with pytest.raises(InputError, match="1 tiles have no place"):
        slide_map(bare, "L0000")
    del bare.obsm["spatial"]
    with pytest.raises(InputError, match=r"bs\.read\.wsi"):
        slide_map(bare, "L0000")
