"""The phantom cohort: what is planted is what is there, and what is not planted is absent."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from biosae.data import Samples, nuclei, phantom
from biosae.data.phantom import LABEL_SHIFT
from biosae.data.render import CELLS, place
from biosae.data.scanner import SCANNERS, STAINS, WHITE, Scanner, scan
from biosae.errors import InputError

NULL = {"scanner_effect": 0.0, "label_effect": 0.0, "count_effect": 0.0}


def by_patient(samples: Samples) -> pd.DataFrame:
    return samples.obs.drop_duplicates("patient").set_index("patient")


def ellipse(size: int, x: float, y: float, long: float, short: float, angle: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    dx, dy = columns - x, rows - y
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    return (u / long) ** 2 + (v / short) ** 2 <= 1


# -- nuclei ------------------------------------------------------------------------------------------------------


def test_counts_in_obs_are_the_nuclei_drawn():
    samples = phantom(n_patients=4, n_slides=2, n_tiles=3, cell_types=tuple(CELLS), random_state=3)
    for i in range(len(samples)):
        counted = nuclei(samples, i)["type"].value_counts()
        for cell_type in CELLS:
            assert samples.obs[f"count_{cell_type}"].iloc[i] == counted[cell_type]
    assert samples.obs["count_lymphocyte"].dtype == np.int64
    assert samples.obs[[f"count_{t}" for t in CELLS]].to_numpy().sum() > 24


@pytest.mark.parametrize(("cell_type", "threshold"), [("lymphocyte", 0.7), ("fibroblast", 0.55), ("epithelial", 0.4)])
def test_nuclei_seen_in_the_pixels_are_those_planted(cell_type: str, threshold: float):
    """Colour deconvolution with the true stains, threshold, connected components: number and centres agree."""
    samples = phantom(n_patients=6, n_tiles=4, cell_types=(cell_type,), random_state=5, scanner_effect=0)
    exact = 0
    for i in range(len(samples)):
        density = -np.log(np.maximum(samples[i], 1) / WHITE)
        haematoxylin = (density @ np.linalg.pinv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)))[..., 0]
        filled = ndimage.binary_fill_holes(ndimage.binary_opening(haematoxylin > threshold))
        labelled, n = ndimage.label(filled)
        exact += n == samples.obs[f"count_{cell_type}"].iloc[i]
        seen = np.array(ndimage.center_of_mass(filled, labelled, range(1, n + 1))).reshape(-1, 2)[:, ::-1]
        planted = nuclei(samples, i)[["x", "y"]].to_numpy()
        if n == len(planted) and n:
            distance = np.linalg.norm(planted[:, None] - seen[None], axis=-1).min(axis=1)
            assert np.median(distance) < 1.5
    assert exact >= 0.85 * len(samples)


@hypothesis_settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=5, max_size=5), st.integers(48, 128), st.integers(0, 1000))
def test_placed_nuclei_lie_inside_and_apart(wanted: list[int], size: int, seed: int):
    layout = place(np.array(wanted), tuple(CELLS), size=size, rng=np.random.default_rng(seed))
    assert (layout.counts(5) <= wanted).all()
    covered = np.zeros((size, size), dtype=int)
    for values in zip(layout.x, layout.y, layout.long, layout.short, layout.angle):
        covered += ellipse(size, *values)
    assert covered.max(initial=0) <= 1
    border = np.ones((size, size), dtype=bool)
    border[1:-1, 1:-1] = False
    assert not covered[border].any()


def test_few_nuclei_are_all_placed():
    layout = place(np.array([3, 3, 2, 2, 1]), tuple(CELLS), size=128, rng=np.random.default_rng(0))
    assert layout.counts(5).tolist() == [3, 3, 2, 2, 1]


# -- determinism -------------------------------------------------------------------------------------------------


def test_tile_depends_on_neither_order_nor_subset_nor_process():
    arguments = {"n_patients": 4, "n_tiles": 2, "random_state": 11}
    samples = phantom(**arguments)
    forwards = [samples[i] for i in range(len(samples))]
    again = phantom(**arguments)
    for i in reversed(range(len(samples))):
        np.testing.assert_array_equal(again[i], forwards[i])
    np.testing.assert_array_equal(samples.select([5])[0], forwards[5])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(samples))[6], forwards[6])  # noqa: S301
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.map(samples.__getitem__, [7, 2]), [forwards[7], forwards[2]])
    pd.testing.assert_frame_equal(again.obs, samples.obs)


def test_another_seed_gives_another_cohort():
    one, two = (phantom(n_patients=6, n_tiles=2, random_state=s) for s in (0, 1))
    assert (one[0] != two[0]).mean() > 0.5
    assert not one.obs["count_lymphocyte"].equals(two.obs["count_lymphocyte"])
    assert one.fingerprint != two.fingerprint


def test_patient_and_slide_effects_are_independent_draws():
    """numpy pads short seeds with zeros: slide 0 must not repeat its patient's draw."""
    samples = phantom(n_patients=80, n_slides=2, n_tiles=1, patient_sd=0, slide_sd=1.2, label_effect=0, random_state=2)
    first, second = (samples.obs[samples.obs["slide"].str.endswith(s)]["count_epithelial"] for s in ("S0", "S1"))
    assert abs(stats.spearmanr(first, second)[0]) < 0.3


# -- nesting, label, scanner -------------------------------------------------------------------------------------


def test_counts_are_nested_in_patients():
    def between(patient_sd: float) -> float:
        s = phantom(n_patients=30, n_tiles=10, patient_sd=patient_sd, slide_sd=0, label_effect=0, random_state=4)
        groups = [g.to_numpy() for _, g in s.obs.groupby("patient")["count_lymphocyte"]]
        return stats.kruskal(*groups).pvalue

    assert between(0.6) < 1e-6
    assert between(0.0) > 0.01


@pytest.mark.parametrize("wanted", [-1.0, -0.5, 0.0, 0.3, 0.8, 1.0])
def test_label_scanner_correlation_is_the_phi_of_patients(wanted: float):
    samples = phantom(n_patients=60, n_tiles=1, label_scanner_correlation=wanted)
    patients = by_patient(samples)
    phi = np.corrcoef(patients["label"] == "inflamed", patients["scanner"] == "B")[0, 1]
    assert phi == pytest.approx(wanted, abs=0.04)
    assert samples.meta["label_scanner_phi"] == pytest.approx(phi)
    assert patients["label"].value_counts().tolist() == [30, 30]


def test_site_belongs_to_one_scanner():
    patients = by_patient(phantom(n_patients=24, n_tiles=1, scanners=("A", "B", "C")))
    assert patients.groupby("site")["scanner"].nunique().tolist() == [1] * 6
    assert patients["scanner"].value_counts().tolist() == [8, 8, 8]


def test_label_shifts_lymphocytes_and_plasma_cells_only():
    samples = phantom(n_patients=60, n_tiles=6, patient_sd=0, slide_sd=0, random_state=6)
    means = samples.obs.groupby("label")[samples.meta["targets"]].mean()
    log_ratio = np.log(means.loc["inflamed"] / means.loc["control"])
    for target in ("count_lymphocyte", "count_plasma"):  # a little below 0.7: full tiles hold no more
        assert LABEL_SHIFT - 0.2 < log_ratio[target] < LABEL_SHIFT + 0.15
    assert abs(log_ratio["count_epithelial"]) < 0.2
    assert samples.meta["label_targets"] == ["count_lymphocyte", "count_plasma"]


def test_no_label_effect_no_difference():
    samples = phantom(n_patients=60, n_tiles=6, label_effect=0, random_state=7)
    means = samples.obs.groupby("patient")[samples.meta["targets"]].mean()
    inflamed = by_patient(samples)["label"].reindex(means.index) == "inflamed"
    for target in samples.meta["targets"]:
        assert stats.mannwhitneyu(means[target][inflamed], means[target][~inflamed]).pvalue > 0.005
    assert samples.meta["label_targets"] == []


def test_without_scanner_effect_the_scanner_leaves_the_pixels_alone():
    """Same patients, once on one scanner and once spread over four: every pixel is the same."""
    one, four = (
        phantom(n_patients=8, n_tiles=2, scanner_effect=0, label_effect=0, scanners=names) for names in ("A", "ABCD")
    )
    assert four.obs["scanner"].nunique() == 4
    for i in range(len(one)):
        np.testing.assert_array_equal(one[i], four[i])
    assert four.meta["technical"] == []


def test_scanner_effect_moves_the_colour_with_its_strength():
    def distance(strength: float) -> float:
        s = phantom(n_patients=8, n_tiles=4, scanner_effect=strength, label_effect=0, random_state=8)
        colour = pd.DataFrame([s[i].mean(axis=(0, 1)) for i in range(len(s))]).groupby(s.obs["scanner"].to_numpy())
        return float(np.linalg.norm(colour.mean().loc["A"] - colour.mean().loc["B"]))

    none, half, full = distance(0), distance(0.5), distance(1)
    assert full > half + 4 > none + 8
    assert phantom(n_patients=2, n_tiles=1).meta["technical"] == ["scanner"]


def test_scan_is_beer_lambert_with_gamma():
    haematoxylin, eosin = np.full((4, 4), 0.7), np.full((4, 4), 0.4)
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    expected = 245 * np.exp(-1.3 * (0.7 * unit[0] + 0.4 * unit[1]))
    np.testing.assert_array_equal(scan(haematoxylin, eosin, Scanner(gamma=1.3))[2, 1], np.rint(expected))
    assert (scan(np.zeros((4, 4)), np.zeros((4, 4)), Scanner()) == 245).all()


def test_blur_keeps_the_mean_and_lowers_the_contrast():
    rng = np.random.default_rng(0)
    maps = rng.uniform(0, 1, (2, 64, 64))
    sharp, soft = scan(*maps, Scanner()).astype(float), scan(*maps, Scanner(blur=1.0)).astype(float)
    assert soft.mean() == pytest.approx(sharp.mean(), abs=0.5)
    assert soft.std() < 0.6 * sharp.std()


def test_strength_zero_is_the_reference_and_one_the_scanner_itself():
    for scanner in SCANNERS:
        assert scanner.scaled(0) == Scanner()
        assert scanner.scaled(1) == scanner


# -- null --------------------------------------------------------------------------------------------------------


def test_null_phantom_reports_counts_unrelated_to_pixels_and_label():
    samples = phantom(n_patients=30, n_tiles=10, patient_sd=0, slide_sd=0, random_state=9, **NULL)
    drawn = pd.DataFrame([nuclei(samples, i)["type"].value_counts() for i in range(len(samples))])
    inflamed = (samples.obs["label"] == "inflamed").to_numpy()
    for target in samples.meta["targets"]:
        reported, true = samples.obs[target].to_numpy(), drawn[target.removeprefix("count_")].to_numpy()
        assert stats.spearmanr(reported, true).pvalue > 0.005
        assert stats.ks_2samp(reported, true).pvalue > 0.005  # the same distribution
        assert stats.mannwhitneyu(reported[inflamed], reported[~inflamed]).pvalue > 0.005
        assert reported.std() > 0.5
    assert samples.meta["planted"] == samples.meta["technical"] == samples.meta["label_targets"] == []


def test_count_effect_between_zero_and_one_is_between():
    samples = phantom(n_patients=20, n_tiles=8, count_effect=0.6, random_state=10)
    true = [(nuclei(samples, i)["type"] == "lymphocyte").sum() for i in range(len(samples))]
    assert 0.35 < stats.pearsonr(samples.obs["count_lymphocyte"], true)[0] < 0.95


# -- disk and refusals -------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    samples = phantom(n_patients=3, n_tiles=2, random_state=12)
    samples.save(tmp_path / "samples.parquet")
    loaded = Samples.load(tmp_path / "samples.parquet")
    assert loaded.fingerprint == samples.fingerprint
    assert loaded.meta == samples.meta
    assert loaded.roles == samples.roles and loaded.mpp == 0.5
    np.testing.assert_array_equal(loaded[4], samples[4])
    pd.testing.assert_frame_equal(nuclei(loaded, 4), nuclei(samples, 4))


def test_written_tiles_are_the_rendered_tiles(tmp_path):
    from biosae.read import tiles

    rendered = phantom(n_patients=3, n_tiles=2, random_state=13)
    written = phantom(n_patients=3, n_tiles=2, random_state=13, out=tmp_path)
    read = tiles(tmp_path / "samples.csv", patient="patient", scanner="scanner", label="label", id="sample_id")
    for i, sample_id in enumerate(rendered.ids):
        np.testing.assert_array_equal(written[i], rendered[i])
        np.testing.assert_array_equal(read[sample_id], rendered[i])
    pd.testing.assert_frame_equal(written.obs.drop(columns="path"), rendered.obs)
    counts = rendered.meta["targets"]
    pd.testing.assert_frame_equal(read.obs.loc[rendered.ids, counts], rendered.obs[counts])
    pd.testing.assert_frame_equal(nuclei(written, 2), nuclei(rendered, 2))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "histolgy"}, "did you mean 'histology'"),
        ({"cell_types": ("lymphocite",)}, "did you mean 'lymphocyte'"),
        ({"cell_types": ()}, "at least one"),
        ({"scanners": ("A", "A")}, "only once"),
        ({"scanners": "ABCDE"}, "fewer names"),
        ({"scanners": ("A",), "label_scanner_correlation": 0.5}, "two scanners"),
        ({"label_scanner_correlation": 1.5}, "between -1 and 1"),
        ({"count_effect": -0.1}, "between 0 and 1"),
        ({"scanner_effect": float("nan")}, "between 0 and 3"),
        ({"n_patients": 0}, "between 1"),
        ({"n_tiles": 2.5}, "whole number"),
        ({"size": 16}, "between 48"),
        ({"patient_sd": "0.3"}, "a number"),
    ],
)
def test_refusals_say_what_to_do(arguments: dict, said: str):
    with pytest.raises(InputError, match=said):
        phantom(**arguments)


def test_nuclei_of_other_samples_are_unknown():
    samples = phantom(n_patients=2, n_tiles=1)
    samples.meta = {}
    with pytest.raises(InputError, match="not a phantom"):
        nuclei(samples, 0)
