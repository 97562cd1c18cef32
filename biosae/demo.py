"""``biosae demo``: the whole way on a phantom of known truth, and once more on one with no effect at all."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from biosae.files import read_table, write_json, write_table
from biosae.pipeline import PipelineConfig, parse_config, run

NO_EFFECT = {"scanner_effect": 0.0, "label_effect": 0.0, "count_effect": 0.0, "label_scanner_correlation": 0.0}


def demo_config(*, null: bool = False, quick: bool = False, random_state: int = 0) -> PipelineConfig:
    """Configuration of the demonstration.

    Parameters
    ----------
    null
        The same cohort with every planted effect set to zero: the reported counts are unrelated to the pixels.
    quick
        A smaller cohort and fewer permutations, for tests and notebooks.
    random_state
        Seed of the cohort, the SAE and the permutations.
    """
    raw = tomllib.loads(resources.files("biosae").joinpath("demo.toml").read_text(encoding="utf-8"))
    raw["random_state"] = random_state
    if quick:
        raw["samples"]["phantom"].update(n_patients=24, n_tiles=10)
        raw["associate"]["n_permutations"] = 199
        raw["replicate"]["n_permutations"] = 199
        raw["confounders"]["n_permutations"] = 199
        raw["sae"]["n_latents"] = 128
    if null:
        raw["name"] = "demo-null"
        raw["title"] = "Phantom histology with every effect set to zero"
        raw["question"] = "How many associations are found where there is none?"
        raw["samples"]["phantom"].update(NO_EFFECT)
    return parse_config(raw, where="demo.toml")


def demo(
    out: str | Path = "runs/demo", *, quick: bool = False, random_state: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the demonstration and compare what was found with what was planted.

    Parameters
    ----------
    out
        Run folder; the null cohort goes to ``<out>/null``.
    quick
        A smaller cohort (see :func:`demo_config`).
    random_state
        Seed.
    say
        Receives a line per stage.

    Returns
    -------
    dict
        ``recovery`` (DataFrame, one row a planted type), ``technical`` (latents flagged technical), ``readout``
        (DataFrame), ``null_discoveries`` (tests with q <= 0.05 in the null cohort), ``null_tests``, ``report`` (Path).
    """

    out = Path(out)
    say("A phantom cohort with planted counts and a planted scanner effect")
    run(demo_config(quick=quick, random_state=random_state), out=out, say=say)
    say("The same cohort with every effect set to zero")
    run(demo_config(null=True, quick=quick, random_state=random_state), out=out / "null", say=say)

    recovery = recovery_table(read_table(out / "tables/summary.csv"))
    flags = read_table(out / "tables/confounders.csv")
    readout = read_table(out / "tables/readout.csv")
    null = read_table(out / "null/associations.csv")
    null_tested = null[null["q"].notna()]
    result = {
        "recovery": recovery,
        "technical": sorted(flags.loc[flags["flag"] == "technical", "latent"].unique()),
        "n_latents_flagged_on": int(flags["latent"].nunique()),
        "readout": readout,
        "null_discoveries": int((null_tested["q"] <= 0.05).sum()),
        "null_tests": len(null_tested),
        "report": out / "report.html",
    }
    write_table(out / "tables/recovery.csv", recovery)
    numbers = ("technical", "n_latents_flagged_on", "null_discoveries", "null_tests")
    write_json(out / "tables/demo.json", {k: result[k] for k in numbers})
    return result


def recovery_table(summary: Any) -> Any:
    """Best latent per planted target beside the best raw dimension and the best principal component.

    Parameters
    ----------
    summary
        Table of :func:`biosae.stats.summary`.

    Returns
    -------
    DataFrame
        Columns ``target, latent, rho, p_maxt, raw, pca`` (the last two are the controls' estimates) and ``n_units``.
    """
    best = summary.set_index(["target", "source"])
    rows = []
    for target in summary["target"].unique():
        latent = best.loc[(target, "latent")]
        rows.append(
            {
                "target": target,
                "latent": latent["latent"],
                "rho": latent["estimate"],
                "p_maxt": latent["p_maxt"],
                "raw": best.loc[(target, "raw"), "estimate"],
                "pca": best.loc[(target, "pca"), "estimate"],
                "n_units": latent["n_units"],
                "n_samples": latent["n_samples"],
            }
        )
    import pandas as pd

    return pd.DataFrame(rows)
