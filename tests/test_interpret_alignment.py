"""Alignment with masks: worked numbers, brute force over ties, scikit-learn, planted parts, displaced masks."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import biosae as bs
from biosae.errors import InputError, StatisticsError
from biosae.interpret.alignment import purity
from biosae.interpret.masks import displaced, token_parts
from biosae.interpret.probe import log_loss, prevalence_loss, probes
from biosae.stats.precision import Resampled, average_precision, average_precisions

GRID, PATCH = 4, 8


def sequential(y: np.ndarray) -> float:
    return float((np.cumsum(y) / np.arange(1, len(y) + 1) * y).sum() / y.sum())


def test_worked_ties() -> None:
    assert average_precision([1, 0, 0, 1], [1, 1, 0, 0]) == pytest.approx(2 / 3)
    assert np.isnan(average_precision([0, 0], [1, 2])) and np.isnan(average_precision([], []))
    with pytest.raises(InputError, match="NaN"):
        average_precision([1, 0], [np.nan, 1])


def test_unknown_labels_and_rows_that_do_not_fit_are_refused() -> None:
    for y in ([np.nan, 0.0], [0.4, 0.0], [2, 0]):
        with pytest.raises(InputError, match="0 or 1"):
            average_precision(y, [1, 0])
        with pytest.raises(InputError, match="0 or 1"):
            average_precisions(np.eye(2), np.array(y, float)[:, None])
    with pytest.raises(InputError, match="a row an item"):
        average_precisions(np.eye(2), np.ones((3, 1), bool))  # would count positives that no row holds
    with pytest.raises(InputError, match="NaN"):
        average_precisions(np.array([[np.nan], [1]]), np.ones((2, 1), bool))
    with pytest.raises(InputError, match="one value an item"):
        average_precision([1, 0], [1, 0, 2])


@given(st.lists(st.tuples(st.booleans(), st.integers(-1, 1)), min_size=1, max_size=6))
def test_expectation_over_all_orders_of_ties(items: list[tuple[bool, int]]) -> None:
    y, s = (np.array(v) for v in zip(*items))
    orders = [o for o in itertools.permutations(range(len(y))) if all(np.diff(s[list(o)]) <= 0)]
    if not y.any():
        assert np.isnan(average_precision(y, s))
        return
    expected = np.mean([sequential(y[list(o)]) for o in orders])
    assert average_precision(y, s) == pytest.approx(expected, abs=1e-12)
    assert average_precision(y, 3.0 * s) == pytest.approx(expected, abs=1e-12)
    both = average_precisions(sp.csr_matrix(s[:, None].astype(float)), y[:, None])
    assert both[0, 0] == pytest.approx(expected, abs=1e-12)


def test_without_ties_it_is_that_of_scikit_learn_and_columns_do_not_touch() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    z, Y = rng.standard_normal((300, 5)), rng.random((300, 3)) < 0.2
    Y[:, 2] = False
    found = average_precisions(z, Y)
    for j, c in itertools.product(range(5), range(2)):
        assert found[j, c] == pytest.approx(average_precision_score(Y[:, c], z[:, j]))
    assert np.isnan(found[:, 2]).all()
    empty = average_precisions(np.zeros((300, 1)), Y)
    assert empty[0, 0] == pytest.approx(average_precision(Y[:, 0], np.zeros(300)))


def test_resampled_groups_are_rows_repeated() -> None:
    rng = np.random.default_rng(1)
    score, y, groups = rng.integers(0, 4, 60).astype(float), rng.random(60) < 0.3, np.repeat(np.arange(6), 10)
    counts = np.array([0, 2, 1, 3, 0, 0])
    rows = np.concatenate([np.flatnonzero(groups == g) for g in np.repeat(np.arange(6), counts)])
    found = Resampled(score, y, groups)(counts[:, None].astype(float))
    assert found[0] == pytest.approx(average_precision(y[rows], score[rows]))


def test_worked_probe() -> None:
    z, y = np.array([0, 0, 0, 0, 0, 0.2, 1, 2]), np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = probes(z[:, None], y, ridge=1e-2)
    assert found.bias[0] == pytest.approx(-2.713934, abs=1e-6)
    assert found.weight[0] == pytest.approx(3.606677, abs=1e-6)
    assert found.loss[0] == pytest.approx(0.100373, abs=1e-6)
    assert found.loss_prevalence == pytest.approx(0.562335, abs=1e-6)
    assert 1 - found.loss[0] / found.loss_prevalence == pytest.approx(0.821507, abs=1e-6)
    assert log_loss(z, y == 1, found.weight[0], found.bias[0]) == pytest.approx(found.loss[0])
    assert prevalence_loss(0.25, y) == pytest.approx(found.loss_prevalence)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_probes_are_maximum_likelihood_at_any_scale(scale: float) -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(2)
    Z = sp.random(400, 6, density=0.3, random_state=0, data_rvs=lambda n: rng.standard_normal(n)).tocsr()
    y = rng.random(400) < 1 / (1 + np.exp(1 - 2 * Z[:, [0]].toarray().ravel()))
    found = probes(Z * scale, y, ridge=1e-12)
    for j in range(6):
        model = sm.Logit(y, sm.add_constant(Z[:, [j]].toarray())).fit(disp=0)
        np.testing.assert_allclose([found.bias[j], found.weight[j] * scale], model.params, rtol=1e-4, atol=1e-5)
        assert found.loss[j] == pytest.approx(-model.llf / 400, abs=1e-9)


def test_probe_of_latents_that_never_fire_or_separate() -> None:
    y = np.repeat([False, True], 10)
    found = probes(np.c_[np.zeros(20), y * 1.0, np.ones(20)], y)
    assert found.loss[0] == pytest.approx(np.log(2)) and found.weight[0] == 0
    assert found.loss[1] < 1e-4 and found.loss[2] == pytest.approx(np.log(2))
    for labels in (np.zeros(20), np.ones(20)):
        with pytest.raises(InputError, match="one value"):
            probes(np.ones((20, 1)), labels)
    with pytest.raises(InputError, match="ridge"):
        probes(np.ones((20, 1)), y, ridge=0)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Z = sp.random(200, 40, density=0.2, random_state=3).tocsr()
    y = np.random.default_rng(3).random(200) < 0.4
    whole = probes(Z, y)
    monkeypatch.setattr("biosae.interpret.probe.ENTRIES", 100)
    np.testing.assert_allclose(probes(Z, y).loss, whole.loss, rtol=1e-12)


def test_purity_counts_ties_by_chance() -> None:
    labels = np.eye(2)[[0, 0, 1, 1, 1]]
    assert purity(np.array([3.0, 2, 2, 0, 0]), labels, 2) == (pytest.approx(0.75), 2)
    assert purity(np.array([1.0, 0, 0, 0, 0]), labels, 16) == (1.0, 1)
    nothing, n = purity(np.zeros(5), labels, 4)
    assert np.isnan(nothing) and n == 0


# -- planted parts --------------------------------------------------------------------------------------------------


def planted(n_samples: int = 24, seed: int = 0) -> tuple[anndata.AnnData, pd.DataFrame]:
    """Tokens of a 4 x 4 grid: latent 3 fires in the part 'nucleus', latent 5 in 'cell' less surely, others anywhere."""
    rng = np.random.default_rng(seed)
    T = GRID * GRID
    n = n_samples * T
    nucleus = rng.random(n) < 0.15
    cell = ~nucleus & (rng.random(n) < 0.3)
    Z = rng.exponential(size=(n, 8)) * (rng.random((n, 8)) < 0.1)
    Z[:, 3] = np.where(nucleus, 1 + rng.random(n), Z[:, 3] * 0.2)
    Z[:, 5] = np.where(cell & (rng.random(n) < 0.7), 1.0, Z[:, 5])
    samples = np.repeat([f"s{i:02d}" for i in range(n_samples)], T)
    number = np.repeat(np.arange(n_samples), T)
    obs = pd.DataFrame(
        {
            "sample_id": samples,
            "patient": [f"p{i // 2}" for i in number],
            "split": np.where(number < n_samples // 2, "train", "test"),
            "token_row": np.tile(np.arange(T) // GRID, n_samples),
            "token_col": np.tile(np.arange(T) % GRID, n_samples),
            "known": np.where(number % 3 == 0, "a", "b"),
        },
        index=[f"{s}#{t:02d}" for s, t in zip(samples, np.tile(np.arange(T), n_samples))],
    )
    var = pd.DataFrame(index=[f"L{j:04d}" for j in range(8)])
    labels = pd.DataFrame({"nucleus": nucleus, "cell": cell, "background": ~(nucleus | cell)}, index=obs.index)
    return anndata.AnnData(sp.csr_matrix(Z.astype(np.float32)), obs=obs, var=var), labels


def test_planted_latents_are_found_and_displaced_masks_are_not() -> None:
    adata, labels = planted()
    shuffled = labels.sample(frac=1, random_state=1)  # rows are joined by id
    table = bs.interpret.alignment(adata, shuffled, n_null=3).set_index("class")
    assert table.loc["nucleus", "latent"] == "L0003" and table.loc["nucleus", "ap"] > 0.99
    assert table.loc["nucleus", "purity"] == 1 and table.loc["nucleus", "n_top"] == 16
    assert table.loc["cell", "latent"] == "L0005" and 0.5 < table.loc["cell", "ap"] < 0.95
    assert (table["ap_low"] <= table["ap"]).all() and (table["ap"] <= table["ap_high"]).all()
    assert (table["ap"] - table["ap_null"] > 0.1).all()
    np.testing.assert_allclose(table["ap_null"], table["prevalence"], atol=0.08)
    assert (table["probe_r_null"] < 0.05).all() and table["status"].eq("few_groups").all()
    np.testing.assert_allclose(table["ap_place"], table["prevalence"], atol=0.12)  # parts lie anywhere here
    summary = bs.interpret.alignment_summary(bs.interpret.alignment(adata, labels))
    assert summary["coverage"] == 1 and summary["map"] == pytest.approx(table["ap"].mean())


def test_place_alone_finds_parts_that_always_lie_there() -> None:
    adata, labels = planted()
    labels = labels.assign(top=(adata.obs["token_row"] == 0).to_numpy())
    table = bs.interpret.alignment(adata, labels[["top"]], n_draws=0, n_null=1)
    assert table["ap_place"].item() == 1 and table["ap"].item() < 0.5
    assert table["ap_null"].item() == pytest.approx(table["ap"].item())  # displaced masks are the same masks


def test_the_order_of_rows_does_not_matter() -> None:
    adata, labels = planted()
    labels = labels.assign(top=(adata.obs["token_row"] == 0).to_numpy())
    mixed = adata[np.random.default_rng(3).permutation(adata.n_obs)].copy()
    one, two = (bs.interpret.alignment(a, labels, n_draws=0, n_null=2) for a in (adata, mixed))
    top = two.set_index("class").loc["top"]
    assert top["ap_null"] == pytest.approx(top["ap"])  # a mask of another sample is the same mask, cell by cell
    pd.testing.assert_frame_equal(one.drop(columns=["ap_null", "probe_r_null"]), two[one.columns].drop(
        columns=["ap_null", "probe_r_null"]))  # fmt: skip


def test_class_names_are_drawn_as_they_are() -> None:
    adata, labels = planted()
    table = bs.interpret.alignment(adata, labels.rename(columns={"cell": "<b>$x^{$", "nucleus": "5 $ and 6 $"}))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    ax = bs.pl.alignment(table)
    FigureCanvasAgg(ax.figure).draw()
    assert {t.get_text().replace("\\$", "$") for t in ax.get_yticklabels()} == {"<b>$x^{$", "5 $ and 6 $", "background"}


def test_settings_without_sense_are_refused_in_words() -> None:
    adata, labels = planted()
    for name, value in (("top", 0), ("share", 0), ("share", 1.5)):
        with pytest.raises(InputError, match=name):
            bs.interpret.alignment(adata, labels, **{name: value})
    for budgets in (["ten"], [2.5], [0]):
        with pytest.raises(InputError, match="budgets"):
            bs.interpret.propose_audit(adata, "known", labels[["nucleus"]], budgets=budgets)
    one = bs.interpret.propose_audit(adata, "known", labels[["nucleus"]], budgets=3, n_null=0, n_draws=0)
    assert one["budget"].tolist() == [3]


def test_a_summary_is_of_one_model() -> None:
    adata, labels = planted()
    table = bs.interpret.alignment(adata, labels, n_draws=0)
    both = pd.concat([table.assign(model="a"), table.assign(model="b")])
    with pytest.raises(InputError, match="groupby"):
        bs.interpret.alignment_summary(both)
    assert bs.interpret.alignment_summary(both[both["model"] == "a"])["n_classes"] == 3


def test_no_patient_is_named_in_a_refusal() -> None:
    adata, labels = planted()
    adata.obs["patient"] = "Doe, Jane"
    with pytest.raises(StatisticsError) as refused:
        bs.interpret.alignment(adata, labels)
    assert "Doe" not in str(refused.value)


def test_unit_of_codes_does_not_matter_but_share_does() -> None:
    adata, labels = planted()
    other = adata.copy()
    other.X = other.X * 100
    one, two = (bs.interpret.alignment(a, labels, n_draws=0) for a in (adata, other))
    np.testing.assert_allclose(one["ap"], two["ap"])
    np.testing.assert_allclose(one["probe_r"], two["probe_r"], atol=1e-4)
    part = labels.astype(float) * 0.4
    assert bs.interpret.alignment(adata, part, share=0.5)["status"].eq("absent_train").all()
    assert bs.interpret.alignment(adata, part, share=0.3, n_draws=0)["ap"].tolist() == one["ap"].tolist()


def test_absent_classes_are_counted_not_scored() -> None:
    adata, labels = planted()
    test = (adata.obs["split"] == "test").to_numpy()
    labels = labels.assign(rare=labels["nucleus"] & ~test, all=True, lost=labels["cell"].where(~test))
    table = bs.interpret.alignment(adata, labels, n_draws=0).set_index("class")
    assert table.loc["rare", "status"] == "absent_test" and np.isnan(table.loc["rare", "ap"])
    assert table.loc["all", "status"] == "all_positive"
    assert table.loc["lost", "status"] == "absent_test" and table.loc["lost", "n_test"] == 0
    summary = bs.interpret.alignment_summary(table.reset_index())
    assert summary["n_classes"] == 3 and summary["n_absent"] == 3
    assert summary["map_absent_0"] == pytest.approx(summary["map"] / 2)


def test_samples_without_masks_are_neither_pure_nor_impure() -> None:
    adata, labels = planted()
    unknown = labels.astype(float)
    unknown[adata.obs["sample_id"].isin(["s12", "s13", "s14", "s15"]).to_numpy()] = np.nan
    table = bs.interpret.alignment(adata, unknown, n_draws=0).set_index("class")
    assert table.loc["nucleus", "purity"] == 1 and table.loc["nucleus", "n_samples_test"] == 8
    assert bs.interpret.alignment_summary(table.reset_index())["n_trivial"] == 1  # background fills most of it


def test_what_does_not_fit_is_refused() -> None:
    adata, labels = planted()
    with pytest.raises(InputError, match="tokens=None"):
        bs.interpret.alignment(adata, labels.set_axis(range(len(labels))))
    with pytest.raises(InputError, match="did you mean 'split'"):
        bs.interpret.alignment(adata, labels, split="spilt")
    with pytest.raises(InputError, match="no row has split"):
        bs.interpret.alignment(adata, labels, test="val")
    with pytest.raises(InputError, match="shares"):
        bs.interpret.alignment(adata, labels * 7)
    with pytest.raises(InputError, match="a column for each class"):
        bs.interpret.alignment(adata, labels[["cell"]].replace({True: "cell", False: "none"}).astype(str))
    with pytest.raises(InputError, match="groups=None"):
        bs.interpret.alignment(adata, labels, groups="slide")
    adata.obs["patient"] = "everyone"
    with pytest.raises(StatisticsError, match="not held out"):
        bs.interpret.alignment(adata, labels)
    assert bs.interpret.alignment(adata, labels, groups=None)["n_groups_test"].eq(12).all()


def test_displaced_masks_are_whole_and_never_their_own() -> None:
    adata, labels = planted()
    numbered = labels.astype(float)
    numbered["nucleus"] = pd.factorize(adata.obs["sample_id"])[0] / 100
    moved = displaced(numbered, adata.obs["sample_id"], random_state=0)
    for sample, rows in moved.groupby(adata.obs["sample_id"].to_numpy()):
        source = rows["nucleus"].unique()
        assert len(source) == 1 and source[0] != numbered.loc[rows.index[0], "nucleus"], sample
    assert sorted(moved["cell"]) == sorted(numbered["cell"])
    with pytest.raises(InputError, match="equally many"):
        displaced(numbered.iloc[1:], adata.obs["sample_id"].iloc[1:])


# -- masks on the token grid ------------------------------------------------------------------------------------------


class Masked:
    """Samples of images with masks, as far as token_parts asks."""

    def __init__(self, masks: list[np.ndarray | None], meta: dict | None = None) -> None:
        self.masks, self.meta, self.mpp = masks, meta or {}, None
        ids = pd.Index([f"i{n}" for n in range(len(masks))], name="sample_id")
        self.obs = pd.DataFrame({"mask": [None if m is None else "m.png" for m in masks]}, index=ids)
        self.ids = ids

    def mask(self, sample: str) -> np.ndarray:
        from biosae.data import ReadError

        found = self.masks[int(sample[1:])]
        if found.size == 0:
            raise ReadError("unreadable", "planted")
        return found


def embedded(n: int, grid: tuple[int, int] = (2, 2), **preprocess: object) -> bs.Embeddings:
    spec = {
        "mean": [0.5] * 3, "std": [0.5] * 3, "size": 8, "interpolation": "bicubic", "crop_pct": 1.0,
        "resize": "shorter", "rescale_to_mpp": None,
    }  # fmt: skip
    obs = pd.DataFrame(index=pd.Index([f"i{k}" for k in range(n)], name="sample_id"))
    T = grid[0] * grid[1]
    X = np.zeros((n * T, 3), np.float32)
    return bs.Embeddings.from_array(
        X, obs=obs, tokens_per_sample=T, grid=grid, identity={"preprocess": {**spec, **preprocess}}
    )


def test_masks_go_through_the_geometry_of_the_image() -> None:
    wide = np.zeros((16, 32), np.uint8)  # resized to 8 x 16, cropped to columns 8 to 24 of the mask
    wide[:, 8:16] = 1
    wide[:8, 16:24] = 2
    wide[:, :8] = 3
    table = token_parts(Masked([wide]), embedded(1), parts={1: "left", 2: "corner", 3: "outside"})
    assert table.index.tolist() == ["i0#0", "i0#1", "i0#2", "i0#3"]
    assert table["left"].tolist() == [1, 0, 1, 0] and table["corner"].tolist() == [0, 1, 0, 0]
    assert table["outside"].eq(0).all() and table["background"].tolist() == [0, 0, 0, 1]
    squashed = token_parts(Masked([wide]), embedded(1, resize="squash"), parts={3: "outside"})
    assert squashed["outside"].tolist() == [0.5, 0, 0.5, 0]
    centred = token_parts(Masked([wide]), embedded(1, crop_pct=0.5, size=4), parts={1: "left"})
    assert centred["left"].tolist() == [1, 0, 1, 0]


def test_cells_that_cut_pixels_share_them() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 1
    table = token_parts(Masked([mask]), embedded(1, grid=(1, 3)))
    np.testing.assert_allclose(table["1"], [1, 0.5, 0], atol=1e-6)


def test_masks_that_are_absent_or_broken_are_unknown() -> None:
    ones = np.ones((8, 8), np.uint8)
    table = token_parts(Masked([ones, None, np.empty((0, 0))]), embedded(3))
    assert table.iloc[:4]["1"].eq(1).all() and table.iloc[4:].isna().all().all()
    assert table.attrs["biosae"]["failures"] == {"i2": "unreadable: planted"}
    assert table.attrs["biosae"]["n_masked"] == 1
    with pytest.raises(InputError, match="none of 1 samples"):
        token_parts(Masked([None]), embedded(1))
    with pytest.raises(InputError, match="not among the samples"):
        token_parts(Masked([ones]), embedded(2))
    pooled = bs.Embeddings.from_array(np.zeros((1, 3)))
    with pytest.raises(InputError, match="tokens"):
        token_parts(Masked([ones]), pooled)
    unknown = embedded(1)
    unknown.identity = None
    with pytest.raises(InputError, match="resized and cropped"):
        token_parts(Masked([ones]), unknown)


def test_names_of_parts_come_with_the_samples() -> None:
    mask = np.tile(np.array([[1, 2]], np.uint8), (8, 4))
    table = token_parts(Masked([mask], {"parts": {"cytoplasm": 1, "nucleus": 2}}), embedded(1))
    assert table.columns.tolist() == ["cytoplasm", "nucleus", "background"]
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-6)


# -- several models ---------------------------------------------------------------------------------------------------


def test_models_side_by_side() -> None:
    adata, labels = planted()
    rng = np.random.default_rng(0)
    X = (adata.X.toarray() @ rng.standard_normal((8, 12))).astype(np.float32)
    obs = adata.obs.drop_duplicates("sample_id").set_index("sample_id")[["patient", "split"]]
    emb = bs.Embeddings.from_array(X, obs=obs, tokens_per_sample=16, grid=(4, 4))
    train = emb.select((obs["split"] == "train").to_numpy())
    models = {
        "planted": adata.X,
        "raw": "raw",
        "pca": bs.sae.Baseline("pca", random_state=0).fit(train),
        "kmeans": bs.sae.Baseline("kmeans", n_latents=6, random_state=0).fit(train),
        "random": bs.interpret.random_codes(emb, n_latents=8, k=2),
    }
    table = bs.interpret.compare_alignment(models, emb, labels, n_draws=0)
    assert table["model"].unique().tolist() == list(models)
    facts = table.drop_duplicates("model").set_index("model")
    assert facts.loc["kmeans", "l0"] == 1 and facts.loc["raw", "n_latents"] == 12
    assert facts.loc["pca", "nmse"] < 1e-6 < facts.loc["kmeans", "nmse"] < 1  # eight latents lie in twelve dimensions
    assert np.isnan(facts.loc[["planted", "raw", "random"], "nmse"]).all()
    best = table.groupby("model")["ap"].mean()
    assert best.idxmax() == "planted" and best["planted"] - best["random"] > 0.1
    with pytest.raises(InputError, match="rows"):
        bs.interpret.compare_alignment({"short": adata.X[:5]}, emb, labels)
    with pytest.raises(InputError, match="unknown"):
        bs.interpret.compare_alignment({"x": "row"}, emb, labels)


def test_random_codes_are_sparse_positive_and_repeatable() -> None:
    X = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    one = bs.interpret.random_codes(X, n_latents=20, k=3, random_state=1)
    assert (np.diff(one.indptr) <= 3).all() and one.data.min() > 0 and one.nnz > 100
    assert (one != bs.interpret.random_codes(X, n_latents=20, k=3, random_state=1)).nnz == 0
    with pytest.raises(InputError, match="k=21"):
        bs.interpret.random_codes(X, n_latents=20, k=21)


# -- propose and audit ------------------------------------------------------------------------------------------------


def proposing(seed: int = 0) -> tuple[anndata.AnnData, pd.DataFrame]:
    """40 latents; the first four follow a part that only sick samples have."""
    rng = np.random.default_rng(seed)
    n_samples, T, m = 60, 16, 40
    n = n_samples * T
    number = np.repeat(np.arange(n_samples), T)
    sick = rng.random(n_samples) < 0.5
    spot = sick[number] & (rng.random(n) < 0.3)
    Z = rng.exponential(size=(n, m)) * (rng.random((n, m)) < 0.05)
    for j in range(4):
        Z[:, j] += spot * (rng.random(n) < 0.8) * 4
    obs = pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in number],
            "patient": [f"p{i}" for i in number],
            "split": np.where(number < 40, "train", "test"),
            "disease": np.where(sick[number], "sick", "well"),
        },
        index=[f"s{i}#{t:02d}" for i, t in zip(number, np.tile(np.arange(T), n_samples))],
    )
    var = pd.DataFrame(index=[f"L{j:04d}" for j in range(m)])
    return anndata.AnnData(sp.csr_matrix(Z.astype(np.float32)), obs=obs, var=var), pd.DataFrame(
        {"spot": spot}, index=obs.index
    )


def test_planted_proposals_pass_the_audit_and_shuffled_labels_do_not() -> None:
    adata, labels = proposing()
    table = bs.interpret.propose_audit(adata, "disease", labels, budgets=(4, 10, 400), n_null=39, pool="mean")
    assert table["budget"].tolist() == [4, 10]
    assert table["yield_any"].to_numpy() == pytest.approx(0.1)
    first = table.iloc[0]
    assert first["yield"] >= 0.25 and first["p"] <= 0.05 and first["null_mean"] < 0.25
    assert (table["ci_low"] <= table["yield"]).all() and (table["yield"] <= table["ci_high"]).all()
    latents = table.attrs["biosae"]["latents"]
    assert latents.index[0] in {"L0000", "L0001", "L0002", "L0003"} and latents["class"].iloc[0] == "spot"
    assert latents["weight"].is_monotonic_decreasing
    assert set(latents.index[latents["ap"] > 0.3]) == {"L0000", "L0001", "L0002", "L0003"}


def test_yield_does_not_depend_on_how_latents_are_numbered() -> None:
    adata, labels = proposing()
    turned = adata[:, ::-1].copy()
    one, two = (
        bs.interpret.propose_audit(a, "disease", labels, budgets=(10, 25), n_null=0, n_draws=0, C=0.05)
        for a in (adata, turned)
    )
    np.testing.assert_allclose(one["yield"], two["yield"], atol=1e-12)
    from biosae.interpret.audit import expected_yield

    weight, hit = np.array([3.0, 1, 1, 1, 0]), np.array([0.0, 1, 0, 0, 1])
    orders = [[0, *p, 4] for p in itertools.permutations([1, 2, 3])]
    assert expected_yield(weight, hit, 2) == pytest.approx(np.mean([hit[o[:2]].mean() for o in orders]))


def test_proposals_that_make_no_sense_are_refused() -> None:
    adata, labels = proposing()
    with pytest.raises(InputError, match="both proposes and audits"):
        bs.interpret.propose_audit(adata, "disease", labels.rename(columns={"spot": "disease"}))
    with pytest.raises(InputError, match="no column"):
        bs.interpret.propose_audit(adata, "diseases", labels)
    with pytest.raises(InputError, match="budgets"):
        bs.interpret.propose_audit(adata, "disease", labels, budgets=(400,))
    adata.obs["by_token"] = np.tile(["x", "y"], adata.n_obs // 2)
    with pytest.raises(StatisticsError, match="varies within samples"):
        bs.interpret.propose_audit(adata, "by_token", labels)
    adata.obs["same"] = "x"
    with pytest.raises(StatisticsError, match="one class"):
        bs.interpret.propose_audit(adata, "same", labels)
    with pytest.raises(StatisticsError, match="never fires would pass"):
        bs.interpret.propose_audit(adata, "disease", labels, threshold=0.05)
    strict = bs.interpret.propose_audit(adata, "disease", labels, C=1e-6, n_null=0, n_draws=0, budgets=(10,))
    assert strict["status"].item() == "nothing_proposed"
    assert strict["yield"].item() == pytest.approx(0.1)  # then all latents share their places


def test_the_figure_shows_the_numbers_of_the_table() -> None:
    adata, labels = planted()
    table = bs.interpret.alignment(adata, labels.assign(never=False), n_null=1, n_draws=0)
    table.insert(0, "model", "sae")
    ax = bs.pl.alignment(table)
    drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
    np.testing.assert_allclose(drawn["sae"], table["ap"].dropna())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["nucleus", "cell", "background"]
    assert ax.get_title(loc="left") == "1 of 4 classes have no average precision"
    with pytest.raises(InputError, match="status"):
        bs.pl.alignment(table[table["ap"].isna()])


def test_a_row_that_no_class_fills_is_not_pure() -> None:
    adata, labels = planted()
    only = labels[["nucleus"]] * 0.8 + 0.1
    table = bs.interpret.alignment(adata, only, n_draws=0)
    assert table["purity"].item() == 1
    adata.X = sp.csr_matrix(1.0 - labels[["nucleus"]].to_numpy().astype(np.float32)).multiply(np.ones((1, 8))).tocsr()
    assert bs.interpret.alignment(adata, only, n_draws=0)["purity"].item() == 0
