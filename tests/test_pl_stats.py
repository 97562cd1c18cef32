"""Figures of the statistics: what they draw is what the tables hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_run import make_associations, make_latents

from biosae import pl
from biosae.errors import InputError
from biosae.pl import style
from biosae.pl.diagnostics import inflation


@pytest.fixture(scope="module")
def table():
    return make_associations(make_latents())


@pytest.fixture
def replicated():
    return pd.DataFrame(
        {
            "target": ["a", "b", "c"], "source": "latent", "latent": ["L1", "L2", "L3"], "effect": "spearman_rho",
            "estimate_discovery": [0.5, -0.4, 0.3], "estimate_replication": [0.4, 0.1, np.nan],
            "ci_low": [0.2, -0.2, np.nan], "ci_high": [0.6, 0.4, np.nan], "p_replication": [0.001, 0.8, np.nan],
            "replicated": pd.array([True, False, pd.NA], dtype="boolean"), "n_units_discovery": 30,
            "n_units_replication": 20,
        }
    )  # fmt: skip


@pytest.fixture
def shares():
    latents = [f"L{i}" for i in range(6)]
    rows = []
    for factor, technical in (("site", [0.0, 0.1, 0.5, 0.02, 0.3, 0.0]), ("scanner", [0.0, 0.0, 0.1, 0.4, 0.0, 0.01])):
        rows.append(
            pd.DataFrame(
                {
                    "latent": latents, "factor": factor, "biology": "label", "n_units": 90,
                    "eta2_biology": [0.6, 0.2, 0.1, 0.0, 0.3, 0.01], "eta2_technical": technical,
                    "flag": ["biology", "biology", "technical", "technical" if factor == "scanner" else "neither",
                             "mixed", "neither"],
                }
            )
        )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def offsets(ax) -> np.ndarray:
    return np.vstack([c.get_offsets() for c in ax.collections if len(c.get_offsets())])


def test_qq_sorts_every_p_against_its_quantile(table) -> None:
    ax = pl.qq(table, target="count_a")
    rows = table[(table["target"] == "count_a") & table["p"].notna()]
    assert len(offsets(ax)) >= len(rows)
    own = rows[rows["source"] == "latent"]["p"].sort_values().to_numpy()
    expected = -np.log10((np.arange(1, len(own) + 1) - 0.5) / len(own))
    drawn = next(
        c.get_offsets() for c in ax.collections if len(c.get_offsets()) == len(own) and c.get_label()[0] == "S"
    )
    np.testing.assert_allclose(drawn, np.column_stack([expected, -np.log10(own)]), rtol=1e-12)
    assert f"n = {len(own)}" in " ".join(t.get_text() for t in ax.get_legend().get_texts())


def test_inflation_is_one_for_uniform_p_and_grows_as_p_shrink() -> None:
    uniform = (np.arange(1, 10_001) - 0.5) / 10_000
    assert inflation(uniform) == pytest.approx(1.0, abs=1e-3)
    doubled = stats.chi2.sf(2 * stats.chi2.isf(uniform, 1), 1)
    assert inflation(doubled) == pytest.approx(2.0, abs=1e-3)


def test_qq_of_nothing_tested_is_refused(table) -> None:
    with pytest.raises(InputError, match="status column says why"):
        pl.qq(table.assign(p=np.nan))


def test_null_prints_the_permutation_p() -> None:
    draws = np.linspace(-1, 1, 99)
    ax = pl.null(draws, observed=3.0, n="24 patients")
    assert "p = 0.01;" in ax.get_title(loc="left").replace("\n", " ") and "24 patients" in ax.get_title(loc="left")
    assert sum(patch.get_height() for patch in ax.patches) == 99
    assert any(line.get_xdata()[0] == 3.0 for line in ax.lines)
    with pytest.raises(InputError, match="nothing to draw"):
        pl.null([], observed=1.0)


def test_replication_draws_what_was_estimated_twice(replicated) -> None:
    ax = pl.replication(replicated)
    np.testing.assert_allclose(offsets(ax), [[0.5, 0.4], [-0.4, 0.1]])
    title = ax.get_title(loc="left").replace("\n", " ")
    assert title == "2 effects, 1 of the same sign, 1 replicated; n = 30 and 20 units"
    faces = ax.collections[-1].get_facecolors()
    assert faces[1].tolist() == [1, 1, 1, 1] and faces[0].tolist() != [1, 1, 1, 1]
    with pytest.raises(InputError, match="estimated in both"):
        pl.replication(replicated.assign(estimate_replication=np.nan))


def test_forest_says_how_much_strata_differ_and_spans_the_combined_interval() -> None:
    rows = pd.DataFrame(
        {
            "latent": "L1", "target": "y", "stratum": ["within", "S1", "S2"], "estimate": [0.3, 0.2, 0.4],
            "ci_low": [0.1, -0.1, 0.1], "ci_high": [0.5, 0.5, 0.7], "n_units": [40, 10, 30],
            "i2": [0.25, np.nan, np.nan], "p_heterogeneity": [0.2, np.nan, np.nan], "effect": "spearman_rho",
        }
    )  # fmt: skip
    ax = pl.forest(rows)
    assert ax.get_title(loc="left") == "heterogeneity over strata: I² = 25%, p = 0.20"
    diamond = ax.patches[0].get_xy()
    assert diamond[:, 0].min() == 0.1 and diamond[:, 0].max() == 0.5
    sizes = [line.get_markersize() for line in ax.lines if line.get_marker() == "s"]
    assert sizes[0] < sizes[1], "the square of the smaller stratum is smaller"


def test_forest_takes_the_tables_of_sites() -> None:
    rows = pd.DataFrame(
        {
            "latent": "L1", "target": "y", "site": ["random", "pooled", "A", "B", "C"],
            "estimate": [0.3, 0.3, 0.2, 0.4, np.nan], "ci_low": [0.1, 0.2, -0.1, 0.1, np.nan],
            "ci_high": [0.5, 0.4, 0.5, 0.7, np.nan], "n_units": [40, 40, 10, 30, 2], "effect": "spearman_rho",
        }
    )  # fmt: skip
    ax = pl.forest(rows)
    names = [t.get_text().split(" (")[0] for t in ax.get_yticklabels() if t.get_text()]
    assert names[-4:] == ["pooled", "sites, random effects", "only A", "only B"]
    assert len(ax.patches) == 1, "the combined estimate is the diamond"
    held = rows.assign(site=["combined", "D", "A", "B", "C"], latent=["", "L2", "L1", "L1", "L1"])
    names = [t.get_text().split(" (")[0] for t in pl.forest(held).get_yticklabels() if t.get_text()]
    assert names[-4:] == ["held-out sites together", "only D: L2", "only A: L1", "only B: L1"]


def test_same_signs_are_counted_about_the_null_of_each_effect(replicated) -> None:
    mixed = replicated.assign(effect=["spearman_rho", "auroc"][: len(replicated)] + ["auroc"] * (len(replicated) - 2))
    mixed.loc[mixed["effect"] == "auroc", ["estimate_discovery", "estimate_replication"]] = [0.6, 0.4]
    assert "1 of the same sign" in pl.replication(mixed).get_title(loc="left").replace("\n", " ")


def test_map_orders_latents_from_biology_to_technical_and_shows_their_worst_flag(shares) -> None:
    ax = pl.factor_map(shares, n=5)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["L0", "L1", "L4", "L3", "L2"] or names == ["L0", "L1", "L4", "L2", "L3"]
    np.testing.assert_allclose(ax.images[0].get_array()[0], [0.6, 0.0, 0.0])
    colours = {line.get_ydata()[0]: line.get_color() for line in ax.lines if len(line.get_ydata()) == 1}
    assert colours[0] == style.FLAG_COLOURS["biology"] and colours[names.index("L3")] == style.FLAG_COLOURS["technical"]


def test_arrows_lead_from_unadjusted_to_adjusted(table) -> None:
    before = table.assign(estimate=table["estimate"] + 0.1)
    ax = pl.volcano(table, target="count_a", unadjusted=before, n_labels=3)
    arrows = [t for t in ax.texts if getattr(t, "arrow_patch", None) is not None and t.get_text() == ""]
    ends = [
        (t.xyann[0], t.xy[0]) for t in arrows if t.arrow_patch.get_arrowstyle().__class__.__name__ == "CurveFilledB"
    ]
    assert len(ends) >= 3 and all(a - b == pytest.approx(0.1) for a, b in ends)
