"""The engine: kernels of two kinds, batches of targets, textbook p in ordinary data, named schemes of permutation."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from biosae.errors import InputError, StatisticsError
from biosae.stats import associate, kernels_numpy
from biosae.stats.correlation import as_columns
from biosae.stats.meta import combine
from biosae.stats.schemes import within
from biosae.stats.skewed import TOLERATED, skewed_pvalue
from biosae.stats.spatial import shifts

FREE = {"unit": "sample", "assume_independent": True, "controls": False}


def codes(n=300, m=40, seed=0):
    """Ties, negative values, an empty, a constant and a full column."""
    rng = np.random.default_rng(seed)
    X = np.round(rng.exponential(size=(n, m)), 1) * (rng.random((n, m)) < np.linspace(0, 1, m))
    X *= rng.choice([-1, 1, 1], X.shape)
    X[:, 7], X[:, 8] = 2.0, rng.random(n) + 1
    return X


def table(X, n_targets=4, groups=12, seed=1, **columns):
    rng = np.random.default_rng(seed)
    n = X.shape[0]
    g = np.sort(rng.integers(0, groups, n))
    obs = {"patient": [f"p{i:02d}" for i in g], "site": np.array(list("ab"))[rng.integers(0, 2, n)]}
    obs |= {f"y{t}": rng.normal(size=n) + 0.3 * rng.normal(size=groups)[g] for t in range(n_targets)}
    obs |= {f"b{t}": rng.random(n) < 0.3 for t in range(n_targets)}
    obs |= {"stain": rng.normal(size=n), "age": rng.normal(size=groups)[g], "grade": rng.choice(list("uvw"), n)}
    return anndata.AnnData(X, obs=pd.DataFrame(obs | columns, index=[f"s{i}" for i in range(n)]))


def same(a, b, *, rel=1e-12):
    assert list(a.columns) == list(b.columns)
    for name in a.columns:
        if a[name].dtype.kind == "f":
            assert a[name].to_numpy() == pytest.approx(b[name].to_numpy(), rel=rel, abs=1e-12, nan_ok=True), name
        else:
            assert a[name].tolist() == b[name].tolist(), name


# ---------------------------------------------------------------------------------------------------------- kernels


def test_kernels_in_numba_and_numpy_give_the_same_numbers():
    fast = pytest.importorskip("biosae.stats.kernels_numba")
    slow, rng = kernels_numpy, np.random.default_rng(0)
    V = as_columns(sp.csr_matrix(codes()))
    n, m = V.shape
    E, g, T = rng.normal(size=(n, 5)), rng.integers(0, 12, n), (rng.random((n, 5)) < 0.3).astype(np.uint8)
    Q = np.linalg.qr(np.column_stack([np.ones(n), rng.normal(size=(n, 2))]))[0]
    E -= Q @ (Q.T @ E)
    order = slow.order(V)
    assert (V.data[fast.order(V)] == V.data[order]).all()
    index = rng.integers(0, n, (n, 7)).astype(np.int32)
    null, down = rng.normal(size=(m, 64)), rng.permutation(m)
    null[3] = np.nan
    bound = np.sort(np.abs(rng.normal(size=m)))[::-1]
    rows = np.argsort(g, kind="stable")
    starts = np.r_[0, np.cumsum(np.bincount(g, minlength=12))]
    calls = {
        "ranks": (V, order), "moments": (V,), "product": (V, E), "group_sums": (V, E[:, 0], g, 12),
        "groups_firing": (V, g, 12), "rearranged": (V, E[:, 0].copy(), index),
        "scores": (V, E, g, 12, Q, (V.T @ Q).T), "delong": (V, order, T),
        "delong_groups": (V, order, T, g, 12), "shuffle": (rows, starts, rng.random((6, n))),
    }  # fmt: skip
    for name, args in calls.items():
        a, b = getattr(fast, name)(*args), getattr(slow, name)(*args)
        a, b = ([*v.values()] if isinstance(v, dict) else v if isinstance(v, tuple) else [v] for v in (a, b))
        for x, y in zip(a, b):
            assert x == pytest.approx(y, rel=1e-12, abs=1e-12 * np.abs(y).max()), name
    for step_down in (False, True):
        args = (null, down, bound, np.sign(rng.normal(size=m)), step_down)
        assert (np.array(fast.exceed(*args)) == np.array(slow.exceed(*args))).all()


@pytest.mark.parametrize("how", [
    {"method": "spearman"}, {"method": "ols", "covariates": ["stain", "age"]}, {"method": "kruskal"},
    {"method": "pearson", "assume_independent": True}, {"method": "auroc"},
    {"method": "auroc", "assume_independent": True},
    {"method": "spearman", "n_permutations": 99, "permute": "within"}, {"method": "pearson", "n_permutations": 99},
])  # fmt: skip
def test_sparse_is_dense_and_stored_zeros_change_nothing(how):
    X = codes()[:, 12:24]
    target = {"auroc": ["b0", "b1"], "kruskal": "grade"}.get(how["method"], ["y0", "y1"])
    adata = table(sp.csr_matrix(X))
    adata.obsm["embedding"] = adata.obsm["embedding_pca"] = X
    both = associate(adata, target, unit="sample", **how)
    found = both[both["source"] == "latent"].reset_index(drop=True)
    raw = both[both["source"] == "raw"].reset_index(drop=True)
    full = sp.csr_matrix((X.ravel().copy(), np.tile(np.arange(12), 300), np.arange(0, 3601, 12)), shape=X.shape)
    same(found, associate(table(full), target, unit="sample", controls=False, **how))
    names = ["estimate", "ci_low", "ci_high", "statistic", "p"]
    assert found["p"].notna().all()
    assert found[names].to_numpy() == pytest.approx(raw[names].to_numpy(), rel=1e-9, abs=1e-12, nan_ok=True)


ALIKE = [
    {"method": "pearson"}, {"method": "spearman"}, {"method": "spearman", "covariates": ["stain"]}, {"method": "ols"},
    {"method": "pearson", "strata": "site"}, {"method": "spearman", "n_permutations": 49},
]  # fmt: skip
NESTED = {"unit": "sample", "controls": False}


@pytest.mark.parametrize(
    "how",
    [
        *({**how, **FREE} for how in ALIKE),
        *({**how, **NESTED} for how in ALIKE),
        {"method": "pearson", "n_permutations": 49, "permute": "within", **NESTED},
    ],
)
def test_many_targets_are_what_each_is_alone(how):
    X = sp.csr_matrix(codes(m=15))
    gaps = np.where(np.arange(300) % 7, np.random.default_rng(5).normal(size=300), np.nan)
    adata = table(X, y1=gaps)
    together = associate(adata, ["y0", "y1", "y2", "y3"], **how)
    alone = pd.concat([associate(adata, t, **how).assign(q=np.nan) for t in ("y0", "y1", "y2", "y3")])
    same(together.assign(q=np.nan), alone.reset_index(drop=True), rel=1e-9)


@pytest.mark.parametrize("free", [False, True])
def test_many_labels_are_what_each_is_alone(free):
    how = FREE if free else {"unit": "sample", "controls": False}
    adata = table(sp.csr_matrix(codes(m=15)))
    together = associate(adata, ["b0", "b1", "b2"], **how)
    alone = pd.concat([associate(adata, t, **how) for t in ("b0", "b1", "b2")])
    same(together.assign(q=0.0), alone.assign(q=0.0).reset_index(drop=True), rel=1e-9)


# --------------------------------------------------------------------------------------------------- textbook p-values


def test_p_is_the_textbook_p_in_ordinary_data():
    """Skewed targets and codes too: the correction begins where it would raise p by more than 5 %."""
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    n = 400
    X = np.where(rng.random((n, 12)) < 0.6, rng.exponential(size=(n, 12)), 0)
    y = rng.poisson(4, n).astype(float)
    label, grade = rng.random(n) < 0.35, rng.choice(list("uvw"), n)
    adata = table(sp.csr_matrix(X), y0=y, b0=label, grade=grade)
    stain = adata.obs["stain"].to_numpy()
    references = {
        ("y0", "pearson"): lambda c: stats.pearsonr(c, y).pvalue,
        ("y0", "spearman"): lambda c: stats.spearmanr(c, y).pvalue,
        ("b0", "auroc"): lambda c: (
            stats.mannwhitneyu(c[label], c[~label], use_continuity=False, method="asymptotic").pvalue
        ),
        ("b0", "ols"): lambda c: stats.ttest_ind(c[label], c[~label]).pvalue,
        ("grade", "kruskal"): lambda c: stats.kruskal(*(c[grade == v] for v in "uvw")).pvalue,
        ("y0", "ols"): lambda c: stats.linregress(c, y).pvalue,
    }
    for (target, method), reference in references.items():
        found = associate(adata, target, method=method, **FREE)
        assert found["p"].to_numpy() == pytest.approx([reference(c) for c in X.T], rel=1e-8), method
    found = associate(adata, "y0", method="ols", covariates=["stain"], **FREE)
    fits = [sm.OLS(y, np.column_stack([np.ones(n), c, stain])).fit() for c in X.T]
    assert found["p"].to_numpy() == pytest.approx([f.pvalues[1] for f in fits], rel=1e-8)


@pytest.mark.parametrize("sides", [1, 2])
def test_correction_is_continuous_and_begins_at_its_threshold(sides):
    a, z = np.meshgrid(np.r_[0.0, np.geomspace(1e-3, 2, 60)], np.linspace(0.3, 7, 300), indexing="ij")
    p = sides * stats.norm.sf(z)
    found = skewed_pvalue(p.ravel(), z.ravel(), a.ravel(), normal=True, sides=sides).reshape(p.shape)
    shape = 4 / np.maximum(a, 1e-9) ** 2
    with np.errstate(invalid="ignore"):
        tail = stats.gamma.sf(shape + z * np.sqrt(shape), shape)
        tail = tail + (stats.gamma.cdf(shape - z * np.sqrt(shape), shape) if sides == 2 else 0)
    expected = np.where((a > 1e-3) & (tail > TOLERATED * p), np.minimum(tail / TOLERATED, 1), p)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (np.diff(found, axis=1) <= 1e-15).all() and (found[0] == p[0]).all()


# ------------------------------------------------------------------------------------------------------------ schemes


def test_rearranged_within_parts():
    parts = np.repeat([0, 1, 2], [5, 1, 30])
    drawn = np.concatenate(list(within(parts).draws(130, 0)), axis=1)
    assert drawn.shape == (36, 130) and (parts[drawn] == parts[:, None]).all()
    assert (np.sort(drawn, axis=0) == np.arange(36)[:, None]).all()
    first = np.bincount(drawn[0], minlength=5)[:5]
    assert stats.chisquare(first).pvalue > 1e-4
    assert (np.concatenate(list(within(parts).draws(130, 0)), axis=1) == drawn).all()


def nested_cohort(effect_within, effect_between, seed, n_groups=15, per=14, m=20):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n_groups), per)
    level, own = rng.normal(size=n_groups)[g], rng.normal(size=len(g))
    x = rng.normal(size=(len(g), m)) + rng.normal(size=(n_groups, m))[g]
    x[:, 0] += effect_within * own + effect_between * level
    return table(sp.csr_matrix(np.maximum(x, 0)), groups=n_groups, patient=g.astype(str), y0=own + 2 * level,
                 label=np.where((level > 0), "case", "control"))  # fmt: skip


def test_within_groups_finds_what_happens_within_and_nothing_else():
    how = {"unit": "sample", "method": "pearson", "controls": False, "n_permutations": 199, "permute": "within"}
    found = associate(nested_cohort(1.0, 0.0, 0), "y0", **how)
    assert found["p"][0] == 1 / 200 == found["p_maxt"][0] and found["inference"][0].startswith("permutation within")
    p = np.concatenate([associate(nested_cohort(0.0, 2.0, s), "y0", **how)["p"] for s in range(15)])
    assert abs((p <= 0.1).mean() - 0.1) < 0.06 and 0.4 < p.mean() < 0.6  # the level of a patient plays no part
    adjusted = associate(nested_cohort(1.0, 0.0, 0), "y0", covariates=["stain"], **how)
    assert adjusted["p"][0] == 1 / 200 and adjusted["p"][1:].min() > 1 / 200


def test_kruskal_within_groups():
    adata = nested_cohort(1.5, 0.0, 3)
    adata.obs["three"] = pd.cut(adata.obs["y0"], 3, labels=list("lmh")).astype(str)
    found = associate(adata, "three", unit="sample", controls=False, n_permutations=199, permute="within")
    assert found["p"][0] == 1 / 200 and (found["p"] <= 0.05).sum() <= 5


def test_between_groups_moves_groups_as_wholes():
    how = {"unit": "sample", "controls": False, "n_permutations": 499, "permute": "between"}
    adata = nested_cohort(0.0, 3.0, 1, n_groups=30)
    found = associate(adata, "label", **how)
    assert found["p"][0] <= 0.01 and found["inference"][0].startswith("permutation of 30 groups")
    p = np.concatenate([associate(nested_cohort(0, 0, s, n_groups=24), "label", **how)["p"] for s in range(12)])
    assert abs((p <= 0.1).mean() - 0.1) < 0.07
    adjusted = associate(adata, "label", method="ols", covariates=["stain"], **how)
    assert adjusted["p"][0] <= 0.01


def test_schemes_that_have_nothing_to_rearrange_are_refused():
    adata = nested_cohort(0, 0, 0)
    how = {"unit": "sample", "controls": False, "n_permutations": 99}
    for target, permute, message in (
        ("y0", "between", "varies within patients"), ("label", "within", "one value in every patient"),
    ):  # fmt: skip
        with pytest.raises(StatisticsError, match=message):
            associate(adata, target, permute=permute, **how)
    with pytest.raises(StatisticsError, match="no two units share"):
        associate(adata, "y0", permute="within", **how, assume_independent=True)
    with pytest.raises(InputError, match="needs n_permutations"):
        associate(adata, "y0", unit="sample", permute="within")
    with pytest.raises(InputError, match=r"obsm\['spatial'\]"):
        associate(adata, "y0", permute="spatial", **how)
    with pytest.raises(InputError, match="takes no strata"):
        associate(adata, "y0", permute="within", strata="site", **how)


def test_shifts_of_a_full_grid_keep_neighbours():
    xy = np.stack(np.meshgrid(np.arange(9) * 224.0, np.arange(6) * 224.0), axis=-1).reshape(-1, 2)
    drawn = shifts(xy, np.random.default_rng(0), 60)
    assert len(np.unique(drawn.T, axis=0)) > 40  # of 216
    grid = drawn.T.reshape(60, 6, 9)
    column, row = grid % 9, grid // 9
    assert (column == column[:, :1]).all() and (row == row[:, :, :1]).all()
    for place, axis, edge in ((column[:, 0], 1, 8), (row[:, :, 0], 1, 5)):
        moved = np.diff(place, axis=axis)
        assert (np.abs(moved) <= 1).all() and ((moved == 0).sum(axis=1) <= 1).all()  # mirrored at one edge at most
        assert np.isin(place[:, 1:][moved == 0], (0, edge)).all()
    counts = np.bincount(drawn.ravel(), minlength=54) / drawn.size
    assert counts.max() < 2 / 54  # no tile is taken much more often than another


def smooth(rng, side, size):
    """A map with spatial autocorrelation, its opposite edges as unlike as those of tissue."""
    whole, side = side, 2 * side
    wave = np.exp(-((np.fft.fftfreq(side)[:, None] ** 2 + np.fft.fftfreq(side)[None] ** 2) * (size * np.pi) ** 2))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * wave).real
    field = field[:whole, :whole]
    return ((field - field.mean()) / field.std()).ravel()


def tissue(seed, *, effect=0.0, side=16, slides=2, m=10):
    rng = np.random.default_rng(seed)
    x = np.concatenate([np.stack([smooth(rng, side, 3) for _ in range(m)], axis=1) for _ in range(slides)])
    y = np.concatenate([smooth(rng, side, 3) for _ in range(slides)])
    x[:, 0] += effect * y
    slide = np.repeat([f"s{i}" for i in range(slides)], side**2)
    adata = table(sp.csr_matrix(np.maximum(x + 1, 0)), patient=slide, y0=y)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2) * 100.0
    adata.obsm["spatial"] = np.tile(grid, (slides, 1))
    return adata


def test_neighbours_are_not_exchangeable_but_shifted_slides_are():
    how = {"unit": "sample", "method": "pearson", "controls": False, "n_permutations": 99, "min_active_groups": 1}
    rates = {}
    for permute in ("within", "spatial"):
        p = []
        for seed in range(14):
            adata = tissue(seed, slides=3)
            p.append(associate(adata, "y0", permute=permute, **how)["p"])
        rates[permute] = (np.concatenate(p) <= 0.05).mean()
    assert rates["within"] > 0.3 and rates["spatial"] < 0.12, rates
    found = associate(tissue(3, effect=2.0, slides=3), "y0", permute="spatial", **how)
    assert found["p"][0] == 0.01 and found["p_maxt"][0] <= 0.05


def test_ragged_slides_keep_their_level():
    how = {"unit": "sample", "method": "pearson", "controls": False, "n_permutations": 99, "permute": "spatial"}
    p = []
    for seed in range(12):
        adata = tissue(seed, slides=3)
        xy = adata.obsm["spatial"]
        inside = ((xy - 750) ** 2).sum(axis=1) < 800**2
        p.append(associate(adata[inside].copy(), "y0", **how)["p"])
    assert (np.concatenate(p) <= 0.05).mean() < 0.15


@pytest.mark.parametrize("how", [{"permute": "within"}, {"permute": "auto"}, {"permute": "auto", **FREE}])
def test_step_down_is_never_above_single_step(how, monkeypatch):
    from biosae.stats import inference, permutation, schemes

    how = {"unit": "sample", "controls": False, "n_permutations": 199, "method": "pearson", **how}
    adata = nested_cohort(0.6, 0.0, 4)
    step = associate(adata, "y0", **how)

    def single(*arguments, **options):
        return permutation.null_counts(*arguments, **{**options, "step_down": False})

    monkeypatch.setattr(inference, "null_counts", single)
    monkeypatch.setattr(schemes, "null_counts", single)
    once = associate(adata, "y0", **how)
    assert (step["p_maxt"] <= once["p_maxt"] + 1e-12).all() and (step["p_maxt"] >= step["p"]).all()
    assert step["p"].tolist() == once["p"].tolist()


# ------------------------------------------------------------------------------------------------------ random effects


def test_random_effects_over_strata():
    rng = np.random.default_rng(0)
    site = np.repeat(list("abcde"), 60)
    own = np.repeat([0.0, 0.4, 0.8, 1.2, -0.2], 60)
    x = rng.normal(size=(300, 3))
    y = own * x[:, 0] + rng.normal(size=300)
    adata = table(sp.csr_matrix(x), y0=y, site=site, b0=y > 0)
    found = {
        pooling: associate(adata, "y0", method="pearson", strata="site", pooling=pooling, **FREE)
        for pooling in ("fixed", "random")
    }
    r = np.array([stats.pearsonr(x[site == s, 0], y[site == s]).statistic for s in "abcde"])
    expected = combine(np.arctanh(r)[:, None], np.full((5, 1), 1 / 57), effects="random")
    row = found["random"].iloc[0]
    assert row["estimate"] == pytest.approx(np.tanh(expected["estimate"][0]), rel=1e-10)
    assert row["tau2"] == pytest.approx(expected["tau2"][0], rel=1e-10) == found["fixed"]["tau2"][0]
    assert row["p"] >= expected["p"][0] and row["p"] > 10 * found["fixed"]["p"][0]
    assert row["ci_high"] - row["ci_low"] > found["fixed"]["ci_high"][0] - found["fixed"]["ci_low"][0]
    area = associate(adata, "b0", strata="site", pooling="random", **FREE).iloc[0]
    assert area["ci_low"] < area["estimate"] < area["ci_high"] and area["tau2"] > 0 and area["n_strata"] == 5
