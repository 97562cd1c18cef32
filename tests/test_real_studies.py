"""The pipelines that come with the project, run on the real tissue and blood smears that lie beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from biosae.pipeline import load_config, run
from biosae.settings import settings

PIPELINES = Path(__file__).parents[1] / "pipelines"


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda p: p.stem)
def test_every_pipeline_file_is_valid(path: Path):
    assert load_config(path).name == path.stem


def study(name: str, shared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **overrides: object) -> Path:
    monkeypatch.setattr(settings, "data_dir", shared / "data")
    monkeypatch.setattr(settings, "weights_dirs", (shared / "weights",))
    config = load_config(PIPELINES / f"{name}.toml", overrides={k.replace("__", "."): v for k, v in overrides.items()})
    del config.encoders[1:]
    return run(config, out=folder, base=PIPELINES, say=lambda text: None)


@pytest.mark.slow
def test_cells_of_breast_tissue_looked_for_in_colon(shared: Path, tmp_path: Path, monkeypatch):
    """What transfers to another organ must not hang on the seed of one dictionary.

    Over seven seeds the best T-cell latent of 512 came to rho -0.16 to 0.57 in colon (mean 0.27; with the training
    loop before it was rewritten -0.01 to 0.62, mean 0.39), the best raw dimension to -0.49 each time. One dictionary
    therefore shows nothing; the median of several must be above what no association gives (0.12 for 73 images and
    three dictionaries).
    """
    rho = []
    for seed in range(3):
        folder = study(
            "pathology_cell_counts", shared, tmp_path, monkeypatch, random_state=seed,
            encoders__0__layers=["final"], sae__n_latents=512, sae__options={"n_steps": 400},
        )  # fmt: skip
        inside = pd.read_csv(folder / "tables/replication.csv")
        assert inside["p_replication"].isna().all(), "two patients cannot carry a p-value"
        assert set(inside["status_replication"]) <= {"too_few_groups", "too_sparse"}
        assert (inside["estimate_discovery"].abs() > 0.1).all()

        elsewhere = pd.read_csv(folder / "tables/transfer.csv").set_index(["target", "source"])
        cells, raw = elsewhere.loc[("prop_t_cells", "latent")], elsewhere.loc[("prop_t_cells", "raw")]
        assert cells["n_units_replication"] == 73, "images, not tiles, are the units of the second cohort"
        assert raw["estimate_replication"] < -0.4 and raw["p_holm"] < 0.05
        rho.append(cells["estimate_replication"])
    assert sorted(rho)[1] > 0.12, rho


@pytest.mark.slow
def test_platelet_latents_do_not_survive_within_laboratories(shared: Path, tmp_path: Path, monkeypatch):
    folder = study(
        "blood_smear_counts", shared, tmp_path, monkeypatch,
        encoders__0__layers=["blocks.4"], sae__n_latents=256, sae__options={"n_steps": 400},
        confounders__n_permutations=99,
    )  # fmt: skip
    strata = pd.read_csv(folder / "tables/within_strata.csv")
    table = strata[strata["stratum"].isin(["pooled", "within"])].pivot_table(
        index=["target", "latent"], columns="stratum", values="estimate"
    )
    red, platelets = table.loc["count_rbc"], table.loc["count_platelet"]
    assert red["pooled"].abs().max() > 0.3 and red["within"].abs().max() > 0.2
    assert platelets["pooled"].abs().max() > platelets["within"].abs().max()
    readout = pd.read_csv(folder / "tables/readout.csv")
    assert (readout["balanced_accuracy"] > 0.7).all(), "the laboratory can be read from every representation"
