"""Embeddings made elsewhere: files as their programmes write them, ids, joins, refusals, both ways of holding them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import biosae as bs
from biosae.embeddings import guard, ingest
from biosae.embeddings.foreign import look
from biosae.errors import IdentityError, InputError, TooManyFailuresError
from biosae.read.decode import ImageReader

h5py = pytest.importorskip("h5py")
anndata = pytest.importorskip("anndata")

RNG = np.random.default_rng(0)
SOME = {"encoder": "some", "licence": "MIT"}


def vectors(n, d=8, dtype="f4"):
    return RNG.normal(size=(n, d)).astype(dtype)


def trident(path, X, coords, **attributes):
    """A file as TRIDENT writes one: a chunk a row, attributes on both data sets."""
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", data=X, maxshape=(None, *X.shape[1:]), chunks=(1, *X.shape[1:]))
        features.attrs.update({"name": path.stem, "savetodir": "/x", "encoder": "uni_v1"} | attributes)
        where = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(1, 2))
        where.attrs.update(
            {"patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "overlap": 0, "name": path.stem}
        )


def clam(path, X, coords):
    """A file as CLAM writes one: chunks of 32 rows, no attributes."""
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=X, maxshape=(None, X.shape[1]), chunks=(32, X.shape[1]))
        file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(32, 2))


@pytest.fixture
def slides(tmp_path):
    """Two slides as TRIDENT leaves them, and a table of three."""
    arrays = {}
    for name, n in (("s1", 50), ("s2", 40)):
        coords = np.stack([np.arange(n) % 7 * 512, np.arange(n) // 7 * 512], axis=1)
        arrays[name] = vectors(n, 1024), coords
        trident(tmp_path / f"{name}.h5", *arrays[name])
    pd.DataFrame({"slide_id": ["s2", "s1"], "case": ["P2", "P1"], "grade": [3, 1], "level0": [0.25, 0.5]}).to_csv(
        tmp_path / "slides.csv", index=False
    )
    return tmp_path, arrays


def test_slides_of_trident_with_a_table_of_slides(slides):
    folder, arrays = slides
    emb = bs.read.features(
        folder, encoder="UNI", samples=folder / "slides.csv", id="slide_id", join="file", patient="case", label="grade",
        slide_mpp="level0", mpp=0.5,
    )  # fmt: skip
    assert emb.shape == (90, 1024)
    assert emb.dtype == np.float32
    assert emb.obs.index[8] == "s1_x512_y512"
    at = emb.obs.index.get_loc("s2_x1024_y2560")
    row = emb.obs.iloc[at]
    assert (row["patient"], row["slide"], row["label"], row["x"], row["y"]) == ("P2", "s2", 3, 1024, 2560)
    assert (row["x_um"], row["y_um"]) == ((1024 + 256) * 0.25, (2560 + 256) * 0.25)  # the centre
    X, coords = arrays["s2"]
    np.testing.assert_array_equal(emb[at], X[(coords == [1024, 2560]).all(axis=1)][0])
    assert emb.identity["encoder"] == "uni"
    assert (emb.identity["licence"], emb.identity["pool"]) == ("CC-BY-NC-ND-4.0", "cls")
    assert emb.identity["derivatives_restricted"] is True
    assert emb.provenance["stated_encoder"] == ["uni_v1"]
    assert emb.mpp == 0.5
    assert emb.roles == {"patient": "case", "slide": "slide", "label": "grade"}


def test_a_folder_of_shards_holds_the_same_rows(slides, monkeypatch, tmp_path_factory):
    (folder, arrays), out = slides, tmp_path_factory.mktemp("out")
    monkeypatch.setattr(ingest, "SHARD_ROWS", 32)
    with pytest.raises(InputError, match="out= lies in the folder"):
        bs.read.features(folder, encoder="uni", patient=None, out=folder / "out")
    inside = bs.read.features(folder, encoder="uni", patient=None)
    emb = bs.read.features(folder, encoder="uni", patient=None, out=out)
    assert len(emb.provenance["shards"]) == 3
    np.testing.assert_array_equal(emb.array(), np.concatenate([arrays["s1"][0], arrays["s2"][0]]))
    np.testing.assert_array_equal(emb.array(), inside.array())
    pd.testing.assert_frame_equal(emb.obs, inside.obs)
    assert emb.fingerprint == inside.fingerprint
    again = bs.Embeddings.open(out / "uni" / "final", verify=True)
    assert again.obs.index.equals(emb.obs.index)
    (out / "uni" / "final" / "shard-00001.json").unlink()  # as a killed call leaves it
    kept = (out / "uni" / "final" / "shard-00002.npy").stat().st_mtime_ns
    once_more = bs.read.features(folder, encoder="uni", patient=None, out=out)
    np.testing.assert_array_equal(once_more.array(), inside.array())
    assert (out / "uni" / "final" / "shard-00002.npy").stat().st_mtime_ns == kept


def test_files_named_by_a_table_carry_its_columns(slides):
    folder, _ = slides
    table = pd.DataFrame({"path": ["s2.h5", "s1.h5"], "donor": ["b", "a"], "centre": ["N", "S"]})
    emb = bs.read.features(table, root=folder, encoder="uni", patient="donor", site="centre")
    assert emb.obs.groupby("slide")[["patient", "site"]].first().to_numpy().tolist() == [["a", "S"], ["b", "N"]]
    with pytest.raises(InputError, match="column 'file', which this reader fills"):
        bs.read.features(table.assign(file="x"), root=folder, encoder="uni", patient="donor")
    missing = pd.concat([table, table.head(1).assign(path="s3.h5")])
    with pytest.raises(TooManyFailuresError, match="1 of 3 files or rows"):
        bs.read.features(missing, root=folder, encoder="uni", patient="donor")
    with pytest.warns(UserWarning, match="s3.h5"):
        emb = bs.read.features(missing, root=folder, encoder="uni", patient="donor", max_failures=0.4)
    assert emb.provenance["failures"] == [["s3.h5", "read/features", "missing", f"no file {folder / 's3.h5'}"]]


def test_files_of_clam_and_one_vector_a_slide(tmp_path):
    X, coords = vectors(40), np.stack([np.arange(40) * 256, np.full(40, 9)], axis=1)
    clam(tmp_path / "a.h5", X, coords)
    emb = bs.read.features(tmp_path / "a.h5", patient=None, **SOME)
    assert emb.obs.index[1] == "a_x256_y9"
    np.testing.assert_array_equal(emb.array(), X)
    with pytest.raises(InputError, match="pass tile_px="):
        bs.read.features(tmp_path / "a.h5", patient=None, slide_mpp=0.25, **SOME)
    emb = bs.read.features(tmp_path / "a.h5", patient=None, slide_mpp=0.25, tile_px=256, **SOME)
    assert emb.obs["x_um"].iloc[1] == (256 + 128) * 0.25
    for name in ("u", "v"):
        trident(tmp_path / f"{name}.h5", vectors(1)[0], coords[:1])
    whole = pd.DataFrame({"path": ["u.h5", "v.h5"]})
    assert bs.read.features(whole, root=tmp_path, patient=None, **SOME).obs.index.tolist() == ["u", "v"]


def test_arrays_need_ids(tmp_path):
    X = vectors(6, dtype="f2")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(InputError, match="not joined by position: pass ids="):
        bs.read.features(tmp_path / "x.npy", patient=None, **SOME)
    with pytest.raises(InputError, match="ids= has 5 entries"):
        bs.read.features(tmp_path / "x.npy", patient=None, ids=list("abcde"), **SOME)
    with pytest.raises(InputError, match="'a' occurs more than once"):
        bs.read.features(tmp_path / "x.npy", patient=None, ids=list("abcdea"), **SOME)
    emb = bs.read.features(tmp_path / "x.npy", patient=None, ids=list("abcdef"), **SOME)
    assert emb.dtype == np.float16
    np.testing.assert_array_equal(emb.raw(0, 6), X)
    rows = pd.DataFrame({"cell": ["007", "008", "009", "010", "011", "012"], "donor": list("uuvvww"), "q": range(6)})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    emb = bs.read.features(tmp_path / "x.npy", patient="donor", ids=tmp_path / "rows.csv", id="cell", **SOME)
    assert emb.obs.loc["008", ["patient", "q"]].tolist() == ["u", 1]


def test_joined_to_samples_by_id_never_by_position(tmp_path):
    X = vectors(6)
    np.savez(tmp_path / "x.npz", features=X, ids=np.array(list("fedcba")))
    obs = pd.DataFrame({"patient": list("ppqqr"), "path": [f"{i}.png" for i in "abcde"]}, index=list("abcde"))
    samples = bs.Samples(obs, ImageReader(), roles={"patient": "patient"}, mpp=0.4)
    emb = bs.read.features(tmp_path / "x.npz", samples=samples, **SOME)
    assert emb.obs.index.tolist() == list("edcba")  # f is no sample
    np.testing.assert_array_equal(emb[emb.obs.index.get_loc("b")], X[4])
    assert emb.obs.loc["b", "patient"] == "p"
    assert emb.mpp == 0.4
    with pytest.raises(InputError, match="drop patient="):
        bs.read.features(tmp_path / "x.npz", samples=samples, patient="patient", **SOME)
    with pytest.raises(InputError, match="no row of the files is among samples"):
        bs.read.features(tmp_path / "x.npz", samples=pd.DataFrame({"sample_id": ["z"]}), patient=None, **SOME)
    more = pd.DataFrame({"sample_id": list("abcxyz")})
    with pytest.raises(TooManyFailuresError, match="3 of 6"):
        bs.read.features(tmp_path / "x.npz", samples=more, patient=None, **SOME)
    with pytest.raises(InputError, match="which column names the patients"):
        bs.read.features(tmp_path / "x.npz", **SOME)


@pytest.mark.parametrize("form", ["list", "fixed", "numbered"])
def test_parquet_in_three_forms(tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    X = vectors(30, 12)
    columns = {"cell": [f"c{i}" for i in range(30)], "area": np.arange(30.0)}
    if form == "numbered":
        columns |= {f"emb_{j}": X[:, j] for j in RNG.permutation(12)}  # emb_10 comes after emb_9
    elif form == "list":
        columns["vector"] = pa.array(list(X))
    else:
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 12)
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=7)
    emb = bs.read.features(tmp_path / "x.parquet", row_id="cell", patient=None, **SOME)
    np.testing.assert_array_equal(emb.array(), X)
    assert emb.obs.loc["c7", "area"] == 7
    key = "emb_" if form == "numbered" else "vector"
    named = bs.read.features(tmp_path / "x.parquet", row_id="cell", key=key, patient=None, **SOME)
    np.testing.assert_array_equal(named.array(), X)


def test_lists_of_different_lengths_are_refused(tmp_path):
    pd.DataFrame({"sample_id": list("abc"), "v": [[1.0, 2.0], [1.0], [3.0, 4.0]]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(TooManyFailuresError, match="wrong_size"):
        bs.read.features(tmp_path / "x.parquet", patient=None, **SOME)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_anndata_against_its_own_reader(tmp_path, form):
    X, Y = vectors(20), vectors(20, 5)
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(list("abcd") * 5), "n": pd.array([None, *range(19)], dtype="Int64"),
            "text": [f"t{i}" for i in range(20)], "flag": np.arange(20) % 2 == 0,
        },
        index=[f"cell{i}" for i in range(20)],
    )  # fmt: skip
    adata = anndata.AnnData(X, obs=obs, obsm={"X_other": Y, "spatial": np.arange(40.0).reshape(20, 2)})
    path = tmp_path / f"a.{form}"
    getattr(adata, f"write_{form}")(path)
    with pytest.raises(InputError, match="Pass key=; it has 'X', 'X_other'"):
        bs.read.features(path, patient="donor", **SOME)
    for key, truth in (("X", X), ("X_other", Y)):
        emb = bs.read.features(path, key=key, patient="donor", **SOME)
        np.testing.assert_array_equal(emb.array(), truth)
        assert emb.obs["patient"].tolist() == list("abcd") * 5
        assert not {"x", "y", "slide"} & set(emb.obs)  # nothing says what spatial measures
        own = (anndata.read_h5ad if form == "h5ad" else anndata.read_zarr)(path).obs
        pd.testing.assert_frame_equal(
            emb.obs[["n", "text", "flag"]], own[["n", "text", "flag"]].astype({"text": object}), check_names=False
        )


def test_spatial_of_anndata_is_what_the_user_says(tmp_path):
    """Centres at (100, 60) and (228, 60) of tiles of 128 px at 0.5 um/px, whose corners lie 64 px before."""
    centres = np.array([[100.0, 60.0], [228.0, 60.0]])
    obs = pd.DataFrame(index=["a", "b"])

    def read(spatial, coordinates, **options):
        anndata.AnnData(vectors(2), obs=obs, obsm={"spatial": spatial}).write_h5ad(tmp_path / "s1.h5ad")
        return bs.read.features(tmp_path / "s1.h5ad", patient=None, coordinates=coordinates, **options, **SOME).obs

    for spatial, coordinates, options in (
        (centres, "centre", {"tile_px": 128, "slide_mpp": 0.5}),
        (centres - 64, "corner", {"tile_px": 128, "slide_mpp": 0.5}),
    ):
        found = read(spatial, coordinates, **options)
        np.testing.assert_array_equal(found[["x", "y"]], centres - 64)
        np.testing.assert_array_equal(found[["x_um", "y_um"]], centres * 0.5)
        assert found["slide"].tolist() == ["s1", "s1"]
    found = read(centres * 0.5, "um")
    np.testing.assert_array_equal(found[["x_um", "y_um"]], centres * 0.5)
    assert "x" not in found and found["slide"].tolist() == ["s1", "s1"]
    spots = read(centres, "centre", slide_mpp=0.5)  # spots have no side
    assert "x" not in spots and spots["x_um"].tolist() == [50, 114]
    assert "x_um" not in read(centres, None)
    for coordinates, options, message in (
        ("center", {}, "centre"), ("centre", {}, "needs slide_mpp="), ("um", {"slide_mpp": 0.5}, "drop slide_mpp="),
        ("corner", {"slide_mpp": 0.5}, "tile_px="),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read(centres, coordinates, **options)
    with pytest.raises(InputError, match="no obsm"):
        read(np.arange(6.0).reshape(2, 3), "corner")


def test_positions_of_latents_come_back(tmp_path):
    """``bs.encode`` writes micrometres into ``spatial``; read again they are the same micrometres, not pixels."""
    place = pd.DataFrame({"x_um": [10.0, 74.0], "y_um": [5.0, 5.0]}, index=["a", "b"])
    anndata.AnnData(vectors(2), obs=place, obsm={"spatial": place.to_numpy()}).write_h5ad(tmp_path / "z.h5ad")
    for coordinates in (None, "um"):
        found = bs.read.features(tmp_path / "z.h5ad", patient=None, coordinates=coordinates, **SOME).obs
        assert "x" not in found
        np.testing.assert_array_equal(found[["x_um", "y_um"]], place)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_categories_of_old_anndata_are_names_not_codes(tmp_path, form):
    """anndata 0.7 kept categories apart and let the codes' data set refer to them."""
    path = tmp_path / f"old.{form}"
    if form == "h5ad":
        root = h5py.File(path, "w")
        text = {"dtype": h5py.string_dtype()}
    else:
        import zarr

        root, text = zarr.open_group(str(path), mode="w", zarr_format=2), {}
    root.create_dataset("X", data=vectors(4), shape=(4, 8))
    obs = root.create_group("obs")
    obs.attrs.update(
        {"_index": "index", "encoding-type": "dataframe", "encoding-version": "0.1.0", "column-order": ["donor"]}
    )
    obs.create_dataset("index", data=np.array(list("abcd"), **text or {"dtype": "U1"}), shape=(4,))
    obs.create_dataset("donor", data=np.array([1, 0, -1, 1], "i1"), shape=(4,))
    levels = obs.create_group("__categories").create_dataset(
        "donor", data=np.array(["eve", "adam"], **text or {"dtype": "U4"}), shape=(2,)
    )
    obs["donor"].attrs["categories"] = levels.ref if form == "h5ad" else "__categories/donor"
    if form == "h5ad":
        root.close()
        assert anndata.read_h5ad(path).obs["donor"].tolist()[:2] == ["adam", "eve"]
    emb = bs.read.features(path, key="X", patient=None, **SOME)
    assert emb.obs["donor"].astype(object).where(emb.obs["donor"].notna(), None).tolist() == [
        "adam", "eve", None, "adam"
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["npz", "zarr"])
def test_files_written_anew_are_not_taken_for_the_old_ones(tmp_path, form):
    path, ids = tmp_path / f"a.{form}", list("abc")

    def write(X):
        if form == "npz":
            np.savez(path, features=X, ids=np.array(ids))
        else:
            anndata.AnnData(X, obs=pd.DataFrame(index=ids)).write_zarr(path)

    X = vectors(3)
    write(X)
    for _ in range(2):  # the second call takes what is there
        emb = bs.read.features(path, patient=None, out=tmp_path / "out", **SOME)
        np.testing.assert_array_equal(emb.array(), X)
    write(X + 1)
    with pytest.raises(IdentityError, match=r"written anew since .*; choose another out="):
        bs.read.features(path, patient=None, out=tmp_path / "out", **SOME)


def test_table_of_a_wsidata_store(tmp_path):
    """Folders as WSIData writes them: a table of vectors, and the tiles with their corners as shapes."""
    import zarr

    X, n = vectors(12), 12
    tiles = pd.DataFrame({"tile_id": np.arange(n)[::-1], "x": np.arange(n)[::-1] * 100, "y": 7})  # another order
    obs = pd.DataFrame({"tile_id": np.arange(n), "library_id": pd.Categorical(["tiles"] * n)},
                       index=np.arange(n).astype(str))  # fmt: skip
    store = tmp_path / "s1.zarr"
    zarr.open_group(str(store), mode="w", zarr_format=2).create_group("tables")
    adata = anndata.AnnData(X, obs=obs)
    adata.uns["spatialdata_attrs"] = {"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"}
    adata.write_zarr(store / "tables" / "uni_tiles")
    (store / "shapes" / "tiles").mkdir(parents=True)
    tiles.to_parquet(store / "shapes" / "tiles" / "shapes.parquet")
    emb = bs.read.features(store, patient=None, prefix=True, **SOME)
    np.testing.assert_array_equal(emb.array(), X)
    assert emb.obs.loc["s1/3", ["x", "y"]].tolist() == [300, 7]
    assert emb.obs["slide"].unique().tolist() == ["s1"]


def test_ids_that_recur_among_files(tmp_path):
    for name in ("u", "v"):
        np.savez(tmp_path / f"{name}.npz", features=vectors(3), ids=np.arange(3))
    with pytest.raises(InputError, match="'0' occurs more than once in several files; pass prefix=True"):
        bs.read.features(tmp_path, patient=None, **SOME)
    emb = bs.read.features(tmp_path, patient=None, prefix=True, **SOME)
    assert emb.obs.index.tolist() == ["u/0", "u/1", "u/2", "v/0", "v/1", "v/2"]


def test_the_encoder_is_held_against_the_catalogue(tmp_path):
    np.savez(tmp_path / "x.npz", features=vectors(3, 1280), ids=list("abc"))
    read = {"source": tmp_path / "x.npz", "patient": None}
    with pytest.raises(InputError, match="uni with pool='cls' gives 1024 numbers, these vectors have 1280"):
        bs.read.features(encoder="uni", **read)
    with pytest.raises(InputError, match="virchow2 with pool='cls\\+mean' gives 2560"):
        bs.read.features(encoder="virchow2", **read)
    assert bs.read.features(encoder="Virchow2", pool="cls", **read).identity["dim"] == 1280
    with pytest.raises(InputError, match=r"did you mean 'uni2-h'.*also pass licence="):
        bs.read.features(encoder="uni2_hh", **read)
    one = bs.read.features(encoder="virchow2", pool="cls", **read)
    other = bs.read.features(encoder="virchow2", pool="cls", layer="block_20", **read)
    assert one.fingerprint != other.fingerprint
    np.savez(tmp_path / "y.npz", features=vectors(3, 7), ids=list("def"))
    with pytest.raises(InputError, match="different widths"):
        bs.read.features(tmp_path, patient=None, **SOME)
    for name, encoder in (("p", "uni_v1"), ("q", "conch_v15")):
        trident(tmp_path / f"{name}.h5", vectors(2), np.array([[0, 0], [0, 1]]), encoder=encoder)
    stated = pd.DataFrame({"path": ["p.h5", "q.h5"]})
    with pytest.raises(InputError, match="state different encoders"):
        bs.read.features(stated, root=tmp_path, patient=None, **SOME)


@pytest.mark.parametrize("out", [False, True])
def test_rows_that_are_not_finite_are_listed(tmp_path, out, monkeypatch):
    monkeypatch.setattr(ingest, "SHARD_ROWS", 16)
    X = vectors(50, dtype="f8")
    X[[3, 40], 2] = np.nan, np.inf
    X[20, 0] = 1e300  # infinite as float32
    np.savez(tmp_path / "x.npz", features=X, ids=np.arange(50))
    target = {"out": tmp_path / "out"} if out else {}
    with pytest.raises(TooManyFailuresError, match="3 of 50"):
        bs.read.features(tmp_path / "x.npz", patient=None, **SOME, **target)
    with pytest.warns(UserWarning, match="3 files or rows are not used"):
        emb = bs.read.features(tmp_path / "x.npz", patient=None, max_failures=0.1, **SOME, **target)
    good = np.setdiff1d(np.arange(50), [3, 20, 40])
    assert emb.obs.index.tolist() == good.astype(str).tolist()
    np.testing.assert_array_equal(emb.array(), X[good].astype("f4"))
    assert [row[0] for row in emb.provenance["failures"]] == ["3", "20", "40"]
    if out:
        assert pd.read_csv(tmp_path / "out" / "failures.csv")["reason"].tolist() == ["non_finite"] * 3
        assert bs.Embeddings.open(tmp_path / "out" / "some" / "final", verify=True).n_samples == 47


def test_nothing_is_unpickled(tmp_path):
    objects = np.array([{"a": 1}, None, "x"], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", features=objects)
    np.savez(tmp_path / "ids.npz", features=vectors(3), ids=objects)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("features", data=["a", "b"], dtype=h5py.string_dtype())
    for name in ("x.npy", "x.npz", "ids.npz", "x.h5"):
        key = "features" if name == "x.npz" else None
        with pytest.raises((InputError, TooManyFailuresError)):
            bs.read.features(tmp_path / name, key=key, patient=None, ids=None, **SOME)
    for name in ("x.pt", "x.pkl"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=r"is not \.csv"):
            bs.read.features(tmp_path / name, patient=None, **SOME)


def test_sizes_that_a_file_cannot_hold(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:  # a billion rows that were never written
        file.create_dataset("features", shape=(10**9, 1024), dtype="f4", chunks=(1, 1024))
    with pytest.raises(TooManyFailuresError, match=r"truncated: x\.h5\[.features.\] states"):
        bs.read.features(tmp_path / "x.h5", patient=None, **SOME)
    header = np.lib.format
    with open(tmp_path / "x.npy", "wb") as stream:
        header.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 64)})
        stream.write(bytes(256))
    with pytest.raises(TooManyFailuresError, match=r"truncated|unreadable"):
        bs.read.features(tmp_path / "x.npy", patient=None, ids=["a"], **SOME)


def test_a_file_that_ends_the_hdf5_library_is_listed(tmp_path, monkeypatch):
    """A process that dies or hangs on a file costs that file, and the next ones are tried in a new process."""
    for name in ("a", "b", "c", "d"):
        clam(tmp_path / f"{name}.h5", vectors(3), np.arange(6).reshape(3, 2))
    script = (
        "import sys, os, time\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if line.strip().endswith('b.h5'): os._exit(-11)\n"
        "    if line.strip().endswith('c.h5'): time.sleep(60)\n"
        "    print('done', flush=True)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(guard, "SECONDS", 1.0)
    monkeypatch.setattr(
        guard.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", script], **options)
    )
    with pytest.warns(UserWarning, match="2 files or rows are not used"):
        emb = bs.read.features(tmp_path, patient=None, max_failures=0.5, **SOME)
    assert emb.obs["file"].unique().tolist() == ["a.h5", "d.h5"]
    assert [(row[0], row[2]) for row in emb.provenance["failures"]] == [("b.h5", "unreadable"), ("c.h5", "unreadable")]
    assert "crashed" in emb.provenance["failures"][0][3]
    assert "did not come back" in emb.provenance["failures"][1][3]


def test_a_description_reads_no_row(tmp_path):
    X = np.asfortranarray(vectors(9))
    np.savez_compressed(tmp_path / "x.npz", features=X, ids=np.arange(9))
    found = look(tmp_path / "x.npz")
    assert (found.n, found.dim, found.ids[2]) == (9, 8, "2")
    emb = bs.read.features(tmp_path / "x.npz", patient=None, **SOME)
    np.testing.assert_array_equal(emb.array(), X)


def test_an_sae_takes_them(slides):
    folder, _ = slides
    emb = bs.read.features(folder, encoder="uni", patient=None)
    sae = bs.sae.SAE(n_latents=16, k=2, n_steps=5, batch_size=32, device="cpu").fit(emb)
    adata = bs.encode(sae, emb)
    assert adata.n_obs == 90
    assert adata.uns["biosae"]["identity"]["encoder"] == "uni"
