"""Throughput of ``embed`` (files to embeddings on disk) against the bare forward pass of the same network.

Both do the same images, in the same batches, alternated in one process. "Bare" gives already preprocessed tensors, held
in memory, to ``encoder.forward``; "pipeline" is ``bs.embeddings.embed`` from JPEG tiles to a finished folder. The ratio
of wall times is what a user sees; the ratio of CPU times is what remains on a machine that others use too, and equals
forward / (forward + reading + preprocessing) where nothing is wasted.

    python benchmarks/embed.py                                    # timm networks with random weights
    python benchmarks/embed.py --weights path/to/encoder_folder   # a folder that bs.encoders.load can open
    python benchmarks/embed.py --tiles path/to/tiles              # a folder of images instead of rendered ones
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import biosae as bs
from biosae.settings import settings


def render_tiles(folder: Path, *, n: int, side: int) -> None:
    """JPEG files (quality 85) of smooth coloured noise, about as large on disk as tissue tiles."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(60, 255, (side // 6, side // 6, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"tile_{i:05d}.jpg", quality=85)


def clocks() -> np.ndarray:
    times = os.times()
    return np.array([time.perf_counter(), times.user + times.system])


def compare(encoder: object, samples: object, *, batch_size: int, repeats: int, n_jobs: int) -> dict[str, float]:
    """Median wall and CPU seconds of both ways, over ``repeats`` alternated runs."""
    tensors = torch.stack([encoder.preprocess(samples[i]) for i in range(len(samples))])

    def bare() -> None:
        for start in range(0, len(tensors), batch_size):
            found = encoder.forward(tensors[start : start + batch_size], [encoder.resolve_layer(-1)], "default")
            next(iter(found.values())).to("cpu")

    def pipeline() -> None:
        with tempfile.TemporaryDirectory() as out:
            bs.embeddings.embed(samples, encoder, out=out, batch_size=batch_size, n_jobs=n_jobs)

    bare()
    spent: dict[str, list[np.ndarray]] = {"bare": [], "pipeline": []}
    for _ in range(repeats):
        for name, work in (("bare", bare), ("pipeline", pipeline)):
            before = clocks()
            work()
            spent[name].append(clocks() - before)
    result = {}
    for name, times in spent.items():
        result[f"{name}_wall"], result[f"{name}_cpu"] = (median(v[c] for v in times) for c in (0, 1))
    for c, clock in enumerate(("wall", "cpu")):  # of neighbouring runs, so that a neighbour's load falls on both
        result[f"ratio_{clock}"] = median(b[c] / p[c] for b, p in zip(spent["bare"], spent["pipeline"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="encoder folders with trained weights")
    parser.add_argument("--encoders", nargs="*", help="names for bs.encoders.load(..., weights='random')")
    parser.add_argument("--tiles", type=Path, help="folder of tiles; rendered if not given")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--side", type=int, nargs="*", default=[224, 256])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n-jobs", type=int, nargs="*", default=[settings.n_jobs])
    options = parser.parse_args()
    settings.progress = False
    names = options.encoders
    if names is None:
        names = [] if options.weights else ["timm:resnet18", "timm:vit_small_patch16_224"]
    made = {"mean": "half", "std": "half", "size": 224}
    encoders = [bs.encoders.load(folder) for folder in options.weights]
    encoders += [bs.encoders.load(name, weights="random", **made) for name in names]
    print(f"{torch.get_num_threads()} threads; bare and pipeline alternated, medians of {options.repeats}")
    heads = ("tile", 8), ("jobs", 5), ("bare/s", 9), ("pipe/s", 9), ("wall ratio", 11), ("CPU ratio", 10), ("cores", 7)
    print(f"{'encoder':32}" + "".join(f"{name:>{width}}" for name, width in heads))
    with tempfile.TemporaryDirectory() as folder:
        for side in [None] if options.tiles else options.side:
            tiles = options.tiles or Path(folder) / str(side)
            if side is not None:
                tiles.mkdir()
                render_tiles(tiles, n=options.n, side=side)
            samples = bs.read.tiles(tiles, patient=None, mpp=0.5).select(slice(0, options.n))
            shown = "x".join(map(str, samples[0].shape[:2]))
            for encoder in encoders:
                for n_jobs in options.n_jobs:
                    r = compare(encoder, samples, batch_size=options.batch_size, repeats=options.repeats, n_jobs=n_jobs)
                    n = len(samples)
                    print(
                        f"{encoder.info.name[:31]:32}{shown:>8}{n_jobs:>5}{n / r['bare_wall']:>9.1f}"
                        f"{n / r['pipeline_wall']:>9.1f}{r['ratio_wall']:>11.3f}{r['ratio_cpu']:>10.3f}"
                        f"{r['bare_cpu'] / r['bare_wall']:>7.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
