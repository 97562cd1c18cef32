"""Does a faster backend learn the same? Loss against the dense backend, same seed, rows and order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from saebench.data import synthetic
from saebench.feed import Run

VARIANTS = {
    "numba": {"backend": "numba"},
    "torch": {"backend": "torch"},
    "bf16 prefilter": {"backend": "numba", "prefilter": "bfloat16"},
}
TESTS = {
    "A: every latent fires": {"d": 384, "m": 4096, "k": 32, "batch": 1024, "steps": 200, "more": {}},
    "B: latents fire rarely": {"d": 64, "m": 4096, "k": 8, "batch": 64, "steps": 1000, "more": {"aux_k": 0}},
    "B with AuxK": {"d": 64, "m": 4096, "k": 8, "batch": 64, "steps": 1000, "more": {"dead_after": 16_384}},
}
"""B: 0.125 firings a latent and step, where an optimiser that skips silent latents goes astray by 4 to 9 %."""
LAST = 0.1
"""Share of the steps, at the end, whose logged losses are averaged."""


def compare(*, seeds: Iterable[int], smoke: bool, threads: int) -> Iterator[dict[str, Any]]:
    """Per cent by which loss (last tenth of the steps) and FVU (all rows, after training) differ from dense."""
    import torch

    torch.set_num_threads(threads)
    for test, sizes in TESTS.items():
        steps = sizes["steps"] // 10 if smoke else sizes["steps"]
        rows = synthetic(16 * sizes["batch"] if sizes["batch"] > 64 else 16_384, sizes["d"])
        for seed in seeds:
            run = Run(sizes["m"], sizes["k"], sizes["batch"], steps, 0, None, seed)
            dense = _numbers(rows, run, {"backend": "dense"}, sizes["more"])
            for variant, options in VARIANTS.items():
                record = {"test": test, "seed": seed, "variant": variant, "steps": steps}
                found = _numbers(rows, run, options, sizes["more"])
                off = {name: 100 * (found[name] / dense[name] - 1) for name in ("loss", "fvu")}
                print(
                    f"{test:24} seed {seed}  {variant:16} loss {off['loss']:+.3f} %  FVU {off['fvu']:+.3f} %",
                    flush=True,
                )
                yield record | off | {"dead": found["dead"], "dead_dense": dense["dead"]}


def _numbers(rows: np.ndarray, run: Run, options: dict[str, Any], more: dict[str, Any]) -> dict[str, float]:
    from peers.biosae_sae import estimator

    run.options = options
    sae = estimator(run, **more).fit(rows)
    last = [h["loss"] for h in sae.history_ if h["step"] > run.steps * (1 - LAST)]
    return {"loss": float(np.mean(last)), "fvu": sae.metrics_["fvu"], "dead": sae.metrics_["dead_share"]}
