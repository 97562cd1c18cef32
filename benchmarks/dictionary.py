"""What is in the error of a dictionary of real embeddings, how its atoms lie, and what other solvers do with it.

    python benchmarks/dictionary.py --data DATA --weights WEIGHTS --cache CACHE --out OUT

The set ``breast`` of ``sae_quality.py`` (patches of H&E tiles of breast tumour, histology encoder, d = 128): ``topk``
dictionaries of several widths, k = 16, of 6,000 rows of four fifths of the tiles, 30 passes. All numbers are of the
other fifth: half of its tiles fit the regressions, half are evaluated. ``across`` does so between the two patients.
OUT gets ``dictionary.json``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sae_quality import divide, load

from biosae.files import write_json
from biosae.sae import SAE, Pursuit, analysis, gradient_pursuit
from biosae.settings import settings

WIDTHS = (64, 128, 256, 512)
K, ROWS = 16, 6_000
SETTINGS = {"k": K, "max_epochs": 30, "validation": 0.0, "device": "cpu", "random_state": 0}


def report(X: np.ndarray, x_hat: Any, groups: np.ndarray, **options: Any) -> dict[str, Any]:
    """Numbers of an error report on one line."""
    found = analysis.error_report(X, x_hat, groups=groups, random_state=0, **options)
    line = {name: getattr(found, name) for name in ("n_fit", "n_evaluated", "fvu", "fvu_nonlinear", "linear_share")}
    line |= {"r2_vec": found.r2_vec, "r2_vec_pooled": found.r2_vec_pooled, "rank": found.vector.rank}
    return (
        line | {f"norm_{k}": v for k, v in found.r2_norm.items()} | {f"by_{k}": v for k, v in found.baselines.items()}
    )


def solvers(sae: SAE, X: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Error reports of the same dictionary under other solvers at the same number of latents, and their times."""
    started = time.process_time()
    codes = sae.codes(X)
    found = {"encoder": {"seconds": time.process_time() - started, "l0": codes.nnz / len(X), **report(X, sae, groups)}}
    for name in ("mp", "gradient", "omp", "lasso"):
        coder = Pursuit(sae, solver=name, k=K).fit(X)
        coder.codes(X[:300])
        started = time.process_time()
        z = coder.codes(X)
        found[name] = {"seconds": time.process_time() - started, "l0": z.nnz / len(X), **report(X, coder, groups)}
    z = gradient_pursuit(X - sae.bias_, sae.decoder_, k=codes.getnnz(1))
    found["gradient, L0 of each row"] = {"l0": z.nnz / len(X), **report(X, sae.inverse_transform(z), groups)}
    return found


def atoms(sae: SAE, X: np.ndarray) -> dict[str, Any]:
    """Coherence and what follows from it, in the Euclidean metric and in that of the centred rows and of the rows."""
    codes = sae.codes(X)
    random = np.random.default_rng(0).normal(size=sae.decoder_.shape)
    metrics = {"euclidean": None, "rows": analysis.second_moment_metric(X)}
    metrics["rows minus bias"] = analysis.second_moment_metric(X - sae.bias_)
    found: dict[str, Any] = {"effective_rank": analysis.effective_rank(codes), "m": len(random)}
    for name, metric in metrics.items():
        about = analysis.coherence(sae.decoder_, metric=metric)
        unique = analysis.uniqueness_share(sae.decoder_, codes, metric=metric)
        delta = analysis.isometry(sae.decoder_, codes, metric=metric)
        selected = analysis.babel_selected(sae.decoder_, codes, metric=metric)
        found[name] = {
            "mu": about.mu, "rms": about.rms, "welch": about.welch, "quantiles": about.quantiles,
            "babel": float(analysis.babel(sae.decoder_, metric=metric)[K - 2]),
            "babel_selected": [float(np.median(selected)), float(selected.max())],
            "isometry": [float(np.median(delta)), float(delta.max())],
            "q": unique.share, "mu_q": unique.mu, "k_q": unique.k,
            "random_mu": analysis.coherence(random, metric=metric).mu,
            "random_rms": analysis.coherence(random, metric=metric).rms,
            "ridge": metric.ridge if metric else 0.0,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "weights", "cache", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    folders = parser.parse_args()
    settings.progress = False
    folders.out.mkdir(parents=True, exist_ok=True)
    X, tiles = load("breast", folders)
    train, held = divide(X, tiles)
    inside = np.sort(np.random.default_rng(1).permutation(train)[:ROWS])
    rows, groups = np.ascontiguousarray(X[held]), tiles[held]
    found: dict[str, Any] = {"rows": {"training": len(inside), "held": len(held), "tiles": len(np.unique(groups))}}
    lines, errors, models = [], [], {}
    for width in WIDTHS:
        print(f"width {width}", flush=True)
        sae = SAE(n_latents=width, **SETTINGS).fit(X[inside])
        models[width] = sae
        lines.append({"width": width, **report(rows, sae, groups)})
        errors.append(np.square(rows - sae.inverse_transform(sae.codes(rows))).sum(1))
    found["widths"] = lines
    for name in ("fvu", "fvu_nonlinear"):
        found[f"law_{name}"] = vars(analysis.width_law(WIDTHS, [line[name] for line in lines]))
    scaling = analysis.row_scaling(WIDTHS, np.stack(errors, axis=1))
    found["row_slopes"] = np.quantile(scaling.slope, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()
    found["rows_that_rise"] = float((scaling.slope < 0).mean())
    found["persistence"] = scaling.persistence.tolist()
    write_json(folders.out / "dictionary.json", found)
    found["atoms"] = {width: atoms(models[width], rows) for width in WIDTHS}
    write_json(folders.out / "dictionary.json", found)
    found["solvers"] = solvers(models[256], rows, groups)
    write_json(folders.out / "dictionary.json", found)
    table = pd.read_csv(folders.data / "her2st_spots" / "manifest.csv").set_index("sample_id")["patient_id"]
    patients = table.loc[tiles].to_numpy()
    found["across"] = {}
    for seen, unseen in (("C", "B"), ("B", "C")):
        part = patients == seen
        chosen = np.sort(np.random.default_rng(1).permutation(np.flatnonzero(part))[:ROWS])
        sae = SAE(n_latents=256, **SETTINGS).fit(X[chosen])
        e = X - sae.inverse_transform(sae.codes(X))
        fit = analysis.linear_fit(X, e, held=~part, intercept=False)
        norm = analysis.linear_fit(X, np.square(e).sum(1), held=~part)
        inside_fvu, outside_fvu = (
            float(np.square(e[p]).sum() / np.square(X[p] - X[p].mean(0)).sum()) for p in (part, ~part)
        )
        left = np.square((e - fit.predict(X))[~part]).sum() / np.square(e[~part]).sum()
        found["across"][f"{seen} to {unseen}"] = {
            "fvu": outside_fvu, "fvu_seen": inside_fvu, "linear_share": float(1 - left), "r2_vec": fit.r2,
            "r2_vec_pooled": fit.r2_pooled, "r2_norm": norm.r2,
        }  # fmt: skip
    write_json(folders.out / "dictionary.json", found)


if __name__ == "__main__":
    main()
