"""Heat map of a slide of 20,000 tiles: codes to map, map to picture, on a pyramid; beside scanpy and plain matplotlib.

The slide is made here: 160 x 125 tiles of 128 px at 0.5 um/px, stored as a tiled pyramid. Codes are random, 4,096
latents of which 32 fire in a tile. All ways draw the same latent of the same tiles to a PNG of 150 dots an inch, in
turn, so that their ratios hold on a machine that others use.

    python benchmarks/slide_map.py [--docs docs/benchmarks.md] [--repeats 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import anndata
import numpy as np
import pandas as pd
import tifffile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pages import insert
from scipy.sparse import csr_matrix

import biosae as bs
from biosae.interpret import examples, places, slide_map, slide_view, spatial_table, write_geojson

COLUMNS, ROWS, TILE, MPP = 160, 125, 128, 0.5
N_LATENTS, K, TOKENS = 4096, 32, 49
DPI = 150


def make_slide(path: Path) -> Path:
    """A pyramid of three levels whose full size is COLUMNS x ROWS tiles, written tile by tile."""
    rng = np.random.default_rng(0)
    grain = rng.integers(150, 240, (TILE, TILE, 3), dtype=np.uint8)

    def tiles(factor: int) -> Any:
        for _ in range(-(-ROWS // factor) * -(-COLUMNS // factor)):  # the last tile of a row or column is cut
            yield grain

    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for factor in (1, 4, 16):
            shape = (ROWS * TILE // factor, COLUMNS * TILE // factor, 3)
            options = {"subfiletype": int(factor > 1), "photometric": "rgb", "compression": "jpeg", "metadata": None}
            scale = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"} if factor == 1 else {}
            tiff.write(tiles(factor), shape=shape, dtype=np.uint8, tile=(TILE, TILE), **options, **scale)
    return path


def make_codes(n: int, *, n_latents: int = N_LATENTS, k: int = K) -> csr_matrix:
    rng = np.random.default_rng(1)
    columns = np.sort(rng.integers(0, n_latents, (n, k)), axis=1)
    made = csr_matrix(
        (rng.gamma(2, 1, n * k).astype(np.float32), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n_latents)
    )
    made.sum_duplicates()
    return made


def make_latents() -> anndata.AnnData:
    y, x = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    obs = pd.DataFrame(
        {"slide": "s", "patient": "p", "slide_mpp_x": MPP, "slide_mpp_y": MPP}, index=[f"t{i}" for i in range(len(x))]
    )
    out = anndata.AnnData(make_codes(len(x)), obs=obs)
    out.var_names = [f"L{j:04d}" for j in range(N_LATENTS)]
    out.obsm["spatial"] = (np.stack([x, y], axis=1) + 0.5) * TILE * MPP
    out.obsm["embedding"] = np.random.default_rng(2).normal(size=(len(x), 768)).astype(np.float32)
    return out


def make_tokens(tiles: anndata.AnnData) -> anndata.AnnData:
    """7 x 7 tokens a tile, of few latents (the size of the table does not enter a map)."""
    n = tiles.n_obs
    obs = tiles.obs.iloc[np.repeat(np.arange(n), TOKENS)].copy()
    obs["token_row"], obs["token_col"] = (np.tile(part, n) for part in np.divmod(np.arange(TOKENS), 7))
    obs.index = pd.RangeIndex(len(obs)).astype(str)
    out = anndata.AnnData(make_codes(len(obs), n_latents=64, k=2), obs=obs)
    out.var_names = [f"L{j:04d}" for j in range(64)]
    out.obsm["spatial"] = np.repeat(tiles.obsm["spatial"], TOKENS, axis=0)
    return out


def by_scanpy(adata: anndata.AnnData, latent: str, source: Path, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (ax,) = sc.pl.spatial(spatial_table(adata, source=source, size=1600), color=latent, show=False)
    ax.figure.savefig(out, dpi=DPI)
    pyplot.close(ax.figure)


def by_squares(adata: anndata.AnnData, latent: str, source: Path, out: Path) -> None:
    """One polygon a tile, as one would write it by hand."""
    from matplotlib.collections import PolyCollection

    picture, (left, upper, right, lower) = slide_view(source, size=1600)
    where = places(adata)
    half = where["width_um"].iloc[0] / 2
    corners = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    squares = where[["x_um", "y_um"]].to_numpy()[:, None, :] + corners
    fig = Figure(figsize=(5, 4), layout="constrained")
    ax = fig.subplots()
    ax.imshow(picture, extent=(left, right, lower, upper))
    ax.add_collection(PolyCollection(squares, array=adata[:, latent].X.toarray().ravel(), alpha=0.6))
    FigureCanvasAgg(fig).print_figure(out, dpi=DPI)


def by_biosae(adata: anndata.AnnData, latent: str, source: Path | None, out: Path) -> None:
    ax = bs.pl.slide(slide_map(adata, latent), source=source)
    bs.pl.save(ax, out.with_suffix(""), formats=("png",), dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="page whose section between the markers is replaced")
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the first, which warms caches")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder) / "map.png", make_slide(Path(folder) / "slide.tiff")
        tiles = make_latents()
        tokens, latent = make_tokens(tiles), "L0007"
        ways: dict[str, Callable[[], Any]] = {
            "codes to map (`slide_map`)": lambda: slide_map(tiles, latent),
            "the slide's picture, 1,600 px (`slide_view`)": lambda: slide_view(source, size=1600),
            "map and picture to PNG (`pl.slide`)": lambda: by_biosae(tiles, latent, source, out),
            "the same by one polygon a tile (matplotlib)": lambda: by_squares(tiles, latent, source, out),
            "the same by `scanpy.pl.spatial`": lambda: by_scanpy(tiles, latent, source, out),
            "980,000 tokens to map": lambda: slide_map(tokens, latent),
            "980,000 tokens, map and picture to PNG": lambda: by_biosae(tokens, latent, source, out),
            "GeoJSON of 20,000 tiles, 4 latents": lambda: write_geojson(
                Path(folder) / "map.geojson", tiles, list(tiles.var_names[:4])
            ),
            "examples of a latent, near misses by 768 dimensions": lambda: examples(tiles, latent),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):  # the first warms caches of files and imports
            for name, work in ways.items():
                start = time.perf_counter()
                work()
                if repeat:
                    times[name].append(time.perf_counter() - start)
            print(f"round {repeat} of {options.repeats}", flush=True)
        megabytes = (Path(folder) / "map.geojson").stat().st_size / 1e6
    lines = ["| step | seconds |", "| --- | --- |"]
    lines += [f"| {name} | {median(each):.3g} |" for name, each in times.items()]
    text = "\n".join(lines) + f"\n\nThe GeoJSON file has {megabytes:.1f} MB.\n"
    print(text)
    if options.docs:
        insert(options.docs, "slide_map", text)


if __name__ == "__main__":
    main()
