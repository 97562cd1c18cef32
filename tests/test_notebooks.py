"""Every notebook runs from top to bottom, in a folder of its own, and shows what it says it shows."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def executed(name: str, folder: Path) -> str:
    """Everything that the notebook's cells print, below each other."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return "\n".join(
        "".join(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


@pytest.fixture
def on_data(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIOSAE_DATA_DIR", str(shared / "data"))
    monkeypatch.setenv("BIOSAE_WEIGHTS_DIRS", str(shared / "weights"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")


def test_every_notebook_has_a_test():
    tested = set(re.findall(r'executed\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in FOLDER.glob("*.ipynb")}


def test_a_notebook_shows_every_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MPLBACKEND")
    draw = "import biosae as bs\nax = bs.pl.traces([[0.0, 1.0, 0.5]], rate=1.0, unit='mV', channels=['I'])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(draw) for _ in range(2)])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert ["image/png" in output["data"] for cell in notebook.cells for output in cell["outputs"]] == [True, True]


def test_pathology(tmp_path: Path):
    text = executed("pathology_cell_counts", tmp_path)
    assert "288 tiles x" in text
    assert "0 of" in text.splitlines()[-1], "shuffled counts gave discoveries"


def test_wearable(on_data: None, tmp_path: Path):
    text = executed("wearable_session", tmp_path)
    assert "2 channels, 4 Hz, native" in text


def test_eeg(on_data: None, tmp_path: Path):
    text = executed("eeg_alpha_and_imagery", tmp_path)
    ratios = [float(v) for v in re.findall(r"O[12z]\.alpha_log_power\s+([\d.]+)", text)]
    assert len(ratios) == 3 and min(ratios) > 1.5, "alpha power grows when eyes close"
    assert "few_groups" in text, "seven subjects are few"


def test_ecg(on_data: None, tmp_path: Path):
    text = executed("ecg_rhythm", tmp_path)
    assert "too_few_groups" in text, "four patients carry no p-value"


def test_ecology(on_data: None, tmp_path: Path):
    text = executed("ecology_leaf_disease", tmp_path)
    assert "inseparable: disease by collector" in text


@pytest.mark.slow
def test_radiology(on_data: None, tmp_path: Path):
    text = executed("radiology_chest_findings", tmp_path)
    assert "label_covid" in text


@pytest.mark.slow
def test_blood(on_data: None, tmp_path: Path):
    text = executed("blood_cell_parts", tmp_path)
    assert "nucleus_area_frac" in text


@pytest.mark.slow
def test_interpretation(on_data: None, tmp_path: Path):
    text = executed("interpretation", tmp_path)
    assert "refused: " in text, "names of another dictionary"
    assert len(re.findall(r"^ +oracle +coin$", text, flags=re.M)) == 1
    marked = re.search(r"^fuzzing +([\d.]+) +([\d.]+)$", text, flags=re.M)
    assert float(marked[1]) == 1 and abs(float(marked[2]) - 0.5) < 0.15
    near = re.search(r"^near +(\d+) +(\d+)$", text, flags=re.M)
    top = re.search(r"^top +(\d+) +(\d+)$", text, flags=re.M)
    assert int(top[1]) > int(near[1]), "nuclei in several parts: the top and not the near misses"


@pytest.mark.slow
def test_retrieval_and_clusters(on_data: None, tmp_path: Path):
    text = executed("retrieval_and_clusters", tmp_path)
    own, random = map(float, re.search(r"([\d.]+) of the five nearest.*; of a random order ([\d.]+)", text).groups())
    assert own > 5 * random, "tiles of one field find each other"
    assert "its licence applies here too" in text
    assert "circular" in text, "a cluster's own latents carry no p"
