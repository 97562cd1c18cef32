"""Exact search of biosae against scikit-learn and faiss: CPU-seconds side by side in one run.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/search.py --docs docs/benchmarks.md
    python benchmarks/search.py --smoke --out /tmp/search.json       # toy sizes, to see that everything runs

Sparse codes (and, beside them, dense embeddings) of one corpus, the 10 nearest by cosine of each query. scikit-learn
takes the sparse rows as they are; faiss searches dense rows, so that codes are written out in full for it. Times are
CPU-seconds of one thread, warm, the median of repeats in which all take turns; answers are compared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse as sp
from pages import insert, keep

from biosae.search import Index

ROOT = Path(__file__).resolve().parents[1]
FULL = {"n": 100_000, "m": 4_096, "k": 32, "d": 1_024, "queries": 256, "neighbours": 10}
SMALL = {"n": 2_000, "m": 128, "k": 8, "d": 32, "queries": 16, "neighbours": 5}


def codes(n: int, m: int, k: int, seed: int) -> sp.csr_matrix:
    """Rows with k active latents, of which some are 100 times as common as others."""
    rng = np.random.default_rng(seed)
    weight = np.log(np.geomspace(1, 0.01, m))
    index = np.empty((n, k), np.int32)
    for start in range(0, n, 4096):  # Gumbel top-k: k latents without repetition, by weight
        stop = min(start + 4096, n)
        noisy = weight + rng.gumbel(size=(stop - start, m))
        index[start:stop] = np.sort(np.argpartition(-noisy, k, axis=1)[:, :k], axis=1)
    value = rng.exponential(size=n * k).astype(np.float32)
    return sp.csr_matrix((value, index.ravel(), np.arange(0, n * k + 1, k)), shape=(n, m))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sklearn_search(rows: Any, n: int) -> Callable[[Any], np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    fitted = NearestNeighbors(n_neighbors=n, metric="cosine", algorithm="brute").fit(rows)
    return lambda queries: fitted.kneighbors(queries, return_distance=False)


def faiss_search(rows: np.ndarray, n: int, kind: str) -> Callable[[Any], np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    return lambda queries: index.search(queries, n)[1]


def measure(size: dict[str, int], repeats: int) -> dict[str, Any]:
    """Times of building and asking, and the share of our neighbours that each of the others finds too."""
    n, wanted = size["n"], size["neighbours"]
    rng = np.random.default_rng(1)
    X, Q = codes(n, size["m"], size["k"], 0), codes(size["queries"], size["m"], size["k"], 2)
    E = rng.normal(size=(n, 32)).astype(np.float32) @ rng.normal(size=(32, size["d"])).astype(np.float32)
    E += rng.normal(size=E.shape).astype(np.float32)
    F = E[rng.choice(n, size["queries"])] + rng.normal(size=(size["queries"], size["d"])).astype(np.float32)
    found = {}
    for name, rows, queries in (("sparse codes", X, Q), ("dense embeddings", E, F)):
        dense = unit(rows.toarray() if sp.issparse(rows) else rows)
        asked = unit(queries.toarray() if sp.issparse(queries) else queries)
        makers: dict[str, tuple[Callable[[], Any], Any]] = {
            "biosae": (lambda r=rows: Index(r), queries),
            "scikit-learn brute": (lambda r=rows: sklearn_search(r, wanted), queries),
            "faiss Flat": (lambda r=dense: faiss_search(r, wanted, "Flat"), asked),
        }
        tools, lines = {}, {}
        for tool, (make, own) in makers.items():
            start = time.process_time()
            made = make()
            lines[tool] = {"build": time.process_time() - start, "times": []}
            ask = (lambda q, index=made: index.search(q, n=wanted).rows) if tool == "biosae" else made
            tools[tool] = (ask, own, ask(own))  # the first call compiles
        for _ in range(repeats):
            for tool, (ask, own, _) in tools.items():
                start = time.process_time()
                ask(own)
                lines[tool]["times"].append(time.process_time() - start)
        ours = tools["biosae"][2]
        for tool, (_, _, rows_found) in tools.items():
            lines[tool]["search"] = median(lines[tool].pop("times"))
            lines[tool]["same"] = float(np.mean([len(set(a) & set(b)) / wanted for a, b in zip(ours, rows_found)]))
        found[name] = lines
        del tools, dense
    return {"size": size, "found": found, "threads": os.environ.get("OMP_NUM_THREADS", "all")}


def table(results: dict[str, Any]) -> str:
    """The section of the page."""
    size = results["size"]
    lines = [
        f"{size['n']:,} rows, {size['queries']} queries, {size['neighbours']} neighbours by cosine; sparse: "
        f"{size['m']:,} latents, {size['k']} active; dense: {size['d']:,} columns. CPU-seconds of one thread, in "
        "brackets multiples of biosae. faiss holds codes as dense rows; building puts them into its index, and does "
        "not count making them.",
        "",
        "| rows | tool | search | build | same neighbours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, tools in results["found"].items():
        own = tools["biosae"]["search"]
        for tool, row in tools.items():
            ratio = "" if tool == "biosae" else f" ({row['search'] / own:,.1f}x)"
            lines.append(f"| {name} | {tool} | {row['search']:.3f}{ratio} | {row['build']:.2f} | {row['same']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/search.json", help="raw results")
    parser.add_argument("--docs", type=Path, help="page whose section between the markers is replaced")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    options = parser.parse_args()
    results = measure(SMALL if options.smoke else FULL, options.repeats)
    keep(results, options.out)
    lines = table(results)
    print(lines)
    if options.docs:
        insert(options.docs, "search", lines)


if __name__ == "__main__":
    main()
