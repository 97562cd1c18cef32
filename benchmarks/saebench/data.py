"""Matrices to train on: structured synthetic rows, and patch embeddings of real tissue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse

HELD = 8192
"""Held-out rows of the synthetic matrix; they are drawn from the same dictionary."""


def synthetic(n: int, d: int, *, seed: int = 0, atoms: int = 4096, active: int = 16, rank: int = 16) -> np.ndarray:
    """Rows with a planted sparse dictionary (70 % of the variance), a low-rank background (20 %) and noise (10 %).

    Atoms are random directions; how often an atom is used falls off as 1 / sqrt(rank) of the atom, amplitudes are
    gamma(2). The background has ``rank`` dimensions of falling variance. Mean square of an entry: 1.

    Returns
    -------
    ndarray (n, d), float32
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((atoms, d), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    weight = 1 / np.sqrt(np.arange(1, atoms + 1))
    chosen = np.searchsorted(np.cumsum(weight / weight.sum()), rng.random(n * active)).clip(max=atoms - 1)
    amplitude = rng.gamma(2.0, size=n * active).astype(np.float32)
    codes = scipy.sparse.csr_matrix((amplitude, chosen, np.arange(0, n * active + 1, active)), shape=(n, atoms))
    scales = np.linspace(1, 0.2, rank, dtype=np.float32)
    axes = np.linalg.qr(rng.standard_normal((d, min(rank, d))))[0].T.astype(np.float32)
    background = (rng.standard_normal((n, len(axes)), dtype=np.float32) * scales[: len(axes)]) @ axes
    parts = (np.asarray(codes @ directions), background, rng.standard_normal((n, d), dtype=np.float32))
    total = np.zeros((n, d), np.float32)
    for part, share in zip(parts, (0.7, 0.2, 0.1)):
        part -= part.mean(0)
        total += part * np.float32(np.sqrt(share) / part.std())
    return total


def write_synthetic(folder: Path, *, n: int, d: int, seed: int = 0) -> tuple[Path, Path]:
    """Training and held-out rows as ``.npy``; made once for each size."""
    paths = folder / f"synthetic_{n}x{d}_{seed}.npy", folder / f"synthetic_{n}x{d}_{seed}_held.npy"
    if not all(p.exists() for p in paths):
        folder.mkdir(parents=True, exist_ok=True)
        rows = synthetic(n + HELD, d, seed=seed)
        np.save(paths[1], rows[n:])
        np.save(paths[0], rows[:n])
    return paths


def write_real(folder: Path, shared: Path, *, every: int = 1) -> tuple[Path, Path]:
    """Patch embeddings of breast tumour spots (her2st) by a frozen histology encoder, made once, of ``every``-th tile.

    The test part of every section is held out. Centred, and scaled by one factor to a mean square entry of 1, with the
    numbers of the training rows: some peers expect such input and none is then at a disadvantage.
    """
    paths = folder / f"her2st_{every}.npy", folder / f"her2st_{every}_held.npy"
    if all(p.exists() for p in paths):
        return paths
    import biosae as bs

    table = shared / "data/her2st_spots/manifest.csv"
    samples = bs.read.tiles(
        table, patient="patient_id", slide="section_id", split="split", id="sample_id", mpp=0.775, root=table.parent
    )
    samples = samples.select(np.arange(0, len(samples), every))
    encoder = bs.encoders.load(shared / "weights/nic_histology_multitask4", device="cpu", patch_stride=32)
    embedded = bs.encoders.embed(samples, encoder, layer=-1, pool="tokens", out=folder / f"her2st_{every}")
    held = np.repeat((embedded.obs["split"] == "test").to_numpy(), embedded.tokens_per_sample)
    rows = embedded.array()
    mean = rows[~held].mean(0, dtype=np.float64)
    rows = rows - mean.astype(np.float32)
    rows /= np.sqrt(np.square(rows[~held], dtype=np.float64).mean()).astype(np.float32)
    np.save(paths[1], rows[held])
    np.save(paths[0], rows[~held])
    return paths


def shape(path: Path) -> tuple[int, int]:
    """Rows and features of an ``.npy`` file."""
    return np.load(path, mmap_mode="r").shape
