"""The report: self-contained, without identifiers, and in agreement with the tables."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from synthetic_run import N_PATIENTS, PATIENTS, FakeSamples, make_associations, make_latents, make_run

from biosae.errors import FormatError, InputError
from biosae.files import read_h5ad, write_h5ad
from biosae.reports import report
from biosae.reports import run as runs
from biosae.reports.methods import methods
from biosae.reports.tables import cell, table
from biosae.reports.verdicts import question_verdicts, strata_verdicts

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close, and collects text, images and what would be loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs.get("href", ""))
        if tag in ("script", "link", "iframe", "object"):
            self.loads.append(tag)
        self.loads += [v for k, v in attrs.items() if k in ("src", "srcset", "data") and not v.startswith("data:")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def adata():
    return make_latents()


@pytest.fixture(scope="module")
def made(tmp_path_factory, adata):
    folder = make_run(tmp_path_factory.mktemp("run") / "toy")
    unreadable = (adata.obs_names[int(np.argmax(adata[:, "L0003"].X.toarray()))],)
    path = report(folder, samples=FakeSamples(adata.obs, unreadable=unreadable), max_latents=2)
    return folder, path, Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("run") / "bare", optional=False)
    return Page(report(folder, max_latents=1).read_text(encoding="utf-8"))


def test_page_is_closed_html_that_loads_nothing(made) -> None:
    _, path, page = made
    assert page.open == []
    assert page.loads == []
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert path.stat().st_size < 6e6


def test_contents_point_to_sections_that_exist(made) -> None:
    _, _, page = made
    assert len(page.links) >= 12
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


def test_every_image_has_alt_text_and_can_be_decoded(made) -> None:
    _, _, page = made
    assert len(page.images) > 20
    for image in page.images:
        assert len(image["alt"]) > 10
        kind, content = image["src"].split(";base64,")
        raw = base64.b64decode(content)
        if kind == "data:image/jpeg":
            assert max(Image.open(io.BytesIO(raw)).size) <= 128
        else:
            assert kind == "data:image/svg+xml" and raw.lstrip().startswith(b"<?xml")


def test_no_identifier_is_in_the_page_or_in_file_names(made) -> None:
    folder, path, page = made
    whole = path.read_text()
    decoded = "".join(
        base64.b64decode(i["src"].split(",")[1]).decode(errors="ignore") for i in page.images if "svg" in i["src"][:20]
    )
    for secret in [*PATIENTS, "Ramirez", "_tile", "/home", "anna"]:
        assert secret not in whole
        assert secret not in decoded
        assert not any(secret in p.name for p in (folder / "figures").iterdir())
    assert re.search(r"\bP\d\d\b", page.text)


@pytest.fixture
def unfiled(monkeypatch):
    """Figures are drawn but not filed, where a test is not about the files."""
    monkeypatch.setattr("biosae.pl.style.save", lambda *args, **kwargs: [])


def test_identifiers_appear_only_when_asked_for(tmp_path, adata, unfiled) -> None:
    folder = make_run(tmp_path / "named", optional=False)
    text = report(folder, samples=FakeSamples(adata.obs), max_latents=1, show_ids=True).read_text()
    assert "Ramirez-" in text and "_tile" in text


def test_slides_as_strata_get_pseudonyms(tmp_path) -> None:
    folder = make_run(tmp_path / "slides")
    path = folder / "tables" / "within_strata.csv"
    rows = pd.read_csv(path)
    rows.loc[rows["stratum"] == "AT2", "stratum"] = "Ramirez-000-S0"
    rows.to_csv(path, index=False)
    loaded = runs.load(folder)
    assert "Ramirez" not in loaded.masked(loaded.tables["within_strata"]).to_csv()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/home/anna/work/tiles.csv", "tiles.csv"),
        (r"C:\Users\anna\tiles.csv", "tiles.csv"),
        ("read from /home/anna/tiles.csv twice", "read from tiles.csv twice"),
        ("~/private/x", "x"),
        ("owkin/phikon and/or 3/n", "owkin/phikon and/or 3/n"),
        ("hf-hub:owkin/phikon", "hf-hub:owkin/phikon"),
    ],
)
def test_paths_are_cut_to_their_last_part(made, text, wanted) -> None:
    assert runs.load(made[0]).redact(text) == wanted


def test_patients_in_free_text_are_replaced(made) -> None:
    said = runs.load(made[0]).redact("as in Ramirez-003, not Ramirez-0031")
    assert "Ramirez-003," not in said and re.match(r"as in P\d\d, not Ramirez-0031$", said)


def test_printed_n_agrees_with_the_tables(made, adata) -> None:
    _, _, page = made
    text = page.text
    associations = make_associations(adata)
    latents = associations[associations["source"] == "latent"]
    assert f"samples {adata.n_obs}" in text and f"patients {N_PATIENTS}" in text and "slides 40" in text
    assert f"{latents['p'].notna().sum()} tests of latents in 20 patients (240 samples)" in text
    assert f"{associations['p'].isna().sum()} of the tests asked for carry no p-value" in text
    active = adata[:, "L0003"].X.nnz
    assert f"Active in {active} of 240 samples" in text
    assert "3 samples were left out" in text and "3 samples could not be read" in text
    assert "Parameters of the study" in text


def test_cells_of_the_best_table_agree_with_the_associations(made, adata) -> None:
    row = make_associations(adata).query("source == 'latent' and target == 'count_a' and latent == 'L0003'").iloc[0]
    for column in ("estimate", "p", "q"):
        assert cell(column, row[column]) in made[2].text


def test_stage_table_keeps_the_last_run_of_a_stage(made) -> None:
    assert "184.10" in made[2].text and "200.00" not in made[2].text


def test_unreadable_tile_is_a_placeholder_with_its_reason(made) -> None:
    assert "truncated" in made[2].text
    assert 'aria-label="not readable: truncated"' in made[1].read_text()


def test_figures_are_filed_as_pdf_and_png(made) -> None:
    names = {p.name for p in (made[0] / "figures").iterdir()}
    drawn = ("qq", "replication_spearman_rho", "factor_map")
    for stem in (*drawn, "volcano_count_a", "density", "comparison", "gallery_L0003", "scanner_L0003"):
        assert {f"{stem}.pdf", f"{stem}.png"} <= names


def test_adjusted_volcano_says_what_its_arrows_mean(made, bare) -> None:
    assert "Arrows lead from the unadjusted effect" in made[2].text
    assert "Arrows lead" not in bare.text


def test_optional_tables_may_be_missing(bare) -> None:
    assert bare.open == []
    assert "replication" not in bare.ids and "comparison" not in bare.ids
    assert "no table of confounders" in bare.text
    assert "No replication was run" in bare.text
    assert "no image is shown" in bare.text
    assert "nan" not in bare.text.lower().split()


def test_licence_that_restricts_derivatives_is_said(bare) -> None:
    assert "It restricts derivatives" in bare.text


def test_missing_run_files_are_named(tmp_path) -> None:
    with pytest.raises(FormatError, match=r"latents\.h5ad"):
        report(tmp_path)
    folder = make_run(tmp_path / "half", optional=False)
    (folder / "associations.csv").unlink()
    with pytest.raises(FormatError, match="associate"):
        report(folder)
    with pytest.raises(InputError):
        report(folder, max_latents=-1)


def test_nothing_tested_gives_a_page_that_says_so(tmp_path, unfiled) -> None:
    folder = make_run(tmp_path / "none", optional=False)
    rows = pd.read_csv(folder / "associations.csv").assign(p=np.nan, q=np.nan, status="one_class")
    rows.to_csv(folder / "associations.csv", index=False)
    page = Page(report(folder).read_text())
    assert "no latent could be tested (one class 64)" in page.text  # raw dimensions and components not among them
    assert "No latent to show" in page.text


# -- verdicts and methods ----------------------------------------------------------------------------------------------


def test_page_of_unknown_patients_speaks_of_none(tmp_path, unfiled) -> None:
    folder = make_run(tmp_path / "run", optional=False)
    adata = read_h5ad(folder / "latents.h5ad")
    del adata.obs["patient"]
    write_h5ad(folder / "latents.h5ad", adata)
    text = report(folder).read_text(encoding="utf-8")
    assert "Patients are not known" in text and "tiles a patient" not in text and "pseudonym of the patient" not in text


def test_verdict_compares_with_the_better_control(made) -> None:
    run = runs.load(made[0])
    rows = pd.DataFrame(
        {
            "latent": ["L0001", "raw_1", "pc_1"], "source": ["latent", "raw", "pca"], "target": "t",
            "effect": "pearson_r", "estimate": [-0.6, 0.3, 0.5], "ci_low": [-0.7, 0.1, 0.3],
            "ci_high": [-0.52, 0.5, 0.7], "p": 0.001, "q": 0.01, "status": "ok", "unit": "patient",
            "n_units": 12, "n_samples": 40,
        }
    )  # fmt: skip
    run.tables.pop("summary", None)

    def said(**changed) -> str:
        run.associations = rows.assign(**changed)
        return question_verdicts(run)[0]["text"]

    assert "stronger by 0.10, and its interval excludes the control" in said()
    assert "n = 12 patients (40 samples)" in said()
    assert "but its interval covers the control" in said(ci_high=[-0.45, 0.5, 0.7])
    assert "with no interval to judge by" in said(ci_low=[np.nan] * 3, ci_high=[np.nan] * 3)
    assert "but its interval covers the control" in said(estimate=[-0.6, 0.1, 0.1], ci_high=[0.1, 0.5, 0.7])
    assert "no stronger than" in said(estimate=[-0.4, 0.3, 0.5])
    assert said(q=0.2).startswith("no latent reaches q ≤ 0.05")


@pytest.mark.parametrize(
    ("within", "verdict"),
    [
        ((0.4, 0.2, 0.6), "survives within strata"),
        ((0.1, -0.1, 0.3), "does not survive within strata"),
        ((-0.1, -0.3, 0.1), "does not survive within strata"),
        ((-0.4, -0.6, -0.2), "reverses within strata"),
        ((np.nan, np.nan, np.nan), "cannot be judged"),
        ((0.4, np.nan, np.nan), "cannot be judged"),
    ],
)
def test_what_survives_within_strata(made, within, verdict) -> None:
    run = runs.load(made[0])
    run.tables["within_strata"] = pd.DataFrame(
        {
            "target": "t", "latent": "L0001", "stratum": ["pooled", "within"], "estimate": [0.5, within[0]],
            "ci_low": [0.4, within[1]], "ci_high": [0.6, within[2]], "effect": "pearson_r", "n_units": 20,
        }
    )  # fmt: skip
    assert [v["verdict"] for v in strata_verdicts(run)] == [verdict]
    refused = run.tables["within_strata"].assign(status=["ok", "unidentifiable"])
    run.tables["within_strata"] = refused
    assert [v["verdict"] for v in strata_verdicts(run)] == ["cannot be judged"]


def test_methods_say_what_was_run_and_only_that(made) -> None:
    text = " ".join(methods(runs.load(made[0])))
    for fact in (
        "240 samples",
        "20 patients",
        "phikon",
        "blocks.11",
        "topk",
        "64 latents",
        "k = 8",
        "Spearman",
        "0.171",
        "age (natural cubic spline) and sex",
        "trained on 12 of the 20 patients",
    ):
        assert fact in text
    assert "permutation" in text  # p_maxt is in the table
    run = runs.load(made[0])
    run.associations = run.associations[run.associations["source"] == "latent"].drop(columns="p_maxt")
    text = " ".join(methods(run))
    assert "permutation" not in text and "principal components" not in text


@pytest.mark.parametrize(
    ("sae", "said"),
    [
        ({"class": "Baseline", "method": "pca"}, "A decomposition (pca, 64 latents) was fitted to these embeddings"),
        ({"class": "ITDA", "k": 4}, "A dictionary of embeddings (ITDA, 64 latents, k = 4) was fitted to"),
        ({"class": "SAE", "architecture": "gba"}, "A sparse autoencoder (gba, 64 latents) was trained on"),
    ],
)
def test_methods_call_no_decomposition_an_autoencoder(made, sae, said) -> None:
    run = runs.load(made[0])
    run.adata.uns["biosae"] = {**run.adata.uns["biosae"], "sae": sae}
    text = " ".join(methods(run))
    assert said in text
    assert ("autoencoder" in text) == (sae["class"] == "SAE")


def test_table_keeps_every_row_and_prints_gaps_as_dashes() -> None:
    printed = table(
        pd.DataFrame({"latent": ["a", "b"], "p": [0.01, np.nan], "n_units": [1200, 3], "empty": [None, None]})
    )
    assert printed.headings == ["feature", "p", "units"]
    assert printed.rows == [["a", "0.01", "1,200"], ["b", "–", "3"]]
    assert printed.numeric == [False, True, True]
