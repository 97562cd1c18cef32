"""Audit: every defect is planted, found, and nothing is found in a clean cohort."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from joblib import Parallel, effective_n_jobs
from PIL import Image
from scipy.stats import contingency, f_oneway

import biosae as bs
from biosae.data.overlap import cramers_v, eta_squared, label_by_confounder
from biosae.errors import InputError
from biosae.files import hash_file


def planted(folder, n=24, **columns):
    """``n`` distinct PNGs of 8 patients (3 each) at 2 sites with balanced labels, split by patient."""
    rng = np.random.default_rng(3)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    patient = np.arange(n) // 3
    frame = {
        "path": [f"{i:02d}.png" for i in range(n)],
        "case": [f"p{p}" for p in patient],
        "site": np.where(patient % 2, "north", "south"),
        "dx": np.where(np.arange(n) % 3 == 0, "tumour", "normal"),
        "split": np.where(patient < 6, "train", "test"),
        **columns,
    }
    return pd.DataFrame(frame)


def audit(folder, frame, patient="case", **options):
    return bs.read.images(frame, patient=patient, label="dx", root=folder, max_failures=1).audit(**options)


def kinds(result):
    return {p.split(":")[0] for p in result.problems}


def test_a_clean_cohort_has_no_problem(tmp_path):
    result = audit(tmp_path, planted(tmp_path))
    assert result.problems == []
    assert result.ok
    counts = result.counts.set_index("what")["n"]
    assert counts.drop(["slide", "scanner"]).to_dict() == {
        "sample": 24,
        "patient": 8,
        "site": 2,
        "label": 2,
        "split": 2,
    }
    assert counts[["slide", "scanner"]].isna().all()
    sites = result.composition.query("role == 'site'").set_index("level")
    assert sites[["n_samples", "n_patients"]].to_numpy().tolist() == [[12, 4], [12, 4]]
    labels = result.composition.query("role == 'label'").set_index("level")
    assert labels.loc["tumour", ["n_samples", "n_patients"]].tolist() == [8, 8]
    assert (result.images["width"] == 6).all()
    assert result.images["file_sha256"].iloc[4] == hash_file(tmp_path / "04.png")


def test_unreadable_files_are_listed_with_their_reasons(tmp_path):
    frame = planted(tmp_path)
    data = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "05.png").unlink()
    (tmp_path / "07.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 24 files are missing"):
        result = audit(tmp_path, frame)
    found = dict(zip(result.unreadable["sample_id"], result.unreadable["reason"]))
    assert found == {"02.png": "truncated", "05.png": "missing", "07.png": "empty"}
    assert kinds(result) == {"unreadable"}
    assert "3 of 24" in result.problems[0]


def test_duplicates_by_content(tmp_path):
    frame = planted(tmp_path)
    image = Image.open(tmp_path / "00.png")
    (tmp_path / "01.png").write_bytes((tmp_path / "00.png").read_bytes())  # the same file, same patient, other label
    image.save(tmp_path / "23.tif")  # the same pixels in another container, another patient, another split
    frame.loc[23, "path"] = "23.tif"
    for i in (10, 11, 20):  # empty glass is no duplicate
        Image.new("RGB", (6, 6), "white").save(tmp_path / f"{i}.png")
    result = audit(tmp_path, frame)
    table = result.duplicates.set_index("sample_id")
    assert table["group"].tolist() == [0, 0, 0]
    assert table["same_file"].to_dict() == {"00.png": True, "01.png": True, "23.tif": False}
    assert table["split"].to_dict() == {"00.png": "train", "01.png": "train", "23.tif": "test"}
    assert kinds(result) == {"duplicates", "leakage", "blank"}
    text = "\n".join(result.problems)
    assert "1 image(s) occur more than once (3 samples), 1 with different patient, 1 with different label" in text
    assert "1 groups of identical images lie in more than one part" in text
    assert "3 images of one colour" in text


def test_leakage_of_patients_and_slides(tmp_path):
    frame = planted(tmp_path, slide=[f"s{i // 2}" for i in range(24)])
    frame.loc[0, "split"] = "test"
    result = audit(tmp_path, frame, read=False)
    assert result.leakage[["unit", "name", "splits", "n_samples"]].to_numpy().tolist() == [
        ["patient", "p0", "test, train", 3],
        ["slide", "s0", "test, train", 2],
    ]
    assert {"leakage", "names"} <= kinds(result)  # slides s1, s4, ... hold two patients
    assert result.checks.set_index("check").loc["duplicates", "status"] == "not checked"


def test_a_comma_in_the_name_of_a_part_is_no_leakage(tmp_path):
    frame = planted(tmp_path)
    frame["split"] = frame["split"].replace({"train": "fold 1, in"})
    assert audit(tmp_path, frame, read=False).leakage.empty
    frame.loc[0, "split"] = "test"
    assert audit(tmp_path, frame, read=False).leakage["splits"].tolist() == ["fold 1, in, test"]


def test_names_that_differ_only_in_spelling(tmp_path):
    frame = planted(tmp_path)
    frame.loc[1, "case"] = "P 0"
    result = audit(tmp_path, frame, read=False)
    assert "2 names of patients differ only in case, blanks or dashes: 'p0', 'P 0'" in "\n".join(result.problems)


def test_inseparable_label(tmp_path):
    frame = planted(tmp_path)
    frame["dx"] = np.where(frame["site"] == "north", "tumour", "normal")
    frame["device"] = frame["site"].map({"north": "A", "south": "B"})
    samples = bs.read.images(frame, patient="case", label="dx", scanner="device", root=tmp_path)
    result = samples.audit(read=False)
    assert {"inseparable", "confounding", "aliases"} == kinds(result)
    row = result.overlap.iloc[0]
    assert (row["cramers_v"], row["n_single_levels"], row["inseparable"], row["n_patients"]) == (1.0, 2, True, 8)
    cells = result.cells.set_index(["label_level", "confounder_level"])
    assert cells.loc[("tumour", "north"), ["n_samples", "n_patients"]].tolist() == [12, 4]
    assert cells.loc[("tumour", "south"), ["n_samples", "n_patients"]].tolist() == [0, 0]
    assert result.problems[0].startswith("inseparable: label by site: each of the 2 levels holds one label")


def test_near_empty_cells_are_counted_in_patients():
    obs = pd.DataFrame({
        "patient": ["a"] * 50 + ["b"] * 2 + ["c", "d", "e", "f"],
        "site": ["n"] * 52 + ["s"] * 4,
        "dx": ["t"] * 50 + ["u"] * 2 + ["t", "t", "t", "u"],
    })  # fmt: skip
    summary, _ = label_by_confounder(obs, label="dx", confounder="site")
    assert (summary["n_empty_cells"], summary["n_near_empty_cells"]) == (0, 3)  # 1, 1 and 1 patients; s-t has 3
    without, _ = label_by_confounder(obs.drop(columns="patient"), label="dx", confounder="site")
    assert without["n_near_empty_cells"] == 3  # 2, 3 and 1 samples; n-t has 50


def test_few_or_unknown_patients(tmp_path):
    frame = planted(tmp_path)
    few = audit(tmp_path, frame.assign(case=np.where(np.arange(24) < 18, "p", "q")), read=False)
    assert any(p.startswith("patient: 2: no exact test") for p in few.problems)
    unknown = audit(tmp_path, frame, patient=None, read=False)
    assert any(p.startswith("patient: unknown") for p in unknown.problems)
    assert unknown.checks.set_index("check").loc["leakage", "status"] == "not checked"


def test_sizes_are_a_confounder(tmp_path):
    frame = planted(tmp_path)
    for i in np.flatnonzero(frame["dx"] == "tumour"):
        Image.open(tmp_path / f"{i:02d}.png").resize((8, 6)).save(tmp_path / f"{i:02d}.png")
    result = audit(tmp_path, frame)
    assert kinds(result) == {"sizes", "inseparable", "confounding"}
    assert "label by image_size" in result.problems[0]


def test_cramers_v_against_scipy_and_its_correction():
    rng = np.random.default_rng(0)
    for shape in [(2, 2), (3, 4), (5, 2)]:
        table = rng.integers(1, 30, shape)
        plain, corrected = cramers_v(table)
        assert plain == pytest.approx(contingency.association(table, method="cramer"))
        assert corrected <= plain
    independent = [
        cramers_v(pd.crosstab(rng.integers(0, 4, 40), rng.integers(0, 4, 40)).to_numpy()) for _ in range(300)
    ]
    plain, corrected = np.mean(independent, axis=0)
    assert plain > 0.25  # what 40 samples of nothing give
    assert corrected < 0.1
    assert cramers_v(np.diag([4, 4, 4])) == pytest.approx((1, 1))
    assert np.isnan(cramers_v(np.array([[3, 4]]))).all()


def test_eta_squared_against_the_f_test():
    rng = np.random.default_rng(1)
    groups = pd.Series(rng.choice(list("abc"), 60))
    values = rng.normal(size=60) + (groups == "a")
    f = f_oneway(*[values[groups == g] for g in "abc"]).statistic
    assert eta_squared(values, groups) == pytest.approx(2 * f / (2 * f + 57))
    assert np.isnan(eta_squared(np.ones(60), groups))


def test_numeric_labels_are_cut_with_zero_apart():
    obs = pd.DataFrame({"n": [0] * 12 + list(range(1, 25)), "site": list("ab") * 18})
    _, cells = label_by_confounder(obs, label="n", confounder="site")
    assert cells["label_level"].unique().tolist() == ["0", "1 to 8", "9 to 16", "17 to 24"]
    assert cells["n_samples"].sum() == 36
    spread = pd.DataFrame({"n": np.arange(36) / 7, "site": list("ab") * 18})
    _, cells = label_by_confounder(spread, label="n", confounder="site")
    assert cells.groupby("label_level", observed=True)["n_samples"].sum().tolist() == [9, 9, 9, 9]


def test_text_html_and_frame(tmp_path):
    frame = planted(tmp_path)
    frame["dx"] = frame["dx"].replace("tumour", "<script>")
    frame.loc[0, "split"] = "test"
    result = audit(tmp_path, frame)
    lines = str(result).splitlines()
    assert lines[0].startswith("Audit of Samples: 24 images, 8 patients")
    assert lines[1].startswith(" ! leakage: 1 patients")  # problems come first
    assert "<script>" not in result._repr_html_()
    table = result.to_frame()
    assert table["status"].tolist() == sorted(table["status"], key=["problem", "ok", "not checked"].index)
    with pytest.raises(InputError, match="did you mean 'site'"):
        audit(tmp_path, frame, confounders=["sites"], read=False)


def test_parallel_reading_agrees(tmp_path, monkeypatch):
    frame = planted(tmp_path, n=270)
    samples = bs.read.images(frame, patient="case", label="dx", root=tmp_path)
    one, two = samples.audit(n_jobs=1), samples.audit(n_jobs=2)
    assert one.images.equals(two.images)
    assert one.images.equals(samples.audit(n_jobs=-1).images)
    asked = []
    monkeypatch.setattr("joblib.Parallel", lambda n_jobs, **options: asked.append(n_jobs) or Parallel(1, **options))
    for n in (60, 270):
        samples.select(slice(0, n)).audit(n_jobs=-1)
    assert asked == [1, min(2, effective_n_jobs(-1))]  # few items are read in this process
    assert one.images.index.equals(samples.ids)


def test_real_cohorts(shared):
    """What is known about these sets from their authors is what the audit must say."""
    data = shared / "data"
    smears = bs.read.images(data / "txl_pbc_blood" / "manifest.csv", patient=None)
    cells = bs.read.images(
        data / "wbc_two_devices" / "manifest.csv", patient=None, label="cell_class", scanner="device"
    )
    result = smears.audit(label=["count_rbc", "count_wbc"], read=False)
    eta = result.overlap.set_index("label")["eta_squared"]
    assert eta["count_rbc"] > 0.4  # wide fields against centred cells
    assert any(p.startswith("confounding: count_rbc by site") for p in result.problems)
    twins = cells.audit().duplicates
    truth = cells.obs["content_hash"]
    assert set(twins["sample_id"]) == set(truth.index[truth.duplicated(keep=False)])
    spots = bs.read.tiles(
        data / "her2st_spots" / "manifest.csv", patient="patient_id", slide="section_id", split="split", mpp=0.775
    )
    assert set(spots.audit(read=False).leakage["name"]) == {"B", "C", "B4", "C2", "C3", "C4"}
