"""The commands search, diff and export: the ordinary way, and mistakes as one message."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import biosae as bs
from biosae import cli
from biosae.interpret import write_names
from biosae.settings import settings


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 patients of two scanners, 3 tiles each; L0 fires on scanner B alone, L1 on the first tile of every patient."""
    folder = tmp_path_factory.mktemp("see")
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 3)
    codes = rng.gamma(2, 1, (60, 5)) * (rng.random((60, 5)) < 0.5)
    codes[:, 0] = np.where(patient % 2 == 1, 2.0 + rng.random(60), 0)
    codes[:, 1] = np.where(np.arange(60) % 3 == 0, 1.0, 0)
    obs = pd.DataFrame(
        {
            "patient": [f"Patient-{p:02d}" for p in patient],
            "scanner": np.where(patient % 2, "B", "A"),
            "year": 2019 + patient % 2,
        },
        index=pd.Index([f"tile-{i:02d}" for i in range(60)], name="sample_id"),
    )
    adata = anndata.AnnData(
        sp.csr_matrix(codes, dtype=np.float32), obs=obs, var=pd.DataFrame(index=[f"L{j}" for j in range(5)])
    )
    adata.varm["decoder"] = rng.normal(size=(5, 4)).astype(np.float32)
    adata.obsm["embedding"] = rng.normal(size=(60, 4)).astype(np.float32)
    adata.uns["biosae"] = {"identity": {"encoder": "uni", "licence": "CC-BY-NC-ND-4.0"}}
    adata.write_h5ad(folder / "latents.h5ad")
    adata.var["name"] = ["ink stain", "", "", "", ""]
    write_names(adata, folder / "names.json")
    return folder


def run(*arguments: object) -> int:
    """Exit status of ``biosae <arguments>`` in this process, with settings put back afterwards."""
    before, argv = asdict(settings), sys.argv
    sys.argv = ["biosae", "--quiet", "--offline", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
        for name, value in before.items():
            setattr(settings, name, value)
    return 0


def test_search_in_four_ways(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    latents, out = study / "latents.h5ad", tmp_path / "found.csv"
    obs = anndata.read_h5ad(latents).obs
    assert run("search", latents, "--item", "tile-00", "--exclude", "patient", "-n", 4, "--out", out) == 0
    found = pd.read_csv(out)
    assert len(found) == 4 and "Patient-00" not in set(obs.loc[found["sample_id"], "patient"])
    by_name = ("search", latents, "--property", "high 'ink stain', no L1", "--names", study / "names.json")
    assert run(*by_name, "--exclude", "year=2019", "--out", out) == 0
    assert set(obs.loc[pd.read_csv(out)["sample_id"], "scanner"]) == {"B"}
    assert run("search", latents, "--weight", "L0=1", "--weight", "L1=-0.5", "-n", 3, "--out", out) == 0
    assert pd.read_csv(out)["L0"].min() > 2 and "sample_id" in capsys.readouterr().out
    assert run("search", latents, "--item", "tile-00", "--use-rep", "embedding", "--metric", "euclidean") == 0


def test_diff_finds_the_planted_latent(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "diff.csv"
    call = ("diff", study / "latents.h5ad", "scanner", "--names", study / "names.json", "--out", out)
    assert run(*call, "--cohort", "B", "--cohort", "A") == 0
    first = pd.read_csv(out).iloc[0]
    assert first["latent"] == "L0" and first["name"] == "ink stain" and first["difference"] == 1 and first["q"] < 0.01
    assert "1 of 4 latents tested have q <= 0.05" in capsys.readouterr().out
    assert run("diff", study / "latents.h5ad", "year", "--cohort", 2019, "--cohort", 2020, "--out", out) == 0


def test_a_hostile_name_is_no_formula_in_a_spreadsheet(study: Path, tmp_path: Path) -> None:
    """Names come from strangers, and people open tables in programs that act on a leading sign."""
    hostile = ['=HYPERLINK("http://x")', "+cmd|' /C calc'!A0", "-1+1", "@SUM(1)", "-3"]
    adata = anndata.read_h5ad(study / "latents.h5ad")
    adata.var["name"] = hostile
    write_names(adata, tmp_path / "names.json")
    out, whole = tmp_path / "diff.csv", tmp_path / "diff.parquet"
    for file in (out, whole):
        given = ("diff", study / "latents.h5ad", "scanner", "--out", file, "--n-permutations", 19)
        assert run(*given, "--names", tmp_path / "names.json") == 0
    names = dict(zip(pd.read_csv(out, dtype=str)["latent"], pd.read_csv(out, dtype=str)["name"]))
    assert [names[f"L{i}"] for i in range(5)] == [*("'" + name for name in hostile[:4]), "-3"]
    assert set(pd.read_parquet(whole)["name"]) == set(hostile)
    assert pd.read_csv(out)["difference"].lt(0).any()  # a negative number stays a number


def test_export_writes_file_key_and_terms(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, key = tmp_path / "codes.parquet", tmp_path / "key.csv"
    given = ("export", study / "latents.h5ad", "--out", out, "--column", "year", "--key", key)
    assert run(*given, "--names", study / "names.json") == 0
    table, back = pd.read_parquet(out), pd.read_csv(key)
    assert b"Patient-0" not in out.read_bytes() and table["year"].nunique() == 2
    row = back.loc[back["pseudonym"] == table.index[7], "id"].item()
    given = anndata.read_h5ad(study / "latents.h5ad")[row]
    assert table["L0"].iloc[7] == given.X[0, 0] and table["year"].iloc[7] == given.obs["year"].item()
    assert "do not publish or pass on" in capsys.readouterr().out
    assert run("export", study / "latents.h5ad", "--out", out, "--show-ids") == 0
    assert "Patient-03" in set(pd.read_parquet(out)["patient"])


def test_an_sae_folder_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sae = bs.sae.SAE("topk", n_latents=8, k=2, n_steps=2, random_state=0, device="cpu").fit(np.eye(8, dtype=np.float32))
    sae.save(tmp_path / "sae")
    model = tmp_path / "model"
    assert run("export", tmp_path / "sae", "--out", model, "--licence", "MIT", "--option", "data=eight unit rows") == 0
    assert json.loads((model / "config.json").read_text())["licence"] == "MIT"
    assert "eight unit rows" in (model / "README.md").read_text() and "MIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "LATENTS"], "one of --item"),
        (["search", "LATENTS", "--item", "tile-00", "--property", "high L0"], "one of --item"),
        (["search", "LATENTS", "--text", "snow"], "--tower"),
        (["search", "LATENTS", "--property", "high L9"], "no latent is called 'L9'"),
        (["search", "LATENTS", "--property", "high L0", "--exclude", "patient"], "column=value"),
        (["search", "LATENTS", "--weight", "L0"], "latent=number"),
        (["search", "missing.h5ad", "--item", "a"], "does not exist"),
        (["diff", "LATENTS", "scaner", "--out", "x.csv"], "did you mean 'scanner'"),
        (["diff", "LATENTS", "scanner", "--cohort", "A", "--out", "x.csv"], "give it twice"),
        (["atlas", "FOLDER"], "latents.h5ad"),
        (["atlas", "FOLDER", "--spatial", "x"], "x and then y"),
        (["export", "LATENTS", "--out", "x.txt"], "no suffix"),
        (["export", "LATENTS", "--out", "x.npz", "--licence", "MIT"], "leave licence out"),
        (["export", "LATENTS", "--out", "x.npz", "--option", "metric"], "key=value"),
        (["export", "FOLDER", "--out", "m", "--column", "age"], "are for latents"),
        (["export", "FOLDER", "--out", "m"], "config.json"),
        (["export", "FOLDER", "--out", "m", "--option", "tile=x"], "a model takes title"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"LATENTS": study / "latents.h5ad", "FOLDER": tmp_path}
    capsys.readouterr()
    assert run(*(places.get(a, a) for a in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("biosae: ") and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
