"""Damaged files of embeddings: each is read or ends in a typed error, through ``bs.read.features`` end to end."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fuzzing import MEMORY, _round, fuzz, mutations

import biosae as bs
from biosae.embeddings import features, guard

N, D = 40, 16


def read_all(path: str) -> None:
    """Read one file as a user would; the file's rows have ids of their own, or those given here."""
    ids = [f"r{i}" for i in range(N)] if path.endswith(".npy") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        emb = bs.read.features(path, encoder="some", licence="MIT", patient=None, ids=ids, max_failures=0.5)
        assert np.isfinite(emb.array()).all()


def read_passed(path: str) -> None:
    """The same for a file that the guarding process let pass."""
    features.crashing = lambda paths: {}
    read_all(path)


def seed(folder: Path, kind: str) -> Path:
    """A small healthy file of one kind."""
    h5py, anndata = pytest.importorskip("h5py"), pytest.importorskip("anndata")
    rng = np.random.default_rng(0)
    X, coords = rng.normal(size=(N, D)).astype("f4"), np.stack([np.arange(N) * 256, np.arange(N) % 7 * 256], axis=1)
    ids = np.array([f"r{i}" for i in range(N)])
    path = folder / f"seed.{kind.split('_')[0]}"
    if kind == "npy":
        np.save(path, X)
    elif kind == "npz":
        np.savez_compressed(path, features=X, ids=ids)
    elif kind == "parquet":
        pd.DataFrame({"sample_id": ids, "vector": list(X)}).to_parquet(path)
    elif kind == "h5ad":
        groups = pd.DataFrame({"group": pd.Categorical(list("ab") * (N // 2)), "n": range(N)}, index=ids)
        anndata.AnnData(X, obs=groups).write_h5ad(path)
    else:
        packed = {"compression": "gzip", "shuffle": True} if kind == "h5_gzip" else {"chunks": (1, D)}
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=X, **packed).attrs["encoder"] = "uni_v1"
            file.create_dataset("coords", data=coords).attrs["patch_size_level0"] = 256
    return path


KINDS = ("npy", "npz", "parquet", "h5ad", "h5_rows", "h5_gzip")


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet", "h5_gzip"])
def test_thirty_damaged_files_of_each_kind(kind, tmp_path):
    n = 10 if kind == "h5_gzip" else 30
    assert fuzz("test_fuzz_features:read_all", [seed(tmp_path, kind)], tmp_path, n=n, seconds=60) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_damaged_files_of_each_kind(kind, tmp_path):
    """HDF5 files go through one guarding process here, not through one each; what it lets pass must be harmless."""
    if not kind.startswith("h5"):
        assert fuzz("test_fuzz_features:read_all", [seed(tmp_path, kind)], tmp_path, n=500) == []
        return
    healthy = seed(tmp_path, kind)
    paths = []
    for i, (damage, data) in enumerate(mutations(healthy.read_bytes(), 500)):
        paths.append(tmp_path / f"{i:04d}_{damage}{healthy.suffix}")
        paths[-1].write_bytes(data)
    dead = guard.crashing(paths)
    print(f"{kind}: the HDF5 library does not survive {len(dead)} of 500 files")
    left = [p for i, p in enumerate(paths) if i not in dead]
    faults: list[str] = []
    while left:
        left = left[_round("test_fuzz_features:read_passed", left, 20, MEMORY, faults) :]
    assert faults == []
