"""A small run folder with planted truth, for the tests of figures and reports.

L0003 follows ``count_a`` (biology), L0007 follows the scanner, L0010 to L0014 are dead, L0015 fires in few samples.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import norm, spearmanr

from biosae.data.items import ReadError
from biosae.files import write_json

N_PATIENTS, N_TILES, N_LATENTS, WIDTH = 20, 12, 64, 16
VIEWS = [("phikon", "blocks.5"), ("phikon", "blocks.11"), ("mobilenet", "final")]
PATIENTS = [f"Ramirez-{i:03d}" for i in range(N_PATIENTS)]


class FakeSamples:
    """Tiles drawn from the counts; one sample cannot be read."""

    noun = "tile"

    def __init__(self, obs: pd.DataFrame, *, unreadable: tuple[str, ...] = ()):
        self.obs, self.unreadable = obs, unreadable

    def __getitem__(self, i: int | str) -> np.ndarray:
        name = i if isinstance(i, str) else self.obs.index[i]
        if name in self.unreadable:
            raise ReadError("truncated", f"/data/{name}.png")
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        tint = np.array([205, 150, 190]) if self.obs.loc[name, "scanner"] == "AT2" else np.array([190, 165, 215])
        image = np.broadcast_to(tint, (96, 96, 3)).astype(float) + rng.normal(0, 6, (96, 96, 1))
        yy, xx = np.mgrid[:96, :96]
        for _ in range(int(self.obs.loc[name, "count_a"])):
            y, x = rng.integers(4, 92, 2)
            image[(yy - y) ** 2 + (xx - x) ** 2 < rng.integers(9, 30)] = (80, 50, 120)
        return np.clip(image, 0, 255).astype(np.uint8)


def make_latents(*, random_state: int = 0) -> anndata.AnnData:
    rng = np.random.default_rng(random_state)
    n = N_PATIENTS * N_TILES
    patient = np.repeat(np.arange(N_PATIENTS), N_TILES)
    scanner = np.where(patient % 2, "GT450", "AT2")
    level = rng.gamma(4, 2, N_PATIENTS)
    count_a = rng.poisson(level[patient])
    count_b = rng.poisson(5, n)
    codes = rng.gamma(2, 0.5, (n, N_LATENTS)) * (rng.random((n, N_LATENTS)) < rng.uniform(0.03, 0.4, N_LATENTS))
    codes[:, 3] = np.maximum(0, 0.3 * count_a - 0.8 + rng.normal(0, 0.4, n))
    codes[:, 7] = np.where(scanner == "GT450", rng.gamma(6, 0.3, n), rng.gamma(1, 0.1, n) * (rng.random(n) < 0.5))
    codes[:, 10:15] = 0
    codes[:, 15] = 0
    codes[:4, 15] = 1.0
    obs = pd.DataFrame(
        {
            "patient": pd.Categorical([PATIENTS[p] for p in patient]),
            "slide": [f"{PATIENTS[p]}-S{i % 2}" for i, p in enumerate(patient)],
            "site": np.where(patient < 8, "north", "south"),
            "scanner": scanner,
            "label": np.where(level[patient] > np.median(level), "dense", "sparse"),
            "count_a": count_a,
            "count_b": count_b,
        },
        index=pd.Index([f"{PATIENTS[p]}_tile{i:04d}" for i, p in enumerate(patient)], name="sample_id"),
    )
    active = codes > 0
    var = pd.DataFrame(
        {
            "density": active.mean(axis=0),
            "n_active": active.sum(axis=0),
            "n_active_patients": [len(set(patient[active[:, j]])) for j in range(N_LATENTS)],
            "mean_active": codes.sum(axis=0) / np.maximum(active.sum(axis=0), 1),
            "max": codes.max(axis=0),
        },
        index=[f"L{j:04d}" for j in range(N_LATENTS)],
    )
    mixing = rng.normal(size=(N_LATENTS, WIDTH)).astype(np.float32)
    adata = anndata.AnnData(csr_matrix(codes.astype(np.float32)), obs=obs, var=var)
    adata.obsm["embedding"] = (codes @ mixing + rng.normal(0, 0.1, (n, WIDTH))).astype(np.float32)
    adata.varm["decoder"] = mixing
    adata.uns["biosae"] = {
        "identity": {
            "encoder": "phikon", "layer": "blocks.11", "pool": "cls", "dim": WIDTH, "mpp": 0.5,
            "licence": "Owkin non-commercial", "derivatives_restricted": True, "weights_sha256": "ab" * 32,
            "library": "timm", "source": "owkin/phikon",
        },
        "sae": {
            "architecture": "topk", "n_latents": N_LATENTS, "k": 8, "random_state": 0,
            "metrics": {"fvu": 0.152, "fvu_val": 0.171, "l0": 8.0, "dead": 5, "n_train": 200},
        },
        "roles": {"patient": "case_id", "scanner": "scanner"},
        "provenance": {"versions": {"biosae": "0.1.0", "torch": "2.15"}},
    }  # fmt: skip
    return adata


def bh(p: pd.Series) -> pd.Series:
    """Benjamini-Hochberg over the p-values that are there."""
    known = p.dropna().sort_values(ascending=False)
    m = len(known)
    return (known * m / np.arange(m, 0, -1)).cummin().clip(upper=1).reindex(p.index)


def make_associations(adata: anndata.AnnData) -> pd.DataFrame:
    """Spearman over patient means; intervals by Fisher's z."""
    embedding = adata.obsm["embedding"]
    centred = embedding - embedding.mean(axis=0)
    components = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    sources = {
        "latent": (adata.X.toarray(), list(adata.var_names)),
        "raw": (embedding, [f"raw_{j:04d}" for j in range(WIDTH)]),
        "pca": (components, [f"pc_{j:03d}" for j in range(WIDTH)]),
    }
    parts = []
    for source, (values, names) in sources.items():
        units = pd.DataFrame(values, index=adata.obs["patient"].astype(str)).groupby(level=0, sort=True).mean()
        for target in ("count_a", "count_b"):
            y = adata.obs.groupby(adata.obs["patient"].astype(str), sort=True)[target].mean()
            rows = []
            for j, name in enumerate(names):
                dead = source == "latent" and 10 <= j < 15
                sparse = source == "latent" and j == 15
                r, p = (np.nan, np.nan) if dead else spearmanr(units[j].to_numpy(), y.to_numpy())
                half = norm.ppf(0.975) / np.sqrt(N_PATIENTS - 3)
                low, high = np.tanh(np.arctanh(np.clip(r, -0.999, 0.999)) + np.array([-half, half]))
                rows.append(
                    {
                        "latent": name, "target": target, "method": "spearman", "unit": "patient", "estimate": r,
                        "ci_low": low, "ci_high": high, "statistic": r, "p": np.nan if sparse else p,
                        "n_units": N_PATIENTS, "n_samples": adata.n_obs,
                        "status": "dead" if dead else "too_sparse" if sparse else "ok",
                        "effect": "spearman_rho", "source": source,
                    }
                )  # fmt: skip
            part = pd.DataFrame(rows)
            part["q"] = bh(part["p"])
            part["p_maxt"] = (part["p"] * 20).clip(upper=1)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def make_run(folder: Path, *, optional: bool = True, random_state: int = 0) -> Path:
    """Write the run folder; ``optional=False`` leaves out every table that a run may lack."""
    folder.mkdir(parents=True, exist_ok=True)
    adata = make_latents(random_state=random_state)
    adata.write_h5ad(folder / "latents.h5ad")
    table = make_associations(adata)
    table.to_csv(folder / "associations.csv", index=False)
    if not optional:
        return folder
    tables = folder / "tables"
    tables.mkdir(exist_ok=True)
    best = table.dropna(subset=["p"]).sort_values("p").drop_duplicates(["target", "source"])
    replicated = best[["target", "source", "latent", "method", "effect"]].assign(
        estimate_discovery=best["estimate"], estimate_replication=best["estimate"] * 0.85,
        ci_low=(best["ci_low"] - 0.1).clip(lower=-1), ci_high=best["ci_high"], p_replication=0.01, p_holm=0.02,
        replicated=best["q"] < 0.05, shrinkage=0.85, n_units_discovery=12, n_units_replication=8,
        n_samples_discovery=144, n_samples_replication=96, status_replication="ok", groups_shared=0,
    )  # fmt: skip
    replicated.to_csv(tables / "replication.csv", index=False)
    rows = []
    for target, latent, pooled, within in (("count_a", "L0003", 0.9, 0.88), ("count_b", "L0007", 0.4, 0.02)):
        for stratum, r, n in (
            ("pooled", pooled, 20),
            ("within", within, 20),
            ("AT2", within, 10),
            ("GT450", within, 10),
        ):
            rows.append(
                {
                    "target": target, "latent": latent, "source": "latent", "stratum": stratum, "estimate": r,
                    "ci_low": r - 0.15, "ci_high": min(r + 0.08, 1), "n_units": n, "n_samples": 12 * n,
                    "p": 0.001 if abs(r) > 0.3 else 0.7, "effect": "spearman_rho", "unit": "patient", "status": "ok",
                }
            )  # fmt: skip
    pd.DataFrame(rows).to_csv(tables / "within_strata.csv", index=False)
    rng = np.random.default_rng(1)
    flags = pd.DataFrame(
        {
            "latent": adata.var_names, "factor": "scanner", "eta2_biology": rng.beta(1, 12, N_LATENTS),
            "eta2_technical": rng.beta(1, 15, N_LATENTS), "p": rng.random(N_LATENTS), "flag": "mixed",
        }
    )  # fmt: skip
    flags.loc[3, ["eta2_biology", "eta2_technical", "flag"]] = [0.74, 0.03, "biology"]
    flags.loc[7, ["eta2_biology", "eta2_technical", "flag", "p"]] = [0.02, 0.81, "technical", 0.002]
    flags = flags.assign(biology="count_a", n_units=240)
    other = flags.assign(factor="site", eta2_technical=flags["eta2_technical"].to_numpy()[::-1], flag="neither")
    pd.concat([flags, other]).to_csv(tables / "confounders.csv", index=False)
    table.assign(estimate=table["estimate"] + 0.02).to_csv(tables / "unadjusted.csv", index=False)
    readout = pd.DataFrame(
        [
            {
                "encoder": encoder, "layer": layer, "features": features, "factor": "scanner",
                "balanced_accuracy": 0.99 - 0.05 * i - 0.1 * (features == "latents"), "ci_low": 0.8, "ci_high": 1.0,
                "chance": 0.5, "n_units": 20,
            }
            for i, (encoder, layer) in enumerate(VIEWS)
            for features in ("raw", "latents")
        ]
    )  # fmt: skip
    readout.to_csv(tables / "readout.csv", index=False)
    comparison = pd.concat(
        [
            replicated.assign(
                encoder=encoder, layer=layer, estimate_replication=replicated["estimate_replication"] * factor
            )
            for (encoder, layer), factor in zip(VIEWS, (0.8, 1.0, 0.5))
        ]
    )  # fmt: skip
    comparison.to_csv(tables / "comparison.csv", index=False)
    pd.DataFrame(
        {
            "item": ["Ramirez-003_tile9001", "Ramirez-004_tile9002", "Ramirez-004_tile9003", "Ramirez-004_tile9003"],
            "stage": ["embed", "embed", "read/tiles", "embed"],  # a file that is absent fails twice and is one sample
            "reason": ["truncated", "truncated", "missing", "missing"],
            "detail": ["/home/anna/Ramirez-003.png"] * 4,
        }
    ).to_csv(folder / "failures.csv", index=False)
    pd.DataFrame(
        {
            "stage": ["samples", "embed/phikon", "train/phikon__blocks.11", "embed/phikon"], "state": "ran",
            "seconds": [1.2, 200.0, 64.3, 184.1], "cpu_seconds": [1.0, 380.0, 120.0, 350.0],
            "peak_rss_mb": [310, 2048, 1900, 2050],
        }
    ).to_csv(folder / "log.csv", index=False)  # fmt: skip
    choices = {"unit": "patient", "aggregate": "mean", "correction": "bh", "n_permutations": 999, "strata": None,
               "covariates": ["spline(age, df=4)", "sex"], "groups": "patient",
               "sae_training": {"known": True, "n_groups": 20, "n_groups_trained_on": 12}}  # fmt: skip
    write_json(tables / "associate.json", choices)
    write_json(folder / "provenance.json", {"versions": {"biosae": "0.1.0", "torch": "2.15"}, "python": "3.11.9"})
    write_json(
        folder / "study.json",
        {
            "name": "toy", "title": "Cell counts in a toy cohort", "random_state": 0,
            "question": "Which latents follow cell counts, and do they hold within a scanner?",
            "config": {"samples": {"table": "/home/anna/Ramirez-data/tiles.csv", "patient": "case_id"}},
        },
    )  # fmt: skip
    return folder
