"""The stress card's figure shows what the table holds: scores, intervals, sizes, reasons."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

from biosae import pl
from biosae.errors import InputError
from biosae.interpret.stress import COLUMNS, StressCard


@pytest.fixture
def card() -> StressCard:
    rows = [
        ("association", "", 0.81, 0.70, 0.90, 0.5, "passed", 40, 400, "ok", ""),
        ("dose", "", 0.4, 0.2, 0.5, 0.6, "failed", 40, 400, "ok", ""),
        ("layer", "", np.nan, np.nan, np.nan, 0.5, "refused", 40, 400, "refused", "no other layers were given"),
        ("context", "site", 0.55, 0.3, 0.7, 0.5, "unclear", 38, 380, "ok", ""),
        ("contradiction", "", 0.9, np.nan, np.nan, 0.8, "no_interval", 2, 57, "too_few_groups", "2 patients"),
    ]
    keys = ["check", "of", "score", "ci_low", "ci_high", "threshold", "verdict", "n_patients", "n_samples", "status"]
    table = pd.DataFrame(rows, columns=[*keys, "reason"]).assign(latent="L1", target="y", reading="")[COLUMNS]
    dose = pd.DataFrame({
        "dose": [0.0, 0.5, 1, 2, 4, 8], "response": np.linspace(0.3, 0.9, 6), "rise": np.linspace(0, 0.6, 6),
        "controls_median": 0.0, "controls_q05": np.linspace(0, -0.1, 6), "controls_q95": np.linspace(0, 0.1, 6),
        "loss:site": [0, 0, 0.05, 0.11, 0.2, 0.3],
    })  # fmt: skip
    site = pd.DataFrame({
        "stratum": ["pooled", "within", "a", "b", "c"], "estimate": [0.8, 0.75, 0.7, 0.85, np.nan], "n_groups": 20,
        "ci_low": [0.7, 0.6, 0.5, 0.7, np.nan], "ci_high": [0.9, 0.85, 0.82, 0.95, np.nan],
        "used": [False, False, True, True, False],
    })  # fmt: skip
    return StressCard("L1", "y", "high L1 goes with y", table, {"dose": dose, "context:site": site})


def texts(fig) -> str:
    return " ".join(t.get_text().replace("\n", " ") for t in fig.findobj(match=lambda a: hasattr(a, "get_text")))


def test_every_number_has_its_interval_and_sizes(card) -> None:
    fig = pl.stress(card)
    ax = fig.subfigs[0].axes[0]
    drawn = {tuple(line.get_xdata()) for line in ax.lines}
    for row in card.table.dropna(subset="ci_low").itertuples():
        assert (row.ci_low, row.ci_high) in drawn and (row.score,) in drawn
    assert (0.9,) in drawn and len([d for d in drawn if len(d) == 1]) == 4  # the refused check has no mark
    said = texts(fig)
    for part in ("high L1 goes with y", "not measured: no other layers were given", "2 patients", "380 samples",
                 "context: site", "largest off-target loss 30%"):  # fmt: skip
        assert part in said, part


def test_doses_that_harm_are_hollow_and_strata_left_out_are_not_drawn(card) -> None:
    dose, site = pl.stress(card).subfigs[1].axes
    faces = {line.get_label(): line for line in dose.lines if line.get_marker() == "o"}
    assert faces["this latent"].get_xdata().tolist() == [0, 1, 2]
    hollow = faces["off-target loses 10 % or more"]
    assert hollow.get_xdata().tolist() == [3, 4, 5] and hollow.get_markerfacecolor() == "white"
    assert [t.get_text().split("\n")[0] for t in site.get_yticklabels()] == ["pooled", "a", "b"]


def test_long_names_of_strata_leave_room_for_the_curves(card) -> None:
    site = card.details["context:site"]
    site = site.assign(stratum=["pooled", *(f"university_hospital_no_{i}" for i in range(len(site) - 1))])
    details = {**card.details, "context:site": site}
    fig = pl.stress(StressCard("L1", "y", card.claim, card.table, details))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig.draw_without_rendering()
    assert all(ax.get_window_extent().width / fig.dpi > 2 for ax in fig.subfigs[1].axes)  # inches


def test_wide_intervals_of_strata_are_drawn_whole(card) -> None:
    card.details["context:site"].loc[2, "ci_low"] = 0.12
    strata = pl.stress(card).axes[-1]
    assert strata.get_xlim()[0] < 0.12


def test_a_card_without_details_is_drawn_alone(card) -> None:
    fig = pl.stress(StressCard("L1", "y", card.claim, card.table, {}))
    assert len(fig.axes) == 1


def test_random_input_filter_draws_rates_and_refuses_without_them() -> None:
    table = pd.DataFrame({
        "latent": ["L0", "L1", "L2"], "rate_target": [0.9, 0.8, 0.2], "rate_random": [0.01, 0.6, 0.0],
        "specific": [True, False, False], "rank": pd.array([1, pd.NA, pd.NA], dtype="Int64"), "n_patients": 20,
        "n_samples": 400, "reason": "",
    })  # fmt: skip
    families = pd.DataFrame({"family": ["white", "phase"], "n_rows": [100, 90], "status": ["ok", "invalid_null"]})
    table.attrs = {"max_rate": 0.05, "min_rate": 0.5, "families": families}
    ax = pl.specific(table)
    points = np.vstack([c.get_offsets() for c in ax.collections])
    assert {(0.01, 0.9), (0.6, 0.8), (0.0, 0.2)} == {tuple(map(float, p)) for p in points}
    title = ax.get_title(loc="left").replace("\n", " ")
    assert "1 latent kept of 3" in title and "20 patients" in title and "phase 90 (not valid)" in title
    with pytest.raises(InputError, match="two are needed"):
        pl.specific(table.assign(rate_random=np.nan, reason="0 families, two are needed"))
