"""Concepts: separability and attenuation by worked numbers, ontology enrichment and vocabularies by planted truth."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import biosae as bs
from biosae.errors import FormatError, IdentityError, InputError, StatisticsError
from biosae.interpret.attenuation import posterior


def table(Z: np.ndarray, **obs: object) -> anndata.AnnData:
    frame = pd.DataFrame(obs, index=[f"s{i:05d}" for i in range(len(Z))])
    var = pd.DataFrame(index=[f"L{j:04d}" for j in range(Z.shape[1])])
    return anndata.AnnData(sp.csr_matrix(Z.astype(np.float32)), obs=frame, var=var)


# -- Jensen-Shannon -------------------------------------------------------------------------------------------------


def test_worked_distances() -> None:
    half = [0.5, 0.5, 0, 0]
    assert bs.interpret.js_distance(half, [0, 0, 0.5, 0.5]) == pytest.approx(1)
    assert bs.interpret.js_distance(half, [0.25] * 4) == pytest.approx(0.557923, abs=1e-6)
    assert bs.interpret.js_distance(half, half) == 0
    P = np.array([[0.8, 0.2, 0], [0.8, 0.2, 0], [0, 0.2, 0.8]])
    pairs = bs.interpret.js_distance(P[[0, 0, 1]], P[[1, 2, 2]])
    np.testing.assert_allclose(pairs, [0, 0.894427, 0.894427], atol=1e-6)
    assert pairs.mean() == pytest.approx(0.596285, abs=1e-6)
    with pytest.raises(InputError):
        bs.interpret.js_distance([0.5, 0.5], [1, -1])


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_distance_is_that_of_scipy_and_symmetric(p: list[int], q: list[int]) -> None:
    from scipy.spatial.distance import jensenshannon

    found = bs.interpret.js_distance(p, q)
    if not any(p) or not any(q):
        assert np.isnan(found)
        return
    assert found == bs.interpret.js_distance(q, p) and 0 <= found <= 1
    assert found == pytest.approx(np.nan_to_num(jensenshannon(p, q, 2)), abs=1e-7)


def worked() -> anndata.AnnData:
    """Three concepts of 40 units whose first latent has the distributions of the worked example; the second is dead."""
    one = [0.0] * 32 + [1.0] * 8
    three = [1.0] * 8 + [2.0] * 32
    z = np.array(one + one + three)
    return table(np.c_[z, np.zeros(120)], tissue=np.repeat(["a", "b", "c"], 40), patient=np.arange(120).astype(str))


def test_worked_separability_with_a_bin_for_zero() -> None:
    found = bs.interpret.separability(worked(), "tissue", smoothing=1e-9)
    first, dead = found.iloc[0], found.iloc[1]
    assert first["separability"] == pytest.approx(0.596285, abs=1e-4)
    assert first["largest"] == pytest.approx(0.894427, abs=1e-4) and first["concept_b"] == "c"
    assert dead["separability"] == pytest.approx(0, abs=1e-9) and dead["status"] == "dead"
    assert found.attrs["biosae"]["mean"] == pytest.approx(first["separability"])
    mixed = np.array([1.6, 0.6, 0.8]) / 3
    h = lambda p: -np.sum(p[p > 0] * np.log2(p[p > 0]))  # noqa: E731
    joint = np.sqrt((h(mixed) - h(np.array([0.8, 0.2, 0]))) / np.log2(3))
    assert first["separability_joint"] == pytest.approx(joint, abs=1e-4)


def test_names_of_concepts_do_not_matter_and_small_ones_are_left_out() -> None:
    adata = worked()
    other = worked()
    other.obs["tissue"] = other.obs["tissue"].map({"a": "z", "b": "m", "c": "k"})
    one, two = (bs.interpret.separability(a, "tissue")["separability"] for a in (adata, other))
    np.testing.assert_allclose(one, two, atol=1e-12)
    adata.obs["tissue"] = np.r_[["d"] * 20, adata.obs["tissue"].to_numpy()[20:]]
    found = bs.interpret.separability(adata, "tissue")
    assert found.attrs["biosae"]["left_out"] == {"a": 20, "d": 20} and found["n_concepts"].eq(2).all()
    with pytest.raises(StatisticsError, match="needs two"):
        bs.interpret.separability(adata, "tissue", min_units=60)
    with pytest.raises(InputError, match="did you mean 'tissue'"):
        bs.interpret.separability(adata, "tisue")
    with pytest.raises(InputError, match="groups=None"):
        bs.interpret.separability(adata, "tissue", groups="slide")


def test_a_patient_with_most_of_the_rows_counts_once() -> None:
    z = np.r_[np.ones(95), np.zeros(5), np.zeros(100)]
    patient = np.r_[["big"] * 95, ["p1", "p2", "p3", "p4", "p5"], np.repeat(["q1", "q2"], 50)]
    adata = table(z[:, None], tissue=np.repeat(["a", "b"], 100), patient=patient)
    by_row = bs.interpret.separability(adata, "tissue", groups=None)["separability"].item()
    by_patient = bs.interpret.separability(adata, "tissue")["separability"].item()
    assert by_row == pytest.approx(bs.interpret.js_distance([0.95, 0.05], [0, 1]), abs=1e-3)
    assert by_patient == pytest.approx(bs.interpret.js_distance([1 / 6, 5 / 6], [0, 1]), abs=1e-3)


def test_what_shuffled_concepts_reach_is_said() -> None:
    rng = np.random.default_rng(0)
    Z = rng.exponential(size=(200, 3))
    Z[:100, 0] += 3
    adata = table(Z, tissue=np.repeat(["a", "b"], 100), patient=np.arange(200).astype(str))
    found = bs.interpret.separability(adata, "tissue", n_null=3)
    assert found["separability"][0] > found["null_mean"][0] + 0.3
    np.testing.assert_allclose(found["separability"][1:], found["null_mean"][1:], atol=0.1)
    assert (found["null_mean"] > 0.1).all()  # histograms of 100 rows differ by chance


# -- attenuation ----------------------------------------------------------------------------------------------------


def test_worked_posterior() -> None:
    p = posterior([1.0, 2.0], (2, 0.5), (0.2, 0.4), 0.3)
    np.testing.assert_allclose(p, [0.255319, 0.999883], atol=1e-6)
    np.testing.assert_allclose([1, 2] * (1 - p), [0.744681, 0.000234], atol=1e-6)
    assert posterior([1e9], (2, 0.5), (0.2, 0.4), 0.3)[0] == pytest.approx(1)  # both densities vanish
    with pytest.raises(InputError, match="prior"):
        posterior([1.0], (0, 1), (0, 1), 1.0)


def inked(n: int = 300) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    ink = rng.random(n) < 0.3
    Z = np.abs(np.c_[np.where(ink, rng.normal(2, 0.5, n), rng.normal(0.2, 0.4, n)), rng.exponential(size=n)])
    Z[rng.random(n) < 0.2] = 0
    return table(Z, pen=np.where(ink, "ink", "clean"), patient=(np.arange(n) // 10).astype(str))


@pytest.mark.parametrize("density", ["histogram", "normal"])
@pytest.mark.parametrize("how", ["app", "range", "full"])
def test_codes_never_grow_nor_change_sign(how: str, density: str) -> None:
    adata = inked()
    edit = bs.interpret.attenuation(adata, "pen", "ink", how=how, density=density, n_latents=1)
    assert edit.latents.tolist() == [0]
    before, after = adata.X.toarray(), edit(adata.X)
    assert isinstance(after, sp.csr_matrix) and after.dtype == np.float32
    after = after.toarray()
    assert (after >= 0).all() and (after <= before + 1e-6).all()
    np.testing.assert_array_equal(after[:, 1], before[:, 1])
    signed = edit(-before).toarray()
    assert (signed <= 0).all() and (np.abs(signed) <= before + 1e-6).all()
    ink = (adata.obs["pen"] == "ink").to_numpy()
    lost = 1 - after[:, 0].sum() / before[:, 0].sum() if how == "full" else None
    assert lost in (None, 1.0)
    kept = [after[rows, 0].sum() / before[rows, 0].sum() for rows in (ink, ~ink)]
    if how == "app":
        assert kept[0] < 0.15 and kept[1] > 0.6


def test_attenuation_is_the_formula() -> None:
    adata = inked()
    edit = bs.interpret.attenuation(adata, "pen", "ink", density="normal", n_latents=1)
    ink = (adata.obs["pen"] == "ink").to_numpy()
    z = adata.X.toarray()[:, 0].astype(np.float64)
    p = posterior(z, (z[ink].mean(), z[ink].std()), (z[~ink].mean(), z[~ink].std()), ink.mean())
    np.testing.assert_allclose(edit(adata.X).toarray()[:, 0], z * (1 - p), atol=1e-5)
    masked = bs.interpret.attenuation(adata, "pen", "ink", how="range", width=1.0, latents=["L0000"])
    out = np.abs(z - z[ink].mean()) <= z[ink].std()
    np.testing.assert_allclose(masked(adata.X).toarray()[:, 0], np.where(out, 0, z), atol=1e-6)


def test_a_point_of_mass_is_hit_by_equality_only() -> None:
    z = np.r_[np.full(40, 1.5), np.linspace(1, 2, 41)]
    adata = table(z[:, None], pen=np.repeat(["ink", "clean"], [40, 41]))
    edit = bs.interpret.attenuation(adata, "pen", "ink", how="range")
    after = edit(sp.csr_matrix([[1.5], [1.5001], [1.4999]])).toarray().ravel()
    np.testing.assert_allclose(after, [0, 1.5001, 1.4999], rtol=1e-6)


def test_a_latent_of_one_code_is_weakened_by_its_shares() -> None:
    fires = np.r_[np.repeat([1, 0], [30, 10]), np.repeat([1, 0], [5, 35])]
    adata = table(fires[:, None], pen=np.repeat(["ink", "clean"], 40))
    after = bs.interpret.attenuation(adata, "pen", "ink")(adata.X).toarray()[0, 0]
    assert after == pytest.approx(1 - 30 / 35, abs=1e-4)  # 30 of the 35 rows with this code are of the concept


def test_a_latent_named_twice_is_weakened_once() -> None:
    adata = inked()
    once, twice = (bs.interpret.attenuation(adata, "pen", "ink", latents=n)(adata.X).toarray()
                   for n in ("L0000", ["L0000", "L0000"]))  # fmt: skip
    np.testing.assert_array_equal(once, twice)
    with pytest.raises(InputError, match="smoothing"):
        bs.interpret.attenuation(adata, "pen", "ink", smoothing=0)


def test_rows_of_unknown_patients_are_not_one_patient() -> None:
    adata = inked()
    adata.obs["patient"] = [f"p{i % 5}" for i in range(adata.n_obs)]
    adata.obs.loc[adata.obs_names[:3], "patient"] = None
    with pytest.raises(InputError, match="3 rows have no 'patient'"):
        bs.interpret.separability(adata, "pen")
    assert bs.interpret.separability(adata, "pen", groups=None)["status"].eq("ok").any()


def test_attenuation_refuses() -> None:
    adata = inked()
    with pytest.raises(InputError, match="never is 'inc'"):
        bs.interpret.attenuation(adata, "pen", "inc")
    with pytest.raises(InputError, match="did you mean 'range'"):
        bs.interpret.attenuation(adata, "pen", "ink", how="rang")
    with pytest.raises(InputError, match="no latent"):
        bs.interpret.attenuation(adata, "pen", "ink", latents=["L9999"])
    with pytest.raises(StatisticsError, match="min_units"):
        bs.interpret.attenuation(adata[:50], "pen", "ink", min_units=49)


# -- ontology and enrichment ----------------------------------------------------------------------------------------

OBO = """format-version: 1.2

[Term]
id: CL:0
name: cell

[Term]
id: CL:1
name: leukocyte
is_a: CL:0 ! cell

[Term]
id: CL:2
name: T cell
is_a: CL:1 ! leukocyte

[Term]
id: CL:3
name: B cell
is_a: CL:1
relationship: part_of CL:9 ! lymph node

[Term]
id: CL:8
name: old cell
is_a: CL:1
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def test_obo_files(tmp_path: Path) -> None:
    file = tmp_path / "cells.obo"
    file.write_text(OBO, encoding="utf-8")
    found = bs.interpret.read_obo(file)
    assert len(found) == 4 and found.ancestors("CL:2") == ["CL:1", "CL:0"]
    assert found.term("t CELL") == "CL:2" and found.term("CL:3") == "CL:3" and found.term("old cell") is None
    assert found.depth("CL:0") == 0 and found.depth("CL:2") == 2
    file.write_text(OBO + "[Term]\nid: CL:9\nname: lymph node\n", encoding="utf-8")
    assert set(bs.interpret.read_obo(file, relations=("is_a", "part_of")).ancestors("CL:3")) == {"CL:0", "CL:1", "CL:9"}
    for text, what in (("{}", "no \\[Term\\]"), ("[Term]\nid: a\nis_a: b\n[Term]\nid: b\nis_a: a\n", "circle")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(FormatError, match=what):
            bs.interpret.read_obo(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        bs.interpret.read_obo(file)
    with pytest.raises(FormatError, match="does not exist"):
        bs.interpret.read_obo(tmp_path / "none.obo")
    with pytest.raises(InputError, match="circle"):
        bs.interpret.Ontology({"a": "b", "b": ["a"]})


CELLS = {"T cell": "lymphocyte", "B cell": "lymphocyte", "lymphocyte": "leukocyte", "monocyte": "leukocyte",
         "leukocyte": "cell", "tumour": "cell"}  # fmt: skip


def cells(n_patients: int = 24) -> anndata.AnnData:
    """Latent 0 fires in T cells, 1 in all lymphocytes, 2 nowhere in particular, 3 in one patient's tumour cells."""
    rng = np.random.default_rng(0)
    kinds = np.array(["T cell", "B cell", "monocyte", "tumour"])
    n = n_patients * 40
    patient = np.repeat(np.arange(n_patients), 40)
    kind = kinds[rng.integers(0, 4, n)]
    Z = rng.exponential(size=(n, 4)) * (rng.random((n, 4)) < 0.1)
    Z[:, 0] += (kind == "T cell") * (rng.random(n) < 0.8)
    Z[:, 1] += np.isin(kind, ["T cell", "B cell"]) * (rng.random(n) < 0.8)
    Z[:, 3] += 3 * ((kind == "tumour") & (patient == 0))
    return table(Z, cell_type=kind, patient=[f"p{i}" for i in patient])


def test_the_narrowest_term_that_holds_against_its_siblings() -> None:
    found = bs.interpret.enrichment(cells(), "cell_type", ontology=bs.interpret.Ontology(CELLS))
    chosen = found[found["chosen"]].set_index("latent")
    assert chosen.loc["L0000", "term"] == "T cell"
    assert chosen.loc["L0001", "term"] == "lymphocyte"
    assert not {"L0002", "L0003"} & set(chosen.index)
    assert set(found["term"]) == {"T cell", "B cell", "lymphocyte", "monocyte", "leukocyte", "tumour"}
    rows = found.set_index(["latent", "term", "comparison"])
    assert rows.loc[("L0001", "T cell", "rest"), "q"] < 1e-3 < 0.05 < rows.loc[("L0001", "T cell", "siblings"), "q"]
    assert rows.loc[("L0001", "T cell", "siblings"), "parent"] == "lymphocyte"
    part = rows.loc[("L0000", "T cell", "rest")]
    adata = cells()
    inside = (adata.obs["cell_type"] == "T cell").to_numpy()
    z = adata.X.toarray()[:, 0]
    from sklearn.metrics import roc_auc_score

    assert part["auroc"] == pytest.approx(roc_auc_score(inside, z))
    assert part["density_in"] == pytest.approx((z[inside] > 0).mean()) and part["n_in"] == inside.sum()
    one = bs.interpret.enrichment(adata, "cell_type")
    assert set(one["comparison"]) == {"rest"} and one["term"].nunique() == 4
    same = one.set_index(["latent", "term"]).loc[("L0000", "T cell")]
    assert same["p"] == pytest.approx(part["p"])


def test_options_that_enrichment_sets_itself_are_refused_in_words() -> None:
    for name, value in (("method", "welch"), ("covariates", ["age"]), ("controls", True)):
        with pytest.raises(InputError, match=name):
            bs.interpret.enrichment(cells(), "cell_type", **{name: value})


def test_refusals_name_the_term_not_a_column_of_ours() -> None:
    with pytest.raises(InputError, match="'cell_type' is ") as refused:
        bs.interpret.enrichment(cells(), "cell_type", unit="patient")
    assert "_term_" not in str(refused.value)


def test_one_patient_does_not_make_an_enrichment() -> None:
    adata = cells()
    found = bs.interpret.enrichment(adata, "cell_type").set_index(["latent", "term"])
    tumour = found.loc[("L0003", "tumour")]
    assert tumour["p"] > 0.05 and tumour["n_groups"] == 24
    naive = bs.interpret.enrichment(
        adata[adata.obs["patient"] == "p0"], "cell_type", groups="none", assume_independent=True
    )
    assert naive.set_index(["latent", "term"]).loc[("L0003", "tumour"), "p"] < 1e-3


def test_terms_are_listed_even_where_they_cannot_be_tested() -> None:
    adata = cells()
    kind = adata.obs["cell_type"].astype(object)
    kind.iloc[:5], kind.iloc[5:10], kind.iloc[10:12] = "eosinophil", "unheard of", None
    adata.obs["cell_type"] = kind
    tree = bs.interpret.Ontology({**CELLS, "eosinophil": "granulocyte", "granulocyte": "leukocyte"})
    found = bs.interpret.enrichment(adata, "cell_type", ontology=tree)
    few = found[found["term"] == "eosinophil"]
    assert few["status"].eq("too_few_in").all() and few["p"].isna().all() and len(few)
    facts = found.attrs["biosae"]
    assert facts["unknown"] == {"unheard of": 5} and facts["same_rows"] == {"granulocyte": "eosinophil"}
    with pytest.raises(InputError, match="none of"):
        bs.interpret.enrichment(cells(), "patient", ontology=tree)
    with pytest.raises(InputError, match="did you mean"):
        bs.interpret.enrichment(cells(), "cell_typ")
    adata.obs["all"] = "x"
    with pytest.raises(StatisticsError, match="one term"):
        bs.interpret.enrichment(adata, "all")


def test_enrichment_holds_its_level_with_dependent_cells() -> None:
    rng = np.random.default_rng(5)
    patient = np.repeat(np.arange(20), 20)
    kind = np.where(rng.random(400) < np.repeat(rng.random(20), 20), "a", "b")  # shares differ between patients
    Z = rng.exponential(size=(400, 300)) * np.repeat(rng.exponential(size=(20, 300)), 20, axis=0)
    found = bs.interpret.enrichment(table(Z, kind=kind, patient=patient.astype(str)), "kind")
    p = found[found["term"] == "a"]["p"]
    assert (p < 0.05).mean() < 0.09


# -- vocabulary -----------------------------------------------------------------------------------------------------


def named(seed: int = 0) -> tuple[anndata.AnnData, pd.DataFrame]:
    """Four latents that follow four of twelve concepts, one that follows none, one that hardly fires."""
    rng = np.random.default_rng(seed)
    n = 200
    scores = rng.standard_normal((n, 12)) + 5 * (np.arange(12) == 11)  # a word that is close to every image
    Z = np.maximum(scores[:, :6] + 0.5 * rng.standard_normal((n, 6)) - 0.5, 0)
    Z[:, 4] = np.maximum(rng.standard_normal(n), 0)
    Z[5:, 5] = 0
    adata = table(Z, patient=[f"p{i // 4}" for i in range(n)], split=np.where(np.arange(n) < 120, "train", "test"))
    return adata, pd.DataFrame(scores, index=adata.obs_names, columns=[f"word {c}" for c in range(12)])


def test_planted_names_hold_on_other_patients() -> None:
    adata, scores = named()
    found = bs.interpret.name_latents(adata, scores.sample(frac=1, random_state=0)).set_index("latent")
    assert found["concept"].tolist()[:4] == ["word 0", "word 1", "word 2", "word 3"]
    first = found.iloc[:4]
    assert (first["q"] < 1e-3).all() and (first["rank"] == 1).all() and (first["score"] > 0.5).all()
    assert (first["mismatched"].abs() < 0.25).all() and (first["margin"] > 0.3).all()
    assert found.loc["L0004", "q"] > 0.05 and found.loc["L0005", "status"] == "not_named"
    assert found.loc["L0005"].drop(["status", "n_active_naming"]).isna().all()
    from scipy.stats import spearmanr

    test = (adata.obs["split"] == "test").to_numpy()
    rho = spearmanr(adata.X.toarray()[test, 0], scores.to_numpy()[test, 0]).statistic
    assert first["score"].iloc[0] == pytest.approx(rho)
    assert found["n_groups"].iloc[0] == 20 and found["n_samples"].iloc[0] == 80


def test_stored_zeros_do_not_fire() -> None:
    adata, scores = named()
    X = sp.csr_matrix(adata.X)
    full = sp.csr_matrix((np.ones(X.shape[0] * X.shape[1], np.float32), np.indices(X.shape).reshape(2, -1)), X.shape)
    full.data[:] = X.toarray().ravel()  # every zero is stored
    adata.X = full
    assert bs.interpret.name_latents(adata, scores).set_index("latent").loc["L0005", "status"] == "not_named"


def test_one_latent_may_be_asked_for_and_the_test_is_not_another() -> None:
    adata, scores = named()
    assert bs.interpret.name_latents(adata, scores, latents="L0001")["concept"].tolist() == ["word 1"]
    for name, value in (("method", "pearson"), ("controls", True)):
        with pytest.raises(InputError, match=name):
            bs.interpret.name_latents(adata, scores, **{name: value})


def test_names_of_noise_are_chance_on_other_patients() -> None:
    rng = np.random.default_rng(3)
    adata, scores = named()
    adata.X = sp.csr_matrix(np.maximum(rng.standard_normal(adata.shape), 0).astype(np.float32))
    found = bs.interpret.name_latents(adata, scores)
    assert (found["score_naming"] > 0.1).all()  # the best of twelve words always looks like something
    assert abs(found["score"].mean()) < 0.12 and (found["q"] > 0.05).all()


def test_vocabularies_refuse_what_does_not_fit(tmp_path: Path) -> None:
    adata, scores = named()
    with pytest.raises(InputError, match="no concept scores"):
        bs.interpret.name_latents(adata, scores.iloc[1:])
    with pytest.raises(StatisticsError, match="no latent fires"):
        bs.interpret.name_latents(adata, scores, min_active=500)
    with pytest.raises(InputError, match="at least 3"):
        bs.interpret.name_latents(adata, scores, held_out="validation")
    adata.obs["patient"] = "p"
    with pytest.raises(StatisticsError, match="not held out"):
        bs.interpret.name_latents(adata, scores)
    file = tmp_path / "words.txt"
    file.write_text("# tissue\nnecrosis\n\nmitosis  # cell\nnecrosis\n", encoding="utf-8")
    assert bs.interpret.read_vocabulary(file) == ["necrosis", "mitosis"]
    with pytest.raises(InputError, match="at least two"):
        bs.interpret.read_vocabulary(["one"])
    with pytest.raises(InputError, match="does not exist"):
        bs.interpret.read_vocabulary(tmp_path / "none.txt")


CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip writes it, of random weights: enough to compare with open_clip itself."""
    import torch
    from open_clip.model import CLIP as Network
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Network(**CLIP)
    folder = tmp_path_factory.mktemp("models") / "small_clip"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    own = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": own}))
    return folder


def test_texts_and_images_meet_as_in_open_clip(clip_folder: Path, tmp_path: Path) -> None:
    import open_clip
    import torch

    tower = bs.encoders.text_tower(clip_folder, device="cpu")
    network = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(["a cell", "a photo of a cell"])
    with torch.no_grad():
        expected = network.encode_text(tokens, normalize=True).numpy()
    np.testing.assert_allclose(tower.embed(["a cell", "a photo of a cell"]), expected, atol=1e-6)
    both = tower.embed(["a cell"], templates=["{}", "a photo of {}"])
    mean = expected.mean(0)
    np.testing.assert_allclose(both[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert tower.dim == 16
    samples = bs.data.phantom(n_patients=3, n_tiles=2, random_state=0)
    encoder = bs.encoders.load(clip_folder, device="cpu")
    emb = bs.encoders.embed(samples, encoder, pool="head", out=tmp_path / "emb")
    scores = bs.interpret.concept_scores(emb, ["a cell", "a photo of a cell"], tower)
    pixels = torch.stack([encoder.preprocess(samples[i]) for i in range(len(samples))])
    with torch.no_grad():
        images = network.encode_image(pixels, normalize=True).numpy()
    np.testing.assert_allclose(scores.to_numpy(), images @ expected.T, atol=1e-5)
    assert scores.index.equals(emb.obs.index)
    other = bs.Embeddings.from_array(emb.array(), obs=emb.obs, identity={**emb.identity, "weights_sha256": "0"})
    with pytest.raises(IdentityError, match="same file"):
        bs.interpret.concept_scores(other, ["a", "b"], tower)
    tokens = bs.Embeddings.from_array(emb.array(), obs=emb.obs, identity={**emb.identity, "pool": "cls"})
    with pytest.raises(IdentityError, match="projected"):
        bs.interpret.concept_scores(tokens, ["a", "b"], tower)
    for wrong in ([], [" "]):
        with pytest.raises(InputError, match="at least one text"):
            tower.embed(wrong)
    with pytest.raises(InputError, match="template"):
        tower.embed(["a"], templates=["an image"])


def test_text_towers_are_of_open_clip_models_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a text tower"):
        bs.encoders.text_tower("tiny-histology")
    with pytest.raises(bs.errors.WeightsError):
        bs.encoders.text_tower("hf-hub:nobody/no-such-clip")
