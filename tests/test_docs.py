"""The pages say what is so: their snippets run, and the names in them exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pandas as pd
import pytest

import biosae as bs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the ``tiles.csv`` that the pages speak of, made the current one."""
    bs.data.phantom(n_patients=10, n_tiles=4, out=tmp_path, random_state=0)
    table = pd.read_csv(tmp_path / "samples.csv").drop(columns=["slide", "mpp"])
    names = {"patient": "case_id", "site": "centre", "label": "grade"}
    table = table.rename(columns=names).assign(diagnosis=lambda t: t["grade"])
    table.to_csv(tmp_path / "tiles.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_of_the_readme(tiles: Path) -> None:
    code, then = snippets("README.md")
    small = {
        '"uni"': '"tiny-histology"',
        '"cls"': '"default"',
        "n_latents=4096, k=32": "n_latents=16, k=2",
        "999": "19",
    }
    for word, instead in small.items():
        assert word in code
        code = code.replace(word, instead)
    found: dict = {}
    exec(code, found)
    assert set(found["r"]["source"]) == {"latent", "raw", "pca"}
    assert {"p_maxt", "status", "ci_low"} <= set(found["r"])
    for word, instead in {"L0042": "L0003", "L0107": "L0005", "tile_17": found["adata"].obs_names[17]}.items():
        assert word in then
        then = then.replace(word, instead)
    exec(then, found)
    assert (tiles / "latents.zarr").is_dir()


@pytest.fixture(scope="module")
def demo_latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/demo/latents.h5ad``, smaller than that of ``biosae demo``."""
    folder = tmp_path_factory.mktemp("questions")
    samples = bs.data.phantom(n_patients=24, n_tiles=5, random_state=0)
    emb = bs.encoders.embed(samples, "tiny-histology", out=folder / "emb")
    sae = bs.sae.SAE("topk", n_latents=24, k=4, n_steps=60, random_state=0).fit(emb)
    (folder / "runs/demo").mkdir(parents=True)
    bs.encode(sae, emb).write_h5ad(folder / "runs/demo/latents.h5ad")
    return folder


@pytest.mark.parametrize("page", sorted((ROOT / "docs/questions").glob("*.md")), ids=lambda p: p.stem)
def test_snippets_of_the_questions(page: Path, demo_latents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_latents)
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few patients: what is refused is said
        for code in snippets(str(page.relative_to(ROOT))):
            exec(code.replace("=999", "=19").replace("=199", "=19"), found)
    tables = [value for value in found.values() if isinstance(value, pd.DataFrame)]
    assert tables and all(len(table) for table in tables)


def test_snippets_of_the_data_model(tiles: Path) -> None:
    first, second = snippets("docs/data-model.md")
    found: dict = {}
    exec(first.replace("size=256", "size=96"), found)
    assert bs.Samples.load("runs/study/samples.parquet").roles["site"] == "centre"
    next((tiles / "tiles").glob("*.png")).unlink()
    exec(second, found)
    assert pd.read_csv("runs/study/failures.csv")["reason"].tolist() == ["missing"]


def test_snippet_of_the_phantom() -> None:
    (code,) = snippets("docs/phantom.md")
    found: dict = {}
    exec(code.replace("n_patients=24, n_tiles=20", "n_patients=4, n_tiles=2"), found)
    assert found["samples"][0].shape == (96, 96, 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bbs((?:\.[A-Za-z_]\w*)+)", text)):
        found = bs
        for part in name[1:].split("."):
            found = getattr(found, part)
    for link in set(re.findall(r"\]\(([^)#:]+\.md)", text)):
        assert (page.parent / link).is_file(), link


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["biosae.errors", "biosae.embeddings.filling", "biosae.pl.style"])
def test_examples_in_docstrings(module: str) -> None:
    import doctest
    import importlib

    with warnings.catch_warnings():
        done = doctest.testmod(importlib.import_module(module))
    assert done.attempted > 0 and done.failed == 0
