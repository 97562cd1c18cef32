"""A store of float16 embeddings on disk, and training from it against training from the same rows in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from saebench.contestants import Case, Contestant
from saebench.data import synthetic

CASE = Case("2M x 768", 2_000_000, 768, 12_288, 32, 4_096, 0, 6)
CASE_SMALL = Case("20k x 64", 20_000, 64, 512, 8, 256, 0, 6, warm=2)
TOKENS = 100
"""Rows of each sample, as of patch embeddings; keeps the table of samples short."""
SHARD = 1_000
"""Samples of one shard."""


def contestants() -> list[Contestant]:
    """The same estimator on the store and on an array; ``source`` is read by :mod:`peers.biosae_streamed`."""
    options = {"backend": "numba", "prefilter": "bfloat16"}
    return [
        Contestant(label, "biosae_streamed", options | {"source": source}, "ours", 20)
        for label, source in (("in memory", "array"), ("streamed", "store"))
    ]


def store(folder: Path, *, n: int, d: int, seed: int = 0) -> Path:
    """Write ``n`` rows of float16 as an embeddings folder (through its own shard writer) and as one ``.npy`` file.

    A block of 50,000 structured rows is repeated with a new sign for each feature and new order, as drawing millions
    of rows afresh would take longer than training on them. Returns the path of the ``.npy``; the store lies beside it.
    """
    import pandas as pd

    from biosae.embeddings import shards

    rng = np.random.default_rng(seed)
    rows_each = SHARD * TOKENS
    block = synthetic(min(50_000, n), d, seed=seed).astype(np.float16)
    obs = pd.DataFrame(index=pd.Index([f"s{i:06d}" for i in range(n // TOKENS)], name="sample_id"))

    class Samples(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.obs)

    samples = Samples(obs=obs, roles={}, mpp=None, fingerprint="synthetic")
    plan = shards.make_plan(
        identity={"encoder": "synthetic"}, identity_fingerprint="synthetic", samples=samples, dtype="float16",
        shard_samples=SHARD,
    )  # fmt: skip
    shards.begin(folder / "store", plan, resume=False)
    array = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float16, shape=(n, d))
    entries = []
    for number, start in enumerate(range(0, n, rows_each)):
        rows = array[start : start + rows_each]
        for begin in range(0, len(rows), len(block)):
            part = rows[begin : begin + len(block)]
            signs = rng.choice(np.array([-1, 1], np.float16), d)
            part[:] = block[rng.permutation(len(block))[: len(part)]] * signs
        ids = obs.index[start // TOKENS : (start + len(rows)) // TOKENS].tolist()
        entries.append(
            shards.commit(
                folder / "store", number, plan, [rows], ids=ids, failures={}, tokens_per_sample=TOKENS, grid=None,
                batch_size=1, device="cpu",
            )
        )  # fmt: skip
    array.flush()
    shards.finish(folder / "store", plan, entries, samples)
    return folder / "rows.npy"
