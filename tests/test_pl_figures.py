"""Figures: what they say is what the tables say."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from synthetic_run import FakeSamples, make_associations, make_latents

from biosae import pl
from biosae.errors import InputError
from biosae.interpret import examples
from biosae.pl import results, style
from biosae.pl.gallery import HEADINGS
from biosae.stats import summary
from biosae.stats.ranking import strength


@pytest.fixture(scope="module")
def adata():
    return make_latents()


@pytest.fixture(scope="module")
def table(adata):
    return make_associations(adata)


@pytest.fixture(scope="module")
def strata():
    return pd.DataFrame(
        {
            "latent": "L0007", "target": "count_b", "stratum": ["AT2", "within", "pooled"],
            "estimate": [0.0, 0.02, 0.4], "ci_low": [-0.2, -0.1, 0.3], "ci_high": [0.2, 0.14, 0.5],
            "n_units": [10, 20, 20],
        }
    )  # fmt: skip


def ticks(ax) -> list[str]:
    return [t.get_text() for t in ax.get_yticklabels()]


def test_volcano_puts_every_tested_latent_at_its_effect_and_p(table) -> None:
    rows = table[(table["source"] == "latent") & (table["target"] == "count_a") & table["p"].notna()]
    ax = pl.volcano(table, target="count_a")
    drawn = np.vstack([c.get_offsets() for c in ax.collections])
    wanted = np.column_stack([rows["estimate"], -np.log10(rows["p"])])
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], wanted[np.lexsort(wanted.T)], rtol=1e-9)


def test_volcano_counts_tested_and_refused_in_its_title(table) -> None:
    title = pl.volcano(table, target="count_a").get_title(loc="left").replace("\n", " ")
    assert title == "58 latents tested in 20 patients (240 samples); not tested: dead 5, too sparse 1"


def test_volcano_line_separates_what_passes_q_from_what_does_not(table) -> None:
    rows = table[(table["source"] == "pca") & (table["target"] == "count_a")]
    line = results.threshold_p(rows, alpha=0.05)
    assert (rows.loc[rows["q"] <= 0.05, "p"] < line).all()
    assert (rows.loc[rows["q"] > 0.05, "p"] > line).all()
    assert results.threshold_p(rows.assign(q=1.0)) is None


def test_volcano_of_several_targets_is_drawn_in_q(table) -> None:
    assert "q" in pl.volcano(table).get_ylabel()


def test_volcano_survives_p_of_zero_and_nothing_tested(table) -> None:
    zero = table.assign(p=table["p"].where(table["latent"] != "L0003", 0.0))
    assert np.isfinite(pl.volcano(zero, target="count_a").get_ylim()).all()
    pl.volcano(table.assign(p=np.nan, q=np.nan), target="count_a").figure.draw_without_rendering()


@pytest.mark.parametrize("wrong", [{"target": "count_c"}, {"source": "latents"}, {"y": "z"}])
def test_volcano_names_the_valid_choices(table, wrong) -> None:
    with pytest.raises(InputError, match="Valid"):
        pl.volcano(table, **wrong)


def test_table_without_a_needed_column_is_refused(table) -> None:
    with pytest.raises(InputError, match="'q'"):
        pl.volcano(table.drop(columns="q"))


def test_best_is_the_strongest_tested_of_each_target_and_source(table) -> None:
    best = results.best(table).set_index(["target", "source"])
    assert best.loc[("count_a", "latent"), "latent"] == "L0003"
    largest = table[table["p"].notna()].groupby(["target", "source"])["estimate"].agg(lambda r: r.abs().max())
    pd.testing.assert_series_equal(best["estimate"].abs().sort_index(), largest.sort_index(), check_names=False)
    assert list(best.index.get_level_values("source")[:3]) == ["latent", "raw", "pca"]


def test_estimates_stand_in_where_groups_are_too_few(table) -> None:
    untested = table.assign(p=np.nan, q=np.nan, status="too_few_groups")
    assert results.best(untested).iloc[0]["latent"] == "L0003"
    assert results.best(table.assign(p=np.nan, q=np.nan, status="one_class")).empty


def test_best_agrees_with_the_summary_of_stats(table) -> None:
    keys = ["target", "source", "latent"]
    ours, theirs = results.best(table)[keys], summary(table)[keys]
    assert set(map(tuple, ours.to_numpy())) == set(map(tuple, theirs.to_numpy()))


def test_associations_stand_beside_their_controls(table) -> None:
    names = ticks(pl.associations(table, target="count_a", n=4))
    assert names[0] == "L0003"
    assert len(names) == 6
    assert "raw" in names[4] and "PCA" in names[5]


def test_associations_without_any_p_say_so(table) -> None:
    with pytest.raises(InputError, match="status"):
        pl.associations(table.assign(p=np.nan, status="one_class"))


def test_null_of_effects() -> None:
    rows = pd.DataFrame(
        {"effect": ["auroc", "odds_ratio", "odds_ratio", "pearson_r"], "estimate": [0.2, 0.5, 2.0, -0.4]}
    )
    np.testing.assert_allclose(strength(rows), [-0.3, -np.log(2), np.log(2), -0.4])


def test_strata_put_pooled_first_and_within_second(strata) -> None:
    assert ticks(pl.forest(strata)) == ["pooled (n = 20)", "within strata (n = 20)", "only AT2 (n = 10)"]


def test_density_title_agrees_with_the_codes(adata) -> None:
    dense = adata.X.toarray()
    dead = int((dense > 0).sum(axis=0).__eq__(0).sum())
    l0 = (dense > 0).sum(axis=1).mean()
    ax = pl.density(adata)
    title = ax.get_title(loc="left").replace("\n", " ")
    assert f"{dead} dead" in title and f"L0 = {l0:.1f}" in title and "n = 240 rows" in title
    assert sum(p.get_height() for p in ax.patches) == adata.n_vars


def test_scanner_dots_are_patient_means(adata) -> None:
    ax = pl.scanner(adata, "L0007")
    values = pd.Series(adata[:, "L0007"].X.toarray().ravel(), index=adata.obs["patient"].astype(str).to_numpy())
    drawn = np.sort(np.vstack([c.get_offsets() for c in ax.collections])[:, 1])
    np.testing.assert_allclose(drawn, np.sort(values.groupby(level=0).mean()), rtol=1e-6)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["AT2\n10 patients", "GT450\n10 patients"]


def test_scanner_refuses_unknown_columns(adata) -> None:
    with pytest.raises(InputError, match="scanner"):
        pl.scanner(adata, "L0007", by="scaner")


def test_comparison_writes_each_value_in_its_cell() -> None:
    table = pd.DataFrame(
        {
            "encoder": ["b", "b", "a"], "layer": ["1", "2", "1"], "target": ["t1", "t2", "t1"],
            "source": "latent", "estimate": [0.5, -0.25, 0.1],
        }
    )  # fmt: skip
    ax = pl.comparison(table)
    cells = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in ax.texts[:6]}
    assert cells == {(0, 0): "0.50", (1, 0): "–", (2, 0): "0.10", (0, 1): "–", (1, 1): "−0.25", (2, 1): "–"}
    with pytest.raises(InputError, match="two rows"):
        pl.comparison(pd.concat([table, table]))


def test_readout_asks_for_one_factor() -> None:
    rows = pd.DataFrame(
        {
            "features": "raw",
            "factor": ["site", "scanner"],
            "encoder": "e",
            "layer": "1",
            "balanced_accuracy": [0.5, 0.9],
        }
    )
    with pytest.raises(InputError, match="factor="):
        pl.readout(rows)
    assert "scanner" in pl.readout(rows, factor="scanner").get_ylabel()


def test_every_axes_has_labels(adata, table, strata) -> None:
    flags = pd.DataFrame({"latent": ["L0001"], "eta2_biology": [0.1], "eta2_technical": [0.5], "flag": ["technical"]})
    drawn = [
        pl.volcano(table), pl.associations(table), pl.forest(strata), pl.density(adata), pl.scanner(adata, "L0003"),
        pl.confounders(flags),
    ]  # fmt: skip
    for ax in drawn:
        assert ax.get_xlabel()
        assert ax.get_ylabel()


def test_given_axes_are_used_and_returned(table) -> None:
    ax = style.figure((3, 3)).subplots()
    assert pl.volcano(table, target="count_a", ax=ax) is ax


# -- gallery ---------------------------------------------------------------------------------------------------------


def test_gallery_shows_the_reason_of_an_unreadable_tile_and_counts(adata) -> None:
    top = examples(adata, "L0003", n=6)["sample_id"].iloc[0]
    fig = pl.gallery(adata, "L0003", samples=FakeSamples(adata.obs, unreadable=(top,)), n=6)
    texts = [t.get_text() for sub in fig.subfigs for ax in sub.axes for t in ax.texts]
    assert texts == ["truncated"]
    active = adata[:, "L0003"].X.nnz
    assert f"active in {active} of 240 samples" in fig.get_suptitle()
    assert sum(bool(ax.images) for sub in fig.subfigs for ax in sub.axes) == 17


def test_gallery_of_signed_codes_shows_both_ends(adata) -> None:
    signed = adata.copy()
    values = signed[:, "L0003"].X.toarray().ravel()
    values[::2] *= -1
    changed = signed.X.toarray()
    changed[:, signed.var_names.get_loc("L0003")] = values
    signed.X = csr_matrix(changed)
    fig = pl.gallery(signed, "L0003", samples=FakeSamples(signed.obs), n=4)
    assert [sub.get_suptitle().split(" (")[0] for sub in fig.subfigs] == [
        HEADINGS[k] for k in ("top", "bottom", "active", "inactive")
    ]
    text = (
        f"active in {(values != 0).sum()} of 240 samples ({(values != 0).mean():.1%}), negative in {(values < 0).sum()}"
    )
    assert text in fig.get_suptitle()
    plain = pl.gallery(adata, "L0003", samples=FakeSamples(adata.obs), n=4)
    assert len(plain.subfigs) == 3


def test_gallery_of_every_kind_has_a_heading_each(adata) -> None:
    kinds = ("near", "spread", "top")
    fig = pl.gallery(adata, "L0003", samples=FakeSamples(adata.obs), n=3, kinds=kinds)
    assert [sub.get_suptitle().split(" (")[0] for sub in fig.subfigs] == [
        text for kind, text in HEADINGS.items() if kind in kinds
    ]
    with pytest.raises(InputError, match="L0012"):
        pl.gallery(adata, "L12", samples=None)


# -- style -----------------------------------------------------------------------------------------------------------


def test_save_writes_truetype_pdf_and_png_and_the_same_bytes_twice(table, tmp_path) -> None:
    ax = pl.volcano(table, target="count_a")
    first = pl.save(ax.figure, tmp_path / "a" / "figure", dpi=60)
    assert [p.name for p in first] == ["figure.pdf", "figure.png"]
    pdf = first[0].read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"CreationDate" not in pdf
    assert first[1].read_bytes().startswith(b"\x89PNG")
    again = pl.save(ax.figure, tmp_path / "b" / "figure", dpi=60)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in first]


def test_the_users_own_style_is_left_alone(table) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pl.volcano(table, target="count_a")
    assert dict(matplotlib.rcParams) == before


@given(st.floats(1e-299, 1.0))
def test_p_values_are_printed_to_within_rounding(p) -> None:
    text = style.p_value(p)
    plain = text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    shown = float(re.sub(r"×10", "e", plain))
    assert shown == pytest.approx(p, rel=0.5 if "×" in text else 0.06)


def test_names_in_a_volcano_lie_neither_on_each_other_nor_on_dots() -> None:
    rng = np.random.default_rng(0)
    rho = np.r_[rng.normal(0, 0.15, 80), rng.uniform(0.8, 0.98, 10), -rng.uniform(0.85, 0.9, 4)]
    log_p = np.where(np.abs(rho) > 0.7, 24 + rng.uniform(-0.8, 0.8, len(rho)), 20 * rho**2)
    rows = pd.DataFrame({
        "latent": [f"L{i:04d}" for i in range(len(rho))], "target": "count", "estimate": rho, "p": 10.0**-log_p,
        "q": 10.0**-log_p, "status": "ok", "source": "latent", "effect": "spearman_rho", "unit": "patient",
        "n_units": 40, "n_samples": 400,
    })  # fmt: skip
    ax = pl.volcano(rows, n_labels=8)
    ax.figure.draw_without_rendering()
    names = [t for t in ax.texts if t.get_text().startswith("L")]
    boxes = [t.get_window_extent() for t in names]
    assert len(names) == 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    dots = np.concatenate([ax.transData.transform(c.get_offsets()) for c in ax.collections])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_long_names_of_strata_lie_neither_on_each_other_nor_outside_the_figure() -> None:
    sites = ["pooled", "within", "A", "Hospital Clinic of Barcelona", "Raabin project laboratories, Iran", "B"]
    rows = pd.DataFrame({
        "latent": "L0001", "target": "count", "stratum": sites, "estimate": 0.2, "ci_low": 0.1, "ci_high": 0.3,
        "n_units": 360, "effect": "spearman_rho",
    })  # fmt: skip
    ax = pl.forest(rows)
    ax.figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 for box in boxes)


def test_gallery_says_where_a_kind_has_no_items_and_leaves_no_gap(adata) -> None:
    always = adata.copy()
    always.X = sp.csr_matrix(adata.X.toarray() + 1)
    fig = pl.gallery(always, "L0003", samples=FakeSamples(adata.obs), n=6, cap_per_patient=1)
    top, _, inactive = fig.subfigs
    assert inactive._suptitle.get_text().endswith("there is none") and not inactive.axes
    assert inactive.bbox.height < top.bbox.height / 3 and "at most 1 tile a patient" in fig._suptitle.get_text()
