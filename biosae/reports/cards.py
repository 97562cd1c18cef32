"""Cards of single latents: what it fires on, beside controls, its effects, and what it may be confounded with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from biosae import pl
from biosae.interpret.examples import activation, examples
from biosae.pl import results, style
from biosae.pl.gallery import firing_sentence, headings, noun, read_picture
from biosae.reports.run import Run
from biosae.reports.tables import Figures, Table, table, thumbnail, without_constants
from biosae.reports.verdicts import best_rows

N_TILES = 8
KINDS = ("top", "active", "inactive")


def chosen_latents(run: Run, *, max_latents: int) -> list[str]:
    """Latents that get a card: the best of each target, the two most technical, then by rank of what passes q 0.05."""
    best = best_rows(run)
    names = list(best.loc[best["source"] == "latent", "latent"])
    flags = run.tables.get("confounders")
    if flags is not None and {"flag", "eta2_technical"} <= set(flags):
        names += list(flags[flags["flag"] == "technical"].nlargest(2, "eta2_technical")["latent"])
    latents = results.ranked(run.associations[run.associations["source"] == "latent"])
    names += list(latents.loc[latents["q"] <= 0.05, "latent"])
    known = [n for n in dict.fromkeys(map(str, names)) if n in run.adata.var_names]
    return known[:max_latents]


def cards(run: Run, figures: Figures, latents: list[str]) -> list[dict[str, Any]]:
    """One card a latent; the gallery is also filed as a figure where images can be read."""
    return [_card(run, figures, latent) for latent in latents]


def _card(run: Run, figures: Figures, latent: str) -> dict[str, Any]:
    chosen = examples(run.adata, latent, n=N_TILES, kinds=KINDS, cap_per_patient=2)
    if run.samples is not None:
        size = (6.9, 0.4 + 1.5 * len(headings(chosen, KINDS)))
        figures.file_only(f"gallery_{latent}", pl.gallery, run.adata, latent, samples=run.samples, n=6, size=size)
    return {
        "latent": latent,
        "firing": firing_sentence(run.adata, latent),
        "blocks": _blocks(run, chosen) if run.samples is not None else [],
        "effects": _effects(run, latent),
        "flags": _flags(run, latent),
        "patients": _patients(run, latent, chosen),
    }


def _blocks(run: Run, chosen: pd.DataFrame) -> list[dict[str, Any]]:
    blocks = []
    for kind, heading in headings(chosen, KINDS).items():
        tiles = []
        for tile in chosen[chosen["kind"] == kind].itertuples():
            image = read_picture(run.samples, tile.sample_id)
            who = run.pseudonym(tile.patient) if tile.patient is not None else ""
            tiles.append(
                {
                    "src": None if isinstance(image, str) else thumbnail(image),
                    "reason": image if isinstance(image, str) else "",
                    "value": style.number(tile.activation),
                    "who": who,
                    "sample": tile.sample_id if run.show_ids else "",
                    "alt": f"{noun(run.samples).capitalize()} with activation {style.number(tile.activation)}"
                    + (f", patient {who}" if who else ""),
                }
            )
        blocks.append({"heading": heading, "tiles": tiles})
    return blocks


def _effects(run: Run, latent: str) -> Table:
    rows = run.associations[(run.associations["latent"] == latent) & (run.associations["source"] == "latent")]
    columns = {
        "target": "target", "effect": "effect", "estimate": "estimate", "ci": "95 % CI", "p": "p", "q": "q",
        "p_maxt": "p (max-T)", "n_units": "units", "n_samples": "samples", "status": "status",
    }  # fmt: skip
    order = rows.assign(_p=rows["p"].fillna(2.0)).sort_values("_p", kind="stable").drop(columns="_p").head(8)
    more = f" The strongest 8 of {len(rows)} targets." if len(rows) > 8 else ""
    order, same = without_constants(order)
    return table(order, columns, caption=f"Effects.{more}{same}")


def _flags(run: Run, latent: str) -> list[dict[str, str]]:
    flags = run.tables.get("confounders")
    if flags is None or "flag" not in flags:
        return []
    found = []
    for row in flags[flags["latent"] == latent].to_dict("records"):
        text = f"{row.get('factor', 'technical factor')}: {str(row['flag']).replace('_', ' ')}"
        if pd.notna(row.get("eta2_biology")) and pd.notna(row.get("eta2_technical")):
            text += f" (η² {style.number(row['eta2_technical'])}, biology {style.number(row['eta2_biology'])})"
        found.append({"text": text, "kind": str(row["flag"])})
    return found


def _patients(run: Run, latent: str, chosen: pd.DataFrame) -> str:
    """How widely the latent is spread over patients; no one is named."""
    if "patient" not in run.adata.obs:
        return "Patients are not known, so one patient may carry this latent."
    values = activation(run.adata, latent).abs().groupby(run.adata.obs["patient"].astype(str).to_numpy()).sum()
    total = values.sum()
    top = chosen[chosen["kind"] == "top"]
    people = style.count(top["patient"].nunique(), "patient")
    text = f"The {len(top)} top {noun(run.samples)}s come from {people} (at most 2 a patient). "
    share = float(values.max() / total) if total > 0 else np.nan
    return text + (f"One patient carries at most {share:.0%} of all activation." if total > 0 else "")
