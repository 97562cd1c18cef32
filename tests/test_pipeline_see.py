"""Retrieval, two cohorts and the atlas as stages of a study, and what the report says of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from synthetic_run import PATIENTS, make_run
from test_real_studies import study as real

from biosae import pl
from biosae.errors import InputError
from biosae.files import read_h5ad, read_table, write_json, write_table
from biosae.pipeline import parse_config, run
from biosae.pipeline.config import RetrieveConfig
from biosae.pipeline.see import retrieval
from biosae.pl import style
from biosae.reports import report, search
from biosae.reports import run as runs
from biosae.reports.methods import methods
from biosae.reports.report import _atlas
from biosae.reports.tables import Figures, cell
from biosae.reports.verdicts import cohort_verdict, retrieval_verdicts
from biosae.search import diff, evaluate, pairs

PIPELINES = Path(__file__).parents[1] / "pipelines"

MINIMAL = {
    "name": "x",
    "samples": {"source": "phantom", "phantom": {"n_patients": 8, "n_tiles": 4}},
    "encoders": [{"name": "tiny-histology"}],
    "associate": {"targets": ["count_plasma"]},
}


def parsed(**change: object):
    return parse_config({**MINIMAL, **change})


# -- configuration ---------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_associations_unless_named():
    independent = {"targets": ["count_plasma"], "groups": "slide", "assume_independent": True}
    config = parsed(associate=independent, retrieve={"labels": ["label"]}, diff={"by": "site", "groups": "patient"})
    assert config.retrieve.groups == "slide" and config.retrieve.assume_independent is True
    assert config.diff.groups == "patient" and config.diff.assume_independent is False
    assert config.columns()["patient"] == "diff.groups" and "slide" in config.columns()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieve": {"labels": ["a"], "exclud": [[]]}}, "unknown key 'exclud'; did you mean 'exclude'"),
        ({"retrieve": {"labels": []}}, "at least 1"),
        ({"retrieve": {"labels": ["a"], "use_rep": ["Y"]}}, "embedding_centred"),
        ({"retrieve": {"labels": ["a"], "metric": "cosin"}}, "'cosine'"),
        ({"diff": {"by": "site", "cohorts": ["a"]}}, "at least 2"),
        ({"diff": {"by": "site", "pairs": {"stratum": "site"}}}, "did you mean 'strata'"),
        ({"atlas": {"show_ids": True}}, "unknown key 'show_ids'"),
        ({"atlas": {"spatial": ["x"]}}, "at least 2"),
    ],
)
def test_configuration_errors_say_what_to_write(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        parsed(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieve": {"labels": ["lable"]}}, r"retrieve\.labels.*did you mean 'label'"),
        ({"retrieve": {"labels": ["label"], "exclude": [["slid"]]}}, r"retrieve\.exclude.*'slid'"),
        ({"retrieve": {"labels": ["label"], "queries": ["test"]}}, r"retrieve\.queries.*'split'"),
        ({"diff": {"by": "scaner"}}, r"diff\.by.*'scaner'"),
        ({"diff": {"by": "patient"}}, r"diff\.by.*8 values.*diff\.cohorts"),
        ({"diff": {"by": "scanner", "cohorts": ["A", "GT450"]}}, r"diff\.cohorts: 'scanner' never is 'GT450'"),
        ({"diff": {"by": "scanner", "covariates": ["spline(ag, df=3)"]}}, r"diff\.covariates.*'ag'"),
        ({"diff": {"by": "scanner", "pairs": {"strata": "ward"}}}, r"diff\.pairs\.strata.*'ward'"),
        ({"atlas": {"spatial": ["x", "why"]}}, r"atlas\.spatial"),
    ],
)
def test_a_wrong_column_or_value_is_found_before_anything_is_embedded(tmp_path: Path, change: dict, message: str):
    with pytest.raises(InputError, match=message):
        run(parsed(**change), out=tmp_path, say=lambda text: None)
    assert not (tmp_path / "embeddings").exists()


# -- retrieval -------------------------------------------------------------------------------------------------------


@pytest.fixture
def classes() -> anndata.AnnData:
    """Two classes in four patients: codes tell the classes apart; embeddings only once their mean is taken off."""
    rng = np.random.default_rng(0)
    label = np.tile(["a", "b"], 20)
    codes = np.stack([label == "a", label == "b"], axis=1) * rng.uniform(1, 2, (40, 1))
    obs = pd.DataFrame({
        "label": label, "patient": np.repeat(["p0", "p1", "p2", "p3"], 10), "slide": ["s"] * 39 + [None],
        "split": np.repeat(["train", "test"], 20),
    }, index=[f"i{i:02d}" for i in range(40)])  # fmt: skip
    adata = anndata.AnnData(csr_matrix(codes.astype(np.float32)), obs=obs)
    noise = rng.normal(0, 30, (40, 1)) * np.array([[0.0, 0.0, 1.0]])
    adata.obsm["embedding"] = np.c_[codes, np.zeros(40)] + np.array([[0, 0, 1000.0]]) + noise
    return adata


def test_retrieval_asks_every_label_and_exclusion_and_lists_what_it_refused(classes):
    section = RetrieveConfig(
        labels=["label"],
        exclude=[[], ["patient"], ["label"], ["slide"]],
        groups="patient",
        assume_independent=False,
        k=5,
    )
    table = retrieval(classes, section, fit_on=None)
    ap = table[table["measure"] == "ap"].set_index(["excluded", "use_rep"])
    assert ap.loc[("nothing", "X"), "estimate"] == 1.0 and ap.loc[("patient", "X"), "estimate"] == 1.0
    direct = evaluate(classes, "label", exclude=["patient"], k=5)
    same = table[table["excluded"] == "patient"]
    assert same["estimate"].tolist() == direct["estimate"].tolist() and set(same["n_groups"]) == {4.0}
    assert ap.loc[("label", "X"), "status"] == "no_queries" and ap.loc[("label", "X"), "n_left_out"] == 40
    refused = table[table["status"] == "refused"]
    assert set(refused["excluded"]) == {"slide"} and set(refused["use_rep"]) == {"X", "embedding"}
    assert refused["reason"].str.contains("slide").all()
    assert set(table["groups"]) == {"patient"} and set(table["metric"]) == {"cosine"}


def test_the_mean_that_is_taken_off_is_that_of_the_rows_fitted_on(classes):
    section = RetrieveConfig(
        labels=["label"],
        use_rep=["embedding", "embedding_centred"],
        queries=["test"],
        gallery=["train"],
        groups="patient",
    )
    table = retrieval(classes, section, fit_on="train")
    known = classes.obsm["embedding"][:20].mean(axis=0)
    assert classes.obsm["embedding_centred"] == pytest.approx(classes.obsm["embedding"] - known)
    ap = table[table["measure"] == "ap"].set_index("use_rep")
    assert ap.loc["embedding", "n_queries"] == 20 and ap.loc["embedding", "n_groups"] == 2
    assert ap.loc["embedding", "status"] == "too_few_groups" and np.isnan(ap.loc["embedding", "ci_low"])


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A phantom study with all three, run once."""
    folder = tmp_path_factory.mktemp("see")
    raw = {
        **MINIMAL,
        "samples": {"source": "phantom", "phantom": {"n_patients": 12, "n_tiles": 6, "scanner_effect": 1.0}},
        "encoders": [{"name": "tiny-histology", "layers": ["final", "stage3"]}],
        "sae": {"n_latents": 24, "k": 4, "options": {"n_steps": 30}},
        "associate": {"targets": ["count_plasma"], "controls": False, "unit": "sample", "method": "spearman"},
        "retrieve": {"labels": ["scanner"], "exclude": [[], ["patient"]], "k": 3},
        "diff": {"by": "scanner", "n_permutations": 99, "pairs": {}},
        "atlas": {"n_examples": 2, "n_cards": 1, "max_mb": 2.0},
        "max_latent_cards": 0,
    }
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # figures are drawn but not filed
        patch.setattr("biosae.pl.style.save", lambda *args, **kwargs: [])
        run(parse_config(raw), out=folder, say=said.append)
    return raw, folder, said


def test_a_run_writes_the_tables_of_every_view_the_sections_and_the_atlas(study):
    _, folder, _ = study
    adata = read_h5ad(folder / "latents.h5ad")
    table = read_table(folder / "tables/diff.csv")
    direct = diff(adata, "scanner", n_permutations=99)
    assert table["latent"].tolist() == direct["latent"].tolist()
    assert table["p"].to_numpy() == pytest.approx(direct["p"].to_numpy(float), nan_ok=True)
    assert len(read_table(folder / "tables/pairs.csv")) == len(pairs(adata))
    every = read_table(folder / "tables/retrieval_all.csv")
    assert set(zip(every["layer"], every["excluded"])) == {
        (v, e) for v in ("final", "stage3") for e in ("nothing", "patient")
    }
    assert (folder / "views/tiny-histology__stage3/tables/diff.csv").is_file()
    page = (folder / "report.html").read_text()
    assert 'id="cohorts"' in page and 'id="retrieval"' in page and '<a href="atlas.html">' in page
    assert (folder / "atlas.html").is_file()


def test_a_second_run_skips_all_and_a_change_runs_what_hangs_on_it(study):
    raw, folder, first = study
    said: list[str] = []
    run(parse_config(raw), out=folder, say=said.append)
    assert len(said) > 8 and all("skipped" in line for line in said)
    assert "atlas: done" in first[-1]

    def would_run(change: dict) -> list[str]:
        said.clear()
        run(parse_config({**raw, **change}), out=folder, dry_run=True, say=said.append)
        return [re.sub(r".*\] (\S+): .*", r"\1", line) for line in said if "would run" in line]

    diffs = ["diff/tiny-histology__final", "diff/tiny-histology__stage3"]
    assert would_run({"diff": {**raw["diff"], "min_frequency": 0.2}}) == [*diffs, "compare", "report", "atlas"]
    assert would_run({"atlas": {**raw["atlas"], "n_examples": 3}}) == ["report", "atlas"]


# -- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run in which two scanners were compared, and searches asked, of which one was refused."""
    place = make_run(tmp_path_factory.mktemp("made") / "toy", optional=False)
    adata = read_h5ad(place / "latents.h5ad")
    (place / "tables").mkdir()
    section = RetrieveConfig(labels=["label"], exclude=[[], ["patient"], ["ward"]], groups="patient", k=3)
    adata.obs["ward"] = ["w"] * 239 + [None]
    write_table(place / "tables/retrieval.csv", retrieval(adata, section, fit_on=None))
    write(place, diff=diff(adata, "scanner", n_permutations=999), pairs=pairs(adata))
    return place


def write(place: Path, **made: pd.DataFrame) -> None:
    for name, table in made.items():
        write_table(place / f"tables/{name}.csv", table)
        write_json(place / f"tables/{name}.json", table.attrs["biosae"])


@pytest.fixture
def figures(tmp_path: Path, monkeypatch) -> Figures:
    monkeypatch.setattr("biosae.pl.style.save", lambda *args, **kwargs: [])
    return Figures(tmp_path)


def test_cohorts_say_who_was_compared_and_what_was_not_tested(made: Path, figures):
    loaded = runs.load(made)
    found = search.cohorts(loaded, figures)
    table = loaded.tables["diff"]
    said = " ".join(found["sentences"])
    assert "A is AT2: 10 patients (120 samples). B is GT450: 10 patients (120 samples)." in said
    assert f"{table['p'].notna().sum()} of 64 latents were tested; not tested: " in said and "dead 5" in said
    first = found["tables"][0].rows[0]
    assert first[0] == "L0007" and first[1] == cell("frequency_a", table["frequency_a"].iloc[0])
    assert len(found["pictures"]) == 2 and not figures.refused
    assert "tested" in found["tables"][1].caption and "within patient" in found["tables"][1].caption
    verdict = cohort_verdict(loaded)
    assert verdict.startswith("AT2 against GT450 (10 patients against 10)") and "first L0007" in verdict


def test_retrieval_prints_estimates_with_chance_and_lists_what_was_refused(made: Path, figures):
    loaded = runs.load(made)
    found = search.retrieval(loaded, figures)
    rows = loaded.tables["retrieval"].query("measure == 'ap'")
    at, wide = found["table"].headings.index, rows.set_index(["excluded", "use_rep"])
    assert [line[at("excluded")] for line in found["table"].rows] == ["nothing", "patient"]
    for line in found["table"].rows:
        for rep, heading in (("X", "codes"), ("X - embedding", "codes − embedding")):
            row = wide.loc[(line[at("excluded")], rep)]
            shown = f"{style.number(row['estimate'], digits=3)} ({style.number(row['ci_low'], digits=3)} to "
            assert line[at(heading)].startswith(shown)
        assert line[at("chance")] == style.number(wide.loc[(line[at("excluded")], "X"), "chance"], digits=3)
        assert line[at("queries")] == "240"
    assert len(found["all"].rows) == len(loaded.tables["retrieval"].dropna(subset="estimate"))
    assert found["refused"].rows[0][:2] == ["label", "ward"] and "ward" in found["refused"].rows[0][2]
    assert len(found["refused"].rows) == 1 and found["figure"] is not None
    (line,) = retrieval_verdicts(loaded)
    best = rows[(rows["use_rep"] == "X") & (rows["excluded"] == "patient")].iloc[0]
    assert f"{style.number(best['estimate'])} (patient excluded, chance {style.number(best['chance'])})" in line
    assert "240 queries; codes less embedding" in line


def test_methods_say_how_cohorts_and_rankings_were_made(made: Path):
    text = " ".join(methods(runs.load(made)))
    for fact in (
        "AT2 (10 patients) and GT450 (10 patients), each patient giving the share of its samples in which it fires",
        "p-values came from rearranging patients between the two (",
        "tested for firing together within patient",
        "240 queries ranked the samples by cosine similarity of their codes and embedding",
        "without samples that share its patient",
        "20 patients taken as independent",
    ):
        assert fact in text


def test_a_run_without_them_has_no_such_sections(tmp_path: Path, figures):
    place = make_run(tmp_path / "old", optional=False)
    loaded = runs.load(place)
    assert search.cohorts(loaded, figures) is None and search.retrieval(loaded, figures) is None
    assert cohort_verdict(loaded) is None and retrieval_verdicts(loaded) == []
    page = report(place, max_latents=0)
    assert 'id="cohorts"' not in page.read_text() and "atlas.html" not in page.read_text()
    (place / "atlas.html").write_text("x")
    assert _atlas(loaded, page) == "atlas.html"
    assert _atlas(loaded, tmp_path / "mail/report.html") == ""


def test_cohorts_that_are_slides_go_by_pseudonyms(made: Path, tmp_path: Path, figures):
    place = shutil.copytree(made, tmp_path / "slides")
    first, second = (f"{PATIENTS[i]}-S0" for i in (0, 1))
    how = {"n_permutations": 99, "assume_independent": True}
    write(place, diff=diff(read_h5ad(place / "latents.h5ad"), "slide", cohorts=(first, second), **how))
    loaded = runs.load(place)
    assert re.fullmatch(r"S\d\d", loaded.cohorts["a"])
    printed = [search.cohorts(loaded, figures), cohort_verdict(loaded), methods(loaded)]
    assert "Ramirez" not in str(printed) and "6 samples" in str(printed)
    assert runs.load(place, show_ids=True).cohorts["a"] == first


# -- the figure ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rankings() -> pd.DataFrame:
    rows = []
    for label, excluded, x, chance in (("site", "nothing", 0.7, 0.3), ("kind", "nothing", 0.6, 0.5),
                                       ("kind", "site", 0.55, 0.45)):  # fmt: skip
        for rep, shift in (("X", 0.0), ("embedding", -0.05), ("X - embedding", None)):
            value = 0.05 if shift is None else x + shift
            rows.append({
                "label": label, "excluded": excluded, "use_rep": rep, "measure": "ap", "estimate": value,
                "ci_low": value - 0.02, "ci_high": value + 0.03, "chance": np.nan if shift is None else chance,
                "n_queries": 364, "n_groups": 346, "status": "ok" if rep == "X" else "few_groups",
            })  # fmt: skip
    rows.append({"label": "site", "excluded": "site", "use_rep": "X", "measure": "ap", "status": "no_queries"})
    return pd.DataFrame(rows)


def test_a_panel_holds_marks_intervals_and_chance(rankings):
    fig = pl.retrieval(rankings)
    assert len(fig.axes) == 4
    site, empty, kind, other = fig.axes
    marks = [line for line in kind.lines if line.get_marker() in ("o", "s")]
    assert [m.get_xdata()[0] for m in marks] == pytest.approx([0.6, 0.55])
    assert marks[0].get_markerfacecolor() != "white" and marks[1].get_markerfacecolor() == "white"
    assert [line.get_xdata() for line in kind.lines if line.get_linestyle() == "--"] == [[0.5, 0.5]]
    assert "n = 364 queries in 346 groups" in site.get_title(loc="left")
    assert "excluded: site" in other.get_title(loc="left").replace("\n", " ")
    assert "no query has anything relevant" in empty.texts[0].get_text().replace("\n", " ")
    assert [t.get_text() for t in site.get_yticklabels()] == ["codes", "embedding"]
    two = pd.concat([rankings.assign(encoder=e, layer="final") for e in ("a", "b")])
    assert len(pl.retrieval(two).axes[0].get_yticks()) == 4
    plain = rankings.query("label == 'kind' and excluded == 'site'").drop(columns="excluded")
    assert pl.retrieval(plain).axes[0].get_title(loc="left").startswith("kind\nn = 364")
    with pytest.raises(InputError, match="did you mean"):
        pl.retrieval(rankings, measure="aps")
    with pytest.raises(InputError, match="'chance'"):
        pl.retrieval(rankings.drop(columns="chance"))
    with pytest.raises(InputError, match="no ranking"):
        pl.retrieval(rankings.assign(estimate=np.nan))


# -- the pipelines that come with the project, on real data ------------------------------------------------------------


@pytest.mark.slow
def test_blood_smears_find_their_laboratory_and_hardly_platelets(shared: Path, tmp_path: Path, monkeypatch):
    """Numbers of embeddings, which hang on no dictionary, as docs/search/retrieval.md has them."""
    steps = {"n_steps": 20}
    folder = real("retrieval", shared, tmp_path, monkeypatch, encoders__0__layers=["final"], sae__options=steps)
    table = read_table(folder / "tables/retrieval.csv").query("measure == 'ap'")
    ap = table.set_index(["label", "excluded", "use_rep"]).sort_index()
    for key, estimate, chance in (
        (("site", "nothing", "embedding"), 0.663, 0.290),
        (("site", "near_dup_group", "embedding_centred"), 0.701, 0.290),
        (("no_platelets", "nothing", "embedding"), 0.598, 0.542),
        (("no_platelets", "site", "embedding_centred"), 0.529, 0.488),
    ):
        assert ap.loc[key, ["estimate", "chance"]].tolist() == pytest.approx([estimate, chance], abs=0.005)
        assert ap.loc[key, "n_queries"] == 364 and ap.loc[key, "n_groups"] == 346
    assert set(ap.loc[("site", "site")]["status"]) == {"no_queries"}


@pytest.mark.slow
def test_two_hospitals_are_compared_over_patients(shared: Path, tmp_path: Path, monkeypatch):
    """One record a patient and hospitals of 14 each: the permutation test is Fisher's exact test."""
    from scipy.stats import fisher_exact

    folder = real("cohort_diff", shared, tmp_path, monkeypatch, sae__options={"n_steps": 200})
    table = read_table(folder / "tables/diff.csv")
    assert set(table["n_a"]) == set(table["n_b"]) == {14} and len(table) == 128
    for row in table[table["p"].notna()].head(40).itertuples():
        a, b = round(14 * row.frequency_a), round(14 * row.frequency_b)
        p = fisher_exact([[a, 14 - a], [b, 14 - b]])[1]
        assert row.p == pytest.approx(p, abs=5 * np.sqrt(p / 99_999) + 2e-5)
    assert "7 samples are of neither" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_atlas_of_tissue_has_maps_in_spots_and_over_sections(shared: Path, tmp_path: Path, monkeypatch):
    changed = {"sae__n_latents": 64, "sae__options": {"n_steps": 60}, "atlas__n_cards": 2, "atlas__max_mb": 6.0}
    folder = real("latent_atlas", shared, tmp_path, monkeypatch, **changed)
    page = folder / "atlas.html"
    assert page.stat().st_size < 6.5e6 and '<a href="atlas.html">' in (folder / "report.html").read_text()
    text = page.read_text(encoding="utf-8")
    assert '"maps":{' in text and '"slides":{' in text
    assert not re.search(r"her2_[BC]\d_|\b[BC][234]_\d+x\d+", text), "names of spots"
