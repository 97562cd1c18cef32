"""Runs and pages for the tests of the atlas: hostile words in every text, and a page of 2,000 latents."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
from synthetic_run import FakeSamples, make_run

from biosae.atlas import page
from biosae.files import read_h5ad, read_json, write_h5ad, write_json
from biosae.interpret.stress import COLUMNS, StressCard

HOSTILE = '"><img src=x onerror=window.pwned=1></script><script>window.pwned=1</script><!--'
"""Leaves an attribute, a script tag and a comment if anything lets it."""


def hostile_run(folder: Path) -> tuple[Path, FakeSamples]:
    """The synthetic run with a hostile title, question, target, contrast, factor, scanner, name and note."""
    make_run(folder)
    adata = read_h5ad(folder / "latents.h5ad")
    adata.var["name"], adata.var["note"] = "", ""
    adata.var.loc["L0007", ["name", "note"]] = [f"scanner {HOSTILE}", HOSTILE]
    adata.obsm["spatial"] = pd.DataFrame({"x": range(adata.n_obs), "y": range(adata.n_obs)}).to_numpy() % 7 * 100.0
    adata.obs["slide"] = [f"{HOSTILE}{i % 3}" for i in range(adata.n_obs)]
    write_h5ad(folder / "latents.h5ad", adata)
    table = pd.read_csv(folder / "associations.csv")
    table["target"] = table["target"].replace("count_b", f"count_b {HOSTILE}")
    table["contrast"] = HOSTILE
    table.to_csv(folder / "associations.csv", index=False)
    flags = pd.read_csv(folder / "tables/confounders.csv")
    flags["factor"] = flags["factor"].replace("site", HOSTILE)
    flags.to_csv(folder / "tables/confounders.csv", index=False)
    study = read_json(folder / "study.json")
    write_json(folder / "study.json", study | {"title": f"Toy {HOSTILE}", "question": f"Why {HOSTILE}?"})
    return folder, FakeSamples(adata.obs, unreadable=(adata.obs_names[3],))


def stress_card() -> StressCard:
    """Two checks: one with a score, one refused."""
    rows = [
        ["L0003", "count_a", "association", "", 0.91, 0.85, 0.96, 0.5, "passed", 20, 240, "ok", "", f"reads {HOSTILE}"],
        ["L0003", "count_a", "layer", HOSTILE, float("nan"), float("nan"), float("nan"), 0.5, "refused", 20, 240,
         "refused", "no layers", ""],
    ]  # fmt: skip
    return StressCard("L0003", "count_a", f"high L0003 goes with {HOSTILE}", pd.DataFrame(rows, columns=COLUMNS), {})


def many(data: dict[str, Any], n: int) -> dict[str, Any]:
    """The page's values repeated to ``n`` latents, and each picture as often, so that the page is as large as one."""
    out = copy.deepcopy(data)
    m, n_items, held = len(data["latents"]["id"]), len(data["pictures"]["src"]), data["associations"]
    times = -(-n // m)
    at = [(i % m, i // m) for i in range(n)]
    out["latents"] = {k: [v[j] for j, _ in at] for k, v in data["latents"].items()}
    out["latents"]["id"] = [f"L{i:04d}" for i in range(n)]
    for key in ("histograms", "confounders", "neighbours"):
        out[key] = [data[key][j] for j, _ in at]
    out["galleries"] = [_moved(data["galleries"][j], n_items * turn) for j, turn in at]
    out["patients"] = data["patients"] * times
    out["pictures"] = data["pictures"] | {"src": data["pictures"]["src"] * times}
    rows = [i for i, latent in enumerate(held["latent"])]
    chosen = [(i, turn) for turn in range(times) for i in rows if held["latent"][i] + m * turn < n]
    for key, value in held.items():
        if key == "latent":
            out["associations"][key] = [value[i] + m * turn for i, turn in chosen]
        elif key == "rank":
            out["associations"][key] = [value[i] * times + turn for i, turn in chosen]
        elif isinstance(value, dict):
            out["associations"][key] = {"words": value["words"], "at": [value["at"][i] for i, _ in chosen]}
        elif isinstance(value, list) and key != "null":
            out["associations"][key] = [value[i] for i, _ in chosen]
    return out


def _moved(gallery: dict[str, Any], by: int) -> dict[str, Any]:
    return {kind: part | {"items": [i + by for i in part["items"]]} for kind, part in gallery.items()}


def write(data: dict[str, Any], target: Path) -> Path:
    target.write_text(page._render({"title": "Many latents", "question": ""}, data), encoding="utf-8", newline="\n")
    return target
