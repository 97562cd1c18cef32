"""Forward passes in bfloat16 and ``precision="fast"`` against float32, alternated in one run, and how far they drift.

Speed is images a second of the bare forward pass; the cosine is that of ``final`` with float32's, the smallest over the
images. A network with random weights says something of speed and nothing of drift.

    python benchmarks/precision.py --weights WEIGHTS --tiles DATA/her2st_spots/images [--threads 2]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

import biosae as bs
from biosae.settings import settings

RANDOM = {"mean": "half", "std": "half", "size": 224, "weights": "random"}
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("timm:vit_small_patch16_224", RANDOM, 64),
    ("mobilenetv2-imagenet", {}, 64),
    ("nic-histology-multitask4", {}, 64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the encoders' weights")
    parser.add_argument("--tiles", type=Path, required=True, help="folder of images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings.weights_dirs, settings.progress = (options.weights,), False
    samples = bs.read.images(options.tiles, patient=None)
    print("| network | asked | taken | images/s | x float32 | least cosine |\n| --- | --- | --- | --- | --- | --- |")
    for name, given, n in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoders = {p: bs.encoders.load(name, precision=p, **given) for p in ("float32", "bfloat16", "fast")}
        batch = torch.stack([encoders["float32"].preprocess(samples[i]) for i in range(n)])
        found = {p: next(iter(e.forward(batch).values())) for p, e in encoders.items()}
        times: dict[str, list[float]] = {p: [] for p in encoders}
        for _ in range(options.repeats):
            for precision, encoder in encoders.items():
                start = time.perf_counter()
                encoder.forward(batch)
                times[precision].append(time.perf_counter() - start)
        base = median(times["float32"])
        for precision, encoder in encoders.items():
            spent = median(times[precision])
            cosine = torch.nn.functional.cosine_similarity(found[precision], found["float32"]).min().item()
            print(
                f"| {name} | {precision} | {encoder.precision} | {n / spent:.1f} | {base / spent:.2f} | {cosine:.5f} |"
            )


if __name__ == "__main__":
    main()
