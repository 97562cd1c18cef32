"""biosae on rows that lie in a store (``options["source"] == "store"``) or, the same rows, in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from saebench.feed import Run

from peers.biosae_sae import timed_fit

ENTRY = "`SAE(...).fit(Embeddings.open(folder))`"


def train(matrix: Path, run: Run) -> None:
    """Fit; ``matrix`` is the path of the ``.npy``, beside which the store lies."""
    import biosae as bs

    options = dict(run.options)
    stored = options.pop("source") == "store"
    rows = bs.embeddings.Embeddings.open(matrix.parent / "store") if stored else np.load(matrix)
    inner = replace(run, options=options)
    timed_fit(rows, inner)
    run.span, run.timed_steps, run.setup = inner.span, inner.timed_steps, inner.setup
