"""Exports: every file read back by the tool it is meant for, without identifiers, with the encoder's terms."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given

import biosae as bs
from biosae import export
from biosae.errors import InputError

PATIENTS = ["Ramirez-003", "Okafor-117", "Ramirez-0031", "Lindqvist-9"]
IDENTITY = {
    "encoder": "uni", "source": "hf-hub:MahmoodLab/uni", "layer": "final", "licence": "CC-BY-NC-ND-4.0",
    "derivatives_restricted": True, "weights_sha256": "ab" * 32,
}  # fmt: skip
TELLING = [*PATIENTS, "HOSP2291", "/home/anna", "1948-05-02", "Okafor", "collected by", "anna"]
"""What must not be found in any byte of an export."""


def latents(*, tokens: bool = False) -> anndata.AnnData:
    """24 samples of 4 patients with everything that could give them away."""
    rng = np.random.default_rng(0)
    n, m = 24, 12
    who = np.array(PATIENTS)[np.arange(n) // 4 % 4 if tokens else np.arange(n) % 4]
    slide = np.array([f"{p}_HOSP2291-{i % 2}" for i, p in enumerate(who)])
    obs = pd.DataFrame(
        {
            "case": who,
            "patient": pd.Categorical(who, categories=[*PATIENTS, "Unused-Patient"]),
            "slide": slide,
            "collector": "anna",
            "path": [f"/home/anna/{s}/{i}.png" for i, s in enumerate(slide)],
            "site": np.where(np.arange(n) % 4 < 2, "north", "south"),
            "label": pd.Categorical(np.where(rng.random(n) < 0.5, "HER2+/ER-", "HER2-/ER+")),
            "birth": "1948-05-02",
            "remark": [f"collected by anna, {p}" for p in who],
            "count_plasma": rng.integers(0, 9, n),
            "age": np.where(np.arange(n) % 5 == 0, np.nan, 61.5),
            "sae_trained_on": np.arange(n) % 2 == 0,
        },
        index=pd.Index([f"{p}_tile{i}" for i, p in enumerate(who)], name="sample_id"),
    )
    if tokens:
        obs.insert(0, "sample_id", np.repeat(obs.index[:6].to_numpy(), 4))
        obs["token_row"], obs["token_col"] = np.tile([0, 0, 1, 1], 6), np.tile([0, 1, 0, 1], 6)
        obs.index = pd.Index([f"{s}#{t}" for s, t in zip(obs["sample_id"], np.tile(range(4), 6))], name="token_id")
    X = sp.random(n, m, density=0.3, format="csr", dtype=np.float32, random_state=1)
    var = pd.DataFrame(
        {
            "name": ["plasma cells", *[""] * (m - 1)],
            "note": ["as in Ramirez-003, see /home/anna/x/y.png", *[""] * (m - 1)],
        },
        index=[f"L{j:04d}" for j in range(m)],
    )
    adata = anndata.AnnData(X, obs=obs, var=var)
    adata.obsm["embedding"] = rng.normal(size=(n, 5)).astype(np.float32)
    adata.obsm["spatial"] = rng.uniform(0, 1000, (n, 2))
    adata.obsm["X_umap"] = rng.normal(size=(n, 2))
    adata.obsm["table"] = pd.DataFrame({"who": who}, index=obs.index)
    adata.varm["decoder"] = rng.normal(size=(m, 5)).astype(np.float32)
    adata.uns["biosae"] = {
        "identity": IDENTITY, "roles": {"patient": "case", "slide": "slide"}, "tokens": "none", "mpp": 0.5,
        "sae": {"architecture": "topk", "checkpoint": "/home/anna/secret", "note": "tuned for Okafor-117"},
    }  # fmt: skip
    adata.uns["remark"] = "collected by anna"
    return adata


def everything(path: Path) -> bytes:
    """Bytes of a file, or of all files of a folder with their names; compressed ones as they unpack."""
    if path.is_dir():
        return b"".join(str(f).encode() + f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file())
    return path.read_bytes()


@pytest.fixture(autouse=True)
def secret(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the secret of pseudonyms lies during a test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(bs.settings, "cache_dir", folder)
    return folder / "pseudonyms.key"


def in_order(adata: anndata.AnnData) -> anndata.AnnData:
    """The same rows in the order in which an export has them."""
    key = export.pseudonyms(adata)
    return adata[key.loc[key["kind"] == "sample", "id"].tolist()].copy()


def same_codes(found: anndata.AnnData, given: anndata.AnnData) -> None:
    assert found.shape == given.shape
    np.testing.assert_array_equal(sp.csr_matrix(found.X).toarray(), given.X.toarray())


# ---------------------------------------------------------------------------------------------------------- shareable


def test_what_leaves_holds_no_identifier(recwarn):
    adata = in_order(latents())
    first = adata.obs_names[0]
    out = export.shareable(adata, columns=["count_plasma", "age"])
    text = repr(out.obs.to_dict()) + repr(list(out.obs.index)) + repr(out.var.to_dict()) + repr(dict(out.uns))
    text += repr([c.categories.tolist() for c in out.obs.apply(lambda c: getattr(c, "cat", None)) if c is not None])
    assert not [word for word in [*TELLING, "Unused-Patient"] if word in text]
    assert set(out.obs) == {
        "patient", "slide", "collector", "site", "label", "count_plasma", "age", "sae_trained_on",
    }  # fmt: skip
    assert "table" not in out.obsm and set(out.uns) == {"biosae"}
    assert out.var["note"].iloc[0].startswith("as in patient_") and out.var["note"].iloc[0].endswith(" y.png")
    assert out.uns["biosae"]["sae"]["note"].startswith("tuned for patient_")
    assert out.uns["biosae"]["identity"]["source"] == "hf-hub:MahmoodLab/uni"
    assert adata.obs_names[0] == first and "licence" not in adata.uns["biosae"]
    same_codes(out, adata)


def test_pseudonyms_keep_groups_and_lead_back():
    adata = latents()
    out, key = export.shareable(adata), export.pseudonyms(adata)
    back = key.set_index("pseudonym")["id"]
    given = adata[back[out.obs_names].tolist()]
    for kind in ("patient", "slide"):
        assert back[out.obs[kind].astype(str)].tolist() == given.obs[kind].astype(str).tolist()
    same_codes(out, given.copy())
    np.testing.assert_array_equal(out.obsm["embedding"], given.obsm["embedding"])
    assert out.obs["patient"].astype(str).is_monotonic_increasing  # not the order of the rows that were given
    mine = [name for name in back[out.obs_names] if name.startswith("Okafor-117_")]
    assert mine == sorted(mine, key=adata.obs_names.tolist().index)  # windows of a recording stay in their order
    assert key.equals(export.pseudonyms(adata))


@pytest.mark.parametrize("grouped", [True, False])
def test_who_has_a_list_of_the_ids_cannot_number_them(grouped, secret, monkeypatch, tmp_path):
    """Neither ids nor the order of rows give pseudonyms away: another secret, another order."""
    names = [f"case-{i:04d}" for i in range(200)]
    obs = pd.DataFrame({"patient": names} if grouped else {}, index=names)
    adata = anndata.AnnData(sp.eye(200, format="csr", dtype=np.float32), obs=obs)
    made = [export.pseudonyms(adata)["id"].tolist()]
    assert (secret.stat().st_mode & 0o777) == 0o600 and len(secret.read_bytes()) == 32
    for i in range(2):
        monkeypatch.setattr(bs.settings, "cache_dir", tmp_path / str(i))
        made.append(export.pseudonyms(adata)["id"].tolist())
    assert len({tuple(ids[:200]) for ids in made}) == 3
    for ids in made:
        assert abs(np.corrcoef(np.arange(200), [int(name[5:]) for name in ids[:200]])[0, 1]) < 0.4  # 5.6 sigma
    monkeypatch.setattr(bs.settings, "cache_dir", secret.parent)
    assert export.pseudonyms(adata)["id"].tolist() == made[0]


def test_processes_that_start_at_once_share_one_secret(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    made = export.order._secret.__wrapped__
    with ThreadPoolExecutor(8) as pool:
        held = set(pool.map(made, [tmp_path / "pseudonyms.key"] * 32))
    assert held == {(tmp_path / "pseudonyms.key").read_bytes()} and len(list(tmp_path.iterdir())) == 1


def test_a_secret_that_cannot_be_kept_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(bs.settings, "cache_dir", tmp_path / "file")
    with pytest.warns(UserWarning, match="other pseudonyms"):
        key = export.pseudonyms(latents())
    assert key.equals(export.pseudonyms(latents()))  # within a session they stay


def test_tokens_keep_their_sample():
    out = export.shareable(latents(tokens=True))
    of_three = [f"sample_00000{i}#{t}" for i in (1, 2, 3) for t in range(4)]
    assert (
        sorted(out.obs_names[out.obs["sample_id"].isin(["sample_000001", "sample_000002", "sample_000003"])])
        == of_three
    )
    assert out.obs.groupby("sample_id")["patient"].nunique().eq(1).all()
    assert out.obs["sample_id"].nunique() == 6 and out.obs["token_col"].tolist()[:4] == [0, 1, 0, 1]


def test_columns_that_would_tell_are_refused():
    adata = latents()
    for column in ("case", "remark", "path"):
        with pytest.raises(InputError, match=f"column '{column}' has ids"):
            export.shareable(adata, columns=[column])
    adata.obs["number"] = np.arange(24)
    adata.obs["patient"] = (np.arange(24) % 4 + 70_001).astype(str)
    adata.obs["record"] = np.arange(24) % 4 + 70_001
    assert "number" in export.shareable(adata, columns=["number"]).obs
    for kind in (int, float, "Int64", str):
        adata.obs["record"] = (np.arange(24) % 4 + 70_001).astype(int)
        adata.obs["record"] = adata.obs["record"].astype(kind)
        with pytest.raises(InputError, match="'record'"):
            export.shareable(adata, columns=["record"])
    with pytest.raises(InputError, match="did you mean 'count_plasma'"):
        export.shareable(adata, columns=["count_plsma"])
    adata = latents()
    adata.obs["label"] = "as Okafor-117"
    with pytest.warns(UserWarning, match="'label' has ids"):
        assert "label" not in export.shareable(adata).obs


def test_ids_in_other_letters_are_ids():
    adata = latents()
    adata.var["note"] = "like OKAFOR-117, not RAMIREZ-0031x"
    note = export.shareable(adata).var["note"].iloc[0]
    assert note.startswith("like patient_") and note.endswith(", not RAMIREZ-0031x")


def test_show_ids_keeps_everything():
    out = export.shareable(latents(), show_ids=True)
    assert out.obs.equals(latents().obs) and "remark" in out.uns and out.uns["biosae"]["licence"]["encoder"] == "uni"


@given(
    ids=st.lists(st.text("abXY19 .-_/#", min_size=1, max_size=8), min_size=2, max_size=6, unique=True),
    around=st.lists(st.sampled_from(["", " ", "x", "(", ", ", "_", "9"]), min_size=12, max_size=12),
)
def test_no_long_id_is_left_between_other_characters(ids, around):
    """Whatever stands around it: only where letters or digits go on is it another word."""
    n = len(ids)
    obs = pd.DataFrame({"patient": ids}, index=[f"s{i}" for i in range(n)])
    before, after = (around[i::2][:n] for i in (0, 1))
    var = pd.DataFrame(
        {"note": [a + name + b for a, name, b in zip(before, ids, after)]}, index=[f"L{i}" for i in range(n)]
    )
    out = export.shareable(anndata.AnnData(sp.eye(n, format="csr", dtype=np.float32), obs=obs, var=var))
    for a, name, b, note in zip(before, ids, after, out.var["note"]):
        alone = not (a.isalnum() and name[0].isalnum()) and not (b.isalnum() and name[-1].isalnum())
        if len(name) >= 5 and alone and name.isalnum():
            assert name not in note


# -------------------------------------------------------------------------------------------------------------- terms


def test_terms_are_inherited_and_the_stricter_source_holds():
    for encoder, licence, restricted in [("uni", "CC-BY-NC-ND-4.0", True), ("phikon", "Owkin non-commercial", None)]:
        found = export.terms({"encoder": encoder})
        assert found.licence == licence and (restricted is None or found.derivatives_restricted is restricted)
    relaxed = export.terms({"encoder": "uni", "licence": "CC-BY-NC-ND-4.0", "derivatives_restricted": False})
    assert relaxed.derivatives_restricted and not relaxed.may_be_passed_on and relaxed.gated
    assert "do not publish" in relaxed.statement
    with pytest.raises(InputError, match="leave licence out"):
        export.terms(IDENTITY, licence="MIT")
    assert not export.terms(None).may_be_passed_on and "unknown" in export.terms(None).statement
    assert export.terms({"encoder": "uni", "source": "folder:uni_copy"}).repository == "MahmoodLab/uni"
    mine = export.terms({"encoder": "our-own"}, licence="MIT")
    assert mine.may_be_passed_on and mine.hub_licence == "mit" and "our-own" in mine.statement


@pytest.mark.parametrize(
    ("identity", "licence", "passed_on"),
    [
        ({"encoder": "uni", "licence": "MIT"}, "CC-BY-NC-ND-4.0", False),  # what somebody wrote is not the catalogue
        ({"encoder": "UNI", "licence": "Apache-2.0"}, "CC-BY-NC-ND-4.0", False),
        ({"encoder": "mine", "source": "hf-hub:MahmoodLab/UNI", "licence": "MIT"}, "CC-BY-NC-ND-4.0", False),
        ({"encoder": "mine", "licence": "CC-BY-NC-ND-4.0"}, "CC-BY-NC-ND-4.0", False),  # nobody said restricted
        ({"encoder": "mine", "licence": "No-Derivatives terms of our hospital"}, None, False),
        ({"encoder": "dinov2-vits14", "licence": "CC-BY-NC-4.0"}, "CC-BY-NC-4.0", True),
        ({"encoder": "phikon", "licence": "MIT"}, "Owkin non-commercial", True),
        ({"encoder": "phikon", "licence": "research only"}, "research only and Owkin non-commercial", True),
        ({"encoder": "plip", "licence": "MIT"}, "MIT", True),  # the catalogue does not know it
        ({"encoder": "plip", "licence": ""}, "unknown", False),
        ({"encoder": "dinov2-vits14", "licence": "apache-2.0"}, "apache-2.0", True),
    ],
)
def test_no_recorded_licence_frees_an_encoder(identity, licence, passed_on):
    found = export.terms(identity)
    assert found.licence == (licence or identity["licence"]) and found.may_be_passed_on is passed_on
    assert found.licence in found.statement or found.licence == "unknown"
    assert found.hub_licence not in ("mit", "apache-2.0") or found.licence.casefold() == found.hub_licence


def test_every_encoder_of_the_catalogue_hands_its_licence_down():
    for name, facts in bs.encoders.catalog.catalogue().items():
        for recorded in ("MIT", "Apache-2.0", "CC0-1.0"):
            found = export.terms({"encoder": name, "licence": recorded})
            if facts.derivatives_restricted:
                assert not found.may_be_passed_on
            if any(word in facts.licence.casefold() for word in ("nc", "non-commercial", "research", "reserved")):
                assert facts.licence in found.licence and found.hub_licence not in ("mit", "apache-2.0", "cc0-1.0")


@pytest.mark.parametrize("format", export.FORMATS)
def test_every_file_states_the_terms_and_no_identifier(format, tmp_path):
    if format == "faiss":
        pytest.importorskip("faiss")
    path = tmp_path / f"out{export.FORMATS[format][1][0]}"
    assert export.write(latents(), path, format=format, columns=["count_plasma"]) == path
    if format == "npz":
        with np.load(path) as file:
            stored = "".join(repr(file[k].tolist()) for k in file).encode()
    elif format == "parquet":
        table = pd.read_parquet(path)
        stored = repr(table.reset_index().to_dict()).encode() + path.read_bytes()
    elif format == "faiss":
        stored = everything(path) + Path(f"{path}.json").read_bytes()
    else:
        adata = anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
        stored = everything(path) + repr([adata.obs.to_dict(), adata.var.to_dict(), adata.uns]).encode()
    assert not [word for word in TELLING if word.encode() in stored]
    assert b"CC-BY-NC-ND-4.0" in stored and b"do not publish or pass on" in stored
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


# ------------------------------------------------------------------------------------------------ read back by tools


def test_h5ad_and_zarr_by_anndata_and_scanpy(tmp_path):
    scanpy = pytest.importorskip("scanpy")
    adata = in_order(latents())
    found = scanpy.read_h5ad(export.write(adata, tmp_path / "a.h5ad"))
    same_codes(found, adata)
    np.testing.assert_array_equal(found.varm["decoder"], adata.varm["decoder"])
    assert scanpy.get.obs_df(found, ["L0003"])["L0003"].tolist() == adata.X[:, 3].toarray().ravel().tolist()
    for _ in range(2):  # the second time over the first
        same_codes(anndata.read_zarr(export.write(adata, tmp_path / "a.zarr")), adata)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "a.zarr"]
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="no Zarr folder"):
        export.write(adata, tmp_path / "mine.zarr")
    assert (tmp_path / "mine.zarr/thesis.txt").exists()


def test_parquet_by_pandas_polars_and_arrow(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr(export.latents.tables, "ROWS", 7)  # several row groups
    adata = in_order(latents())
    file = export.write(adata, tmp_path / "codes.parquet", columns=["count_plasma", "age"])
    table = pd.read_parquet(file)
    np.testing.assert_array_equal(table[adata.var_names].to_numpy(), adata.X.toarray())
    assert table.index.name == "sample_id" and table.index[0] == "sample_000001"
    assert table["count_plasma"].tolist() == adata.obs["count_plasma"].tolist()
    assert table["age"].isna().sum() == adata.obs["age"].isna().sum()
    about = json.loads(pq.read_schema(file).metadata[b"biosae"])
    assert about["names"] == {"L0000": "plasma cells"} and about["licence"]["derivatives_restricted"] is True
    assert pq.ParquetFile(file).num_row_groups == 4
    polars = pytest.importorskip("polars")
    assert polars.read_parquet(file)["L0003"].sum() == pytest.approx(adata.X[:, 3].sum())
    adata.obs["L0003"] = 1
    with pytest.raises(InputError, match="also the name of a latent"):
        export.write(adata, tmp_path / "codes.parquet", columns=["L0003"])
    with pytest.raises(InputError, match="no sample"):
        export.write(latents()[:0].copy(), tmp_path / "none.parquet")


def test_npz_by_scipy(tmp_path):
    adata = in_order(latents())
    file = export.write(adata, tmp_path / "codes.npz")
    found = sp.load_npz(file)
    assert isinstance(found, sp.csr_matrix) and (found != adata.X).nnz == 0
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["var_names"].tolist() == adata.var_names.tolist() and arrays["obs_names"][0] == "sample_000001"
    again = export.write(adata, tmp_path / "again.npz")
    assert file.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_faiss_finds_what_exact_search_finds(metric, tmp_path):
    faiss = pytest.importorskip("faiss")
    adata = in_order(latents())
    file = export.write(adata, tmp_path / "near.faiss", metric=metric)
    index, about = faiss.read_index(str(file)), json.loads((tmp_path / "near.faiss.json").read_text())
    queries = adata.obsm["embedding"]
    if metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    found = index.search(np.ascontiguousarray(queries), 4)[1]
    exact = bs.search.Index(adata.obsm["embedding"], metric=metric).search(adata.obsm["embedding"], n=4).rows
    np.testing.assert_array_equal(found, exact)
    assert about["ids"][3] == "sample_000004" and about["dim"] == 5 and about["metric"] == metric
    with pytest.raises(InputError, match="dense rows"):
        export.write(adata, tmp_path / "near.faiss", use_rep="X")


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad"])
def test_spatial_tables_name_regions_and_instances(suffix, tmp_path):
    adata = latents()
    file = export.write(adata, tmp_path / f"table{suffix}", format="spatialdata")
    table = anndata.read_zarr(file) if suffix == ".zarr" else anndata.read_h5ad(file)
    attrs = table.uns["spatialdata_attrs"]
    assert sorted(attrs["region"]) == sorted(table.obs["region"].unique()) and attrs["instance_key"] == "instance_id"
    assert not table.obs.duplicated(["region", "instance_id"]).any()
    assert table.obs.groupby("region", observed=True)["instance_id"].max().max() == 5  # 24 rows, 4 slides of 6
    open_ids = export.write(adata, tmp_path / "open.h5ad", format="spatialdata", show_ids=True)
    assert "Okafor-117_HOSP2291-1" in anndata.read_h5ad(open_ids).uns["spatialdata_attrs"]["region"]
    adata.obs["slide"] = ["a b", "a/b"] * 12
    with pytest.raises(InputError, match="one name of an element"):
        export.write(adata, tmp_path / "x.h5ad", format="spatialdata", show_ids=True)
    del adata.obsm["spatial"]
    with pytest.raises(InputError, match="no positions"):
        export.write(adata, tmp_path / "x.h5ad", format="spatialdata")


def test_spatial_table_by_spatialdata(tmp_path):
    """The table with its tiles as circles, written and read by SpatialData itself."""
    sd = pytest.importorskip("spatialdata")
    from spatialdata.models import ShapesModel, TableModel

    adata = in_order(latents())
    table = anndata.read_zarr(export.write(adata, tmp_path / "table.zarr", format="spatialdata"))
    table = TableModel.parse(table)
    shapes = {}
    for region in table.uns["spatialdata_attrs"]["region"]:
        mine = table[table.obs["region"] == region]
        shapes[region] = ShapesModel.parse(
            np.asarray(mine.obsm["spatial"]), geometry=0, radius=56.0, index=mine.obs["instance_id"].to_numpy()
        )
    sd.SpatialData(shapes=shapes, tables={"latents": table}).write(tmp_path / "whole.zarr")
    back = sd.read_zarr(tmp_path / "whole.zarr")
    same_codes(back["latents"], adata)
    first = table.uns["spatialdata_attrs"]["region"][0]
    element, joined = sd.join_spatialelement_table(sdata=back, spatial_element_names=first, table_name="latents")
    assert len(element[first]) == len(joined) == (table.obs["region"] == first).sum()


def test_squidpy_takes_the_positions(tmp_path):
    squidpy = pytest.importorskip("squidpy")
    table = anndata.read_h5ad(export.write(latents(), tmp_path / "table.h5ad", format="spatialdata"))
    squidpy.gr.spatial_neighbors(table, library_key="region", coord_type="generic", n_neighs=2)
    same = table.obs["region"].to_numpy()
    row, col = table.obsp["spatial_connectivities"].nonzero()
    assert len(row) and (same[row] == same[col]).all()


def test_cellxgene_file_is_as_the_viewer_wants_it(tmp_path):
    adata = in_order(latents())
    file = export.write(adata, tmp_path / "c.h5ad", format="cellxgene", columns=["count_plasma", "age"])
    found = anndata.read_h5ad(file)
    assert isinstance(found.X, sp.csc_matrix) and found.X.dtype == np.float32
    assert found.var_names[0] == "L0000 plasma cells" and found.var_names[1] == "L0001" and found.var_names.is_unique
    assert set(found.obsm) == {"X_umap", "X_spatial"}
    np.testing.assert_allclose(found.obsm["X_spatial"], adata.obsm["spatial"] * [1, -1], rtol=1e-6)
    assert found.obs["count_plasma"].dtype == np.int32 and found.obs["age"].dtype == np.float32
    assert isinstance(found.obs["sae_trained_on"].dtype, pd.CategoricalDtype)
    for key in ("X_umap", "spatial"):
        del adata.obsm[key]
    with pytest.raises(InputError, match=r"bs\.search\.cluster"):
        export.write(adata, file, format="cellxgene")


def test_cellxgene_by_its_server(tmp_path):
    """The viewer's own loader opens the file, and gives a latent and a layout as they are."""
    pytest.importorskip("server.data_anndata.anndata_adaptor", reason="cellxgene is not installed")
    from server.common.config.app_config import AppConfig
    from server.common.fbs.matrix import decode_matrix_fbs
    from server.data_common.matrix_loader import MatrixDataLoader

    adata = in_order(latents())
    file = export.write(adata, tmp_path / "c.h5ad", format="cellxgene", columns=["count_plasma"])
    config = AppConfig()
    config.update_server_config(single_dataset__datapath=str(file), app__flask_secret_key="x")
    config.complete_config()
    opened = MatrixDataLoader(str(file)).open(config)
    assert sorted(opened.get_embedding_names()) == ["spatial", "umap"]
    assert opened.get_shape() == adata.shape
    layout = decode_matrix_fbs(opened.layout_to_fbs_matrix(["umap"]))
    assert layout.shape == (24, 2) and np.isfinite(layout.to_numpy()).all()
    same_codes(opened.data, adata)


# -------------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def sae() -> bs.sae.SAE:
    X = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    emb = bs.Embeddings.from_array(X, identity=IDENTITY)
    return bs.sae.SAE("topk", n_latents=16, k=2, n_steps=5, random_state=0, device="cpu").fit(
        emb, groups=np.repeat(PATIENTS, 50)
    )


def test_a_model_folder_opens_and_states_its_terms(sae, tmp_path):
    from safetensors import safe_open

    folder = export.write_model(sae, tmp_path / "model", data="our tiles", data_licence="CC0-1.0")
    back = bs.sae.load(folder)
    X = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    assert (back.codes(X) != sae.codes(X)).nnz == 0
    with safe_open(folder / "model.safetensors", framework="np") as file:
        header = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("density"), sae.density_)
    config = json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    assert header["licence"] == config["licence"] == "CC-BY-NC-ND-4.0" and header["derivatives_restricted"] == "true"
    for text in (header["terms"], config["terms"]["statement"], card):
        assert "do not publish or pass on" in text
    assert sae.training_groups_ and config["training_groups"] == [] and "our tiles" in card and "CC0-1.0" in card
    with pytest.raises(InputError, match="without patients"):
        back.trained_on(["Okafor-117"])
    kept = bs.sae.load(export.write_model(folder_of(sae, tmp_path), tmp_path / "open", show_ids=True))
    assert kept.trained_on(["Okafor-117", "Nobody"]).tolist() == [True, False]


def folder_of(sae: bs.sae.SAE, tmp_path: Path) -> Path:
    sae.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_the_card_by_the_hub_library(sae, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(export.write_model(sae, tmp_path / "model") / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "cc-by-nc-nd-4.0" and data["library_name"] == "biosae"
    assert data["base_model"] == "MahmoodLab/uni" and "do not publish" in data["extra_gated_prompt"]


@pytest.mark.parametrize(
    ("first", "second", "licence", "restricted"),
    [
        ("dinov2-vits14", "uni", "Apache-2.0 and CC-BY-NC-ND-4.0", True),
        ("uni", "dinov2-vits14", "CC-BY-NC-ND-4.0 and Apache-2.0", True),
        ("dinov2-vits14", "plip", "unknown", False),
        ("dinov2-vits14", None, "unknown", False),
        ("dinov2-vits14", "dinov2-vits14", "Apache-2.0", False),
    ],
)
def test_a_second_encoder_hands_its_terms_down_too(first, second, licence, restricted, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    rng = np.random.default_rng(0)
    X, Y = (
        bs.Embeddings.from_array(rng.normal(size=(60, 6)).astype(np.float32), identity=name and {"encoder": name})
        for name in (first, second)
    )
    both = bs.sae.SAE("transcoder", n_latents=8, k=2, n_steps=2, batch_size=32, random_state=0, device="cpu")
    folder = export.write_model(both.fit(X, partner=Y), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    card = hub.ModelCard.load(folder / "README.md")
    assert config["licence"] == licence and config["derivatives_restricted"] is restricted
    assert card.data.license not in ("apache-2.0", "mit") or licence == "Apache-2.0"
    assert ("extra_gated_prompt" in card.data.to_dict()) is (restricted or licence == "unknown")
    if second == "uni":
        assert "MahmoodLab/uni" in card.data.base_model
    codes = export.shareable(bs.encode(both, X))
    assert codes.uns["biosae"]["licence"]["licence"] == licence, "codes come from both tables too"


@pytest.mark.parametrize("title", ['x"\n---\nlicense: mit\n---', "# <script>alert(1)</script>", "a | b `c`"])
def test_a_hostile_title_stays_text(sae, title, tmp_path):
    yaml = pytest.importorskip("yaml")
    card = (export.write_model(sae, tmp_path / "m", title=title, data=title) / "README.md").read_text()
    front = card.split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "cc-by-nc-nd-4.0"
    body = card.split("---\n", 2)[2]
    assert "<script>" not in body and "license: mit\n" not in body and body.count("\n# ") == 1


def test_an_unknown_encoder_gives_an_unknown_licence(tmp_path):
    plain = bs.sae.SAE("topk", n_latents=8, k=2, n_steps=2, random_state=0, device="cpu").fit(
        np.eye(8, dtype=np.float32)
    )
    card = (export.write_model(plain, tmp_path / "m") / "README.md").read_text()
    assert 'license: "unknown"' in card and "not recorded" in card and "extra_gated_prompt" in card
    card = (export.write_model(plain, tmp_path / "m", licence="Our terms 2") / "README.md").read_text()
    assert 'license: "other"' in card and 'license_name: "our-terms-2"' in card


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "x.txt"}, "no suffix"),
        ({"path": "x.h5ad", "format": "h5d"}, "did you mean 'h5ad'"),
        ({"path": "x.csv", "format": "parquet"}, "written as .parquet"),
        ({"path": "x.npz", "metric": "dot"}, "it takes none"),
        ({"path": "x.faiss", "metrc": "dot"}, "did you mean 'metric'"),
    ],
)
def test_mistakes_say_what_to_do(arguments, message, tmp_path):
    path = tmp_path / arguments.pop("path")
    with pytest.raises(InputError, match=message):
        export.write(latents(), path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_neighbours_stays_usable_by_scanpy(tmp_path):
    sc = pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    X = sp.random(40, 12, density=0.5, random_state=0, format="csr", dtype=np.float32)
    obs = pd.DataFrame({"patient": rng.integers(0, 8, 40).astype(str)}, index=[f"s{i}" for i in range(40)])
    adata = anndata.AnnData(X, obs=obs)
    sc.pp.neighbors(adata, n_neighbors=5, use_rep="X", transformer="sklearn")
    read = anndata.read_h5ad(export.write(adata, tmp_path / "a.h5ad"))
    sc.tl.umap(read, random_state=0)
    assert read.obsm["X_umap"].shape == (40, 2)
    assert read.obsp["connectivities"].nnz == adata.obsp["connectivities"].nnz
