"""Association tests of biosae against other ways to compute them: CPU-seconds side by side in one run.

    OMP_NUM_THREADS=1 python benchmarks/stats.py --docs docs/benchmarks.md
    python benchmarks/stats.py --smoke --out /tmp/stats.json       # toy sizes, to see that everything runs

Sparse latents of samples from patients; every task is the public ``associate`` over all pairs, and its kernels alone
where they can be called alone. Baselines work on the largest share of the same data that is quick enough and are
scaled to the whole: Pearson as dense products of blocks of centred latents, scanpy's Wilcoxon with tie correction, a
loop over pairs with scipy or statsmodels. Times are CPU-seconds, warm, the median of repeats; set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pages import insert, keep
from scipy import stats

from biosae.stats import associate
from biosae.stats.correlation import as_columns, rank_target
from biosae.stats.kernels import kernels
from biosae.stats.projection import Projection, batch

ROOT = Path(__file__).resolve().parents[1]
FULL = {"n": 100_000, "m": 16_384, "k": 32, "targets": 50, "covariates": 6, "patients": 200, "permutations": 1_000}
SMALL = {"n": 2_000, "m": 256, "k": 8, "targets": 4, "covariates": 2, "patients": 20, "permutations": 20}
GOALS = {
    "Pearson": 1.5, "Spearman": 1.5, "AUROC": 1.5, "Wilcoxon": 1.5, "partial + OLS": 1.5, "cluster-robust": 2.5,
    "max-T within patients": 60.0,
}  # fmt: skip


def data(size: dict[str, int], seed: int = 0) -> anndata.AnnData:
    """Codes (n, m) with k active a row, and a table with numbers, labels, covariates and patients."""
    rng = np.random.default_rng(seed)
    n, m, k = size["n"], size["m"], size["k"]
    index = rng.integers(0, m // k, (n, k)) + np.arange(k) * (m // k)  # every latent alive, columns ascend
    X = sp.csr_matrix(
        (rng.exponential(size=n * k).astype(np.float32), index.astype(np.int32).ravel(), np.arange(0, n * k + 1, k)),
        shape=(n, m),
    )
    columns: dict[str, Any] = {"patient": rng.integers(0, size["patients"], n).astype(str)}
    for t in range(size["targets"]):
        columns[f"n{t}"] = rng.normal(size=n) if t % 2 else rng.poisson(3, n).astype(float)
        columns[f"b{t}"] = rng.random(n) < (0.5 if t % 3 else 0.1)
    columns |= {f"c{c}": rng.normal(size=n) for c in range(size["covariates"])}
    return anndata.AnnData(X, obs=pd.DataFrame(columns, index=np.arange(n).astype(str)))


def tasks(size: dict[str, int]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> prefix of its targets and arguments of ``associate``."""
    free = {"unit": "sample", "assume_independent": True, "controls": False}
    adjust = {"method": "ols", "covariates": [f"c{c}" for c in range(size["covariates"])]}
    within = {"n_permutations": size["permutations"], "permute": "within", "method": "pearson"}
    return {
        "Pearson": ("n", {"method": "pearson", **free}),
        "Spearman": ("n", {"method": "spearman", **free}),
        "AUROC": ("b", {"method": "auroc", **free}),
        "Wilcoxon": ("b", {"method": "wilcoxon", **free}),
        "partial + OLS": ("n", {**adjust, **free}),
        "cluster-robust": ("n", {**adjust, "unit": "sample", "controls": False}),
        "max-T within patients": ("n", {**within, "unit": "sample", "controls": False}),
    }


def kernel_tasks(adata: anndata.AnnData, size: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """What is left without reading the table and building the result: columns, products, variances."""
    numbers = [adata.obs[f"n{t}"].to_numpy(float) for t in range(size["targets"])]
    labels = np.column_stack([adata.obs[f"b{t}"] for t in range(size["targets"])]).astype(np.uint8)
    C = adata.obs[[f"c{c}" for c in range(size["covariates"])]].to_numpy(float)
    codes = pd.factorize(adata.obs["patient"])[0]

    def ranked() -> sp.csc_matrix:
        V = as_columns(adata.X)
        return sp.csc_matrix((kernels().ranks(V, kernels().order(V)), V.indices, V.indptr), shape=V.shape)

    def area() -> Any:
        V = as_columns(adata.X)
        return kernels().delong(V, kernels().order(V), labels), batch(Projection(ranked(), None), list(labels.T))

    return {
        "Pearson": lambda: batch(Projection(as_columns(adata.X), None), numbers),
        "Spearman": lambda: batch(Projection(ranked(), None), [rank_target(y) for y in numbers]),
        "AUROC": area,
        "Wilcoxon": area,
        "partial + OLS": lambda: batch(Projection(as_columns(adata.X), C), numbers),
        "cluster-robust": lambda: batch(Projection(as_columns(adata.X), C), numbers).scores(codes, codes.max() + 1),
    }


def cpu(work: Callable[[], Any], repeats: int) -> float:
    """Median CPU-seconds of repeats."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found)


def dense_pearson(adata: anndata.AnnData, size: dict[str, int]) -> float:
    """CPU-seconds of all pairs by dense products, from the first blocks of 512 latents."""
    width, blocks = min(512, size["m"]), 2
    Y = np.column_stack([adata.obs[f"n{t}"] for t in range(size["targets"])])
    Y = (Y - Y.mean(axis=0)) / np.linalg.norm(Y - Y.mean(axis=0), axis=0)
    columns = adata.X.tocsc()

    def work() -> None:
        for start in range(0, min(width * blocks, size["m"]), width):
            X = columns[:, start : start + width].toarray()
            X -= X.mean(axis=0)
            r = X.T @ Y / np.maximum(np.linalg.norm(X, axis=0), 1e-300)[:, None]
            2 * stats.t.sf(np.abs(r) * np.sqrt((len(X) - 2) / (1 - r * r)), len(X) - 2)

    return cpu(work, 1) * size["m"] / min(width * blocks, size["m"])


def scanpy_wilcoxon(adata: anndata.AnnData, size: dict[str, int]) -> float | None:
    """CPU-seconds of scanpy's tie-corrected Wilcoxon of every label, from one label and 256 latents."""
    try:
        import scanpy
    except ImportError:
        return None
    width = min(256, size["m"])
    part = anndata.AnnData(adata.X[:, :width].tocsr(), obs=adata.obs[["b1"]].astype(str).astype("category"))

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scanpy.tl.rank_genes_groups(part, "b1", method="wilcoxon", tie_correct=True, groups=["True"])

    work()
    return cpu(work, 1) * size["m"] / width * size["targets"]


def pair_loop(adata: anndata.AnnData, size: dict[str, int]) -> dict[str, float]:
    """CPU-seconds of a loop over pairs with scipy and statsmodels, from a few latents."""
    dense = adata.X[:, :4].toarray().astype(np.float64)
    y, label = adata.obs["n1"].to_numpy(float), adata.obs["b1"].to_numpy(bool)
    pairs = size["m"] * size["targets"]
    out = {
        "Pearson": cpu(lambda: [stats.pearsonr(x, y) for x in dense.T], 1),
        "Spearman": cpu(lambda: [stats.spearmanr(x, y) for x in dense.T], 1),
        "Wilcoxon": cpu(
            lambda: [
                stats.mannwhitneyu(x[label], x[~label], use_continuity=False, method="asymptotic") for x in dense.T
            ],
            1,
        ),
    }
    try:
        import statsmodels.api as sm
    except ImportError:
        return {name: seconds / 4 * pairs for name, seconds in out.items()}
    C = adata.obs[[f"c{c}" for c in range(size["covariates"])]].to_numpy(float)
    groups = pd.factorize(adata.obs["patient"])[0]

    def fit(**options: Any) -> None:
        for x in dense.T:
            sm.OLS(y, sm.add_constant(np.column_stack([x, C]))).fit(**options)

    out["partial + OLS"] = cpu(fit, 1)
    out["cluster-robust"] = cpu(lambda: fit(cov_type="cluster", cov_kwds={"groups": groups}), 1)
    return {name: seconds / 4 * pairs for name, seconds in out.items()}


def measure(size: dict[str, int], repeats: int, only: list[str] | None) -> dict[str, Any]:
    """CPU-seconds of every task, its kernels and its baselines, and the peak memory before baselines."""
    adata = data(size)
    found: dict[str, Any] = {}
    chosen = {name: task for name, task in tasks(size).items() if not only or name in only}
    for name, (prefix, options) in chosen.items():
        columns = [f"{prefix}{t}" for t in range(size["targets"])]
        few = {**options, **({"n_permutations": 20} if "permute" in options else {})}
        associate(adata, columns[:2], **few)  # compiles
        once = 1 if "permute" in options else repeats
        found[name] = {"cpu_s": cpu(lambda c=columns, o=options: associate(adata, c, **o), once)}
        print(name, round(found[name]["cpu_s"], 2), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, work in kernel_tasks(adata, size).items():
        if name in found:
            work()
            found[name]["kernels_cpu_s"] = cpu(work, repeats)
    if "Pearson" in found:
        found["Pearson"]["dense_cpu_s"] = dense_pearson(adata, size)
    if "Wilcoxon" in found:
        found["Wilcoxon"]["scanpy_cpu_s"] = scanpy_wilcoxon(adata, size)
    for name, seconds in pair_loop(adata, size).items():
        if name in found:
            found[name]["loop_cpu_s"] = seconds
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "size": size, "tasks": found, "peak_gib": peak, "load": load, "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(), "kernels": kernels().__name__.rpartition("_")[2],
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The section of the page."""
    size = results["size"]

    def against(row: dict[str, Any], name: str) -> str:
        other = row.get(name)
        return "" if other is None else f"{other:,.3g} ({other / max(row['cpu_s'], 1e-9):,.0f}x)"

    lines = [
        f"{size['n']:,} samples, {size['m']:,} latents, {size['k']} active a sample, {size['targets']} targets, "
        f"{size['covariates']} covariates, {size['patients']} patients; CPU-seconds. Baselines in "
        f"brackets as multiples, scaled from a part. Peak memory {results['peak_gib']:.2f} GiB, "
        f"kernels in {results['kernels']}.",
        "",
        "| task | `associate` | goal | kernels alone | dense products | scanpy | scipy / statsmodels loop |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["tasks"].items():
        alone = f"{row['kernels_cpu_s']:.2f}" if "kernels_cpu_s" in row else ""
        lines.append(
            f"| {name} | {row['cpu_s']:.2f} | {GOALS[name]} | {alone} | {against(row, 'dense_cpu_s')} | "
            f"{against(row, 'scanpy_cpu_s')} | {against(row, 'loop_cpu_s')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/stats.json", help="raw results")
    parser.add_argument("--docs", type=Path, help="page whose section between the markers is replaced")
    parser.add_argument("--only", nargs="*", help=f"tasks: {', '.join(GOALS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args()
    results = measure(SMALL if options.smoke else FULL, options.repeats, options.only)
    keep(results, options.out)
    lines = table(results)
    print(lines)
    if options.docs:
        insert(options.docs, "stats", lines)


if __name__ == "__main__":
    main()
