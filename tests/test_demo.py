"""The demonstration finds what was planted, flags the planted scanner, and finds nothing where nothing is."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from biosae.cli import app
from biosae.demo import demo, demo_config
from biosae.files import read_h5ad, read_json
from biosae.pipeline import run


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    said: list[str] = []
    made = demo(tmp_path_factory.mktemp("demo") / "run", quick=True, say=said.append)
    return {**made, "said": said}


def test_planted_counts_are_recovered(result: dict):
    table = result["recovery"].set_index("target")
    planted = {"count_epithelial", "count_lymphocyte", "count_plasma", "count_fibroblast"}
    assert set(table.index) == planted
    assert (table["rho"] > 0.8).all()
    assert (table["p_maxt"] <= 0.005).all()
    assert (table["n_units"] == 240).all()


def test_latents_hold_in_patients_that_did_not_choose_them(result: dict):
    table = pd.read_csv(result["report"].parent / "tables/replication.csv").query("source == 'latent'")
    assert (table["groups_shared"] == 0).all()
    assert (table["estimate_replication"] > 0.8).all() and table["replicated"].all()


def test_planted_scanner_is_flagged_and_read(result: dict):
    assert len(result["technical"]) >= 10
    assert (result["readout"]["balanced_accuracy"] > 0.9).all()
    best = set(result["recovery"]["latent"])
    assert not best & set(result["technical"]), "a latent of a planted count is called technical"


def test_no_effect_gives_no_discovery(result: dict):
    assert result["null_tests"] > 500
    assert result["null_discoveries"] == 0
    null = result["report"].parent / "null/tables"
    assert (pd.read_csv(null / "confounders.csv")["flag"] == "technical").sum() == 0
    readout = pd.read_csv(null / "readout.csv")
    assert ((readout["ci_low"] <= readout["chance"]) & (readout["balanced_accuracy"] < 0.75)).all()


def test_run_folder_is_laid_out_as_written(result: dict):
    folder = result["report"].parent
    for name in ("samples.parquet", "latents.h5ad", "associations.csv", "provenance.json", "log.csv", "study.json"):
        assert (folder / name).is_file(), name
    assert (folder / "embeddings/tiny-histology/final/provenance.json").is_file()
    assert (folder / "sae/tiny-histology__final/model.safetensors").is_file()
    assert list((folder / "figures").glob("*.pdf"))
    assert "patient_0" not in result["report"].read_text(encoding="utf-8")


def test_every_file_column_and_key_of_a_run_is_described(result: dict):
    folder = result["report"].parent
    text = (Path(__file__).parents[1] / "docs/file-formats.md").read_text(encoding="utf-8")
    described = {name for quoted in re.findall(r"`([^`]+)`", text) for name in re.split(r"[ ,]+", quoted)}
    columns = {c for path in [*folder.glob("*.csv"), *folder.glob("tables/*.csv")] for c in pd.read_csv(path)}
    latents = read_h5ad(folder / "latents.h5ad")
    documents = [*folder.glob("*.json"), *folder.glob("sae/*/config.json"), *folder.glob("tables/*.json")]
    keys = {k for path in documents for k in read_json(path)}
    arguments = set(read_json(folder / "tables/associate.json")) - {"targets"}
    missing = (columns | (keys - arguments) | set(latents.var) | set(latents.uns["biosae"])) - described
    assert not missing
    assert {p.name for p in folder.iterdir()} <= {*re.findall(r"[\w.]+(?=[/ |`\n])", text), "null"}


def test_a_second_run_skips_every_stage(result: dict):
    said: list[str] = []
    run(demo_config(quick=True), out=result["report"].parent, say=said.append)
    assert said and all(line.endswith("skipped") for line in said)


def test_a_changed_parameter_runs_only_what_hangs_on_it(result: dict):
    said: list[str] = []
    config = demo_config(quick=True)
    config.confounders.n_permutations = 99
    run(config, out=result["report"].parent, dry_run=True, say=said.append)
    would_run = [line.split("] ")[1].split(":")[0] for line in said if "would run" in line]
    assert would_run == ["confounders/tiny-histology__final", "compare", "report"]


def test_stages_are_commands(result: dict, tmp_path: Path):
    folder = result["report"].parent

    def call(*words: object) -> str:
        done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    embeddings = folder / "embeddings/tiny-histology/final"
    call("train", embeddings, "--out", tmp_path / "sae", "--n-latents", 16, "--k", 4, "--split", "train")
    call("encode", tmp_path / "sae", embeddings, "--out", tmp_path / "latents.h5ad")
    text = call(
        "associate", tmp_path / "latents.h5ad", "count_plasma", "--unit", "patient", "--out", tmp_path / "a.csv"
    )
    table = pd.read_csv(tmp_path / "a.csv")
    assert set(table["source"]) == {"latent", "raw", "pca"} and (table["n_units"] == 24).all()
    assert "count_plasma" in text
    assert Path(call("report", folder, "--out", tmp_path / "r.html").strip()).stat().st_size > 10_000


def test_embed_and_audit_from_the_shell(tmp_path: Path):
    runner = CliRunner()
    made = runner.invoke(app, ["data", "phantom", "--out", str(tmp_path / "p"), "--n-patients", "4", "--n-tiles", "2"])
    assert made.exit_code == 0, made.output
    table = str(tmp_path / "p/samples.csv")
    audit = runner.invoke(app, ["data", "audit", table, "--patient", "patient", "--scanner", "scanner"])
    assert audit.exit_code == 0 and "4 patients" in audit.output
    words = ["embed", table, "tiny-histology", "--patient", "patient", "--out", str(tmp_path / "e")]
    embedded = runner.invoke(app, words)
    assert embedded.exit_code == 0 and "8 x 128" in embedded.output
